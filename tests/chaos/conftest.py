"""Tapes and undisturbed stores that several modules compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.crypto_tape import crypto_tape
from tests.e2e.test_replay import nothing_left
from tests.shared.test_cli import OPTIONS, tapeline


@pytest.fixture(scope="session")
def crypto(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crypto_tape(tmp_path_factory.mktemp("chaos") / "crypto.ndjson")


@pytest.fixture(scope="session")
def crypto_db(crypto: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SQLite with what an undisturbed replay of it stores of candles and raw ticks."""
    folder = tmp_path_factory.mktemp("calm")
    line = ("replay", str(crypto), "--store", "sqlite:///calm.db", "--json")
    done = tapeline(*line, cwd=folder, TMPDIR=str(folder), TAPELINE_SINK_MODES="candles,ticks", **OPTIONS)
    assert done.returncode == 0, done.stderr
    nothing_left(folder)
    return folder / "calm.db"
