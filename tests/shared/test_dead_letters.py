"""Dead letters: listed, mended and put back under the rules of the sink, whatever form their rows have."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from services.sink_sqlite.form import SqliteForm
from services.sink_timescale.form import TimescaleForm
from shared.batches import Batch, DeadLetter, Item, Source, _dead_frame, batch_of, join
from shared.cli import cli, fail
from shared.dead_letters import Letters, Outcome, fixed, letters_of
from shared.errors import ConfigError, RowRejected, TapelineError
from shared.frames import NS, TICKER, TRADE, Frame, Rows, tick_frame, unreadable
from shared.messages import Gap, encode
from shared.restore import columns_of, restore
from shared.settings import Settings, Tapeline
from shared.sink import Store, store_of
from shared.store_rows import prepare
from shared.stores import read_rows
from shared.tables import LATE_COLUMNS, MESSAGE_TABLES, TABLES, TICK_TABLES
from tests.services.sink_sqlite.tape import (
    INSTRUMENTS,
    PERPETUAL,
    T0,
    TOPIC_OF,
    bars,
    candles,
    gap,
    late,
    mixed,
    pressure,
    rollup,
    rows,
    said,
    signal,
    ticks,
    usage,
)  # fmt: skip
from tests.services.sink_sqlite.tape import (
    fixed as fixed_rows,
)

EVERY = [t.name for t in (*TABLES.values(), *TICK_TABLES.values(), *(t for m in MESSAGE_TABLES.values() for t in m))]
EVERY += ["late_trades", "gaps"]


class Held:
    """A store of a test, and its letters."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.settings = Settings(tapeline=Tapeline(store=url))
        self.store: Store = store_of(self.settings, threading.Event())
        self.store.open()
        self.letters: Letters = letters_of(self.settings)
        self._seq = 0

    def write(self, *frames: Frame, bus: str = "a") -> int:
        items = []
        for frame in frames:
            self._seq += 1
            topic = "ticks" if frame.kind in ("trade", "tick") else TOPIC_OF.get(frame.kind, "candles")
            topic = "usage" if frame.kind == "usage" else topic
            source = Source(bus, topic, 0, self._seq, f"1700000000000-{self._seq}")
            items.append(Item(source, frame, instruments=INSTRUMENTS))
        return self.store.write(batch_of(items))

    def bury(self, *dead: DeadLetter) -> list[str]:
        self.store.write(Batch(dead=list(dead)))
        return self.letters.ids()

    def table(self, name: str) -> list[dict[str, Any]]:
        return read_rows(self.url, name)

    def requeue(self, letter: str) -> Outcome:
        outcome = self.letters.requeue(letter)
        assert outcome is not None
        return outcome

    def mend(self, letter: str, **changes: str) -> Outcome:
        """`fix`, then `requeue`."""
        held = self.letters.get(letter)
        assert held is not None
        self.letters.replace(letter, fixed(held, changes))
        return self.requeue(letter)

    def close(self) -> None:
        self.letters.close()
        self.store.close()


@pytest.fixture
def held(store_url: str) -> Iterator[Held]:
    made = Held(store_url)
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest) -> Iterator[Held]:
    """A store of each kind."""
    made = Held(request.getfixturevalue("store_url" if request.param == "sqlite" else "pg_url"))
    yield made
    made.close()


def one(**values: Any) -> Rows:
    made = rows(1)
    for name, value in values.items():
        made[name] = value
    return made


def everything() -> list[Frame]:
    """Rows of every table."""
    return [
        candles(rows(4)), candles(rows(4), "candle_1s"), bars(fixed_rows(4)), late(3), gap(), gap(T0, ("ESH4",)),
        tick_frame(mixed(), "f"), said(pressure(0), pressure(1)), said(rollup(0), rollup(1)), said(signal(0)),
        said(usage(0)),
    ]  # fmt: skip


