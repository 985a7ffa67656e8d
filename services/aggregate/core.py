"""The pure core of the aggregate stage: (state, frames) -> (state, rows). No I/O, no clock.

`PartitionState` holds what one partition knows: its instruments and the kernel's arrays. The rows
do not depend on how the tape is cut into frames, steps or restarts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from services.aggregate import kernel
from services.aggregate.arena import WINDOW
from services.aggregate.layout import (
    CHUNK,
    GAP,
    LATE_ROWS,
    NEVER,
    NONE,
    REVISED,
    ROWS_1M,
    ROWS_1S,
    ROWS_FIXED,
    WANTED,
)  # fmt: skip
from services.aggregate.rows import whole
from services.aggregate.state import Config, State, candled, seed_name, solo, ticker_of
from shared.frames import LATE, NS, TICK, TICK_FRAMES, Frame, Rows
from shared.messages import AnyMessage, Clock, Disconnect, Gap, Instrument, decode, encode

JOIN_BELOW = 16_384  # bytes a frame
OPEN_NS = 1 << 62  # the end of a gap that is still open
JSON_KINDS = frozenset({"instrument", "clock", "gap", "disconnect"})


@dataclass(slots=True)
class Output:
    """What a step produced.

    `names[i]` is the (ticker, symbol) of row value `name == i`; of `fixed` rows `fixed_names[i]`, an
    (exchange, symbol or ticker).
    """

    candles_1m: list[Rows] = field(default_factory=list)
    candles_1s: list[Rows] = field(default_factory=list)
    fixed: list[Rows] = field(default_factory=list)
    late: list[Rows] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    fixed_names: list[tuple[str, str]] = field(default_factory=list)


class PartitionState(State):
    """One partition: `step` takes frames, `changes` gives what to commit."""

    # -- the step ----------------------------------------------------------------------------

    def step(self, frames: list[Frame], seeds: dict[str, float] | None = None) -> Output:
        """Take frames in stream order; `seeds` are CVD values for roots that `unseeded` named."""
        out = Output()
        seeds = seeds or {}
        bodies: list[bytes] = []
        for frame in frames:
            if frame.kind in TICK_FRAMES:
                bodies.append(frame.body)
            elif frame.kind in JSON_KINDS:
                self._ticks(bodies, out)
                bodies = []
                for message in decode(frame.body):
                    self._message(message, seeds, out)
                if self._index_stale:
                    self._index()
        self._ticks(bodies, out)
        for f in range(len(self.feeds)):
            while not kernel.flush(self._bind(), f):
                self._drain(out)
        self._drain(out)
        # A symbol that is its own ticker has the same name twice: crypto's with its exchange, for many have a BTCUSDT.
        out.names = [(ticker_of(i), ticker_of(i) if solo(i) else i.symbol) for i in self.registry.contracts]
        if out.fixed:
            out.fixed_names = [self._name(int(c), int(k)) for c, k in zip(
                self.entities["contract"], self.entities["root"], strict=True
            )]  # fmt: skip
        return out

    def _name(self, contract: int, root: int) -> tuple[str, str]:
        if root != NONE:
            return self.registry.roots[root]
        instrument = self.registry.contracts[contract]
        return instrument.venue, instrument.symbol

    def unseeded(self, frames: list[Frame]) -> list[tuple[str, int]]:
        """(name, instant in ns) of tickers and contracts that begin to be watched in these frames without a CVD.

        Contracts are named `venue:symbol`.
        """
        new: dict[str, str] = {}
        watched = {name: int(self.feeds[i]["watched_ns"]) for i, name in enumerate(self.registry.feeds)}
        known = {root: bool(self.roots[i]["seeded"]) for i, (_, root) in enumerate(self.registry.roots)}
        for i, (_, root) in enumerate(self.registry.roots):
            if not self.roots[i]["seeded"]:
                new[root] = self.registry.feeds[self.roots[i]["feed"]]
        for c in np.flatnonzero(self.contracts["seeded"] == 0):
            instrument = self.registry.contracts[c]
            new[seed_name(instrument)] = instrument.feed
        for frame in frames:
            if frame.kind in ("instrument", "clock"):
                for m in decode(frame.body):
                    if isinstance(m, Instrument) and candled(m):
                        if not known.get(ticker_of(m)):
                            new[ticker_of(m)] = m.feed
                        if m.id not in self._by_id:
                            new[seed_name(m)] = m.feed
                    elif isinstance(m, Clock) and m.watched_from_ns is not None and watched.get(m.feed, NONE) == NONE:
                        watched[m.feed] = m.watched_from_ns
        return [(root, watched[feed]) for root, feed in new.items() if watched.get(feed, NONE) != NONE]

    def _ticks(self, bodies: list[bytes], out: Output) -> None:
        # Small frames are joined, because each call costs; large ones are not, because copying does.
        if bodies and sum(map(len, bodies)) < JOIN_BELOW * len(bodies):
            bodies = [b"".join(bodies)]
        for body in bodies:
            self._run(np.frombuffer(body, TICK), out)

    def _run(self, ticks: Rows, out: Output) -> None:
        if len(ticks) > len(self._late):
            self._late = np.zeros((2 * len(ticks), 2), np.int64)
        if self._unwatched:
            self._watch_from_first(ticks, out)
        at = 0
        while at < len(ticks):
            at = kernel.run(ticks, at, self._bind(), self._late)
            if self.counters[LATE_ROWS]:
                self._drain_late(ticks, out)
            if self.counters[WANTED]:
                self._add_entity(int(self.counters[WANTED]) - 1, NONE)
                self.counters[WANTED] = 0
            elif at < len(ticks):
                self._drain(out)

    def _advance(self, f: int, watermark_ns: int, out: Output) -> None:
        while not kernel.advance(self._bind(), f, watermark_ns // NS):
            self._drain(out)
        self.feeds[f]["watermark_ns"] = max(watermark_ns, int(self.feeds[f]["watermark_ns"]))

    def _drain(self, out: Output) -> None:
        for which, rows, into in (
            (ROWS_1M, self._out_1m, out.candles_1m),
            (ROWS_1S, self._out_1s, out.candles_1s),
            (ROWS_FIXED, self._out_fixed, out.fixed),
        ):
            n = int(self.counters[which])
            if n:
                into.append(rows[:n].copy())
                self.counters[which] = 0

    def _drain_late(self, ticks: Rows, out: Output) -> None:
        n = int(self.counters[LATE_ROWS])
        rows = np.zeros(n, LATE)
        rows["tick"] = ticks[self._late[:n, 0]]
        rows["watermark_ns"] = self._late[:n, 1]
        rows["name"] = [self._by_id[int(i)] for i in rows["tick"]["instrument"]]
        out.late.append(rows)
        self.counters[LATE_ROWS] = 0

    # -- messages ----------------------------------------------------------------------------

    def _message(self, message: AnyMessage, seeds: dict[str, float], out: Output) -> None:
        match message:
            case Instrument():
                self._define(message, seeds)
            case Clock():
                self._clock(message, seeds, out)
            case Gap():
                self._gap(message, out)
            case Disconnect(since_ns=None):
                pass  # the watermark stands still by itself; what was lost comes as a Gap
            case Disconnect():
                self._suspect(message)

    def _clock(self, clock: Clock, seeds: dict[str, float], out: Output) -> None:
        f = self._feed(clock.feed)
        feed = self.feeds[f]
        watched = clock.watched_from_ns
        if watched is None and feed["watched_ns"] == NONE:
            watched = clock.watermark_ns
        if watched is not None and watched > feed["watched_ns"]:
            mine = self.contracts["feed"] == f
            self._unseen(f, watched)
            if feed["closed_sec"] == NONE:
                feed["closed_sec"] = watched // NS
                feed["watermark_ns"] = watched
            elif watched > feed["watermark_ns"]:
                # Nobody watched from the old end to the new start: seconds close, rows are not made.
                self.contracts["warm_sec"][mine] = NEVER
                self._advance(f, watched, out)
            feed["watched_ns"] = watched
            feed["grace_ns"] = clock.grace_ns
            for c in np.flatnonzero(mine):
                self._warm(int(c))
                self._seed_contract(int(c), seeds)
            self._all_contracts_dirty = True
            for k, (_, root) in enumerate(self.registry.roots):
                if self.roots[k]["feed"] == f:
                    self._seed(k, root, seeds)
        if clock.watermark_ns > feed["watermark_ns"]:
            self._advance(f, clock.watermark_ns, out)
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())

    def _unseen(self, f: int, watched_ns: int) -> None:
        """Nobody watched before `watched_ns` (since the old watermark): a second cut by it is not complete."""
        since = int(self.feeds[f]["watermark_ns"])
        if self.feeds[f]["closed_sec"] == NONE:
            since = watched_ns // NS * NS - int(self.timeframes["seconds"].max()) * NS
        if since < watched_ns:
            self.gaps = np.append(self.gaps, np.array([(f, NONE, since, watched_ns)], GAP))
            self._table = None

    def _watch_from_first(self, ticks: Rows, out: Output) -> None:
        """A feed that never said since when it is watched: since its first record."""
        for f in np.flatnonzero(self.feeds["watched_ns"] == NONE):
            ids = self.contracts["id"][self.contracts["feed"] == f]
            rows = np.flatnonzero(np.isin(ticks["instrument"], np.append(ids, self.feeds[f]["id"])))
            if len(rows):
                first = int(ticks["ts_event_ns"][rows[0]])
                self._clock(Clock(self.registry.feeds[f], first, watched_from_ns=first), {}, out)

    def _gap(self, gap: Gap, out: Output) -> None:
        out.gaps.append(gap)
        f = self._feed(gap.feed)
        for c in self._contracts_of(gap.feed, gap.symbols):
            opened = (self.gaps["feed"] == f) & (self.gaps["contract"] == c) & (self.gaps["start_ns"] == gap.start_ns)
            gaps = self.gaps[~(opened & (self.gaps["end_ns"] == OPEN_NS))]
            row = np.array([(f, c, gap.start_ns, gap.end_ns)], GAP)
            if not (gaps == row[0]).any():
                gaps = np.append(gaps, row)
            self._revise_for_gaps(f, gaps, gap.start_ns)

    def _suspect(self, message: Disconnect) -> None:
        """From here on nothing is complete, until the Gap with the same start says where the tape goes on."""
        f = self._feed(message.feed)
        for c in self._contracts_of(message.feed, message.symbols):
            row = np.array([(f, c, message.since_ns, OPEN_NS)], GAP)
            if not (self.gaps == row[0]).any():
                self._revise_for_gaps(f, np.append(self.gaps, row), int(row["start_ns"][0]))

    def _contracts_of(self, feed: str, symbols: tuple[str, ...]) -> list[int]:
        """Contracts by symbol; NONE, which stands for all, without symbols."""
        if not symbols:
            return [NONE]
        return [c for c, i in enumerate(self.registry.contracts) if i.symbol in symbols and i.feed == feed]

    def _revise_for_gaps(self, f: int, gaps: Rows, start_ns: int) -> None:
        """Other gaps (which differ from `start_ns` on): rows already emitted that are complete no more, or again."""
        before, self.gaps, self._table = self.gaps, gaps, None
        mask = self.size - 1
        last = int(self.feeds[f]["closed_sec"])

        def differs(contract: int, start: int, end: int) -> bool:
            was, now = (whole(g, f, contract, start * NS, end * NS) for g in (before, gaps))
            return bool(was != now)

        for end in range(max(last - self.size + WINDOW + 2, start_ns // NS + 1), last + 1):
            for k in np.flatnonzero(self.roots["feed"] == f):
                closed = self.closes[k, end & mask]
                if closed["end_sec"] != end:
                    continue
                if closed["revision"] != NONE and differs(int(closed["front"]), end - WINDOW, end):
                    closed["revision"] += 1
                    closed["dirty"] = 1
                    self._growing["close_dirty"].rows[k, (end & mask) // CHUNK] = 1
                    self._dirty_from(f, end)
                c = int(self.roots[k]["head"])
                while c != NONE:
                    ring = int(self.contracts[c]["ring"])
                    s = self.ring[ring, (end - 1) & mask]
                    if s["sec"] == end - 1 and s["revision"] != NONE and differs(c, end - 1, end):
                        s["revision"] += 1
                        s["dirty"] = 1
                        self._growing["ring_dirty"].rows[ring, ((end - 1) & mask) // CHUNK] = 1
                        self._dirty_from(f, end)
                    c = int(self.contracts[c]["next"])
        for tf in self.timeframes:
            slots = slice(int(tf["at"]), int(tf["at"] + tf["slots"]))
            bars = self.bars[:, slots]
            closed_bars = (bars["revision"] != NONE) & ((bars["sec"] + tf["seconds"]) * NS > start_ns)
            closed_bars &= (self.entities["feed"] == f)[:, None]
            for e, j in np.argwhere(closed_bars):
                b = bars[e, j]
                if differs(int(b["front"]), int(b["sec"]), int(b["sec"] + tf["seconds"])):
                    b["revision"] += 1
                    b["dirty"] |= REVISED
                    self.entities[e]["dirty"] = 1
                    self._growing["entity_dirty"].rows[e] = 1
                    self._growing["bar_dirty"].rows[e, slots.start + j] = 1
                    self._dirty_from(f, last)

    def _dirty_from(self, f: int, end: int) -> None:
        held = int(self.feeds[f]["dirty_from_sec"])
        self.feeds[f]["dirty_from_sec"] = end if held == NONE else min(held, end)


def warm() -> None:
    """Compile the kernel (or load it from the cache) before the first tick."""
    always = np.array([[0, NEVER]], np.int64)
    state = PartitionState(Config(sessions=lambda venue, root: always))  # noqa: ARG005
    instrument = Instrument(id=1, venue="", symbol="W", root="W", feed="warm")
    tick = np.zeros(1, TICK)
    tick["ts_event_ns"], tick["instrument"], tick["price"], tick["size"] = NS, 1, 1.0, 1.0
    messages = [instrument, Clock("warm", NS, watched_from_ns=NS)]
    state.step([Frame("clock", 2, 0, 0, "warm", encode(messages)), Frame("trade", 1, 0, 0, "warm", tick.tobytes())])
    state.step([Frame("clock", 1, 0, 0, "warm", encode([Clock("warm", 2 * NS)]))])
