"""Dead letters of a BigQuery store: listed, mended and put back, each row once whatever happens in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from services.sink_bigquery.letters import BigQueryLetters, of
from services.sink_bigquery.rows import FORM, sound
from services.sink_bigquery.store import BigQueryStore
from services.sink_sqlite.store import SqliteStore
from shared.batches import Batch, Cursor, DeadLetter, Item, Source, _dead_frame, batch_of
from shared.cli import cli
from shared.dead_letters import Outcome, fixed
from shared.errors import ConfigError, StoreUnavailable
from shared.frames import NS, TRADE, Frame, Rows, tick_frame
from shared.import_files import Given
from shared.importing import Plan, run
from shared.restore import Letter
from shared.settings import Settings, Tapeline
from shared.store_rows import prepare
from shared.stores import read_rows
from tests.bigquery import Endpoints
from tests.fakes.bigquery import BigQueryServer, drop, fails, refuse
from tests.services.sink_bigquery.stores import batch, store_at, target, url_of
from tests.services.sink_sqlite.tape import (
    INSTRUMENTS,
    T0,
    TOPIC_OF,
    bars,
    candles,
    gap,
    late,
    mixed,
    pressure,
    rows,
    said,
    signal,
    ticks,
    usage,
)
from tests.services.sink_sqlite.tape import fixed as fixed_rows

_ROOT = Path(__file__).resolve().parents[3]


class Held:
    """A store of a test, and its letters."""

    def __init__(self, store: BigQueryStore) -> None:
        self.store, self.url = store, url_of(store.target)
        self.settings = Settings(tapeline=Tapeline(store=self.url), bigquery=store.target.settings)
        self.letters: BigQueryLetters = of(self.settings)

    def mend(self, letter: str, **changes: str) -> Outcome:
        """`fix`, then `requeue`."""
        self.letters.replace(letter, fixed(self.get(letter), changes))
        return self.requeue(letter)

    def get(self, letter: str) -> Letter:
        held = self.letters.get(letter)
        assert held is not None
        return held

    def requeue(self, letter: str) -> Outcome:
        outcome = self.letters.requeue(letter)
        assert outcome is not None
        return outcome

    def bury(self, *dead: DeadLetter) -> None:
        self.store.write(Batch(dead=list(dead), cursors={("a", "candles", 0): Cursor(1, "1-0")}))

    def again(self) -> Held:
        """As another process finds it."""
        self.letters.close()
        self.letters = of(self.settings)
        return self

    def close(self) -> None:
        self.letters.close()
        self.store.close()


Make = Callable[..., Held]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[Held] = []

    def at(endpoints: Any, method: str = "load") -> Held:
        made.append(Held(store_at(target(endpoints, monkeypatch, method))))
        return made[-1]

    yield at
    for held in made:
        held.close()


def bad(count: int, start: int = 0, **values: Any) -> Rows:
    """Candles that a store refuses."""
    made = rows(count, start)
    made["volume"] = np.nan
    for name, value in values.items():
        made[name] = value
    return made


def _topic(frame: Frame) -> str:
    return (
        "usage" if frame.kind == "usage" else "ticks" if frame.kind == "tick" else TOPIC_OF.get(frame.kind, "candles")
    )


def test_listed_fixed_requeued_and_dropped(make: Make, bqemulator: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the commands, over what BigQuery's SQL says."""
    held = make(bqemulator)
    monkeypatch.setenv("TAPELINE_STORE", held.url)

    def command(*args: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["dead-letters", *args], standalone_mode=False)
        assert done.exception is None
        return int(done.return_value or 0), done.stdout

    broken = fixed_rows(1)
    broken["trades"] = -1
    held.store.write(batch(candles(np.concatenate((bad(2), rows(3, 2)))), Frame("gap", 1, 0, 0, "x", b"\x00")))
    held.store.write(batch(candles(rows(1), "candle_1s"), bars(broken), seq=3))
    listed = command("list")[1].splitlines()
    assert [line.split()[2:4] for line in listed[1:]] == [
        ["candles_1m", "0"], ["candles_1m", "1"], ["candles", "all"], ["candles", "0"],
    ]  # fmt: skip
    records = json.loads(command("list", "--json")[1])
    first, second, frame, other = (record["id"] for record in records)
    assert [r["id"] for r in records] == held.letters.ids()
    assert held.letters.ids("candles_1m") == [first, second]
    found = held.letters.find
    assert [r.id for r in found(table="candles", last=1)] == [other]
    assert [r.id for r in found(reason="volume is", last=1)] == [second]
    assert [r.id for r in found(since_ns=T0 * 2)] == []
    assert command("show", first)[1].splitlines()[9].split() == ["reason", "volume", "is", "undefined"]
    assert command("requeue", first)[1].startswith(f"{first} stays: volume is undefined")
    assert command("fix", first, "volume=12.5", "vwap=")[0] == 0
    code, out = command("requeue", first, frame)
    assert (code, out.splitlines()[-1]) == (1, "1 requeued (1 rows), 1 left")
    (row,) = read_rows(held.url, "candles_1m", {"volume": 12.5})
    assert (row["vwap"], row["ticker"], row["complete"]) == (None, "ES", rows(1)["complete"][0])
    assert held.letters.ids() == [second, frame, other], "an id stays"
    assert held.letters.requeue(first) is None
    assert command("drop", second)[1] == "1 dropped\n"
    assert json.loads(command("drop", "--all", "--yes", "--json")[1]) == {"dropped": 2}
    assert (held.letters.ids(), held.letters.get(second), held.letters.drop([second])) == ([], None, 0)
    assert len(read_rows(held.url, "candles_1m")) == 4


