"""The signals of a tape once more, slowly: plain loops over all rows ever seen, sessions that are UTC days."""

from __future__ import annotations

import math
import statistics
from typing import Any

from shared.messages import Pressure
from tests.services.signals.tape import DAY, WINDOW

Rows = dict[int, dict[tuple[int, float, str], Pressure]]  # window -> key -> row


def verdicts(rows: Rows, at: int, sessions: int, least: int, width: int, emit_from: float) -> dict[Any, dict[str, Any]]:
    """Key -> what is to be said of it in the window at `at`."""
    first = (at // DAY - sessions) * DAY
    past = [r for w in sorted(rows) if first <= w < at for r in rows[w].values()]
    out = {}
    for key, row in rows[at].items():
        if row.log_ratio == 0:
            continue
        side = 1 if row.log_ratio > 0 else -1
        own = [r for r in past if (r.expiration_ns, r.strike, r.option_type) == key]
        timed = [r for r in own if r.time_window_ns % DAY == at % DAY]
        near = [
            r for r in past
            if r.option_type == row.option_type and r.moneyness is not None and row.moneyness is not None
            and round(r.moneyness / 0.02) == round(row.moneyness / 0.02)
        ]  # fmt: skip
        found = [(n, s) for n, s in (("key_time", timed), ("key", own), ("moneyness", near)) if len(s) >= least]
        level, held = found[0] if found else ("insufficient", [])
        verdict = _score(row, side, held, [_ratio(rows, at - n * WINDOW, key) for n in (2, 1)] + [row.log_ratio])
        like = [
            r for r in rows[at].values()
            if (r.expiration_ns, r.option_type, r.dominant_side) == (key[0], key[2], row.dominant_side)
            and abs(r.strike_rank - row.strike_rank) <= width
        ]  # fmt: skip
        cluster = len(like) if row.dominant_side != "NEUTRAL" else 1
        factor = 1.2 if cluster >= 3 else 1.1 if cluster == 2 else 0.9
        maker = _maker(row, rows[at].get((key[0], key[1], "P" if key[2] == "C" else "C")))
        free = min(verdict["mean"] * factor, 1.0)
        score = min(verdict["mean"] * (1 - maker / 2) * factor, 1.0)
        status = "rejected" if maker > 0.3 else "monitor" if maker > 0.21 else "emitted"
        if (free if status == "rejected" else score) >= emit_from:
            out[key] = {
                "status": status, "score": score, "direction": "BUY" if side > 0 else "SELL", "baseline": level,
                "cluster": cluster, "maker": maker, "size": len(held) or max(len(own), len(near)), **verdict,
            }  # fmt: skip
    return out


def _volume(row: Pressure) -> float:
    return row.ask_volume + row.bid_volume + row.unknown_volume


def _ratio(rows: Rows, at: int, key: Any) -> float | None:
    row = rows.get(at, {}).get(key)
    return None if row is None else row.log_ratio


def _z(x: float, held: list[float]) -> float:
    middle = statistics.median(held)
    strays = [abs(h - middle) for h in held]
    unit = 1.4826 * statistics.median(strays) or 1.2533 * sum(strays) / len(strays)
    if unit == 0:
        return 0.0 if x == middle else math.copysign(10, x - middle)
    return max(-10.0, min((x - middle) / unit, 10.0))


def _score(row: Pressure, side: int, held: list[Pressure], last: list[float | None]) -> dict[str, Any]:
    ratios, volumes = [r.log_ratio for r in held], sorted(map(_volume, held))
    out: dict[str, Any] = {"z": None, "z_volume": None, "percentile": None}
    base = busy = 0.0
    if held:
        out["z"], out["z_volume"] = _z(row.log_ratio, ratios), _z(_volume(row), volumes)
        share = sum(1.0 if r < row.log_ratio else 0.5 if r == row.log_ratio else 0.0 for r in ratios) / len(ratios)
        out["percentile"] = 100 * share
        base = min(abs(out["z"]) / 4, 1) / 2 + (share if side > 0 else 1 - share) / 2
        place = 0.95 * (len(volumes) - 1)
        low = int(place)
        v95 = volumes[low] + (place - low) * (volumes[min(low + 1, len(volumes) - 1)] - volumes[low])
        busy = min(_volume(row) / v95, 1.0)
    if last[1] is None:
        trend = 0.0
    elif last[0] is None:
        trend = row.log_ratio - last[1]
    else:
        trend = (row.log_ratio - last[0]) / 2
    trend = side * max(-1.0, min(trend, 1.0))
    significance = min(abs(row.log_ratio) / math.log(10), 1) / 2 + 0.3 * busy + 0.2 * row.confidence
    share = max(row.ask_volume, row.bid_volume) / (row.ask_volume + row.bid_volume)
    persistence = sum(x is not None and x * side > 0 for x in last) / 3
    raw = max(0.0, min(0.4 * significance + 0.3 * trend + 0.2 * (2 * share - 1) + 0.1 * persistence, 1.0))
    return out | {"raw": raw, "base": base, "mean": (raw + base) / 2}


def _maker(row: Pressure, other: Pressure | None) -> float:
    if other is None:
        return 0.0
    a, b = _volume(row), _volume(other)
    apart = abs(row.mean_ns - other.mean_ns) / 1e9
    return 1.4 * min(a, b) / (a + b) + 0.3 * (1 - min(apart / 300, 1))
