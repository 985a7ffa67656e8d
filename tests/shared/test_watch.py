"""`watch` on a real bus, with candles as the aggregate stage commits them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.bus import Bus
from shared.frames import FEATURE_COLUMNS, FIXED, NS, STATE_COLUMNS, Frame
from shared.instruments import instrument_id
from shared.messages import Instrument
from shared.records import aliases, normal, number
from tests.shared.test_cli import tapeline
from tests.shared.test_cli_bus import T0, fixed, lines, publish_candles, run
from tests.wait import until

BINANCE = ("binance-futures", "BTCUSDT")
OKEX = ("okex-swap", "BTC-USDT-SWAP")
ES = ("GLBX.MDP3", "ES")
ETH = ("binance-futures", "ETHUSDT")


@pytest.fixture
def candled(bus: Bus) -> Bus:
    """Candles of four symbols in three partitions, in this order of arrival."""
    bus.deploy(4)
    warm = {"sma_5": 61000.25, "ema_5": 61000.123456789, "rsi_5": 55.123456, "vpin": 0.25, "mark_price": 61001.5}
    publish_candles(bus, 1, fixed(BINANCE, close=61000.5, **warm), fixed(ETH), fixed(BINANCE, 15))
    publish_candles(bus, 2, fixed(OKEX, close=60999.5, vd=-1.5, complete=0), fixed(ES, close=60999.5))
    publish_candles(bus, 1, fixed(BINANCE, close=61000.5, revision=2))
    return bus


def watched(bus: Bus, tmp_path: Path, *args: str) -> list[dict[str, Any]]:
    return lines(run(bus, tmp_path, "watch", *args, "--no-follow", "--json"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("BTC-USDT", [BINANCE, BINANCE, OKEX, BINANCE]),
        ("btcusdt", [BINANCE, BINANCE, OKEX, BINANCE]),
        ("BTC-USDT-SWAP", [OKEX]),
        ("binance-futures:btc_usdt", [BINANCE, BINANCE, BINANCE]),
        ("okex-swap:BTC-USDT", [OKEX]),
        ("okex-swap:BTC-USDT-SWAP", [OKEX]),
        ("binance:BTCUSDT", []),
        ("ES", [ES]),
        ("BTC", []),
    ],
)
def test_a_symbol_however_written(candled: Bus, tmp_path: Path, name: str, found: list[tuple[str, str]]) -> None:
    assert sorted((r["exchange"], r["symbol"]) for r in watched(candled, tmp_path, name)) == sorted(found)


def test_json_has_every_column(candled: Bus, tmp_path: Path) -> None:
    record = watched(candled, tmp_path, "BTC-USDT", "--timeframe", "1m", "--count", "1")[0]
    assert {*FIXED.names} - {"name"} <= record.keys()
    assert (record["time"], record["time_ns"]) == ("2023-12-25T23:00:00.000000000Z", T0)
    assert (record["end"], record["end_ns"]) == ("2023-12-25T23:01:00.000000000Z", T0 + 60 * NS)
    assert record["timestamp_out"] == "2023-12-25T23:01:00.007000000Z"
    assert (record["latency_ms"], record["trades_per_second"], record["complete"]) == (7.0, 0.5, True)
    assert record["ema_5"] == 61000.123456789
    undefined = {name for name in (*STATE_COLUMNS, *FEATURE_COLUMNS) if record[name] is None}
    assert undefined == {*STATE_COLUMNS, *FEATURE_COLUMNS} - {"sma_5", "ema_5", "rsi_5", "vpin", "mark_price"}


def test_lines_for_people(candled: Bus, tmp_path: Path) -> None:
    text = run(candled, tmp_path, "watch", "BTCUSDT", "ES", "--no-follow", "--timeframe", "1m").splitlines()
    # Entries of one millisecond in two partitions have no order.
    assert sorted(text) == sorted([
        "2023-12-25T23:00:00Z  binance-futures:BTCUSDT   1m  O 61000 H 61001 L 60999.5 C 61000.5  V 2.5  vd 0  n 30"
        "  0.5/s  mark 61001.5  rsi 55.12  ema5 61000.12  vpin 0.25",
        "2023-12-25T23:00:00Z  okex-swap:BTC-USDT-SWAP   1m  O 61000 H 61001 L 60999.5 C 60999.5  V 2.5  vd -1.5  n 30"
        "  0.5/s  incomplete",
        "2023-12-25T23:00:00Z  GLBX.MDP3:ES   1m  O 61000 H 61001 L 60999.5 C 60999.5  V 2.5  vd 0  n 30  0.5/s",
        "2023-12-25T23:00:00Z  binance-futures:BTCUSDT   1m  O 61000 H 61001 L 60999.5 C 61000.5  V 2.5  vd 0  n 30"
        "  0.5/s  revision 2",
    ])  # fmt: skip


def test_other_frames_of_the_topic_are_passed_over(candled: Bus, tmp_path: Path) -> None:
    publish_candles(
        candled, 3, Frame("candle_1m", 0, T0, T0, "aggregate", b""), Frame("unreadable", 1, 0, 0, "", b"why\n{")
    )
    assert len(watched(candled, tmp_path, "BTC-USDT")) == 4


def environ(bus: Bus) -> dict[str, str]:
    return os.environ | {"REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace}


def test_it_waits_for_a_symbol_and_prints_as_candles_come(candled: Bus, tmp_path: Path) -> None:
    line = [sys.executable, "-P", "-m", "shared.cli", "watch", "BTC-USDT", "SOL-USDT", "--json", "--from", "start"]
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environ(candled), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        for _ in range(4):
            assert json.loads(process.stdout.readline())["symbol"] in {"BTCUSDT", "BTC-USDT-SWAP"}
        publish_candles(candled, 3, fixed(("bybit", "SOLUSDT")))
        assert json.loads(process.stdout.readline())["symbol"] == "SOLUSDT"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.split("\n") == [
        "tapeline: nothing on the bus is called BTC-USDT yet, waiting for it",
        "tapeline: nothing on the bus is called SOL-USDT yet, waiting for it",
        "",
        "tapeline: interrupted",
        "",
    ]


def test_a_known_symbol_is_not_waited_for(candled: Bus, tmp_path: Path) -> None:
    known = Instrument(
        instrument_id(*OKEX), OKEX[0], OKEX[1], "okex-swap:BTC", "tardis:okex-swap", ticker="okex-swap:BTC-USDT-SWAP"
    )
    candled.call("hset", candled.keys.instruments(2), known.id, msgspec.json.encode(known))
    done = tapeline("watch", "BTC-USDT", "--no-follow", cwd=tmp_path, **environ(candled))
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_terminal_gets_colours(candled: Bus, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, "-P", "-m", "shared.cli", "watch", "BTCUSDT", "ES", "--no-follow", "--timeframe", "1m"]
    env = {name: value for name, value in environ(candled).items() if name != "NO_COLOR"}
    done = subprocess.run(line, cwd=tmp_path, env=env, stdout=theirs, timeout=60, check=False)
    os.close(theirs)
    assert done.returncode == 0
    text = until(lambda: os.read(ours, 65536)).decode()
    os.close(ours)
    starts = [piece[:5] for piece in text.splitlines()]
    assert sorted(starts) == ["\x1b[31m", "\x1b[32m", "\x1b[32m", "\x1b[33m"]


def test_wrong_usage(bus: Bus, tmp_path: Path) -> None:
    done = tapeline("watch", "ES", "--timeframe", "90x", cwd=tmp_path, **environ(bus))
    assert done.returncode == 2
    assert "no timeframe such as" in done.stderr
    bus.deploy(4)
    done = tapeline("watch", "ES", "--timeframe", "3m", "--no-follow", cwd=tmp_path, **environ(bus))
    assert done.returncode == 0
    assert "no 3m candles are made by these settings, only 15s, 1m" in done.stderr


def test_names() -> None:
    assert normal("btc-usdt_swap") == "BTCUSDTSWAP"
    assert normal("okex-swap:btc-usdt") == "OKEX-SWAP:BTCUSDT"
    assert aliases("deribit", "BTC-PERPETUAL") == {"BTCPERPETUAL", "BTC", "DERIBIT:BTCPERPETUAL", "DERIBIT:BTC"}
    assert "SWAP" in aliases("x", "SWAP")
    assert [number(v, 4) for v in (0.0, 12345.678, 0.000012345, -1.0, None)] == ["0", "12350", "0.00001234", "-1", "-"]
