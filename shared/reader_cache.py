"""Recent query results of the reader: bounded in bars and in age."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple

from shared.reader_bars import Bar


class _Held(NamedTuple):
    at: float
    bars: tuple[Bar, ...]

    @property
    def weight(self) -> int:
        return max(1, len(self.bars))  # nothing is a result, too


class _Loading(NamedTuple):
    at: float
    task: asyncio.Task[list[Bar]]


class BarCache:
    """Keeps results for less than `seconds` (0: not at all) since they were asked of the store, of at most `bars` bars.

    The least recently used go first. Who asks for what is just being asked waits for that answer. `hits`: calls
    answered without a query of their own; `misses`: queries made. `clock` tells seconds and never goes back.
    """

    def __init__(self, bars: int, seconds: float, clock: Callable[[], float]) -> None:
        self.hits = self.misses = 0
        self._max, self._seconds, self._clock = bars, seconds, clock
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()
        self._loading: dict[Hashable, _Loading] = {}
        self._tasks: set[asyncio.Task[list[Bar]]] = set()

    def __len__(self) -> int:
        """Bars held (an empty result counts as one)."""
        return sum(held.weight for held in self._held.values())

    async def get(self, key: Hashable, load: Callable[[], Awaitable[list[Bar]]]) -> list[Bar]:
        """What `load` gives, or gave a moment ago; each caller gets a list of its own. Raises what `load` does."""
        now = self._clock()
        held, loading = self._held.get(key), self._loading.get(key)
        if held is not None and self._fresh(held.at, now):
            self.hits += 1
            self._held.move_to_end(key)
            return list(held.bars)
        if loading is not None and self._fresh(loading.at, now):
            self.hits += 1
        else:
            self.misses += 1
            loading = _Loading(now, asyncio.ensure_future(load()))
            self._loading[key] = loading
            self._tasks.add(loading.task)
            loading.task.add_done_callback(lambda _: self._loaded(key, loading))
        # One who gives up waiting does not take the answer from the others.
        return list(await asyncio.shield(loading.task))

    def _fresh(self, at: float, now: float) -> bool:
        return now - at < self._seconds

    def _loaded(self, key: Hashable, loading: _Loading) -> None:
        self._tasks.discard(loading.task)
        if self._loading.get(key) is loading:
            del self._loading[key]
        if loading.task.cancelled() or loading.task.exception() is not None:
            return
        now = self._clock()
        for old in [k for k, held in self._held.items() if not self._fresh(held.at, now)]:
            del self._held[old]
        held = _Held(loading.at, tuple(loading.task.result()))
        if self._fresh(held.at, now) and held.weight <= self._max:
            self._held[key] = held
            self._held.move_to_end(key)
            left = len(self) - self._max
            while left > 0:
                left -= self._held.popitem(last=False)[1].weight

    async def close(self) -> None:
        """Forget all, and end what is just being asked."""
        self._held.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
