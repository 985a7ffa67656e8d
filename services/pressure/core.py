"""The pure core of the pressure stage: (state, frames) -> (state, messages). No I/O, no clock.

What leaves, and in which order, follows from the tape: it does not depend on how the tape is cut into frames or
steps, nor on restarts. A window leaves when the watermark of its underlying's feed reaches its end, and once more
for each late trade and each gap that changes it behind that.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from services.pressure import kernel
from services.pressure.greeks import Greeks, black_76
from services.pressure.layout import (
    CROWDED,
    DUE,
    FULL,
    HELD,
    LATE_TRADE,
    MARK,
    NEVER,
    NEW_KEY,
    NONE,
    REASON,
    UNDEFINABLE,
    UNDEFINED,
    UNTIL,
    WAITING,
    WHO,
)  # fmt: skip
from services.pressure.measures import Cell, Key, Surroundings, Window, days_to_expiry, finite, rollup, row
from services.pressure.state import Hole, State
from shared.frames import NS, TICK, TICK_FRAMES, Frame, Rows
from shared.instruments import instrument_id
from shared.messages import AnyMessage, Clock, Disconnect, Gap, Instrument, Pressure, PressureRollup, decode

JOIN_BELOW = 16_384  # bytes a frame
OPEN_NS = 1 << 62  # the end of a gap that is still open
JSON_KINDS = frozenset({"instrument", "clock", "gap", "disconnect"})
LOAD = "load the definition schema, or name its root in databento.option_roots"


@dataclass(frozen=True, slots=True)
class Emission:
    """A window of an underlying: the rows that are new or have changed, and its rollup."""

    rows: list[Pressure]
    rollup: PressureRollup


@dataclass(frozen=True, slots=True)
class Undefined:
    """Trades (TICK rows) of an instrument that nobody knows enough of, and the reason in a line."""

    reason: str
    rows: Rows


Output = list[Emission | Undefined]


class PartitionState(State):
    """One partition: `step` takes frames, `changes` gives what to commit."""

    _out: Output
    _now_ns: int

    def step(self, frames: list[Frame], now_ns: int = 0) -> Output:
        """Take frames in stream order; `now_ns` becomes the messages' `timestamp_out_ns`."""
        self._out, self._now_ns = [], now_ns
        bodies: list[bytes] = []
        for frame in frames:
            if frame.kind in TICK_FRAMES:
                bodies.append(frame.body)
            elif frame.kind in JSON_KINDS:
                self._ticks(bodies)
                bodies = []
                for message in decode(frame.body):
                    self._message(message)
        self._ticks(bodies)
        return self._out

    def _ticks(self, bodies: list[bytes]) -> None:
        # Small frames are joined, because each call costs; large ones are not, because copying does.
        if bodies and sum(map(len, bodies)) < JOIN_BELOW * len(bodies):
            bodies = [b"".join(bodies)]
        for body in bodies:
            ticks = np.frombuffer(body, TICK)
            while self._unwatched and (found := self._first_watched(ticks)) is not None:
                f, at = found  # what stands before it came before anybody watched that feed
                self._run(ticks[:at], False)
                first = int(ticks["ts_event_ns"][at])
                self._clock(Clock(self.registry.feeds[f], first, watched_from_ns=first))
                ticks = ticks[at:]
            self._run(ticks, False)

    def _run(self, ticks: Rows, waited: bool) -> None:
        at = 0
        while True:
            at = kernel.run(ticks, at, self._bind(), waited)
            reason, who, mark = (int(self.pause[n]) for n in (REASON, WHO, MARK))
            if reason == DUE:
                self._due(who, mark)
            elif reason == LATE_TRADE:
                self._emit(int(self.keys[who]["under"]), mark, {who})
            elif reason == NEW_KEY:
                self._add_key(who)
            elif reason == CROWDED:
                self._emit(who, mark)
            elif reason == FULL:
                self._expel(np.arange(WAITING) == 0, f"no definition came, and {WAITING} trades wait")
            else:
                return

    # -- time --------------------------------------------------------------------------------

    def _due(self, f: int, mark: int) -> None:
        """Feed `f` comes to the watermark `mark`: what has ended by then leaves, then what has waited enough."""
        feed = self.feeds[f]
        if feed["due_ns"] <= mark:
            mine = (self.closes["win"] != NONE) & (self.closes["revision"] == NONE)
            mine &= (self.unders["feed"] == f)[:, None]
            ends = (self.closes["win"] + 1) * self.window_ns
            ended = [(int(ends[u, s]), self.registry.unders[u], u, s) for u, s in np.argwhere(mine & (ends <= mark))]
            for _, _, u, s in sorted(ended):
                self._emit(int(u), int(s))
            left = ends[mine & (ends > mark)]
            feed["due_ns"] = left.min() if len(left) else NEVER
        if min(feed["wait_ns"], self.queue[UNTIL]) <= mark:
            held = int(self.queue[HELD])
            feeds, until = self.waits[:held].T
            over = (until <= mark) & ((feeds == f) | (feeds == NONE))
            self._expel(over, f"no definition came within {self.config.wait_sec} s")

    def _advance(self, f: int, watermark_ns: int) -> None:
        if watermark_ns > self.feeds[f]["watermark_ns"]:
            self._due(f, watermark_ns)
            self.feeds[f]["watermark_ns"] = watermark_ns

    def _clock(self, clock: Clock) -> None:
        f = self._feed(clock.feed)
        feed = self.feeds[f]
        watched = clock.watched_from_ns
        if watched is None and feed["watched_ns"] == NONE:
            watched = clock.watermark_ns
        if watched is not None and watched > feed["watched_ns"]:
            # Nobody watched before it (since the old watermark): a window cut by that is not complete.
            first = feed["watermark_ns"] == NONE
            since = watched - self.window_ns if first else int(feed["watermark_ns"])
            if since < watched:
                self._add_hole(Hole(clock.feed, "", since, watched))
            if first:
                new = (self.markets["feed"] == f) & (self.markets["since_sec"] == NONE)
                self.markets["since_sec"][new] = watched // NS
            self._advance(f, watched)
            feed["watched_ns"] = watched
            feed["grace_ns"] = clock.grace_ns
        self._advance(f, clock.watermark_ns)
        if clock.final:
            held = int(self.queue[HELD])
            feeds = self.waits[:held, 0]
            over = (feeds == f) | (feeds == NONE)
            self._expel(over, "no definition came before the tape's end")
        self._unwatched = bool((self.feeds["watched_ns"] == NONE).any())

    def _first_watched(self, ticks: Rows) -> tuple[int, int] | None:
        """(feed, row) of the first record of a feed that never said since when it is watched: since then."""
        firsts = []
        for f in np.flatnonzero(self.feeds["watched_ns"] == NONE).tolist():
            ids = self.contracts["id"][self.contracts["feed"] == f]
            found = np.flatnonzero(np.isin(ticks["instrument"], np.append(ids, self.feeds[f]["id"])))
            firsts += [(int(found[0]), f)] if len(found) else []
        if not firsts:
            return None
        at, f = min(firsts)
        return f, at

    # -- messages ----------------------------------------------------------------------------

    def _message(self, message: AnyMessage) -> None:
        match message:
            case Instrument():
                if self._define(message):
                    self._release(self._by_id[message.id])
            case Clock():
                self._clock(message)
            case Gap():
                self._gap(message.feed, message.symbols, message.start_ns, message.end_ns)
            case Disconnect(since_ns=None):
                pass  # the watermark stands still by itself; what was lost comes as a Gap
            case Disconnect():
                assert message.since_ns is not None
                self._gap(message.feed, message.symbols, message.since_ns, OPEN_NS)

    def _gap(self, feed: str, symbols: tuple[str, ...], start_ns: int, end_ns: int) -> None:
        """A gap, or (`end_ns` OPEN_NS) one that is still open; windows that left before it leave once more."""
        self._feed(feed)
        for symbol in symbols or ("",):
            self._add_hole(Hole(feed, symbol, start_ns, end_ns))
        closed = (self.closes["revision"] != NONE) & ((self.closes["win"] + 1) * self.window_ns > start_ns)
        left = [(int(self.closes[u, s]["win"]), self.registry.unders[u], u, s) for u, s in np.argwhere(closed)]
        for _, _, u, s in sorted(left):
            window, order = self._window(u, s), self._traded(u, s)
            holes = self._touching(window)
            now = [self._whole(k, holes) for k in order]
            was = self.cells["complete"][order, s].tolist()
            changed = {k for k, a, b in zip(order, now, was, strict=True) if a != bool(b)}
            if changed:
                self._emit(int(u), int(s), changed)

    def _add_hole(self, hole: Hole) -> None:
        """A gap takes the place of the open one that it ends; those that touch no window any more are forgotten."""
        opened = hole._replace(end_ns=OPEN_NS)
        wins = np.unique(self.closes["win"])
        starts = wins[wins != NONE] * self.window_ns
        behind = (self.closes.shape[1] + 1) * self.window_ns

        def matters(h: Hole) -> bool:
            watermark = int(self.feeds[self._feed(h.feed)]["watermark_ns"])
            held = (starts < h.end_ns) & (starts + self.window_ns > h.start_ns)
            return h.end_ns >= watermark - behind or bool(held.any())

        self.holes = [h for h in self.holes if h not in (opened, hole) and matters(h)]
        self.holes.append(hole)

    # -- trades that wait for a definition ---------------------------------------------------

    def _take_out(self, mask: Rows) -> Rows:
        """Take trades out of those that wait (`mask` over all of them), in order."""
        held = len(mask)
        rows = self.waiting[:held][mask]
        kept = held - len(rows)
        first = int(mask.argmax())
        self.waiting[:kept] = self.waiting[:held][~mask]
        self.waits[:kept] = self.waits[:held][~mask]
        self.queue[HELD] = kept
        self._waits_clean = min(self._waits_clean, first)
        feeds, until = self.waits[:kept].T
        self.queue[UNTIL] = until[feeds == NONE].min(initial=NEVER)
        for f in range(len(self.feeds)):
            self.feeds[f]["wait_ns"] = until[feeds == f].min(initial=NEVER)
        return rows

    def _release(self, c: int) -> None:
        """Contract `c` was defined: its waiting trades are taken as if they came now, but were not late."""
        held = int(self.queue[HELD])
        if not held or self.contracts[c]["sort"] == UNDEFINED:
            return
        mask = self.waiting["instrument"][:held] == self.contracts[c]["id"]
        if not mask.any():
            return
        rows = self._take_out(mask)
        f = int(self.contracts[c]["feed"])
        if f != NONE:
            watermark = int(self.feeds[f]["watermark_ns"])
            times, lateness = rows["ts_event_ns"], self.config.max_lateness_sec
            old = (watermark - times > lateness * NS) & (times // NS < watermark // NS)
            if old.any():
                name = self._name(rows["instrument"][0])
                reason = f"the definition came when they were older than aggregate.max_lateness_seconds {lateness}"
                self._undefined(f"option trades of {name}: {reason}", rows[old])
                rows = rows[~old]
        rows.flags.writeable = False
        self._run(rows, True)

    def _expel(self, mask: Rows, why: str) -> None:
        """The instruments of these waiting trades (`mask` over all) have waited enough: all their trades leave."""
        for instrument in dict.fromkeys(self.waiting["instrument"][: len(mask)][mask].tolist()):
            held = int(self.queue[HELD])
            rows = self._take_out(self.waiting["instrument"][:held] == instrument)
            self._undefined(f"option trades of {self._name(instrument)}: {why}; {LOAD}", rows)

    def _undefined(self, reason: str, rows: Rows) -> None:
        self.counters[UNDEFINABLE] += len(rows)
        self._out.append(Undefined(reason, rows))

    def _name(self, instrument: int) -> str:
        c = self._by_id.get(int(instrument))
        if c is None:
            return f"the unknown instrument {instrument}"
        return f"'{self.instruments[c].symbol}' ({self.instruments[c].venue})"

    # -- windows that leave ------------------------------------------------------------------

    def _window(self, u: int, s: int) -> Window:
        return Window(int(self.closes[u, s]["win"]) * self.window_ns, self.config.window_sec)

    def _traded(self, u: int, s: int) -> list[int]:
        """The keys that traded in the window of slot `s`, by expiration, strike and type."""
        mine = (self.keys["under"] == u) & (self.cells["win"][:, s] == self.closes[u, s]["win"])
        found = np.flatnonzero(mine)
        keys = self.keys[found]
        order: list[int] = found[np.lexsort((keys["kind"], keys["strike"], keys["expiration_ns"]))].tolist()
        return order

    def _emit(self, u: int, s: int, changed: set[int] | None = None) -> None:
        """The window in slot `s` of underlying `u` leaves: for the first time, or because keys have changed."""
        window, order = self._window(u, s), self._traded(u, s)
        closed = self.closes[u, s]
        if changed is None:
            closed["revision"] = 0
            self.cells["revision"][order, s] = 0
        else:
            closed["revision"] = max(int(closed["revision"]), 0) + 1
            some = sorted(changed)
            self.cells["revision"][some, s] = np.maximum(self.cells["revision"][some, s], 0) + 1
        holes = self._touching(window)
        cells = self.cells[order, s]
        keys = [self.key_names[k] for k in order]
        prices: dict[int, float | None] = {}
        rows = []
        for n, k in enumerate(order):
            if changed is not None and k not in changed:
                continue
            key, cell, whole = keys[n], Cell._make(cells[n].item()), self._whole(k, holes)
            price = self._price(key, window.end_ns, prices)
            iv, delta = self._greeks(key, cell.close, price, window.end_ns)
            strikes = self._strikes.get((key.underlying, key.expiration_ns), [])
            around = Surroundings(bisect_left(strikes, key.strike), price, iv, delta, whole)
            rows.append(row(key, cell, window, around, cell.revision, self._now_ns))
            self.cells[k, s]["complete"] = whole
            self.cell_dirty[k, s] = 1
        # The price of the nearest expiration that has one, as its first key has it.
        firsts = [next(group) for _, group in groupby(keys, key=_expiration)]
        known = (self._price(key, window.end_ns, prices) for key in firsts)
        price = next((one for one in known if one is not None), None)
        name = self.registry.unders[u]
        complete = not any(self._concerns(hole, u) for hole in holes)
        roll = rollup(name, window, keys, cells, price, complete, int(closed["revision"]), self._now_ns)
        self._out.append(Emission(rows, roll))

    # -- what stands beside the trades -------------------------------------------------------

    def _touching(self, window: Window) -> list[Hole]:
        return [h for h in self.holes if h.start_ns < window.end_ns and h.end_ns > window.start_ns]

    def _whole(self, k: int, holes: list[Hole]) -> bool:
        """Whether none of these gaps is of an instrument of key `k`."""
        if not holes:
            return True
        of = [self.instruments[c] for c in self._holders.get(self.key_names[k], ())]
        return not any(hole.feed == i.feed and hole.symbol in ("", i.symbol) for hole in holes for i in of)

    def _concerns(self, hole: Hole, u: int) -> bool:
        """Whether a gap is of an option of underlying `u`, traded or not."""
        f = self.registry.feeds.index(hole.feed)
        mine = (self.contracts["under"] == u) & (self.contracts["feed"] == f)
        if not hole.symbol:
            return bool(mine.any())
        return any(self.instruments[c].symbol == hole.symbol for c in np.flatnonzero(mine))

    def _newest(self, contracts: list[int], end_ns: int) -> tuple[int, float, float, float] | None:
        """(ns, px, iv, delta) of the newest that these contracts showed before `end_ns`."""
        seen = [one for c in contracts for one in self.seen[c].tolist() if NONE < one[0] < end_ns]
        return max(seen, key=_when, default=None)

    def _price(self, key: Key, end_ns: int, known: dict[int, float | None]) -> float | None:
        """Price of the underlying at the end of a window, see Pressure; `known` are those of contracts."""
        holders = self._holders.get(key, [])
        summary = self._newest(holders, end_ns)
        if summary is not None and math.isfinite(summary[1]):
            return summary[1]
        for c in holders:
            i = self.instruments[c]
            forward = self._by_id.get(instrument_id(i.venue, i.underlying)) if i.underlying else None
            if forward is not None:
                price = self._traded_at(forward, end_ns, known)
                if price is not None:
                    return price
        found = self._newest(self._perpetuals.get(key.underlying, []), end_ns)
        return finite(found[1]) if found is not None else None

    def _traded_at(self, c: int, end_ns: int, known: dict[int, float | None]) -> float | None:
        if c not in known:
            found = self._newest([c], end_ns)
            known[c] = finite(found[1]) if found is not None else None
        return known[c]

    def _greeks(self, key: Key, close: float, price: float | None, end_ns: int) -> Greeks:
        """The exchange's own where it gives summaries, else Black-76 on the last price of the window."""
        summary = self._newest(self._holders.get(key, []), end_ns)
        if summary is not None:
            iv = finite(summary[2])
            return iv if iv is not None and iv > 0 else None, finite(summary[3])
        days = days_to_expiry(key.expiration_ns, end_ns)
        # Crypto options may be priced in coins, which only their summaries relate to the underlying.
        if not self.config.greeks or price is None or days is None or ":" in key.underlying:
            return None, None
        return black_76(key.kind, close, price, key.strike, days, self.config.rate)


def _when(seen: tuple[int, float, float, float]) -> int:
    return seen[0]


def _expiration(key: Key) -> int:
    return key.expiration_ns
