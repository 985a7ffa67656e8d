"""Rows of the bus as tuples of Python values, in the column order of the SQLite tables.

Whole columns are converted at once. NaN needs nothing: SQLite stores a bound NaN as NULL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.batches import CANDLE_COLUMNS, Chunk, DeadLetter, Joined, Table, dead_row, iso_texts, join, newest
from shared.frames import iso
from shared.messages import Gap

LATE_COLUMNS = (
    "bus", "partition", "bus_seq", "row", "ticker", "symbol", "ts_event", "ts_event_ns", "ts_recv_ns",
    "price", "size", "side", "watermark_ns",
)  # fmt: skip
GAP_COLUMNS = ("feed", "symbols", "start_ns", "end_ns", "start", "end", "reason")
_PLAIN = CANDLE_COLUMNS[3:-2]
_SIDES = np.array(["SELL", "UNKNOWN", "BUY"], object)

Values = tuple[Any, ...]


@dataclass(slots=True)
class Bound:
    """Rows ready to bind, column by column; `origin[i]` is row i's place in the joined chunks, `group[i]` its key.

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
    that one, they are next."""

    table: str
    names: tuple[str, ...]
    rows: Bound
    spare: Bound
    joined: Joined
    chunks: list[Chunk]

    def dead(self, rows: Bound, i: int, reason: str) -> DeadLetter:
        """The dead letter of a refused row."""
        at = int(rows.origin[i])
        source = self.chunks[int(self.joined.chunk[at])].source
        named = zip(self.names, rows.row(i), strict=True)
        return dead_row(source, self.table, int(self.joined.row[at]), reason, named)


def candles(chunks: list[Chunk], table: Table) -> Prepared:
    """Rows of candles_1m or candles_1s, one per key: the highest revision, of these the last."""
    joined = join(chunks, table.name)
    order, last, group = newest(joined, table)
    if last.all():
        # No key twice, as most batches are: as they came, without a gather.
        every = np.arange(len(order))
        rows = Bound(_candle_columns(joined, None, table), every, every)
        spare = Bound([], every[:0], every[:0])
    else:
        rows, spare = (
            Bound(_candle_columns(joined, order[part], table), order[part], group[part]) for part in (last, ~last)
        )
    return Prepared(table.name, CANDLE_COLUMNS, rows, spare, joined, chunks)


def _candle_columns(joined: Joined, index: NDArray[np.int64] | None, table: Table) -> list[list[Any]]:
    rows = joined.rows
    time_ns, out_ns, name = (_take(c, index) for c in (rows["time_ns"], rows["timestamp_out_ns"], joined.name))
    names = np.empty((len(joined.names), 2), object)
    names[:] = joined.names or names
    return [
        iso_texts(time_ns, "s"),
        names[name, 0].tolist(),
        names[name, 1].tolist(),
        *(_take(rows[column], index).tolist() for column in _PLAIN),
        iso_texts(out_ns, "us"),
        ((out_ns - time_ns - table.to_end_ns) / 1e6).tolist(),
    ]


def _take(column: NDArray[Any], index: NDArray[np.int64] | None) -> NDArray[Any]:
    return column if index is None else column[index]


def late(chunks: list[Chunk]) -> Prepared:
    """Rows of late_trades, every one: equal trades are no duplicates."""
    joined = join(chunks, "late_trades")
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
        iso_texts(tick["ts_event_ns"], "ns"),
        tick["ts_event_ns"].tolist(),
        tick["ts_recv_ns"].tolist(),
        tick["price"].tolist(),
        tick["size"].tolist(),
        _SIDES[tick["side"].astype(np.int64) + 1].tolist(),
        rows["watermark_ns"].tolist(),
    ]
    every = np.arange(len(rows))
    none = Bound([], every[:0], every[:0])
    return Prepared("late_trades", LATE_COLUMNS, Bound(columns, every, every), none, joined, chunks)


def gap(message: Gap) -> Values:
    """Row of gaps."""
    return (
        message.feed, ",".join(sorted(message.symbols)), message.start_ns, message.end_ns,
        iso(message.start_ns), iso(message.end_ns), message.reason,
    )  # fmt: skip