def test_rows_of_every_table_come_back_as_they_were(either: Held, tmp_path: Path) -> None:
    """From the columns in which a store refuses them; what the store would have kept, it keeps now."""
    want = Held(f"sqlite:///{tmp_path / 'want.db'}")
    assert want.write(*everything()) == 0
    sources = [Source("a", "ticks" if f.kind == "tick" else "usage" if f.kind == "usage" else
                      TOPIC_OF.get(f.kind, "candles"), 0, i + 1, f"1700000000000-{i + 1}")
               for i, f in enumerate(everything())]  # fmt: skip
    batch = batch_of([Item(s, f, instruments=INSTRUMENTS) for s, f in zip(sources, everything(), strict=True)])
    form = SqliteForm() if either.url.startswith("sqlite") else TimescaleForm()
    prepared, unsound = prepare(batch, form)
    assert not unsound
    dead = [made.dead(made.rows, i, "refused") for made in prepared for i in range(len(made.rows))]
    columns = list(columns_of("gaps"))
    for i, row in enumerate(want.table("gaps")):
        body = json.dumps({name: row[name] for name in columns})
        dead.append(DeadLetter(Source("a", "candles", 0, 90, "90-0"), "gaps", i, "refused", body))
    ids = either.bury(*dead)
    assert len(ids) == len(dead)
    outcomes = [either.requeue(letter) for letter in ids]
    assert {o.reason for o in outcomes} == {""}
    assert not either.letters.ids()
    for table in EVERY:
        got = either.table(table)
        assert got, table
        assert got == want.table(table), table
    if either.url.startswith("sqlite"):
        assert either.table("ohlc_bars") == want.table("ohlc_bars")
    want.close()


def test_a_fixed_row_goes_in_and_its_letter_goes(either: Held) -> None:
    assert either.write(candles(np.concatenate((one(volume=np.nan), rows(3, 1))))) == 1
    (letter,) = either.letters.ids()
    outcome = either.requeue(letter)
    assert (outcome.stored, outcome.buried) == (0, 0)
    assert "volume" in outcome.reason
    kept = either.letters.get(letter)
    assert kept is not None
    assert kept.reason == outcome.reason
    assert either.mend(letter, volume="17.5", vwap="", complete="false", trades="4") == Outcome(1, 0, "")
    assert either.letters.get(letter) is None
    assert either.letters.requeue(letter) is None
    (row,) = [r for r in either.table("candles_1m") if r["volume"] == 17.5]
    assert (row["ticker"], row["symbol"], row["vwap"], row["complete"], row["trades"]) == ("ES", "ESH4", None, 0, 4)
    assert len(either.table("candles_1m")) == 4


def test_a_newer_row_of_the_store_stays(either: Held) -> None:
    either.write(candles(one(volume=np.nan, revision=1, close=1.0)))
    either.write(candles(one(revision=2, close=2.0)))
    (letter,) = either.letters.ids()
    assert not either.mend(letter, volume="5").reason
    assert [(r["revision"], r["close"]) for r in either.table("candles_1m")] == [(2, 2.0)]
    either.write(candles(one(volume=np.nan, revision=3, close=3.0)))
    (letter,) = either.letters.ids()
    assert not either.mend(letter, volume="6").reason
    assert [(r["revision"], r["volume"]) for r in either.table("candles_1m")] == [(3, 6.0)]


def test_ohlc_bars_follow(held: Held) -> None:
    made = fixed_rows(1)
    made["volume"] = np.nan
    held.write(bars(made))
    assert not held.mend(held.letters.ids()[0], volume="3").reason
    assert [r["volume"] for r in held.table("ohlc_bars")] == [3.0]


# -- rows that were refused before they had columns ----------------------------------------------


