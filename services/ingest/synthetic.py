"""The synthetic market as a live feed, and as a DBN file that any Databento client reads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.ingest.normalize import REASONS, Normalizer
from services.ingest.pacing import Pacer
from services.ingest.source import Output, Resume
from services.ingest.synthetic_chain import Option
from services.ingest.synthetic_dbn import Listing, definition, metadata, write_file
from services.ingest.synthetic_market import MarketOptions, SyntheticMarket
from services.ingest.synthetic_products import DAY
from shared.calendar import GLOBEX
from shared.errors import ConfigError
from shared.frames import NS
from shared.messages import Clock
from shared.settings import Synthetic

log = logging.getLogger(__name__)

VENUE = "SYNTH"  # its instruments trade always
WARM_UP_SECONDS = 600
CATCH_UP_SECONDS = 2 * 3600
IN_A_BLOCK = 1 << 24  # ordinals: block number and place within
CHUNK = 65_536
OPTION_SHARE = 0.1  # of the trades, where options trade


class Cursor(msgspec.Struct):
    """Where a chunk begins; `at_ns` is the receipt of its first record."""

    ordinal: int
    boundary: int
    at_ns: int
    watch_ns: int


class SyntheticFeed:
    """Source: the market from ten minutes ago (at once) to now and on, at `speed` times event time.

    After a crash it goes on where the bus stands. Away for more than CATCH_UP_SECONDS, it begins to
    watch anew. `clock` gives the time in ns.
    """

    def __init__(
        self, settings: Synthetic, partitions: int, *, feed: str = "synthetic", clock: Callable[[], int] = time.time_ns
    ) -> None:
        if settings.speed <= 0 or settings.trades_per_second <= 0 or not settings.roots:
            raise ConfigError("[synthetic] wants speed and trades_per_second above 0 and at least one root")
        self.feed = feed
        self.settings = settings
        self._partitions, self._clock = partitions, clock
        self._market = SyntheticMarket(
            MarketOptions(
                settings.seed, tuple(settings.roots), settings.trades_per_second, contracts=3,
                option_share=OPTION_SHARE,
            )
        )  # fmt: skip
        # Another market is another tape; another speed is not.
        made_of = f"{settings.seed}/{settings.roots}/{settings.trades_per_second}/{OPTION_SHARE}"
        self.tape = blake2b(made_of.encode(), digest_size=8).hexdigest()

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """See Source; ends only when stopped."""
        now = self._clock()
        at = self._begin(resume, now)
        pacer = Pacer(self.settings.speed)
        pacer.anchor(now if self.settings.speed == 1 or at.ordinal < 0 else at.at_ns)
        play = _Play(self, out, at, pacer, stop)
        out.connection("connected", f"seed {self.settings.seed}, {' '.join(self.settings.roots)}")
        for index, records in self._market.blocks(self._market.index(at.at_ns)):
            play.block(index, records)
            if stop.is_set():
                break
        out.flush()

    def _begin(self, resume: Resume, now: int) -> Cursor:
        """The bus's cursor, or one at the start of a new watch (ordinal -1)."""
        held = list(resume.cursors.values())
        if held and all(held):
            oldest = min((msgspec.json.decode(c, type=Cursor) for c in held), key=lambda c: c.ordinal)
            if self.settings.speed != 1 or now - oldest.at_ns <= CATCH_UP_SECONDS * NS:
                return oldest
            log.warning("%s was away for long: watching anew", self.feed)
        start = (now // NS - WARM_UP_SECONDS) * NS
        return Cursor(-1, 0, start, start)


class _Play:
    """One run of the feed, block after block."""

    def __init__(self, feed: SyntheticFeed, out: Output, at: Cursor, pacer: Pacer, stop: threading.Event) -> None:
        self.feed, self.out, self.at, self.pacer, self.stop = feed, out, at, pacer, stop
        self.market = feed._market
        self.normalizer = Normalizer(feed.feed, feed._partitions)
        self.normalizer.boundary_ns = at.boundary
        self.counted = [0] * len(REASONS)
        self.day = -1
        self.newest = self.told = at.at_ns

    def block(self, index: int, records: NDArray[Any]) -> None:
        """Push a block's records as they fall due."""
        start = index * self.market.block_ns
        if start // DAY != self.day:
            self._enter(max(start, self.at.at_ns))
        received = records["ts_recv"]
        base = index * IN_A_BLOCK
        done = max(0, self.at.ordinal - base) if self.at.ordinal >= 0 else int(np.searchsorted(received, self.at.at_ns))
        while not self.stop.is_set():
            end_of_block = done >= len(records)
            head = start + self.market.block_ns if end_of_block else int(received[done])
            due = self.pacer.due(head, self.stop)
            if end_of_block and due >= head:
                return
            upto = min(done + CHUNK, int(np.searchsorted(received, due, side="right")))
            if upto > done:
                here = Cursor(base + done, self.normalizer.boundary_ns, int(received[done]), self.at.watch_ns)
                self.out.ticks(self.normalizer(records[done:upto], base + done), msgspec.json.encode(here))
                self._count()
                self.newest, done = int(received[upto - 1]), upto
            else:
                self._tick(due)

    def _enter(self, at_ns: int) -> None:
        """A new UTC date lists new contracts and options (an id means the same for years)."""
        before = self.normalizer.active_partitions()
        day_ns, venue, feed = at_ns // DAY * DAY, VENUE, self.feed.feed
        listed = [(c.native, c.instrument(venue, feed)) for c in self.market.contracts(at_ns)]
        listed += [(o.native, o.instrument(venue, feed, day_ns)) for o in self.market.options_on(at_ns)]
        self.out.instruments([instrument for _, instrument in listed])
        for native, instrument in listed:
            self.normalizer.map(native, instrument)
        self.day = at_ns // DAY
        if before != self.normalizer.active_partitions():
            self.out.broadcast(Clock(self.feed.feed, self.at.watch_ns, watched_from_ns=self.at.watch_ns))

    def _tick(self, due: int) -> None:
        """A quiet market: time passes all the same. Never so far that a trade to come would be late."""
        mark = (due // NS - 1) * NS
        if mark > self.told and due - self.newest > 2 * NS:
            self.told = mark
            self.out.broadcast(Clock(self.feed.feed, mark, wall_ns=self.feed._clock()))

    def _count(self) -> None:
        for i, total in enumerate(self.normalizer.skipped.tolist()):
            if total != self.counted[i]:
                self.out.count(REASONS[i], total - self.counted[i])
                self.counted[i] = total


# -- files -------------------------------------------------------------------------------------


def generate(
    out: Path,
    *,
    trades: int,
    seed: int = 1,
    start: str | int = "2024-05-09T14:30:00Z",
    roots: Sequence[str] = ("ES", "NQ", "CL"),
    contracts: int = 2,
    rate: float = 50.0,
    late_fraction: float = 0.0,
    late_seconds: float = 0.0,
    definitions: bool = False,
    sessions: bool = False,
    options: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write `trades` tbbo records to a DBN file (`.zst`: compressed) and say what is in it.

    The front contracts roll in the middle of the tape. `sessions`: CME Globex hours, and dataset
    GLBX.MDP3; else the venue SYNTH, which never closes. `definitions`: also `<name>.definitions.dbn`
    beside it. `options`: a tenth of the trades are of options, and there are definitions. The same options give the
    same bytes. Raises OSError, ConfigError.
    """
    start_ns = start if isinstance(start, int) else _instant(start)
    market = SyntheticMarket(
        MarketOptions(
            seed, tuple(roots), rate, contracts, sessions, late_fraction, late_seconds, start_ns,
            _middle(start_ns, trades / rate / 2, sessions), OPTION_SHARE if options else 0.0,
        )
    )  # fmt: skip
    dataset = GLOBEX if sessions else VENUE
    part = out.with_name(out.name + ".part")
    try:
        with part.open("w+b") as body:
            listed, end_ns = _write_body(body, market, start_ns, trades, progress)
            head = metadata(dataset, "tbbo", start_ns, end_ns, listed)
            body.seek(0)
            write_file(out, head, body)
    finally:
        part.unlink(missing_ok=True)
    summary: dict[str, Any] = {
        "file": str(out), "trades": trades, "contracts": sum(getattr(c, "far", c) is None for c in listed),
        "start": _iso(start_ns), "end": _iso(end_ns), "bytes": out.stat().st_size,
    }  # fmt: skip
    if options:
        summary["options"] = sum(isinstance(c, Option) for c in listed)
    if definitions or options:
        beside = out.with_name(out.name.removesuffix(".zst").removesuffix(".dbn") + ".definitions.dbn")
        head = metadata(dataset, "definition", start_ns, end_ns, listed)
        beside.write_bytes(head + b"".join(definition(c, start_ns) for c in listed))
        summary["definitions"] = str(beside)
    return summary


def _middle(start_ns: int, seconds: float, sessions: bool) -> int:
    """The instant by which so much market time has passed."""
    if not sessions:
        return start_ns + int(seconds * NS)
    market = SyntheticMarket(MarketOptions(sessions=True, from_ns=start_ns))
    low, high = start_ns, start_ns + int((seconds * 3 + 10 * 86_400) * NS)
    while high - low > NS:
        middle = (low + high) // 2
        low, high = (middle, high) if market.open_seconds(start_ns, middle) < seconds else (low, middle)
    return high


def _write_body(
    body: BinaryIO, market: SyntheticMarket, start_ns: int, trades: int, progress: Callable[[int], None] | None
) -> tuple[list[Listing], int]:
    """Records to a file; which contracts were listed meanwhile, and the whole second after the last record."""
    listed: dict[int, Listing] = {}
    made, day, last = 0, -1, start_ns
    for index, records in market.blocks(market.index(start_ns)):
        rows = records[np.searchsorted(records["ts_recv"], start_ns) :][: trades - made]
        block_day = index * market.block_ns // DAY
        if block_day != day:
            day = block_day
            at_ns = index * market.block_ns
            new: list[Listing] = [*market.contracts(at_ns), *market.options_on(at_ns)]
            listed.update((c.native, c) for c in new)
        body.write(rows.tobytes())
        made += len(rows)
        last = int(rows["ts_recv"][-1]) if len(rows) else last
        if progress is not None:
            progress(made)
        if made >= trades:
            return list(listed.values()), (last // NS + 1) * NS
    raise AssertionError("blocks do not end")


def _iso(ns: int) -> str:
    return f"{np.datetime64(ns, 'ns').astype('datetime64[s]')}Z"


def _instant(text: str) -> int:
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(f"'{text}' is no ISO time such as 2024-05-09T14:30:00Z") from None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return int(at.timestamp()) * NS + at.microsecond * 1000
