"""Symbols and definitions as instruments."""

from __future__ import annotations

from pathlib import Path

import databento_dbn as dbn
import pytest
import zstandard

from services.ingest.definitions import from_definition, from_symbol
from shared.instruments import instrument_id
from tests.fakes.tape import START, Listing


@pytest.mark.parametrize(
    ("symbol", "root", "kind"),
    [
        ("ESH4", "ES", "F"),
        ("6EZ6", "6E", "F"),
        ("M2KH25", "M2K", "F"),
        ("ESU6-ESM7", "ES", "S"),
        ("UD:1V: BO 2864311", "UD:1V:", "S"),
        ("ESM4 P5230", "ESM4", "?"),
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
