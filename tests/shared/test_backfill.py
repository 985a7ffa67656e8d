"""Backfill in this process: what it writes, mends, forgets and leaves alone. The tapes are real files."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.ingest.dbn_file import DbnFiles
from services.ingest.synthetic import generate
from services.sink_sqlite.store import SqliteStore
from shared import backfill
from shared.frames import NS
from shared.messages import Gap
from shared.replay import Progress, Summary
from shared.settings import Settings, load
from shared.sources import Playable
from tests.wait import until

TRADES = 9000
RATE = 50.0
START_NS = 1_715_265_000 * NS  # 2024-05-09T14:30:00Z
PROCESSING = {"timestamp_out", "latency_ms"}
CANDLES = ("candles", "candles_1m", "candles_1s")


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three minutes of three roots, with late trades."""
    out = tmp_path_factory.mktemp("tape") / "market.dbn"
    generate(out, trades=TRADES, rate=RATE, late_fraction=0.02, late_seconds=20)
    return out


def settings(db: Path, **sections: dict[str, Any]) -> Settings:
    given = load(environ={"TAPELINE_STORE": f"sqlite:///{db}", "TAPELINE_AGGREGATE_MAX_LATENESS_SECONDS": "10"})
    for section, values in sections.items():
        setattr_frozen(given, section, msgspec.structs.replace(getattr(given, section), **values))
    return given


def setattr_frozen(given: Settings, section: str, value: Any) -> None:
    object.__setattr__(given, section, value)


def run(
    tapes: list[Playable] | Path, db: Path, stop: threading.Event | None = None, **sections: dict[str, Any]
) -> Summary:
    own = settings(db, **sections)
    if isinstance(tapes, Path):
        tapes = [DbnFiles([tapes], own.tapeline.partitions)]
    return backfill.run(tapes, own, lambda _: None, stop or threading.Event())


def table(db: Path, name: str, without: set[str] | frozenset[str] = frozenset()) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(db)) as connection:
        cursor = connection.execute(f"SELECT * FROM {name}")
        keep = [i for i, c in enumerate(cursor.description) if c[0] not in without]
        return sorted((tuple(row[i] for i in keep) for row in cursor), key=repr)


def everything(db: Path, without: set[str] | frozenset[str] = frozenset()) -> dict[str, list[tuple[Any, ...]]]:
    return {name: table(db, name, without) for name in (*CANDLES, "late_trades", "gaps", "ohlc_bars")}


class Holey:
    """A tape in whose stretch [since, until) the feed was gone: what a live run would have seen."""

    def __init__(self, tape: Path, since_ns: int, until_ns: int) -> None:
        self._source = DbnFiles([tape], 8)
        self.feed, self.tape = self._source.feed, "live"
        self.since_ns, self.until_ns = since_ns, until_ns

    def run(self, out: Any, resume: Any, stop: threading.Event) -> None:
        holey, pushed = self, out

        class Output:
            told = False

            def __getattr__(self, name: str) -> Any:
                return getattr(pushed, name)

            def ticks(self, grouped: Any, cursor: bytes) -> None:
                for g, p in enumerate(grouped.partitions):
                    rows = grouped.rows[grouped.starts[g] : grouped.starts[g + 1]]
                    at = rows["ts_event_ns"]
                    pushed._pipe.rows(p, holey.feed, rows[at < holey.since_ns])
                    if (at >= holey.until_ns).any():
                        gap = Gap(holey.feed, holey.since_ns, holey.until_ns, "the machine slept")
                        pushed._pipe.message(p, holey.feed, "gap", [gap], 0)
                        pushed._pipe.rows(p, holey.feed, rows[at >= holey.until_ns])

        self._source.run(Output(), resume, stop)


def test_repeating_it_changes_no_byte(tape: Path, tmp_path: Path) -> None:
    db = tmp_path / "s.db"
    first = run(tape, db, sink={"modes": ("candles", "ticks")})
    assert first.trades + sum(first.skipped.values()) == TRADES
    assert first.late > 0
    assert first.dead_letters == 0
    tables = (*CANDLES, "late_trades", "ohlc_bars", "ticks_trades", "sink_cursors")
    held = {name: table(db, name) for name in tables}
    assert len(held["ticks_trades"]) == first.trades
    assert any(row[-3] > 0 for row in held["candles_1s"]), "some rows were revised by late trades"
    again = run(tape, db, sink={"modes": ("candles", "ticks")})
    assert {name: table(db, name) for name in tables} == held
    assert (again.trades, again.late) == (first.trades, first.late)