def test_rows_of_every_table_come_back_as_they_were(make: Make, bqemulator: Endpoints, tmp_path: Path) -> None:
    """What SQLite keeps of them, a BigQuery store that once refused them keeps now."""
    held = make(bqemulator)
    frames = [candles(rows(1)), bars(fixed_rows(1)), late(1), said(pressure(0)), said(signal(0)), said(usage(0))]
    made = [tick_frame(mixed(), "x"), *frames]
    sources = [Source("a", _topic(frame), 0, i + 1, f"{i + 1}-0") for i, frame in enumerate(made)]
    items = [Item(s, f, instruments=INSTRUMENTS) for s, f in zip(sources, made, strict=True)]
    prepared, unsound = prepare(batch_of(items), FORM)
    assert not unsound
    # As the store buries what BigQuery refuses.
    ready, _ = sound(prepared, Batch(), 0)
    held.bury(*(some.letter(i, "refused") for some in ready if some.letter for i in range(len(some))))
    sqlite = SqliteStore(tmp_path / "store.db")
    sqlite.open()
    sqlite.write(batch_of(items))
    sqlite.close()
    assert {held.requeue(letter) for letter in held.letters.ids()} == {Outcome(1, 0, "")}
    assert not held.letters.ids()
    for some in ready:
        expected = read_rows(f"sqlite:///{tmp_path / 'store.db'}", some.layout.name)
        assert expected
        assert read_rows(held.url, some.layout.name) == expected, some.layout.name


def test_whole_frames_and_rows_that_never_had_columns(make: Make, bqemulator: Endpoints) -> None:
    held = make(bqemulator)
    good = np.concatenate((rows(2), bad(1, 1)))
    frames = (candles(good), candles(bad(2)), gap(T0), candles(rows(2), names=[]))
    held.bury(
        *(_dead_frame(Item(Source("a", "candles", 0, n, f"{n}-0"), frame), "of the future")
          for n, frame in enumerate(frames, 1))
    )  # fmt: skip
    partly, wholly, gaps, nameless = held.letters.ids()
    assert held.requeue(partly) == Outcome(2, 1, "")
    assert held.requeue(wholly).reason == "volume is undefined"
    assert held.requeue(gaps) == Outcome(1, 0, "")
    assert held.requeue(nameless).reason == "whose rows they are was not kept with the frame"
    assert (len(read_rows(held.url, "candles_1m")), len(read_rows(held.url, "gaps"))) == (2, 1)
    assert held.letters.ids()[:2] == [wholly, nameless]
    (row,) = held.letters.find(table="candles_1m")
    assert (row.row_number, row.source, row.reason) == (2, Source("a", "candles", 0, 1, "1-0"), "volume is undefined")
    spoilt = ticks(TRADE, 2)
    spoilt["instrument"][1] = 99
    held.store.write(batch(tick_frame(spoilt, "x"), topic="ticks"))
    (tick,) = (letter.id for letter in held.letters.find() if letter.topic == "ticks")
    assert "set exchange=… and symbol=…" in held.requeue(tick).reason
    assert held.mend(tick, exchange="okex", symbol="BTC-USDT") == Outcome(1, 0, "")
    assert [(r["row"], r["symbol"]) for r in read_rows(held.url, "ticks_trades", {"exchange": "okex"})] == [
        (1, "BTC-USDT")
    ]


def test_a_newer_row_of_the_store_stays(make: Make, bigquery: BigQueryServer) -> None:
    held = make(bigquery)
    held.store.write(batch(candles(bad(1, revision=1, close=1.0))))
    held.store.write(batch(candles(rows(1, revision=2, close=2.0)), seq=2))
    held.store.write(batch(candles(bad(1, 1, revision=3, close=3.0)), seq=3))
    for letter in held.letters.ids():
        assert held.mend(letter, volume="5") == Outcome(1, 0, "")
    newest = read_rows(held.url, "candles_1m", columns=("revision", "close"))
    assert newest == [{"revision": 2, "close": 2.0}, {"revision": 3, "close": 3.0}]


