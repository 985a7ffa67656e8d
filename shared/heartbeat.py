"""Workers say that they live: one JSON a worker in `md:workers`, by Redis's own clock."""

from __future__ import annotations

import os
import socket
from typing import Any

import msgspec

from shared.bus import Bus
from shared.progress import Progress


class Beat(msgspec.Struct, frozen=True):
    """A worker's last sign of life: `at_ms` by Redis's clock, what it owns, and what it has counted since its start.

    `name`: what its supervisor calls it, empty without one. `stalled_ms`: how long its slowest `part` had not gone on
    then (shared.progress). `metrics`: host:port, empty where it serves none.
    """

    worker: str
    service: str
    host: str
    pid: int
    at_ms: int
    partitions: list[int] = []
    detail: str = ""
    counters: dict[str, int] = {}
    name: str = ""
    stalled_ms: int = 0
    part: str = ""
    metrics: str = ""


_metrics = ""


def metrics_are_at(address: str) -> None:
    """This process's metrics are at host:port: every heartbeat says so from now on."""
    global _metrics  # noqa: PLW0603 - there is one a process
    _metrics = address


def redis_now_ms(bus: Bus) -> int:
    """Redis's TIME in milliseconds; on a cluster that of the node with the heartbeats, so that all mean one clock."""
    seconds, micros = bus.call("time") if not bus.cluster else _cluster_time(bus)
    return int(seconds) * 1000 + int(micros) // 1000


def _cluster_time(bus: Bus) -> Any:
    return bus.call("time", target_nodes=bus.call("get_node_from_key", bus.keys.workers))


def beat(
    bus: Bus,
    worker: str,
    service: str,
    partitions: list[int] | None = None,
    detail: str = "",
    counters: dict[str, int] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write this worker's heartbeat; returns Redis's time in ms."""
    now = redis_now_ms(bus)
    owned = sorted(partitions or [])
    part, stalled = progress.slowest() if progress else ("", 0.0)
    message = Beat(
        worker, service, socket.gethostname(), os.getpid(), now, owned, detail, counters or {},
        os.environ.get("SUPERVISOR_PROCESS_NAME", ""), int(stalled * 1000), part, _metrics,
    )  # fmt: skip
    bus.call("hset", bus.keys.workers, worker, msgspec.json.encode(message))
    return now


def leave(bus: Bus, worker: str) -> None:
    """Forget this worker (clean shutdown)."""
    bus.call("hdel", bus.keys.workers, worker)


def living(bus: Bus, within_ms: int, service: str | None = None) -> list[Beat]:
    """Workers whose heartbeat is at most `within_ms` old; long dead ones are removed."""
    now = redis_now_ms(bus)
    alive = []
    for worker, body in bus.call("hgetall", bus.keys.workers).items():
        heart = msgspec.json.decode(body, type=Beat)
        if now - heart.at_ms <= within_ms:
            if service is None or heart.service == service:
                alive.append(heart)
        elif now - heart.at_ms > 60 * within_ms:
            bus.call("hdel", bus.keys.workers, worker)
    return sorted(alive, key=lambda b: b.worker)
