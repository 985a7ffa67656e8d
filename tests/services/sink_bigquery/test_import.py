"""Candles from elsewhere into BigQuery: each import is a process of its own and goes on behind the ones before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.import_files import Given
from shared.importing import Plan, Summary, run
from shared.settings import BIGQUERY_METHODS, load
from tests.fakes.bigquery import BigQueryServer


@pytest.mark.parametrize("method", BIGQUERY_METHODS)
def test_imports_one_after_the_other(
    method: str, bigquery: BigQueryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPELINE_STORE", f"bigquery://{bigquery.project}/tape")
    monkeypatch.setenv("TAPELINE_BIGQUERY_ENDPOINT", bigquery.url)
    monkeypatch.setenv("TAPELINE_BIGQUERY_GRPC_ENDPOINT", bigquery.grpc)
    monkeypatch.setenv("TAPELINE_BIGQUERY_METHOD", method)

    def bring(day: int) -> Summary:
        path = tmp_path / f"{day}.csv"
        path.write_text(f"time,open,high,low,close,volume\n2024-05-0{day}T00:00:00Z,5,7,4,6,10\n")
        return run(Plan((path,), Given("binance", "BTCUSDT", 60)), load(), lambda _: None)

    assert [(s.stored, s.unchanged) for s in map(bring, (1, 1, 2, 3))] == [(1, 0), (0, 1), (1, 0), (1, 0)]
    assert len(bigquery.rows("candles")) == 3
