"""`status`, `tail` and `streams` on a real bus, with frames as ingest and aggregate publish them."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from shared.bus import Bus, Step
from shared.frames import (
    BOOK,
    CANDLE,
    CLOCK,
    FEATURE_COLUMNS,
    FIXED,
    LATE,
    LIQUIDATION,
    NS,
    OPTION,
    STATE_COLUMNS,
    TICK,
    TICKER,
    TRADE,
    Frame,
    tick_frame,
)  # fmt: skip
from shared.heartbeat import Beat, beat, redis_now_ms
from shared.instruments import feed_id, instrument_id
from shared.keys import TOPICS
from shared.messages import Clock, Disconnect, Gap, Instrument, encode
from shared.status import Reader
from shared.tail import Tail
from tests.services.sink_sqlite import tape
from tests.shared.test_cli import tapeline

T0 = 1_703_545_200 * NS  # 2023-12-25T23:00:00Z
ES = Instrument(id=instrument_id("GLBX", "ESH4"), venue="GLBX", symbol="ESH4", root="ES", feed="files")
CL = Instrument(id=instrument_id("GLBX", "CLG4"), venue="GLBX", symbol="CLG4", root="CL", feed="files")
PARTITION = {"ES": 1, "CL": 2}


def trades(instrument: int, count: int, price: float) -> Frame:
    rows = np.zeros(count + 1, TICK)
    rows["ts_event_ns"] = T0 + np.arange(count + 1) * NS
    rows["instrument"], rows["price"], rows["size"], rows["side"] = instrument, price, 2, 1
    rows["bid_px"] = np.nan
    rows["kind"][-1], rows["instrument"][-1] = CLOCK, feed_id("files")
    return Frame("trade", count, T0, T0 + count * NS, "files", rows.tobytes())


def candle(revision: int = 0) -> Frame:
    row = np.zeros(1, CANDLE)
    row["time_ns"], row["close"], row["volume"], row["revision"], row["vwap"] = (
        T0 + 60 * NS,
        4801.25,
        7,
        revision,
        np.nan,
    )
    return Frame("candle_1m", 1, T0, T0 + 60 * NS, "aggregate", row.tobytes(), names=[("ES", "ESH4")])


def late() -> Frame:
    row = np.zeros(1, LATE)
    row["tick"]["ts_event_ns"], row["tick"]["instrument"], row["tick"]["price"] = T0, ES.id, 4800.5
    row["watermark_ns"] = T0 + 200 * NS
    return Frame("late_trade", 1, T0, T0 + 200 * NS, "aggregate", row.tobytes(), names=[("ES", "ESH4")])


def message(kind: str, *messages: Any) -> Frame:
    return Frame(kind, len(messages), T0, T0, "files", encode(list(messages)))


def publish(bus: Bus, partition: int, *frames: Frame) -> None:
    seq, _ = bus.attach(partition, "files", "test")
    assert bus.publish(partition, "files", "test", seq + 1, list(frames), b"")


@pytest.fixture
def filled(bus: Bus) -> Bus:
    """Two partitions with ticks and messages; aggregate has done half of one and made rows of it."""
    bus.deploy(4)
    for partition, instrument in ((1, ES), (2, CL)):
        bus.call("hset", bus.keys.instruments(partition), instrument.id, msgspec.json.encode(instrument))
        publish(bus, partition, message("instrument", instrument), trades(instrument.id, 3, 4800.25))
    gap = Gap("files", T0, T0 + NS, "the machine slept")
    publish(bus, 1, message("gap", gap), message("disconnect", Disconnect("files", T0, "EOF")))
    publish(bus, 1, message("clock", Clock("files", T0 + 9 * NS, final=True)))
    bus.call("hset", bus.keys.feeds, "files", msgspec.json.encode({"state": "connected", "detail": "", "published": 6}))
    token = bus.acquire(1, "aggregate", "worker-a", 60_000)
    assert token
    bus.load(1, "aggregate", "ticks")
    first = bus.read(1, "ticks", "0-0", 2)
    outputs = {"candles": [candle(), candle(1)], "late": [late()]}
    step = Step(token, "aggregate", "0-0", first[-1].id, 4, T0, 3, {}, (), outputs)
    assert bus.commit(1, "ticks", step)
    bus.register(1, "candles", "sink-sqlite")
    beat(bus, "worker-a", "aggregate", [1])
    old = Beat("worker-b", "aggregate", "host", 7, 1_000_000)
    bus.call("hset", bus.keys.workers, "worker-b", msgspec.json.encode(old))
    return bus


def run(bus: Bus, tmp_path: Path, *args: str) -> str:
    done = tapeline(*args, cwd=tmp_path, REDIS_URL=bus.url, TAPELINE_NAMESPACE=bus.keys.namespace)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_status_tells_positions_lag_owners_workers_and_holders(filled: Bus, tmp_path: Path) -> None:
    found = json.loads(run(filled, tmp_path, "status", "--json"))
    assert found["partitions"] == 4, "as deployed, whatever the settings here say"
    ticks = next(s for s in found["streams"] if (s["topic"], s["partition"]) == ("ticks", 1))
    stage = ticks["consumers"][0]
    assert (stage["name"], stage["owner"]) == ("aggregate", "worker-a")
    assert (stage["behind_records"], stage["behind_entries"], stage["exact"]) == (3, 3, True)
    assert stage["holds_trimming"]
    sink = next(s for s in found["streams"] if s["topic"] == "candles")["consumers"][0]
    assert (sink["name"], sink["behind_records"]) == ("sink-sqlite", 2)
    assert {w["worker"]: w["alive"] for w in found["workers"]} == {"worker-a": True, "worker-b": False}
    assert found["feeds"]["files"]["state"] == "connected"
    text = run(filled, tmp_path, "status")
    for said in (
        "feed files: connected",
        "worker worker-b: dead",
        "trimming of ticks 1 waits for aggregate",
        "2023-12-25T23:00:03",
    ):
        assert said in text


def test_looking_changes_nothing(filled: Bus, tmp_path: Path) -> None:
    def dump() -> dict[bytes, bytes]:
        return {key: filled.client.dump(key) for key in filled.client.scan_iter(f"{filled.keys.namespace}:*")}

    before = dump()
    for args in (("status",), ("tail", "ticks", "--no-follow"), ("streams", "list"), ("doctor",)):
        tapeline(*args, cwd=tmp_path, REDIS_URL=filled.url, TAPELINE_NAMESPACE=filled.keys.namespace)
    assert dump() == before


def test_tail_ticks_has_symbols_from_all_partitions(filled: Bus, tmp_path: Path) -> None:
    found = lines(run(filled, tmp_path, "tail", "ticks", "--no-follow", "--json"))
    assert [r["symbol"] for r in found] == ["ESH4"] * 3 + ["CLG4"] * 3
    assert (found[0]["price"], found[0]["side"], found[0]["bid_px"]) == (4800.25, "buy", None)
    assert found[0]["time"] == "2023-12-25T23:00:00.000000000Z"
    text = run(filled, tmp_path, "tail", "ticks", "--no-follow", "--symbol", "cl")
    assert len(text.splitlines()) == 3
    assert "CLG4" in text.splitlines()[0]
    assert "4800.25 x 2" in text.splitlines()[0]


def test_tail_candles_with_names_and_revisions(filled: Bus, tmp_path: Path) -> None:
    found = lines(run(filled, tmp_path, "tail", "candles", "--from", "-1h", "--count", "2", "--json"))
    assert [(r["ticker"], r["symbol"], r["revision"]) for r in found] == [("ES", "ESH4", 0), ("ES", "ESH4", 1)]
    assert found[0]["vwap"] is None
    text = run(filled, tmp_path, "tail", "candles", "--no-follow", "--symbol", "ESH4")
    assert "2023-12-25T23:01:00Z  1m  ES" in text
    assert "incomplete  revision 1" in text
    assert run(filled, tmp_path, "tail", "candles", "--no-follow", "--symbol", "NQ") == ""


@pytest.mark.parametrize(
    ("topic", "says"),
    [
        ("late", "200.000 s late"),
        ("gaps", "files gap (all symbols): the machine slept"),
        ("gaps", "files dropped: EOF"),
        ("clocks", "2023-12-25T23:00:09.000000000Z  files  ends here"),
        ("clocks", "2023-12-25T23:00:03.000000000Z  files"),
        ("instruments", "ESH4         GLBX     root ES"),
    ],
)
def test_tail_of_the_other_topics(filled: Bus, tmp_path: Path, topic: str, says: str) -> None:
    assert says in run(filled, tmp_path, "tail", topic, "--no-follow")
    assert all(r["type"] for r in lines(run(filled, tmp_path, "tail", topic, "--no-follow", "--json")))


DERIBIT = "deribit"
PERP = Instrument(
    id=instrument_id(DERIBIT, "BTC-PERPETUAL"), venue=DERIBIT, symbol="BTC-PERPETUAL", root="deribit:BTC",
    feed="tardis-files:deribit", ticker="deribit:BTC-PERPETUAL",
)  # fmt: skip
CALL = Instrument(
    id=instrument_id(DERIBIT, "BTC-28JUN24-70000-C"), venue=DERIBIT, symbol="BTC-28JUN24-70000-C", root="deribit:BTC",
    feed="tardis-files:deribit", kind="C", strike=70000.0,
)  # fmt: skip


def tick_rows() -> Frame:
    """One record of every kind, with a clock of the exchange's own feed between."""
    rows = np.zeros(10, TICK)
    rows["ts_event_ns"], rows["ts_recv_ns"], rows["instrument"] = T0, T0 + 5, PERP.id
    for name in ("price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz"):
        rows[name] = np.nan
    rows["kind"] = [BOOK, BOOK, CLOCK, TRADE, TICKER, LIQUIDATION, OPTION, OPTION, OPTION, BOOK]
    rows["part"] = [0, 1, 0, 0, 0, 0, 0, 1, 2, 0]
    rows["instrument"][6:9], rows["instrument"][2] = CALL.id, feed_id("tardis-files:deribit")
    rows[["price", "size", "bid_px", "bid_sz", "ask_px", "ask_sz"]][:2] = [
        (0.25, 2, 67000.5, 30, 67001, 10), (np.nan, np.nan, 67000, 40, np.nan, 0)
    ]  # fmt: skip
    rows[["price", "size", "side"]][3] = (67001, 120, 1)
    rows[["price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz", "sequence"]][4] = (
        67001, 5e8, 67000.25, 66999.75, 0.0001, np.nan, T0 // NS + 3600,
    )  # fmt: skip
    rows[["price", "size", "side"]][5] = (66990, 10, 1)
    rows[["price", "size", "bid_px", "bid_sz", "ask_px", "ask_sz"]][6] = (0.05, 33, 0.049, 1, 0.051, 2)
    rows[["price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz"]][7] = (0.0501, 67000, 48, 52, 50, 0.4)
    rows[["price", "size", "bid_px", "ask_px"]][8] = (0.00002, 80, -60, 20)
    rows[["size", "bid_px", "bid_sz", "ask_px", "ask_sz"]][9] = (1, 67000.5, 31, 67001, 11)
    return tick_frame(rows, "tardis-files")


