"""Which trades came before: the latest of each symbol are remembered, in two generations.

A trade is known by its id's 32 bits with its price, size and side (not its time: where the exchange gives none,
a resent trade has another).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.compiled import jit
from shared.frames import TRADE, Rows

LATEST = 4096  # trades of a symbol that are remembered at least (at most twice as many)
_SMALLEST = 32


class _Symbol:
    """Two hash sets of trades; the older one is forgotten when the younger one holds LATEST."""

    __slots__ = ("old", "used", "young")

    def __init__(self) -> None:
        self.old, self.young = np.zeros(1, np.uint64), np.zeros(_SMALLEST, np.uint64)
        self.used = 0

    def fresh(self, keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
        out = np.empty(len(keys), np.bool_)
        at = 0
        while True:
            at, self.used = _look(keys, at, self.old, self.young, self.used, out)
            if at == len(keys):
                return out
            if self.used < LATEST:
                grown = np.zeros(2 * len(self.young), np.uint64)
                _look(self.young[self.young != 0], 0, np.zeros(1, np.uint64), grown, 0, np.empty(len(grown), np.bool_))
                self.young = grown
            else:
                self.old, self.young, self.used = self.young, np.zeros(2 * LATEST, np.uint64), 0


class Recent:
    """The latest trades of every symbol."""

    def __init__(self) -> None:
        self._symbols: dict[int, _Symbol] = {}

    def fresh(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of TICK rows (`instrument` any key of the symbol) are no repeated trades; remembers them."""
        out = np.ones(len(rows), np.bool_)
        keys = np.empty(len(rows), np.uint64)
        _keys(rows, keys)
        wanted = np.flatnonzero(keys)
        symbols = rows["instrument"][wanted]
        order = np.argsort(symbols, kind="stable")
        wanted, symbols = wanted[order], symbols[order]
        edges = np.flatnonzero(symbols[1:] != symbols[:-1]) + 1
        for group in np.split(wanted, edges) if len(wanted) else ():
            symbol = int(rows["instrument"][group[0]])
            seen = self._symbols.get(symbol)
            if seen is None:
                seen = self._symbols[symbol] = _Symbol()
            out[group] = seen.fresh(keys[group])
        return out


@jit
def _mix(z: Any) -> Any:
    """A bijection of 64 bits that spreads every bit (the finalizer of splitmix64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def _keys(rows: Rows, keys: Rows) -> None:
    """A hash of what makes a trade itself; 0 for rows that are none or have no id."""
    pair = np.empty(2, np.float64)
    bits = pair.view(np.uint64)
    for i in range(len(rows)):
        r = rows[i]
        keys[i] = 0
        if r.kind == TRADE and r.sequence != 0:
            pair[0] = r.price
            pair[1] = r.size
            key = _mix(bits[0])
            key = _mix(key ^ bits[1])
            key = _mix(key ^ np.uint64(r.sequence) ^ (np.uint64(r.side + 1) << np.uint64(32)))
            keys[i] = key if key != 0 else np.uint64(1)


@jit
def _look(keys: Rows, at: int, old: Rows, young: Rows, used: int, out: Rows) -> tuple[int, int]:
    """Look keys up and remember them, until the young set is half full; (where it stopped, how many it holds)."""
    mask, old_mask = np.uint64(len(young) - 1), np.uint64(len(old) - 1)
    while at < len(keys):
        key = keys[at]
        place = key & mask
        while young[place] != 0 and young[place] != key:
            place = (place + np.uint64(1)) & mask
        fresh = young[place] == 0
        if fresh and len(old) > 1:
            there = key & old_mask
            while old[there] != 0 and old[there] != key:
                there = (there + np.uint64(1)) & old_mask
            fresh = old[there] == 0
        if fresh:
            if 2 * used >= len(young):
                return at, used
            young[place] = key
            used += 1
        out[at] = fresh
        at += 1
    return at, used
