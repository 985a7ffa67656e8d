"""Rows as BigQuery takes them, and which of them it would not take, found out before they are sent.

Instants are int microseconds since 1970 in Python's columns, TIMESTAMP in BigQuery; NaN is NULL; lists are JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.sink_bigquery.tables import EVERY, FLAG, INSTANT, INTEGER, LAYOUTS, REAL, STORED_AT, TEXT, Field, Layout
from shared.batches import Batch, DeadLetter, dead_row
from shared.errors import ConfigError
from shared.frames import iso
from shared.store_rows import Bound, Prepared, gaps, prepare
from shared.tables import UNDEFINED

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    raise ConfigError("the BigQuery store needs pyarrow: pip install 'tapeline[bigquery]'") from None

ARROW = {
    TEXT: pa.string(), INTEGER: pa.int64(), REAL: pa.float64(), FLAG: pa.bool_(), INSTANT: pa.timestamp("us", tz="UTC"),
}  # fmt: skip
_json = msgspec.json.Encoder()


class BigQueryForm:
    """See shared.store_rows.Form."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        """Microseconds, cut to seconds where that is the precision; None where undefined."""
        whole = times_ns // 1_000_000_000 * 1_000_000 if unit == "s" else times_ns // 1000
        out: list[Any] = whole.tolist()
        if len(out) and times_ns.min() == UNDEFINED:
            return [None if at == UNDEFINED else us for at, us in zip(times_ns.tolist(), out, strict=True)]
        return out

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        """NaN becomes None."""
        undefined = np.isnan(values)
        if not undefined.any():
            return list(values.tolist())
        whole = values.astype(object)
        whole[undefined] = None
        return list(whole.tolist())

    def flags(self, values: NDArray[Any]) -> list[Any]:
        """True and False."""
        return list(values.astype(bool).tolist())

    def json(self, values: list[Any]) -> list[Any]:
        """JSON texts."""
        return [_json.encode(value).decode() for value in values]


FORM = BigQueryForm()


@dataclass(slots=True)
class Ready:
    """Rows of one table that BigQuery takes, in the order of its layout, `stored_at` included.

    `letter(i, reason)` makes the dead letter of a row that is refused after all; None where rows come from no frame.
    """

    layout: Layout
    columns: list[list[Any]]
    letter: Callable[[int, str], DeadLetter] | None = None

    def __len__(self) -> int:
        return len(self.columns[0])

    def part(self, begin: int, end: int) -> Ready:
        """The rows from `begin` to before `end`."""
        letter = self.letter
        moved = None if letter is None else lambda i, reason: letter(i + begin, reason)
        return Ready(self.layout, [column[begin:end] for column in self.columns], moved)

    def only(self, index: Sequence[int]) -> Ready:
        """Some of the rows."""
        letter = self.letter
        moved = None if letter is None else lambda i, reason: letter(index[i], reason)
        return Ready(self.layout, [[column[i] for i in index] for column in self.columns], moved)

    def arrow(self) -> Any:
        """A pyarrow.Table."""
        arrays = [
            pa.array(column, ARROW[field.type]) for column, field in zip(self.columns, self.layout.fields, strict=True)
        ]
        return pa.table(arrays, names=[field.name for field in self.layout.fields])

    def parquet(self) -> bytes:
        """A Parquet file."""
        sink = pa.BufferOutputStream()
        parquet.write_table(self.arrow(), sink, compression="snappy", coerce_timestamps="us")
        return bytes(sink.getvalue().to_pybytes())

    def values(self) -> Iterator[dict[str, Any]]:
        """Rows as dicts, without what is NULL."""
        names = [field.name for field in self.layout.fields]
        for row in zip(*self.columns, strict=True):
            yield {name: value for name, value in zip(names, row, strict=True) if value is not None}

    def span_us(self) -> tuple[int, int]:
        """The earliest and the latest instant of the partitioning column, microseconds."""
        times = self.columns[[field.name for field in self.layout.fields].index(self.layout.time)]
        return min(times), max(times)


def ready(batch: Batch, at_us: int) -> tuple[list[Ready], list[DeadLetter]]:
    """Every table of a batch but the dead letters, and these; `at_us`: when the batch was announced."""
    prepared, unsound = prepare(batch, FORM)
    made, dead = sound(prepared, batch, at_us)
    return made, batch.dead + unsound + dead


def sound(prepared: Sequence[Prepared], of: Batch, at_us: int) -> tuple[list[Ready], list[DeadLetter]]:
    """Rows that were prepared, and the gaps of a batch, without those that BigQuery does not take."""
    made: list[Ready] = []
    dead: list[DeadLetter] = []
    for some in prepared:
        rows, refused = _sound(some, at_us)
        dead += refused
        if len(rows):
            made.append(rows)
    if of.gaps:
        layout = LAYOUTS["gaps"]
        made.append(Ready(layout, [*gaps(of, FORM), [at_us] * len(of.gaps)]))
    return made, dead


def letters(dead: Sequence[DeadLetter], at_us: int) -> Ready:
    """Rows of dead_letters."""
    rows = [(at_us, *d.source[:3], d.source.seq, d.source.id, d.table, d.row, text(d.reason), d.body) for d in dead]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in LAYOUTS["dead_letters"].names]
    return Ready(LAYOUTS["dead_letters"], [*columns, [at_us] * len(rows)])


def one(table: str, values: dict[str, Any]) -> Ready:
    """A single row."""
    layout = EVERY[table]
    return Ready(layout, [[values.get(field.name)] for field in layout.fields])


def _sound(prepared: Prepared, at_us: int) -> tuple[Ready, list[DeadLetter]]:
    """The rows of a table that BigQuery takes; in place of one that it does not, those that it superseded."""
    layout, rows = LAYOUTS[prepared.table], prepared.rows
    refused = refusals(layout, rows.columns)
    dead = [_letter(layout, prepared, rows, i, reason) for i, reason in refused.items()]
    if refused:
        keys = {int(rows.group[i]) for i in refused}
        rows = rows.only([i for i in range(len(rows)) if i not in refused])
        if len(prepared.spare):
            spare = prepared.spare.only([i for i, key in enumerate(prepared.spare.group.tolist()) if key in keys])
            also = refusals(layout, spare.columns)
            dead += [_letter(layout, prepared, spare, i, reason) for i, reason in also.items()]
            rows = _joined(rows, _newest(spare, also))
    letter = lambda i, reason: _letter(layout, prepared, rows, i, reason)  # noqa: E731
    return Ready(layout, [*rows.columns, [at_us] * len(rows)], letter), dead


def _letter(layout: Layout, prepared: Prepared, rows: Bound, i: int, reason: str) -> DeadLetter:
    """The dead letter of a refused row: its instants as text, as in every store's letters."""
    at = int(rows.origin[i])
    source = prepared.sources[int(prepared.chunk[at])]
    values = [
        _instant_text(value) if field.type == INSTANT and value is not None else value
        for field, value in zip(layout.fields, rows.row(i), strict=False)  # which have stored_at behind them
    ]
    named = zip(prepared.names, values, strict=True)
    return dead_row(source, prepared.table, int(prepared.row[at]), reason, named)


