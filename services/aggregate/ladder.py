"""Which lengths of fixed candles are folded from which."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import numpy as np

from services.aggregate.layout import NONE, TIMEFRAME
from shared.frames import Rows
from shared.timeframes import FEATURED, offset_of

BASE_MOST_SEC = 60  # the finest candles are folded from a ring of seconds
FOLD_MOST = 20  # finer candles that one is folded from, where a step between can be found
STEPS = (5, 10, 15, 30, 60, 300, 900, 3600, 14_400, 86_400)


def ladder(wanted: Iterable[int], lateness_sec: int) -> tuple[Rows, int]:
    """TIMEFRAME rows, finest first, and the slots of all; lengths that are not wanted are not emitted.

    A timeframe keeps its candles for as long as a coarser one that holds them, or a late trade, may
    ask for them again.
    """
    wanted = set(wanted)
    lengths = set(wanted)
    base = gcd(*wanted)
    lengths.add(base if base <= BASE_MOST_SEC else max(s for s in (1, *STEPS) if s <= BASE_MOST_SEC and base % s == 0))
    while True:
        between = next((s for s in (_between(n, lengths) for n in sorted(lengths)) if s), 0)
        if not between:
            break
        lengths.add(between)
    order = sorted(lengths)
    child = {n: _child(n, order) for n in order}
    rows = np.zeros(len(order), TIMEFRAME)
    at = 0
    for i, n in enumerate(order):
        longest = max([m for m in order if child[m] == n], default=n)
        slots = -(-(longest + lateness_sec + 2 * order[0] + 60) // n) + 2
        feature = sum(1 for m in order[:i] if m in FEATURED and m in wanted) if n in FEATURED and n in wanted else NONE
        below = child[n]
        rows[i] = (n, offset_of(n), at, slots, order.index(below) if below else NONE, int(n in wanted), feature)
        at += slots
    return rows, at


def _child(length: int, order: list[int]) -> int:
    """The longest shorter length that this one is a multiple of, 0 for none."""
    return max((m for m in order if m < length and length % m == 0), default=0)


def _between(length: int, lengths: set[int]) -> int:
    """A length worth adding below `length`, 0 for none."""
    below = _child(length, sorted(lengths))
    if not below or length // below <= FOLD_MOST:
        return 0
    fits = [s for s in STEPS if below < s < length and length % s == 0 and s % below == 0]
    return max((s for s in fits if length // s <= FOLD_MOST), default=max(fits, default=0))
