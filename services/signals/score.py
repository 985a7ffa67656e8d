"""Every formula of a signal's score, one function each. Numbers in, numbers out; `side` is +1 for BUY, -1 for SELL.

All of it is symmetric: the mirrored window (bought for sold) has the mirrored verdict and the same score. Where no
other source is named, the weights are this project's own; docs/concepts.md has them in one table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Z_LIMIT = 10.0
Z_ANOMALY = 2.0
HIGH_PERCENTILE, LOW_PERCENTILE = 95.0, 5.0
APART_SEC = 300.0
REJECTED_ABOVE, MONITOR_ABOVE = 0.3, 0.21
GRADES = ((0.9, "EXTREME"), (0.8, "VERY_HIGH"), (0.7, "HIGH"), (0.6, "MODERATE"))
LOW = "LOW"
# A signal's types in their order of precedence.
TYPES = ("block", "sweep", "institutional_flow", "pressure_spike", "volume_anomaly", "order_imbalance")


class Spread(NamedTuple):
    """Where samples lie and how far they usually stray; `unit` 0: they are all equal."""

    median: float
    unit: float


def median(values: Floats) -> float:
    """The middle value, or the mean of the two in the middle; `values` must not be empty."""
    half = len(values) // 2
    if len(values) % 2:
        return float(np.partition(values, half)[half])
    low, high = np.partition(values, (half - 1, half))[half - 1 : half + 1]
    return float((low + high) / 2)


def quantile(samples: Floats, share: float) -> float:
    """The value below which a share of the samples lies, linear between samples (Hyndman and Fan 1996, type 7)."""
    place = share * (len(samples) - 1)
    low = int(place)
    high = min(low + 1, len(samples) - 1)
    parted = np.partition(samples, (low, high))
    return float(parted[low] + (place - low) * (parted[high] - parted[low]))


def spread(samples: Floats) -> Spread:
    """Median and 1.4826 x median absolute deviation; where that is 0, 1.2533 x the mean absolute deviation.

    The factors make both the standard deviation of a normal distribution (Iglewicz and Hoaglin, How to Detect and
    Handle Outliers, 1993; sqrt(pi/2) = 1.2533).
    """
    middle = median(samples)
    strays = np.abs(samples - middle)
    return Spread(middle, 1.4826 * median(strays) or 1.2533 * float(strays.mean()))


def robust_z(x: float, usual: Spread) -> float:
    """(x - median) / unit within +-10; 0 or +-10 where all samples are equal."""
    away = x - usual.median
    if usual.unit == 0.0:
        return math.copysign(Z_LIMIT, away) if away else 0.0
    if abs(away) >= Z_LIMIT * usual.unit:  # before the division, which a tiny unit would take to infinity
        return math.copysign(Z_LIMIT, away)
    return away / usual.unit


def percentile(x: float, samples: Floats) -> float:
    """Percent of the samples below x, and half of the equal ones (the mean rank)."""
    return 100.0 * share_below(x, samples)


def share_below(x: float, samples: Floats) -> float:
    """Share of the samples below x, and half of the equal ones."""
    below, equal = np.count_nonzero(samples < x), np.count_nonzero(samples == x)
    return (int(below) + 0.5 * int(equal)) / len(samples)


def tail(x: float, samples: Floats, side: int) -> float:
    """The percentile counted in the signal's direction, 0..1: how many samples are less extreme than x."""
    return share_below(x, samples) if side > 0 else share_below(-x, -samples)


def direction(log_ratio: float) -> int:
    """+1 BUY, -1 SELL, 0 no signal."""
    return (log_ratio > 0) - (log_ratio < 0)


def significance(log_ratio: float, volume: float, volume_95: float | None, confidence: float) -> float:
    """1/2 min(|log_ratio| / ln 10, 1) + 0.3 min(volume / its 95th percentile, 1) + 0.2 confidence.

    Without a 95th percentile its term is 0.
    """
    busy = min(volume / volume_95, 1.0) if volume_95 else 0.0
    return 0.5 * min(abs(log_ratio) / math.log(10), 1.0) + 0.3 * busy + 0.2 * confidence


def slope(values: Sequence[float]) -> float:
    """Least squares slope over values one step apart; 0 for fewer than two."""
    middle = (len(values) - 1) / 2
    steps = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * y for i, y in enumerate(values)) / steps if steps else 0.0


