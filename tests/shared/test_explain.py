"""`tapeline explain`: the trades behind a candle, the arithmetic behind a score."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shared.cli import cli
from shared.explain import score
from tests.services.ingest.ndjson import trade, write

NS = 1_000_000_000


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with four minutes of trades, three a minute, and their candles."""
    tape = [
        trade("binance", "BTCUSDT", 20_000 * i, i, price=100.0 + i, amount=2.0, side="buy" if i % 3 else "sell")
        for i in range(12)
    ]
    url = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("TAPELINE_SINK_MODES", "candles,ticks")
    done = run("backfill", str(write(tmp_path / "tape.ndjson", tape)), "--store", url, fails=False)
    assert "12 trades" in done.output
    return url


def run(*args: str, fails: bool) -> Result:
    result = CliRunner().invoke(cli, args)
    assert (result.exit_code != 0) is fails, result.output
    return result


def found(*args: str) -> list[dict[str, Any]]:
    return json.loads(run("explain", *args, "--json", fails=False).stdout)


def test_the_trades_behind_a_candle(store: str) -> None:
    (one,) = found("candles", "symbol=BTCUSDT", "timeframe=1m", "--store", store)
    assert [t["price"] for t in one["trades"]] == [106.0, 107.0, 108.0]
    assert {name: said["agrees"] for name, said in one["recount"].items()} == dict.fromkeys(
        ("trades", "volume", "high", "low"), True
    )
    assert one["recount"]["volume"] == {"stored": 6.0, "counted": 6.0, "agrees": True}
    two = found("candles", "symbol=BTCUSDT", "timeframe=1m", "--store", store, "--last", "2")
    assert [len(each["trades"]) for each in two] == [3, 3]
    text = run("explain", "candles", "timeframe=15s", "--store", store, fails=False).stdout
    assert "volume: stored 2.0, counted 2.0: agrees" in text


def test_a_row_that_its_trades_do_not_bear_out(store: str) -> None:
    with sqlite3.connect(store.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE candles SET volume = 7 WHERE timeframe = '1m'")
    (one,) = found("candles", "timeframe=1m", "--store", store)
    assert one["recount"]["volume"] == {"stored": 7.0, "counted": 6.0, "agrees": False}
    assert "DIFFERS" in run("explain", "candles", "timeframe=1m", "--store", store, fails=False).stdout


def test_what_cannot_be_explained_is_said(store: str) -> None:
    def said(*args: str) -> str:
        result = CliRunner().invoke(cli, ["explain", *args, "--store", store])
        assert result.exit_code != 0
        return str(result.exception)

    assert "no rows of 'gaps' are explained" in said("gaps")
    assert "has no column 'colour'" in said("candles", "colour=red")
    assert "wants a number" in said("candles", "volume=much")
    assert run("explain", "candles", "symbol", "--store", store, fails=True).exit_code == 2
    assert "no such row" in run("explain", "signals", "--store", store, fails=False).stdout


def test_the_arithmetic_of_a_score() -> None:
    row = {
        "raw": 0.8, "base": 0.9, "significance": 1.0, "trend": 0.5, "concentration": 1.0, "persistence": 0.5,
        "z": 3.2, "percentile": 97.5, "z_volume": None, "volume_percentile": None, "volume_95": None,
        "market_maker": 0.1, "cluster_factor": 1.2, "cluster_size": 3, "score": 0.969, "baseline": "key",
        "baseline_size": 25, "types": '["sweep", "pressure_spike"]', "type": "sweep",
    }  # fmt: skip
    text = "\n".join(score(row))
    assert "score 0.969 = clamp((0.5 x 0.800 + 0.5 x 0.900) x (1 - 0.5 x 0.100) x 1.2, 0, 1)" in text
    assert "baseline key of 25 windows" in text
    assert "z undefined" in text
    assert "sweep, pressure_spike" in text
    assert not score(row | {"raw": None})
