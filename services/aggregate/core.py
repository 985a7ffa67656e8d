"""The pure core of the aggregate stage: (state, frames) -> (state, rows). No I/O, no clock.

`PartitionState` holds what one partition knows: its instruments and the kernel's arrays. The rows
do not depend on how the tape is cut into frames, steps or restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from services.aggregate import kernel
from services.aggregate.arena import WINDOW, Arrays, table_of
from services.aggregate.layout import (
    CACHE,
    CHUNK,
    CLOSED,
    CONTRACT,
    COUNTERS,
    FEED,
    GAP,
    LATE_ROWS,
    MINUTE,
    MINUTES,
    NEVER,
    NONE,
    PARAMS,
    ROOT,
    ROWS_1M,
    ROWS_1S,
    SUMMARY,
    ring_seconds,
)  # fmt: skip
from services.aggregate.rows import whole
from shared.frames import CANDLE, LATE, NS, TICK, Frame, Rows
from shared.instruments import feed_id, is_spread
from shared.messages import AnyMessage, Clock, Disconnect, Gap, Instrument, decode

STATE_VERSION = 1
CANDLED = frozenset("FK?")
OUT_ROWS = 4096
JSON_KINDS = frozenset({"instrument", "clock", "gap", "disconnect"})


@dataclass(frozen=True, slots=True)
class Config:
    """What the rows depend on beside the tape. `sessions(venue, root)` gives rows of [open, close) ns."""

    sessions: Callable[[str, str], Rows]
    max_lateness_sec: int = 120
    quiet_sec: int = 300
    emit_1s: bool = True
    big_trade: dict[str, float] = field(default_factory=lambda: {"NG": 50.0})
    big_trade_default: float = 25.0


@dataclass(slots=True)
class Output:
    """What a step produced. `names[i]` is the (ticker, symbol) of row value `name == i`."""

    candles_1m: list[Rows] = field(default_factory=list)
    candles_1s: list[Rows] = field(default_factory=list)
    late: list[Rows] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)


class Registry(msgspec.Struct):
    """The names behind the arrays' indices."""

    version: int = STATE_VERSION
    lateness_sec: int = 120
    contracts: list[Instrument] = []
    roots: list[tuple[str, str]] = []  # (venue, root)
    feeds: list[str] = []
    ignored: list[int] = []


