"""Features of fixed candles, candle by candle (compiled). docs/concepts.md says what each one is.

A feature state is a row of numbers (`layout.COUNT` …): what the next candle's features need of those
before it. Window sums are taken anew from the newest values, so nothing drifts.

EMA, RSI, Bollinger bands and MACD agree with TA-Lib, in their seeds too.
"""

from __future__ import annotations

import numpy as np

from services.aggregate.layout import (
    BOUGHT,
    BUCKETS,
    CLOSES,
    COUNT,
    EMA_5,
    EMA_10,
    EMA_20,
    FAST,
    FILLED,
    FULL,
    GAIN,
    LOSS,
    RETURNS,
    SIDED,
    SIGNAL,
    SIGNED,
    SIZE,
    SIZES,
    SLOW,
    SOLD,
    VOLUME_EMA,
    VOLUMES,
)
from shared.compiled import jit
from shared.frames import Row, Rows

# Rings are powers of two, at least as long as what looks into them.
_CLOSES, _RETURNS, _VOLUMES, _BUCKETS = 31, 15, 7, 63
VPIN_BUCKETS = 50


@jit
def _mean(s: Rows, ring: int, mask: int, n: int, length: int) -> float:
    """Mean of the newest `length` values up to number `n`, oldest first; NaN while there are fewer."""
    if n + 1 < length:
        return np.nan
    total = 0.0
    for i in range(n - length + 1, n + 1):
        total += s[ring + (i & mask)]
    return total / length


@jit
def _deviation(s: Rows, ring: int, mask: int, n: int, length: int, mean: float) -> float:
    """Population standard deviation of the newest `length` values around their mean."""
    total = 0.0
    for i in range(n - length + 1, n + 1):
        apart = s[ring + (i & mask)] - mean
        total += apart * apart
    return float(np.sqrt(total / length))


@jit
def _ema(s: Rows, at: int, n: int, length: int, value: float, seed: float) -> float:
    """Exponential mean with α = 2/(length + 1), seeded with the simple mean of its first values."""
    if n + 1 < length:
        return np.nan
    if n + 1 == length:
        s[at] = seed
    else:
        s[at] += (value - s[at]) * (2.0 / (length + 1))
    return float(s[at])


@jit
def _momentum(s: Rows, n: int, back: int) -> float:
    """Relative change since `back` candles ago."""
    then = s[CLOSES + ((n - back) & _CLOSES)] if n >= back else np.nan
    return s[CLOSES + (n & _CLOSES)] / then - 1.0 if then != 0 else np.nan


@jit
def _rsi(s: Rows, n: int, change: float) -> float:
    """Wilder's RSI of five changes; a flat market is 50."""
    if n == 0:
        s[GAIN] = s[LOSS] = 0.0
        return np.nan
    gain, loss = max(change, 0.0), max(-change, 0.0)
    if n <= 5:
        s[GAIN] += gain / 5.0
        s[LOSS] += loss / 5.0
        if n < 5:
            return np.nan
    else:
        s[GAIN] = (s[GAIN] * 4.0 + gain) / 5.0
        s[LOSS] = (s[LOSS] * 4.0 + loss) / 5.0
    both = s[GAIN] + s[LOSS]
    return 100.0 * s[GAIN] / both if both > 0 else 50.0


@jit
def _kyle(s: Rows, n: int) -> float:
    """Slope of the price change on the signed volume over 20 candles."""
    if n < 20:
        return np.nan
    x_mean = _mean(s, SIGNED, _CLOSES, n, 20)
    y_mean = (s[CLOSES + (n & _CLOSES)] - s[CLOSES + ((n - 20) & _CLOSES)]) / 20.0
    xy = xx = 0.0
    for i in range(n - 19, n + 1):
        x = s[SIGNED + (i & _CLOSES)] - x_mean
        y = s[CLOSES + (i & _CLOSES)] - s[CLOSES + ((i - 1) & _CLOSES)]
        xy += x * (y - y_mean)
        xx += x * x
    return xy / xx if xx > 0 else np.nan


@jit
def _vpin(s: Rows, n: int, buy: float, sell: float) -> float:
    """Fill volume buckets with this candle's sided volume; the mean imbalance of the newest 50 full ones.

    A bucket holds the mean sided volume of the newest 50 candles at the time when it opens.
    """
    s[SIDED + (n & _BUCKETS)] = buy + sell
    size = _mean(s, SIDED, _BUCKETS, n, VPIN_BUCKETS)
    if size > 0:  # not while NaN
        left = buy + sell
        while left > 0:
            if s[SIZE] <= 0:
                s[SIZE] = size
            take = min(left, s[SIZE] - s[FILLED])
            s[BOUGHT] += take * buy / (buy + sell)
            s[SOLD] += take * sell / (buy + sell)
            s[FILLED] += take
            left -= take
            if s[FILLED] >= s[SIZE]:
                at = int(s[FULL]) & _BUCKETS
                s[BUCKETS + at] = abs(s[BOUGHT] - s[SOLD])
                s[SIZES + at] = s[SIZE]
                s[FULL] += 1
                s[SIZE] = s[FILLED] = s[BOUGHT] = s[SOLD] = 0.0
    full = int(s[FULL])
    if full < VPIN_BUCKETS:
        return np.nan
    return _mean(s, BUCKETS, _BUCKETS, full - 1, VPIN_BUCKETS) / _mean(s, SIZES, _BUCKETS, full - 1, VPIN_BUCKETS)


