"""Dead letters back into rows: what was refused, as values that a store writes.

A row in a letter has either the columns of its table, as the store would have written it, or the fields that it had
on the bus, for one that was refused before (a number for its name, times in ns, parts of ticks).
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import msgspec
import numpy as np

from shared.batches import Batch, Chunk, DeadLetter, Item, MessageRow, Source, batch_of
from shared.errors import RowRejected
from shared.frames import CANDLE, FIXED, NS, PACKED, TICK, TICK_FRAMES, Frame, iso
from shared.instants import HIGHEST, LOWEST, instant_ns
from shared.message_check import wrong
from shared.messages import AnyMessage, Instrument
from shared.store_rows import Bound, Form, Prepared, prepare
from shared.tables import (
    GAP_COLUMNS,
    LATE_COLUMNS,
    MESSAGE_TABLES,
    TABLES,
    TICK_TABLES,
    UNDEFINED,
    Table,
    instant_unit,
)  # fmt: skip
from shared.tick_records import SIDES
from shared.timeframes import LONGEST_SEC, name_of, seconds_of

_CANDLES = {table.name: table for table in TABLES.values()}
_TICKS = {table.name: table for table in TICK_TABLES.values()}
_MESSAGES = {table.name: (kind, table) for kind, tables in MESSAGE_TABLES.items() for table in tables}
# Of the tables whose columns say no sort themselves; what is neither is a real number.
_TEXTS = frozenset(("bus", "exchange", "symbol", "ticker", "side", "option_type", "underlying", "feed", "symbols",
                    "reason", "timeframe"))  # fmt: skip
_INTEGERS = frozenset(("timestamp_ns", "local_timestamp_ns", "sequence", "depth", "partition", "entry_ms", "entry_seq",
                       "row", "bus_seq", "ts_event_ns", "ts_recv_ns", "watermark_ns", "start_ns",
                       "end_ns"))  # fmt: skip
_PLACE = ("bus", "partition", "bus_seq", "row")


@dataclass(frozen=True, slots=True)
class Letter:
    """A stored dead letter. `row` is JSON; `row_number` is -1 for a whole frame. `id` is the store's own."""

    id: str
    at: str
    bus: str
    topic: str
    partition: int
    seq: int
    stream_id: str
    table_name: str
    row_number: int
    reason: str
    row: str

    @property
    def source(self) -> Source:
        """Where on the bus it came from."""
        return Source(self.bus, self.topic, self.partition, self.seq, self.stream_id)

    @property
    def is_frame(self) -> bool:
        return self.row_number < 0


@dataclass(slots=True)
class Restored:
    """What a letter is made of: rows by table, gaps, and of a whole frame those rows that are letters of their own."""

    prepared: list[Prepared]
    batch: Batch = field(default_factory=Batch)  # of which only the gaps are still to be written
    dead: list[DeadLetter] = field(default_factory=list)


class Sort(NamedTuple):
    """What a column holds: text, real, integer, boolean, json, or time with its unit (s, us, ns)."""

    name: str
    unit: str = ""


@cache
def columns_of(table: str) -> Mapping[str, Sort]:
    """The columns of a table that rows go into, in its order; empty for any other."""
    if table in _MESSAGES:
        return {c.name: Sort(c.sort, c.unit if c.sort == "time" else "") for c in _MESSAGES[table][1].columns}
    if table in _CANDLES:
        dtype = FIXED if table == "candles" else CANDLE
        whole = {name for name in dtype.names or () if dtype[name].kind == "i"} - {"name"}
        return {c: _sort(table, c, whole) for c in _CANDLES[table].columns}
    others = {"late_trades": LATE_COLUMNS, "gaps": GAP_COLUMNS} | {t.name: t.columns for t in _TICKS.values()}
    return {c: _sort(table, c, _INTEGERS) for c in others.get(table, ())}


def _sort(table: str, column: str, whole: frozenset[str] | set[str]) -> Sort:
    unit = instant_unit(table, column)
    if unit is not None:
        return Sort("time", unit)
    if column == "complete":
        return Sort("boolean")
    if column in ("bids", "asks"):
        return Sort("json")
    return Sort("text" if column in _TEXTS else "integer" if column in whole else "real")


def restore(letter: Letter, form: Form) -> Restored:
    """What a letter was to be in its store. Raises RowRejected that says why it cannot be that."""
    if letter.is_frame:
        return _frame(letter, form)
    values = values_of(letter)
    source, number = letter.source, letter.row_number
    if raw_message(letter, values):
        return Restored(_message(letter, values, form))
    if raw_tick(letter, values):
        return Restored(_tick(letter, values, form))
    if letter.table_name in _CANDLES:
        values = _candle(_CANDLES[letter.table_name], values)
    elif letter.table_name == "late_trades":
        values = _late(letter, values)
    return Restored([from_plain(letter.table_name, [values], form, [source], [number])])


