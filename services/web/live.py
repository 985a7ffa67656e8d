"""The live API: subscriptions over one WebSocket, or one of them as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Request, WebSocket
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from services.web.channels import PIPELINE, subject_of
from services.web.context import Web, web_of
from services.web.outbox import Message, Outbox
from services.web.places import place_of_text
from services.web.problems import Problem, bad
from services.web.seam import Subscription, Wish
from services.web.sockets import Drop, drop_of, sender_of
from shared import live
from shared.api_rows import Told
from shared.errors import TapelineError
from shared.frames import iso
from shared.instants import HIGHEST, LOWEST
from shared.metrics import LIVE_CLIENTS, LIVE_MESSAGES
from shared.reader_bars import instant_ns

log = logging.getLogger(__name__)

MAX_SUBSCRIPTIONS = 200
MAX_NAME = 100
MAX_MESSAGE = 64 << 10
ALIVE_SECONDS = 15.0
RETRY_MS = 1000

router = APIRouter(prefix="/api/v1", tags=["live"])


class _Named(msgspec.Struct):
    sub: str = ""


_named = msgspec.json.Decoder(_Named).decode
_request = msgspec.json.Decoder(live.AnyRequest)


class PipelineFollower:
    """A subscription to what the pipeline's state is, about each second."""

    failed = False

    def __init__(self, web: Web, outbox: Outbox, sub: str) -> None:
        self._web, self._outbox, self._sub = web, outbox, sub

    def start(self) -> None:
        """Begins with an empty snapshot."""
        self._outbox.snapshot(self._sub, "", "")
        self._web.hub.pulse.add(self._told, self._web.pipeline.read)

    def close(self) -> None:
        self._web.hub.pulse.remove(self._told)

    def _told(self, text: str) -> None:
        self._outbox.rows(self._sub, Told([(0,)], [text]), "")


class Client:
    """One connection's subscriptions and what waits to be sent to it. `ended`: why the server ends it, if it does.

    `transport`: websocket or sse, for the metrics.
    """

    def __init__(self, web: Web, transport: str, drop: Callable[[str], None]) -> None:
        self.web = web
        self._open, self._sent = LIVE_CLIENTS.labels(transport), LIVE_MESSAGES.labels(transport)
        self.outbox = Outbox(drop, web.hub.bounds)
        self.ended = ""
        self._end = asyncio.Event()
        self._subs: dict[str, Subscription | PipelineFollower] = {}

    def subscribe(self, ask: live.Subscribe) -> None:
        """Raises Problem for what cannot be subscribed to so."""
        if len(ask.sub) > MAX_NAME:
            raise bad(f"a subscription's name has at most {MAX_NAME} characters")
        held = self._subs.get(ask.sub)
        if held is not None and not held.failed:
            raise Problem(409, "subscribed", f"there is a subscription '{ask.sub}' already: unsubscribe it first")
        if len(self._subs) >= MAX_SUBSCRIPTIONS:
            raise Problem(429, "too_many", f"at most {MAX_SUBSCRIPTIONS} subscriptions of one connection")
        made = self._made(ask)
        self._subs[ask.sub] = made
        made.start()

    def _made(self, ask: live.Subscribe) -> Subscription | PipelineFollower:
        if ask.channel == PIPELINE:
            return PipelineFollower(self.web, self.outbox, ask.sub)
        subject = subject_of(ask.channel, ask.symbol, ask.timeframe)
        most = self.web.settings.web.max_rows
        if ask.history < 0 or ask.history > most:
            raise bad(f"history is a number of rows from 0 to {most}")
        if ask.since and ask.history:
            raise bad("give history or since, not both")
        after = place_of_text(ask.after, subject.topic) if ask.after else None
        return Subscription(self.web.hub, self.outbox, ask.sub, subject, Wish(ask.history, _instant(ask.since), after))

    def unsubscribe(self, name: str) -> None:
        """Raises Problem where there is no such subscription."""
        held = self._subs.pop(name, None)
        if held is None:
            raise Problem(404, "not_found", f"there is no subscription '{name[:MAX_NAME]}'")
        held.close()
        self.outbox.forget(name)
        self.outbox.event(live.Unsubscribed(name))

    async def serve(self, send: Callable[[list[Message]], Awaitable[None]], listen: Awaitable[None]) -> None:
        """Until the client has gone, sending fails, or it is dropped."""
        self.web.hub.connections[self] = None
        self._open.inc()

        async def counted(messages: list[Message]) -> None:
            await send(messages)
            self._sent.inc(len(messages))

        tasks = {
            asyncio.ensure_future(listen),
            asyncio.create_task(self.outbox.send_all(counted)),
            asyncio.create_task(self._end.wait()),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._open.dec()
            self.outbox.close()
            for sub in self._subs.values():
                sub.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, reason: str) -> None:
        """Whoever serves it comes back."""
        self.ended = reason
        self._end.set()

    def gone(self) -> None:
        """It is closed."""
        self.web.hub.connections.pop(self, None)


