"""Memory stays flat over ten million trades: every worker, and Redis below what its streams may hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from services.ingest.synthetic import generate
from shared.bus import Bus
from shared.frames import NS
from shared.redis_server import EmbeddedRedis
from tests.e2e.test_live import drained

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]
# So quiet a market makes rows enough to fill SQLite's page cache (64 MB) within the first third.
FILES, TRADES, RATE = 4, 2_500_000, 100
START_NS = 1_715_265_000 * NS  # 2024-05-09T14:30:00Z
PARTITIONS = 8
STREAM_BYTES = 4 << 20
ROOTS = ["ES", "NQ", "CL", "GC", "6E", "RTY", "ZN", "NG"]
# What a worker may hold more in the last third of the run than in the middle one.
GROWTH, SLACK = 1.15, 20 << 20


@contextmanager
def processes(folder: Path, url: str, *services: str) -> Iterator[dict[str, psutil.Process]]:
    """These services, each a process of its own: name -> process."""
    given = {
        "REDIS_URL": url, "TAPELINE_STATE_DIR": str(folder), "TAPELINE_LOG_LEVEL": "WARNING",
        "TAPELINE_STORE": f"sqlite:///{folder / 'm.db'}", "TAPELINE_PARTITIONS": str(PARTITIONS),
        "TAPELINE_AGGREGATE_CANDLES_1S": "false", "TAPELINE_REDIS_WINDOW_SECONDS": "0",
        "TAPELINE_REDIS_STREAM_MAX_BYTES": str(STREAM_BYTES),
    }  # fmt: skip
    running = {
        service: subprocess.Popen(
            [sys.executable, "-P", "-m", "shared.cli", "run", *service.split()], env=os.environ | given, cwd=folder
        )
        for service in services
    }
    try:
        yield {service.split()[0]: psutil.Process(process.pid) for service, process in running.items()}
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait(timeout=15)
    assert {process.returncode for process in running.values()} == {0}


def records(bus: Bus) -> int:
    """Records that aggregate is done with."""
    counts = [bus.call("hget", bus.keys.meta(p, "aggregate"), "records") for p in range(PARTITIONS)]
    return sum(int(count or 0) for count in counts)


def published(bus: Bus) -> int:
    counts = [bus.call("hget", bus.keys.info(p, "ticks"), "kind:trade") for p in range(PARTITIONS)]
    return sum(int(count or 0) for count in counts)


def ended(bus: Bus) -> bool:
    feed = bus.call("hget", bus.keys.feeds, "files")
    return feed is not None and b'"ended"' in feed and drained(bus, PARTITIONS)


def test_memory_stays_flat_over_ten_million_trades() -> None:
    with TemporaryDirectory() as name:  # two gigabytes that nobody wants to keep
        folder = Path(name)
        tapes = [folder / f"{i}.dbn" for i in range(FILES)]
        for i, tape in enumerate(tapes):
            start = START_NS + i * (TRADES // RATE + 60) * NS
            generate(tape, trades=TRADES, seed=i, start=start, roots=ROOTS, contracts=2, rate=float(RATE))
        server = EmbeddedRedis(folder, fsync="no")
        server.start()
        bus = Bus(server.url)
        held: dict[str, list[tuple[int, int]]] = defaultdict(list)  # who -> (records done, bytes)
        redis_bytes = 0
        files = " ".join(map(str, tapes))
        try:
            for p in range(PARTITIONS):  # nothing is trimmed before the consumers have come
                bus.register(p, "ticks", "aggregate")
                bus.register(p, "ticks", "pressure")
            services = ("aggregate", "pressure", "signals", "sink-sqlite", f"ingest-files {files}")
            with processes(folder, server.url, *services) as running:
                deadline = time.monotonic() + 300
                while not ended(bus):
                    done = records(bus)
                    for service, process in running.items():
                        held[service].append((done, process.memory_info().rss))
                    redis_bytes = max(redis_bytes, bus.call("info", "memory")["used_memory"])
                    assert time.monotonic() < deadline, f"{done} records after 300 s"
                    time.sleep(0.1)
                total, trades = records(bus), published(bus)
        finally:
            bus.close()
            server.stop()
    assert trades > 0.98 * FILES * TRADES, "all but the spreads"
    assert redis_bytes < 3 * PARTITIONS * STREAM_BYTES
    assert (len(held), total >= trades) == (5, True)
    for service, samples in held.items():
        middle = [size for done, size in samples if total / 3 <= done < total * 2 / 3]
        last = [size for done, size in samples if done >= total * 2 / 3]
        assert len(middle) > 5, service
        assert len(last) > 5, service
        assert max(last) <= GROWTH * max(middle) + SLACK, service
