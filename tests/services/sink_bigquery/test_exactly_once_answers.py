"""What BigQuery answers when something is wrong, and that no answer makes the sink lose a row or write one twice."""

from __future__ import annotations

import signal
import threading

import grpc
import numpy as np
import pytest

from shared.bus import Bus
from shared.frames import NS
from tests.fakes.bigquery import Action, BigQueryServer, drop, fail, fails, hang, refuse, runs_for
from tests.fakes.bigquery_sinks import Sinks
from tests.services.sink_bigquery.batches import APPEND, LOAD, METHODS, WRITE, Batches
from tests.services.sink_sqlite.tape import Stage, candles, rows
from tests.wait import until

CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("before", "last"),
    [(None, "-0"), (runs_for(2), "-0"), (fails("backendError", polls=1), "-1")],
    ids=["done", "running", "failed"],
)
def test_the_name_of_a_job_is_taken(
    before: Action | None, last: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    """409, for the first answer was lost: what that job did is looked up; only one that failed is begun again."""
    batches = Batches(bus, bigquery, bigquery_sinks, "load")
    for table in ("sink_batches", "candles"):
        bigquery.order(LOAD, before, after=drop, table=table)
    batches.put(2)
    bigquery_sinks.start()
    batches.complete()
    for table in ("sink_batches", "candles"):
        names = [call.name for call in bigquery.seen(LOAD, table)]
        assert names[0] == names[1]
        assert names[0].endswith("-0")
        assert [name for name in names if name.startswith(names[0][:-1])][-1].endswith(last)


def test_a_row_that_a_load_refuses_is_found(bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    """A load is refused as a whole: it is halved until the row is found that is to blame."""
    batches = Batches(bus, bigquery, bigquery_sinks, "load")
    # Ten rows, the first five of them, the first two, the first.
    bigquery.order(LOAD, fails("invalid", "as ordered"), table="candles_1m", times=4)
    batches.put(2)
    batches.refused[next(iter(batches.expected("candles_1m")))] += 1
    bigquery_sinks.start()
    batches.complete()
    refused = [r for r in bigquery.rows("dead_letters") if r["table_name"] == "candles_1m"]
    assert [r["row_number"] for r in refused] == [0]
    assert "as ordered" in refused[0]["reason"]


@pytest.mark.parametrize("method", METHODS)
def test_unavailable_before_and_after(method: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    gone = fail(CODES.UNAVAILABLE) if method == "storage_write" else refuse(503)
    for table in ("sink_batches", "candles"):
        bigquery.order(WRITE[method], gone, table=table)
        bigquery.order(WRITE[method], after=gone, table=table, nth=2)
        bigquery.order(WRITE[method], after=drop, table=table, nth=4)
    batches.put(4)
    bigquery_sinks.start()
    batches.complete()


@pytest.mark.parametrize("ended", [False, True], ids=["in the answer", "ends the call"])
def test_offsets(ended: bool, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    """ALREADY_EXISTS: the rows are there. OUT_OF_RANGE: they do not belong here, and the sink looks where it stands."""
    batches = Batches(bus, bigquery, bigquery_sinks, "storage_write")
    bigquery.write.ended = ended
    bigquery.order(APPEND, after=fail(CODES.INTERNAL, in_band=True), table="candles")
    bigquery.order(APPEND, fail(CODES.OUT_OF_RANGE, "beyond", in_band=not ended), table="candles_1m", nth=2)
    batches.put(3)
    bigquery_sinks.start()
    batches.complete()
    assert [call.offset for call in bigquery.seen(APPEND, "candles")][:2] == [0, 0]
    assert bigquery.seen("FinalizeWriteStream", "candles_1m")


def test_a_connection_ends_after_idling(bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    batches = Batches(bus, bigquery, bigquery_sinks, "storage_write")
    batches.put(2)
    bigquery_sinks.start()
    batches.complete()
    streams = {call.name for call in bigquery.seen(APPEND)}
    assert bigquery.write.idle() == len(streams) == 4
    batches.put(2)
    batches.complete()
    assert {call.name for call in bigquery.seen(APPEND)} == streams


@pytest.mark.parametrize("method", ["storage_write", "insert_all"])
def test_refused_rows_are_dead_letters_and_their_neighbours_stored(
    method: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    """Streaming takes no rows of partitions that lie ten years back."""
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    made = rows(10, 5)
    made["time_ns"][[2, 7]] -= 4000 * 86_400 * NS
    batches.put()
    batches.stage.put(candles(made))
    bigquery_sinks.start()
    until(lambda: len(bigquery.rows("candles_1m")) == 18, what="the neighbours")
    until(lambda: len(bigquery.rows("dead_letters")) == 3, what="the dead letters")
    old = np.delete(made["time_ns"], [2, 7]) // 1000
    assert [r["time"] for r in bigquery.rows("candles_1m")][10:] == old.tolist()
    refused = [r for r in bigquery.rows("dead_letters") if r["table_name"] == "candles_1m"]
    assert [r["row_number"] for r in refused] == [2, 7]
    assert all("partition" in r["reason"] for r in refused)
    assert not [key for key, times in batches.letters().items() if times > 1]


@pytest.mark.parametrize("method", METHODS)
def test_a_quota_is_waited_for(method: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks) -> None:
    batches = Batches(bus, bigquery, bigquery_sinks, method)
    bigquery.order(LOAD, refuse(403, "rateLimitExceeded"), table="sink_batches")
    bigquery.order(WRITE[method], refuse(429) if method != "load" else refuse(403, "quotaExceeded"), table="candles")
    batches.put(2)
    sink = bigquery_sinks.start()
    batches.complete()
    assert "trying again, the streams hold the backlog" in sink.text


@pytest.mark.parametrize(
    ("kind", "status", "what"),
    [("datasets.get", 401, "credentials"), ("datasets.get", 403, "grant "), (LOAD, 403, "grant ")],
)
def test_credentials_that_are_refused_end_the_sink(
    kind: str, status: int, what: str, bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    Stage(bus).put(candles(rows(4)))
    bigquery.order(kind, refuse(status, message="Access Denied"), times=100)
    sink = bigquery_sinks.start()
    assert sink.ended() == 78
    said = [line for line in sink.text.splitlines() if line.startswith("tapeline: ")]
    assert len(said) == 1
    assert what in said[0]
    assert "BigQuery tests.tape" in said[0]
    assert "Traceback" not in sink.text


def test_a_call_that_hangs_keeps_no_sink_from_stopping(
    bus: Bus, bigquery: BigQueryServer, bigquery_sinks: Sinks
) -> None:
    batches = Batches(bus, bigquery, bigquery_sinks, "load")
    release = threading.Event()
    order = bigquery.order(LOAD, hang(release), table="candles")
    batches.put()
    sink = bigquery_sinks.start()
    until(lambda: order.done, what="the call")
    sink.signal(signal.SIGTERM)
    sink.ended()
    release.set()
    bigquery_sinks.start()
    batches.put()
    batches.complete()
