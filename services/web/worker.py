"""The web worker: the application on a listening socket, and a heartbeat beside it.

It serves whether or not Redis and the store answer; what of it they are needed for says so until they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from services.web.app import create
from services.web.context import Web
from services.web.exporter import exported
from services.web.sockets import Requests, Sockets
from shared import metrics
from shared.bus import Bus, worker_id
from shared.errors import BusUnavailable, ConfigError, TapelineError
from shared.heartbeat import beat, leave
from shared.progress import Asked, Progress
from shared.settings import Settings
from shared.supervise import page_url

log = logging.getLogger(__name__)

NAME = "web"
BEAT_SECONDS = 1.0
# Of the 5 s in which a worker ends: for the live connections to be told, then for the rest of the requests.
TELL_SECONDS, REST_SECONDS = 1.5, 1
PING_SECONDS = 20.0
MOST_MESSAGE = 64 << 10
# Connections beside the live ones: what browsers keep open, and requests on their way.
SPARE_CONNECTIONS = 512


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Service entry: serve until stopped. Raises ConfigError for an address that cannot be listened at."""
    if args:
        raise ConfigError(f"web takes no arguments, got {' '.join(args)}")
    app = create(settings)
    heart = Heart(settings, stop)
    with contextlib.ExitStack() as held:
        listeners = listen(settings)
        for listener in listeners:
            held.enter_context(listener)
        log.info("the page is at %s", page_url(settings.web, listeners[0].getsockname()[1]))
        metrics.follow(heart.progress)
        heart.went_on()
        heart.thread.start()
        held.callback(heart.end)
        asyncio.run(serve(app, listeners, Asked(stop, heart.went_on), REGISTRY))
    if heart.failed is not None:
        raise heart.failed


def listen(settings: Settings) -> list[socket.socket]:
    """Sockets bound to web.host:web.port, one for each address of the host. Raises ConfigError."""
    web, made = settings.web, list[socket.socket]()
    try:
        port = web.port
        found = socket.getaddrinfo(web.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            with contextlib.suppress(OSError) if made else contextlib.nullcontext():
                listener = socket.create_server((str(address[0]), port), family=family, backlog=1024)
                made.append(listener)
                port = port or listener.getsockname()[1]
    except OSError as error:
        for listener in made:
            listener.close()
        raise ConfigError(_why_not(error, web.host, web.port)) from None
    return made


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: set TAPELINE_WEB_PORT to another, or to 0 for no page in `tapeline up`"
    if error.errno == errno.EACCES:
        return f"port {port} of {host} is not ours to take: set TAPELINE_WEB_PORT to one from 1024 on"
    return f"cannot listen at {host}, port {port} ({error.strerror or error}): set TAPELINE_WEB_HOST, TAPELINE_WEB_PORT"


async def serve(
    app: FastAPI, listeners: list[socket.socket], stop: threading.Event, registry: CollectorRegistry | None = None
) -> None:
    """Serve an application until `stop`; its live connections are told that it ends.

    `registry`: through which the metrics of bus and store are told.
    """
    log_quietly()
    web = app.state.settings.web
    config = uvicorn.Config(
        app,
        ws=Sockets,
        http=Requests,
        lifespan="off",  # entered here, so that what is wrong with it is raised here
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=MOST_MESSAGE,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ws_per_message_deflate=False,
        limit_concurrency=web.connections + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=REST_SECONDS,
    )
    async with app.router.lifespan_context(app):
        with exported(app.state.web.pipeline, app.state.settings, registry):
            await Server(config, app.state.web, stop).serve(sockets=listeners)


def log_quietly() -> None:
    """Of the server only what went wrong: its other lines hold the path of each WebSocket.

    A WebSocket that we refuse is not wrong, though the server takes it for a handshake that was left undone.
    """
    errors = logging.getLogger("uvicorn.error")
    errors.setLevel(logging.WARNING)
    errors.addFilter(_is_trouble)
    logging.getLogger("uvicorn.access").disabled = True


def _is_trouble(record: logging.LogRecord) -> bool:
    return "without completing handshake" not in record.getMessage()


class Server(uvicorn.Server):
    """Ends by an event, leaves the signals to the command, and tells the live connections before it closes them."""

    def __init__(self, config: uvicorn.Config, web: Web, stop: threading.Event) -> None:
        super().__init__(config)
        self._web, self._stop = web, stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        try:
            await asyncio.wait_for(self._web.hub.close(), TELL_SECONDS)
        except TimeoutError:
            log.warning("not all live connections could be told of the end")
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # of clients that read nothing
            connection.transport.abort()


class Heart:
    """Says in Redis that this process lives, on a thread of its own; waits for Redis when it is away.

    `progress`: of the event loop, which asks many times a second whether it must stop.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._settings, self._stop = settings, stop
        self._over = threading.Event()
        self._worker = worker_id(NAME)
        self.progress = Progress()
        self.failed: TapelineError | None = None
        self.thread = threading.Thread(target=self._run, name="web-heart", daemon=True)

    def went_on(self) -> None:
        """The event loop turns."""
        self.progress.mark("the event loop")

    def end(self) -> None:
        """Forget this worker; returns soon, whether Redis answers or not."""
        self._over.set()
        self.thread.join(1.0)

    def _run(self) -> None:
        bus: Bus | None = None
        told = False
        while not self._over.is_set():
            try:
                if bus is None:
                    bus = self._connect()
                beat(bus, self._worker, NAME, detail=page_url(self._settings.web), progress=self.progress)
                if told:
                    log.info("Redis answers again")
                told = False
            except BusUnavailable as error:
                if not told:
                    log.warning("%s; trying again", error)
                told = True
            except TapelineError as error:
                self.failed = error
                self._stop.set()
                break
            self._over.wait(min(BEAT_SECONDS, self._settings.redis.lease_seconds / 3))
        if bus is not None:
            self._leave(bus)

    def _connect(self) -> Bus:
        s = self._settings
        bus = Bus(s.redis.url, s.tapeline.namespace, cluster=s.redis.cluster)
        try:
            bus.deploy(s.tapeline.partitions)
        except BaseException:
            bus.close()
            raise
        return bus

    def _leave(self, bus: Bus) -> None:
        try:
            leave(bus, self._worker)
        except TapelineError as error:
            log.info("could not say goodbye: %s", error)
        bus.close()
