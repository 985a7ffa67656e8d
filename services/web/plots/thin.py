"""Many bars as fewer candles, and where an axis has its labels: what a picture of a given width can show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.web.plots.axis import BREAK, LONGEST_GAP, Ints, Reals
from services.web.plots.data import Bars, BigTrade, PlotData
from shared.frames import NS, iso

MOST_TICKS = 14
_SECONDS = (1, 5, 15, 30, 60, 300, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 7 * 86_400, 28 * 86_400,
            91 * 86_400, 365 * 86_400)  # fmt: skip


def thinned(data: PlotData, by: int) -> PlotData:
    """The same with the bars of `by` slots drawn as one, and a note that says so."""
    if by <= 1:
        return data
    axis, b = data.axis.thinned(by), data.bars
    first = np.flatnonzero(np.append(True, np.diff(axis.slot) > 0))
    last = np.append(first[1:], len(b)) - 1
    of = np.repeat(np.arange(len(first)), last - first + 1)

    def total(column: Reals) -> Reals:
        return np.add.reduceat(column, first)

    bars = Bars(
        b.time_ns[first], b.start_ns[first], b.open[first], np.maximum.reduceat(b.high, first),
        np.minimum.reduceat(b.low, first), b.close[last], total(b.buy), total(b.sell), total(b.unknown), b.cvd[last],
        np.logical_and.reduceat(b.complete, first), total(b.long_liquidated), total(b.short_liquidated),
    )  # fmt: skip

    def moved(x: Reals) -> Reals:
        found: Reals = np.interp(x, data.axis.knots, axis.knots)
        return found

    heat = data.heat and replace(data.heat, left=moved(data.heat.left), right=moved(data.heat.right))
    big: dict[int, BigTrade] = {}
    for mark in data.big_trades:
        bar = int(of[mark.bar])
        held = big.get(bar, mark._replace(trades=0, volume=0.0))
        chosen = mark if mark.volume >= held.volume else held
        big[bar] = chosen._replace(bar=bar, trades=held.trades + mark.trades, volume=held.volume + mark.volume)
    return replace(
        data, bars=bars, thinned=by, axis=replace(axis, slot=axis.slot[first]), heat=heat,
        big_trades=list(big.values()), signals=[s._replace(bar=int(of[s.bar])) for s in data.signals],
        notes=[f"{len(b):,} bars, each candle is {by} of them", *data.notes],
    )  # fmt: skip


def ticks(data: PlotData, most: int = MOST_TICKS) -> list[tuple[float, str]]:
    """Places on the axis and their labels in UTC: the first bar of each hour, day … by how many there would be."""
    starts = data.bars.time_ns
    changed: Ints = np.empty(0, np.int64)
    for seconds in _SECONDS:
        bins = (starts + (3 * 86_400 * NS if seconds == 7 * 86_400 else 0)) // (seconds * NS)  # weeks from Monday
        changed = np.append(0 if starts[0] % (seconds * NS) == 0 else [], np.flatnonzero(np.diff(bins)) + 1)
        changed = changed.astype(np.int64)
        if len(changed) <= most:
            break
    if not len(changed):
        changed = np.array([0])
    days = starts // (86_400 * NS)
    kept: list[int] = []
    room = data.axis.slots / (most + 4)
    for i in changed.tolist():
        new_day = i == 0 or days[i] != days[i - 1]
        if kept and data.axis.slot[i] - data.axis.slot[kept[-1]] < room:
            if not new_day:
                continue
            kept.pop()  # the day matters more than the hour just before it
        kept.append(i)
    found = []
    for k, i in enumerate(kept):
        # At the full hour itself, unless it lies in a break: then at the bar, under the bar's own time.
        at, x = int(starts[i]), float(data.axis.slot[i])
        full = at // (seconds * NS) * seconds * NS
        if seconds <= 43_200 and (i == 0 or full > starts[i - 1]):
            place = float(data.axis.at(np.array([full]))[0])
            if x - place < 2 * LONGEST_GAP and not any(
                place <= b.slot + BREAK and b.slot <= x for b in data.axis.breaks
            ):
                at, x = full, place
        found.append((x, _label(at, data, seconds, k == 0 or days[i] != days[kept[k - 1]])))
    return found


def _label(ns: int, data: PlotData, seconds: int, day: bool) -> str:
    text = iso(ns)
    clock = text[11:19] if data.axis.step_ns < 60 * NS and ns % (60 * NS) else text[11:16]
    if seconds >= 86_400:
        return text[:10]
    return f"{clock}\n{text[:10]}" if day else clock