def test_a_packed_row_wants_its_name(either: Held) -> None:
    made = rows(2)
    made["name"][0] = 9
    assert either.write(candles(made)) == 1
    (letter,) = either.letters.ids()
    assert either.requeue(letter).reason == (
        "what it is of was not kept (number 9 of its frame): set ticker=… and symbol=…"
    )
    assert not either.mend(letter, ticker="ES", symbol="ESH4").reason
    want = rows(1)[0]
    row = next(r for r in either.table("candles_1m") if r["ticker"] == "ES")
    assert (row["time"], row["close"], row["latency_ms"]) == ("2023-12-25T23:01:00Z", want["close"], 500.123456)


def test_a_fixed_candle_without_a_time_wants_one(held: Held) -> None:
    made = fixed_rows(2)
    made["time_ns"][0] = np.iinfo(np.int64).min
    made["timeframe_sec"][1] = 0
    held.write(bars(made))
    first, second = held.letters.ids()
    mended = held.mend(first, exchange="deribit", symbol="ETH-PERPETUAL")
    assert mended.reason.startswith("timestamp_in_ns -9223372036854775808 cannot be")
    assert "no whole second" in held.mend(first, timestamp_in="2023-12-25T23:01:00.5Z").reason
    assert not held.mend(first, timestamp_in="2023-12-25 23:01").reason
    assert "no timeframe" in held.mend(second, exchange="x", symbol="y").reason
    assert not held.mend(second, timeframe="5m").reason
    got = {r["symbol"]: (r["timestamp_in"], r["timeframe"]) for r in held.table("candles")}
    assert got == {"ETH-PERPETUAL": ("2023-12-25T23:01:00Z", "1m"), "y": ("2023-12-25T23:01:00Z", "5m")}


def test_a_late_trade_keeps_its_place(either: Held) -> None:
    frame = late(3)
    made = np.frombuffer(frame.body, frame.rows().dtype).copy()
    made["tick"]["side"][1] = 7
    assert either.write(replace(frame, body=made.tobytes())) == 1
    (letter,) = either.letters.ids()
    assert "set ticker=… and symbol=…" in either.requeue(letter).reason
    assert "side '7' is no text" in either.mend(letter, ticker="ES", symbol="ESH4").reason
    assert not either.mend(letter, side="BUY").reason
    got = either.table("late_trades")
    assert [tuple(row) for row in got] == [LATE_COLUMNS] * 3
    assert [(r["row"], r["side"], r["ts_event"]) for r in got] == [
        (i, side, f"2023-12-25T23:01:00.00000{i}007Z") for i, side in enumerate(("SELL", "BUY", "BUY"))
    ]


def test_a_tick_of_an_unknown_instrument_wants_its_names(either: Held) -> None:
    made = np.concatenate([ticks(TRADE, 2), ticks(TRADE, 1, 2, instrument=5), ticks(TICKER, 1, 3, instrument=5)])
    assert either.write(tick_frame(made, "f")) == 2
    first, second = either.letters.ids()
    assert "set exchange=… and symbol=…" in either.requeue(first).reason
    for letter in (first, second):
        assert either.mend(letter, exchange="okex", symbol="BTC-USDT") == Outcome(1, 0, "")
    trades = either.table("ticks_trades")
    assert [(r["row"], r["symbol"], r["amount"]) for r in trades] == [
        (0, "BTC-PERPETUAL", 200.0), (1, "BTC-PERPETUAL", 200.25), (2, "BTC-USDT", 200.5),
    ]  # fmt: skip
    assert [(r["row"], r["exchange"]) for r in either.table("ticks_derivative_ticker")] == [(3, "okex")]


def test_a_part_of_a_record_is_said_to_be_one(held: Held) -> None:
    torn = ticks(2, 1, instrument=PERPETUAL, parts=3)[1:]
    assert held.write(tick_frame(torn, "f")) == 2
    assert {"a part of a record" in held.requeue(letter).reason for letter in held.letters.ids()} == {True}


@pytest.mark.parametrize(("made", "table"), [(pressure(), "pressure_metrics"), (signal(), "signals"),
                                             (usage(), "usage_log")])  # fmt: skip
