"""What `tapeline doctor` asks of this machine: clock, disks, ports, limits, compiled kernels."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from shared.doctor import LOCAL_SECONDS, Caution, Check, reaching
from shared.doctor_bus import asking, is_idle
from shared.errors import ConfigError, TapelineError
from shared.settings import Settings, is_loopback
from shared.stores import StoreUrl
from shared.supervise import layout, page_url, programs

LOW_DISK_BYTES = 2 << 30
MOST_SKEW_SECONDS = 1.0
# supervisord starts with no fewer; beside the page's connections a worker needs these.
LEAST_FILES, SPARE_FILES = 1024, 600
SHORT_TOKEN = 16


def checks(settings: Settings, store: StoreUrl) -> list[Check]:
    """Checks of this machine alone."""
    s = settings
    state, file = layout(s).state, store.path.absolute().parent
    found = [Check("disk", lambda: disk(state, "TAPELINE_STATE_DIR"))]
    if store.scheme == "sqlite" and file.is_dir() and file.stat().st_dev != _there(state).stat().st_dev:
        found.append(Check("disk of store", lambda: disk(file, "TAPELINE_STORE")))
    if not s.redis.url and s.redis.port:
        found.append(Check("redis port", lambda: redis_port(s)))
    return [
        *found,
        Check("web port", lambda: web_port(s)),
        Check("metrics port", lambda: metrics_port(s)),
        Check("page", lambda: page(s)),
        Check("open files", lambda: open_files(s)),
        Check("cpu", lambda: cpus(s)),
        Check("kernel", kernel, patience=LOCAL_SECONDS),
    ]


# -- clock ----------------------------------------------------------------------------------


def clocks(settings: Settings, store: StoreUrl, *, idle: bool, away: bool, store_away: bool) -> list[Check]:
    """This machine's clock against Redis's and the store's, where those are servers."""
    found = []
    if not idle:
        found.append(Check("clock of redis", lambda: compared("Redis", _redis_time(settings)), away))
    if store.scheme == "postgresql":
        found.append(Check("clock of store", lambda: compared("the store", _store_time(settings)), store_away))
    return found


def compared(whose: str, times: tuple[int, int, int]) -> str:
    """One line. Raises ConfigError where two clocks differ by too much."""
    ahead = skew(*times)
    if abs(ahead) > MOST_SKEW_SECONDS:
        raise ConfigError(
            f"this machine's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of {whose}: "
            "let NTP set both (`timedatectl set-ntp true`), or ages, lags and alerts are wrong by as much"
        )
    return f"{abs(ahead):.2f} s from ours"


def skew(before_ns: int, there_ns: int, after_ns: int) -> float:
    """Seconds by which our clock is surely ahead of another one that was read between two looks at ours."""
    if there_ns < before_ns:
        return (before_ns - there_ns) / 1e9
    return (after_ns - there_ns) / 1e9 if there_ns > after_ns else 0.0


def _redis_time(settings: Settings) -> tuple[int, int, int]:
    with asking(settings) as (bus, _):
        target = {"target_nodes": bus.call("get_node_from_key", bus.keys.workers)} if bus.cluster else {}
        before = time.time_ns()
        seconds, micros = bus.call("time", **target)
        # Redis cuts its time off to microseconds.
        return before - 1000, int(seconds) * 10**9 + int(micros) * 1000, time.time_ns()


def _store_time(settings: Settings) -> tuple[int, int, int]:
    from shared.postgres import connect, errors, run  # noqa: PLC0415

    url = settings.tapeline.store

    async def ask() -> tuple[int, int, int]:
        with reaching("TAPELINE_STORE"), errors(url):
            connection = await connect(url)
            try:
                before = time.time_ns()
                there = await connection.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
                return before - 1000, int(there) * 1000, time.time_ns()
            finally:
                connection.terminate()

    found: tuple[int, int, int] = run(ask())
    return found


# -- disks ----------------------------------------------------------------------------------


def disk(folder: Path, variable: str) -> str:
    """The disk of a folder that is there or will be made. Raises ConfigError when it cannot be written, or is full."""
    folder = _there(folder)
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} is not writable: set {variable} to a folder that is")
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        raise ConfigError(f"only {free >> 20} MiB free at {folder}: make room, or set {variable} to another disk")
    return f"{free >> 30} GiB free at {folder}"


def _there(folder: Path) -> Path:
    """The folder, or the one above it in which it will be made."""
    while not folder.exists():
        folder = folder.parent
    return folder


# -- ports ----------------------------------------------------------------------------------


