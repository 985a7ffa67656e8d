"""`tapeline up`: the supervisord configuration of a machine, and starting it in a state directory.

One state directory, one supervisor: its pid file is locked for as long as it lives, so a killed one
never stands in the way of the next. Settings reach the workers through the inherited environment;
no secret is written into the configuration or into a command line.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shared import registry
from shared.errors import ConfigError
from shared.redis_server import EmbeddedRedis, listens, remove_socket, socket_path
from shared.settings import SECTIONS, Settings, Web, env_name, load
from shared.stages import enabled
from shared.stores import parse

# `-P`: whatever lies in the working directory is not mistaken for this program's packages.
PYTHON = (sys.executable, "-P", "-m")
_EXCHANGE = re.compile(r"[a-z0-9-]+")
COMMAND = (*PYTHON, "shared.cli")
# A worker gives up waiting for itself after 5 s (`tapeline run`), so nothing needs to be killed by force
# in an orderly stop, and all of it stays within 10 s: workers together, then Redis.
STOP_SECONDS = 7
REDIS_STOP_SECONDS = 2
LISTENER = "supervisor-alerts"


@dataclass(frozen=True, slots=True)
class Program:
    """A line of workers: `tapeline run <args>`, `count` of them. `final`: exit codes after which it rests."""

    name: str
    args: tuple[str, ...]
    count: int = 1
    final: tuple[int, ...] = (0, 78)

    def workers(self) -> list[str]:
        """The names under which supervisord and the log folder know them."""
        return [self.name] if self.count == 1 else [f"{self.name}-{i}" for i in range(1, self.count + 1)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files of a state directory are."""

    state: Path

    @property
    def conf(self) -> Path:
        return self.state / "supervisord.conf"

    @property
    def pid(self) -> Path:
        """Pid of the supervisor, and the lock that says it lives."""
        return self.state / "tapeline.pid"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def redis(self) -> Path:
        return self.state / "redis"

    @property
    def url(self) -> Path:
        """URL of the embedded Redis while it runs: how `status`, `tail` and `doctor` find it."""
        return self.state / "redis.url"

    @property
    def socket(self) -> Path:
        """supervisord's own socket."""
        return socket_path(self.state, "supervisor.sock")

    def log_of(self, worker: str) -> Path:
        return self.logs / f"{worker}.log"


def layout(settings: Settings) -> Layout:
    """Layout of the settings' state directory."""
    return Layout(Path(settings.tapeline.state_dir).expanduser().absolute())


def redis_program() -> Program:
    """The embedded Redis; only settings that cannot work end it for good."""
    return Program("redis", ("redis",), final=(78,))


def programs(settings: Settings) -> list[Program]:
    """What runs on this machine: Redis when it is embedded, ingest per feed, the stages, alerts, the page, the sinks.

    Raises ConfigError for an unknown feed.
    """
    out = [] if settings.redis.url else [redis_program()]
    known = sorted(
        n.removeprefix("ingest-") for n in registry.SERVICES if n.startswith("ingest-") and n not in registry.TAPES
    )
    for feed in dict.fromkeys(settings.tapeline.feeds):
        if feed not in known:
            where = settings.origin.get("tapeline.feeds", "default")
            raise ConfigError(f"{where}: no feed '{feed}' in tapeline.feeds; there are: {', '.join(known)}")
        if feed == "tardis":
            out += [Program(f"ingest-tardis-{name}", ("ingest-tardis", name)) for name in _exchanges(settings)]
        else:
            out.append(Program(f"ingest-{feed}", (f"ingest-{feed}",)))
    out += stage_programs(settings)
    if settings.alerts.channels:
        out.append(Program("alerts", ("alerts",)))
    if settings.web.port:
        out.append(Program("web", ("web",)))
    return out + sink_programs(settings)


def page_url(web: Web, port: int | None = None) -> str:
    """Where this machine's browser finds the page."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(web.host, web.host)  # noqa: S104
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{host}:{port or web.port}"


def sink_programs(settings: Settings) -> list[Program]:
    """The sink of the store, and BigQuery's where a project and a dataset are named."""
    chosen = [registry.SINKS[parse(settings.tapeline.store).scheme]]
    if settings.bigquery.project and settings.bigquery.dataset and "sink-bigquery" not in chosen:
        chosen.append("sink-bigquery")
    return [sink_program(name, settings) for name in chosen]


def sink_program(name: str, settings: Settings, final: tuple[int, ...] = (0, 78)) -> Program:
    """A sink; of those that can share a store as many as the settings say."""
    return Program(name, (name,), settings.timescale.workers if name == "sink-timescale" else 1, final)