def test_a_message_is_told_by_its_own_fields(held: Held, made: Any, table: str) -> None:
    number = "cost_usd" if table == "usage_log" else "premium"
    broken = msgspec.to_builtins(made) | {number: "much"}
    body = json.dumps([msgspec.to_builtins(made), broken]).encode()
    assert held.write(said(made, body=body)) == 1
    (letter,) = held.letters.ids()
    assert "Expected `float" in held.requeue(letter).reason
    with pytest.raises(ValueError, match="has no column 'nonsense'; there are: type, "):
        held.mend(letter, nonsense="1")
    if table == "usage_log":
        assert held.mend(letter, cost_usd="0.25", feed="other", day_cost_usd="0.5") == Outcome(2, 0, "")
        assert [(r["feed"], r["cost_usd"]) for r in held.table("usage_daily")] == [("databento", 0.02), ("other", 0.5)]
    else:
        assert not held.mend(letter, premium="7", revision="1").reason
        assert [(r["premium"], r["revision"]) for r in held.table(table)] == [(7.0, 1)]


# -- whole frames ----------------------------------------------------------------------------


def whole(frame: Frame, reason: str = "a kind of the future") -> DeadLetter:
    """The letter of a frame that an older program could not read."""
    return _dead_frame(Item(Source("a", "candles", 0, 7, "7-0"), frame), reason)


def test_a_frame_that_is_understood_now_goes_in(either: Held) -> None:
    made = rows(5)
    made["volume"][2] = np.nan
    first, second, third = either.bury(whole(candles(made)), *(
        replace(whole(frame), source=Source("a", "candles", 0, n, f"{n}-0"))
        for n, frame in ((8, said(pressure(0), pressure(1))), (9, Frame("gap", 2, 0, 0, "", encode(
            [Gap("f", T0, T0 + NS, "x"), Gap("g", T0, T0 + NS, "x")])))))
    )  # fmt: skip
    assert either.requeue(first) == Outcome(4, 1, "")
    assert either.requeue(second) == Outcome(2, 0, "")
    assert either.requeue(third) == Outcome(2, 0, "")
    assert (len(either.table("candles_1m")), len(either.table("pressure_metrics")), len(either.table("gaps"))) == (
        4,
        2,
        2,
    )
    (row,) = either.letters.find()
    assert (row.table_name, row.row_number, row.source) == ("candles_1m", 2, Source("a", "candles", 0, 7, "7-0"))
    assert either.store.cursors() == {}, "a requeued frame moves no cursor"


def test_why_a_frame_stays(held: Held) -> None:
    big = candles(rows(1000))
    assert len(big.body) > 48 << 10
    bad = one(volume=np.nan)
    cases = [
        (whole(big), f"only 49152 of its {len(big.body)} bytes were kept: it cannot be decoded again"),
        (whole(Frame("martian", 1, 0, 0, "", b"{}")), "a frame of kind 'martian' that is not JSON of messages"),
        (whole(Frame("gap", 1, 0, 0, "", b"\xff")), "a frame of kind 'gap' that is not JSON"),
        (whole(unreadable("no definition came", b"x")), "no definition came"),
        (whole(candles(rows(2), names=[])), "whose rows they are was not kept with the frame"),
        (whole(replace(candles(rows(2)), count=3)), "bytes are not 3 rows of kind 'candle_1m'"),
        (whole(candles(bad)), "volume"),
        (replace(whole(big), body='{"kind": "gap", "bytes": 3, "body_base64": "?"}'), "the letter's body is no base64"),
        (replace(whole(big), body='{"kind": null, "bytes": 3, "body_base64": "YWJj"}'), "a kind of the future"),
    ]
    dead = [replace(d, source=d.source._replace(id=f"{n}-0")) for n, (d, _) in enumerate(cases, 50)]
    for letter, (_, reason) in zip(held.bury(*dead), cases, strict=True):
        outcome = held.requeue(letter)
        assert reason in outcome.reason
        kept = held.letters.get(letter)
        assert kept is not None
        assert kept.reason == outcome.reason
    assert not held.table("candles_1m")
    assert len(held.letters.ids()) == len(cases)


