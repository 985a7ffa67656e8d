"""Dataset, tables and views: made, evolved, and refused where they are another's."""

from __future__ import annotations

from typing import Any

import pytest
from google.api_core.exceptions import NotFound
from google.cloud import bigquery as google

from services.sink_bigquery import schema
from services.sink_bigquery.clients import Target, connect
from services.sink_bigquery.migrate import migrate
from services.sink_bigquery.tables import EVERY, LAYOUTS, REAL
from services.sink_bigquery.views import VIEW_TYPES, VIEWS, newest_rows
from shared.errors import ConfigError, VersionError
from shared.settings import BigQuery, Settings, Tapeline
from shared.tables import MESSAGE_TABLES, TABLES, TICK_TABLES, time_column
from tests.bigquery import Endpoints
from tests.fakes.bigquery import BigQueryServer
from tests.services.sink_bigquery.stores import target


@pytest.fixture
def at(bigquery: BigQueryServer) -> Target:
    return Target(bigquery.project, "tape", BigQuery(endpoint=bigquery.url, grpc_endpoint=bigquery.grpc))


@pytest.fixture
def client(at: Target) -> Any:
    return connect(at)


def test_layouts_follow_the_tables_of_every_store() -> None:
    for table in (*TABLES.values(), *TICK_TABLES.values()):
        assert LAYOUTS[table.name].names == table.columns
    for tables in MESSAGE_TABLES.values():
        for one in tables:
            assert LAYOUTS[one.name].names == one.names
    for name, layout in EVERY.items():
        types = {f.name: f.type for f in layout.fields}
        assert types[layout.time] == "TIMESTAMP", name
        assert 1 <= len(layout.cluster) <= 4, name
        assert all(types[column] != REAL for column in layout.cluster), name
    assert {name: layout.time for name, layout in LAYOUTS.items() if layout.time != time_column(name)} == {
        "usage_daily": "at"  # its own is the text of a day
    }


def test_no_view_partitions_by_a_number_with_a_point() -> None:
    assert "CAST(`strike` AS STRING)" in newest_rows("t", LAYOUTS["signals"])
    assert set(VIEWS) == set(VIEW_TYPES)


def test_made_once(bqemulator: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    at = target(bqemulator, monkeypatch)
    client = connect(at)
    assert len(schema.ensure(client, at)) == 1 + len(EVERY) + len(VIEWS)
    assert schema.ensure(client, at) == []
    ticks = client.get_table(at.full("ticks_trades"))
    assert (ticks.time_partitioning.field, ticks.time_partitioning.expiration_ms) == ("timestamp", 30 * 86_400_000)
    assert ticks.clustering_fields == ["exchange", "symbol"]
    candles = client.get_table(at.full("candles"))
    assert (candles.time_partitioning.field, candles.time_partitioning.expiration_ms) == ("timestamp_in", None)
    assert client.get_dataset(at.dataset).labels == {"tapeline_schema": "1"}


def test_columns_are_added_and_none_is_dropped(client: Any, at: Target) -> None:
    schema.ensure(client, at)
    client.delete_table(at.full("candles"))
    older = schema.table_of(at, LAYOUTS["candles"])
    older.schema = [*[f for f in older.schema if f.name not in ("rsi_5", "vpin")], google.SchemaField("mine", "STRING")]
    client.create_table(older)
    changes = schema.look(client, at).changes
    assert [change.sql for change in changes] == [
        f"ALTER TABLE {at.named('candles')} ADD COLUMN `vpin` FLOAT64, ADD COLUMN `rsi_5` FLOAT64"
    ]
    assert schema.ensure(client, at) == ["candles"]
    names = [field.name for field in client.get_table(at.full("candles")).schema]
    assert names[-3:] == ["mine", "vpin", "rsi_5"]
    assert schema.ensure(client, at) == []


def test_the_expiry_of_ticks_follows_its_setting(client: Any, at: Target) -> None:
    schema.ensure(client, at)
    for days, wanted in ((7, 7 * 86_400_000), (0, None)):
        other = Target(at.project, at.dataset, BigQuery(endpoint=at.settings.endpoint, ticks_expire_days=days))
        assert schema.ensure(client, other) == [table.name for table in TICK_TABLES.values()]
        held = client.get_table(at.full("ticks_liquidations")).time_partitioning
        assert (held.expiration_ms, held.field) == (wanted, "timestamp")
        assert schema.ensure(client, other) == []


def test_what_cannot_be_used_is_one_line(client: Any, at: Target) -> None:
    schema.ensure(client, at)
    client.delete_table(at.full("gaps"))
    client.create_table(google.Table(at.full("gaps"), [google.SchemaField("feed", "INT64")]))
    with pytest.raises(ConfigError, match=r"column gaps.feed is INT64, and must be STRING: rename the table away"):
        schema.look(client, at)
    client.delete_table(at.full("gaps"))
    dataset = client.get_dataset(at.dataset)
    dataset.labels = {**dataset.labels, "tapeline_schema": "99"}
    client.update_dataset(dataset, ["labels"])
    with pytest.raises(VersionError, match="is of schema version 99, this program knows up to 1: upgrade Tapeline"):
        schema.look(client, at)


def test_a_plan_changes_nothing(client: Any, at: Target) -> None:
    settings = Settings(tapeline=Tapeline(store=f"bigquery://{at.project}/{at.dataset}"), bigquery=at.settings)
    plan = migrate(settings, True)
    assert (plan.held, plan.wanted, plan.applied) == (0, 1, False)
    assert {step.name for step in plan.steps} == {"dataset", *EVERY, *VIEWS}
    assert "PARTITION BY TIMESTAMP_TRUNC(`time`, DAY) CLUSTER BY `ticker`, `symbol`" in "".join(
        s.sql for s in plan.steps
    )
    with pytest.raises(NotFound):
        client.get_dataset(at.dataset)
    done = migrate(settings, False)
    assert (done.held, done.applied, len(done.steps)) == (0, True, len(plan.steps))
    again = migrate(settings, True)
    assert (again.held, again.steps) == (1, [])
