"""What the tests of features share: a store's tables, candles in them, and the roll-ups worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from services.sink_timescale.schema import migrations
from services.sink_timescale.statements import INTO

COLUMNS = (
    "exchange", "symbol", "timeframe", "timestamp_in", "open", "high", "low", "close", "volume", "trades", "vwap",
    "ask_volume", "bid_volume", "unknown_volume", "vd", "complete", "revision", "timestamp_out", "latency_ms",
)  # fmt: skip
ROLLED = (
    "exchange", "symbol", "bucket", "open", "high", "low", "close", "volume", "trades", "vwap", "ask_volume",
    "bid_volume", "unknown_volume", "vd", "complete",
)  # fmt: skip
Row = tuple[Any, ...]


async def make_tables(connection: Any) -> None:
    for migration in migrations():
        await connection.execute(migration.sql)


def candles(start: datetime, minutes: int) -> list[Row]:
    """Candles of two symbols from `start` on; all values are multiples of 1/4, so that any order of summing agrees.

    Every seventh minute had no trade; some minutes are missing; other timeframes tell of the same trades again.
    """
    rows = []
    for exchange, symbol, base in (("GLBX", "NQZ5", 100.0), ("deribit", "BTC-PERPETUAL", 5000.0)):
        for timeframe, step in (("1m", 1), ("15s", 1), ("1h", 60)):
            for i in range(0, minutes, step):
                if i % 50 == 49:
                    continue
                at = start + timedelta(minutes=i)
                price, volume = base + i % 13 - i % 5 / 4, float(i % 7)
                ohlc: tuple[Any, ...] = (price, price + 1, price - 1.5, price + 0.5) if volume else (None,) * 4
                rows.append((
                    exchange, symbol, timeframe, at, *ohlc, volume, i % 7, price if volume else None,
                    volume - 0.5 if volume else 0.0, 0.25 if volume else 0.0, 0.25 if volume else 0.0,
                    volume - 0.75 if volume else 0.0, i % 1000 != 77, 0, at + timedelta(minutes=1), 1.0,
                ))  # fmt: skip
    return rows


async def store(connection: Any, rows: Iterable[Row]) -> None:
    """As the sink writes: COPY to a temporary table and upsert, in one transaction."""
    into = INTO["candles"]
    async with connection.transaction():
        await connection.execute(
            "SELECT set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true)"
        )
        await connection.execute(into.create)
        await connection.copy_records_to_table(into.temporary, records=list(rows), columns=COLUMNS)
        await connection.execute(into.write)


def rolled(rows: Iterable[Row], length: timedelta) -> list[Row]:
    """The roll-up by plain Python, in the order of its key."""
    epoch = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    groups: dict[Row, list[dict[str, Any]]] = defaultdict(list)
    for values in sorted(rows, key=lambda row: row[3]):
        row = dict(zip(COLUMNS, values, strict=True))
        if row["timeframe"] == "1m":
            bucket = epoch + (row["timestamp_in"] - epoch) // length * length
            groups[row["exchange"], row["symbol"], bucket].append(row)
    out = []
    for key, group in sorted(groups.items()):
        traded = [row for row in group if row["open"] is not None]
        volume = sum(row["volume"] for row in group)
        out.append((
            *key, traded[0]["open"], max(row["high"] for row in traded), min(row["low"] for row in traded),
            traded[-1]["close"], volume, sum(row["trades"] for row in group),
            sum(row["vwap"] * row["volume"] for row in traded) / volume,
            *(sum(row[name] for row in group) for name in ("ask_volume", "bid_volume", "unknown_volume", "vd")),
            all(row["complete"] for row in group),
        ))  # fmt: skip
    return out


async def held(connection: Any, name: str) -> list[Row]:
    """A roll-up's rows as the store has them."""
    rows = await connection.fetch(f"SELECT {', '.join(ROLLED)} FROM {name} ORDER BY exchange, symbol, bucket")
    return sorted(map(tuple, rows))


class Statements:
    """Records what a connection executes: `with Statements(connection) as told`."""

    def __init__(self, connection: Any) -> None:
        self._connection, self.texts = connection, list[str]()

    def _log(self, record: Any) -> None:
        self.texts.append(record.query.strip())

    def __enter__(self) -> Statements:
        self._connection.add_query_logger(self._log)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.remove_query_logger(self._log)

    @property
    def changes(self) -> list[str]:
        """All that is no reading."""
        return [text for text in self.texts if not text.upper().startswith("SELECT")]