@pytest.fixture
def crypto(bus: Bus) -> Bus:
    """A feed of several kinds of records, dropped and back again, in two partitions."""
    bus.deploy(4)
    for p in (0, 3):
        fields = {str(i.id): msgspec.json.encode(i) for i in (PERP, CALL)}
        bus.call("hset", bus.keys.instruments(p), mapping=fields)
        drop = Disconnect("tardis-files:deribit", T0 + NS, "the exchange dropped", T0, ("BTC-PERPETUAL",))
        gap = Gap("tardis-files:deribit", T0, T0 + 3 * NS, "the exchange dropped", ("BTC-PERPETUAL",))
        publish(bus, p, message("disconnect", drop), message("gap", gap))
    publish(bus, 3, tick_rows())
    return bus


def test_tail_ticks_shows_every_kind_of_record(crypto: Bus, tmp_path: Path) -> None:
    found = lines(run(crypto, tmp_path, "tail", "ticks", "--no-follow", "--json"))
    assert [r["type"] for r in found] == ["book", "trade", "ticker", "liquidation", "option_summary", "book"]
    book, trade, ticker, liquidation, option, quote = found
    assert (book["exchange"], book["symbol"], book["depth"], book["book_imbalance_5"]) == (
        "deribit", "BTC-PERPETUAL", 2, 0.25,
    )  # fmt: skip
    assert (book["bids"], book["asks"]) == ([[67000.5, 30.0], [67000.0, 40.0]], [[67001.0, 10.0]])
    assert (trade["price"], trade["size"], trade["side"], trade["bid_px"]) == (67001.0, 120.0, "buy", None)
    assert (ticker["mark_price"], ticker["index_price"], ticker["funding_rate"]) == (67000.25, 66999.75, 0.0001)
    assert (ticker["funding_time"], ticker["predicted_funding_rate"]) == ("2023-12-26T00:00:00Z", None)
    assert liquidation["liquidated"] == "short"
    assert (option["mark_iv"], option["delta"], option["gamma"], option["rho"]) == (50.0, 0.4, 0.00002, 20.0)
    assert (quote["depth"], quote["book_imbalance_5"]) == (1, None)
    text = run(crypto, tmp_path, "tail", "ticks", "--no-follow")
    for said in (
        "deribit:BTC-PERPETUAL book of 2  bid 67000.5 x 30  ask 67001 x 10  imbalance 0.25",
        "67001 x 120    buy\n",
        "ticker  last 67001  mark 67000.25  index 66999.75  open interest 500000000  funding 0.0001  next funding 2023",
        "liquidation  66990 x 10  short liquidated",
        "option  bid 0.049 x 1  ask 0.051 x 2  last 0.05  mark 0.0501  underlying 67000  IV 50",
        "quote  bid 67000.5 x 31  ask 67001 x 11",
    ):
        assert said in text