@jit
def step(s: Rows, o: Row, seconds: int) -> None:
    """Take the candle in `o` (a FIXED row of `seconds`) into the state and write its features into `o`."""
    n = int(s[COUNT])
    s[COUNT] = n + 1
    p, volume = o.close, o.volume
    before = s[CLOSES + ((n - 1) & _CLOSES)] if n > 0 else np.nan
    change = p - before
    s[CLOSES + (n & _CLOSES)] = p
    s[SIGNED + (n & _CLOSES)] = o.vd
    s[VOLUMES + (n & _VOLUMES)] = volume
    o.log_return = np.log(p / before) if p > 0 and before > 0 else np.nan
    s[RETURNS + (n & _RETURNS)] = o.log_return

    o.sma_5 = _mean(s, CLOSES, _CLOSES, n, 5)
    o.sma_10 = _mean(s, CLOSES, _CLOSES, n, 10)
    o.sma_20 = _mean(s, CLOSES, _CLOSES, n, 20)
    o.ema_5 = _ema(s, EMA_5, n, 5, p, o.sma_5)
    o.ema_10 = _ema(s, EMA_10, n, 10, p, o.sma_10)
    o.ema_20 = _ema(s, EMA_20, n, 20, p, o.sma_20)
    o.wma_5 = np.nan
    if n >= 4:
        weighted = 0.0
        for i in range(5):
            weighted += (i + 1) * s[CLOSES + ((n - 4 + i) & _CLOSES)]
        o.wma_5 = weighted / 15.0
    o.momentum_3 = _momentum(s, n, 3)
    o.momentum_5 = _momentum(s, n, 5)
    o.velocity = change
    o.acceleration = change - (before - s[CLOSES + ((n - 2) & _CLOSES)]) if n >= 2 else np.nan

    o.volume_sma_5 = _mean(s, VOLUMES, _VOLUMES, n, 5)
    o.volume_ema_5 = _ema(s, VOLUME_EMA, n, 5, volume, o.volume_sma_5)
    o.volume_ratio = volume / o.volume_sma_5 if o.volume_sma_5 > 0 else np.nan
    o.vwap_deviation = (p - o.vwap) / o.vwap if o.vwap != 0 else np.nan

    o.volatility_5 = o.volatility_10 = np.nan
    if n >= 5:
        o.volatility_5 = _deviation(s, RETURNS, _RETURNS, n, 5, _mean(s, RETURNS, _RETURNS, n, 5))
    if n >= 10:
        o.volatility_10 = _deviation(s, RETURNS, _RETURNS, n, 10, _mean(s, RETURNS, _RETURNS, n, 10))
    o.high_low_ratio = (o.high - o.low) / p if p != 0 else np.nan

    o.trade_intensity = o.trades / seconds
    o.avg_trade_size = volume / o.trades if o.trades > 0 else np.nan
    o.price_impact = abs(change) / volume if volume > 0 else np.nan
    o.spread_proxy = o.high - o.low
    o.order_flow_imbalance = o.vd / volume if volume > 0 else np.nan
    o.kyle_lambda = _kyle(s, n)
    o.vpin = _vpin(s, n, o.ask_volume, o.bid_volume)

    o.rsi_5 = _rsi(s, n, change)
    o.bollinger_position = np.nan
    if n >= 19:
        wide = _deviation(s, CLOSES, _CLOSES, n, 20, o.sma_20)
        o.bollinger_position = (p - o.sma_20 + 2.0 * wide) / (4.0 * wide) if wide > 0 else np.nan
    _macd(s, o, n, p)


@jit
def _macd(s: Rows, o: Row, n: int, p: float) -> None:
    """MACD (12, 26, 9); like TA-Lib's, the fast mean is seeded with the 12 closes before the slow one begins."""
    o.macd = o.macd_signal = o.macd_hist = np.nan
    if n < 25:
        return
    if n == 25:
        s[SLOW] = _mean(s, CLOSES, _CLOSES, n, 26)
        s[FAST] = _mean(s, CLOSES, _CLOSES, n, 12)
        s[SIGNAL] = 0.0
    else:
        s[SLOW] += (p - s[SLOW]) * (2.0 / 27.0)
        s[FAST] += (p - s[FAST]) * (2.0 / 13.0)
    o.macd = s[FAST] - s[SLOW]
    if n < 34:
        s[SIGNAL] += o.macd / 9.0
    if n == 33:
        o.macd_signal = s[SIGNAL]
    elif n > 33:
        s[SIGNAL] += (o.macd - s[SIGNAL]) * 0.2
        o.macd_signal = s[SIGNAL]
    o.macd_hist = o.macd - o.macd_signal


@jit
def blank(o: Row) -> None:
    """No features: every one NaN."""
    o.sma_5 = o.sma_10 = o.sma_20 = o.ema_5 = o.ema_10 = o.ema_20 = o.wma_5 = np.nan
    o.momentum_3 = o.momentum_5 = o.velocity = o.acceleration = np.nan
    o.volume_sma_5 = o.volume_ema_5 = o.volume_ratio = o.vwap_deviation = np.nan
    o.volatility_5 = o.volatility_10 = o.high_low_ratio = o.log_return = np.nan
    o.trade_intensity = o.avg_trade_size = o.price_impact = o.spread_proxy = np.nan
    o.order_flow_imbalance = o.kyle_lambda = o.vpin = np.nan
    o.rsi_5 = o.bollinger_position = o.macd = o.macd_signal = o.macd_hist = np.nan
