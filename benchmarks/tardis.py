"""Normalized Tardis messages to rows: decoding and routing alone, and from an NDJSON file onto the bus.

One source thread on one core; Redis is a process of its own. `per_cpu_second` leaves out what other
processes took; the clock starts when everything is compiled and connected.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Resume
from services.ingest.tardis_file import TardisFiles
from shared.bus import Bus, Limits
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.redis_server import EmbeddedRedis
from shared.settings import Ingest

PARTITIONS = 8
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT", "BNBUSDT", "ADAUSDT", "LTCUSDT")
START = np.datetime64("2024-08-08T00:00:00")


def tape(path: Path, trades: int) -> Path:
    """Trades of eight symbols, 1,000 a second of market time, received 7 ms later."""
    rng = np.random.default_rng(1)
    micros = np.sort(rng.integers(0, trades * 1000, trades))
    event = np.datetime_as_string(START + (micros // 1000).astype("m8[ms]"), unit="ms")
    receipt = np.datetime_as_string(START + (micros + 7000).astype("m8[us]"), unit="us")
    price = np.round(60_000 + np.cumsum(rng.normal(0, 0.3, trades)), 1)
    amount = np.round(rng.exponential(0.1, trades) + 0.001, 3)
    symbol, side = rng.integers(0, len(SYMBOLS), trades), rng.integers(0, 2, trades)
    with path.open("w") as file:
        for n in range(trades):
            file.write(
                f'{{"type":"trade","symbol":"{SYMBOLS[symbol[n]]}","exchange":"binance-futures",'
                f'"id":"{5_266_583_935 + n}","price":{price[n]},"amount":{amount[n]},'
                f'"side":"{("buy", "sell")[side[n]]}","timestamp":"{event[n]}Z","localTimestamp":"{receipt[n]}Z"}}\n'
            )
    return path


class Nowhere:
    """An Output that counts rows."""

    def __init__(self) -> None:
        self.rows = 0

    def instruments(self, messages: Iterable[Instrument]) -> None: ...

    def broadcast(self, message: Clock | Gap | Disconnect) -> None: ...

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:  # noqa: ARG002
        self.rows += len(grouped.rows)

    def flush(self) -> None: ...

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None: ...

    def connection(self, state: str, detail: str = "") -> None: ...


def run(trades: int = 1_000_000, runs: int = 3) -> dict[str, Any]:
    """Messages/s of both, medians of `runs`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = tape(folder / "bench.ndjson", trades)
        alone = [_measure(path, trades, Nowhere(), Resume()) for _ in range(runs + 1)][1:]
        server = EmbeddedRedis(folder, fsync="no")
        server.start()
        try:
            bus = [_onto_bus(server.url, path, trades, f"bench{n}") for n in range(runs)]
        finally:
            server.stop()
    return {"decode and route": _medians(alone), "file to bus": _medians(bus)}


def _onto_bus(url: str, path: Path, trades: int, namespace: str) -> dict[str, float]:
    bus = Bus(url, namespace, limits=Limits(window_ms=0))
    bus.deploy(PARTITIONS)
    out = PublisherOutput(
        bus, "tardis-files", "bench", PARTITIONS, Ingest(), threading.Event(), live=False, tape=namespace
    )
    resume = out.attach()
    found = _measure(path, trades, out, resume)
    if out.status.trades != trades:
        raise RuntimeError(f"{out.status.trades} of {trades} trades are on the bus")
    out.close()
    bus.close()
    return found


def _measure(path: Path, trades: int, out: Any, resume: Resume) -> dict[str, float]:
    source = TardisFiles([path], PARTITIONS)
    began, cpu = time.perf_counter(), time.process_time()
    source.run(out, resume, threading.Event())
    return {
        "per_second": trades / (time.perf_counter() - began), "per_cpu_second": trades / (time.process_time() - cpu),
    }  # fmt: skip


def _medians(found: list[dict[str, float]]) -> dict[str, int]:
    return {f"messages_{name}": round(statistics.median(f[name] for f in found)) for name in found[0]}


if __name__ == "__main__":
    print(run())