@pytest.mark.parametrize("name", ["BTC-PERPETUAL", "btcperpetual", "deribit:BTC-PERPETUAL", "BTC"])
def test_tail_of_a_symbol_however_written(crypto: Bus, tmp_path: Path, name: str) -> None:
    found = lines(run(crypto, tmp_path, "tail", "ticks", "--no-follow", "--json", "--symbol", name))
    assert {r["symbol"] for r in found} == {"BTC-PERPETUAL"}
    assert run(crypto, tmp_path, "tail", "ticks", "--no-follow", "--symbol", f"{name}X") == ""


def test_a_gap_of_all_partitions_is_told_once(crypto: Bus, tmp_path: Path) -> None:
    found = lines(run(crypto, tmp_path, "tail", "gaps", "--no-follow", "--json"))
    assert [(r["type"], r["symbols"]) for r in found] == [("disconnect", ["BTC-PERPETUAL"]), ("gap", ["BTC-PERPETUAL"])]
    assert found[0]["since"] == "2023-12-25T23:00:00.000000000Z"
    text = run(crypto, tmp_path, "tail", "gaps", "--no-follow", "--symbol", "deribit:BTC-PERPETUAL")
    assert "dropped: the exchange dropped (BTC-PERPETUAL suspect since 2023-12-25T23:00:00.000000000Z)" in text
    assert run(crypto, tmp_path, "tail", "gaps", "--no-follow", "--symbol", "ETH-PERPETUAL") == ""


