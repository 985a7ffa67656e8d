"""Messages of a batch as records of the message tables, column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from shared.batches import MessageRow
from shared.frames import NS
from shared.tables import Column, MessageTable

_UNIT_NS = {"s": NS, "us": 1000}


@dataclass(slots=True)
class MessageRecords:
    """Records of one table, in arrival order.

    `columns[name]`: instants are ns, whole in their column's unit; json values are as on the message. `group[i]`
    numbers record i's key. `best` are the records that win, one a key; `spare` the others, the better ones last.
    """

    table: MessageTable
    columns: dict[str, list[Any]]
    group: list[int]
    best: list[int]
    spare: list[int]


def message_records(table: MessageTable, rows: Sequence[MessageRow]) -> MessageRecords:
    """The rows as records. Of a key the highest `table.order` wins, of these the last that came."""
    messages = [row.message for row in rows]
    columns = {column.name: [value_of(message) for message in messages] for column, value_of in _getters(table)}
    ids: dict[tuple[Any, ...], int] = {}
    keys = zip(*(columns[name] for name in table.key), strict=True)
    group = [ids.setdefault(key, len(ids)) for key in keys]
    order = columns[table.order]
    ranked = sorted(range(len(group)), key=lambda i: (group[i], order[i]))
    last = [at + 1 == len(ranked) or group[ranked[at + 1]] != group[i] for at, i in enumerate(ranked)]
    best = [i for i, wins in zip(ranked, last, strict=True) if wins]
    spare = [i for i, wins in zip(ranked, last, strict=True) if not wins]
    return MessageRecords(table, columns, group, best, spare)


def _getters(table: MessageTable) -> list[tuple[Column, Callable[[Any], Any]]]:
    return [(column, _getter(column)) for column in table.columns]


def _getter(column: Column) -> Callable[[Any], Any]:
    """What gives a message's value of the column."""
    if column.name == "latency_ms":
        return _latency_ms
    path = attrgetter(column.path)
    if column.sort == "time":
        unit = _UNIT_NS[column.unit]
        return lambda message: path(message) // unit * unit
    part, dot, _ = column.path.partition(".")
    if not dot:
        return path
    return lambda message: None if getattr(message, part) is None else path(message)


def _latency_ms(message: Any) -> float:
    """From the window's end to the row's time of processing."""
    behind_ns: int = message.timestamp_out_ns - message.time_window_ns - message.window_sec * NS
    return behind_ns / 1e6
