"""Market hours: rows of [open, close) in ns, sorted (compiled)."""

from __future__ import annotations

from services.aggregate.layout import NEVER, NONE
from shared.compiled import jit
from shared.frames import NS, Rows


@jit
def session_at(sessions: Rows, low: int, high: int, ts: int) -> int:
    """Index of the session of [low, high) that `ts` is in, or NONE."""
    first, end = low, high
    while low < high:
        middle = (low + high) // 2
        if sessions[middle, 0] <= ts:
            low = middle + 1
        else:
            high = middle
    at = low - 1
    return at if first <= at < end and ts < sessions[at, 1] else NONE


@jit
def warm_at(sessions: Rows, low: int, high: int, start_sec: int, need: int) -> int:
    """The second at which `need` whole seconds of market time have been watched since `start_sec`."""
    end = high
    while low < high:
        middle = (low + high) // 2
        if sessions[middle, 1] <= start_sec * NS:
            low = middle + 1
        else:
            high = middle
    for i in range(low, end):
        begin = max(start_sec, sessions[i, 0] // NS)
        here = sessions[i, 1] // NS - begin
        if need <= here:
            return int(begin + need)
        need -= here
    return NEVER
