"""Option pressure alone: tick rows of 2,000 options in memory to messages in memory, on one core."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from services.pressure import kernel
from services.pressure.core import Emission, PartitionState
from services.pressure.state import Config
from shared.calendar import ALWAYS, sessions
from shared.frames import NS, TICK, Frame, Rows, tick_frame
from shared.instruments import instrument_id
from shared.messages import Clock, Instrument, encode

STRIKES = 1000
WINDOWS = 12
START = 1_780_000_200 * NS // (300 * NS) * (300 * NS)
EXPIRY = START + 30 * 86_400 * NS


def tape(trades: int = 2_000_000) -> tuple[Rows, list[Instrument]]:
    """Calls and puts of 1,000 strikes, an hour."""
    rng = np.random.default_rng(1)
    chain = [
        Instrument(
            id=instrument_id("X", f"OP {kind}{strike}"), venue="X", symbol=f"OP {kind}{strike}", root="OP",
            feed="bench", kind=kind, expiration_ns=EXPIRY, strike=float(strike), underlying="OPZ6", multiplier=50.0,
        )
        for strike in range(5000, 5000 + STRIKES)
        for kind in "CP"
    ]  # fmt: skip
    ticks = np.zeros(trades, TICK)
    ticks["ts_event_ns"] = START + np.sort(rng.integers(0, WINDOWS * 300 * NS, trades))
    ticks["instrument"] = rng.choice(np.array([i.id for i in chain]), trades)
    ticks["price"], ticks["size"] = rng.integers(1, 400, trades) / 4, rng.integers(1, 40, trades)
    for name in ("bid_px", "ask_px"):
        ticks[name] = np.nan
    ticks["side"] = rng.choice([1, -1], trades)
    return ticks, chain


def run(runs: int = 5) -> dict[str, Any]:
    """Trades/s with every window's messages made; medians of `runs`."""
    kernel.warm()
    ticks, chain = tape()
    return {f"frames of {size}": _one(ticks, chain, size, runs) for size in (1000, 10)}


def _one(ticks: Rows, chain: list[Instrument], size: int, runs: int) -> dict[str, Any]:
    trades = len(ticks) if size >= 100 else len(ticks) // 10
    frames = [tick_frame(ticks[at : at + size], "bench") for at in range(0, trades, size)]
    clock = Clock("bench", START, watched_from_ns=START)
    rates, rows = [], 0
    for _ in range(runs):
        state = PartitionState(Config(sessions=lambda venue, root: sessions(ALWAYS)))  # noqa: ARG005
        state.step([Frame("instrument", len(chain), 0, 0, "bench", encode(chain))])
        state.step([Frame("clock", 1, 0, 0, "bench", encode([clock]))])
        rows, began = 0, time.perf_counter()
        for frame in frames:
            rows += sum(len(each.rows) for each in state.step([frame]) if isinstance(each, Emission))
        rates.append(trades / (time.perf_counter() - began))
    return {"trades": trades, "rows": rows, "trades_per_second": round(statistics.median(rates)),
            "lowest": round(min(rates)), "highest": round(max(rates))}  # fmt: skip
