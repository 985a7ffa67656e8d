"""A supervisor run by this process: `replay` and `demo` start one, watch it and stop it.

Whatever happens to this process, the supervisor ends with it, and everything below the supervisor
ends with that.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shared import supervise
from shared.errors import TapelineError
from shared.settings import Settings
from shared.supervise import Layout, Program

STOP_SECONDS = 12.0


class WorkerError(TapelineError):
    """A worker ended for good; the message is its own last error line, the exit code its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Process:
    """One supervised worker: supervisord's state name (RUNNING, EXITED, FATAL, …) and last exit code."""

    name: str
    state: str
    exit_code: int
    pid: int


class Supervision:
    """Context manager: the programs run inside it; after it no process, socket or pid file is left.

    `fresh`: what the state directory held before goes first. `remove`: all of it goes in the end.
    """

    def __init__(
        self,
        settings: Settings,
        chosen: list[Program],
        config: str | None,
        *,
        fresh: bool = False,
        remove: bool = False,
    ) -> None:
        self.at: Layout = supervise.layout(settings)
        self.settings, self.about = settings, ""
        self._chosen, self._config, self._fresh, self._remove = chosen, config, fresh, remove
        self._daemon: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        lock = supervise.claim(self.at)
        try:
            if self._fresh:
                self._empty()
            self.settings, self.about = supervise.prepare(self.settings, self._chosen)
            flags = ["--parent", str(os.getpid()), *(["--remove"] if self._remove else [])]
            with (self.at.logs / "events.log").open("ab") as events:
                self._daemon = subprocess.Popen(
                    supervise.daemon(self.at, *flags),
                    env=supervise.environment(self.settings, self._config),
                    stdin=subprocess.DEVNULL,
                    stdout=events,
                    stderr=events,
                    pass_fds=[lock],
                    start_new_session=True,  # Ctrl-C is for us; we stop it in order
                )
        except BaseException:
            self._tidy()
            raise
        finally:
            os.close(lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        self._tidy()

    def _empty(self) -> None:
        """Only once nothing of an earlier run works in there."""
        supervise.clean(self.at)
        for path in self.at.state.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.at.pid:
                path.unlink()
        self.at.logs.mkdir()

    def _tidy(self) -> None:
        supervise.clean(self.at)
        self.at.pid.unlink(missing_ok=True)
        if self._remove:
            shutil.rmtree(self.at.state, ignore_errors=True)

    def processes(self) -> list[Process]:
        """What runs; empty while the supervisor itself is starting.

        Raises WorkerError when the supervisor has ended.
        """
        from supervisor.xmlrpc import SupervisorTransport  # noqa: PLC0415 - heavy, and only here

        if self._daemon is not None and self._daemon.poll() is not None:
            raise WorkerError(self._why_supervisor(), self._daemon.returncode or 1)
        transport = SupervisorTransport(None, None, serverurl=f"unix://{self.at.socket}")
        try:
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as proxy:
                found = proxy.supervisor.getAllProcessInfo()
        except OSError:
            return []
        return [
            Process(str(p["name"]), str(p["statename"]), int(p["exitstatus"]), int(p["pid"]))
            for p in found
            if isinstance(p, dict)
        ] if isinstance(found, list) else []  # fmt: skip

    def _why_supervisor(self) -> str:
        return self.why("redis") or _last_line(self.at.logs / "events.log") or "the supervisor ended"

    def why(self, worker: str) -> str:
        """The worker's last error line, empty when it wrote none."""
        from shared.supervised import last_error  # noqa: PLC0415 - imports supervisor

        return last_error(self.at.log_of(worker))

    def check(self) -> list[Process]:
        """Raises WorkerError when a worker ended for good with an error; returns what runs."""
        found = self.processes()
        for p in found:
            if p.state == "FATAL" or (p.state == "EXITED" and p.exit_code in self._final(p.name) - {0}):
                why = (
                    self.why(p.name)
                    or f"{p.name} ended with exit code {p.exit_code}; {_last_line(self.at.log_of(p.name))}"
                )
                raise WorkerError(why, p.exit_code if p.exit_code > 0 else 1)
        return found

    def _final(self, worker: str) -> set[int]:
        return {code for program in self._chosen if worker in program.workers() for code in program.final}


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1] if lines else ""
