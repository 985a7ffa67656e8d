"""Workers say that they live: one JSON a worker in `md:workers`, by Redis's own clock.

A worker that ends says goodbye. One that was killed is told of as dead until its successor has come, or for
FORGET_MS.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from shared.bus import Bus
from shared.progress import Progress

FORGET_MS = 300_000
# Whether one of another pid namespace (a container before this one) has ended can only be told by its silence.
QUIET_MS = 10_000
SUCCEED_MS = 60_000  # how long a new worker looks for those that it succeeds


class Beat(msgspec.Struct, frozen=True):
    """A worker's last sign of life: `at_ms` by Redis's clock, what it owns, and what it has counted since its start.

    `name`: what its supervisor calls it, empty without one. `stalled_ms`: how long its slowest `part` had not gone on
    then (shared.progress). `metrics`: host:port, empty where it serves none. `space`: in which `pid` is one.
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
    space: str = ""
    born: int = 0


_metrics = ""
_began: dict[str, int] = {}  # worker of this process -> when it first beat, while it looks for whom it succeeds


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
        os.environ.get("SUPERVISOR_PROCESS_NAME", ""), int(stalled * 1000), part, _metrics, _pid_space(),
        _born(os.getpid()) or 0,
    )  # fmt: skip
    bus.note(bus.keys.workers, worker, msgspec.json.encode(message))
    if now - _began.setdefault(worker, now) < SUCCEED_MS:
        _succeed(bus, message, _began[worker])
    return now


def _succeed(bus: Bus, me: Beat, began_ms: int) -> None:
    """Remove the heartbeat of whom this worker stands in for.

    Of those that a supervisor calls the same all; of those without a name one, since of several dead only one is
    back with this one.
    """
    for worker, body in sorted(bus.call("hgetall", bus.keys.workers).items()):
        try:
            old = msgspec.json.decode(body, type=Beat)
        except msgspec.DecodeError:
            continue  # somebody else's mistake must not end a worker
        same = (old.service, old.host, old.name) == (me.service, me.host, me.name)
        if same and old.worker != me.worker and _has_ended(old, me, began_ms):
            bus.call("hdel", bus.keys.workers, worker)
            if not me.name:
                _began[me.worker] = began_ms - SUCCEED_MS
                return


def _has_ended(old: Beat, me: Beat, began_ms: int) -> bool:
    if old.space == me.space:
        return _born(old.pid) != old.born
    return old.at_ms < began_ms and me.at_ms - old.at_ms > QUIET_MS


def _born(pid: int) -> int | None:
    """When a process of our pid namespace was begun (0: there is no /proc to tell), None if it does not live.

    One that is dead, but not yet waited for, does not live.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, and is somebody else's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19]) if fields[0] not in "ZX" else None


def _pid_space() -> str:
    """Which pid namespace this process is in; empty where there is none to know."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def leave(bus: Bus, worker: str) -> None:
    """Forget this worker (clean shutdown)."""
    _began.pop(worker, None)
    bus.call("hdel", bus.keys.workers, worker)


def living(bus: Bus, within_ms: int, service: str | None = None) -> list[Beat]:
    """Workers whose heartbeat is at most `within_ms` old; those dead for FORGET_MS are removed."""
    now = redis_now_ms(bus)
    alive = []
    for worker, body in bus.call("hgetall", bus.keys.workers).items():
        heart = msgspec.json.decode(body, type=Beat)
        if now - heart.at_ms <= within_ms:
            if service is None or heart.service == service:
                alive.append(heart)
        elif now - heart.at_ms > max(FORGET_MS, within_ms):
            bus.call("hdel", bus.keys.workers, worker)
    return sorted(alive, key=lambda b: b.worker)
