"""Slow, blocking looks at Redis or a store, made beside the event loop and shared by all who ask."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """What `work` returns or raises, from a thread of its own that does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            told: tuple[Callable[[Any], None], Any] = (future.set_result, work())
        except BaseException as error:  # it belongs to whoever waits
            told = (future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, *told)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Look(Generic[T]):
    """The newest result of `work`, which runs when somebody asks, at most every `every` seconds, never twice at once.

    It takes at most a fifth of the time, however long it takes.
    """

    def __init__(self, work: Callable[[], T], every: float, name: str) -> None:
        self._work, self._every, self._name = work, every, name
        self._running: asyncio.Future[T] | None = None
        self._next = 0.0
        self._began = self._ended = -math.inf
        self.found: T | None = None

    async def get(self, patience: float) -> T | None:
        """What was found, waiting at most so many seconds for something new; None when there is nothing yet."""
        if self._running is None and time.monotonic() >= self._next:
            self._began = time.monotonic()
            self._running = in_thread(self._work, self._name)
            self._running.add_done_callback(self._done)
        if self._running is not None:
            await asyncio.wait([self._running], timeout=patience)
        return self.found

    @property
    def waiting(self) -> float:
        """For how many seconds the look that runs now has not come back."""
        return time.monotonic() - self._began if self._running is not None else 0.0

    @property
    def age(self) -> float:
        """Seconds since the last look came back."""
        return time.monotonic() - self._ended

    def _done(self, running: asyncio.Future[T]) -> None:
        now = self._ended = time.monotonic()
        self._running = None
        self._next = max(self._began + self._every, now + 4 * (now - self._began))
        if not running.cancelled():
            self.found = running.result()
