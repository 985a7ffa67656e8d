"""Names, ids, roots, expiries, aggressors."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from shared.instruments import instrument_id, is_spread, option_root, option_series, parse_outright, partition_of
from shared.settings import Databento
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


@pytest.mark.parametrize(
    ("symbol", "series"),
    [
        ("ESM4 P5230", "ESM4"), ("Q1AZ6 C20000", "Q1AZ6"), ("6EZ6 C1.075", "6EZ6"), ("OZNM4 C1105", "OZNM4"),
        ("AAPL  240621C00190000", "AAPL"), ("BRK.B 240621P00190000", "BRK.B"), ("SPXW240621C05200000", "SPXW"),
        ("ESM4", None), ("ESM4-ESU4", None), ("UD:1V: VT 2405", None), ("BRN FMJ0024!", None), ("ESM4 X5230", None),
        ("BTC-28JUN24-70000-C", None), ("", None),
    ],
)  # fmt: skip
def test_series_of_options(symbol: str, series: str | None) -> None:
    assert option_series(symbol) == series


def test_weeklies_join_their_underlying_by_the_default_settings() -> None:
    roots = Databento().option_roots
    weeklies = {
        "ES": ("E1A", "E5D", "E3E", "EW", "EW1", "EW4"), "NQ": ("Q1A", "Q4D", "Q2E", "QN1", "QNE"),
        "LO": ("LO",), "EUU": ("EUU",),
    }  # fmt: skip
    for root, names in weeklies.items():
        assert {option_root(name, roots) for name in names} == {root}
    assert option_root("Q1A", None) == "Q1A"