def values_of(letter: Letter) -> dict[str, Any]:
    """The values of a row. Raises RowRejected for a letter that holds none."""
    try:
        values = json.loads(letter.row)
    except (ValueError, RecursionError):
        raise RowRejected("the letter's row is no JSON") from None
    if not isinstance(values, dict):
        raise RowRejected("the letter's row is no JSON object")
    if list(values) == ["values"]:
        raise RowRejected("its values were nested too deeply to be kept")
    return values


def raw_message(letter: Letter, values: Mapping[str, Any]) -> bool:
    """Whether the row has a message's fields, not the columns of its table."""
    return letter.table_name in _MESSAGES and _MESSAGES[letter.table_name][1].time not in values


def raw_tick(letter: Letter, values: Mapping[str, Any]) -> bool:
    """Whether the row has the fields of a tick, not the columns of a table."""
    return (letter.table_name in _TICKS or letter.table_name == "ticks") and "instrument" in values


def from_plain(
    table: str, rows: Sequence[Mapping[str, Any]], form: Form, sources: Sequence[Source], numbers: Sequence[int]
) -> Prepared:
    """Rows by column, as JSON tells them, as a store's own values; row i is row `numbers[i]` of `sources[i]`.

    Instants are ISO texts of any precision, or ns where a row has `<column>_ns` instead. Raises RowRejected with the
    column and what is wrong with it.
    """
    columns = columns_of(table)
    if not columns:
        raise RowRejected(f"no table '{table}' takes rows")
    made = [_column(name, sort, [_cell(row, name) for row in rows], form) for name, sort in columns.items()]
    every = np.arange(len(rows))
    none = Bound([], every[:0], every[:0])
    return Prepared(
        table, tuple(columns), Bound(made, every, every), none, list(sources), every, np.asarray(numbers, np.int64)
    )