def test_clocks_of_a_producer_of_several_feeds_have_their_names(crypto: Bus, tmp_path: Path) -> None:
    found = lines(run(crypto, tmp_path, "tail", "clocks", "--no-follow", "--json"))
    assert [r["feed"] for r in found] == ["tardis-files:deribit"]


def test_tail_and_status_of_fixed_candles_and_named_feeds(bus: Bus, tmp_path: Path) -> None:
    bus.deploy(4)
    state = {"state": "connected", "detail": "[3 symbols]", "published": 1234}
    bus.call("hset", bus.keys.feeds, "tardis:binance-futures", msgspec.json.encode(state))
    publish_candles(bus, 2, fixed(("binance-futures", "BTCUSDT"), close=61000.5))
    text = run(bus, tmp_path, "tail", "candles", "--no-follow")
    assert "2023-12-25T23:00:00Z  1m  binance-futures:BTCUSDT O 61000 H 61001 L 60999.5 C 61000.5" in text
    record = lines(run(bus, tmp_path, "tail", "candles", "--no-follow", "--json", "--symbol", "BTC-USDT"))[0]
    assert (record["exchange"], record["timeframe"], record["sma_20"], record["complete"]) == (
        "binance-futures", "1m", None, True,
    )  # fmt: skip
    told = run(bus, tmp_path, "status")
    assert "feed tardis:binance-futures: connected ([3 symbols]), 1,234 records published" in told


