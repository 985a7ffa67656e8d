"""The signals of one window of one underlying: its rows against their history (pure)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from services.signals import score
from services.signals.baseline import INSUFFICIENT, Baseline, Book, Bucket, Key, Past, bucket_of, volume_of
from shared.frames import NS
from shared.messages import Components, Pressure, Signal

Side = tuple[int, str, str]  # expiration_ns, option_type, dominant_side
SIDES = {1: "BUY", -1: "SELL"}
NEUTRAL = "NEUTRAL"


class Limits(NamedTuple):
    """What the settings say of signals."""

    min_samples: int = 20
    cluster_width: int = 3
    emit_from: float = 0.6


class Judged(NamedTuple):
    """Signals in the order of their keys, and how many rows had no baseline."""

    signals: list[Signal]
    insufficient: int


def judge(rows: Mapping[Key, Pressure], book: Book, past: Past, limits: Limits) -> Judged:
    """The signals of a window that reach `emit_from`; a rejected one if it would without the market maker's part.

    Revisions and `timestamp_out_ns` are 0: whoever publishes knows them.
    """
    ranks = ranks_of(rows.values())
    pools: dict[Bucket, Baseline] = {}
    signals: list[Signal] = []
    insufficient = 0
    for key in sorted(rows):
        row = rows[key]
        usual = book.baseline(key, bucket_of(row.moneyness), past, limits.min_samples, pools)
        insufficient += usual.level == INSUFFICIENT
        side = score.direction(row.log_ratio)
        if side:
            length = row.window_sec * NS
            before = book.last(key, past, (row.time_window_ns - 2 * length, row.time_window_ns - length))
            parts = components(row, side, usual, [*before, row.log_ratio], cluster_size(row, ranks, limits))
            other = rows.get((row.expiration_ns, row.strike, "P" if row.option_type == "C" else "C"))
            signal = _signal(row, side, usual, parts, other, limits.emit_from)
            signals += [signal] if signal is not None else []
    return Judged(signals, insufficient)


def ranks_of(rows: Iterable[Pressure]) -> dict[Side, list[int]]:
    """Sorted places of the strikes on each side of an expiration and type."""
    ranks: dict[Side, list[int]] = {}
    for row in rows:
        if row.dominant_side != NEUTRAL:
            ranks.setdefault((row.expiration_ns, row.option_type, row.dominant_side), []).append(row.strike_rank)
    for found in ranks.values():
        found.sort()
    return ranks


def cluster_size(row: Pressure, ranks: Mapping[Side, list[int]], limits: Limits) -> int:
    """Strikes within the cluster's width on the row's side, itself included; a neutral one is alone."""
    if row.dominant_side == NEUTRAL:
        return 1
    found = ranks[row.expiration_ns, row.option_type, row.dominant_side]
    low, high = row.strike_rank - limits.cluster_width, row.strike_rank + limits.cluster_width
    return bisect_right(found, high) - bisect_left(found, low)


def components(row: Pressure, side: int, usual: Baseline, last: list[float | None], cluster: int) -> Components:
    """What the score is made of but for the market maker; `last` are the log ratios of the last windows."""
    volume = volume_of(row)
    z = z_volume = percentile = volume_percentile = volume_95 = None
    base = 0.0
    if usual.level != INSUFFICIENT:
        z, percentile = score.robust_z(row.log_ratio, usual.ratio_spread), score.percentile(row.log_ratio, usual.ratios)
        z_volume, volume_percentile = (
            score.robust_z(volume, usual.volume_spread), score.percentile(volume, usual.volumes)
        )  # fmt: skip
        volume_95 = usual.volume_95
        base = score.base(z, score.tail(row.log_ratio, usual.ratios, side))
    significance = score.significance(row.log_ratio, volume, volume_95, row.confidence)
    trend, persistence = score.trend(last, side), score.persistence(last, side)
    concentration = score.concentration(row.ask_volume, row.bid_volume)
    return Components(
        raw=score.raw(significance, trend, concentration, persistence), base=base, significance=significance,
        trend=trend, concentration=concentration, persistence=persistence, z=z, z_volume=z_volume,
        percentile=percentile, volume_percentile=volume_percentile, volume_95=volume_95,
        cluster_size=cluster, cluster_factor=score.cluster_factor(cluster),
    )  # fmt: skip


def market_maker(row: Pressure, other: Pressure | None) -> tuple[float, str]:
    """(straddle score, what it is made of in words) of a row and the other option at its strike and expiration."""
    if other is None:
        return 0.0, ""
    calls, puts = map(volume_of, (row, other) if row.option_type == "C" else (other, row))
    apart = abs(row.mean_ns - other.mean_ns) / NS
    found = score.straddle(calls, puts, apart)
    return found, f"straddle score {found:.2f} (calls {calls:g}, puts {puts:g}, {apart:.0f} s apart)"


def _signal(
    row: Pressure, side: int, usual: Baseline, parts: Components, other: Pressure | None, emit_from: float
) -> Signal | None:
    maker, words = market_maker(row, other)
    status = score.status(maker)
    total = score.score(parts.raw, parts.base, maker, parts.cluster_factor)
    deciding = score.score(parts.raw, parts.base, 0.0, parts.cluster_factor) if status == "rejected" else total
    if deciding < emit_from:
        return None
    pressure = score.anomalous(parts.z, parts.percentile, side)
    types = score.types_of(row, side, pressure, score.anomalous(parts.z_volume, parts.volume_percentile))
    return Signal(
        underlying=row.underlying, time_window_ns=row.time_window_ns, window_sec=row.window_sec,
        signal_type=types[0], direction=SIDES[side], score=total, grade=score.grade(total),
        expiration_ns=row.expiration_ns, strike=row.strike, option_type=row.option_type, types=types, status=status,
        reason=f"market maker: {words}" if status != "emitted" else "", baseline=usual.level,
        baseline_size=usual.size, components=replace(parts, market_maker=maker),
        log_ratio=row.log_ratio, volume=volume_of(row),
        premium=row.premium, underlying_price=row.underlying_price, moneyness=row.moneyness, complete=row.complete,
    )  # fmt: skip
