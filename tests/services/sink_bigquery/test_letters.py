"""Dead letters of a BigQuery store: listed, mended and put back, each row once whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from services.sink_bigquery.letters import BigQueryLetters, of
from services.sink_bigquery.store import BigQueryStore
from shared.cli import cli
from shared.dead_letters import Outcome, fixed
from shared.frames import Frame, Rows
from shared.settings import Settings, Tapeline
from shared.stores import read_rows
from tests.bigquery import Endpoints
from tests.services.sink_bigquery.stores import batch, store_at, target, url_of
from tests.services.sink_sqlite.tape import T0, candles, gap, mixed, rows, said, usage
from tests.services.sink_sqlite.tape import fixed as fixed_rows


class Held:
    """A store of a test, and its letters."""

    def __init__(self, store: BigQueryStore) -> None:
        self.store, self.url = store, url_of(store.target)
        self.settings = Settings(tapeline=Tapeline(store=self.url), bigquery=store.target.settings)
        self.letters: BigQueryLetters = of(self.settings)

    def mend(self, letter: str, **changes: str) -> Outcome | None:
        held = self.letters.get(letter)
        assert held is not None
        self.letters.replace(letter, fixed(held, changes))
        return self.letters.requeue(letter)

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


def whole(frame: Frame) -> Frame:
    """One that is buried as a whole."""
    return replace(frame, count=frame.count + 1)


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
    held.store.write(batch(candles(rows(1), "candle_1s"), candles(broken, "candle"), seq=3))
    listed = command("list")[1].splitlines()
    assert [line.split()[2:4] for line in listed[1:]] == [
        ["candles", "all"], ["candles_1m", "0"], ["candles_1m", "1"], ["candles", "0"],
    ]  # fmt: skip
    records = json.loads(command("list", "--json")[1])
    frame, first, second, other = (record["id"] for record in records)
    assert [r["id"] for r in records] == held.letters.ids()
    assert held.letters.ids("candles_1m") == [first, second]
    found = held.letters.find
    assert [r.id for r in found(table="candles", last=1)] == [other]
    assert [r.id for r in found(reason="volume is", last=1)] == [second]
    assert [r.id for r in found(since_ns=T0 * 2)] == []
    assert command("show", first)[1].splitlines()[8].split() == ["reason", "volume", "is", "undefined"]
    assert command("requeue", first)[1].startswith(f"{first} stays: volume is undefined")
    assert command("fix", first, "volume=12.5", "vwap=")[0] == 0
    code, out = command("requeue", first, frame)
    assert (code, out.splitlines()[-1]) == (1, "1 requeued (1 rows), 1 left")
    (row,) = read_rows(held.url, "candles_1m", {"volume": 12.5})
    assert (row["vwap"], row["ticker"], row["complete"]) == (None, "ES", rows(1)["complete"][0])
    assert held.letters.ids() == [frame, second, other], "an id stays"
    assert held.letters.requeue(first) is None
    assert command("drop", second)[1] == "1 dropped\n"
    assert command("drop", "--all", "--yes", "--json")[1] == '{"dropped": 2}\n'
    assert (held.letters.ids(), held.letters.get(second), held.letters.drop([second])) == ([], None, 0)
    assert len(read_rows(held.url, "candles_1m")) == 4


def test_rows_of_other_tables_and_whole_frames(make: Make, bqemulator: Endpoints) -> None:
    held = make(bqemulator)
    one = held.letters
    spoilt = mixed()
    spoilt["instrument"][0] = 99
    from shared.frames import tick_frame

    held.store.write(batch(tick_frame(spoilt, "x"), topic="ticks"))
    (tick,) = one.ids()
    assert "set exchange=… and symbol=…" in one.requeue(tick).reason
    assert held.mend(tick, exchange="okex", symbol="BTC-USDT") == Outcome(1, 0, "")
    assert [r["row"] for r in read_rows(held.url, "ticks_trades", {"exchange": "okex"})] == [0]
    wrong = said(usage(), body=json.dumps([{"type": "usage", "feed": "f"}]).encode())
    made = np.concatenate((bad(1), rows(3, 1)))
    frame = candles(made, names=[])
    held.store.write(batch(wrong, frame, whole(gap(T0)), seq=4))
    assert not one.find(table="nonsense")
    assert len(one.ids()) == len(one.find())
    for letter in one.find():
        if letter.is_frame and letter.topic == "candles":
            assert one.requeue(letter.id).reason
    # A newer row of the store stays, an older one goes.
    one.drop(one.ids())
    held.store.write(batch(candles(bad(1, revision=1, close=1.0)), candles(rows(1, revision=2, close=2.0)), seq=9))
    held.store.write(batch(candles(bad(1, 1, revision=3, close=3.0)), candles(rows(1, 1, revision=2)), seq=11))
    for letter in one.ids():
        assert held.mend(letter, volume="5") == Outcome(1, 0, "")
    assert [(r["revision"], r["close"]) for r in read_rows(held.url, "candles_1m")] == [(2, 2.0), (3, 3.0)]