def taken(host: str, port: int) -> bool:
    """Whether somebody listens there already. Raises ConfigError for a host that is not this machine's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{host} is no address ({error.strerror or error})") from None
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
                if error.errno in (errno.EACCES, errno.EPERM):
                    raise ConfigError(f"port {port} is not ours to take: choose one from 1024 on") from None
                if error.errno != errno.EAFNOSUPPORT and len(found) == 1:
                    raise ConfigError(f"cannot listen at {host} ({error.strerror or error})") from None
    return False


def redis_port(settings: Settings) -> str:
    """Whether the embedded Redis has its port, or could have it."""
    port = settings.redis.port
    if not taken("127.0.0.1", port):
        return f"{port} is free"
    if not is_idle(settings):
        with asking(settings) as (bus, _):
            if int(bus.call("config_get", "port").get("port", 0)) == port:
                return f"{port}, served by the Redis of `tapeline up`"
    raise ConfigError(f"port {port} is taken, and `tapeline up` would want it: set TAPELINE_REDIS_PORT{_whose(port)}")


def web_port(settings: Settings) -> str:
    """Whether our page is at its port, or could be."""
    web = settings.web
    if not web.port:
        return "none, TAPELINE_WEB_PORT is 0"
    if not taken(web.host, web.port):
        return f"{web.port} is free"
    if any(w.service == "web" for w in _ours(settings)):
        return f"{web.port}, served by our web worker"
    raise ConfigError(f"port {web.port} of {web.host} is taken: set TAPELINE_WEB_PORT to another{_whose(web.port)}")


def metrics_port(settings: Settings) -> str:
    """Whether each worker of this machine finds a port for its metrics."""
    from shared.metrics import PORTS  # noqa: PLC0415

    host, first = settings.metrics.host, settings.metrics.port
    if not first:
        return "none, TAPELINE_METRICS_PORT is 0"
    last = min(first + PORTS, 65536) - 1
    wanted = sum(program.count for program in programs(settings) if program.name != "redis")
    own = {int(w.metrics.rpartition(":")[2]) for w in _ours(settings) if w.metrics}
    free = [port for port in range(first, last + 1) if port not in own and not taken(host, port)]
    told = f", {len(own)} served by our workers" if own else ""
    if not free and not own:
        raise ConfigError(
            f"no port from {first} to {last} of {host} is free, so no worker starts: set TAPELINE_METRICS_PORT"
        )
    if len(free) + len(own) < wanted:
        return Caution(
            f"{len(free)} from {first} to {last} are free{told}, but {wanted} workers want one: set "
            "TAPELINE_METRICS_PORT to the begin of a free range"
        )
    others = last - first + 1 - len(free) - len(own)
    return f"free from {first} on{told}" + (f", {others} taken by others are passed over" if others else "")


def _ours(settings: Settings) -> list[Any]:
    """The living workers of this machine, as Redis knows them."""
    from shared.status import Reader  # noqa: PLC0415

    if is_idle(settings):
        return []
    try:
        with asking(settings) as (bus, _):
            found = Reader(bus, 0, settings.redis.lease_seconds).read().workers
    except TapelineError:
        return []  # another check says so
    return [w for w in found if w.alive and w.host == socket.gethostname()]


def _whose(port: int) -> str:
    return f", or stop who has it (`ss -ltnp 'sport = :{port}'`)"


# -- limits ---------------------------------------------------------------------------------


def page(settings: Settings) -> str:
    """Who reaches the page. That one beyond the loopback is guarded, the settings themselves insist on."""
    web = settings.web
    if not web.port:
        return "none, TAPELINE_WEB_PORT is 0"
    url = page_url(web)
    if is_loopback(web.host):
        return f"{url}, from this machine alone"
    if not web.token:
        return f"{url}, read by whoever reaches {web.host}:{web.port} (TAPELINE_WEB_TRUSTED_NETWORK)"
    if len(web.token) < SHORT_TOKEN:
        return Caution(f"{url} is reached by others, and {len(web.token)} letters of TAPELINE_WEB_TOKEN can be "
                       f"guessed: take {SHORT_TOKEN} or more")  # fmt: skip
    return f"{url}, from other machines with the token"


def open_files(settings: Settings) -> str:
    """Whether a process may have as many files open as the page has connections, and supervisord wants."""
    import resource  # noqa: PLC0415

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(LEAST_FILES, (settings.web.connections if settings.web.port else 0) + SPARE_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raise ConfigError(
            f"a process may open {soft} files, {wanted} are wanted: `ulimit -n {wanted}`, LimitNOFILE={wanted} of a "
            "systemd unit, or fewer web.connections"
        )
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} a process"


def cpus(settings: Settings) -> str:
    """CPUs that this process may use, against the workers that compute all the time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = programs(settings)
    busy = sum(p.count for p in chosen if p.name in ("aggregate", "pressure", "signals"))
    told = f"{count} CPU{'s' * (count != 1)} for {sum(p.count for p in chosen)} processes"
    if settings.aggregate.workers > count:
        return Caution(f"{told}: more than {count} aggregate workers are not faster (aggregate.workers)")
    return f"{told}, {busy} of them stages"


def kernel() -> str:
    """The compiled kernels are in their cache."""
    from shared.compiled import SOURCES, cache_folder  # noqa: PLC0415

    folder = cache_folder()
    hot = [name for name in SOURCES if name.endswith((".kernel", ".normalize"))]
    cold = [name for name in hot if not any(folder.rglob(f"{name.rpartition('.')[2]}.*.nbi"))]
    if cold:
        raise ConfigError(f"not compiled yet ({', '.join(cold)}): run `tapeline warm`, or the first start takes longer")
    return "compiled"
