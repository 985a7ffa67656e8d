"""Rows as the API tells them: JSON objects of the columns of the store's tables, the same from store and bus.

Instants are ISO text, as fine as `shared.tables.instant_unit` says, flags true or false, lists real lists, and what is
undefined is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.batches import Chunk, Item, Source, batch_of, iso_texts, join
from shared.frames import PACKED, Frame
from shared.message_records import message_records
from shared.reader_bars import Series
from shared.store_rows import candle_columns, gaps, message_columns
from shared.tables import GAP_COLUMNS, GAP_KEY, MESSAGE_TABLES, TABLES, UNDEFINED
from shared.timeframes import seconds_of

Row = dict[str, Any]
_NOWHERE = Source("", "", 0, 0, "")
_MESSAGES = {table.name: table for tables in MESSAGE_TABLES.values() for table in tables}
_FLAGS = {0: False, 1: True}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Told:
    """Rows of one table in their order: each row's key, and its JSON."""

    keys: list[tuple[Any, ...]]
    texts: list[str]
    _joined: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def joined(self) -> str:
        """All rows as they stand in a JSON array, without its brackets; made once for all who get them."""
        if not self._joined:
            self._joined = ",".join(self.texts)
        return self._joined


def key_of(table: str) -> tuple[str, ...]:
    """The columns of a table's key."""
    if table == "gaps":
        return GAP_KEY
    if table in _MESSAGES:
        return _MESSAGES[table].key
    return next(t.key for t in TABLES.values() if t.name == table)


def columns_of(table: str) -> tuple[str, ...]:
    """The columns of a table's rows; a store may have others beside them, made of these."""
    if table == "gaps":
        return GAP_COLUMNS
    if table in _MESSAGES:
        return _MESSAGES[table].names
    return next(t.columns for t in TABLES.values() if t.name == table)


@lru_cache(maxsize=64)
def _special(table: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(columns of flags, columns of JSON text) of a table or view."""
    if table not in _MESSAGES:
        return ("complete",), ("bids", "asks")
    columns = _MESSAGES[table].columns
    return tuple(c.name for c in columns if c.sort == "boolean"), tuple(c.name for c in columns if c.sort == "json")


def rows_of_store(table: str, rows: Iterable[Row]) -> list[Row]:
    """Rows as `shared.stores.read_rows` gives them, of all or some columns, in the API's form; changed in place."""
    made = list(rows)
    flags, lists = ([name for name in names if made and name in made[0]] for names in _special(table))
    for row in made:
        for name in flags:
            row[name] = _FLAGS.get(row[name], row[name])
        for name in lists:
            if row[name] is not None:
                row[name] = _decode(row[name])
    return made


def told(table: str, rows: Sequence[Row]) -> Told:
    """Rows of the API's form as their keys and JSON."""
    key = key_of(table)
    return Told([tuple(row[name] for name in key) for row in rows], [_encode(row).decode() for row in rows])


def candles_of_frame(frame: Frame, wanted: Mapping[str, Iterable[Series]]) -> dict[Series, Told]:
    """The rows of these series in a frame of candles, all made at once; a series without rows is left out.

    `wanted`: by ticker of rolling candles, by symbol of fixed ones.
    """
    table = TABLES[frame.kind]
    if len(frame.body) != frame.count * PACKED[frame.kind].itemsize:
        return {}  # the sinks bury it
    rolling = table.to_end_ns is not None
    of: dict[tuple[int, int], list[Series]] = {}
    for number, pair in enumerate(frame.names):
        for series in wanted.get(pair[0] if rolling else pair[1], ()):
            if series.is_of(pair):
                of.setdefault((number, 0 if rolling else seconds_of(series.timeframe)), []).append(series)
    if not of:
        return {}
    rows = frame.rows()
    mine = np.isin(rows["name"], [number for number, _ in of])
    if not rolling:
        mine &= np.isin(rows["timeframe_sec"], [seconds for _, seconds in of])
    rows = rows[mine]
    if not len(rows):
        return {}
    # What cannot be a row becomes a dead letter in the store, and is none here.
    joined = join([Chunk(_NOWHERE, rows, frame.names)], table.name)
    columns = candle_columns(FORM, joined, None, table)
    key = [table.columns.index(name) for name in table.key]
    numbers = joined.rows["name"].tolist()
    lengths = [0] * len(numbers) if rolling else joined.rows["timeframe_sec"].tolist()
    made: dict[Series, Told] = {}
    for which, values in zip(zip(numbers, lengths, strict=True), zip(*columns, strict=True), strict=True):
        if which in of:
            one = tuple(values[i] for i in key)
            text = _encode(dict(zip(table.columns, values, strict=True))).decode()
            for series in of[which]:
                _add(made, series, one, text)
    return made


def messages_of_frame(frame: Frame) -> dict[str, dict[str, Told]]:
    """The rows of a frame of messages: table -> underlying -> rows; under '' all of the table."""
    batch = batch_of([Item(_NOWHERE, frame)])
    made: dict[str, dict[str, Told]] = {}
    for name, read in batch.messages.items():
        table = _MESSAGES[name]
        columns = dict(zip(table.names, message_columns(FORM, message_records(table, read)), strict=True))
        made[name] = _by_underlying(tuple(columns), table.key, list(columns.values()))
    if batch.gaps:
        made["gaps"] = _by_underlying(GAP_COLUMNS, GAP_KEY, gaps(batch, FORM))
    return made


def _by_underlying(names: Sequence[str], key: Sequence[str], columns: list[list[Any]]) -> dict[str, Told]:
    made: dict[str, Told] = {}
    at = [names.index(name) for name in key]
    of = names.index("underlying") if "underlying" in names else None
    for values in zip(*columns, strict=True):
        one, text = tuple(values[i] for i in at), _encode(dict(zip(names, values, strict=True))).decode()
        for which in {"", "" if of is None else values[of]}:
            _add(made, which, one, text)
    return made


def _add(made: dict[Any, Told], which: Any, key: tuple[Any, ...], text: str) -> None:
    some = made.get(which)
    if some is None:
        some = made[which] = Told([], [])
    some.keys.append(key)
    some.texts.append(text)


class _Form:
    """See shared.store_rows.Form: values as they stand in the API's JSON."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        texts: list[Any] = iso_texts(times_ns, unit)
        if len(texts) and times_ns.min() == UNDEFINED:
            return [None if at == UNDEFINED else text for at, text in zip(times_ns.tolist(), texts, strict=True)]
        return texts

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        return [None if value != value else value for value in values.tolist()]  # noqa: PLR0124 - NaN

    def flags(self, values: NDArray[Any]) -> list[Any]:
        return [_FLAGS.get(value, value) for value in values.tolist()]

    def json(self, values: list[Any]) -> list[Any]:
        return values  # as on the message; written as the stores write it


FORM = _Form()
