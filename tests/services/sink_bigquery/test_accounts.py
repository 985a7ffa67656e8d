"""What writing costs, among the usage of feeds."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.sink_bigquery.accounts import accounts
from services.sink_bigquery.costs import GIB, Spent
from shared.bus import Bus
from shared.messages import Usage, decode
from shared.settings import RedisSettings, Settings, Tapeline
from shared.usage import day_of, now_ns
from shared.usage_book import collect, left_usd


def test_prices() -> None:
    spent = Spent("load")
    spent.add("load", "candles", 10, GIB)
    spent.add("storage_write", "candles", 5, 2 * GIB)
    spent.add("insert_all", "gaps", 1, GIB)
    costs = {name: (total.events, total.cost_usd) for name, total in spent.by_method.items()}
    assert costs == {"load": (10, 0.0), "storage_write": (5, 0.05), "insert_all": (1, 0.05)}
    assert spent.rows == 16
    assert spent.told().startswith("load 10 rows 1024.0 MiB ~0.0000 USD, storage_write 5 rows")


def test_costs_are_usage_and_draw_on_no_budget(bus: Bus, tmp_path: Path) -> None:
    settings = Settings(
        tapeline=Tapeline(
            store=f"sqlite:///{tmp_path / 'store.db'}", state_dir=str(tmp_path), partitions=1,
            namespace=bus.keys.namespace,
        ),
        redis=RedisSettings(url=bus.url),
    )  # fmt: skip
    bus.deploy(1)
    left = left_usd(settings, "databento")
    spent = Spent("storage_write")
    with accounts(settings, spent, threading.Event()):
        spent.add("storage_write", "candles", 100, 4 * GIB)
        spent.add("storage_write", "usage_log", 1, 100)
    rows, missing = collect(settings, day_of(now_ns()))
    assert not missing
    assert [(r.feed, r.day_events, r.day_bytes) for r in rows] == [("bigquery:storage_write", 101, 4 * GIB + 100)]
    assert rows[0].day_cost_usd == pytest.approx(0.1)
    assert rows[0].budget_usd == 0
    assert left_usd(settings, "databento") == left
    told = bus.client.xrange(bus.keys.stream(0, "usage"))
    usage = [message for _, fields in told for message in decode(fields[b"body"])]
    assert [(m.feed, m.day_events) for m in usage if isinstance(m, Usage)] == [("bigquery:storage_write", 101)]


def test_accounts_that_cannot_be_read_are_a_fault_and_no_hindrance(bus: Bus, tmp_path: Path) -> None:
    settings = Settings(
        tapeline=Tapeline(store=f"sqlite:///{tmp_path / 's.db'}", partitions=1, namespace=bus.keys.namespace),
        redis=RedisSettings(url=bus.url),
    )
    bus.deploy(1)
    bus.call("hset", bus.keys.usage("bigquery:load"), day_of(now_ns()), b"{")
    faults = {"where": "sink_bigquery.accounts"}
    before = REGISTRY.get_sample_value("tapeline_faults_total", faults) or 0.0
    spent = Spent("load")
    with accounts(settings, spent, threading.Event()):
        spent.add("load", "candles", 1, 100)
    assert REGISTRY.get_sample_value("tapeline_faults_total", faults) == before + 1


def test_the_accounts_own_rows_are_no_news(bus: Bus, tmp_path: Path) -> None:
    settings = Settings(
        tapeline=Tapeline(store=f"sqlite:///{tmp_path / 's.db'}", partitions=1, namespace=bus.keys.namespace),
        redis=RedisSettings(url=bus.url),
    )
    bus.deploy(1)
    spent = Spent("load")
    with accounts(settings, spent, threading.Event()):
        spent.add("load", "usage_daily", 1, 100)
    assert bus.client.xlen(bus.keys.stream(0, "usage")) == 0
    assert bus.client.hlen(bus.keys.usage("bigquery:load")) == 1
