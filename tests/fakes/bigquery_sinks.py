"""Sinks to be killed, as processes of their own: `tapeline run sink-bigquery`, forked from one that has all imported.

To start Python and Google's clients takes seconds, to fork milliseconds. Run as a program this is the process that
is forked from; it has one thread and no connection.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from shared.bus import Bus
from tests.fakes.bigquery import Call, Drop
from tests.wait import until

_ROOT = Path(__file__).resolve().parents[2]


class Sink:
    """One process. `status` is its exit code, -9 after `kill -9`, None while it lives."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self._nursery, self._status = nursery, None

    @property
    def status(self) -> int | None:
        if self._status is None:
            self._status = self._nursery.ask({"poll": self.pid})["status"]
        return self._status

    @property
    def text(self) -> str:
        """What it has said."""
        return self.log.read_text()

    def signal(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """`kill -9`, and it is gone."""
        self.signal(signal.SIGKILL)
        self.ended()

    def ended(self, timeout: float = 20.0) -> int:
        """Wait for its end; its exit code."""
        try:
            until(lambda: self.status is not None, timeout, "the sink's end")
        except AssertionError as error:
            raise AssertionError(f"{error}; it says:\n{self.text}") from None
        assert self.status is not None
        return self.status


class Nursery:
    """The process that sinks are forked from."""

    def __init__(self) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("TAPELINE_", "GOOGLE_", "BIGQUERY_"))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.bigquery_sinks"],
            cwd=_ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lock = threading.Lock()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            found: dict[str, Any] = json.loads(self._process.stdout.readline())
            return found

    def start(self, environ: dict[str, str], log: Path) -> Sink:
        return Sink(self, self.ask({"start": environ, "log": str(log)})["pid"], log)

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


class Sinks:
    """The sinks of one test, all on one bus and one store; those that still run at its end are killed."""

    def __init__(self, nursery: Nursery, bus: Bus, folder: Path, environ: dict[str, str]) -> None:
        self.all: list[Sink] = []
        self._nursery, self._bus, self._folder = nursery, bus, folder
        self.environ = environ | {
            "REDIS_URL": bus.url,
            "TAPELINE_NAMESPACE": bus.keys.namespace,
            "TAPELINE_PARTITIONS": "1",
            "TAPELINE_REDIS_LEASE_SECONDS": "1",
        }

    def start(self, **environ: str) -> Sink:
        """Another one, which finds the lease of one that was killed run out."""
        if self.all and self.all[-1].status is not None:
            name = f"bigquery:{self.environ['TAPELINE_STORE'].removeprefix('bigquery://').replace('/', '.')}"
            self._bus.client.hset(self._bus.keys.lease(0, name), "expires_ms", 0)
        log = self._folder / f"sink{len(self.all)}.log"
        log.touch()
        self.all.append(self._nursery.start(self.environ | environ, log))
        return self.all[-1]

    @property
    def newest(self) -> Sink:
        return self.all[-1]

    def die(self, call: Call) -> None:
        """An action: the newest sink is killed."""
        self.newest.kill()

    def die_unheard(self, call: Call) -> None:
        """An action: the newest sink is killed, and its call is never carried out."""
        self.newest.kill()
        raise Drop

    def end(self) -> None:
        for sink in self.all:
            sink.signal(signal.SIGCONT)
            sink.kill()


def _serve() -> None:
    for module in ("services.sink_bigquery.worker", "services.sink_bigquery.method_write", "shared.cli_run"):
        import_module(module)

    children: dict[int, int | None] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid = question["poll"]
            if children[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    children[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps({"status": children[pid]}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run(question["start"], question["log"])
        children[pid] = None
        print(json.dumps({"pid": pid}), flush=True)


def _run(environ: dict[str, str], log: str) -> None:
    from shared import faults
    from shared.cli import main

    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, out), (2, out)):
        os.dup2(source, target)
    os.chdir(Path(log).parent)
    os.environ.update(environ)
    random.seed()
    faults._armed, faults._left = faults._ordered(environ.get("TAPELINE_TEST_FAULT", ""))
    sys.argv = ["tapeline", "run", "sink-bigquery"]
    code = 1
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
