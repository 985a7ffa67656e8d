"""The same tape gives the same table: at any speed, in any frames, with any number of workers, under kill -9."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_replay import nothing_left, replay, rows, stored
from tests.e2e.test_up import environ
from tests.shared.test_cli import tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An hour of several roots, with late trades: 40,000 records."""
    out = tmp_path_factory.mktemp("chaos") / "market.dbn"
    args = ("--trades", "40000", "--seed", "7", "--late-fraction", "0.02", "--late-seconds", "90")
    done = tapeline("generate", str(out), *args, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def calm(tape: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    """What an undisturbed run stores."""
    folder = tmp_path_factory.mktemp("calm")
    replay(folder, tape, "calm.db")
    held = rows(folder / "calm.db")
    assert len(held["candles_1m"]) > 1000
    assert any(row[-3] > 0 for row in held["candles_1m"]), "no row was ever revised"
    return held


def same(db: Path, calm: dict[str, list[tuple[Any, ...]]]) -> None:
    held = rows(db)
    for table, wanted in calm.items():
        assert len(held[table]) == len(wanted), table
        assert held[table] == wanted, table


@pytest.mark.parametrize(
    "args",
    [("--frame-records", "1"), ("--frame-records", "1000", "--aggregators", "3"), ("--speed", "3000")],
    ids=["frames of 1", "3 aggregators", "3000x"],
)
def test_undisturbed(tape: Path, calm: dict[str, list[tuple[Any, ...]]], tmp_path: Path, args: tuple[str, ...]) -> None:
    replay(tmp_path, tape, "x.db", *args)
    same(tmp_path / "x.db", calm)


def aggregators(cwd: Path) -> list[Any]:
    return [p for p in below(cwd) if p.cmdline()[-2:] == ["run", "aggregate"] or p.cmdline()[-1:] == ["aggregate"]]


def begin(cwd: Path, tape: Path, speed: str, workers: int) -> subprocess.Popen[str]:
    line = [
        sys.executable, "-P", "-m", "shared.cli", "replay", str(tape), "--store", "sqlite:///x.db", "--json",
        "--speed", speed, "--aggregators", str(workers),
    ]  # fmt: skip
    env = environ(cwd, TMPDIR=str(cwd), TAPELINE_REDIS_LEASE_SECONDS="1")
    return subprocess.Popen(line, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_an_aggregator_killed_ten_times(tape: Path, calm: dict[str, list[tuple[Any, ...]]], tmp_path: Path) -> None:
    dice = random.Random(11)
    process = begin(tmp_path, tape, "60", 2)
    drained = threading.Thread(target=process.wait)
    drained.start()
    for _ in range(10):
        before = stored(tmp_path / "x.db")
        until(lambda: stored(tmp_path / "x.db") > before + dice.randint(1, 40), 60, "more rows")  # noqa: B023
        victims = until(lambda: aggregators(tmp_path), 20, "an aggregator")
        dice.choice(victims).kill()
    out, err = process.communicate(timeout=200)
    drained.join()
    assert process.returncode == 0, err
    assert json.loads(out)["trades"] > 0
    same(tmp_path / "x.db", calm)
    nothing_left(tmp_path)


def test_an_aggregator_paused_past_its_lease(
    tape: Path, calm: dict[str, list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    process = begin(tmp_path, tape, "120", 2)
    until(lambda: stored(tmp_path / "x.db") > 50, 60, "rows in the midst")
    sleeper = aggregators(tmp_path)[0]
    sleeper.send_signal(signal.SIGSTOP)
    paused = time.monotonic()
    before = stored(tmp_path / "x.db")
    # Longer than the lease, and until the other one has gone on with its partitions.
    until(lambda: time.monotonic() - paused > 2 and stored(tmp_path / "x.db") > before + 50, 60, "the other one")
    sleeper.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out)["trades"] > 0
    same(tmp_path / "x.db", calm)
    nothing_left(tmp_path)
