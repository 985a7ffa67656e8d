"""Names, ids, roots, expiries, aggressors."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from shared.instruments import instrument_id, is_spread, parse_outright, partition_of
from shared.sides import lee_ready


def ns(year: int, month: int) -> int:
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("symbol", "on", "root", "expiry"),
    [
        ("ESH4", ns(2023, 12), "ES", ns(2024, 4)),
        ("ESZ3", ns(2023, 12), "ES", ns(2024, 1)),
        ("6EZ6", ns(2026, 11), "6E", ns(2027, 1)),
        ("M2KH25", ns(2025, 1), "M2K", ns(2025, 4)),
        ("CLF0", ns(2029, 11), "CL", ns(2030, 2)),
        ("NQM9", ns(2020, 1), "NQ", ns(2019, 7)),  # just expired, not ten years off
    ],
)
def test_outright_symbols(symbol: str, on: int, root: str, expiry: int) -> None:
    assert parse_outright(symbol, on) == (root, expiry)


@pytest.mark.parametrize("symbol", ["ESH4-ESM4", "UD:1V: VT 2405", "AAPL", "ES", "ESM4 P5230", ""])
def test_what_is_no_outright(symbol: str) -> None:
    assert parse_outright(symbol, ns(2024, 1)) is None


def test_spreads() -> None:
    assert is_spread("ESH4-ESM4")
    assert is_spread("UD:1V: VT 2405")
    assert is_spread("ESH4", "S")
    assert not is_spread("ESH4", "F")


def test_ids_are_the_same_everywhere() -> None:
    assert instrument_id("GLBX.MDP3", "ESH4") == 6487959150075238415
    assert instrument_id("GLBX.MDP3", "ESH4") != instrument_id("SYNTH", "ESH4")
    assert partition_of("ES", 8) == 1


@pytest.mark.parametrize(
    ("price", "bid", "ask", "reference", "side"),
    [
        (101, 100, 101, math.nan, 1), (102, 100, 101, math.nan, 1),
        (100, 100, 101, math.nan, -1), (99, 100, 101, math.nan, -1),
        (100.75, 100, 101, 0, 1), (100.25, 100, 101, 0, -1),
        (100.5, 100, 101, 100, 1), (100.5, 100, 101, 101, -1), (100.5, 100, 101, math.nan, 0),
        (100.5, 102, 101, 100, 1), (100.5, math.nan, 101, 101, -1), (100.5, math.nan, math.nan, math.nan, 0),
        (101, 101, 101, 100, 1),
    ],
)  # fmt: skip
def test_lee_ready(price: float, bid: float, ask: float, reference: float, side: int) -> None:
    assert lee_ready(float(price), float(bid), float(ask), float(reference)) == side
