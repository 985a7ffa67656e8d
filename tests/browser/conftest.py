"""A real Chromium, and a market for its pages: `tapeline up` with options over a store that knows their history."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Playwright, sync_playwright

from services.ingest.synthetic import VENUE
from services.ingest.synthetic_options import TapeOptions, build
from shared.bus import Bus
from tests.e2e.test_up import START_SECONDS, Up, running
from tests.shared.test_cli import OPTIONS, tapeline
from tests.wait import until

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}
# Of the history only what pressure and signals are made of, and minutes to see them on.
LEAN = {**OPTIONS, "TAPELINE_AGGREGATE_TIMEFRAMES": "1m", "TAPELINE_AGGREGATE_CANDLES_1S": "false"}


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """Of TAPELINE_TEST_CHROMIUM, else the machine's; without one the test is skipped.

    No longer than this package: while it is there, this thread counts as one that runs an event loop.
    """
    path = os.environ.get("TAPELINE_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no Chromium: install Debian's package chromium, or set TAPELINE_TEST_CHROMIUM")
    with sync_playwright() as playwright:
        made = launch(playwright, path)
        yield made
        made.close()


def launch(playwright: Playwright, path: str) -> Browser:
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


@dataclass
class Stack:
    """A running `tapeline up` with its page at `url`."""

    up: Up
    url: str
    folder: Path

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder / 'tapeline.db'}"

    @contextmanager
    def bus(self) -> Iterator[Bus]:
        bus = Bus((self.folder / "state" / "redis.url").read_text().strip())
        try:
            yield bus
        finally:
            bus.close()


@pytest.fixture(scope="package")
def stack(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The synthetic market, live, after sessions of options in which signals were planted."""
    folder = tmp_path_factory.mktemp("page")
    files = map(str, build(TapeOptions()).write(folder))
    done = tapeline("backfill", *files, "--store", "sqlite:///tapeline.db", "--json", cwd=folder, **LEAN)
    assert done.returncode == 0, done.stderr
    # As if of the same venue: a name that two venues have would have to be written with its own.
    with closing(sqlite3.connect(folder / "tapeline.db")) as store, store:
        store.execute("UPDATE candles SET exchange = ?", (VENUE,))
    with running(folder, **OPTIONS, TAPELINE_WEB_PORT=str(free_port())) as up:
        stack = Stack(up, f"http://127.0.0.1:{up.more['TAPELINE_WEB_PORT']}", folder)
        until(lambda: answers(stack.url), START_SECONDS, "the page's server")
        up.grows()
        yield stack
        said = (folder / "state" / "logs" / "web.log").read_text().splitlines()
    assert [line for line in said if '"ERROR"' in line] == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def answers(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), 0.5).close()
    except OSError:
        return False
    return True


@dataclass
class Seen:
    """A page, and what went wrong on it. `torn`: its server is disturbed, so requests may fail."""

    page: Page
    stack: Stack
    shots: Path
    errors: list[str] = field(default_factory=list)
    torn: bool = False

    def open(self, **query: str) -> Seen:
        """The page with these parameters, once it has drawn and has its panels."""
        self.page.goto(f"{self.stack.url}/?{'&'.join(f'{k}={v}' for k, v in query.items())}")
        self.wait("t?.ready && t.firstChartMs > 0")
        return self

    def wait(self, condition: str, arg: Any = None, timeout: float = 20.0) -> Any:
        """Wait for JavaScript to say yes, with `t` the page's app; returns its value.

        Asked again and again from here: the page's security policy lets no text be evaluated on it.
        """
        deadline = time.monotonic() + timeout
        while True:
            with suppress(Error):  # the page is just being loaded
                if value := self.value(condition, arg):
                    return value
            if time.monotonic() > deadline:
                self.shot("failed")
                raise AssertionError(f"{condition} did not come true within {timeout} s; {self.errors}")
            self.page.wait_for_timeout(20)

    def value(self, expression: str, arg: Any = None) -> Any:
        return self.page.evaluate(f"(arg) => {{ const t = window.tapeline; return {expression}; }}", arg)

    def shot(self, name: str) -> None:
        """Kept in TAPELINE_TEST_SCREENSHOTS, else with the test's files."""
        self.page.screenshot(path=self.shots / f"{name}.png")

    def heard(self, message: ConsoleMessage) -> None:
        network = "net::ERR_" in message.text or "WebSocket connection" in message.text or "status of 5" in message.text
        if message.type in ("error", "warning") and not (self.torn and network):
            self.errors.append(f"{message.text} ({message.location.get('url')})")


@pytest.fixture
def seen(chromium: Browser, stack: Stack, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Seen]:
    """A tab on the page. What it said of errors on the console fails the test."""
    folder = os.environ.get("TAPELINE_TEST_SCREENSHOTS")
    shots = Path(folder) if folder else tmp_path
    shots.mkdir(parents=True, exist_ok=True)
    size = getattr(request, "param", None) or DESK
    context = chromium.new_context(viewport=size, color_scheme="dark", reduced_motion="reduce")
    context.set_default_timeout(20_000)
    page = context.new_page()
    made = Seen(page, stack, shots)
    page.on("console", made.heard)
    page.on("pageerror", lambda error: made.errors.append(f"{error.message}\n{error.stack}"))
    yield made
    context.close()
    assert made.errors == []
