"""Rows of the bus as columns of a store's own values, in the column order of its tables.

What a row is, and which of two wins, is the same in every store; how a store wants an instant, an undefined
number, a flag or a list is its `Form`. Whole columns are converted at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.batches import (
    Batch,
    Chunk,
    DeadLetter,
    Joined,
    MessageRow,
    Source,
    dead_row,
    join,
    newest,
)  # fmt: skip
from shared.message_records import MessageRecords, message_records
from shared.tables import GAP_COLUMNS, INSTANTS, LATE_COLUMNS, MESSAGE_TABLES, TABLES, Column, MessageTable, Table
from shared.tick_records import SIDES, Records, records
from shared.timeframes import name_of

Values = tuple[Any, ...]


class Form(Protocol):
    """How a store writes values that differ from store to store; each takes and gives a whole column."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        """Instants (ns; UNDEFINED: none) at the precision `unit`: s, us or ns."""

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        """Numbers; NaN is undefined."""

    def flags(self, values: NDArray[Any]) -> list[Any]:
        """Booleans, from 0 and 1 or from bool."""

    def json(self, values: list[Any]) -> list[Any]:
        """Lists and objects."""


@dataclass(slots=True)
class Bound:
    """Rows ready to bind, column by column; `origin[i]` is row i's place among those read, `group[i]` its key.

    As columns, because rows made one by one while SQLite takes them stay out of the garbage
    collector's way, which a list of tuples does not (a third of the conversion's time).
    """

    columns: list[list[Any]]
    origin: NDArray[np.int64]
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.origin)

    def row(self, i: int) -> Values:
        """Values of one row."""
        return tuple(column[i] for column in self.columns)

    def only(self, index: list[int]) -> Bound:
        """Some of the rows."""
        return Bound([[column[i] for i in index] for column in self.columns], self.origin[index], self.group[index])


@dataclass(slots=True)
class Prepared:
    """What goes into one table. `spare` rows are superseded by one of `rows`: should the store refuse
    that one, they are next. What was read at place i is row `row[i]` of the frame of `sources[chunk[i]]`."""

    table: str
    names: tuple[str, ...]
    rows: Bound
    spare: Bound
    sources: list[Source]
    chunk: NDArray[np.int64]
    row: NDArray[np.int64]

    def dead(self, rows: Bound, i: int, reason: str) -> DeadLetter:
        """The dead letter of a refused row."""
        at = int(rows.origin[i])
        source = self.sources[int(self.chunk[at])]
        return dead_row(source, self.table, int(self.row[at]), reason, zip(self.names, rows.row(i), strict=True))


def prepare(batch: Batch, form: Form) -> tuple[list[Prepared], list[DeadLetter]]:
    """All tables of a batch but gaps and dead letters, and the rows that were no rows."""
    made: list[Prepared] = []
    dead: list[DeadLetter] = []
    for kind, chunks in batch.candles.items():
        if chunks:
            joined = join(chunks, TABLES[kind].name)
            made.append(_candles(form, joined, chunks, TABLES[kind]))
            dead += joined.dead
    if batch.late:
        joined = join(batch.late, "late_trades")
        made.append(_late(form, joined, batch.late))
        dead += joined.dead
    if batch.ticks:
        found, unsound = records(batch.ticks)
        made += [_ticks(form, some, batch.ticks) for some in found]
        dead += unsound
    for tables in MESSAGE_TABLES.values():
        made += [_messages(form, table, batch.messages[table.name]) for table in tables if table.name in batch.messages]
    return made, dead


def _candles(form: Form, joined: Joined, chunks: list[Chunk], table: Table) -> Prepared:
    """Rows of a candle table, one per key: the highest revision, of these the last."""
    order, last, group = newest(joined, table)
    if last.all():
        # No key twice, as most batches are: as they came, without a gather.
        every = np.arange(len(order))
        rows = Bound(candle_columns(form, joined, None, table), every, every)
        spare = Bound([], every[:0], every[:0])
    else:
        rows, spare = (
            Bound(candle_columns(form, joined, order[part], table), order[part], group[part]) for part in (last, ~last)
        )
    return Prepared(table.name, table.columns, rows, spare, [c.source for c in chunks], joined.chunk, joined.row)


def candle_columns(form: Form, joined: Joined, index: NDArray[np.int64] | None, table: Table) -> list[list[Any]]:
    """A candle table's columns of all joined rows, or of those at `index`."""
    rows = joined.rows
    time_ns, out_ns, end_ns, name = (
        _take(c, index) for c in (rows["time_ns"], rows["timestamp_out_ns"], table.end_ns(rows), joined.name)
    )
    names = np.empty((len(joined.names), 2), object)
    names[:] = joined.names or names
    columns = {column: names[name, i].tolist() for i, column in enumerate(table.names)}
    columns |= {column: _plain(form, column, _take(rows[column], index)) for column in table.plain}
    columns[table.time] = form.instants(time_ns, "s")
    if "timeframe" in table.columns:
        columns["timeframe"] = _timeframes(_take(rows["timeframe_sec"], index))
    columns["timestamp_out"] = form.instants(out_ns, "us")
    columns["latency_ms"] = ((out_ns - end_ns) / 1e6).tolist()
    return [columns[column] for column in table.columns]


