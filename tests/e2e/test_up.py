"""`tapeline up`, whole: the synthetic market through every worker into the store; kills; nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.redis_server import answers
from tests.shared.test_cli import NO_OPTIONS, OPTIONS, tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = pytest.mark.heavy
START_SECONDS = 60  # a cold kernel compiles first
# Whoever is killed holds its lease, and looks alive, for so long.
QUICK = {"TAPELINE_REDIS_LEASE_SECONDS": "2"}


def environ(folder: Path, **more: str) -> dict[str, str]:
    ours = ("TAPELINE_", "REDIS_", "DATABASE_", "DATABENTO_", "GCP_", "BIGQUERY_", "GOOGLE_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    ours_now = {
        "TAPELINE_STATE_DIR": str(folder / "state"),
        "TAPELINE_REDIS_PORT": "0",
        "TAPELINE_WEB_PORT": "0",
        **NO_OPTIONS,
        **QUICK,
    }
    return clean | ours_now | more


class Up:
    """A running `tapeline up` in a folder."""

    def __init__(self, folder: Path, **more: str) -> None:
        self.folder, self.more = folder, more
        self.out = folder / "up.out"
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shared.cli", "up"],
                cwd=folder, env=environ(folder, **more), stdout=out, stderr=out,
            )  # fmt: skip

    def status(self) -> dict[str, Any]:
        done = tapeline("status", "--json", cwd=self.folder, TAPELINE_STATE_DIR=str(self.folder / "state"), **QUICK)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def worker(self, service: str) -> int:
        """Pid of the one living worker of a service."""

        def find() -> int:
            return next(
                (w["pid"] for w in self.status().get("workers", ()) if w["service"] == service and w["alive"]), 0
            )

        return until(find, START_SECONDS, f"a living {service}")

    def rows(self) -> int:
        try:
            with closing(sqlite3.connect(f"file:{self.folder / 'tapeline.db'}?mode=ro", uri=True)) as connection:
                return int(connection.execute("SELECT count(*) FROM candles_1s").fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    def grows(self) -> None:
        before = self.rows()
        until(lambda: self.rows() > before, START_SECONDS, "more rows")

    def stop(self, signum: int = signal.SIGINT) -> float:
        """Seconds until it had ended."""
        began = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(30)
        return time.monotonic() - began


@contextmanager
def running(folder: Path, **more: str) -> Iterator[Up]:
    """Stopped at the end, whatever happened."""
    made = Up(folder, **more)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.stop(signal.SIGTERM)
        for process in below(folder):
            process.kill()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with running(tmp_path) as made:
        yield made


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Up]:
    """With the stages of options."""
    with running(tmp_path, **OPTIONS) as made:
        yield made


def nothing_left(folder: Path) -> None:
    assert below(folder) == []
    left = {p.name for p in folder.rglob("*") if p.is_socket() or p.suffix == ".pid"}
    assert left == set()


def test_rows_arrive_and_ctrl_c_leaves_nothing(whole: Up, tmp_path: Path) -> None:
    up = whole
    up.grows()
    said = up.out.read_text()
    assert "append-only" in said.splitlines()[0]
    for worker in ("redis", "ingest-synthetic", "aggregate", "pressure", "signals", "sink-sqlite"):
        assert f"{worker}: log " in said
    second = tapeline("up", cwd=tmp_path, TAPELINE_STATE_DIR=str(tmp_path / "state"), TAPELINE_REDIS_PORT="0")
    assert second.returncode == 78
    assert second.stderr == (
        f"tapeline: {tmp_path / 'state'} is in use by a running tapeline (pid {up.process.pid}): "
        "stop it, or set TAPELINE_STATE_DIR\n"
    )
    seen = tapeline(
        "tail", "candles", "--count", "1", "--json", cwd=tmp_path, TAPELINE_STATE_DIR=str(tmp_path / "state")
    )
    assert json.loads(seen.stdout)["ticker"]
    found = up.status()
    assert found["feeds"]
    assert {c["name"] for s in found["streams"] for c in s["consumers"] if s["topic"] == "ticks"} == {
        "aggregate",
        "pressure",
    }
    assert up.stop(signal.SIGINT) < 10
    nothing_left(tmp_path)


def test_sigterm_stops_it_and_a_second_up_goes_on_where_it_was(up: Up, tmp_path: Path) -> None:
    up.grows()
    assert up.stop(signal.SIGTERM) < 10
    nothing_left(tmp_path)
    again = Up(tmp_path)
    try:
        again.grows()
    finally:
        again.stop(signal.SIGTERM)
    nothing_left(tmp_path)


def test_killed_workers_are_started_again(whole: Up) -> None:
    for victim in ("ingest-synthetic", "aggregate", "sink-sqlite", "pressure", "signals"):
        killed(whole, victim)


def killed(up: Up, victim: str) -> None:
    up.grows()
    pid = up.worker(victim)
    os.kill(pid, signal.SIGKILL)
    until(lambda: up.worker(victim) != pid, START_SECONDS, f"another {victim}")
    up.grows()
    assert f"{victim} was killed; starting it again" in up.out.read_text()


def test_a_killed_redis_comes_back(up: Up, tmp_path: Path) -> None:
    up.grows()
    sock = tmp_path / "state" / "redis" / "redis.sock"
    redis = next(p for p in below(tmp_path) if "redis-server" in p.name())
    redis.kill()
    redis.wait(5)
    until(lambda: answers(sock), what="Redis to be back")
    up.grows()


def test_kill_9_of_the_supervisor_leaves_no_orphan(up: Up, tmp_path: Path) -> None:
    up.grows()
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait(5)
    until(lambda: below(tmp_path) == [], 15, "every worker to follow")
    again = Up(tmp_path)
    try:
        again.grows()
    finally:
        again.stop(signal.SIGTERM)
    nothing_left(tmp_path)


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = tapeline("up", cwd=tmp_path, TAPELINE_STATE_DIR=str(tmp_path / "state"), TAPELINE_REDIS_PORT=port)
    assert done.returncode == 78
    assert len(done.stderr.splitlines()) == 1
    assert f"port {port}" in done.stderr
    assert "TAPELINE_REDIS_PORT" in done.stderr
    nothing_left(tmp_path)
