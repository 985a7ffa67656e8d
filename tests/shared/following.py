"""A follower of bars in a thread of its own, as a strategy's process would be."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any

from shared.bus import Bus
from shared.frames import NS
from shared.reader import Bar, MarketReader
from tests.services.sink_sqlite.tape import T0
from tests.wait import until


class Follower:
    """`bars` as they were delivered. While `gate` is not set, it takes no further one.

    Leaving the block closes the reader, which has to end the following.
    """

    def __init__(self, store: str, bus: Bus, symbol: str = "ES", timeframe: str = "rolling", **options: Any) -> None:
        self.bars: list[Bar] = []
        self.gate = threading.Event()
        self.gate.set()
        self._reader = (store, {"redis_url": bus.url, "namespace": bus.keys.namespace})
        self._follow = (symbol, timeframe, options)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.set()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(15)
        assert not self._thread.is_alive()
        if self._error is not None and error is None:
            raise self._error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._work())
        except BaseException as error:
            self._error = error

    async def _work(self) -> None:
        url, options = self._reader
        async with MarketReader(url, **options) as reader:
            taking = asyncio.ensure_future(self._take(reader))
            stopping = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({taking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            await reader.close()
            await asyncio.wait_for(taking, 5)

    async def _take(self, reader: MarketReader) -> None:
        symbol, timeframe, options = self._follow
        async for bar in reader.follow(symbol, timeframe, **options):
            self.bars.append(bar)
            while not self.gate.is_set():
                await asyncio.sleep(0.002)

    @property
    def seen(self) -> list[tuple[int, int]]:
        """(second of the row behind T0, revision) of each."""
        return [((bar.end_ns - T0) // NS, bar.revision) for bar in self.bars]

    def reaches(self, count: int) -> list[tuple[int, int]]:
        """`seen`, once so many were delivered."""
        until(lambda: len(self.bars) >= count or self._error, 15, f"{count} bars ({len(self.bars)} came)")
        return self.seen
