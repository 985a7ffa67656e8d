"""What `tapeline doctor` asks of Redis, and of the workers that report to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shared.cli_common import looking
from shared.doctor import Caution, reaching
from shared.errors import ConfigError, TapelineError
from shared.keys import TOPICS
from shared.settings import Settings
from shared.supervise import layout

if TYPE_CHECKING:
    from shared.bus import Bus

OLDEST = (6, 2)
# Of maxmemory: above it the next burst may be refused.
HIGH_SHARE = 0.9
SLOTS = 16384
IDLE = "embedded, not running; `tapeline up` starts it"


@contextmanager
def asking(settings: Settings) -> Iterator[tuple[Bus, int]]:
    """As `looking`; a server that does not answer says what to do about it."""
    with reaching("REDIS_URL"), looking(settings) as found:
        yield found


def is_idle(settings: Settings) -> bool:
    """Whether the Redis is the embedded one, and nobody has started it here."""
    return not settings.redis.url and not layout(settings).url.exists()


def server() -> str:
    """The server that `up` would start. Raises ConfigError when there is none."""
    from shared.redis_server import find_redis  # noqa: PLC0415

    return find_redis()[1]


def redis(settings: Settings) -> str:
    """Version, durability and eviction; of a cluster those of each primary. Raises ConfigError, BusUnavailable."""
    if is_idle(settings):
        return IDLE
    with asking(settings) as (bus, _):
        servers = _info(bus, "server")
        for node, found in servers.items():
            version = str(found.get("redis_version", "?"))
            if version[0].isdigit() and tuple(map(int, version.split(".")[:2])) < OLDEST:
                raise ConfigError(f"Redis at {node} is {version}: 6.2 or newer is needed")
        whole = _cluster(bus) if bus.cluster else ""
        for node, found in _info(bus, "persistence").items():
            if not found.get("aof_enabled"):
                raise ConfigError(
                    f"Redis at {node} has no append-only file, so a crash loses the bus: CONFIG SET appendonly yes"
                )
            if found.get("aof_last_write_status", "ok") != "ok":
                raise ConfigError(f"Redis at {node} cannot write its append-only file: look at its disk and log")
        for node, found in _info(bus, "memory").items():
            policy = str(found.get("maxmemory_policy", "noeviction"))
            if policy != "noeviction":
                raise ConfigError(f"Redis at {node} may evict keys ({policy}): CONFIG SET maxmemory-policy noeviction")
        versions = ", ".join(sorted({str(found.get("redis_version", "?")) for found in servers.values()}))
        return f"{versions} at {bus.where} answers{whole}, append-only, noeviction"


def _info(bus: Bus, section: str) -> dict[str, dict[str, Any]]:
    """INFO by node: of a cluster those that take writes."""
    if not bus.cluster:
        return {bus.where: bus.call("info", section)}
    from redis.cluster import RedisCluster  # noqa: PLC0415

    found: dict[str, Any] = bus.call("info", section, target_nodes=RedisCluster.PRIMARIES)
    # The client leaves the name of a single node out.
    return found if all(isinstance(value, dict) for value in found.values()) else {bus.where: found}


def _cluster(bus: Bus) -> str:
    found = bus.call("cluster_info", target_nodes=bus.call("get_node_from_key", bus.keys.workers))
    state, slots = str(found.get("cluster_state")), int(found.get("cluster_slots_ok", 0))
    if state != "ok" or slots != SLOTS:
        raise ConfigError(
            f"Redis Cluster at {bus.where} is not whole (state {state}, {slots} of {SLOTS} slots served): "
            "bring its nodes back, `redis-cli --cluster check` says which"
        )
    return f" as a cluster of {found.get('cluster_size', '?')} primaries"


def memory(settings: Settings) -> str:
    """What Redis may hold against what the streams may: at its limit it refuses, before the streams wait."""
    with asking(settings) as (bus, partitions):
        found = _info(bus, "memory").values()
        used = sum(int(i.get("used_memory", 0)) for i in found)
        limits = [int(i.get("maxmemory", 0)) for i in found]
    bound = partitions * len(TOPICS) * settings.redis.stream_max_bytes
    told = f"{_mib(used)} used; the streams of {partitions} partitions hold {_mib(bound)} at most"
    if not all(limits):
        return f"{told}; no maxmemory"
    limit = sum(limits)
    if used > HIGH_SHARE * limit:
        raise ConfigError(
            f"{_mib(used)} of Redis's maxmemory {_mib(limit)} are in use, and at the limit it refuses all writes: "
            "raise maxmemory, or look with `tapeline status` for who is behind"
        )
    if limit < bound:
        return Caution(
            f"{told}, maxmemory is {_mib(limit)}: when sinks stay away for long, Redis refuses before the streams are "
            f"full; raise maxmemory, or set TAPELINE_REDIS_STREAM_MAX_BYTES to {limit // (partitions * len(TOPICS))}"
        )
    return f"{told}, maxmemory is {_mib(limit)}"


def _mib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"


def workers(settings: Settings) -> str:
    """Who reports, and whether all of them go on. Raises ConfigError naming those that do not."""
    from shared import feeds  # noqa: PLC0415
    from shared.health import unhealthy, verdicts  # noqa: PLC0415
    from shared.status import Reader  # noqa: PLC0415

    with asking(settings) as (bus, partitions):
        status = Reader(bus, partitions, settings.redis.lease_seconds).read()
        found = verdicts(status, feeds.states(bus), settings)
    if not status.workers:
        return "none runs"
    ill = unhealthy(found)
    if ill:
        lines = "; ".join(verdict.line for verdict in ill)
        raise TapelineError(f"{lines}: look into the logs, and start what is gone again (`tapeline health` has all)")
    return f"{len(status.workers)} are healthy, and so are their feeds and partitions"