@pytest.mark.parametrize(
    ("table", "body", "reason"),
    [
        ("candles_1m", "no json", "is no JSON"),
        ("candles_1m", "[1]", "is no JSON object"),
        ("candles_1m", '{"values": "nested too deeply to be told"}', "nested too deeply"),
        ("candles_1m", '{"ticker": "A", "symbol": "A"}', "the letter has no time"),
        ("elsewhere", '{"a": 1}', "no table 'elsewhere' takes rows"),
        ("ticks_trades", '{"instrument": 1, "part": 0}', "the letter has no ts_event_ns"),
        ("signals", '{"score": 1}', "no such message"),
        ("gaps", '{"feed": 3}', "feed '3' is no text"),
    ],
)
def test_a_row_that_cannot_be_is_said_precisely(table: str, body: str, reason: str, held: Held) -> None:
    (letter,) = held.bury(DeadLetter(Source("a", "candles", 0, 1, "1-0"), table, 0, "refused", body))
    row = held.letters.get(letter)
    assert row is not None
    with pytest.raises(RowRejected, match=reason):
        restore(row, SqliteForm())
    assert reason in held.requeue(letter).reason


def test_join_and_records_are_what_the_letters_hold() -> None:
    """Should a frame's fields get other names, the restoring must follow."""
    frame = replace(candles(one(name=9)), id="1-0")
    (dead,) = join(batch_of([Item(Source("a", "candles", 0, 1, "1-0"), frame)]).candles["candle_1m"], "candles_1m").dead
    assert {"time_ns", "name", "timestamp_out_ns"} <= set(json.loads(dead.body))


# -- finding, dropping, fixing ---------------------------------------------------------------


def test_find(either: Held) -> None:
    source = Source("a", "candles", 0, 1, "1-0")
    dead = [DeadLetter(source, ("candles", "signals")[i % 2], i, f"reason {i // 3}", "{}") for i in range(6)]
    assert len(either.bury(*dead)) == 6
    numbers = lambda **by: [letter.row_number for letter in either.letters.find(**by)]  # noqa: E731
    assert numbers() == [0, 1, 2, 3, 4, 5]
    assert numbers(last=2) == [4, 5]
    assert numbers(table="signals") == [1, 3, 5]
    assert numbers(table="signals", reason="son 1", last=5) == [3, 5]
    assert numbers(since_ns=0) == numbers()
    assert numbers(since_ns=4 * 10**18) == []
    ids = either.letters.ids("signals")
    assert len(ids) == 3
    assert either.letters.drop([*ids, "12345"]) == 3
    assert numbers() == [0, 2, 4]
    assert either.letters.get("no number") is None


def test_fixing_is_by_the_columns_sorts(held: Held) -> None:
    held.write(candles(one(volume=np.nan)))
    (letter,) = held.letters.find()
    for text, name in (("abc", "volume"), ("nan", "volume"), ("1.5", "trades"), ("maybe", "complete"), ("x", "time")):
        with pytest.raises(ValueError, match=name):
            fixed(letter, {name: text})
    made = json.loads(fixed(letter, {"symbol": "ESM4", "time": "2023-12-25", "divergence": "-1", "vwap": ""}))
    assert (made["symbol"], made["divergence"], made["vwap"]) == ("ESM4", -1, None)
    assert made["time"].startswith("2023-12-25T00:00:00")
    with pytest.raises(TapelineError, match="is a whole frame: it has no columns to fix"):
        fixed(replace(letter, row_number=-1), {"a": "1"})


