"""One subscription to the live API as an iterator that outlives its connections."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

import aiohttp
import msgspec

from shared import live
from shared.client_rows import Given, typed
from shared.errors import AuthError, ConfigError, TapelineError, Unavailable, VersionError

if TYPE_CHECKING:
    from shared.client import Client, Page

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECTING, LIVE, WAITING, CLOSED = "connecting", "live", "waiting", "closed"
# Messages held for a consumer that is slow. Behind them the socket fills, and the server coalesces.
BUFFER = 64
PAUSE_SECONDS = 5.0
HEARTBEAT_SECONDS = 20.0
_FIRST_PAUSE = 0.05
_BEGINNING = "1970-01-01T00:00:00Z"
_events = msgspec.json.Decoder(live.AnyEvent)
# Of an `error` that the server says: what another try may mend.
_PASSING = frozenset({"too_many"})


class Wish(NamedTuple):
    """What is subscribed to: `history` newest rows first, or all `since` an ISO instant, or what is `after` a place."""

    channel: str
    symbol: str
    timeframe: str = ""
    history: int = 0
    since: str = ""
    after: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.channel, self.symbol, self.timeframe)))


class _Batch(NamedTuple):
    """Rows of one message, and the place behind them."""

    rows: list[dict[str, Any]]
    id: str


class _Again(Exception):
    """Subscribe anew: from what was given by now."""


class Stream(Generic[T]):
    """Rows from the first one on, each once, and again for each correction of it, with a higher `revision`.

        async with client.candles("ES", "1m", history=100) as bars:
            async for bar in bars: ...

    A row whose revisions came while the consumer was busy or the connection was away may come with the newest only.
    `state` is `connecting`, `live`, `waiting` (`detail` says for what) or `closed`. `skipped` counts rows that the
    server left out because a newer one of the same key was there already: the consumer was too slow for them. `id` is
    the place behind the last message that was taken whole: give it as `after` to go on there in another process.

    Iterating raises AuthError, ConfigError (no such symbol or timeframe), VersionError. It ends when it is closed. One
    task at a time may iterate; cancelling it, or a timeout around `anext`, loses no row.
    """

    def __init__(
        self,
        client: Client,
        wish: Wish,
        table: str,
        resolve: Callable[[], Any],
        convert: Callable[[str, Any], T] = typed,
    ) -> None:
        self.state, self.detail = CONNECTING, ""
        self.skipped, self.id = 0, wish.after
        self._client, self._wish, self._table = client, wish, table
        self._resolve, self._convert = resolve, convert
        self._given = Given(table, wish.since)
        self._queue: asyncio.Queue[_Batch | Exception | None] = asyncio.Queue(BUFFER)
        self._rows: deque[dict[str, Any]] = deque()
        self._behind = wish.after  # the place behind `_rows`
        self._after = wish.after  # and behind all that was received
        self._begun, self._trouble = False, False
        self._most = 0  # rows in one message; known once the server was asked
        self._since = ""  # of the subscription that runs
        self._pause = _FIRST_PAUSE
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Stream[T]:
        await self._client.__aenter__()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End it; whoever iterates gets no more. May be called again."""
        task, self._task = self._task, None
        if task is None:
            return
        self.state = CLOSED
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not self._queue.full():  # else nobody waits for it
            self._queue.put_nowait(None)
        await self._client.__aexit__(None, None, None)

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        while not self._rows:
            if self._task is None:
                if self.state == CLOSED:
                    raise StopAsyncIteration
                raise ConfigError("the stream is not open: use it inside `async with ... as stream`")
            item = await self._queue.get()
            if isinstance(item, Exception):
                await self.close()
                raise item
            if item is not None:
                self._rows.extend(item.rows)
                self._behind = item.id
        if self.state == CLOSED:
            raise StopAsyncIteration
        row = self._rows.popleft()
        if not self._rows:
            self.id = self._behind
        return self._convert(self._table, row)

    # -- what goes on behind it ----------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._converse()
                except _Again:
                    await self._pause_a_little()
                except Unavailable as error:
                    await self._wait(str(error))
        except Exception as error:
            self.state, self.detail = WAITING, str(error)
            await self._queue.put(error)

    async def _wait(self, why: str) -> None:
        if not self._trouble:
            log.warning("%s: %s; waiting", self._wish.name, why)
        self.state, self.detail, self._trouble = WAITING, why, True
        await self._pause_a_little()

    async def _pause_a_little(self) -> None:
        await asyncio.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(PAUSE_SECONDS, 2 * self._pause)

    async def _converse(self) -> None:
        """One connection, from its first message to its last. Raises Unavailable when it ends."""
        if not self._most:
            self._wish = self._wish._replace(symbol=await self._resolve())
            self._most = await self._client.most_rows()
        if self._wish.history > self._most and not (self._begun or self._after):
            await self._give_pages(await self._newest_pages())
        async with self._client.websocket() as socket:
            await socket.send_str(msgspec.json.encode(self._subscribe()).decode())
            while True:
                message = await socket.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    await self._obey(self._read(message.data))
                elif message.type is aiohttp.WSMsgType.CLOSE:
                    self._closed(int(message.data or 0), str(message.extra or ""))
                elif message.type is not aiohttp.WSMsgType.BINARY:
                    raise Unavailable(f"the connection to {self._client.where} ended")

    def _subscribe(self) -> live.Subscribe:
        wish = self._wish
        history, since = wish.history, wish.since
        if self._begun:
            # Should the place be lost: all from the first row on. Where there was none, whatever there is is new.
            history, since = 0, self._given.first or _BEGINNING
        elif not since:
            # With no history asked for, the newest row only tells from where on.
            history = max(1, history)
        self._since = since
        return live.Subscribe("s", wish.channel, wish.symbol, wish.timeframe, history, since, self._after)

    def _read(self, text: str) -> live.AnyEvent:
        try:
            event: live.AnyEvent = _events.decode(text)
        except msgspec.MsgspecError as error:
            raise VersionError(
                f"{self._client.where} speaks another version of the API ({error}): run the server's version here"
            ) from None
        return event

    async def _obey(self, event: live.AnyEvent) -> None:
        if isinstance(event, live.Snapshot):
            await self._begin(event)
        elif isinstance(event, live.Resumed):
            if not self._begun:
                self._given.resume()
            await self._go_on([], event.id)
        elif isinstance(event, live.Rows):
            self.skipped += event.skipped
            await self._go_on(self._given.take(event.rows), event.id)
        elif isinstance(event, live.Notice):
            self.state, self.detail = LIVE if event.code == "live" else WAITING, event.message
        elif isinstance(event, live.Error):
            refusal = self._refusal(event)
            if not self._since or type(refusal) is not ConfigError:
                raise refusal
            await self._look_back()  # there may be more rows than one message holds; if not, this says the same

    async def _begin(self, event: live.Snapshot) -> None:
        wish = self._wish
        if not self._begun and wish.after and not (wish.history or wish.since):
            raise ConfigError(
                f"{wish.name}: the bus does not go on from the place given as `after`; begin with history or since"
            )
        if self._begun and not self._since:
            raise _Again  # between the newest rows of before and those of now there may be others
        if len(event.rows) >= self._most and self._since:
            await self._look_back()
        rows = self._given.take(event.rows)
        await self._go_on(rows if self._begun or wish.history or wish.since else [], event.id)

    async def _look_back(self) -> NoReturn:
        """Give all since the first row page by page, and begin again behind them."""
        wish = self._wish
        await self._give_pages(
            self._client.history(wish.channel, wish.symbol, wish.timeframe, since=self._since, limit=self._most)
        )
        raise _Again

    async def _newest_pages(self) -> AsyncIterator[Page]:
        """The newest `history` rows, oldest first; the place of the newest ones is the first page's."""
        wish, left, cursor = self._wish, self._wish.history, ""
        pages: list[Page] = []
        while left and (cursor or not pages):
            page = await self._client.page(
                wish.channel, wish.symbol, wish.timeframe, limit=min(left, self._most), cursor=cursor
            )
            pages.append(page)
            left, cursor = left - len(page.rows), page.next
        place = pages[0].id

        async def told() -> AsyncIterator[Page]:
            for page in reversed(pages):
                yield page._replace(id=place)

        return told()

    async def _give_pages(self, pages: AsyncIterator[Page]) -> None:
        place: str | None = None
        async for page in pages:
            place = page.id if place is None else place
            rows = self._given.take(page.rows)
            if rows:
                await self._queue.put(_Batch(rows, self._after))
        self._begun, self._after = True, place or ""

    async def _go_on(self, rows: list[dict[str, Any]], place: str) -> None:
        if self._trouble:
            log.info("%s: going on", self._wish.name)
        self._trouble, self._pause, self._begun = False, _FIRST_PAUSE, True
        self.state, self.detail = LIVE, ""
        self._after = place or self._after
        if rows:
            await self._queue.put(_Batch(rows, self._after))

    def _refusal(self, event: live.Error) -> TapelineError:
        if event.code in _PASSING:
            return Unavailable(event.message)
        return VersionError(event.message) if event.code == "version" else ConfigError(event.message)

    def _closed(self, code: int, reason: str) -> None:
        where = self._client.where
        if code == live.CLOSE_UNAUTHORIZED:
            raise AuthError(f"{where} refused the token: {reason or 'give tapeline_client another one'}")
        if code == live.CLOSE_TOO_SLOW:
            raise Unavailable(f"{where} closed the connection: this program takes its rows too slowly")
        raise Unavailable(f"{where} closed the connection ({reason or code})")
