"""The tables as BigQuery has them: types, partitions, clusters, keys and order, from shared.tables.

Each table has one column more than in other stores, `stored_at`: when its batch was announced. Rows are only ever
appended; of several with one key the highest `order` counts, of these the last stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.frames import CANDLE, FIXED
from shared.tables import (
    DEAD_COLUMNS,
    DEAD_KEY,
    GAP_COLUMNS,
    GAP_KEY,
    INSTANTS,
    LATE_COLUMNS,
    LATE_KEY,
    MESSAGE_TABLES,
    PLACE_COLUMNS,
    TABLES,
    TICK_TABLES,
    Table,
    instant_unit,
    time_column,
)  # fmt: skip

STORED_AT = "stored_at"
LEDGER = "sink_batches"
TEXT, INTEGER, REAL, FLAG, INSTANT = "STRING", "INT64", "FLOAT64", "BOOL", "TIMESTAMP"
# JSON stays text: BigQuery's own type gives numbers back as it pleases, and its loads take it from JSON files only.
_SORTS = {"text": TEXT, "json": TEXT, "real": REAL, "integer": INTEGER, "boolean": FLAG, "time": INSTANT}
_TEXTS = frozenset(
    (
        "bus", "topic", "stream_id", "table_name", "reason", "feed", "symbols", "symbol", "ticker", "side",
        "exchange", "option_type", "underlying", "bids", "asks",
    )
)  # fmt: skip
_INTEGERS = frozenset(
    (
        "partition", "seq", "bus_seq", "row", "row_number", "sequence", "depth", "entry_ms", "entry_seq",
        "timestamp_ns", "local_timestamp_ns", "ts_event_ns", "ts_recv_ns", "watermark_ns", "start_ns", "end_ns",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """A column. `needed`: a row without it is refused (before it is sent: BigQuery's own columns all may be NULL)."""

    name: str
    type: str
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A table. `order`: the column of which the highest counts, of rows with one key; empty: the last stored.

    `first`: the row stored first counts. `ticks`: its partitions expire.
    """

    name: str
    fields: tuple[Field, ...]
    key: tuple[str, ...]
    time: str
    cluster: tuple[str, ...]
    order: str = ""
    first: bool = False
    ticks: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The columns as other stores have them."""
        return tuple(f.name for f in self.fields if f.name != STORED_AT)

    def type_of(self, column: str) -> str:
        """Raises KeyError for a column that is none."""
        return {f.name: f.type for f in self.fields}[column]


def _candles(table: Table) -> Layout:
    rows = FIXED if "timeframe" in table.columns else CANDLE
    always = {*table.key, *table.names, "complete", "revision", "trades", "volume", "timestamp_out", "latency_ms"}
    fields = []
    for name in table.columns:
        if name in (*table.names, "timeframe"):
            sort = TEXT
        elif instant_unit(table.name, name):
            sort = INSTANT
        elif name == "complete":
            sort = FLAG
        else:
            sort = REAL if name == "latency_ms" or rows[name].kind == "f" else INTEGER
        fields.append(Field(name, sort, name in always))
    cluster = (*table.names, "timeframe") if "timeframe" in table.columns else table.names
    return _layout(table.name, fields, table.key, cluster, order="revision")


def _layout(
    name: str,
    fields: list[Field],
    key: tuple[str, ...],
    cluster: tuple[str, ...],
    *,
    time: str = "",
    order: str = "",
    first: bool = False,
    ticks: bool = False,
) -> Layout:
    whole = (*fields, Field(STORED_AT, INSTANT, needed=True))
    return Layout(name, whole, key, time or time_column(name), cluster, order, first, ticks)


def _field(table: str, name: str, nullable: tuple[str, ...] = ()) -> Field:
    """A column of a table that shared.tables only names."""
    if instant_unit(table, name) or name in INSTANTS:
        sort = INSTANT
    elif name in _INTEGERS and not (table == "dead_letters" and name == "row"):
        sort = INTEGER
    else:
        sort = TEXT if name in _TEXTS or name == "row" else REAL
    return Field(name, sort, sort != REAL and name not in nullable)


_OPTIONAL = ("funding_timestamp", "option_type", "expiration", "underlying")


def _layouts() -> dict[str, Layout]:
    made = [_candles(table) for table in TABLES.values()]
    for tick in TICK_TABLES.values():
        fields = [_field(tick.name, name, _OPTIONAL) for name in tick.columns]
        made.append(_layout(tick.name, fields, PLACE_COLUMNS, ("exchange", "symbol"), ticks=True))
    for tables in MESSAGE_TABLES.values():
        for table in tables:
            fields = [Field(c.name, _SORTS[c.sort], not c.null) for c in table.columns]
            # Numbers with a point cannot cluster, nor can more than four columns.
            texts = tuple(f.name for f in fields if f.name in table.key and f.type in (TEXT, INSTANT))
            time = "at" if "at" in table.names else table.time
            cluster = tuple(name for name in texts if name != time)[:4]
            made.append(_layout(table.name, fields, table.key, cluster, time=time, order=table.order))
    late = [_field("late_trades", name) for name in LATE_COLUMNS]
    made.append(_layout("late_trades", late, LATE_KEY, ("ticker", "symbol")))
    made.append(_layout("gaps", [_field("gaps", name) for name in GAP_COLUMNS], GAP_KEY, ("feed",)))
    dead = [_field("dead_letters", name) for name in DEAD_COLUMNS]
    made.append(_layout("dead_letters", dead, DEAD_KEY, ("topic", "table_name"), first=True))
    return {layout.name: layout for layout in made}


LAYOUTS = _layouts()
# Columns that other stores derive from one of their own: shown, not stored.
DERIVED = {"pressure_metrics": {"created_at": "timestamp_out"}}
# The announcements, see ledger.py.
LEDGER_LAYOUT = Layout(
    LEDGER,
    (
        Field("bus", TEXT, needed=True),
        Field("n", INTEGER, needed=True),
        Field("method", TEXT, needed=True),
        Field("writer", TEXT, needed=True),
        Field("stream", TEXT),
        Field("base", INTEGER),
        Field("begins", TEXT),
        Field("ends", TEXT),
        Field("tables", TEXT),
        Field(STORED_AT, INSTANT, needed=True),
    ),
    ("bus", "n"),
    STORED_AT,
    ("bus",),
)
EVERY = {**LAYOUTS, LEDGER: LEDGER_LAYOUT}