def fixed(name: tuple[str, str], seconds: int = 60, start_ns: int = T0, **values: float) -> Frame:
    """A frame of one fixed candle; features are not warm unless given."""
    row = np.zeros(1, FIXED)
    for column in (*STATE_COLUMNS, *FEATURE_COLUMNS):
        row[column] = np.nan
    given = {
        "open": 61000.0, "high": 61001.0, "low": 60999.5, "close": 61000.0, "volume": 2.5, "trades": 30, "complete": 1,
        "time_ns": start_ns, "timeframe_sec": seconds, "timestamp_out_ns": start_ns + seconds * NS + 7_000_000,
    } | values  # fmt: skip
    for column, value in given.items():
        row[column] = value
    return Frame("candle", 1, start_ns, start_ns + seconds * NS, "aggregate", row.tobytes(), names=[name])


def publish_candles(bus: Bus, partition: int, *frames: Frame) -> None:
    """As the aggregate stage commits them: behind one more frame of ticks."""
    publish(bus, partition, message("clock", Clock("files", T0)))
    token = bus.acquire(partition, "aggregate", "worker-a", 60_000)
    assert token
    position, seq, _ = bus.load(partition, "aggregate", "ticks")
    newest = bus.last_id(partition, "ticks")
    for number, frame in enumerate(frames, seq + 1):
        frame.seq = number
    step = Step(token, "aggregate", position, newest, 0, T0, seq + len(frames), {}, (), {"candles": list(frames)})
    assert bus.commit(partition, "ticks", step)
    bus.release(partition, "aggregate", token)


@pytest.fixture
def options(bus: Bus) -> Bus:
    """Pressure, signals and usage, with what cannot be read among them."""
    bus.deploy(4)
    crypto = tape.pressure(1, underlying="deribit:BTC", dominant_side="SELL", ask_volume=0.25, complete=True)
    stage = tape.Stage(bus, 1, "pressure")
    stage.put(
        tape.said(tape.pressure(0, ask_volume=30.0, bid_volume=2.0, log_ratio=2.501, confidence=0.875, revision=1)),
        Frame("unreadable", 1, 0, 0, "", b"why\n"), Frame("pressure", 1, 0, 0, "x", b"[{\xff"), topic="pressure",
    )  # fmt: skip
    stage.put(tape.said(crypto), tape.said(tape.rollup(0, call_volume=100.0, put_volume=50.0, net_premium=-1250.0)))
    rejected = tape.signal(3, status="rejected", reason="a straddle by a market maker", direction="SELL", score=0.1)
    plugin = tape.signal(0, option_type="", types=(), signal_type="my_own", components=None, source="mine")
    tape.Stage(bus, 2, "signals").put(tape.said(tape.signal(0), rejected), tape.said(plugin))
    feed = tape.Feed(bus, "usage-databento", 3, topic="usage")
    feed.put(tape.said(tape.usage(0), tape.usage(1, state="stopped", day_cost_usd=20.5)))
    return bus


