"""The supervisor process: supervisord with its state directory cleaned up behind it.

It says on stdout what ends, with the worker's own last error line, ends itself when the embedded
Redis cannot run, and stops (never reloads) on SIGHUP.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from supervisor import events
from supervisor.medusa import asyncore_25 as asyncore
from supervisor.options import ServerOptions
from supervisor.states import SupervisorStates
from supervisor.supervisord import Supervisor

from shared.redis_server import die_with_parent
from shared.supervise import Layout, clean

TAIL_BYTES = 16384
# supervisord looks at its signals and children once a second when nothing else happens: too slow to stop by.
POLL_SECONDS = 0.2


class Watched(Supervisor):  # type: ignore[misc]
    """supervisord that tells people what its workers do."""

    failed = 0

    def add_process_group(self, config: Any) -> Any:
        # `run` has just cleared all subscriptions when it adds the first group.
        if not self.process_groups:
            events.subscribe(events.ProcessStateEvent, self._told)
        return super().add_process_group(config)

    def _told(self, event: Any) -> None:
        if self.options.mood < SupervisorStates.RUNNING:
            return
        name, status = event.process.config.name, event.process.exitstatus
        if isinstance(event, events.ProcessStateExitedEvent):
            how = "was killed" if status == -1 else f"ended with exit code {status}"
            self._say(name, how + ("" if event.expected else "; starting it again"), event)
            if name == "redis" and event.expected:
                self.failed = status or 1
                self.options.mood = SupervisorStates.SHUTDOWN
        elif isinstance(event, events.ProcessStateBackoffEvent):
            self._say(name, "ended at once; starting it again", event)
        elif isinstance(event, events.ProcessStateFatalEvent):
            self._say(name, "does not start; given up", event)

    def _say(self, name: str, what: str, event: Any) -> None:
        config = event.process.config
        why = last_error(Path(config.stdout_logfile or config.stderr_logfile))
        print(f"{name} {what}" + (f": {why}" if why else ""), flush=True)  # noqa: T201 - its purpose


def last_error(log: Path) -> str:
    """The last `tapeline: …` line of a worker's log, without the prefix; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    found = [line for line in lines if line.startswith("tapeline: ")]
    return found[-1].removeprefix("tapeline: ") if found else ""


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; the exit code is 0, or that of an embedded Redis that cannot run."""
    parser = argparse.ArgumentParser(prog="python -m shared.supervised", description=__doc__)
    parser.add_argument("state", type=Path)
    parser.add_argument("--parent", type=int, default=0, help="end when this parent process has gone")
    parser.add_argument("--remove", action="store_true", help="remove the state directory at the end")
    given = parser.parse_args(argv)
    if given.parent:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != given.parent:
            return 1
    os.environ["TAPELINE_SUPERVISOR_PID"] = str(os.getpid())
    at = Layout(given.state)
    options = ServerOptions()
    options.realize(["-n", "-c", str(at.conf)], doc=__doc__)
    options.first, options.test = True, False
    poll = options.poller.poll
    options.poller.poll = lambda timeout: poll(min(timeout, POLL_SECONDS))
    supervisor = Watched(options)
    try:
        supervisor.main()
    except asyncore.ExitNow:
        pass
    finally:
        options.close_httpservers()
        options.close_logger()
        clean(at)
        at.pid.unlink(missing_ok=True)
        if given.remove:
            shutil.rmtree(at.state, ignore_errors=True)
    return supervisor.failed


if __name__ == "__main__":
    sys.exit(main())