def stage_programs(settings: Settings, final: tuple[int, ...] = (0, 78)) -> list[Program]:
    """The stages that these settings run: one that nobody reads from would only fill its stream."""
    return [Program(stage, (stage,), getattr(settings, stage).workers, final) for stage in enabled(settings)]


def _exchanges(settings: Settings) -> list[str]:
    """The exchanges of tardis.symbols: each has a process of its own."""
    where = settings.origin.get("tardis.symbols", "default")
    if not settings.tardis.symbols:
        raise ConfigError(f"{where}: tardis.symbols is empty, but tapeline.feeds has tardis: name exchange:symbol")
    found: dict[str, None] = {}
    for entry in settings.tardis.symbols:
        exchange, _, symbol = (part.strip() for part in entry.partition(":"))
        if not _EXCHANGE.fullmatch(exchange) or not symbol:
            raise ConfigError(f"{where}: '{entry}' in tardis.symbols is not exchange:symbol (binance:BTCUSDT)")
        found[exchange] = None
    return list(found)


def render(chosen: list[Program], state: str, socket: str, command: tuple[str, ...], *, alerting: bool = False) -> str:
    """The supervisord configuration; `%` of supervisord's own expansions in `state` and `socket` is kept.

    `alerting`: an event listener tells the alert channels of workers that are given up.
    """
    workers = [p for p in chosen if p.name != "redis"]
    parts = [
        "; Written by `tapeline up`; changes here are lost. Settings come through the environment.",
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        *(["user=root"] if os.getuid() == 0 and "%(" not in state else []),
        f"pidfile={state}/tapeline.pid",
        f"logfile={state}/logs/supervisord.log",
        "logfile_maxbytes=1MB",
        "logfile_backups=1",
        f"childlogdir={state}/logs",
        "",
        "[unix_http_server]",
        f"file={socket}",
        "chmod=0700",
        "",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "",
        "[supervisorctl]",
        f"serverurl=unix://{socket}",
        "",
    ]
    if workers:
        # One group: supervisord stops the programs of a group together, but groups one after another.
        parts += ["[group:workers]", f"programs={','.join(p.name for p in workers)}", "priority=100", ""]
    for program in chosen:
        parts += [*_program(program, state, command), ""]
    if alerting:
        parts += [*_listener(state, command), ""]
    return "\n".join(parts)


def _listener(state: str, command: tuple[str, ...]) -> list[str]:
    line = shlex.join((*command, "run", LISTENER)).replace("%", "%%")
    return [
        f"[eventlistener:{LISTENER}]",
        f"command={line}",
        "events=PROCESS_STATE_EXITED,PROCESS_STATE_BACKOFF,PROCESS_STATE_FATAL",
        "buffer_size=100",
        # The last to go, so that it tells of Redis too.
        "priority=0",
        "autostart=true",
        "autorestart=unexpected",
        "exitcodes=0,78",
        "startsecs=1",
        "startretries=1000000",
        f"stopwaitsecs={REDIS_STOP_SECONDS}",
        "stopsignal=TERM",
        # What it says on stdout is supervisord's protocol.
        "stdout_logfile=NONE",
        f"stderr_logfile={state}/logs/{LISTENER}.log",
        "stderr_logfile_maxbytes=5MB",
        "stderr_logfile_backups=2",
    ]


def _program(program: Program, state: str, command: tuple[str, ...]) -> list[str]:
    redis = program.name == "redis"
    line = shlex.join((*command, "run", *program.args)).replace("%", "%%")
    name = "%(program_name)s" + ("-%(process_num)d" if program.count > 1 else "")
    return [
        f"[program:{program.name}]",
        f"command={line}",
        *([f"numprocs={program.count}", "numprocs_start=1"] if program.count > 1 else []),
        f"process_name={name}",
        f"priority={1 if redis else 100}",
        "autostart=true",
        # 78: the settings are wrong; starting again cannot help.
        "autorestart=unexpected",
        f"exitcodes={','.join(map(str, program.final))}",
        "startsecs=1",
        "startretries=1000000",
        f"stopwaitsecs={REDIS_STOP_SECONDS if redis else STOP_SECONDS}",
        "stopsignal=TERM",
        "stopasgroup=true",
        "killasgroup=true",
        "redirect_stderr=true",
        f"stdout_logfile={state}/logs/{name}.log",
        "stdout_logfile_maxbytes=5MB",
        "stdout_logfile_backups=2",
    ]


