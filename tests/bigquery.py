"""Fixtures for the BigQuery store: the tests' own strict server, the emulator from PyPI, and sinks to be killed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.bus import Bus
from tests.fakes.bigquery import BigQueryServer
from tests.fakes.bigquery_sinks import Nursery, Sinks
from tests.wait import until

_ROOT = Path(__file__).resolve().parents[1]
_VENV = _ROOT / ".venv-bqemulator"


@dataclass(frozen=True)
class Endpoints:
    """Where a server is: `url` its REST side, `grpc` host:port of the other."""

    url: str
    grpc: str


@pytest.fixture
def bigquery() -> Iterator[BigQueryServer]:
    """A BigQuery of the tests' own, empty. A test fails if the server failed, or nothing met what it ordered."""
    with BigQueryServer() as server:
        yield server
    assert not server.broken
    assert not server.unmet()


@pytest.fixture(scope="session")
def bigquery_nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.stop()


@pytest.fixture
def bigquery_sinks(bigquery_nursery: Nursery, bigquery: BigQueryServer, bus: Bus, tmp_path: Path) -> Iterator[Sinks]:
    """Sinks on the test's bus that write into the test's BigQuery."""
    sinks = Sinks(
        bigquery_nursery, bus, tmp_path,
        {
            "TAPELINE_STORE": f"bigquery://{bigquery.project}/tape",
            "TAPELINE_BIGQUERY_ENDPOINT": bigquery.url,
            "TAPELINE_BIGQUERY_GRPC_ENDPOINT": bigquery.grpc,
            "TAPELINE_BIGQUERY_BATCH_MS": "20",
        },
    )  # fmt: skip
    yield sinks
    sinks.end()


@pytest.fixture(scope="session")
def bqemulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """The emulator, from a virtual environment of its own (`make` builds it when it is missing or outdated)."""
    target = f"{_VENV.name}/.installed"
    made = subprocess.run(["make", "-s", target], cwd=_ROOT, check=False, capture_output=True, text=True)
    assert made.returncode == 0, f"make {target}: {made.stderr}"
    folder = tmp_path_factory.mktemp("bqemulator")
    ports = _free_ports()
    log = folder / "log"
    # DuckDB looks for its extensions at home, where `make` has put the one that is needed.
    environ = os.environ | {"HOME": str(_VENV / "home"), "TMPDIR": str(folder)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [_VENV / "bin" / "bqemulator", "start", "--rest-port", str(ports[0]), "--grpc-port", str(ports[1]),
             "--project", "tests", "--log-level", "warning"],
            stdout=out, stderr=out, env=environ, cwd=folder,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or all(map(_answers, ports)), 60, f"the emulator ({log})")
        assert process.poll() is None, log.read_text()[-2000:]
        yield Endpoints(f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def _free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return [one.getsockname()[1], other.getsockname()[1]]