def test_tail_of_pressure_signals_and_usage_a_line_each(options: Bus, tmp_path: Path) -> None:
    told = {topic: run(options, tmp_path, "tail", topic, "--no-follow") for topic in ("pressure", "signals", "usage")}
    assert told["pressure"].splitlines() == [
        "2023-12-25T23:00:00Z  NQ     2024-03-29 17000.5 C  BUY     ask 30 bid 2  log ratio 2.501  confidence 0.875  "
        "n 20  incomplete  revision 1",
        "2023-12-25T23:00:00Z  deribit:BTC 2024-03-29 17000.5 P  SELL    ask 0.25 bid 9.75  log ratio 14.75  "
        "confidence 0.1  n 21",
        "2023-12-25T23:00:00Z  NQ     all of 4 strikes  calls 100  puts 50  put/call 0.5  net premium -1250  n 90",
    ]
    assert told["signals"].splitlines() == [
        "2023-12-25T23:00:00Z  NQ     2024-03-29 17000.5 C  BUY  HIGH      0.75  block, sweep",
        "2023-12-25T23:00:00Z  NQ     2024-03-29 17050.5 P  SELL HIGH      0.1  block, sweep  "
        "rejected (a straddle by a market maker)",
        "2023-12-25T23:00:00Z  NQ     all strikes  BUY  HIGH      0.75  my_own",
    ]
    assert told["usage"].splitlines() == [
        "2023-12-25T23:01:00Z  databento  10 events  800 bytes  0.02 USD  day 0.02 of 25 USD",
        "2023-12-25T23:02:00Z  databento  11 events  801 bytes  0.02 USD  day 20.5 of 25 USD  stopped",
    ]


def test_tail_of_options_as_whole_records(options: Bus, tmp_path: Path) -> None:
    """Every field, those at their default, too."""
    found = lines(run(options, tmp_path, "tail", "pressure", "--no-follow", "--json"))
    assert [r["type"] for r in found] == ["pressure", "pressure", "pressure_rollup"]
    assert set(tape.Pressure.__struct_fields__) <= set(found[0])
    assert (found[0]["time"], found[0]["expiration"], found[0]["timestamp_out"], found[1]["pressure_ratio"]) == (
        "2023-12-25T23:00:00.000000000Z", "2024-03-29T08:00:00.000000000Z", "2023-12-25T23:05:00.002500000Z", None,
    )  # fmt: skip
    assert (found[1]["revision"], found[1]["complete"], found[2]["top_strikes"][0]["strike"]) == (0, True, 17000.5)
    signal = lines(run(options, tmp_path, "tail", "signals", "--no-follow", "--json"))[0]
    assert set(tape.Signal.__struct_fields__) <= set(signal)
    assert set(signal["components"]) == set(tape.Components.__struct_fields__)
    assert (signal["status"], signal["types"], signal["source"]) == ("emitted", ["block", "sweep"], "tapeline")
    spent = lines(run(options, tmp_path, "tail", "usage", "--no-follow", "--json"))[0]
    assert set(spent) == {"type", "time", *tape.Usage.__struct_fields__}


@pytest.mark.parametrize(
    ("topic", "symbol", "underlyings"),
    [
        ("pressure", "nq", ["NQ", "NQ"]),
        ("pressure", "BTC", ["deribit:BTC"]),
        ("pressure", "deribit:BTC", ["deribit:BTC"]),
        ("pressure", "ES", []),
        ("signals", "NQ", ["NQ"] * 3),
        ("signals", "BTC", []),
        ("usage", "NQ", []),
    ],
)
def test_tail_of_one_underlying(options: Bus, topic: str, symbol: str, underlyings: list[str]) -> None:
    found = Tail(options, 4, topic, symbol).records("0-0", False, threading.Event())
    assert [r["underlying"] for r in found] == underlyings


def test_tail_from_an_instant(filled: Bus, tmp_path: Path) -> None:
    assert run(filled, tmp_path, "tail", "ticks", "--no-follow", "--from", "2099-01-01T00:00:00Z") == ""
    assert run(filled, tmp_path, "tail", "ticks", "--no-follow", "--from", "2020-01-01") != ""
    done = tapeline("tail", "ticks", "--from", "noon", cwd=tmp_path, REDIS_URL=filled.url)
    assert done.returncode == 1
    assert "--from wants" in done.stderr


