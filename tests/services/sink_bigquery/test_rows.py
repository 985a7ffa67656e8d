"""Rows as BigQuery takes them, without a BigQuery."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from pyarrow import parquet

from services.sink_bigquery.append import Encoder
from services.sink_bigquery.ledger import Announced, Part, instant_of
from services.sink_bigquery.method_write import REQUEST_BYTES, _requests
from services.sink_bigquery.rows import json_row, letters, one, ready, refusals
from services.sink_bigquery.tables import EVERY, LAYOUTS, LEDGER
from shared.batches import Cursor, DeadLetter, Source
from shared.frames import NS
from tests.services.sink_bigquery.stores import batch
from tests.services.sink_sqlite.tape import T0, candles, gap, late, rows, said, signal

AT = T0 // 1000 + 123_456


def values(table: str, **some: Any) -> list[list[Any]]:
    """One sound row of a table, by column."""
    sound = {"STRING": "x", "INT64": 1, "FLOAT64": 1.5, "BOOL": True, "TIMESTAMP": AT}
    layout = LAYOUTS[table]
    return [[some.get(name, sound[layout.type_of(name)])] for name in layout.names]


def test_values_and_types() -> None:
    made = rows(3)
    made["vwap"][1] = np.nan
    found, dead = ready(batch(candles(made), late(1), gap(T0), said(signal())), AT)
    assert not dead
    tables = {some.layout.name: some for some in found}
    assert set(tables) == {"candles_1m", "late_trades", "gaps", "signals"}
    table = parquet.read_table(io.BytesIO(tables["candles_1m"].parquet()))
    assert [(f.name, str(f.type)) for f in table.schema][:4] == [
        ("time", "timestamp[us, tz=UTC]"), ("ticker", "string"), ("symbol", "string"), ("open", "double"),
    ]  # fmt: skip
    first = table.to_pylist()[0]
    assert first["time"].isoformat() == "2023-12-25T23:01:00+00:00"
    assert first["timestamp_out"].isoformat() == "2023-12-25T23:01:00.500123+00:00"
    assert first["complete"] in (True, False)
    assert [row["vwap"] is None for row in table.to_pylist()] == [True, True, False]
    assert {row["stored_at"].isoformat() for row in table.to_pylist()} == {"2023-12-25T23:01:00.123456+00:00"}
    assert next(tables["signals"].values())["types"] == '["block","sweep"]'
    assert next(tables["late_trades"].values())["ts_event_ns"] == T0 + 7
    assert tables["candles_1m"].span_us() == (T0 // 1000, T0 // 1000 + 1_000_000)


@pytest.mark.parametrize(
    ("table", "wrong", "reason"),
    [
        ("candles_1m", {"ticker": "a\ud800"}, "ticker is no STRING (UnicodeEncodeError)"),
        ("candles_1m", {"symbol": None}, "symbol is undefined"),
        ("candles_1m", {"trades": 1 << 70}, "trades is no INT64 (OverflowError)"),
        ("candles", {"high": 1.0, "low": 2.0}, "high is below low"),
        ("candles_1s", {"volume": -1.0}, "volume, trades and revision must be 0 or more"),
        ("signals", {"score": None}, "score is undefined"),
        ("usage_log", {"bytes": "many"}, "bytes is no INT64 (ArrowInvalid)"),
        ("ticks_trades", {"timestamp": 1 << 64}, "timestamp is no TIMESTAMP (OverflowError)"),
    ],
)
def test_what_bigquery_cannot_take(table: str, wrong: dict[str, Any], reason: str) -> None:
    layout = LAYOUTS[table]
    three = [a + b + a for a, b in zip(values(table), values(table, **wrong), strict=True)]
    assert refusals(layout, three) == {1: reason}
    assert refusals(layout, values(table)) == {}


def test_what_is_optional_may_be_undefined() -> None:
    assert not refusals(LAYOUTS["signals"], values("signals", z=None, cluster_size=None))
    assert not refusals(LAYOUTS["ticks_options_chain"], values("ticks_options_chain", expiration=None, strike=None))
    assert not refusals(LAYOUTS["candles"], values("candles", high=None, rsi_5=None))


def test_the_row_that_a_refused_one_superseded_is_stored() -> None:
    better, worse = rows(2, revision=2), rows(2, revision=1)
    better["low"][0] = better["high"][0] + 1
    found, dead = ready(batch(candles(worse), candles(better)), AT)
    assert [d.reason for d in dead] == ["high is below low"]
    assert sorted((row["ticker"], row["revision"]) for row in found[0].values()) == [("6E", 2), ("ES", 1)]
    assert found[0].letter is not None
    assert found[0].letter(1, "x").row == 0


def test_protocol_buffers_hold_the_same() -> None:
    found, _ = ready(batch(candles(rows(5))), AT)
    encoder = Encoder(LAYOUTS["candles_1m"])
    encoded = encoder.rows(found[0].values())
    pool = descriptor_pool.DescriptorPool()
    file = FileDescriptorProto(name="x.proto", package="t", syntax="proto2", message_type=[encoder.descriptor])
    pool.Add(file)
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{encoder.descriptor.name}"))
    for data, wanted in zip(encoded, found[0].values(), strict=True):
        got = message.FromString(data)
        assert {field.name: value for field, value in got.ListFields()} == wanted


def test_json_rows() -> None:
    layout = LAYOUTS["candles_1m"]
    got = json_row({"time": AT, "open": float("inf"), "close": 1.5, "complete": True, "trades": 3}, layout)
    assert got == {
        "time": "2023-12-25T23:01:00.123456Z", "open": "Infinity", "close": 1.5, "complete": True, "trades": 3,
    }  # fmt: skip


def test_requests_are_small_enough() -> None:
    many = [b"x" * (3 << 20)] * 5 + [b"y"] * 10
    ends = _requests(many)
    assert ends == [2, 4, 15]
    begin = 0
    for end in ends:
        assert sum(map(len, many[begin:end])) <= REQUEST_BYTES
        begin = end
    assert _requests([]) == []


def test_dead_letters_are_text_whatever_they_hold() -> None:
    made = letters([DeadLetter(Source("a", "candles", 0, 3, "5-1"), "candles", 2, "bad \ud800", "{}")], AT)
    assert next(made.values()) == {
        "at": AT, "bus": "a", "topic": "candles", "partition": 0, "seq": 3, "stream_id": "5-1",
        "table_name": "candles", "row_number": 2, "reason": "bad ?", "row": "{}", "stored_at": AT,
    }  # fmt: skip
    assert made.arrow().num_rows == 1


def test_an_announcement_is_a_row() -> None:
    key, fresh = ("a", "candles", 3), ("a", "late", 0)
    ends = {key: Cursor(9, "9-0"), fresh: Cursor(1, "1-0"), ("a", "ticks", 1): Cursor(5, "5-2")}
    begins = {key: Cursor(4, "4-0"), fresh: None}
    entry = Announced("a", 7, AT, "load", "me", begins=begins, ends=ends, tables={"candles": Part(3)})
    assert entry.before == {key: Cursor(4, "4-0"), ("a", "ticks", 1): Cursor(5, "5-2")}
    assert entry.changed == {key: Cursor(9, "9-0"), fresh: Cursor(1, "1-0")}
    row = one(LEDGER, entry.row())
    assert not refusals(EVERY[LEDGER], row.columns[:-1])
    assert instant_of(AT) == "2023-12-25T23:01:00.123456Z"
    assert instant_of(-1) == "1969-12-31T23:59:59.999999Z"
    assert AT * 1000 > NS
