"""The kernel alone: tick rows in memory to candle rows in memory, on one core, all columns maintained."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from services.aggregate import kernel
from services.aggregate.core import PartitionState
from services.aggregate.layout import ROWS_1M, ROWS_1S, ROWS_FIXED
from services.aggregate.state import Config
from shared import messages
from shared.calendar import ALWAYS, sessions
from shared.frames import NS, TICK, Frame, Rows
from shared.instruments import instrument_id

ROOTS = ("ES", "NQ", "CL", "GC", "6E", "RTY", "ZN", "NG")
START = 1_780_000_000 * NS


def tape(trades: int = 5_000_000) -> tuple[Rows, list[messages.Instrument]]:
    """24 contracts of 8 roots, 100 trades a second of market time."""
    rng = np.random.default_rng(1)
    instruments = [
        messages.Instrument(
            id=instrument_id("X", f"{root}{month}6"), venue="X", symbol=f"{root}{month}6", root=root, feed="bench",
            expiration_ns=i,
        )
        for root in ROOTS
        for i, month in enumerate("HMU")
    ]  # fmt: skip
    ticks = np.zeros(trades, TICK)
    ticks["ts_event_ns"] = START + np.sort(rng.integers(0, trades // 100 * NS, trades))
    ticks["instrument"] = rng.choice([i.id for i in instruments], trades, p=np.tile([0.9, 0.08, 0.02], 8) / 8)
    ticks["price"] = 5000 + np.round(np.cumsum(rng.normal(0, 0.2, trades)) * 4) / 4
    ticks["bid_px"], ticks["ask_px"] = ticks["price"] - 0.25, ticks["price"] + 0.25
    ticks["size"], ticks["bid_sz"], ticks["ask_sz"] = (rng.integers(1, 40, trades) for _ in range(3))
    ticks["side"] = rng.choice([1, -1, 0], trades, p=[0.49, 0.49, 0.02])
    return ticks, instruments


def run(runs: int = 5) -> dict[str, Any]:
    """Trades/s at several frame sizes, with every rolling and fixed row made; medians of `runs`."""
    ticks, instruments = tape()
    return {
        f"frames of {size}, candles_1s {'on' if emit_1s else 'off'}": _one(ticks, instruments, size, emit_1s, runs)
        for size, emit_1s in ((1000, False), (1000, True), (10, False), (10, True))
    }


def _one(ticks: Rows, instruments: list[messages.Instrument], size: int, emit_1s: bool, runs: int) -> dict[str, Any]:
    trades = len(ticks) if size >= 100 else len(ticks) // 5
    rates, rows = [], 0
    frames = [ticks[i : i + size] for i in range(0, trades, size)]
    for _ in range(runs + 1):
        state = PartitionState(Config(sessions=lambda venue, root: sessions(ALWAYS), emit_1s=emit_1s))  # noqa: ARG005
        clock = messages.Clock("bench", START, watched_from_ns=START)
        state.step([Frame("instrument", 1, 0, 0, "b", messages.encode(instruments))])
        state.step([Frame("clock", 1, 0, 0, "b", messages.encode([clock]))])
        table, late, counters = state._bind(), state._late, state.counters
        rows = 0
        began = time.perf_counter()
        for frame in frames:
            at = 0
            while at < len(frame):
                at = kernel.run(frame, at, table, late)
                if at < len(frame) or counters[ROWS_1M] > 3000 or counters[ROWS_1S] > 3000:
                    # A step would pack them and go on.
                    rows += int(counters[ROWS_1M] + counters[ROWS_1S] + counters[ROWS_FIXED])
                    counters[ROWS_1M] = counters[ROWS_1S] = counters[ROWS_FIXED] = 0
        rates.append(trades / (time.perf_counter() - began))
    kept = sorted(rates[1:])
    return {
        "trades": trades, "rows": rows, "trades_per_second": round(statistics.median(kept)),
        "min": round(kept[0]), "max": round(kept[-1]),
    }  # fmt: skip
