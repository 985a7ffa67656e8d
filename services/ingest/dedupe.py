"""What was published lately, so that a replay of a feed's tail neither loses nor doubles a row.

Equality is not identity: real trades repeat in every field. A replay gives records in the order of
the tape, and a partition holds a prefix of its rows, so the first `count` rows of each (instrument,
event time) of a replay are those that are held already.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.source import Grouped
from shared.frames import CLOCK, TRADE, Rows

# A feed of several channels may be out of order by less than this.
DISORDER_NS = 50_000_000

Column = NDArray[np.int64]


@dataclass(slots=True)
class _Held:
    """Rows of one partition that a replay will bring again."""

    first_ns: int
    last_ns: int
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def trimmed_below(self) -> int:
        """Rows older than this were published, too, but the stream may have been trimmed since."""
        return self.first_ns if self.last_ns - self.first_ns > DISORDER_NS else 0


class Ledger:
    """The rows that each partition got within `window_ns` before the newest one, as a multiset."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._recent: dict[int, deque[tuple[int, Column, Column]]] = {}
        self._held: dict[int, _Held] = {}

    def add(self, grouped: Grouped) -> None:
        """Remember rows that were handed to the output."""
        for g, p in enumerate(grouped.partitions):
            self.restore(p, grouped.rows[grouped.starts[g] : grouped.starts[g + 1]])

    def restore(self, partition: int, rows: Rows) -> None:
        """Remember rows of one partition, in stream order."""
        rows = rows[rows["kind"] == TRADE] if (rows["kind"] != TRADE).any() else rows
        if not len(rows):
            return
        times = rows["ts_event_ns"].copy()
        newest = int(times.max())
        recent = self._recent.setdefault(partition, deque())
        recent.append((newest, rows["instrument"].copy(), times))
        while recent[0][0] < newest - self._window_ns:
            recent.popleft()

    def expect(self, since_ns: int) -> None:
        """A replay of all records with `ts_event >= since_ns` comes next."""
        self._held = {}
        for p, recent in self._recent.items():
            ids = np.concatenate([i for _, i, _ in recent])
            times = np.concatenate([t for _, _, t in recent])
            again = times >= since_ns
            if again.any():
                ids, times = ids[again], times[again]
                held = self._held[p] = _Held(int(times.min()), int(times.max()))
                held.counts.update(zip(ids.tolist(), times.tolist(), strict=True))

    def admit(self, grouped: Grouped) -> tuple[Grouped, int]:
        """The rows that their partition does not hold yet, and how many trades were left out."""
        if not self._held:
            return grouped, 0
        keep = np.ones(len(grouped.rows), np.bool_)
        doubled = 0
        for g, p in enumerate(grouped.partitions):
            held = self._held.get(p)
            if held is None:
                continue
            start, end = grouped.starts[g], grouped.starts[g + 1]
            doubled += _drop(held, grouped.rows[start:end], keep[start:end])
            if int(grouped.rows["ts_event_ns"][start:end].max()) > held.last_ns + self._window_ns:
                del self._held[p]
        return (grouped if keep.all() else _kept(grouped, keep)), doubled


def _drop(held: _Held, rows: Rows, keep: NDArray[Any]) -> int:
    """Clear `keep` where the row is held; returns how many trades that are."""
    old = np.flatnonzero(rows["ts_event_ns"] <= held.last_ns)
    ids, times = rows["instrument"][old].tolist(), rows["ts_event_ns"][old].tolist()
    trades = 0
    for i, kind, key in zip(old.tolist(), rows["kind"][old].tolist(), zip(ids, times, strict=True), strict=True):
        if kind != CLOCK:
            if key[1] >= held.trimmed_below:
                if held.counts[key] <= 0:
                    continue
                held.counts[key] -= 1
            trades += 1
        keep[i] = False
    return trades


def _kept(grouped: Grouped, keep: NDArray[Any]) -> Grouped:
    before = np.concatenate((np.zeros(1, np.int64), np.cumsum(keep)))
    partitions, starts = [], [0]
    for g, p in enumerate(grouped.partitions):
        end = int(before[grouped.starts[g + 1]])
        if end > starts[-1]:
            partitions.append(p)
            starts.append(end)
    return Grouped(grouped.rows[keep], grouped.ordinals[keep], partitions, starts)