class PartitionState:
    """All that one partition of the aggregate stage remembers."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.registry = Registry(lateness_sec=config.max_lateness_sec)
        self.size = ring_seconds(config.max_lateness_sec)
        self.params = np.zeros(1, PARAMS)
        self.params[0] = (config.max_lateness_sec * NS, config.quiet_sec, int(config.emit_1s))
        self.feeds = np.zeros(0, FEED)
        self.contracts = np.zeros(0, CONTRACT)
        self.roots = np.zeros(0, ROOT)
        self.gaps = np.zeros(0, GAP)
        self.ring = np.zeros((0, self.size), SUMMARY)
        self.minutes = np.zeros((0, MINUTES), MINUTE)
        self.closes = np.zeros((0, self.size), CLOSED)
        self.sessions = np.zeros((0, 2), np.int64)
        self.counters = np.zeros(len(COUNTERS), np.int64)
        self._table: Rows | None = None
        self._ring_dirty = np.zeros((0, self.size // CHUNK), np.int8)
        self._close_dirty = np.zeros((0, self.size // CHUNK), np.int8)
        self._registry_dirty = True
        self._all_contracts_dirty = True
        self._out_1m = np.zeros(OUT_ROWS, CANDLE)
        self._out_1s = np.zeros(OUT_ROWS, CANDLE)
        self._late = np.zeros((1024, 2), np.int64)
        self._index()

    # -- the step ----------------------------------------------------------------------------

    def step(self, frames: list[Frame], seeds: dict[str, float] | None = None) -> Output:
        """Take frames in stream order; `seeds` are CVD values for roots that `unseeded` named."""
        out = Output()
        seeds = seeds or {}
        bodies: list[bytes] = []
        for frame in frames:
            if frame.kind == "trade":
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
        out.names = [(i.root, i.symbol) for i in self.registry.contracts]
        return out

    def unseeded(self, frames: list[Frame]) -> list[tuple[str, int]]:
        """(root, instant in ns) of roots that begin to be watched in these frames without a CVD to go on from."""
        new: dict[str, str] = {}
        watched = {name: int(self.feeds[i]["watched_ns"]) for i, name in enumerate(self.registry.feeds)}
        known = {root: bool(self.roots[i]["seeded"]) for i, (_, root) in enumerate(self.registry.roots)}
        for i, (_, root) in enumerate(self.registry.roots):
            if not self.roots[i]["seeded"]:
                new[root] = self.registry.feeds[self.roots[i]["feed"]]
        for frame in frames:
            if frame.kind in ("instrument", "clock"):
                for m in decode(frame.body):
                    if isinstance(m, Instrument) and not known.get(m.root) and _candled(m):
                        new[m.root] = m.feed
                    elif isinstance(m, Clock) and m.watched_from_ns is not None and watched.get(m.feed, NONE) == NONE:
                        watched[m.feed] = m.watched_from_ns
        return [(root, watched[feed]) for root, feed in new.items() if watched.get(feed, NONE) != NONE]

    def _ticks(self, bodies: list[bytes], out: Output) -> None:
        if not bodies:
            return
        ticks = np.frombuffer(bodies[0] if len(bodies) == 1 else b"".join(bodies), TICK)
        if len(ticks) > len(self._late):
            self._late = np.zeros((2 * len(ticks), 2), np.int64)
        if self._unwatched:
            self._watch_from_first(ticks, out)
        at = 0
        while at < len(ticks):
            at = kernel.run(ticks, at, self._bind(), self._late)
            if self.counters[LATE_ROWS]:
                self._drain_late(ticks, out)
            self._drain(out)

    def _advance(self, f: int, watermark_ns: int, out: Output) -> None:
        while not kernel.advance(self._bind(), f, watermark_ns // NS):
            self._drain(out)
        self._drain(out)
        self.feeds[f]["watermark_ns"] = max(watermark_ns, int(self.feeds[f]["watermark_ns"]))

    def _bind(self) -> Rows:
        """The kernel's view of the arrays, made anew when one of them was replaced."""
        if self._table is None:
            k = len(self.roots)
            cache = np.zeros(k, CACHE)
            cache["contract"] = NONE
            self._arrays = Arrays(
                self.feeds, self.contracts, self.ring, self.minutes, self.roots, self.closes, self.sessions, self.gaps,
                self._table_key, self._table_value, self.params, self._out_1m, self._out_1s, self.counters,
                self._ring_dirty, self._close_dirty, cache, np.zeros((k, WINDOW), SUMMARY), np.zeros(k, SUMMARY),
                np.zeros(2, SUMMARY),
            )  # fmt: skip
            self._table = table_of(self._arrays)
        return self._table

    def _drain(self, out: Output) -> None:
        for which, rows, into in ((ROWS_1M, self._out_1m, out.candles_1m), (ROWS_1S, self._out_1s, out.candles_1s)):
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
            case Disconnect():
                pass  # the watermark stands still by itself; what was lost comes as a Gap

    def _clock(self, clock: Clock, seeds: dict[str, float], out: Output) -> None:
        f = self._feed(clock.feed)
        feed = self.feeds[f]
        watched = clock.watched_from_ns
        if watched is None and feed["watched_ns"] == NONE:
            watched = clock.watermark_ns
        if watched is not None and watched > feed["watched_ns"]:
            mine = self.contracts["feed"] == f
            if feed["closed_sec"] == NONE:
                feed["closed_sec"] = watched // NS
                feed["watermark_ns"] = watched
            elif watched > feed["watermark_ns"]:
                # Nobody watched from the old end to the new start: seconds close, rows are not made.
                self.contracts["warm_sec"][mine] = NEVER
                self._advance(f, watched, out)
            feed["watched_ns"] = watched
            for c in np.flatnonzero(mine):
                self._warm(int(c))
            self._all_contracts_dirty = True
            for k, (_, root) in enumerate(self.registry.roots):
                if self.roots[k]["feed"] == f:
                    self._seed(k, root, seeds)
        if clock.watermark_ns > feed["watermark_ns"]:
            self._advance(f, clock.watermark_ns, out)
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())

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
        wanted: list[int] = [NONE]
        if gap.symbols:
            wanted = [
                c for c, i in enumerate(self.registry.contracts) if i.symbol in gap.symbols and i.feed == gap.feed
            ]
        for c in wanted:
            row = np.array([(f, c, gap.start_ns, gap.end_ns)], GAP)
            if not (self.gaps == row[0]).any():
                self._revise_for_gap(f, c, gap)
                self.gaps = np.append(self.gaps, row)
                self._table = None

    def _revise_for_gap(self, f: int, only: int, gap: Gap) -> None:
        """Rows already emitted that the gap touches come again with complete = 0."""
        feed, mask = self.feeds[f], self.size - 1
        last = int(feed["closed_sec"])
        first = max(last - self.size + WINDOW + 2, gap.start_ns // NS + 1)
        for end in range(first, min(last, gap.end_ns // NS + WINDOW + 1) + 1):
            for k in np.flatnonzero(self.roots["feed"] == f):
                closed = self.closes[k, end & mask]
                touched = end * NS > gap.start_ns and (end - WINDOW) * NS < gap.end_ns
                front = int(closed["front"])
                if closed["end_sec"] != end:
                    continue
                if touched and closed["revision"] != NONE and only in (NONE, front) and whole(
                    self.gaps, f, front, (end - WINDOW) * NS, end * NS
                ):  # fmt: skip
                    closed["revision"] += 1
                    closed["dirty"] = 1
                    self._close_dirty[k, (end & mask) // CHUNK] = 1
                    self._dirty_from(f, end)
                sec = end - 1
                if not (end * NS > gap.start_ns and sec * NS < gap.end_ns):
                    continue
                for c in np.flatnonzero(self.contracts["root"] == k):
                    s = self.ring[c, sec & mask]
                    if s["sec"] == sec and s["revision"] != NONE and only in (NONE, c) and whole(
                        self.gaps, f, int(c), sec * NS, end * NS
                    ):  # fmt: skip
                        s["revision"] += 1
                        s["dirty"] = 1
                        self._ring_dirty[c, (sec & mask) // CHUNK] = 1
                        self._dirty_from(f, end)

    def _dirty_from(self, f: int, end: int) -> None:
        held = int(self.feeds[f]["dirty_from_sec"])
        self.feeds[f]["dirty_from_sec"] = end if held == NONE else min(held, end)

    # -- instruments -------------------------------------------------------------------------

    def _define(self, instrument: Instrument, seeds: dict[str, float]) -> None:
        held = self._by_id.get(instrument.id)
        if held is not None:
            if instrument != self.registry.contracts[held]:
                self.registry.contracts[held] = instrument
                self.contracts[held]["expiry_ns"] = instrument.expiration_ns or 0
                self._registry_dirty = self._all_contracts_dirty = True
            return
        if not _candled(instrument):
            if instrument.id not in self._ignored:
                self._ignored.add(instrument.id)
                self.registry.ignored.append(instrument.id)
                self._registry_dirty = self._index_stale = True
            return
        f = self._feed(instrument.feed)
        key = (instrument.venue, instrument.root)
        if key not in self.registry.roots:
            self._add_root(key, f)
            self._seed(len(self.roots) - 1, instrument.root, seeds)
        k = self.registry.roots.index(key)
        contract = np.zeros(1, CONTRACT)
        contract[0] = (
            instrument.id,
            f,
            k,
            self.roots[k]["head"],
            instrument.expiration_ns or 0,
            np.nan,
            np.nan,
            NONE,
            NEVER,
        )
        self.roots[k]["head"] = len(self.contracts)
        summaries = np.zeros((1, self.size), SUMMARY)
        summaries["sec"] = summaries["revision"] = NONE
        minutes = np.zeros((1, MINUTES), MINUTE)
        minutes["minute"] = NONE
        self.contracts = np.append(self.contracts, contract)
        self.ring = np.concatenate((self.ring, summaries))
        self.minutes = np.concatenate((self.minutes, minutes))
        self._ring_dirty = np.concatenate((self._ring_dirty, np.zeros((1, self.size // CHUNK), np.int8)))
        self.registry.contracts.append(instrument)
        if self.feeds[f]["watched_ns"] != NONE:
            self._warm(len(self.contracts) - 1)
        self._by_id[instrument.id] = len(self.contracts) - 1
        self._registry_dirty = self._all_contracts_dirty = self._index_stale = True
        self._table = None

    def _add_root(self, key: tuple[str, str], f: int) -> None:
        self.registry.roots.append(key)
        root = np.zeros(1, ROOT)
        root["feed"], root["front"], root["head"] = f, NONE, NONE
        root["big_size"] = self.config.big_trade.get(key[1], self.config.big_trade_default)
        closes = np.zeros((1, self.size), CLOSED)
        closes["end_sec"] = closes["front"] = closes["revision"] = NONE
        self.roots = np.append(self.roots, root)
        self.closes = np.concatenate((self.closes, closes))
        self._close_dirty = np.concatenate((self._close_dirty, np.zeros((1, self.size // CHUNK), np.int8)))
        self._place_calendars()

    def _seed(self, k: int, root: str, seeds: dict[str, float]) -> None:
        """Go on from the newest stored CVD, once, when the root's feed begins to be watched."""
        watched = self.feeds[self.roots[k]["feed"]]["watched_ns"] != NONE
        if not self.roots[k]["seeded"] and (watched or root in seeds):
            self.roots[k]["cvd"] += seeds.get(root, 0.0)
            self.roots[k]["seeded"] = 1

    def _warm(self, c: int) -> None:
        root = self.roots[self.contracts[c]["root"]]
        since = -(-int(self.feeds[self.contracts[c]["feed"]]["watched_ns"]) // NS)
        low, high = int(root["calendar_from"]), int(root["calendar_to"])
        self.contracts[c]["warm_sec"] = kernel.warm_at(self.sessions, low, high, since, WINDOW)

    def _feed(self, name: str) -> int:
        if name not in self.registry.feeds:
            self.registry.feeds.append(name)
            feed = np.zeros(1, FEED)
            feed[0] = (feed_id(name), NONE, 0, NONE, NONE, NONE, NONE)
            self.feeds = np.append(self.feeds, feed)
            self._table = None
            self._registry_dirty = self._unwatched = True
        return self.registry.feeds.index(name)

    def _place_calendars(self) -> None:
        """One copy of each calendar in `sessions`; every root points at its rows."""
        tables: list[Rows] = []
        placed: dict[int, tuple[int, int]] = {}
        at = 0
        for k, (venue, root) in enumerate(self.registry.roots):
            table = self.config.sessions(venue, root)
            if id(table) not in placed:
                placed[id(table)] = (at, at + len(table))
                tables.append(table)
                at += len(table)
            self.roots[k]["calendar_from"], self.roots[k]["calendar_to"] = placed[id(table)]
        self.sessions = np.concatenate(tables) if tables else np.zeros((0, 2), np.int64)
        self._table = None

    def _index(self) -> None:
        known = {i.id: c for c, i in enumerate(self.registry.contracts)}
        self._by_id = known
        self._ignored = set(self.registry.ignored)
        self._index_stale = False
        entries = [*known.items(), *((i, -2) for i in self.registry.ignored)]
        size = 1 << max(6, (4 * len(entries)).bit_length())
        self._table_key = np.zeros(size, np.int64)
        self._table_value = np.full(size, NONE, np.int64)
        for key, value in entries:
            at = kernel.find(self._table_key, key)
            self._table_key[at] = key
            self._table_value[at] = value
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())
        self._table = None

    # -- state -------------------------------------------------------------------------------

    def changes(self) -> dict[str, bytes]:
        """Fields of the committed state that changed since the last call."""
        keep = [g["end_ns"] >= (self.feeds[g["feed"]]["closed_sec"] - self.size) * NS for g in self.gaps]
        if not all(keep):
            self.gaps = self.gaps[np.array(keep, bool)]
            self._table = None
        fields = {
            "feeds": self.feeds.tobytes(), "roots": self.roots.tobytes(), "gaps": self.gaps.tobytes(),
            "counters": self.counters.tobytes(),
        }  # fmt: skip
        if self._registry_dirty:
            fields["registry"] = msgspec.json.encode(self.registry)
        for c, j in np.argwhere(self._ring_dirty):
            fields[f"s:{c}:{j}"] = self.ring[c, j * CHUNK : (j + 1) * CHUNK].tobytes()
        for k, j in np.argwhere(self._close_dirty):
            fields[f"q:{k}:{j}"] = self.closes[k, j * CHUNK : (j + 1) * CHUNK].tobytes()
        touched = range(len(self.contracts)) if self._all_contracts_dirty else np.flatnonzero(self._ring_dirty.any(1))
        for c in touched:
            fields[f"c:{c}"] = self.contracts[c].tobytes() + self.minutes[c].tobytes()
        self._ring_dirty[:] = 0
        self._close_dirty[:] = 0
        self._registry_dirty = self._all_contracts_dirty = False
        return fields

    @classmethod
    def restore(cls, config: Config, fields: dict[str, bytes]) -> PartitionState:
        """State from its committed fields; an empty dict is a cold start.

        Raises ValueError when `max_lateness_sec` differs from what the state was made with.
        """
        state = cls(config)
        if "registry" not in fields:
            return state
        registry = msgspec.json.decode(fields["registry"], type=Registry)
        if registry.version > STATE_VERSION or registry.lateness_sec != config.max_lateness_sec:
            raise ValueError(
                f"the bus holds aggregate state of version {registry.version} with max_lateness "
                f"{registry.lateness_sec} s; this program has {STATE_VERSION} and {config.max_lateness_sec} s"
            )
        state.registry = registry
        state.feeds = np.frombuffer(fields["feeds"], FEED).copy()
        state.roots = np.frombuffer(fields["roots"], ROOT).copy()
        state.gaps = np.frombuffer(fields["gaps"], GAP).copy()
        state.counters = np.frombuffer(fields["counters"], np.int64).copy()
        n, k = len(registry.contracts), len(registry.roots)
        state.contracts = np.zeros(n, CONTRACT)
        state.minutes = np.zeros((n, MINUTES), MINUTE)
        state.ring = np.zeros((n, state.size), SUMMARY)
        state.ring["sec"] = state.ring["revision"] = NONE
        state.closes = np.zeros((k, state.size), CLOSED)
        state.closes["end_sec"] = state.closes["front"] = state.closes["revision"] = NONE
        state._ring_dirty = np.zeros((n, state.size // CHUNK), np.int8)
        state._close_dirty = np.zeros((k, state.size // CHUNK), np.int8)
        for name, body in fields.items():
            kind, _, rest = name.partition(":")
            if kind == "c":
                state.contracts[int(rest)] = np.frombuffer(body, CONTRACT, 1)[0]
                state.minutes[int(rest)] = np.frombuffer(body, MINUTE, offset=CONTRACT.itemsize)
            elif kind in ("s", "q"):
                row, chunk = (int(part) for part in rest.split(":"))
                target = state.ring if kind == "s" else state.closes
                target[row, chunk * CHUNK : (chunk + 1) * CHUNK] = np.frombuffer(body, target.dtype)
        state._place_calendars()
        state._registry_dirty = state._all_contracts_dirty = False
        state._index()
        return state


def _candled(instrument: Instrument) -> bool:
    """Futures and single-name instruments; options and spreads have no rolling candles."""
    return instrument.kind in CANDLED and not is_spread(instrument.symbol, instrument.kind)


def warm() -> None:
    """Compile the kernel (or load it from the cache) before the first tick."""
    state = PartitionState(Config(sessions=lambda venue, root: np.array([[0, NEVER]], np.int64)))  # noqa: ARG005
    state.step([Frame("trade", 0, 0, 0, "warm", np.zeros(1, TICK).tobytes())])
    kernel.advance(state._bind(), 0, 0) if len(state.feeds) else None
