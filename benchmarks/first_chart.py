"""The page: from the navigation to the first candles on the screen, over a store of a million rows.

A synthetic market fills SQLite by `tapeline backfill`, up to now, and goes on live beside the page, as in the demo.
Headless Chromium opens the page each time in a profile of its own (nothing cached), then once more in the same one.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, sync_playwright

from benchmarks.pipeline import workers
from services.ingest.synthetic import generate
from shared.redis_server import EmbeddedRedis
from tests.browser.conftest import FLAGS

ROOTS = ["ES", "NQ", "CL"]
ROWS, ROWS_A_SECOND, RATE = 1_000_000, 5.8, 10.0
TABLES = ("candles", "candles_1m", "candles_1s")
SIZE: Any = {"width": 1280, "height": 860}


def run(rows: int = ROWS, times: int = 9) -> dict[str, Any]:
    """Milliseconds by timeframe, `empty cache` and `again`: median, lowest and highest; `rows` of the store."""
    path = os.environ.get("TAPELINE_TEST_CHROMIUM") or shutil.which("chromium")
    if path is None:
        return {"skipped": "no Chromium"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = fill(folder, rows)
        server = EmbeddedRedis(folder)
        server.start()
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        settings = {"TAPELINE_STORE": store(folder), "TAPELINE_WEB_PORT": str(port)}
        services = [["ingest-synthetic"], ["aggregate"], ["sink-sqlite"], ["web"]]
        try:
            with workers(folder, server.url, services, **settings), sync_playwright() as playwright:
                url = f"http://127.0.0.1:{port}"
                wait(url)
                browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
                found = {frame: measure(browser, url, frame, times) for frame in ("1m", "rolling")}
                browser.close()
                return {"rows": held, **found}
        finally:
            server.stop()


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'bench.db'}"


def fill(folder: Path, rows: int) -> int:
    """Backfill about so many rows, up to now; returns how many there are of candles."""
    seconds = rows / ROWS_A_SECOND
    tape = folder / "tape.dbn"
    generate(
        tape, trades=int(seconds * RATE), start=int((time.time() - seconds) * 1e9), roots=ROOTS, contracts=1, rate=RATE
    )
    line = [sys.executable, "-P", "-m", "shared.cli", "backfill", str(tape), "--store", store(folder)]
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    tape.unlink()
    with closing(sqlite3.connect(folder / "bench.db")) as connection:
        return sum(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES)


def wait(url: str) -> None:
    """For the server, and for the live market to have come so far."""
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "no server"
            time.sleep(0.1)
    time.sleep(10)


def measure(browser: Browser, url: str, timeframe: str, times: int) -> dict[str, Any]:
    cold, warm = [], []
    for _ in range(times):
        context = browser.new_context(viewport=SIZE)
        cold.append(first(context, f"{url}/?symbol=ES&timeframe={timeframe}"))
        warm.append(first(context, f"{url}/?symbol=ES&timeframe={timeframe}"))
        context.close()
    return {"empty cache": summary(cold), "again": summary(warm)}


def first(context: BrowserContext, url: str) -> float:
    """From the start of the navigation to the frame after the one that drew candles, as the page counts it."""
    page = context.new_page()
    page.goto(url)
    while not (shown := page.evaluate("window.tapeline?.firstChartMs ?? 0")):
        page.wait_for_timeout(20)
    page.close()
    return float(shown)


def summary(found: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(found)), "lowest": round(min(found)), "highest": round(max(found))}
