"""DBN file through the bus, as real processes: without a store, and with every rolling row in SQLite.

Wall time from the first frame on the bus to the last commit; starting processes is not counted.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.ingest.synthetic import generate
from shared.bus import Bus
from shared.redis_server import EmbeddedRedis

PARTITIONS = 8
ROOTS = ["ES", "NQ", "CL", "GC", "6E", "RTY", "ZN", "NG"]


def run(trades: int = 5_000_000, runs: int = 3) -> dict[str, Any]:
    """All variants, `runs` times each in turn; medians."""
    with tempfile.TemporaryDirectory() as folder:
        tape = Path(folder) / "bench.dbn"
        generate(tape, trades=trades, seed=3, roots=ROOTS, contracts=3, rate=100.0)
        tape.read_bytes()  # into the page cache
        names = ("no store", "no store, the pressure stage reads on", "sqlite, every row", "sqlite, candles_1m")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(runs):
            found["no store"].append(measure(tape, trades, sink=False, emit_1s=False))
            found[names[1]].append(measure(tape, trades, sink=False, emit_1s=False, pressure=True))
            found["sqlite, candles_1m"].append(measure(tape, trades, sink=True, emit_1s=False))
            found["sqlite, every row"].append(measure(tape, trades, sink=True, emit_1s=True))
        return {
            name: sorted(some, key=lambda r: r["trades_per_second"])[len(some) // 2] for name, some in found.items()
        }


@contextmanager
def workers(
    folder: Path, url: str, services: list[list[str]], **settings: str
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """These services as processes of their own."""
    env = os.environ | {"REDIS_URL": url, "TAPELINE_STATE_DIR": str(folder), "TAPELINE_LOG_LEVEL": "WARNING"} | settings
    running = [
        subprocess.Popen([sys.executable, "-P", "-m", "shared.cli", "run", *service], env=env, cwd=folder)
        for service in services
    ]
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=15)


def measure(tape: Path, trades: int, *, sink: bool, emit_1s: bool, pressure: bool = False) -> dict[str, Any]:
    stages = ["aggregate", "pressure"] if pressure else ["aggregate"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = EmbeddedRedis(folder, fsync="no")  # as `tapeline replay` has it
        server.start()
        bus = Bus(server.url)
        for p in range(PARTITIONS):
            for stage in stages:
                bus.register(p, "ticks", stage)
            if not sink:
                bus.register(p, "candles", "bench")
        settings = {
            "TAPELINE_STORE": f"sqlite:///{folder / 'bench.db'}", "TAPELINE_PARTITIONS": str(PARTITIONS),
            "TAPELINE_AGGREGATE_CANDLES_1S": str(emit_1s).lower(), "TAPELINE_REDIS_WINDOW_SECONDS": "0",
            "TAPELINE_PRESSURE_WORKERS": str(int(pressure)), "TAPELINE_SIGNALS_WORKERS": "0",
        }  # fmt: skip
        consumers = [*stages, *(["sink-sqlite"] if sink else [])]
        try:
            with workers(folder, server.url, [[name] for name in consumers], **settings):
                _ready(bus, consumers)
                with workers(folder, server.url, [["ingest-files", str(tape)]], **settings) as ingest:
                    seconds, published = _follow(bus, ingest[0], sink)
            rows = _rows(folder / "bench.db") if sink else 0
            return {"records": trades, "trades": published, "rows": rows, "seconds": round(seconds, 3),
                    "trades_per_second": round(published / seconds)}  # fmt: skip
        finally:
            bus.close()
            server.stop()


def _ready(bus: Bus, services: list[str]) -> None:
    while {w.split(b"@")[0].decode() for w in bus.call("hkeys", bus.keys.workers)} != set(services):
        time.sleep(0.05)
    while sum(bus.call("exists", bus.keys.lease(p, "aggregate")) for p in range(PARTITIONS)) < PARTITIONS:
        time.sleep(0.05)


def _follow(bus: Bus, ingest: subprocess.Popen[bytes], sink: bool) -> tuple[float, int]:
    """(seconds from the first published record until everything is consumed, trades published)."""
    began = 0.0
    while True:
        feed = bus.call("hget", bus.keys.feeds, "files")
        ended = ingest.poll() is not None or (feed is not None and b'"ended"' in feed)
        published = sum(int(bus.call("hget", bus.keys.info(p, "ticks"), "kind:trade") or 0) for p in range(PARTITIONS))
        if published and not began:
            began = time.perf_counter()
        if not sink:
            for p in range(PARTITIONS):
                bus.done_with(p, "candles", "bench", bus.last_id(p, "candles"))
        if ended and all(_level(bus, p, sink) for p in range(PARTITIONS)):
            return time.perf_counter() - began, published
        time.sleep(0.005)


def _level(bus: Bus, partition: int, sink: bool) -> bool:
    for topic in ("ticks", "candles") if sink else ("ticks",):
        newest = bus.last_id(partition, topic)
        if any(v.decode() != newest for v in bus.call("hvals", bus.keys.consumers(partition, topic))):
            return False
    return True


def _rows(db: Path) -> int:
    with sqlite3.connect(db) as connection:
        return sum(connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("candles_1m", "candles_1s"))
