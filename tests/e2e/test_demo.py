"""`tapeline demo`, as `make demo` runs it off a terminal: rows, a summary, an end, nothing left running."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from shared.demo import MOST_SECONDS
from tests.shared.test_cli import tapeline
from tests.shared.test_supervise import below

pytestmark = pytest.mark.heavy


def test_the_demo_ends_by_itself_with_rows(tmp_path: Path) -> None:
    stale = tmp_path / ".tapeline" / "demo" / "tapeline.db"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier demo")
    began = time.monotonic()
    done = tapeline("demo", cwd=tmp_path, REDIS_URL="redis://127.0.0.1:1/0", TAPELINE_FEEDS="databento")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < MOST_SECONDS + 12
    assert done.stderr == ""
    for said in ("the page: http://127.0.0.1:", "trades in", "latency of live rows", "ES ", "NQ ", "CL ", "next:"):
        assert said in done.stdout
    assert below(tmp_path) == []
    with closing(sqlite3.connect(stale)) as connection:
        (minutes,) = connection.execute("SELECT count(*) FROM candles_1m WHERE ticker = 'ES'").fetchone()
    assert minutes > 500, "ten minutes of history, less the first, and some live seconds"
