"""What the records of Databento live sessions mean, across connections: no socket, no wall clock.

Time is what the feed says it is: event times of trades, and the gateway's clock in its heartbeats
and in the capture times of records.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import databento_dbn
import msgspec
import numpy as np
from numpy.typing import NDArray

from services.ingest.databento_session import Dropped, ReplayTooOld, one_line
from services.ingest.dedupe import Ledger
from services.ingest.definitions import UNDEF_TIMESTAMP, from_definition, from_symbol
from services.ingest.normalize import REASONS, Normalizer
from services.ingest.source import RECEIVED, Grouped, Output, Resume
from shared.errors import AuthError, ConfigError
from shared.frames import CLOCK, NS, TICK, Rows
from shared.instruments import feed_id, is_spread
from shared.log import names
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Databento

log = logging.getLogger(__name__)

Published = Callable[[int, int], Rows]
# Blocks of (raw symbol by native id, RECORD records with those ids), in event order.
History = Iterable[tuple[Mapping[int, str], NDArray[Any]]]

# A heartbeat says that every trade of a second ago has been sent.
HEARTBEAT_GRACE_NS = NS
CURSOR_EVERY_NS = 60 * NS
DISORDER_SLACK_NS = NS
NEVER = 2**62


class Cursor(msgspec.Struct, frozen=True):
    """Where a partition's rows go on: all of its rows before `at` are on the bus.

    `watched`: since when this feed is watched. `active`: partitions that have an instrument, and
    since when, for those that have no cursor of their own yet.
    """

    at: int
    watched: int
    active: dict[int, int]


class Feed:
    """Turns records into pushes to an Output; everything that outlives a connection is here."""

    def __init__(self, settings: Databento, partitions: int, name: str, out: Output) -> None:
        self.name = name
        self.heard_ns = 0
        self.watched_ns: int | None = None
        self.streaming = False
        self.progress = False
        self.given_up = False  # what was missed; the next session begins now, whatever came before
        self._settings = settings
        self._out = out
        self._margin_ns = int(settings.resume_margin_seconds * NS)
        self._normalizer = Normalizer(name, partitions)
        self._ledger = Ledger(self._margin_ns + DISORDER_SLACK_NS)
        self._partitions = partitions
        self._defined: dict[str, Instrument] = {}
        self._pending: dict[int, Instrument] = {}
        self._active: dict[int, int] = {}
        self._announced: set[int] = set()
        self._last_ns = self._floor_ns = 0
        self._watermark_ns = self._cursor_ns = 0
        self._gap: tuple[int, int | None, str] | None = None
        self._cursor_tail = b""
        self._counted = self._normalizer.skipped.copy()
        self._begin(None, 0)

    # -- where we are ------------------------------------------------------------------------

    @property
    def position_ns(self) -> int:
        """Everything before it (and some after it) has been pushed or given up."""
        return max(self._last_ns, self._watermark_ns, self._floor_ns)

    @property
    def resume_ns(self) -> int | None:
        """From where a new session must replay; None when nothing was watched yet."""
        if self.watched_ns is None:
            return None
        return max(self.position_ns - self._margin_ns, self.watched_ns)

    def restore(self, resume: Resume, published: Published | None) -> None:
        """Go on where a former process stopped: from its cursors and from what the bus really holds."""
        held = {p: msgspec.json.decode(c, type=Cursor) for p, c in resume.cursors.items() if c}
        if not held:
            return
        newest = max(held.values(), key=lambda c: c.at)
        self._active = dict(newest.active)
        self.watched_ns = newest.watched
        # A partition without a cursor lost even its first rows; one with a stale cursor was away in between.
        reached = [max(held[p].at, since) if p in held else since for p, since in self._active.items()]
        self._floor_ns = min(reached, default=newest.at)
        self.heard_ns = newest.at
        self._announced = set(held)
        self._renew_cursor()
        since = self.resume_ns or 0
        if published is not None:
            for p in held:
                self._ledger.restore(p, published(p, since))

    def _cursor(self) -> bytes:
        return b'{"at":%d,%s' % (self.position_ns, self._cursor_tail)

    def _renew_cursor(self) -> None:
        whole = msgspec.json.encode(Cursor(0, self.watched_ns or 0, self._active))
        self._cursor_tail = whole.partition(b",")[2]

    # -- sessions ----------------------------------------------------------------------------

    def begin(self, start_ns: int | None, replays: int) -> None:
        """A session is being opened that replays `replays` schemas, trades from `start_ns` on."""
        self._begin(start_ns, replays)
        if self._gap is not None:
            self._gap = (self._gap[0], start_ns, self._gap[2])
        if start_ns is not None and not self._announced:
            self._watch(start_ns)
        self._ledger.expect(start_ns if start_ns is not None else NEVER)

    def _begin(self, start_ns: int | None, replays: int) -> None:
        self._normalizer.forget()
        self._pending.clear()
        self._replays_left = replays if start_ns is not None else 0
        self._session_ns = 0
        self._resolved = False
        self._unresolved: set[str] = set()
        self.progress = False

    def dropped(self, reason: str) -> None:
        """The session is over; what is missing until the next one will be asked for again."""
        if self.streaming:
            self.streaming = False
            self._out.broadcast(Disconnect(self.name, self.heard_ns, reason))
            self._out.flush()
        self._out.connection("down", reason)

    def lost(self, reason: str, until_ns: int | None = None) -> None:
        """Nothing brings back what lies between the position and `until_ns` (or what comes next)."""
        start = self._gap[0] if self._gap else self.position_ns
        self._gap = (start, until_ns, reason)

    def give_up(self, reason: str) -> None:
        """What was missed so far is not asked for: sessions begin now until one has told of the gap before it."""
        self.given_up = True
        if self.watched_ns is not None:
            self.lost(reason)

    def skip_to(self, at_ns: int) -> None:
        """There was nothing to see before."""
        if self.watched_ns is not None:
            self._floor_ns = max(self._floor_ns, at_ns)

    def rest(self) -> None:
        """The feed is about to be away on purpose: the cursor says how far it has got."""
        if self._active and self.position_ns:
            self._push_cursor(max(self._watermark_ns, self.position_ns - HEARTBEAT_GRACE_NS))

    def backfill(self, blocks: History, until_ns: int) -> None:
        """Push what another source has of the time between the position and `until_ns`."""
        self._begin(None, 0)
        self._ledger.expect(self.resume_ns or 0)
        for symbols, records in blocks:
            self._normalizer.forget()
            self._pending.clear()
            for native, symbol in symbols.items():
                self._point(native, symbol, int(records["ts_event"][0]) if len(records) else until_ns)
            if len(records):
                self.trades(records)
        self._gap = None
        self._floor_ns = max(self._floor_ns, until_ns)

    # -- records -----------------------------------------------------------------------------

    def metadata(self, metadata: Any) -> None:  # noqa: ARG002
        """See Handler."""
        self.streaming = True
        self._out.connection("connected", f"{self._settings.dataset} {','.join(self._settings.symbols)}"[:120])

    def received(self, records: int, nbytes: int) -> None:
        """See Handler."""
        self._out.count(RECEIVED, records, nbytes)

    def trades(self, records: NDArray[Any]) -> None:
        """See Handler."""
        if self.watched_ns is None:
            self._watch(int(records["ts_recv"][0]))
        self._settle()
        self._close_gap(int(records["ts_event"][0]))
        cursor = self._cursor()
        captured = int(records["ts_recv"].max())
        self.heard_ns = max(self.heard_ns, captured)
        if 0 < self._session_ns <= captured:
            self._replays_left = 0  # captured since the session began: this is live
        grouped = self._normalizer(records, 0)
        grouped.ordinals[:] = 0
        fresh, doubled = self._ledger.admit(grouped)
        if len(fresh.rows):
            self.progress = True
            self._out.ticks(fresh, cursor)
            self._ledger.add(fresh)
            # A clock ahead of the gateway's must not carry us past trades to come.
            self._last_ns = max(self._last_ns, min(int(fresh.rows["ts_event_ns"].max()), self.heard_ns))
            self._cursor_ns = self._last_ns
        self._count(doubled)

    def record(self, record: Any) -> None:
        """See Handler."""
        if isinstance(record, databento_dbn.SymbolMappingMsg):
            self._resolved = True
            on_ns = record.ts_event if 0 < record.ts_event < UNDEF_TIMESTAMP else self.heard_ns
            self._point(record.instrument_id, record.stype_out_symbol, on_ns)
        elif isinstance(record, databento_dbn.InstrumentDefMsg):
            instrument = from_definition(record, self._settings.dataset, self.name, self._settings.option_roots)
            self._defined[instrument.symbol] = self._pending[record.instrument_id] = instrument
        elif isinstance(record, databento_dbn.SystemMsg):
            self._heard(record.ts_event)
            self._system(record)
        elif isinstance(record, databento_dbn.ErrorMsg):
            self._heard(record.ts_event)
            self._error(
                int(record.code) if record.code is not None else 255, one_line(record.err, self._settings.api_key)
            )
        else:
            self._out.count("other_record", 1)

    def _heard(self, ts_ns: int) -> None:
        if 0 < ts_ns < UNDEF_TIMESTAMP:
            self.heard_ns = max(self.heard_ns, ts_ns)
            if not self._session_ns:
                self._session_ns = ts_ns
                if self._gap is not None and self._gap[1] is None:
                    self._gap = (self._gap[0], ts_ns, self._gap[2])  # no replay: this session begins here

    def _system(self, record: Any) -> None:
        if record.is_heartbeat():
            self._heartbeat()
            return
        code = record.code
        if code == databento_dbn.SystemCode.SLOW_READER_WARNING:
            log.warning("%s: the gateway says that this reader is slow: %s", self.name, one_line(record.msg))
            self._out.count("slow_reader_warning", 1)
        elif code == databento_dbn.SystemCode.REPLAY_COMPLETED:
            done = "tbbo" in record.msg.lower()
            self._replays_left = 0 if done else max(0, self._replays_left - 1)
        elif code == databento_dbn.SystemCode.SUBSCRIPTION_ACK and self.watched_ns is None:
            self._watch(self.heard_ns)

    def _heartbeat(self) -> None:
        """Quiet, but alive: time goes on, unless a replay is still on its way."""
        self.progress = True
        self._out.flush()  # in a quiet market, too, we learn soon that the bus has refused us
        if self._replays_left:
            return
        now = self.heard_ns
        if self.watched_ns is None:
            self._watch(now)
        self._settle()
        self._close_gap(now)
        watermark = now - HEARTBEAT_GRACE_NS
        if watermark > self.position_ns:
            self._out.broadcast(Clock(self.name, watermark, wall_ns=now))
            self._watermark_ns = watermark
            if self._active and watermark - self._cursor_ns >= CURSOR_EVERY_NS:
                self._push_cursor(watermark)

    def _error(self, code: int, text: str) -> None:
        where = f"Databento ({self._settings.dataset})"
        if code == 1:
            raise AuthError(f"{where} refused the API key: {text}; check DATABENTO_API_KEY")
        if code == 2:
            raise AuthError(
                f"{where} says that the API key is deactivated: {text}; put a valid one into DATABENTO_API_KEY"
            )
        if code == 3:
            raise ConfigError(f"{where} allows no further connection: {text}; stop another client of this key")
        if code == 5:
            raise ConfigError(
                f"{where} refused the subscription: {text}; "
                "check databento.dataset, databento.symbols and databento.stype"
            )
        if code == 4:
            self._unknown_symbol(where, text)
        elif code == 7:
            self._out.count("skipped_by_gateway", 1)
            log.warning("%s skipped records, because this reader was slow: %s", where, text)
            self.lost(f"skipped by the gateway: {text}")
        elif code == 8:
            raise ReplayTooOld(f"the replay starts too early: {text}")
        elif code == 6:
            raise Dropped(f"the gateway reports an internal error: {text}")
        else:
            self._out.count("gateway_error", 1)
            log.warning("%s: error of unknown code %d: %s", where, code, text)

    def _unknown_symbol(self, where: str, text: str) -> None:
        asked = self._settings.symbols
        named = [s for s in asked if re.search(rf"(?<![\w.]){re.escape(s)}(?!\w|\.\w)", text)]
        self._unresolved.update(named or [text])
        self._out.count("unresolved_symbol", 1)
        log.warning("%s does not know a symbol: %s", where, text, extra={"symbol": names(named)})
        if not self._resolved and len(self._unresolved) >= len(set(asked)):
            raise ConfigError(
                f"{where} knows none of {', '.join(asked)} as {self._settings.stype}: "
                "check databento.symbols and databento.stype"
            )

    # -- instruments, clocks, gaps -----------------------------------------------------------

    def _point(self, native: int, symbol: str, on_ns: int) -> None:
        venue, roots = self._settings.dataset, self._settings.option_roots
        self._pending[native] = self._defined.get(symbol) or from_symbol(venue, symbol, self.name, on_ns, roots)

    def _watch(self, since_ns: int) -> None:
        self.watched_ns = since_ns
        self._floor_ns = max(self._floor_ns, since_ns)
        self._renew_cursor()

    def _settle(self) -> None:
        """Before data: instruments that were named since, and since when they are watched."""
        if not self._pending:
            return
        for native, instrument in self._pending.items():
            self._normalizer.map(native, instrument)
        found = [i for i in self._pending.values() if not is_spread(i.symbol, i.kind)]
        self._pending = {}
        self._out.instruments(found)
        active = self._normalizer.active_partitions()
        for p in active:
            self._active.setdefault(p, self.position_ns)
        if len(self._active) > len(active):  # a former process had others, too
            self._active = {p: self._active[p] for p in active}
        self._renew_cursor()
        if self.watched_ns is not None and not self._announced.issuperset(active):
            self._announced.update(active)
            self._out.broadcast(Clock(self.name, self.watched_ns, watched_from_ns=self.watched_ns))

    def _close_gap(self, next_ns: int) -> None:
        """What came again (or comes now) ends the gap that is open."""
        self.given_up = False
        if self._gap is None:
            return
        start, until, reason = self._gap
        self._gap = None
        end = next_ns if until is None else until
        if end > start:
            self._out.broadcast(Gap(self.name, start, end, reason))
            self._floor_ns = max(self._floor_ns, end)

    def _push_cursor(self, watermark_ns: int) -> None:
        """In-band clock rows: they carry the cursor on through a quiet market."""
        active = self._normalizer.active_partitions()
        rows = np.zeros(len(active), TICK)
        for name in ("price", "bid_px", "ask_px"):
            rows[name] = np.nan
        rows["ts_event_ns"], rows["ts_recv_ns"] = watermark_ns, self.heard_ns
        rows["instrument"], rows["kind"] = feed_id(self.name), CLOCK
        self._cursor_ns = watermark_ns
        ordinals = np.zeros(len(active), np.int64)
        self._out.ticks(Grouped(rows, ordinals, active, list(range(len(active) + 1))), self._cursor())

    def _count(self, doubled: int) -> None:
        self._out.count("replayed", doubled)
        skipped = self._normalizer.skipped
        if (skipped != self._counted).any():
            for reason, records in zip(REASONS, (skipped - self._counted).tolist(), strict=True):
                if records:
                    self._out.count(reason, records)
            self._counted = skipped.copy()