def test_a_sink_that_writes_at_the_same_time_is_waited_for(held: Held, tmp_path: Path) -> None:
    held.write(candles(one(volume=np.nan)))
    (letter,) = held.letters.find()
    held.letters.replace(letter.id, fixed(letter, {"volume": "1"}))
    with closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("UPDATE dead_letters SET reason = 'seen by another'")
        threading.Timer(0.2, lambda: other.execute("COMMIT")).start()
        assert held.requeue(letter.id) == Outcome(1, 0, "")


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: name the store"):
        letters_of(Settings(tapeline=Tapeline(store=f"sqlite:///{tmp_path / 'none.db'}")))
    assert not list(tmp_path.iterdir())


# -- commands --------------------------------------------------------------------------------


@pytest.fixture
def command(held: Held, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`command(*args)` -> (exit code, what it printed, the error's line)."""
    monkeypatch.setenv("TAPELINE_STORE", held.url)

    def run(*args: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli, ["dead-letters", *args], standalone_mode=False)
        if done.exception is None:
            return int(done.return_value or 0), done.stdout, ""
        said = CliRunner().invoke(_failing(done.exception))
        return said.exit_code, done.stdout, said.stderr

    return run


def _failing(error: BaseException) -> Any:
    import click

    return click.command()(lambda: click.get_current_context().exit(fail(error)))


def test_the_way_of_a_letter_by_commands(held: Held, command: Any) -> None:
    held.write(candles(np.concatenate((one(volume=np.nan), rows(3, 1)))))
    held.write(Frame("gap", 1, 0, 0, "x", b"\x00"))
    _, out, _ = command("list")
    assert [line.split()[2:4] for line in out.splitlines()[1:]] == [["candles_1m", "0"], ["candles", "all"]]
    first, second = [record["id"] for record in json.loads(command("list", "--json")[1])]
    assert json.loads(command("list", "--json", "--table", "candles_1m", "--last", "1")[1])[0]["row"]["volume"] is None
    assert json.loads(command("list", "--json", "--since", "2100-01-01", "--reason", "x")[1]) == []
    assert "volume                   null" in command("show", first)[1]
    assert command("fix", first, "volume=12", "vwap=")[0] == 0
    code, out, _ = command("requeue", first, second)
    assert (code, out.splitlines()[-1]) == (1, "1 requeued (1 rows), 1 left")
    assert out.startswith(f"{second} stays: a frame of kind 'gap'")
    assert {r["volume"] for r in held.table("candles_1m")} >= {12.0}
    code, out, _ = command("requeue", "--all", "--table", "candles", "--json")
    assert (code, json.loads(out)["left"][0]["id"]) == (1, second)
    assert command("drop", "--all", "--yes")[:2] == (0, "1 dropped\n")
    assert command("list")[1] == "no dead letters\n"
    assert command("requeue", "--all")[:2] == (0, "0 requeued (0 rows), 0 left\n")


def test_wrong_usage_and_unknown_letters(held: Held, command: Any) -> None:
    held.write(candles(one(volume=np.nan)))
    (letter,) = held.letters.ids()
    for args, code, says in (
        (("show", "77"), 1, "has no dead letter 77: `tapeline dead-letters list` shows them"),
        (("fix", "77", "volume=1"), 1, "has no dead letter 77"),
        (("requeue", letter, "77"), 1, "has no dead letter 77"),
        (("drop", "77"), 1, "has no dead letter 77"),
        (("fix", letter, "nonsense=1"), 2, "candles_1m has no column 'nonsense'; there are: "),
        (("fix", letter, "volume=much"), 2, "volume cannot be 'much'"),
        (("fix", letter, "volume"), 2, "'volume' is no COLUMN=VALUE"),
        (("requeue",), 2, "give IDs, or --all"),
        (("drop", letter, "--all"), 2, "give IDs, or --all"),
        (("drop", letter, "--table", "x"), 2, "--table goes with --all"),
        (("drop", "--all"), 2, "say --yes"),
        (("list", "--since", "yesterday"), 2, "no time such as"),
    ):
        got, _, line = command(*args)
        assert (got, says in line, line.count("\n")) == (code, True, 1), (args, line)
    assert held.letters.ids() == [letter], "nothing was done to it"
