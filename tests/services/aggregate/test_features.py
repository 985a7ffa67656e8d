"""Features against TA-Lib, streaming candle by candle."""

from __future__ import annotations

import numpy as np
import pytest
import talib

from services.aggregate.features import step
from services.aggregate.layout import FEATURE_STATE
from shared.frames import FEATURE_COLUMNS, FIXED, Rows

BARS = 10_000


@pytest.fixture(scope="module")
def candles() -> Rows:
    rng = np.random.default_rng(11)
    rows = np.zeros(BARS, FIXED)
    rows["close"] = 5000 + np.round(np.cumsum(rng.normal(0, 2, BARS)) * 4) / 4
    rows["close"][200:240] = rows["close"][200]  # a flat stretch
    rows["high"], rows["low"] = rows["close"] + 1, rows["close"] - 1
    rows["volume"] = rng.integers(1, 500, BARS)
    rows["vd"] = np.round(rows["volume"] * rng.uniform(-1, 1, BARS))
    rows["ask_volume"] = (rows["volume"] + rows["vd"]) / 2
    rows["bid_volume"] = (rows["volume"] - rows["vd"]) / 2
    rows["trades"], rows["vwap"] = 7, rows["close"]
    return rows


@pytest.fixture(scope="module")
def streamed(candles: Rows) -> Rows:
    """Each candle once, and a restart from the stored state after every 777th."""
    rows, state = candles.copy(), np.zeros(FEATURE_STATE)
    for i in range(BARS):
        step(state, rows[i], 15)
        if i % 777 == 0:
            state = np.frombuffer(state.tobytes()).copy()
    return rows


def agrees(mine: Rows, theirs: Rows, warm: int) -> None:
    assert np.isnan(theirs[:warm]).all()
    assert not np.isnan(theirs[warm:]).any()
    np.testing.assert_allclose(mine[warm:], theirs[warm:], rtol=1e-9, atol=1e-9)


def test_moving_averages(candles: Rows, streamed: Rows) -> None:
    close = candles["close"].copy()
    for n in (5, 10, 20):
        agrees(streamed[f"sma_{n}"], talib.SMA(close, n), n - 1)
        agrees(streamed[f"ema_{n}"], talib.EMA(close, n), n - 1)
        assert np.isnan(streamed[f"ema_{n}"][: n - 1]).all()
    agrees(streamed["wma_5"], talib.WMA(close, 5), 4)
    agrees(streamed["volume_sma_5"], talib.SMA(candles["volume"].copy(), 5), 4)
    agrees(streamed["volume_ema_5"], talib.EMA(candles["volume"].copy(), 5), 4)


def test_rsi_where_the_market_moves(candles: Rows, streamed: Rows) -> None:
    theirs = talib.RSI(candles["close"].copy(), 5)
    moved = theirs != 0  # TA-Lib calls a flat market 0, we call it 50
    np.testing.assert_allclose(streamed["rsi_5"][5:][moved[5:]], theirs[5:][moved[5:]], rtol=1e-9)
    assert np.isnan(streamed["rsi_5"][:5]).all()


def test_rsi_of_a_market_that_never_moved_is_50() -> None:
    rows, state = np.ones(20, FIXED), np.zeros(FEATURE_STATE)
    for row in rows:
        step(state, row, 15)
    assert rows["rsi_5"][5:].tolist() == [50.0] * 15


def test_bollinger_position(candles: Rows, streamed: Rows) -> None:
    close = candles["close"].copy()
    upper, _, lower = talib.BBANDS(close, 20, 2, 2)
    wide = (upper - lower) > 1e-3
    expected = (close[wide] - lower[wide]) / (upper[wide] - lower[wide])
    mine = streamed["bollinger_position"]
    np.testing.assert_allclose(mine[wide], expected, rtol=1e-9, atol=1e-9)
    assert np.isnan(mine[:19]).all()
    assert np.isnan(mine[225:239]).all()  # flat for 20 candles: no band


def test_macd(candles: Rows, streamed: Rows) -> None:
    macd, signal, hist = talib.MACD(candles["close"].copy(), 12, 26, 9)
    for mine, theirs in (("macd", macd), ("macd_signal", signal), ("macd_hist", hist)):
        np.testing.assert_allclose(streamed[mine][33:], theirs[33:], rtol=1e-9, atol=1e-9)
    assert np.isnan(streamed["macd"][:25]).all()
    assert np.isnan(streamed["macd_signal"][:33]).all()


def test_nothing_is_made_up_before_it_is_warm(streamed: Rows) -> None:
    warm = {
        "sma_20": 19, "ema_20": 19, "momentum_3": 3, "momentum_5": 5, "velocity": 1, "acceleration": 2,
        "volume_ratio": 4, "volatility_5": 5, "volatility_10": 10, "log_return": 1, "price_impact": 1,
        "kyle_lambda": 20, "macd_hist": 33,
    }  # fmt: skip
    for name, first in warm.items():
        assert np.isnan(streamed[name][:first]).all(), name
        assert not np.isnan(streamed[name][first]), name
    assert np.isfinite(streamed["vpin"]).any()
    first = int(np.flatnonzero(np.isfinite(streamed["vpin"]))[0])
    assert first >= 49 + 40  # 50 candles for the first bucket's size, then 50 full buckets
    for name in FEATURE_COLUMNS:
        assert not np.isinf(streamed[name]).any(), name
    vpin = streamed["vpin"][first:]
    assert ((vpin >= 0) & (vpin <= 1)).all()