def _newest(spare: Bound, refused: dict[int, str]) -> Bound:
    """Of each key the last of those that are taken: they are ordered by revision, then by arrival."""
    last = {int(spare.group[i]): i for i in range(len(spare)) if i not in refused}
    return spare.only(sorted(last.values()))


def _joined(rows: Bound, more: Bound) -> Bound:
    columns = [a + b for a, b in zip(rows.columns, more.columns, strict=True)] if len(rows) else more.columns
    return Bound(columns, np.append(rows.origin, more.origin), np.append(rows.group, more.group))


def refusals(layout: Layout, columns: Sequence[list[Any]]) -> dict[int, str]:
    """Rows that cannot be stored: index -> reason. `columns` are those of `layout.names`."""
    found: dict[int, str] = {}
    named: dict[str, list[Any]] = {}
    for field, column in zip((f for f in layout.fields if f.name != STORED_AT), columns, strict=True):
        named[field.name] = column
        try:
            array = pa.array(column, ARROW[field.type])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
            for i, value in enumerate(column):
                reason = _refusal(field, value)
                if reason:
                    found.setdefault(i, reason)
            continue
        if field.needed and array.null_count:
            for i, value in enumerate(column):
                if value is None:
                    found.setdefault(i, f"{field.name} is undefined")
    for reason, i in _unsound(named):
        found.setdefault(i, reason)
    return found


def _refusal(field: Field, value: Any) -> str:
    if value is None:
        return f"{field.name} is undefined" if field.needed else ""
    try:
        pa.array([value], ARROW[field.type])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError) as error:
        return f"{field.name} is no {field.type} ({type(error).__name__})"
    return ""


def _unsound(named: dict[str, list[Any]]) -> Iterator[tuple[str, int]]:
    """What the other stores check in candles: BigQuery itself checks nothing."""
    if "revision" not in named or "high" not in named:
        return
    rows = zip(*(named[name] for name in ("volume", "trades", "revision", "high", "low")), strict=True)
    for i, (volume, trades, revision, high, low) in enumerate(rows):
        if (volume or 0) < 0 or (trades or 0) < 0 or (revision or 0) < 0:
            yield "volume, trades and revision must be 0 or more", i
        elif high is not None and low is not None and high < low:
            yield "high is below low", i


def text(given: str) -> str:
    """What of a text BigQuery takes: no halves of surrogate pairs."""
    return given.encode("utf-8", "replace").decode()


def json_row(values: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """A row as tabledata.insertAll takes it."""
    out = {}
    for name, value in values.items():
        if layout.type_of(name) == INSTANT:
            out[name] = _instant_text(value)
        elif isinstance(value, float) and value in (float("inf"), float("-inf")):
            out[name] = "Infinity" if value > 0 else "-Infinity"
        else:
            out[name] = value
    return out


def _instant_text(us: int) -> str:
    return iso(us * 1000)[:26] + "Z"


def size_of(values: dict[str, Any]) -> int:
    """About the bytes of a row."""
    return len(json.dumps(values, default=str))