def _instant(text: str) -> str:
    """An instant as the stores compare it; empty for none. Raises Problem."""
    if not text:
        return ""
    try:
        ns = instant_ns(text)
    except TapelineError as error:
        raise bad(str(error)) from None
    if not LOWEST <= ns <= HIGHEST:
        raise bad(f"'{text}' is beyond what an instant can be")
    return iso(ns)


# -- WebSocket -------------------------------------------------------------------------------


@router.websocket("/ws")
async def follow(socket: WebSocket) -> None:
    """JSON texts as in shared/live.py."""
    await socket.accept()
    web = web_of(socket)
    most = web.settings.web.connections
    if len(web.hub.connections) >= most:
        await socket.close(live.CLOSE_TOO_MANY, f"{most} live connections are open: try again later")
        return
    client = Client(web, "websocket", _dropping(socket))

    together = sender_of(socket)

    async def send(messages: list[Message]) -> None:
        if together is not None:
            await together([message.text for message in messages])
            return
        for message in messages:
            await socket.send({"type": "websocket.send", "text": message.text})

    try:
        # Whatever is wrong with a connection that ends is none of ours.
        with suppress(WebSocketDisconnect, RuntimeError, OSError):
            await client.serve(send, _listen(socket, client))
            if client.ended:
                await _end(socket, client.ended)
    finally:
        client.gone()


async def _end(socket: WebSocket, reason: str) -> None:
    """Whether the client reads or not."""
    drop = drop_of(socket)
    if drop is None:
        await socket.close(live.CLOSE_SHUTDOWN, reason)
    else:
        drop(live.CLOSE_SHUTDOWN, reason)


def _dropping(socket: WebSocket) -> Callable[[str], None]:
    drop: Drop | None = drop_of(socket)

    def dropped(reason: str) -> None:
        log.info("a WebSocket client is dropped: %s", reason)
        if drop is not None:
            drop(live.CLOSE_TOO_SLOW, reason)

    return dropped


async def _listen(socket: WebSocket, client: Client) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        outbox = client.outbox
        error = _error(client, text)
        if error is not None:
            outbox.event(error)
        await outbox.room()  # who asks more than it reads has to wait for its answers


def _error(client: Client, text: str | None) -> live.Error | None:
    """Do what a client asks, or say what is wrong with it."""
    if text is None:
        return live.Error("bad_request", "a message is a text, not bytes")
    if len(text) > MAX_MESSAGE:
        return live.Error("too_large", f"a message has at most {MAX_MESSAGE} characters")
    sub = ""
    try:
        request = _request.decode(text)
        if isinstance(request, live.Ping):
            client.outbox.event(live.Pong(request.t))
            return None
        sub = request.sub
        if isinstance(request, live.Subscribe):
            client.subscribe(request)
        else:
            client.unsubscribe(request.sub)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return live.Error("bad_request", f"no request: {error}", _sub_of(text))
    except Problem as error:
        return live.Error(error.code, str(error), sub[:MAX_NAME])
    return None


def _sub_of(text: str) -> str:
    """Of what subscription a request that is none may be."""
    try:
        return _named(text).sub[:MAX_NAME]
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""


# -- server-sent events ----------------------------------------------------------------------


@router.get("/stream", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def stream(
    request: Request,
    channel: str,
    symbol: str = "",
    timeframe: str = "",
    history: int = 0,
    since: str = "",
    after: str = "",
    last_event_id: Annotated[str, Header()] = "",
) -> Response:
    """One subscription as server-sent events, `id` the place to go on from; data as over the WebSocket."""
    web = web_of(request)
    most = web.settings.web.connections
    if len(web.hub.connections) >= most:
        raise Problem(503, "too_many", f"{most} live connections are open: try again later", {"Retry-After": "5"})
    events = Events(web, drop_of(request))
    place = last_event_id or after
    events.client.subscribe(live.Subscribe("", channel, symbol, timeframe, history, since, place))
    return events


class Events(Response):
    """The answer that goes on for as long as the client stays."""

    media_type = "text/event-stream"

    def __init__(self, web: Web, drop: Drop | None) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._drop = drop
        self._gone = asyncio.Event()
        self.client = Client(web, "sse", self._dropped)

    def _dropped(self, reason: str) -> None:
        log.info("a client of the event stream is dropped: %s", reason)
        self._gone.set()
        if self._drop is not None:
            self._drop(live.CLOSE_TOO_SLOW, reason)

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send(_chunk(f"retry: {RETRY_MS}\n\n"))

        async def tell(messages: list[Message]) -> None:
            await send(_chunk("".join(map(_event, messages))))

        try:
            with suppress(OSError):
                await self.client.serve(tell, self._until_gone(receive))
                await send({"type": "http.response.body", "body": b""})
        finally:
            self.client.gone()

    async def _until_gone(self, receive: Receive) -> None:
        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = {asyncio.create_task(left()), asyncio.create_task(self._gone.wait())}
        try:
            while not (await asyncio.wait(tasks, timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED))[0]:
                self.client.outbox.alive()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _event(message: Message) -> str:
    if not message.event:
        return ":\n\n"
    place = f"id: {message.id}\n" if message.id else ""
    return f"event: {message.event}\n{place}data: {message.text}\n\n"


def _chunk(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}
