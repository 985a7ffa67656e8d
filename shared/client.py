"""A client of the live API (`services/web`): rows as they are made, and history, for programs elsewhere.

    async with tapeline_client("http://127.0.0.1:8000").candles("BTC-USDT", "1m", history=100) as bars:
        async for bar in bars:
            print(bar.end, bar.close, bar.cvd_close, bar.revision)

Needs no Redis, no database and no settings: only the address, and a token where the server wants one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec

from shared.client_rows import GapRow, PressureRow, RollupRow, Row, SignalRow, table_of
from shared.client_stream import HEARTBEAT_SECONDS, Stream, Wish
from shared.errors import AuthError, ConfigError, TapelineError, Unavailable
from shared.frames import iso
from shared.reader_bars import FixedBar, RollingBar, SecondBar, instant_ns, series_of
from shared.records import aliases, normal
from shared.stores import redact

__all__ = [
    "Client", "FixedBar", "GapRow", "Instant", "Page", "PressureRow", "RollingBar", "RollupRow", "Row", "SecondBar",
    "SignalRow", "Stream", "tapeline_client",
]  # fmt: skip

Instant = datetime | int | str
# Paged tables, and which parameter says of whom.
TABLES = {
    "candles": "symbol", "features": "symbol", "big-trades": "symbol", "pressure": "underlying",
    "rollups": "underlying", "signals": "underlying", "gaps": "feed",
}  # fmt: skip
TIMEOUT = aiohttp.ClientTimeout(total=120, sock_connect=10, sock_read=60)
MESSAGE_BYTES = 256 << 20
# How often a request is repeated that the server refuses as one too many.
_TRIES = 20


class Page(NamedTuple):
    """Rows as the API tells them (instants are ISO texts), oldest first; `next`: the cursor of the page behind, or "".

    `id`: the place up to which the store has what is on the bus, as `after` of a stream; "" where that is not known.
    """

    table: str
    rows: list[dict[str, Any]]
    next: str
    id: str


def tapeline_client(url: str = "http://127.0.0.1:8000", *, token: str = "") -> Client:
    """A client of the server there. Raises ConfigError for what is no http:// or https:// URL."""
    return Client(url, token)


