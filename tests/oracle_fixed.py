"""Fixed candles and their features, slowly: from an oracle's accepted trades, each candle and feature from scratch."""

from __future__ import annotations

import itertools
import math
from typing import Any

from tests.oracle import NS, Oracle

Bar = dict[str, Any]


def bars_of(truth: Oracle, seconds: int, offset: int = 0) -> dict[tuple[str, int], Bar]:
    """{(symbol or ticker, start second): columns} of every candle that has closed and holds a trade."""
    out: dict[tuple[str, int], Bar] = {}
    spans: dict[str, set[int]] = {}
    for (contract, second), trades in truth.by_second.items():
        start = (second - offset) // seconds * seconds + offset
        if trades and start + seconds <= truth.closed:
            spans.setdefault(contract, set()).add(start)
    for contract, starts in spans.items():
        root = truth.contracts[contract][0]
        for start in sorted(starts):
            end = start + seconds
            cvd = sum(t.side * t.size for t in truth.trades if t.contract == contract and t.ts < end * NS)
            out[contract, start] = _bar(truth, contract, root, start, end, cvd)
            if truth.front_of.get((root, end)) == contract:
                out[root, start] = _bar(truth, contract, root, start, end, truth._cvd(root, end))
    return out


def _bar(truth: Oracle, contract: str, root: str, start: int, end: int, cvd: float) -> Bar:
    row = truth._row(contract, root, start, end, cvd, 0.0)
    names = (
        "open", "high", "low", "close", "volume", "trades", "vwap", "ask_volume", "bid_volume", "unknown_volume",
        "vd", "cvd_open", "cvd_high", "cvd_low", "cvd_close", "complete",
    )  # fmt: skip
    bar = {name: row[name] for name in names}
    bar["quoted_spread"] = row["avg_spread"]
    if start * NS < truth.first_watched:
        bar["complete"] = 0
    return bar


def features_of(bars: list[Bar], seconds: int) -> list[dict[str, float]]:
    """The features of consecutive candles of one symbol, each looked up in the whole list."""
    p = [b["close"] for b in bars]
    v = [b["volume"] for b in bars]
    d = [math.nan] + [b - a for a, b in itertools.pairwise(p)]
    r = [math.nan] + [math.log(b / a) for a, b in itertools.pairwise(p)]
    slow, fast = _ema(p, 26), _ema(p[14:], 12, lead=min(14, len(p)))
    macd = [b - a for a, b in zip(slow, fast, strict=True)]
    signal = _ema(macd[25:], 9, lead=min(25, len(p)))
    vpin = _vpin(bars)
    rsi = _rsi(d)
    out = []
    for n, b in enumerate(bars):
        sma20, sigma = _sma(p, n, 20), _std(p, n, 20)
        wide = sigma > 0
        row = {
            **{f"sma_{m}": _sma(p, n, m) for m in (5, 10, 20)},
            **{f"ema_{m}": _ema(p, m)[n] for m in (5, 10, 20)},
            "wma_5": sum((i + 1) * p[n - 4 + i] for i in range(5)) / 15 if n >= 4 else math.nan,
            **{f"momentum_{m}": p[n] / p[n - m] - 1 if n >= m else math.nan for m in (3, 5)},
            "velocity": d[n],
            "acceleration": d[n] - d[n - 1] if n >= 2 else math.nan,
            "volume_sma_5": _sma(v, n, 5),
            "volume_ema_5": _ema(v, 5)[n],
            "volume_ratio": v[n] / _sma(v, n, 5),
            "vwap_deviation": (p[n] - b["vwap"]) / b["vwap"],
            "volatility_5": _std(r, n, 5) if n >= 5 else math.nan,
            "volatility_10": _std(r, n, 10) if n >= 10 else math.nan,
            "high_low_ratio": (b["high"] - b["low"]) / p[n],
            "log_return": r[n],
            "trade_intensity": b["trades"] / seconds,
            "avg_trade_size": v[n] / b["trades"],
            "price_impact": abs(d[n]) / v[n],
            "spread_proxy": b["high"] - b["low"],
            "order_flow_imbalance": b["vd"] / v[n],
            "kyle_lambda": _slope([b["vd"] for b in bars[n - 19 : n + 1]], d[n - 19 : n + 1]) if n >= 20 else math.nan,
            "vpin": vpin[n],
            "rsi_5": rsi[n],
            "bollinger_position": (p[n] - (sma20 - 2 * sigma)) / (4 * sigma) if wide else math.nan,
            "macd": macd[n],
            "macd_signal": signal[n],
            "macd_hist": macd[n] - signal[n],
        }
        out.append(row)
    return out


def _sma(x: list[float], n: int, m: int) -> float:
    return sum(x[n - m + 1 : n + 1]) / m if n + 1 >= m else math.nan


def _std(x: list[float], n: int, m: int) -> float:
    if n + 1 < m:
        return math.nan
    mean = _sma(x, n, m)
    return math.sqrt(sum((a - mean) ** 2 for a in x[n - m + 1 : n + 1]) / m)


def _ema(x: list[float], m: int, lead: int = 0) -> list[float]:
    """With `lead` values of NaN before it (fewer when there is nothing behind)."""
    out = [math.nan] * min(m - 1, len(x))
    if len(x) >= m:
        out.append(sum(x[:m]) / m)
        for a in x[m:]:
            out.append(a * 2 / (m + 1) + out[-1] * (1 - 2 / (m + 1)))
    return [math.nan] * lead + out


def _rsi(d: list[float]) -> list[float]:
    out = [math.nan] * min(5, len(d))
    for n in range(5, len(d)):
        if n == 5:
            gain = sum(max(c, 0) for c in d[1:6]) / 5
            loss = sum(max(-c, 0) for c in d[1:6]) / 5
        else:
            gain, loss = (gain * 4 + max(d[n], 0)) / 5, (loss * 4 + max(-d[n], 0)) / 5
        out.append(100 * gain / (gain + loss) if gain + loss else 50.0)
    return out


def _slope(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    xx = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / xx if xx else math.nan


def _vpin(bars: list[Bar]) -> list[float]:
    full: list[tuple[float, float]] = []  # (imbalance, size)
    bucket: list[float] = []  # buy, sell, size of the open one
    out = []
    for n, b in enumerate(bars):
        sided = [x["ask_volume"] + x["bid_volume"] for x in bars[max(0, n - 49) : n + 1]]
        size = sum(sided) / 50
        left = sided[-1] if n >= 49 and size > 0 else 0.0
        share = b["ask_volume"] / sided[-1] if sided[-1] else 0.0
        while left > 0:
            bucket = bucket or [0.0, 0.0, size]
            take = min(left, bucket[2] - bucket[0] - bucket[1])
            bucket[0] += take * share
            bucket[1] += take * (1 - share)
            left -= take
            if left > 0 or bucket[2] - bucket[0] - bucket[1] < 1e-9 * bucket[2]:
                full.append((abs(bucket[0] - bucket[1]), bucket[2]))
                bucket = []
        newest = full[-50:]
        out.append(sum(i for i, _ in newest) / sum(s for _, s in newest) if len(newest) == 50 else math.nan)
    return out