def test_tail_keeps_the_order_of_arrival_over_many_frames(bus: Bus, tmp_path: Path) -> None:
    bus.deploy(4)
    for i in range(150):
        publish(bus, 1 + i % 2, trades(i, 1, float(i)))
    found = lines(run(bus, tmp_path, "tail", "ticks", "--no-follow", "--json"))
    assert sorted(r["price"] for r in found) == list(range(150))
    entries = [(e[0], p) for p in (1, 2) for e in bus.client.xrange(bus.keys.stream(p, "ticks"))]
    wanted = [p for _, p in sorted(entries, key=lambda e: (tuple(map(int, e[0].split(b"-"))), e[1]))]
    assert [r["partition"] for r in found] == wanted


def test_streams_list_info_trim_and_drop(filled: Bus, tmp_path: Path) -> None:
    listed = json.loads(run(filled, tmp_path, "streams", "list", "--json"))
    assert {(s["topic"], s["partition"]) for s in listed} == {("ticks", 1), ("ticks", 2), ("candles", 1), ("late", 1)}
    assert "sink-sqlite: at 0-0, 2 records" in run(filled, tmp_path, "streams", "info", "candles", "1")
    assert tuple(json.loads(run(filled, tmp_path, "streams", "trim", "--json"))) == TOPICS
    dropped = json.loads(run(filled, tmp_path, "streams", "drop-consumer", "sink-sqlite", "--yes", "--json"))
    assert dropped == {"consumer": "sink-sqlite", "streams": 1}
    again = tapeline("streams", "drop-consumer", "sink-sqlite", "--yes", cwd=tmp_path, REDIS_URL=filled.url,
                     TAPELINE_NAMESPACE=filled.keys.namespace)  # fmt: skip
    assert again.returncode == 1
    assert "no consumer 'sink-sqlite'" in again.stderr


def test_records_are_counted_by_kind_exactly_once(filled: Bus) -> None:
    info = filled.client.hgetall(filled.keys.info(1, "ticks"))
    kinds = {k.decode(): int(v) for k, v in info.items() if k.startswith(b"kind:")}
    assert kinds == {"kind:instrument": 1, "kind:trade": 3, "kind:gap": 1, "kind:disconnect": 1, "kind:clock": 1}
    made = filled.client.hgetall(filled.keys.info(1, "candles"))
    assert made[b"kind:candle_1m"] == b"2"


def test_doctor_on_a_bus_that_may_lose_data(redis_server: Any, tmp_path: Path) -> None:
    bus = Bus(redis_server.url)
    done = tapeline("doctor", "--json", cwd=tmp_path, REDIS_URL=redis_server.url)
    assert {f["check"]: f["fine"] for f in json.loads(done.stdout)}["redis"]
    bus.call("config_set", "maxmemory-policy", "allkeys-lru")
    try:
        done = tapeline("doctor", "--json", cwd=tmp_path, REDIS_URL=redis_server.url)
        says = {f["check"]: f["says"] for f in json.loads(done.stdout)}["redis"]
        assert "CONFIG SET maxmemory-policy noeviction" in says
    finally:
        bus.call("config_set", "maxmemory-policy", "noeviction")
        bus.close()


def test_how_far_behind_is_how_long_the_oldest_entry_waits(bus: Bus) -> None:
    stream = bus.keys.stream(0, "ticks")
    now = redis_now_ms(bus)
    for age in (900_000, 30_000, 10_000):  # the first one taken: only what waits behind it counts
        publish_at(bus, stream, f"{now - age}-0")
    bus.call("hset", bus.keys.info(0, "ticks"), "records", 3)
    bus.call("hset", bus.keys.consumers(0, "ticks"), "aggregate", f"{now - 900_000}-0")
    reader = Reader(bus, 1, 5.0)
    found = reader.stream(0, "ticks", now)
    assert found
    assert [(c.behind_entries, c.behind_seconds) for c in found.consumers] == [(2, 30.0)]
    bus.call("hset", bus.keys.consumers(0, "ticks"), "aggregate", f"{now - 10_000}-0")
    found = reader.stream(0, "ticks", now)
    assert found
    assert [(c.behind_entries, c.behind_seconds) for c in found.consumers] == [(0, 0.0)]


def publish_at(bus: Bus, stream: str, entry_id: str) -> None:
    bus.call("xadd", stream, {"kind": "clock", "count": 1, "last": "x"}, id=entry_id)
