"""Roll-ups of candles by hour and by day, as SQL: continuous aggregates of TimescaleDB, or plain views alike.

They sum fixed candles of one minute and nothing else: rolling rows overlap, and every trade is in a candle of each
timeframe. Both forms give the same columns and values; buckets begin at full hours and days of UTC.
"""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

SOURCE = "candles"


class Rollup(NamedTuple):
    """`length` of a bucket. Those that ended `settled` ago are stored, newer ones are computed when they are read.

    Each `every` the stored ones are computed again where candles have changed.
    """

    length: timedelta
    settled: timedelta
    every: timedelta


ROLLUPS = {
    "rollup_1h": Rollup(timedelta(hours=1), timedelta(hours=1), timedelta(minutes=15)),
    "rollup_1d": Rollup(timedelta(days=1), timedelta(days=1), timedelta(hours=1)),
}
# A refresh has to cover two buckets at least, or TimescaleDB refuses the policy.
LEAST_BUCKETS = 2

_SELECT = """
SELECT
    exchange, symbol, {bucket} AS bucket,
    {open} AS open, max(high) AS high, min(low) AS low, {close} AS close,
    sum(volume) AS volume, sum(trades)::bigint AS trades,
    sum(vwap * volume) / nullif(sum(volume) FILTER (WHERE vwap IS NOT NULL), 0) AS vwap,
    sum(ask_volume) AS ask_volume, sum(bid_volume) AS bid_volume, sum(unknown_volume) AS unknown_volume,
    sum(vd) AS vd, bool_and(complete) AS complete
FROM {source} WHERE timeframe = '1m' GROUP BY exchange, symbol, {bucket}
""".strip()


def interval(length: timedelta) -> str:
    """An SQL literal."""
    days, seconds = length.days, length.seconds
    return f"INTERVAL '{days} days'" if not seconds else f"INTERVAL '{days * 86400 + seconds} seconds'"


def plain(schema: str, name: str) -> list[str]:
    """Statements that make the roll-up a view; `schema` is quoted."""
    ends = {
        end: f"(array_agg({end} ORDER BY timestamp_in{order}) FILTER (WHERE {end} IS NOT NULL))[1]"
        for end, order in (("open", ""), ("close", " DESC"))
    }
    bucket = f"date_bin({interval(ROLLUPS[name].length)}, timestamp_in, TIMESTAMPTZ '2000-01-01 00:00:00+00')"
    return [f"CREATE VIEW {schema}.{name} AS {_select(schema, bucket, ends)}"]


def continuous(schema: str, name: str, functions: str) -> list[str]:
    """Statements that make it a continuous aggregate; `functions` is the quoted schema of TimescaleDB's functions."""
    ends = {
        end: f"{functions}.{function}({end}, timestamp_in) FILTER (WHERE {end} IS NOT NULL)"
        for end, function in (("open", "first"), ("close", "last"))
    }
    bucket = f"{functions}.time_bucket({interval(ROLLUPS[name].length)}, timestamp_in)"
    return [
        f"CREATE MATERIALIZED VIEW {schema}.{name} "
        "WITH (timescaledb.continuous, timescaledb.materialized_only = false) "
        f"AS {_select(schema, bucket, ends)} WITH NO DATA"
    ]


def _select(schema: str, bucket: str, ends: dict[str, str]) -> str:
    return _SELECT.format(source=f"{schema}.{SOURCE}", bucket=bucket, **ends)
