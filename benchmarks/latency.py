"""Live latency: from a trade leaving the gateway's socket to the committed candle that it closes.

The gateway plays a tape in real time over TCP, the official client's protocol reads it, ingest lingers
its default 5 ms, and a reader blocked on the candle streams notes when each row can be seen.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pipeline import PARTITIONS, workers
from shared.bus import Bus
from shared.redis_server import EmbeddedRedis
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.tape import NS, generate

WARM_SECONDS = 62


def run(rates: tuple[int, ...] = (1_000, 10_000), seconds: int = 30) -> dict[str, Any]:
    """p50 and p99 in ms of each rate (trades/s)."""
    return {f"{rate} trades/s": measure(rate, seconds) for rate in rates}


def measure(rate: int, seconds: int) -> dict[str, Any]:
    tape = generate(seconds=WARM_SECONDS + seconds, per_second=rate, equal=0.0)
    trades = tape.records
    with tempfile.TemporaryDirectory() as name, Gateway(tape, speed=1.0) as gateway:
        folder = Path(name)
        server = EmbeddedRedis(folder)
        server.start()
        settings = {
            "TAPELINE_PRESSURE_WORKERS": "0",
            "TAPELINE_PARTITIONS": str(PARTITIONS), "DATABENTO_API_KEY": KEY, "TAPELINE_DATABENTO_GATEWAY": "127.0.0.1",
            "TAPELINE_DATABENTO_PORT": str(gateway.port), "DATABENTO_SYMBOLS": "ES.FUT,NQ.FUT,CL.FUT",
        }  # fmt: skip
        seen: list[tuple[float, int]] = []
        stop = threading.Event()
        readers = [threading.Thread(target=_read, args=(server.url, p, seen, stop)) for p in range(PARTITIONS)]
        try:
            with workers(folder, server.url, [["aggregate"], ["ingest-databento"]], **settings):
                while not gateway.live:
                    time.sleep(0.01)
                for reader in readers:
                    reader.start()
                began = time.time()
                gateway.begin()
                time.sleep(WARM_SECONDS + seconds + 0.5)
                stop.set()
                for reader in readers:
                    reader.join()
        finally:
            stop.set()
            server.stop()
    sent = trades["ts_recv"].astype(np.int64)
    late = []
    for at, end_ns in seen:
        closing = int(np.searchsorted(trades["ts_event"], end_ns))  # the first trade past the window's end
        if closing < len(trades):
            late.append((at - began) * 1000 - (int(sent[closing]) - tape.start_ns) / 1e6)
    ms = np.array(late)
    p50, p99 = np.percentile(ms, [50, 99])
    return {"rows": len(ms), "p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2),
            "max_ms": round(float(ms.max()), 2)}  # fmt: skip


def _read(url: str, partition: int, seen: list[tuple[float, int]], stop: threading.Event) -> None:
    bus = Bus(url)
    position = "0-0"
    while not stop.is_set():
        for frame in bus.read(partition, "candles", position, 100, 200):
            now = time.time()
            position = frame.id
            if frame.kind == "candle_1m":
                seen.extend((now, int(t)) for t in frame.rows()["time_ns"])
    bus.close()


__all__ = ["NS", "measure", "run"]
