"""Symbols and definitions as instruments."""

from __future__ import annotations

from pathlib import Path

import databento_dbn as dbn
import pytest
import zstandard

from services.ingest.definitions import from_definition, from_symbol
from shared.instruments import instrument_id, partition_of
from shared.settings import Databento
from tests.fakes.tape import NS, START, Listing
from tests.services.ingest.dbn import definition


@pytest.mark.parametrize(
    ("symbol", "root", "kind"),
    [
        ("ESH4", "ES", "F"),
        ("6EZ6", "6E", "F"),
        ("M2KH25", "M2K", "F"),
        ("ESU6-ESM7", "ES", "S"),
        ("UD:1V: BO 2864311", "UD:1V:", "S"),
        ("ESM4 P5230", "ES", "?"),
        ("BRN FMJ0024!", "BRN", "?"),
        ("BRK.A", "BRK", "?"),
    ],
)
def test_from_symbol(symbol: str, root: str, kind: str) -> None:
    made = from_symbol("GLBX.MDP3", symbol, "databento", START)
    assert (made.root, made.kind, made.feed) == (root, kind, "databento")
    assert made.id == instrument_id("GLBX.MDP3", symbol)
    assert made.estimated == (kind == "F") == (made.expiration_ns is not None)


def test_from_definition_keeps_what_is_defined_and_drops_what_is_not() -> None:
    made = from_definition(Listing(7, "ESH4", "ES", expiration_ns=5).definition(START), "GLBX.MDP3", "databento")
    assert (made.root, made.kind, made.expiration_ns, made.defined_ns) == ("ES", "F", 5, START)
    assert (made.multiplier, made.tick_size, made.strike, made.underlying) == (50.0, 0.25, None, None)
    assert not made.estimated


def test_a_definition_without_asset_falls_back_on_the_symbol() -> None:
    made = from_definition(Listing(7, "AAPL", "", kind="K").definition(START), "XNAS.ITCH", "databento")
    assert (made.root, made.kind) == ("AAPL", "K")


ROOTS = Databento().option_roots


@pytest.mark.parametrize(
    ("symbol", "root", "series"),
    [
        ("ESM4 P5230", "ES", "ESM4"),
        ("Q1AZ6 C20000", "NQ", "Q1AZ6"),
        ("EW3Z6 P5000", "ES", "EW3Z6"),
        ("QN2Z26 C20000.5", "NQ", "QN2Z26"),
        ("LOZ6 C80", "LO", "LOZ6"),
        ("SPXW  240621C05200000", "SPXW", "SPXW"),
    ],
)
def test_an_option_without_a_definition_is_with_its_underlying_and_says_no_more(
    symbol: str, root: str, series: str
) -> None:
    made = from_symbol("GLBX.MDP3", symbol, "databento", START, ROOTS)
    assert (made.root, made.kind, made.ticker) == (root, "?", series), "it must not compete with the future"
    assert (made.strike, made.expiration_ns, made.underlying, made.defined_ns) == (None, None, None, None)
    future = from_symbol("GLBX.MDP3", f"{root}Z6", "databento", START, ROOTS)
    assert partition_of(made.root, 64) == partition_of(future.root, 64)


def test_roots_of_weeklies_are_a_setting() -> None:
    symbol = "Q1AZ6 C20000"
    assert from_symbol("V", symbol, "f", START).root == "Q1A"
    assert from_symbol("V", symbol, "f", START, {"Q?A": "MNQ", "Q1A": "NQ"}).root == "MNQ", "the first that matches"
    assert from_symbol("V", "NQZ6", "f", START, {"NQ": "ES"}).root == "NQ", "futures are what they are"
    assert from_symbol("V", "SPXW  240621C05200000", "f", START, {"SPXW": "SPX"}).root == "SPX"


@pytest.mark.parametrize(
    ("venue", "symbol", "asset", "underlying", "root"),
    [
        ("GLBX.MDP3", "Q1AZ6 C20000", "Q1A", "NQZ6", "NQ"),
        ("GLBX.MDP3", "EUUZ6 C1.1", "EUU", "6EZ6", "6E"),
        ("GLBX.MDP3", "Q1AZ6 C20000", "Q1A", "", "NQ"),
        ("GLBX.MDP3", "ESZ6 C5000", "ES", "", "ES"),
        ("GLBX.MDP3", "A1Z6 C-0.5", "CVR", "CLZ6-CLF7", "CVR"),
        ("GLBX.MDP3", "Q1AZ6 C20000", "", "", "NQ"),
        ("OPRA.PILLAR", "AAPL  240621C00190000", "AAPL", "AAPL", "AAPL"),
        ("OPRA.PILLAR", "SPXW  240621C05200000", "SPXW", "SPX", "SPX"),
        ("OPRA.PILLAR", "ABZ1  240621C00010000", "", "ABZ1", "ABZ1"),
        ("OPRA.PILLAR", "AAPL  240621C00190000", "AAPL", "", "AAPL"),
    ],
)
def test_the_root_of_a_defined_option_is_its_underlying(
    venue: str, symbol: str, asset: str, underlying: str, root: str
) -> None:
    record = definition(
        symbol, 7, START, asset=asset, underlying=underlying, instrument_class=dbn.InstrumentClass.PUT,
        strike_price=20_000_500_000_000, unit_of_measure_qty=20 * NS,
    )  # fmt: skip
    made = from_definition(record, venue, "databento", ROOTS)
    assert (made.root, made.kind, made.strike, made.multiplier) == (root, "P", 20_000.5, 20.0)
    assert (made.underlying, made.ticker) == (underlying or None, None)


@pytest.mark.parametrize(
    ("name", "symbol", "root", "kind"),
    [
        ("definition-glbx-future", "ESH1", "ES", "F"),
        ("definition-futures-spread", "ESU6-ESM7", "ES", "S"),
        ("definition-option-spread", "UD:2E: SG 2500275", "EUU", "T"),
    ],
)
def test_recorded_definitions(shared_data: Path, name: str, symbol: str, root: str, kind: str) -> None:
    packed = (shared_data / "databento" / f"{name}.dbn.zst").read_bytes()
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    decoder = dbn.DBNDecoder(upgrade_policy=dbn.VersionUpgradePolicy.UPGRADE_TO_V3)
    record = next(r for r in decoder.write_and_decode(raw) if isinstance(r, dbn.InstrumentDefMsg))
    made = from_definition(record, "GLBX.MDP3", "databento")
    assert (made.symbol, made.root, made.kind) == (symbol, root, kind)