def _cell(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    ns = row.get(f"{name}_ns")
    if not isinstance(ns, int):
        raise RowRejected(f"the letter has no {name}")
    if not LOWEST <= ns <= HIGHEST:
        raise RowRejected(f"{name}_ns {ns} cannot be")
    return iso(ns)


def _column(name: str, sort: Sort, cells: list[Any], form: Form) -> list[Any]:
    values = [None if cell is None else plain(name, sort, cell) for cell in cells]
    if sort.name == "time":
        return form.instants(np.array([UNDEFINED if v is None else v for v in values], np.int64), sort.unit)
    if sort.name == "real":
        return form.reals(np.array([np.nan if v is None else v for v in values], np.float64))
    if sort.name in ("boolean", "json"):
        held = [v for v in values if v is not None]
        told = iter(form.flags(np.array(held, bool)) if sort.name == "boolean" else form.json(held))
        return [None if v is None else next(told) for v in values]
    return values


def plain(name: str, sort: Sort, value: Any) -> Any:
    """A value of a column as its sort wants it (time: ns). Raises RowRejected."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if sort.name == "text" and isinstance(value, str):
        return value
    if sort.name == "real" and number and abs(value) <= 1.7976931348623157e308:
        return float(value)
    if sort.name == "integer" and number and abs(value) < 1 << 63 and value == int(value):
        return int(value)
    if sort.name == "boolean" and value in (0, 1):
        return bool(value)
    if sort.name == "json" and isinstance(value, list | dict):
        return value
    if sort.name == "json" and isinstance(value, str):
        try:
            return plain(name, sort, json.loads(value))
        except ValueError:
            raise RowRejected(f"{name} '{value}' is no JSON list") from None
    if sort.name == "time" and isinstance(value, str):
        try:
            ns = instant_ns(value)
        except ValueError as error:
            raise RowRejected(f"{name} {error}") from None
        if sort.unit == "s" and ns % NS:
            raise RowRejected(f"{name} '{value}' is no whole second")
        return ns
    what = {"real": "number", "integer": "whole number", "time": "instant", "boolean": "true or false"}
    raise RowRejected(f"{name} '{value}' is no {what.get(sort.name, sort.name)}")


# -- rows that were refused before they had the columns of a table ---------------------------


def _candle(table: Table, values: dict[str, Any]) -> dict[str, Any]:
    """A packed row's fields as columns; one that has the columns already is returned as it is."""
    row = dict(values)
    if table.time not in row and "time_ns" in row:
        row[f"{table.time}_ns"] = row["time_ns"]
    if "timeframe" in table.columns and "timeframe" not in row:
        seconds = row.get("timeframe_sec")
        if not isinstance(seconds, int) or not 0 < seconds <= LONGEST_SEC:
            raise RowRejected(f"timeframe_sec {seconds} is no timeframe: set timeframe=1m or the like")
        row["timeframe"] = name_of(seconds)
    _named(row, table.names)
    if "latency_ms" not in row:
        start, out = (plain(name, Sort("time"), _cell(row, name)) for name in (table.time, "timestamp_out"))
        length = seconds_of(str(row["timeframe"])) * NS if table.to_end_ns is None else table.to_end_ns
        row["latency_ms"] = (out - start - length) / 1e6
    return row


def _named(row: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        held = f" (number {row['name']} of its frame)" if "name" in row else ""
        raise RowRejected(f"what it is of was not kept{held}: set {' and '.join(f'{name}=…' for name in missing)}")


def _late(letter: Letter, values: dict[str, Any]) -> dict[str, Any]:
    row = dict(values)
    tick = row.pop("tick", None)
    if isinstance(tick, list) and len(tick) == len(TICK.names or ()):
        row = dict(zip(TICK.names or (), tick, strict=True)) | row
        if row["side"] in (-1, 0, 1):
            row["side"] = str(SIDES[row["side"] + 1])
    place = (letter.bus, letter.partition, letter.seq, letter.row_number)
    row = dict(zip(_PLACE, place, strict=True)) | row
    _named(row, ("ticker", "symbol"))
    return row


def _tick(letter: Letter, values: dict[str, Any], form: Form) -> list[Prepared]:
    """A tick's own row, under the exchange and symbol that it was given since."""
    row = np.zeros(1, TICK)
    try:
        if values["part"] != 0:
            raise RowRejected("it is a part of a record, whose other parts are letters of their own")
        for name in TICK.names or ():
            row[name] = np.nan if values[name] is None else values[name]
    except KeyError as error:
        raise RowRejected(f"the letter has no {error.args[0]}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise RowRejected(f"its values are none of a tick ({error})") from None
    _named(values, ("exchange", "symbol"))
    exchange, symbol, number = str(values["exchange"]), str(values["symbol"]), int(row["instrument"][0])
    of = Instrument(number, exchange, symbol, symbol, "")
    made, dead = prepare(Batch(ticks=[Chunk(letter.source, row, [], {number: of})]), form)
    if dead or not made:
        raise RowRejected(dead[0].reason if dead else "it is no record of any table")
    at = made[0].names.index("row")
    made[0].rows.columns[at] = [letter.row_number]
    return made


def _message(letter: Letter, values: dict[str, Any], form: Form) -> list[Prepared]:
    kind, _ = _MESSAGES[letter.table_name]
    try:
        message = msgspec.convert({"type": kind} | values, AnyMessage)
    except (msgspec.ValidationError, RecursionError) as error:
        raise RowRejected(f"no such message ({error})") from None
    reason = wrong(message)
    tables = MESSAGE_TABLES.get(str(message.__struct_config__.tag), ())
    if reason or not tables:
        raise RowRejected(reason or "no table takes such a message")
    row = MessageRow(letter.source, letter.row_number, message)
    return prepare(Batch(messages={table.name: [row] for table in tables}), form)[0]


# -- whole frames ----------------------------------------------------------------------------


def _frame(letter: Letter, form: Form) -> Restored:
    """The frame decoded as a sink does, which may know more than the one that buried it."""
    held = values_of(letter)
    kind, size = held.get("kind"), held.get("bytes")
    try:
        raw = base64.b64decode(str(held.get("body_base64")), validate=True)
    except binascii.Error:
        raise RowRejected("the letter's body is no base64") from None
    if not isinstance(kind, str):
        raise RowRejected(letter.reason)  # it was no frame of the bus, and is none now
    if not isinstance(size, int) or size != len(raw):
        raise RowRejected(f"only {len(raw)} of its {size} bytes were kept: it cannot be decoded again")
    if letter.topic == "ticks" and kind in TICK_FRAMES:
        raise RowRejected("whose ticks they are was not kept with the frame")
    names = [(str(a), str(b)) for a, b in held.get("names") or ()]
    if kind in PACKED and not names:
        raise RowRejected("whose rows they are was not kept with the frame")
    width = PACKED[kind].itemsize if kind in PACKED else 1
    count = int(held.get("count") or len(raw) // width)
    frame = Frame(kind, count, 0, 0, "", raw, letter.seq, names, letter.stream_id)
    batch = batch_of([Item(letter.source, frame)])
    whole = next((dead for dead in batch.dead if dead.row < 0), None)
    if whole is not None:
        raise RowRejected(whole.reason)
    prepared, unsound = prepare(batch, form)
    return Restored(prepared, batch, batch.dead + unsound)