def _plain(form: Form, name: str, values: NDArray[Any]) -> list[Any]:
    if name == "complete":
        return form.flags(values)
    if values.dtype.kind == "f":
        return form.reals(values)
    out: list[Any] = values.tolist()
    return out


def _timeframes(seconds: NDArray[np.int64]) -> list[str]:
    different, index = np.unique(seconds, return_inverse=True)
    texts = [name_of(each) for each in different.tolist()]
    return [texts[i] for i in index.tolist()]


def _take(column: NDArray[Any], index: NDArray[np.int64] | None) -> NDArray[Any]:
    return column if index is None else column[index]


def _late(form: Form, joined: Joined, chunks: list[Chunk]) -> Prepared:
    """Rows of late_trades, every one: equal trades are no duplicates."""
    rows, tick = joined.rows, joined.rows["tick"]
    sources = [chunks[i].source for i in joined.chunk.tolist()]
    names = [joined.names[i] for i in joined.name.tolist()]
    columns = [
        [s.bus for s in sources],
        [s.partition for s in sources],
        [s.seq for s in sources],
        joined.row.tolist(),
        [ticker for ticker, _ in names],
        [symbol for _, symbol in names],
        form.instants(tick["ts_event_ns"], "ns"),
        tick["ts_event_ns"].tolist(),
        tick["ts_recv_ns"].tolist(),
        form.reals(tick["price"]),
        form.reals(tick["size"]),
        SIDES[tick["side"].astype(np.int64) + 1].tolist(),
        rows["watermark_ns"].tolist(),
    ]
    return _all("late_trades", LATE_COLUMNS, columns, chunks, joined.chunk, joined.row)


def _ticks(form: Form, made: Records, chunks: list[Chunk]) -> Prepared:
    """Rows of a tick table, every record; levels as JSON."""
    columns = [_tick_column(form, name, made.columns[name]) for name in made.table.columns]
    return _all(made.table.name, made.table.columns, columns, chunks, made.chunk, made.row)


def _tick_column(form: Form, name: str, values: Any) -> list[Any]:
    if name in INSTANTS:
        return form.instants(np.asarray(values, np.int64), INSTANTS[name])
    if name in ("bids", "asks"):
        return form.json(values)
    if isinstance(values, np.ndarray):
        return _plain(form, name, values)
    out: list[Any] = values
    return out


def _all(
    table: str,
    names: tuple[str, ...],
    columns: list[list[Any]],
    chunks: list[Chunk],
    chunk: NDArray[np.int64],
    row: NDArray[np.int64],
) -> Prepared:
    """Every row, none superseded."""
    every = np.arange(len(row))
    sources = [c.source for c in chunks]
    return Prepared(table, names, Bound(columns, every, every), Bound([], every[:0], every[:0]), sources, chunk, row)


def _messages(form: Form, table: MessageTable, read: list[MessageRow]) -> Prepared:
    """Rows of a message table, one per key."""
    made = message_records(table, read)
    columns = message_columns(form, made)
    every = np.arange(len(read))
    rows = Bound(columns, every, np.asarray(made.group, np.int64))
    numbers = np.asarray([row.row for row in read], np.int64)
    best, spare = rows.only(made.best), rows.only(made.spare)
    return Prepared(table.name, table.names, best, spare, [row.source for row in read], every, numbers)


def message_columns(form: Form, made: MessageRecords) -> list[list[Any]]:
    """A message table's columns, of every record."""
    return [_message_column(form, column, made.columns[column.name]) for column in made.table.columns]


def _message_column(form: Form, column: Column, values: list[Any]) -> list[Any]:
    if column.sort == "time":
        return form.instants(np.asarray(values, np.int64), column.unit)
    if column.sort == "json":
        return form.json(values)
    if column.sort == "boolean":
        return form.flags(np.asarray(values, bool))
    return values


def gaps(batch: Batch, form: Form) -> list[list[Any]]:
    """The columns of `gaps`, GAP_COLUMNS; a gap that came again is here as often."""
    start, end = (np.array([getattr(g, name) for g in batch.gaps], np.int64) for name in ("start_ns", "end_ns"))
    columns = {
        "feed": [g.feed for g in batch.gaps],
        "symbols": [",".join(sorted(g.symbols)) for g in batch.gaps],
        "start_ns": start.tolist(),
        "end_ns": end.tolist(),
        "start": form.instants(start, "ns"),
        "end": form.instants(end, "ns"),
        "reason": [g.reason for g in batch.gaps],
    }
    return [columns[name] for name in GAP_COLUMNS]
