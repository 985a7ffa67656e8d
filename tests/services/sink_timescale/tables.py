"""The same batches in SQLite and PostgreSQL, and their tables beside each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from services.sink_timescale.statements import WRITTEN
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import BOOK, NS, TRADE, Frame, Rows, tick_frame
from shared.postgres import connect, run
from shared.tables import instant_unit
from tests.services.sink_sqlite.tape import (
    INSTRUMENTS,
    T0,
    TOPIC_OF,
    bars,
    candles,
    fixed,
    gap,
    late,
    mixed,
    pressure,
    query,
    rollup,
    rows,
    said,
    signal,
    ticks,
    usage,
)

VIEWS = ("features", "late_counts", "usage", "ohlc_bars")
# What is told beside: by no other store, or of the moment.
OWN = {"dead_letters": {"id", "at", "reason"}, "ohlc_bars": {"id"}}
_INSTANT = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")


def batch(*frames: Frame | Rows, seq: int = 1, bus: str = "a", mend: bool = False, after: str | None = None) -> Batch:
    """Frames of any kind, one entry each, from sequence `seq` on; `after`: the first was read again behind that."""
    items = []
    for i, frame in enumerate(frames):
        whole = frame if isinstance(frame, Frame) else tick_frame(frame, "tardis:deribit")
        topic = "usage" if whole.kind == "usage" else TOPIC_OF.get(whole.kind, "candles")
        topic = "ticks" if not isinstance(frame, Frame) else topic
        source = Source(bus, topic, 0, seq + i, f"1700000000000-{seq + i}")
        rewound = after is not None and i == 0
        items.append(Item(source, whole, rewound=rewound, after=after or "0-0", instruments=INSTRUMENTS))
    return batch_of(items, mend=mend)


def story() -> Iterator[Batch]:
    """Every table, in every way that a batch may be written."""
    spoiled = rows(40, 30)
    for at, (name, value) in {3: ("revision", -1), 7: ("volume", np.nan), 8: ("complete", 2), 9: ("low", 1e9)}.items():
        spoiled[name][at] = value
    spoiled["name"][11] = 9
    whole = [candles(rows(60)), candles(rows(60), "candle_1s"), bars(fixed(40)), bars(fixed(12, seconds=15)),
             bars(fixed(4, seconds=604_800))]  # fmt: skip
    options = [said(*(pressure(n) for n in range(12))), said(*(rollup(n) for n in range(4))),
               said(*(signal(n) for n in range(6)), signal(7, option_type="", components=None))]  # fmt: skip
    yield batch(*whole, *options, said(*(usage(n) for n in range(5))), late(9), gap(), gap(T0, ("ESH4", "6EH4")), seq=1)
    yield batch(mixed(), ticks(TRADE, 30, 5), ticks(BOOK, 4, 9, parts=3), mixed(40), seq=20)
    # Revisions, lower and higher, in one batch and over two; what superseded others and is refused.
    yield batch(
        candles(rows(20, revision=2, close=7.0)), candles(rows(20, revision=1, close=8.0)), candles(spoiled),
        bars(fixed(10, 2, revision=1, close=9.0)), bars(fixed(10, 2, revision=3, close=-1.0)),
        said(pressure(1, revision=4, premium=1.5), pressure(1, revision=2), pressure(2, revision=5, option_type="X")),
        said(usage(9), usage(7, cost_usd=-1.0)), gap(), late(3, 100), said(rollup(0), body=b"{}"), seq=40,
    )  # fmt: skip
    # Mending: the same again, more of the incomplete, less of the complete.
    later = {"timestamp_out_ns": T0 + 900_000 * NS}
    part = fixed(40)
    part["complete"][:20] = 0
    part["trades"][:10] -= 1
    part["close"] += 5
    part["sma_5"][::2] = np.nan
    yield batch(
        candles(rows(60, close=3.0)), bars(part), said(*(pressure(n, **later, premium=n / 2) for n in range(12))),
        said(*(signal(n, **later) for n in range(6))), said(rollup(1, **later, strikes=9)), said(usage(3)),
        seq=60, bus="b", mend=True,
    )  # fmt: skip
    # Tails that the bus has lost.
    yield batch(late(2, 500), seq=9, after="0-0")
    yield batch(mixed(60), mixed(60), seq=22, after="1700000000000-21")
    yield batch(said(usage(11)), seq=45, after="1700000000000-44")
    yield batch(candles(rows(8, 4, revision=9)), Frame("no such kind", 1, 0, 0, "x", b"garbage"), seq=47, after="0-0")
    yield batch()


def lite(path: Path, table: str) -> list[dict[str, Any]]:
    """A table of SQLite, as plain as it is."""
    names = [row[1] for row in query(path, f"PRAGMA table_xinfo({table})")]
    return _sorted([_row(table, dict(zip(names, row, strict=True))) for row in query(path, f"SELECT * FROM {table}")])


def stored(url: str, table: str) -> list[dict[str, Any]]:
    """A table of PostgreSQL as `lite` tells one of SQLite."""
    return _sorted([_row(table, row) for row in fetch(url, f'SELECT * FROM "{table}"')])


def fetch(url: str, sql: str, *values: Any) -> list[dict[str, Any]]:
    """Rows of a query."""
    return fetch_all(url, [sql], *values)[0]


def fetch_all(url: str, queries: Sequence[str], *values: Any) -> list[list[dict[str, Any]]]:
    """Rows of several queries."""

    async def ask() -> list[list[dict[str, Any]]]:
        connection = await connect(url)
        try:
            return [[dict(row) for row in await connection.fetch(sql, *values)] for sql in queries]
        finally:
            await connection.close()

    found: list[list[dict[str, Any]]] = run(ask())
    return found


def one(url: str, sql: str, *values: Any) -> Any:
    """The only value of a query."""
    (row,) = fetch(url, sql, *values)
    (value,) = row.values()
    return value


def same(path: Path, url: str, tables: Sequence[str] = (*WRITTEN, *VIEWS)) -> None:
    """Every table holds the same rows in the same columns."""
    found = fetch_all(url, [f'SELECT * FROM "{table}"' for table in tables])
    for table, held in zip(tables, found, strict=True):
        here, there = lite(path, table), _sorted([_row(table, row) for row in held])
        assert len(here) == len(there), table
        for left, right in zip(here, there, strict=True):
            assert list(left) == list(right), table
            assert left == right, (table, {n: (left[n], right[n]) for n in left if left[n] != right[n]})


def _row(table: str, row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _value(table, name, value) for name, value in row.items() if name not in OWN.get(table, ())}
    if table == "dead_letters":
        kept["row"] = {name: _padded(value) for name, value in json.loads(kept["row"]).items()}
    return kept


def _value(table: str, name: str, value: Any) -> Any:
    unit = instant_unit(table, name)
    if table == "late_counts" and name in ("first", "last"):
        unit = "ns"
    if isinstance(value, datetime):
        assert value.microsecond == 0 or unit != "s"
        value = f"{value:%Y-%m-%dT%H:%M:%S.%f}Z"
    if name in ("bids", "asks", "types", "top_strikes"):
        return json.loads(value)
    return _padded(value)


def _padded(value: Any) -> Any:
    """An instant with microseconds, which all stores keep; a flag as a number."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and _INSTANT.match(value):
        return value.rstrip("Z").ljust(20, ".").ljust(26, "0")[:26] + "Z"
    return value


def _sorted(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(made, key=lambda row: json.dumps(row, default=str))