def trend(last: Sequence[float | None], side: int) -> float:
    """Slope of the last log ratios within +-1, above 0 when it goes in the signal's direction.

    `last` are those of consecutive windows, this one at the end; what lies before a missing one does not count.
    """
    known: list[float] = []
    for value in reversed(last):
        if value is None:
            break
        known.insert(0, value)
    return max(-1.0, min(side * slope(known), 1.0))


def concentration(ask: float, bid: float) -> float:
    """2 x (share of the dominant side - 1/2); 0 without a known side."""
    total = ask + bid
    return 2.0 * (max(ask, bid) / total - 0.5) if total > 0 else 0.0


def persistence(last: Sequence[float | None], side: int) -> float:
    """Share of the last windows whose log ratio has the signal's sign; a missing window has not."""
    return sum(value is not None and direction(value) == side for value in last) / len(last)


def raw(significance: float, trend: float, concentration: float, persistence: float) -> float:
    """0.4 significance + 0.3 trend + 0.2 concentration + 0.1 persistence, within 0..1."""
    return _unit(0.4 * significance + 0.3 * trend + 0.2 * concentration + 0.1 * persistence)


def base(z: float, tail: float) -> float:
    """1/2 min(|z| / 4, 1) + 1/2 tail percentile."""
    return 0.5 * min(abs(z) / 4.0, 1.0) + 0.5 * tail


def straddle(calls: float, puts: float, apart_sec: float) -> float:
    """0.7 x 2 min(C, P) / (C + P) + 0.3 (1 - min(apart / 300 s, 1)): how much it looks like a market maker's straddle.

    C and P are the volumes at one strike and expiration in one window; 0 where one of them did not trade.
    """
    if min(calls, puts) <= 0:
        return 0.0
    return 0.7 * 2.0 * min(calls, puts) / (calls + puts) + 0.3 * (1.0 - min(apart_sec / APART_SEC, 1.0))


def cluster_factor(size: int) -> float:
    """Strikes on one side, this one included: three or more x 1.2, two x 1.1, alone x 0.9."""
    return 1.2 if size >= 3 else 1.1 if size == 2 else 0.9


def score(raw: float, base: float, market_maker: float, factor: float) -> float:
    """(raw/2 + base/2) x (1 - market_maker/2) x cluster factor, within 0..1."""
    return _unit((0.5 * raw + 0.5 * base) * (1.0 - 0.5 * market_maker) * factor)


def grade(score: float) -> str:
    """EXTREME from 0.9, VERY_HIGH from 0.8, HIGH from 0.7, MODERATE from 0.6, else LOW."""
    return next((name for least, name in GRADES if score >= least), LOW)


def status(market_maker: float) -> str:
    """`rejected` above 0.3, `monitor` above 0.21, else `emitted`."""
    return "rejected" if market_maker > REJECTED_ABOVE else "monitor" if market_maker > MONITOR_ABOVE else "emitted"


def anomalous(z: float | None, percentile: float | None, side: int = 1) -> bool:
    """Whether a value lies far out to a side: z at 2 or percentile at 95 (below: -2, 5) or beyond."""
    if z is None or percentile is None:
        return False
    far = percentile >= HIGH_PERCENTILE if side > 0 else percentile <= LOW_PERCENTILE
    return side * z >= Z_ANOMALY or far


def types_of(row: Any, side: int, pressure: bool, volume: bool) -> tuple[str, ...]:
    """What kinds of signal this is, in the order of `TYPES`, at least one.

    `row` is the Pressure; `pressure` and `volume` say whether the log ratio is anomalous in the signal's direction,
    and the volume anomalously high. A block or sweep counts on the signal's side. `order_imbalance`: the dominant
    side is the signal's, or nothing else holds.
    """
    held = (
        (row.block_ask_volume if side > 0 else row.block_bid_volume) > 0,
        (row.sweep_ask_volume if side > 0 else row.sweep_bid_volume) > 0,
        pressure and volume,
        pressure,
        volume,
        row.dominant_side == ("BUY" if side > 0 else "SELL"),
    )
    return tuple(name for name, holds in zip(TYPES, held, strict=True) if holds) or TYPES[-1:]


def _unit(x: float) -> float:
    return max(0.0, min(x, 1.0))
