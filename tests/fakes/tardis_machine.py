"""A tardis-machine server for tests: its two normalized WebSocket endpoints, with faults on order.

Live streams have no clock but the test's: `send` hands messages to whoever is connected and asked for
them; what is sent while a client is away is missed by it, as in life. Replays play `tape`.

    with Machine(tape) as machine:
        machine.send(lines)            # to the live connections
        machine.drop()                 # RST; close(), stall(), refuse(), unplug() are other faults

Refusals are worded as the server (18.2) words them.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from aiohttp import WSCloseCode, web

MAX_HEADER_BYTES = 20_000
TOO_MANY_ERRORS = 50
NORMALIZERS = {
    "trade": "normalizeTrades", "book": "normalizeBookChanges", "derivative_ticker": "normalizeDerivativeTickers",
    "liquidation": "normalizeLiquidations", "option_summary": "normalizeOptionsSummary",
    "book_ticker": "normalizeBookTickers",
}  # fmt: skip
SPOT = frozenset({"trade", "book", "book_ticker"})
FUTURES = SPOT | {"derivative_ticker", "liquidation"}
# What the server can normalize of each exchange; any other exchange is unknown to it.
EXCHANGES = {
    "binance": SPOT, "binance-futures": FUTURES, "bitmex": FUTURES, "ftx": FUTURES, "okex": SPOT, "okex-swap": FUTURES,
    "okex-futures": FUTURES, "okex-options": SPOT | {"option_summary"}, "huobi": SPOT, "huobi-dm": FUTURES,
    "bybit": FUTURES, "deribit": FUTURES | {"option_summary"},
}  # fmt: skip

T = TypeVar("T")
Line = bytes | dict[str, Any]


class Session:
    """One connection of a client: what it asked for, and what it was sent."""

    def __init__(self, path: str, options: list[dict[str, Any]], ws: web.WebSocketResponse, url_bytes: int) -> None:
        self.path, self.options, self.ws, self.url_bytes = path, options, ws, url_bytes
        self.sent = 0
        self.stalled = False
        self.over = False
        self.transport: Any = None

    @property
    def types(self) -> set[str]:
        return {t for o in self.options for t in o["dataTypes"]}

    @property
    def symbols(self) -> list[str]:
        return [s for o in self.options for s in o.get("symbols") or ()]

    def wants(self, message: dict[str, Any]) -> bool:
        """Whether the server would send this message here."""
        mine = [o for o in self.options if o["exchange"] == message.get("exchange")]
        kind = message.get("type")
        if kind in ("disconnect", "error"):
            flag = "withDisconnectMessages" if kind == "disconnect" else "withErrorMessages"
            return any(o.get(flag) for o in mine)
        name = message.get("name") if kind == "book_snapshot" else kind
        return any(
            name in o["dataTypes"] and (not o.get("symbols") or message.get("symbol") in o["symbols"]) for o in mine
        )


class Machine:
    """The server, on a thread of its own. `tape`: what replays play, in order of localTimestamp."""

    def __init__(self, tape: Iterable[Line] = ()) -> None:
        self.tape = [wire_bytes(line) for line in tape]
        self.port = 0
        self.sessions: list[Session] = []
        self.refused = 0
        self.status: int | None = None  # an HTTP status instead of an upgrade
        self.replay_error = ""  # the text with which replays end at once
        self.replay_faults: list[tuple[int, str]] = []  # (after so many messages, drop | close | stall), in turn
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._runner: web.AppRunner | None = None
        self._reserved: socket.socket | None = None

    # -- life --------------------------------------------------------------------------------

    def __enter__(self) -> Machine:
        self._thread.start()
        self.plug()
        return self

    def __exit__(self, *exception: object) -> None:
        self.unplug()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if self._reserved is not None:
            self._reserved.close()

    def _run(self) -> None:
        self._loop.run_forever()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        if pending:
            self._loop.run_until_complete(asyncio.wait(pending))
        self._loop.close()

    def plug(self) -> None:
        """Serve (again, on the same port)."""
        self._call(self._start())

    def unplug(self) -> None:
        """Be away: connections break, and new ones are refused. The port stays ours."""
        if self._runner is not None:
            self._call(self._end())

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)
        runner = self._runner = web.AppRunner(app, max_line_size=1 << 22, max_field_size=1 << 22, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True, reuse_port=True)
        await site.start()
        self.port = runner.addresses[0][1]
        if self._reserved is None:
            self._reserved = socket.socket()  # bound, not listening: connects are refused when we do not serve
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind(("127.0.0.1", self.port))

    async def _end(self) -> None:
        runner, self._runner = self._runner, None
        for session in self.live:
            _reset(session)
        if runner is not None:
            await runner.cleanup()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    # -- orders ------------------------------------------------------------------------------

    @property
    def live(self) -> list[Session]:
        return [s for s in list(self.sessions) if not s.over]

    def of(self, data_type: str) -> list[Session]:
        """Living sessions that asked for this type."""
        return [s for s in self.live if data_type in s.types]

    def send(self, lines: Iterable[Line], *, to: Iterable[Session] | None = None, wait: bool = True) -> None:
        """To the living connections that asked for it (`to`: to these, asked or not, and not JSON either)."""
        work = self._send([wire_bytes(line) for line in lines], None if to is None else list(to))
        if wait:
            self._call(work)
        else:
            asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _send(self, lines: list[bytes], to: list[Session] | None) -> None:
        for line in lines:
            message = json.loads(line) if to is None else {}
            for session in self.live if to is None else to:
                if not session.stalled and not session.over and (to is not None or session.wants(message)):
                    with suppress(ConnectionError):
                        await session.ws.send_str(line.decode())
                        session.sent += 1

    def drop(self, sessions: Iterable[Session] | None = None) -> None:
        """RST."""
        self._each(_reset, sessions)

    def close(self, code: int = 1001, reason: str = "", sessions: Iterable[Session] | None = None) -> None:
        """A clean close frame."""
        for session in list(self.live if sessions is None else sessions):
            self._call(self._close(session, code, reason))

    async def _close(self, session: Session, code: int, reason: str) -> None:
        await session.ws.close(code=code, message=reason.encode()[:123])

    def stall(self, sessions: Iterable[Session] | None = None) -> None:
        """Open, but silent: what is sent there is lost."""
        self._each(lambda s: setattr(s, "stalled", True), sessions)

    def _each(self, order: Callable[[Session], None], sessions: Iterable[Session] | None) -> None:
        async def do() -> None:
            for session in list(self.live if sessions is None else sessions):
                order(session)

        self._call(do())

    # -- serving -----------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        header = len(request.raw_path) + sum(len(k) + len(v) + 4 for k, v in request.raw_headers)
        status = 431 if header > MAX_HEADER_BYTES else self.status
        if status is not None:
            self.refused += 1
            return web.Response(status=status)
        ws = web.WebSocketResponse(compress=False, timeout=0.2)
        await ws.prepare(request)
        path = request.path.lower()
        try:
            options = json.loads(request.query.get("options", "null"))
        except ValueError as error:
            await ws.close(code=1011, message=f"SyntaxError: {error}".encode()[:123])
            return ws
        options = options if isinstance(options, list) else [options]
        session = Session(path, options, ws, len(request.raw_path))
        session.transport = request.transport
        handler = {"/ws-stream-normalized": self._stream, "/ws-replay-normalized": self._replay}.get(path)
        self.sessions.append(session)
        try:
            if handler is None:
                await ws.close(code=WSCloseCode.POLICY_VIOLATION)
            else:
                await handler(session)
        except ConnectionError:
            pass
        finally:
            session.over = True
        return ws

    async def _stream(self, session: Session) -> None:
        if error := _bad_type(session.options):
            await session.ws.close(code=1011, message=error.encode()[:123])
            return
        for option in session.options:
            if error := _unsupported(option):
                for count in range(1, TOO_MANY_ERRORS + 1):
                    about = {"exchange": option["exchange"], "localTimestamp": "2024-06-01T00:00:00.000Z"}
                    error_line = {"type": "error", **about, "details": error, "subSequentErrorsCount": count}
                    gone = {"type": "disconnect", **about, "symbols": option.get("symbols")}
                    await self._send([wire_bytes(m) for m in (error_line, gone) if session.wants(m)], [session])
                text = f"Too many subsequent errors when connecting to  {option['exchange']} WS API"
                await session.ws.close(code=1011, message=text.encode())
                return
        async for _ in session.ws:  # pings and the close are answered underneath
            pass

    async def _replay(self, session: Session) -> None:
        options = session.options
        error = self.replay_error or _bad_type(options) or next((e for o in options if (e := _unsupported(o))), "")
        if error:
            await session.ws.close(code=1011, message=f"Error: {error.removeprefix('Error: ')}".encode()[:123])
            return
        at, fault = self.replay_faults.pop(0) if self.replay_faults else (-1, "")
        for line in self.tape:
            message = json.loads(line)
            when = message["localTimestamp"]
            if not (session.wants(message) and any(o["from"] <= when < o["to"] for o in options)):
                continue
            if session.sent == at:
                await self._fault(session, fault)
                return
            await session.ws.send_str(line.decode())
            session.sent += 1
        await session.ws.close(code=1000, message=b"WS replay-normalized finished")

    async def _fault(self, session: Session, fault: str) -> None:
        if fault == "stall":
            async for _ in session.ws:
                pass
        elif fault == "close":
            await session.ws.close(code=1011, message=b"Error: ETIMEDOUT")
        else:
            _reset(session)


def wire_bytes(line: Line) -> bytes:
    """A message as the server writes it."""
    return line if isinstance(line, bytes) else json.dumps(line, separators=(",", ":")).encode()


def _reset(session: Session) -> None:
    sock = session.transport.get_extra_info("socket") if session.transport else None
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        session.transport.abort()
    session.over = True


def _bad_type(options: list[dict[str, Any]]) -> str:
    for option in options:
        for name in option["dataTypes"]:
            if name.startswith("book_snapshot_") and not name.split("_")[2].isdigit():
                return f"Error: invalid depth: {name.split('_')[2]}, data type: {name}"
            if name.startswith(("book_snapshot_", "quote_")) and not name.endswith(("ms", "s", "m")):
                return f"Error: invalid data type: {name}"
    return ""


def _unsupported(option: dict[str, Any]) -> str:
    known = EXCHANGES.get(option["exchange"], frozenset())
    asked = {"book" if t.startswith(("book_snapshot_", "quote")) else t for t in option["dataTypes"]}
    for kind, normalizer in NORMALIZERS.items():
        if kind in asked and kind not in known:
            return f"{normalizer}: {option['exchange']} not supported"
    if not asked & set(NORMALIZERS):
        return "Can't normalize data without any normalizers provided"
    return ""
