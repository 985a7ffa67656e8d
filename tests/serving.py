"""Running servers for tests, and a store with a market in it. Its fixtures are known to every test.

`served`: a server over the test's bus and store; `serving(web_token="…")` starts more, with other settings. `market`:
the URL of a store that holds some minutes of three futures and their options, made once a session and only read.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from shared.bus import Bus
from shared.settings import Settings, load
from tests.wait import until

if TYPE_CHECKING:
    from fastapi import FastAPI

MARKET_TRADES, MARKET_RATE = 15_000, 50.0  # five minutes from 2024-05-09T14:30:00Z
MARKET_WINDOW_SECONDS = 60


@dataclass
class Answer:
    """What a server answered: `headers` by names in small letters, `body` as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server on a free port, in a thread with an event loop of its own. `base`: http://127.0.0.1:PORT."""

    settings: Settings
    app: FastAPI
    port: int
    stop: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    thread: threading.Thread | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/api/v1/ws"

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
        """Any request, see `ask`."""
        return ask(self.base + path, method, body, **headers)

    def get(self, path: str, **headers: str) -> Any:
        """The JSON of an answer that is 200."""
        answer = self.ask(path, **headers)
        assert answer.status == 200, answer.body
        return answer.json

    def end(self) -> None:
        """Stop it and wait for its end. Raises what it ended with."""
        self.stop.set()
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive(), "the server did not end"
        if self.error is not None:
            raise self.error


class _Still(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def ask(url: str, method: str = "GET", body: Any = None, **headers: str) -> Answer:
    """Any request to any server, whatever it answers; a `body` goes as JSON; names of headers with _ for -."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        named.setdefault("Content-Type", "application/json")
    request = urllib.request.Request(url, data, named, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Still())
    try:
        with opener.open(request, timeout=20) as reply:
            return Answer(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


def start(settings: Settings) -> Served:
    """A server that answers; whoever starts it ends it (`end`)."""
    from services.web.app import create
    from services.web.worker import listen, serve

    listeners = listen(settings)
    served = Served(settings, create(settings), listeners[0].getsockname()[1])

    def run() -> None:
        try:
            asyncio.run(serve(served.app, listeners, served.stop))
        except BaseException as error:
            served.error = error
        finally:
            for listener in listeners:
                listener.close()

    served.thread = threading.Thread(target=run, name="served", daemon=True)
    served.thread.start()
    until(lambda: served.error or hasattr(served.app.state, "web"), 30, "the server to start")
    if served.error is not None:
        raise served.error
    return served


def changed(settings: Settings, **changes: Any) -> Settings:
    """Settings with some changed: `web_token="…"` is web.token."""
    for name, value in changes.items():
        section, _, setting = name.partition("_")
        part = msgspec.structs.replace(getattr(settings, section), **{setting: value})
        settings = replace(settings, **{section: part})
    return settings


@pytest.fixture
def web_settings(bus: Bus, store_url: str) -> Settings:
    """Settings of a server over the test's bus and store, on a free port, that counts no requests."""
    environ = {
        "REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace, "TAPELINE_STORE": store_url,
        "TAPELINE_WEB_PORT": "0", "TAPELINE_WEB_REQUESTS_PER_SECOND": "10000",
    }  # fmt: skip
    return load(environ=environ)


Serving = Callable[..., Served]


@pytest.fixture
def serving(web_settings: Settings) -> Iterator[Serving]:
    """Starts servers that end with the test: `serving()`, `serving(web_token="…", tapeline_store=market)`."""
    running: list[Served] = []

    def begin(**changes: Any) -> Served:
        running.append(start(changed(web_settings, **changes)))
        return running[-1]

    yield begin
    errors: list[BaseException] = []
    for served in running:
        try:
            served.end()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def served(serving: Serving) -> Served:
    """A server over the test's bus and store, on the loopback, without a token."""
    return serving()


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a SQLite store of ES, NQ and CL with options: candles, features, pressure in windows of a minute, signals.

    Made by a backfill; nobody writes to it.
    """
    from services.ingest.dbn_file import DbnFiles
    from services.ingest.synthetic import generate
    from shared import backfill

    folder = tmp_path_factory.mktemp("market")
    tape = folder / "market.dbn"
    generate(tape, trades=MARKET_TRADES, rate=MARKET_RATE, options=True, late_fraction=0.01, late_seconds=5)
    url = f"sqlite:///{folder / 'market.db'}"
    environ = {
        "TAPELINE_STORE": url, "TAPELINE_AGGREGATE_MAX_LATENESS_SECONDS": "10",
        "TAPELINE_PRESSURE_WINDOW_SECONDS": str(MARKET_WINDOW_SECONDS),
    }  # fmt: skip
    settings = load(environ=environ)
    files = DbnFiles([tape, folder / "market.definitions.dbn"], settings.tapeline.partitions)
    backfill.run([files], settings, lambda _: None, threading.Event())
    return url
