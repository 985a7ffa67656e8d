"""The tests' own BigQuery refuses what the real one refuses, as Google's clients see it."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest
from google.api_core import exceptions
from google.api_core.client_options import ClientOptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery as google
from pyarrow import parquet

from tests.fakes.bigquery import BigQueryServer, refuse

FIELDS = [google.SchemaField("name", "STRING", "REQUIRED"), google.SchemaField("n", "INT64")]
QUIET = google.QueryJobConfig(use_query_cache=False)


@pytest.fixture
def client(bigquery: BigQueryServer) -> Any:
    made = google.Client(
        bigquery.project, credentials=AnonymousCredentials(), client_options=ClientOptions(api_endpoint=bigquery.url)
    )
    made.create_dataset("d")
    made.create_table(google.Table("tests.d.t", FIELDS))
    yield made
    made.close()


def load(client: Any, name: str, values: dict[str, list[Any]], *, needed: bool = True) -> Any:
    kinds = {"name": pa.string(), "n": pa.int64()}
    schema = pa.schema([pa.field(c, kinds.get(c, pa.string()), not needed or c != "name") for c in values])
    file = io.BytesIO()
    parquet.write_table(pa.table(values, schema=schema), file)
    config = google.LoadJobConfig(source_format="PARQUET")
    return client.load_table_from_file(file, "tests.d.t", rewind=True, job_id=name, job_config=config)


def test_tables_and_jobs(client: Any, bigquery: BigQueryServer) -> None:
    with pytest.raises(exceptions.Conflict):
        client.create_dataset("d")
    with pytest.raises(exceptions.Conflict):
        client.create_table(google.Table("tests.d.t", FIELDS))
    with pytest.raises(exceptions.NotFound):
        client.get_table("tests.d.none")
    held, older = client.get_table("tests.d.t"), client.get_table("tests.d.t")
    held.schema = [*held.schema, google.SchemaField("more", "STRING")]
    client.update_table(held, ["schema"])
    with pytest.raises(exceptions.PreconditionFailed):
        client.update_table(older, ["schema"])
    load(client, "one", {"name": ["a", "b"], "n": [1, None]}).result()
    with pytest.raises(exceptions.Conflict):
        load(client, "one", {"name": ["c"], "n": [1]})
    for values, why in (
        ({"name": ["c"], "other": ["x"]}, "Cannot add fields"),
        ({"n": [1]}, "cannot be null"),
        ({"name": ["c"], "more": ["x"], "n": [1]}, ""),
    ):
        job = load(client, f"job{len(values)}{why[:1]}", values)
        if why:
            with pytest.raises(exceptions.BadRequest, match=why):
                job.result()
    with pytest.raises(exceptions.BadRequest, match="changed mode"):
        load(client, "two", {"name": ["c"], "n": [1]}, needed=False).result()
    assert [row["name"] for row in bigquery.rows("t")] == ["a", "b", "c"]


def test_insert_all(client: Any, bigquery: BigQueryServer) -> None:
    rows = [{"name": "a", "n": 1}, {"name": "b", "other": 1}, {"name": "c", "n": "x"}]
    told = client.insert_rows_json("tests.d.t", rows)
    assert [(e["index"], e["errors"][0]["reason"]) for e in told] == [(0, "stopped"), (1, "invalid"), (2, "invalid")]
    assert not bigquery.rows("t")
    for _ in range(2):
        assert client.insert_rows_json("tests.d.t", rows[:1], row_ids=["a"]) == []
    assert bigquery.rows("t") == [{"name": "a", "n": 1}]
    with pytest.raises(exceptions.BadRequest, match="streaming buffer"):
        client.query("DELETE FROM `tests.d.t` WHERE n = 1", job_config=QUIET).result()
    bigquery.order("tabledata.insertAll", refuse(403, "quotaExceeded"))
    with pytest.raises(exceptions.Forbidden):
        client.insert_rows_json("tests.d.t", rows[:1], retry=None)
    with pytest.raises(exceptions.GoogleAPICallError):
        client.insert_rows_json("tests.d.t", [{"name": "x" * 11_000_000}], retry=None)


def test_statements(client: Any, bigquery: BigQueryServer) -> None:
    load(client, "one", {"name": ["a", "b", "c"], "n": [1, 2, 3]}).result()
    job = client.query("DELETE FROM `tests.d.t` WHERE n > 1", job_config=QUIET)
    job.result()
    assert job.num_dml_affected_rows == 2
    assert bigquery.rows("t") == [{"name": "a", "n": 1}]
    view = google.Table("tests.d.v")
    view.view_query = "SELECT name FROM `tests.d.t`"
    client.create_table(view)
    assert [dict(row) for row in client.query("SELECT * FROM `tests.d.v`", job_config=QUIET).result()] == [
        {"name": "a"}
    ]
    with pytest.raises(exceptions.NotFound):
        client.query("SELECT * FROM `tests.d.none`", job_config=QUIET, job_retry=None).result(retry=None)
    with pytest.raises(exceptions.BadRequest, match="SQLite"):
        client.query("SELECT FARM_FINGERPRINT(name) FROM `tests.d.t`", job_config=QUIET, job_retry=None).result()
