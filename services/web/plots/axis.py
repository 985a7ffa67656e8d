"""The time axis of a plot: one slot for each length of a bar, with long stretches of nothing cut out.

A short gap is left as wide as it was; a longer one (the market was closed, the feed was down for hours) becomes a
break of BREAK slots, which the plot marks. So no bar stands where there was none, and a week of sessions is readable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

BREAK = 3
LONGEST_GAP, SHORTEST_GAP = 30, 4  # missing bars in a row above which the axis is cut; more slots than bars lower it
MOST_STRETCHES = 300  # each with slots of its own, where slots are made fewer
SPREAD = 6  # slots for each bar, at most


class Break(NamedTuple):
    """A cut: it begins at `slot`; nothing was drawn within [start_ns, end_ns)."""

    slot: float
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Axis:
    """`slot[i]` is bar i's; slot k covers [k, k + 1) of the axis, which ends at `slots`.

    `knots_ns` and `knots` are the ends of the stretches between breaks, as instants and on the axis.
    """

    slot: Ints
    slots: int
    step_ns: int
    knots_ns: Ints
    knots: Reals
    breaks: tuple[Break, ...]

    def at(self, times_ns: Ints) -> Reals:
        """Places of instants; what is outside the axis is at its ends."""
        # Relative to the first: a double tells instants of today only to 256 ns.
        first = self.knots_ns[0]
        found: Reals = np.interp((times_ns - first).astype(float), (self.knots_ns - first).astype(float), self.knots)
        return found

    def thinned(self, by: int) -> Axis:
        """The same axis with `by` slots made one; bars that now share a slot have the same.

        A slot does not reach over a break, which is one slot wide then, unless there are too many of them.
        """
        begin = self.knots[::2].astype(np.int64)
        if len(begin) > MOST_STRETCHES:
            breaks = tuple(b._replace(slot=b.slot / by) for b in self.breaks)
            return Axis(self.slot // by, -(-self.slots // by), self.step_ns, self.knots_ns, self.knots / by, breaks)
        lengths = (self.knots[1::2] - self.knots[::2]) / by
        wide = np.ceil(lengths).astype(np.int64) + 1
        first = np.cumsum(wide) - wide
        stretch = np.searchsorted(begin, self.slot, side="right") - 1
        slot = first[stretch] + (self.slot - begin[stretch]) // by
        knots = np.column_stack((first, first + lengths)).ravel()
        breaks = tuple(b._replace(slot=float(at - 1)) for b, at in zip(self.breaks, first[1:].tolist(), strict=True))
        return Axis(slot, int(first[-1] + wide[-1]) - 1, self.step_ns, self.knots_ns, knots, breaks)


def axis_of(starts_ns: Ints, step_ns: int) -> Axis:
    """The axis of bars that begin at these instants (ascending, at least one), each `step_ns` long."""
    steps = np.diff((starts_ns - starts_ns[0]) // step_ns)
    gap = LONGEST_GAP
    while gap > SHORTEST_GAP and _slots(steps, gap) > SPREAD * len(starts_ns):
        gap = max(SHORTEST_GAP, gap // 2)
    cut = steps > gap + 1
    slot = np.concatenate(([0], np.cumsum(np.where(cut, BREAK + 1, steps)))).astype(np.int64)
    before = np.flatnonzero(cut)
    first, last = np.concatenate(([0], before + 1)), np.concatenate((before, [len(starts_ns) - 1]))
    knots_ns = np.column_stack((starts_ns[first], starts_ns[last] + step_ns)).ravel()
    knots = np.column_stack((slot[first], slot[last] + 1)).ravel().astype(float)
    breaks = tuple(
        Break(float(slot[i] + 1), int(starts_ns[i]) + step_ns, int(starts_ns[i + 1])) for i in before.tolist()
    )
    return Axis(slot, int(slot[-1]) + 1, step_ns, knots_ns, knots, breaks)


def _slots(steps: Ints, gap: int) -> int:
    return int(np.where(steps > gap + 1, BREAK + 1, steps).sum()) + 1
