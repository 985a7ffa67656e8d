"""`kill -9` of the sink at any point of a batch, on a real bus: then the tables are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from shared.bus import Bus
from shared.frames import TRADE
from tests.services.sink_sqlite.tape import (
    Feed,
    Stage,
    bars,
    candles,
    fixed,
    late,
    pressure,
    rows,
    said,
    sinking,
    stored_seq,
    ticks,
)
from tests.services.sink_timescale.tables import fetch, same
from tests.wait import until

CODE = """
import signal, threading
from services.sink_timescale.worker import run
from shared.settings import load
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
run(load(), stop, ())
"""


def start(bus: Bus, url: str, fault: str = "") -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TAPELINE_")} | {
        "REDIS_URL": bus.url,
        "TAPELINE_NAMESPACE": bus.keys.namespace,
        "TAPELINE_STORE": url,
        "TAPELINE_PARTITIONS": "1",
        "TAPELINE_SINK_BATCH_ROWS": "1",
        "TAPELINE_SINK_BATCH_MS": "20",
        "TAPELINE_SINK_MODES": "candles,ticks",
        "TAPELINE_REDIS_LEASE_SECONDS": "1",
    }
    return subprocess.Popen([sys.executable, "-c", CODE], env=env | ({"TAPELINE_TEST_FAULT": fault} if fault else {}))


def at(url: str) -> dict[str, int]:
    return {row["topic"]: row["seq"] for row in fetch(url, "SELECT topic, seq FROM sink_cursors")}


def test_kill_9_at_every_point(bus: Bus, pg_url: str, tmp_path: Path) -> None:
    path, stage, feed, options = tmp_path / "whole.db", Stage(bus), Feed(bus), Stage(bus, name="pressure")
    spoiled = rows(20, 40, revision=20)
    spoiled["trades"][3] = -1
    spoiled["volume"][4] = np.nan
    for i in range(9):
        stage.put(candles(rows(20, 5 * i, revision=i)), bars(fixed(6, 2 * i)), late(3, 9 * i))
        feed.put(ticks(TRADE, 5, 5 * i))
        options.put(said(*(pressure(n + i, revision=i) for n in range(4))))
    seq = stage.put(candles(spoiled))
    for fault in ("sink:before-copy:2", "sink:before-commit:3", "sink:after-commit:4"):
        with start(bus, pg_url, fault) as sink:
            assert sink.wait(timeout=30) == -signal.SIGKILL
        assert at(pg_url).get("candles", 0) < seq
    with start(bus, pg_url) as sink:
        until(lambda: at(pg_url).get("candles") == seq and at(pg_url).get("ticks") == feed.seq, 30, "all rows")
        until(lambda: at(pg_url).get("pressure") == options.seq, 30, "all pressure")
        sink.send_signal(signal.SIGTERM)
        assert sink.wait(timeout=20) == 0
    with sinking(bus, path, modes=("candles", "ticks")):
        for topic, last in (("candles", seq), ("ticks", feed.seq), ("pressure", options.seq)):
            until(lambda topic=topic, last=last: stored_seq(path, topic) == last)
    same(path, pg_url)