class Client:
    """See the module. Used inside `async with`, or through a stream of its own; all of it belongs to one event loop.

    Streams wait for a server that does not answer, and go on when it does. Every other call raises Unavailable,
    AuthError (the token), ConfigError (what was asked for).
    """

    def __init__(self, url: str, token: str) -> None:
        self.where = redact(url)
        try:
            parts = urlsplit(url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
            parts.port  # noqa: B018 - raises for what is none
        except ValueError:
            fine = False
        if not fine:
            raise ConfigError(f"'{self.where}' is no address of a server; write http://127.0.0.1:8000")
        self._base = url.rstrip("/") + "/api/v1/"
        token = token.strip()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None
        self._users = 0

    async def __aenter__(self) -> Client:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=TIMEOUT)
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if not self._users and self._session is not None:
            session, self._session = self._session, None
            await session.close()

    # -- streams -------------------------------------------------------------------------------------

    def candles(
        self, symbol: str, timeframe: str = "1m", *, history: int = 0, since: Instant | None = None, after: str = ""
    ) -> Stream[Any]:
        """Bars of a symbol: FixedBar, or of the timeframes `rolling` and `seconds` RollingBar and SecondBar.

        First the newest `history` ones, or all `since` an instant (of the key's time, as of `MarketReader.bars`), then
        each as it is made, and again for each correction. `symbol` as people write it: `ES`, `ESZ6`, `BTC-USDT`,
        `binance:BTCUSDT`. `after`: the `id` of a stream or a page, to go on behind it.
        """
        timeframe = series_of(symbol, timeframe).timeframe
        return self._stream("candles", symbol, timeframe, history, since, after)

    def pressure(
        self, underlying: str = "", *, history: int = 0, since: Instant | None = None, after: str = ""
    ) -> Stream[PressureRow]:
        """Option pressure by key and window, of one underlying or of all."""
        return self._stream("pressure", underlying, "", history, since, after)

    def rollups(
        self, underlying: str = "", *, history: int = 0, since: Instant | None = None, after: str = ""
    ) -> Stream[RollupRow]:
        """Option pressure by window alone."""
        return self._stream("rollups", underlying, "", history, since, after)

    def signals(
        self, underlying: str = "", *, history: int = 0, since: Instant | None = None, after: str = ""
    ) -> Stream[SignalRow]:
        """Signals, those that were rejected or withdrawn too (`status`)."""
        return self._stream("signals", underlying, "", history, since, after)

    def gaps(self, *, history: int = 0, since: Instant | None = None, after: str = "") -> Stream[GapRow]:
        """Stretches of the tape that are lost, of all feeds."""
        return self._stream("gaps", "", "", history, since, after)

    def _stream(
        self, channel: str, symbol: str, timeframe: str, history: int, since: Instant | None, after: str
    ) -> Stream[Any]:
        if history < 0:
            raise ConfigError(f"history = {history}: at least 0")
        if history and since is not None:
            raise ConfigError("a stream takes history or since, not both")
        wish = Wish(channel, symbol, timeframe, history, as_text(since), after)
        find = partial(self.find, symbol, timeframe, underlying=channel != "candles", must=True)
        return Stream(self, wish, table_of(channel, timeframe), find)

    def websocket(self) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """A connection to the live API. Raises Unavailable, AuthError, ConfigError."""
        return _Socket(self)

    # -- requests ------------------------------------------------------------------------------------

    async def page(
        self,
        table: str,
        symbol: str = "",
        timeframe: str = "",
        *,
        since: Instant | None = None,
        until: Instant | None = None,
        limit: int | None = None,
        order: str = "newest",
        cursor: str = "",
        columns: Sequence[str] | None = None,
        **more: Any,
    ) -> Page:
        """One page of `candles`, `features`, `big-trades`, `pressure`, `rollups`, `signals` or `gaps`.

        `symbol` is an underlying for tables of options, a feed for gaps. The newest `limit` rows of `since` <= time <
        `until` (`order="oldest"`: the oldest), or those behind the `next` of a page before. `more`: what else the table
        may be narrowed by (`status="emitted"`).
        """
        if table not in TABLES:
            raise ConfigError(f"'{table}' is no table of the API; there are: {', '.join(TABLES)}")
        of = TABLES[table]
        if symbol and of != "feed":
            symbol = await self.find(symbol, timeframe, underlying=of == "underlying")
        asked: dict[str, Any] = {
            of: symbol, "timeframe": timeframe, "since": as_text(since), "until": as_text(until), "limit": limit,
            "order": order, "cursor": cursor, "columns": ",".join(columns or ()), **more,
        }  # fmt: skip
        told = await self.get(table, {name: str(value) for name, value in asked.items() if value not in ("", None)})
        return Page(told["table"], told["rows"], told.get("next") or "", told.get("id") or "")

    async def history(
        self,
        table: str,
        symbol: str = "",
        timeframe: str = "",
        *,
        since: Instant | None = None,
        until: Instant | None = None,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        **more: Any,
    ) -> AsyncIterator[Page]:
        """All rows with `since` <= time < `until`, oldest first, as pages of at most `limit` (None: the server's most).

        Each page is of its own moment. To go on live without a gap, give the first page's `id` to a stream as `after`.
        """
        cursor = ""
        if symbol and TABLES.get(table, "feed") != "feed":
            symbol = await self.find(symbol, timeframe, underlying=TABLES[table] == "underlying")
        limit = limit or await self.most_rows()
        while True:
            page = await self.page(
                table, symbol, timeframe, since=since, until=until, limit=limit, order="oldest", cursor=cursor,
                columns=columns, **more,
            )  # fmt: skip
            yield page
            cursor = page.next
            if not cursor:
                return

    async def instruments(self, q: str = "", *, kind: str = "", limit: int = 1000) -> list[dict[str, Any]]:
        """Instruments whose name holds `q`, as the API tells them; options only with `kind="option"`."""
        asked = {"q": q, "kind": kind, "limit": str(limit)}
        told = await self.get("instruments", {name: value for name, value in asked.items() if value})
        found: list[dict[str, Any]] = told["instruments"]
        return found

    async def pipeline(self) -> dict[str, Any]:
        """Feeds, workers, streams, lag, gaps and usage as they are now."""
        return await self.get("pipeline", {})

    async def meta(self) -> dict[str, Any]:
        """The server's version, timeframes and limits."""
        return await self.get("meta", {})

    async def most_rows(self) -> int:
        """How many rows the server tells in one answer."""
        return int((await self.meta())["limits"]["max_rows"])

    async def find(self, symbol: str, timeframe: str = "", *, underlying: bool = False, must: bool = False) -> str:
        """The name under which the server has a symbol that is written as people do.

        `-`, `_` and `/` do not count, and BTC-USDT is also a perpetual BTC-USDT-SWAP. What no instrument has is given
        back as it is, for history may have it; with `must` it is a ConfigError. So is what several have.
        """
        if not symbol:
            return ""
        known = await self.instruments(symbol.rpartition(":")[2])
        rolling = timeframe in ("rolling", "seconds")
        names = _names(symbol, known, underlying)
        if len(names) > 1:
            raise ConfigError(f"{symbol} may be {' or '.join(sorted(names))}: write which")
        if not names:
            if must:
                if not known and not await self.instruments(limit=1):
                    raise Unavailable(f"{self.where} knows no instruments yet")
                raise ConfigError(f"{self.where} has no {'underlying' if underlying else 'symbol'} '{symbol}'")
            return symbol
        (name,) = names
        if must and rolling and not names[name]:
            raise ConfigError(f"{name} has no {timeframe} bars, its continuous ticker has; or ask for 1m")
        return name

    async def get(self, path: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """The JSON answer of `/api/v1/<path>`. Where the server wants fewer requests, waits as long as it says."""
        session = self._session
        if session is None:
            raise ConfigError("the client is not open: use it inside `async with tapeline_client(...) as client`")
        for _ in range(_TRIES):
            try:
                async with session.get(self._base + path, params=asked, allow_redirects=False) as answer:
                    body = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise self._away(error) from None
            if answer.status == 429:
                await asyncio.sleep(_seconds(answer.headers.get("Retry-After", "")))
                continue
            return self._answer(answer.status, body)
        raise Unavailable(f"{self.where} takes no more requests now")

    def _away(self, error: BaseException) -> Unavailable:
        return Unavailable(f"{self.where} does not answer ({str(error) or type(error).__name__})")

    def _answer(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            told = msgspec.json.decode(body)
        except msgspec.DecodeError:
            told = None
        if status == 200 and isinstance(told, dict):
            return told
        raise self._refusal(status, told)

    def _refusal(self, status: int, told: Any) -> TapelineError:
        error = told.get("error") if isinstance(told, dict) else None
        message = str(error.get("message", "")) if isinstance(error, dict) else ""
        if status == 401:
            return AuthError(
                f"{self.where} refused the token ({message or status}): give tapeline_client(..., token=…)"
            )
        if status == 429 or status >= 500:
            return Unavailable(f"{self.where}: {message or f'HTTP {status}'}")
        if message:
            return ConfigError(f"{self.where}: {message}")
        return ConfigError(f"{self.where} is no Tapeline server (HTTP {status})")


class _Socket:
    """Connects on entering, with the errors of the rest."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientWebSocketResponse:
        client = self._client
        session = client._session
        assert session is not None
        try:
            self._socket = await session.ws_connect(
                client._base + "ws", heartbeat=HEARTBEAT_SECONDS, max_msg_size=MESSAGE_BYTES
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status != 403:
                raise client._refusal(error.status, None) from None
            await client.meta()  # says why, if it is not only the live API that is refused
            raise ConfigError(f"{client.where} refuses a live connection (HTTP 403)") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise client._away(error) from None
        return self._socket

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            await self._socket.close()


def _names(symbol: str, known: Sequence[Mapping[str, Any]], underlying: bool) -> dict[str, bool]:
    """Which names the symbol may mean, the best kind of match alone, and whether each has rolling bars."""
    ranks: dict[int, dict[str, bool]] = {}
    wanted = normal(symbol)
    for one in known:
        # What has no options yet has them under its root.
        name = str((one["underlying"] or one["root"]) if underlying else one["name"])
        direct = {name, str(one["symbol"]), f"{one['exchange']}:{one['symbol']}"}
        if underlying:
            direct = {name, name.rpartition(":")[2], *(direct if one["underlying"] else ())}
        if symbol == name:
            rank = 0
        elif wanted in {normal(each) for each in direct}:
            rank = 1
        elif wanted in aliases(str(one["exchange"]), *direct):
            rank = 2
        else:
            continue
        ranks.setdefault(rank, {})[name] = bool(one["rolling"])
    return ranks[min(ranks)] if ranks else {}


def as_text(at: Instant | None) -> str:
    """An instant as the API takes it; "" for none. Raises ConfigError."""
    return "" if at is None else iso(instant_ns(at))


def _seconds(text: str) -> float:
    """Of a Retry-After header."""
    try:
        return min(10.0, max(0.05, float(text)))
    except ValueError:
        return 1.0