def test_neither_batches_nor_other_partitions_change_a_row(tape: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(tape, tmp_path / "a.db")
    monkeypatch.setattr(backfill, "STEP_ROWS", 97)
    run(tape, tmp_path / "b.db", sink={"batch_rows": 1}, tapeline={"partitions": 3})
    without = {*PROCESSING, "bus_seq", "row", "partition", "watermark_ns", "id"}
    assert everything(tmp_path / "a.db", without) == everything(tmp_path / "b.db", without)
    # Of the same tapes, so late trades of the other partitions are forgotten, not doubled.
    late = table(tmp_path / "b.db", "late_trades", without)
    run(tape, tmp_path / "b.db")
    assert table(tmp_path / "b.db", "late_trades", without) == late


def test_an_incomplete_stretch_is_mended(tape: Path, tmp_path: Path) -> None:
    run(tape, tmp_path / "whole.db")
    db = tmp_path / "live.db"
    run([Holey(tape, START_NS + 70 * NS, START_NS + 100 * NS)], db)
    complete = {name: [row for row in table(db, name, PROCESSING) if row[-2] == 1] for name in CANDLES}
    assert all(len(rows) < len(table(tmp_path / "whole.db", name)) for name, rows in complete.items())
    assert len(table(db, "gaps")) == 1
    run(tape, db)
    for name in CANDLES:
        without = {*PROCESSING, "revision"}
        assert table(db, name, without) == table(tmp_path / "whole.db", name, without)
        # What was whole before the hole was left alone.
        assert set(complete[name]) & set(table(db, name, PROCESSING)), name
    held = everything(db)
    run(tape, db)
    assert everything(db) == held


def test_a_part_of_the_tape_takes_nothing_from_what_is_stored(tmp_path: Path) -> None:
    db, long, part = tmp_path / "s.db", tmp_path / "long.dbn", tmp_path / "part.dbn"
    generate(long, trades=5000, rate=RATE, start=START_NS + 20 * NS)
    generate(part, trades=1500, rate=RATE, start=START_NS + 40 * NS)
    run(long, db)
    first = "SELECT * FROM candles WHERE timestamp_in = '2024-05-09T14:30:00Z' AND timeframe = '1m'"
    with closing(sqlite3.connect(db)) as connection:
        bars = connection.execute(first).fetchall()
        assert bars
        run(part, db)
        # Both tapes begin within this minute: the one that has more of it stays.
        assert connection.execute(first).fetchall() == bars


def test_cvd_goes_on_from_what_the_store_holds(tape: Path, tmp_path: Path) -> None:
    """Two tapes one after the other give the CVD of one run over both."""
    later = tmp_path / "later.dbn"
    generate(later, trades=3000, rate=RATE, start=START_NS + 600 * NS, seed=2)
    run(tape, tmp_path / "s.db")
    run(later, tmp_path / "s.db")
    with closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        for ticker in ("ES", "NQ", "CL"):
            sql = (
                "SELECT cvd_{} FROM candles_1s WHERE ticker = ? AND cvd_close IS NOT NULL "
                "AND time {} '2024-05-09T14:40:00Z' ORDER BY time {}"
            )
            (last,) = connection.execute(sql.format("close", "<", "DESC"), (ticker,)).fetchone()
            (first,) = connection.execute(sql.format("open", ">=", "ASC"), (ticker,)).fetchone()
            assert first == last
            assert last != 0


def test_stopped_it_leaves_whole_batches(tape: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(backfill, "STEP_ROWS", 500)
    run(tape, tmp_path / "whole.db")
    stop, told = threading.Event(), []

    def tell(p: Progress) -> None:
        told.append(p.published)
        if p.made > 500:
            stop.set()

    own = settings(tmp_path / "s.db", sink={"batch_rows": 10})
    backfill.run([Slow(tape)], own, tell, stop)
    assert 0 < told[-1] < TRADES
    with closing(sqlite3.connect(tmp_path / "s.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (rows,) = connection.execute("SELECT count(*) FROM candles_1s").fetchone()
    assert 0 < rows < len(table(tmp_path / "whole.db", "candles_1s"))
    # The next run makes up for it.
    run(tape, tmp_path / "s.db")
    without = {*PROCESSING, "revision"}
    for name in CANDLES:
        assert table(tmp_path / "s.db", name, without) == table(tmp_path / "whole.db", name, without)


class Slow:
    """The tape in small pieces, looking for `stop` between them."""

    def __init__(self, tape: Path) -> None:
        self._source = DbnFiles([tape], 8)
        self.feed, self.tape = self._source.feed, self._source.tape

    def run(self, out: Any, resume: Any, stop: threading.Event) -> None:
        class Output:
            def __getattr__(self, name: str) -> Any:
                return getattr(out, name)

            def ticks(self, grouped: Any, cursor: bytes) -> None:
                for g, p in enumerate(grouped.partitions):
                    for at in range(grouped.starts[g], grouped.starts[g + 1], 100):
                        if not stop.is_set():
                            end = min(at + 100, grouped.starts[g + 1])
                            out._pipe.rows(p, out._feed, grouped.rows[at:end])

        self._source.run(Output(), resume, stop)


def test_a_store_that_is_held_is_waited_for(tape: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "s.db"
    run(tape, tmp_path / "whole.db")
    SqliteStore(db).open()
    holder = sqlite3.connect(db, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    done: list[Summary] = []
    thread = threading.Thread(target=lambda: done.append(run(tape, db)))
    with caplog.at_level(logging.WARNING):
        thread.start()
        until(lambda: "trying again" in caplog.text, 30, "the backfill to wait")
    holder.execute("ROLLBACK")
    holder.close()
    thread.join(60)
    assert done
    without = {*PROCESSING, "id"}
    assert everything(db, without) == everything(tmp_path / "whole.db", without)


def test_the_identity_is_of_what_is_on_the_tapes(tape: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.dbn"
    generate(other, trades=100, seed=7)
    copy = tmp_path / "copy.dbn"
    copy.write_bytes(tape.read_bytes())
    one, two, same = (DbnFiles([path], 8) for path in (tape, other, copy))
    assert backfill.identity([one, two]) == backfill.identity([two, same])
    assert backfill.identity([one]) != backfill.identity([two])