def sample() -> str:
    """The configuration that is committed as deploy/supervisord.conf: default settings, two aggregators."""
    chosen = programs(Settings())
    chosen = [replace(p, count=2) if p.name == "aggregate" else p for p in chosen]
    state = "%(ENV_TAPELINE_STATE_DIR)s"
    text = render(chosen, state, f"{state}/supervisor.sock", ("tapeline",), alerting=True)
    head = (
        "; What `tapeline up` runs, for those who start supervisord themselves:\n"
        ";   mkdir -p $TAPELINE_STATE_DIR/logs\n"
        ";   TAPELINE_REDIS_URL=unix://$TAPELINE_STATE_DIR/redis/redis.sock?db=0 supervisord -n -c supervisord.conf\n"
    )
    return head + text.split("\n", 1)[1]


def claim(at: Layout) -> int:
    """Own a state directory until this process ends; returns the lock's descriptor, to be inherited.

    Raises ConfigError naming the process that owns it.
    """
    for bad in ("\n", " ;", " #"):
        if bad in str(at.state):
            raise ConfigError(
                f"the state directory's name {str(at.state)!r} must not hold {bad!r}: set TAPELINE_STATE_DIR"
            )
    try:
        at.logs.mkdir(parents=True, exist_ok=True)
        while True:
            lock = os.open(at.pid, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_ino == at.pid.stat().st_ino:
                    break
            except FileNotFoundError:
                pass  # its owner ended between our opening it and our locking it
            except BlockingIOError:
                pid = os.read(lock, 32).decode().strip() or "starting"
                raise ConfigError(
                    f"{at.state} is in use by a running tapeline (pid {pid}): stop it, or set TAPELINE_STATE_DIR"
                ) from None
            os.close(lock)
    except OSError as error:
        raise ConfigError(
            f"cannot use the state directory {at.state}: {error.strerror}; set TAPELINE_STATE_DIR"
        ) from None
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def clean(at: Layout, wait_seconds: float = 5.0) -> None:
    """Remove what a killed supervisor left, once its Redis has ended (it dies with the supervisor)."""
    sock = socket_path(at.redis, "redis.sock")
    deadline = time.monotonic() + wait_seconds
    while listens(sock):
        if time.monotonic() > deadline:
            raise ConfigError(f"a Redis of an earlier run still serves {sock}: stop it first")
        time.sleep(0.05)
    remove_socket(sock, at.redis)
    remove_socket(at.socket, at.state)
    at.url.unlink(missing_ok=True)


def prepare(settings: Settings, chosen: list[Program]) -> tuple[Settings, str]:
    """Write the configuration into a claimed state directory.

    Returns the settings with the Redis URL that the workers shall use, and one line on that Redis.
    """
    at = layout(settings)
    clean(at)
    if settings.redis.url:
        from shared.log import Masker  # noqa: PLC0415

        about = f"Redis at {Masker(settings)(settings.redis.url)}"
    else:
        server = EmbeddedRedis(at.redis, settings.redis.port, fsync=settings.redis.fsync)
        server.write()
        about = server.describe()
        at.url.write_text(server.url + "\n")
        settings = replace(settings, redis=msgspec.structs.replace(settings.redis, url=server.url, cluster=False))
    state, socket = (str(path).replace("%", "%%") for path in (at.state, at.socket))
    at.conf.write_text(render(chosen, state, socket, COMMAND, alerting=any(p.name == "alerts" for p in chosen)))
    return settings, about


def environment(settings: Settings, config: str | None) -> dict[str, str]:
    """The supervisor's environment: ours, with every setting that a worker would not load the same by itself."""
    env = dict(os.environ)
    if config:
        env["TAPELINE_CONFIG"] = str(Path(config).absolute())
    loaded = load(config)
    for section, kind in SECTIONS.items():
        for name in kind.__struct_fields__:
            value = getattr(getattr(settings, section), name)
            if value != getattr(getattr(loaded, section), name):
                variable = env_name(f"{section}.{name}")
                env[variable] = _text(value)
                env.pop(f"{variable}_FILE", None)
    env["TAPELINE_STATE_DIR"] = str(layout(settings).state)
    return env


def _text(value: object) -> str:
    """A value as `load` reads it from a variable."""
    if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
        return msgspec.json.encode(value).decode()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def daemon(at: Layout, *flags: str) -> list[str]:
    """Command line of the supervisor of a prepared state directory."""
    return [*PYTHON, "shared.supervised", str(at.state), *flags]


def find_bus(settings: Settings) -> Settings:
    """Settings with the URL of the Redis to use: the given one, else that of the `up` in the state directory.

    Raises ConfigError when there is neither.
    """
    if settings.redis.url:
        return settings
    at = layout(settings)
    try:
        url = at.url.read_text().strip()
    except OSError:
        raise ConfigError(
            f"no Redis: REDIS_URL is not set, and no `tapeline up` runs in {at.state} (TAPELINE_STATE_DIR)"
        ) from None
    return replace(settings, redis=msgspec.structs.replace(settings.redis, url=url, cluster=False))
