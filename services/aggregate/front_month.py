"""Which contract of a root is in front: most volume over the last five whole minutes (compiled).

Judged at each minute boundary in event time, for what comes after it. Every contract keeps its own ring,
so the new front's whole window is there at once.
"""

from __future__ import annotations

from services.aggregate.arena import Arrays
from services.aggregate.layout import MINUTES, NONE
from shared.compiled import jit
from shared.frames import Rows


@jit
def _minute_volume(minutes: Rows, contract: int, end_minute: int) -> float:
    """Volume of the five whole minutes before `end_minute`."""
    total = 0.0
    for m in range(end_minute - 5, end_minute):
        bucket = minutes[contract, m % MINUTES]
        if bucket.minute == m:
            total += bucket.volume
    return total


@jit
def add_minute(minutes: Rows, contract: int, sec: int, volume: float) -> None:
    """Count volume of second `sec` in its minute (unless that minute is long past)."""
    minute = sec // 60
    bucket = minutes[contract, minute % MINUTES]
    if bucket.minute < minute:
        bucket.minute = minute
        bucket.volume = volume
    elif bucket.minute == minute:
        bucket.volume += volume


@jit
def judge_front(x: Arrays, k: int, end_minute: int) -> None:
    """At a minute boundary: the challenger needs strictly more volume; never to an earlier expiry.

    The first judgement after a cold start is free to pick an earlier one.
    """
    root = x.roots[k]
    best = root.front
    volume = _minute_volume(x.minutes, best, end_minute) if best != NONE else 0.0
    held = x.contracts[best].expiry_ns if best != NONE and root.judged else NONE
    for c in range(len(x.contracts)):
        contract = x.contracts[c]
        if contract.root != k or contract.ring == NONE or c == root.front or contract.expiry_ns < held:
            continue
        v = _minute_volume(x.minutes, c, end_minute)
        tie = v == volume and v > 0 and best != root.front
        if v > volume or (tie and contract.expiry_ns < x.contracts[best].expiry_ns):
            best = c
            volume = v
    if best != NONE and volume > 0:
        root.front = best
        root.judged = 1


@jit
def first_front(x: Arrays, k: int, sec: int) -> int:
    """Provisional front of a root that has none: most volume in its first traded second."""
    mask = x.ring.shape[1] - 1
    best = NONE
    volume = 0.0
    for c in range(len(x.contracts)):
        if x.contracts[c].root != k or x.contracts[c].ring == NONE:
            continue
        s = x.ring[x.contracts[c].ring, sec & mask]
        if s.sec != sec:
            continue
        tie = best != NONE and s.volume == volume
        if best == NONE or s.volume > volume or (tie and x.contracts[c].expiry_ns < x.contracts[best].expiry_ns):
            best = c
            volume = s.volume
    return best
