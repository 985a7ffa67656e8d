"""`kill -9` of the BigQuery sink before and after each of its calls: no row is lost, none is there twice."""

from __future__ import annotations

import pytest

from shared.bus import Bus
from tests.fakes.bigquery import BigQueryServer
from tests.fakes.bigquery_sinks import Sinks
from tests.services.sink_bigquery.batches import APPEND, INSERT, LOAD, METHODS, Batches

_TABLES = ("sink_batches", "candles_1m", "candles", "dead_letters")
# The calls of a batch; of storage_write also those of a session's start, and of whoever takes over from one.
CALLS = {
    "load": [(LOAD, table) for table in _TABLES],
    "storage_write": [
        ("CreateWriteStream", "sink_batches"), (LOAD, "sink_batches"), ("CreateWriteStream", "candles"),
        *((APPEND, table) for table in _TABLES),
        ("FinalizeWriteStream", "sink_batches"), ("FinalizeWriteStream", "candles"),
        ("jobs.insert.query", "candles"), (LOAD, "candles"),
    ],
    "insert_all": [(LOAD, "sink_batches"), *((INSERT, table) for table in _TABLES)],
}  # fmt: skip


@pytest.mark.parametrize("heard", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kill_at_each_call(
    method: str, heard: bool, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    """One sink after the other dies at the next call, often while it ends what the one before it has begun."""
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    for kind, table in CALLS[method]:
        batches.put()
        if heard:
            order = bigquery.order(kind, after=bigquery_sinks.die, table=table)
        else:
            order = bigquery.order(kind, bigquery_sinks.die_unheard, table=table)
        sink = bigquery_sinks.start()
        assert sink.ended() == -9, f"not killed at {kind} of {table}:\n{sink.text}"
        assert order.done
        batches.none_twice()
    batches.put()
    bigquery_sinks.start()
    batches.complete()