# -- with what fails in between ------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["lost", "late"])
def test_a_row_is_written_once_whatever_gets_lost(answer: str, make: Make, bigquery: BigQueryServer) -> None:
    """The answer to the row's job, or the letter's deletion."""
    held = make(bigquery)
    held.store.write(batch(candles(bad(1))))
    (letter,) = held.letters.ids()
    held.letters.replace(letter, fixed(held.get(letter), {"volume": "7"}))
    if answer == "lost":
        bigquery.order("jobs.insert.query", after=drop, table="candles_1m")
    else:
        bigquery.order("jobs.insert.query", refuse(503), table="dead_letters", nth=2)
    with pytest.raises(StoreUnavailable):
        held.letters.requeue(letter)
    assert held.again().requeue(letter) == Outcome(1, 0, "")
    assert [row["volume"] for row in bigquery.rows("candles_1m")] == [7.0]
    assert not bigquery.rows("dead_letters")


def test_a_kill_before_the_letter_is_deleted(make: Make, bigquery: BigQueryServer) -> None:
    held = make(bigquery)
    frame = candles(np.concatenate((rows(2), bad(1, 1))))
    held.bury(_dead_frame(Item(Source("a", "candles", 0, 1, "1-0"), frame), "of the future"))
    (letter,) = held.letters.ids()
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli", "dead-letters", "requeue", letter],
        env={**os.environ, "TAPELINE_STORE": held.url, "TAPELINE_TEST_FAULT": "bigquery:after-write"},
        cwd=_ROOT, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert len(bigquery.rows("candles_1m")) == 2
    assert held.letters.ids() == [letter]
    assert held.requeue(letter) == Outcome(2, 1, "")
    assert len(bigquery.rows("candles_1m")) == 2
    assert [row["row_number"] for row in bigquery.rows("dead_letters")] == [2]


def test_what_bigquery_refuses_stays_and_is_tried_again(make: Make, bigquery: BigQueryServer) -> None:
    held = make(bigquery)
    held.store.write(batch(candles(bad(1))))
    (letter,) = held.letters.ids()
    bigquery.order("jobs.insert.query", fails("invalidQuery", "no such number"), table="candles_1m", times=2)
    assert "no such number" in held.mend(letter, volume="7").reason
    assert "no such number" in held.get(letter).reason
    assert "no such number" in held.requeue(letter).reason
    assert held.requeue(letter) == Outcome(1, 0, "")
    assert len(bigquery.rows("candles_1m")) == 1


def test_letters_just_inserted_wait(make: Make, bigquery: BigQueryServer) -> None:
    held = make(bigquery, "insert_all")
    held.bury(_dead_frame(Item(Source("a", "candles", 0, 1, "1-0"), candles(rows(2))), "of the future"))
    (letter,) = held.letters.ids()
    says = "letters that insert_all wrote cannot be changed for 30 to 90 minutes after: try again then"
    with pytest.raises(StoreUnavailable, match=says):
        held.letters.replace(letter, "{}")
    with pytest.raises(StoreUnavailable, match=says):
        held.letters.drop([letter])
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=says):
            held.letters.requeue(letter)
    buffered = bigquery.warehouse.table(held.store.target.dataset, "dead_letters")
    buffered.streamed = [False] * len(buffered.rows)
    assert held.requeue(letter) == Outcome(2, 0, "")
    assert (len(bigquery.rows("candles_1m")), len(bigquery.rows("dead_letters"))) == (2, 0)


def test_a_dataset_that_is_not_there(bigquery: BigQueryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    at = target(bigquery, monkeypatch)
    with pytest.raises(ConfigError, match="does not exist: name the store in TAPELINE_STORE"):
        of(Settings(tapeline=Tapeline(store=url_of(at)), bigquery=at.settings))
    assert not bigquery.warehouse.datasets


# -- import --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "method"), [("bigquery", "load"), ("bigquery", "storage_write"), ("bqemulator", "load")]
)
def test_an_import_that_is_repeated_changes_nothing(
    server: str, method: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at = target(request.getfixturevalue(server), monkeypatch, method, batch_rows=7)
    settings = Settings(tapeline=Tapeline(store=url_of(at)), bigquery=at.settings)
    path = tmp_path / "a.csv"
    plan = Plan([path], Given("glbx", "ESH4", 60))

    def load(count: int, close: float) -> tuple[int, int, int]:
        lines = [f"{T0 // NS + 60 * i},1,9,0.5,{close if i % 2 else 1},{i}" for i in range(count)]
        path.write_text("\n".join(("time,open,high,low,close,volume", *lines)))
        done = run(plan, settings, lambda _: None)
        return done.stored, done.replaced, done.unchanged

    assert load(20, 2.0) == (20, 0, 0)
    held = read_rows(url_of(at), "candles")
    assert len(held) == 20
    assert load(20, 2.0) == (0, 0, 20)
    assert read_rows(url_of(at), "candles") == held
    assert load(21, 3.0) == (1, 10, 10)
    assert [r["revision"] for r in read_rows(url_of(at), "candles", last=3)] == [0, 1, 0]
