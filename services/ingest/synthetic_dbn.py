"""What the synthetic market lists and trades, as DBN: headers, definitions, files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import databento_dbn as dbn
import zstandard

from services.ingest.synthetic_chain import Option
from services.ingest.synthetic_products import DAY, PRODUCTS, Contract
from shared.frames import NS


@dataclass(frozen=True, slots=True)
class Combination:
    """A user-defined instrument of several options."""

    symbol: str
    root: str
    native: int
    expiry_ns: int
    tick: float


Listing = Contract | Option | Combination


def metadata(
    dataset: str,
    schema: str,
    start_ns: int,
    end_ns: int,
    listed: Iterable[Listing],
    lives: Mapping[int, tuple[int, int]] | None = None,
) -> bytes:
    """Header of a file that holds all of [start_ns, end_ns). `lives`: id -> (first, last) day since 1970 on which
    the listing has it; by default throughout."""
    listed, whole = list(listed), (start_ns // DAY, (end_ns - 1) // DAY)
    mappings = []
    for c in listed:
        first, last = (lives or {}).get(c.native, whole)
        interval = SimpleNamespace(start_date=_date(first), end_date=_date(last + 1), symbol=str(c.native))
        mappings.append(SimpleNamespace(raw_symbol=c.symbol, intervals=[interval]))
    made = dbn.Metadata(
        dataset=dataset, start=start_ns, end=end_ns, stype_in=dbn.SType.RAW_SYMBOL,
        stype_out=dbn.SType.INSTRUMENT_ID, schema=dbn.Schema.from_str(schema), symbols=[c.symbol for c in listed],
        partial=[], not_found=[], mappings=mappings, ts_out=False, version=3,
    )  # fmt: skip
    return bytes(made.encode())


def definition(listing: Listing, at_ns: int, exchange: str = "SYNT") -> bytes:
    """The InstrumentDefMsg of a listing as of `at_ns`."""
    more: dict[str, Any] = {}
    match listing:
        case Option():
            asset, kind, security = listing.asset, dbn.InstrumentClass(listing.kind), "OOF"
            more = {
                "strike_price": round(listing.strike * NS), "strike_price_currency": "USD",
                "underlying": listing.future.symbol, "underlying_id": listing.future.native,
                "unit_of_measure_qty": round(listing.multiplier * NS),
                "cfi": "OCAFPS" if listing.kind == "C" else "OPAFPS",
            }  # fmt: skip
        case Combination():
            asset, kind, security = listing.root, dbn.InstrumentClass.OPTION_SPREAD, "OOF"
            more = {"user_defined_instrument": dbn.UserDefinedInstrument.YES}
        case _:
            asset, kind, security = listing.root, dbn.InstrumentClass.FUTURE, "FUT"
            more = {"unit_of_measure_qty": round(PRODUCTS[asset].multiplier * NS) if asset in PRODUCTS else NS}
            if listing.far is not None:
                kind, more = dbn.InstrumentClass.FUTURE_SPREAD, {}
    return bytes(
        dbn.InstrumentDefMsg(
            publisher_id=1, instrument_id=listing.native, ts_event=at_ns, ts_recv=at_ns,
            min_price_increment=round(listing.tick * NS), display_factor=NS, raw_symbol=listing.symbol,
            asset=asset, security_type=security, expiration=listing.expiry_ns, instrument_class=kind,
            security_update_action=dbn.SecurityUpdateAction.ADD, currency="USD", exchange=exchange, **more,
        )
    )  # fmt: skip


def write_file(out: Path, head: bytes, body: BinaryIO) -> None:
    """Header and records to a file, compressed where its name ends in `.zst`."""
    with out.open("wb") as file:
        if out.suffix != ".zst":
            file.write(head)
            shutil.copyfileobj(body, file, 1 << 20)
            return
        with zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False) as packed:
            packed.write(head)
            shutil.copyfileobj(body, packed, 1 << 20)


def _date(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)
