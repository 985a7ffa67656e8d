"""Two sinks on one dataset: the one that stands by takes over, and the one that was overtaken does no harm."""

from __future__ import annotations

import signal
import threading

import pytest

from shared.bus import Bus
from tests.fakes.bigquery import BigQueryServer, Call
from tests.fakes.bigquery_sinks import Sinks
from tests.services.sink_bigquery.batches import WRITE, Batches
from tests.wait import until


@pytest.mark.parametrize("method", ["load", "storage_write"])
def test_the_one_standing_by_takes_over(method: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    first = bigquery_sinks.start()
    until(lambda: "storing partitions 0" in first.text, what="the first sink's lease")
    second = bigquery_sinks.start()
    until(lambda: "storing into" in second.text, what="the second sink")
    assert "storing partitions" not in second.text

    def die(call: Call) -> None:
        first.kill()

    bigquery.order(WRITE[method], after=die, table="candles")
    batches.put(2)
    assert first.ended() == -9
    batches.complete()


@pytest.mark.parametrize(
    ("method", "table", "late"),
    [
        ("load", "candles", True),
        ("storage_write", "sink_batches", True), ("storage_write", "candles", True),
        ("insert_all", "candles", False),
    ],
)  # fmt: skip
def test_one_that_wakes_after_it_was_overtaken(
    method: str, table: str, late: bool, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    """It was stopped while its call was under way. `late`: the call takes effect only when the other one is done.

    By insertAll nobody is fenced: the one that wakes may write a batch of its own before it sees that it has lost its
    lease, whose rows are there twice then, and once in the views.
    """
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    release = threading.Event()
    first = bigquery_sinks.start()

    def stop(call: Call) -> None:
        first.signal(signal.SIGSTOP)
        if late:
            release.wait(60)

    order = bigquery.order(WRITE[method], stop, table=table)
    batches.put(2)
    until(lambda: order.done, what="the call")
    second = bigquery_sinks.start()
    batches.complete()
    release.set()
    first.signal(signal.SIGCONT)
    # It goes on with its batch as if nothing had been, until it is told, or sees that its lease is gone.
    until(lambda: "another sink" in first.text or "another worker's" in first.text, what="the first sink to see it")
    batches.put(2)
    batches.complete(twice=method == "insert_all")
    assert first.status is second.status is None
    second.kill()
    batches.put()
    until(lambda: "storing partitions 0" in first.text.rpartition("another")[2], what="the first sink to take over")
    batches.sinks.all.append(first)
    batches.complete(twice=method == "insert_all")
