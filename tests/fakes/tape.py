"""Tapes for the test gateway: TBBO records with who is behind each id, from a file or made up.

Made-up tapes hold what makes real ones hard: records equal in every field, several trades of one
instant, spreads and user-defined instruments, instruments of several roots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import databento_dbn as dbn
import numpy as np
import zstandard
from numpy.typing import NDArray

from services.ingest.normalize import RECORD, UNDEF_PRICE

NS = 1_000_000_000
START = 1_703_545_200 * NS  # 2023-12-25T23:00:00Z


@dataclass(frozen=True)
class Listing:
    """An instrument of a tape. `defined`: the gateway has a definition of it."""

    native: int
    symbol: str
    root: str
    kind: str = "F"
    expiration_ns: int = START + 80 * 86_400 * NS
    defined: bool = True
    price: float = 4800.0
    strike: float | None = None

    @property
    def parent(self) -> str:
        return f"{self.root}.{'OPT' if self.kind in 'CP' else 'FUT'}"

    def definition(self, at_ns: int) -> Any:
        """InstrumentDefMsg as captured at `at_ns`."""
        option = {} if self.strike is None else {"strike_price": int(self.strike * NS), "underlying": "ESH4"}
        return dbn.InstrumentDefMsg(
            publisher_id=1,
            instrument_id=self.native,
            ts_event=at_ns,
            ts_recv=at_ns,
            min_price_increment=250_000_000,
            display_factor=10_000_000,
            raw_symbol=self.symbol,
            asset=self.root,
            security_type="FUT",
            instrument_class=dbn.InstrumentClass(self.kind),
            security_update_action=dbn.SecurityUpdateAction("A"),
            expiration=self.expiration_ns,
            unit_of_measure_qty=50 * NS,
            **option,
        )


@dataclass(frozen=True)
class Tape:
    """Records in wire order, and the instruments behind their ids."""

    records: NDArray[Any]
    listings: tuple[Listing, ...]
    start_ns: int
    end_ns: int
    dataset: str = "GLBX.MDP3"
    release_ns: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        # A record is sent when the tape's clock reaches it; disorder stays in place.
        object.__setattr__(self, "release_ns", np.maximum.accumulate(self.records["ts_event"]))

    def resolve(self, stype: str, symbol: str) -> list[Listing]:
        """Who a requested symbol means; empty for nobody."""
        if symbol == "ALL_SYMBOLS":
            return list(self.listings)
        if stype == "parent":
            return [i for i in self.listings if i.parent == symbol]
        if stype == "continuous":
            root = symbol.split(".", maxsplit=1)[0]
            outright = [i for i in self.listings if i.root == root and i.kind == "F"]
            return sorted(outright, key=lambda i: -int((self.records["instrument_id"] == i.native).sum()))[:1]
        return [i for i in self.listings if i.symbol == symbol]


LISTINGS = (
    Listing(17077, "ESH4", "ES"),
    Listing(17078, "ESM4", "ES", price=4850.0),
    Listing(23001, "NQH4", "NQ", price=17000.0),
    Listing(31001, "CLG4", "CL", price=73.0),
    Listing(42001, "ESH4-ESM4", "ES", kind="S", price=50.0),
    Listing(42002, "UD:1V: BO 2864311", "ES", kind="T", price=12.0),
)


def generate(
    seed: int = 1,
    seconds: float = 30.0,
    per_second: float = 200.0,
    listings: tuple[Listing, ...] = LISTINGS,
    start_ns: int = START,
    equal: float = 0.2,
    disorder_ns: int = 0,
) -> Tape:
    """A made-up tape; `equal` is the share of records that repeat the one before in every field.

    With `disorder_ns`, some records are that much older than those around them, as between channels.
    """
    rng = np.random.default_rng(seed)
    n = int(seconds * per_second)
    records = np.zeros(n, RECORD)
    who = rng.choice(len(listings), n)
    # Whole milliseconds, so that many instants hold several trades.
    times = start_ns + np.sort(rng.integers(0, int(seconds * 1000), n)) * 1_000_000
    base = np.array([i.price for i in listings])[who]
    price = np.round((base + 0.25 * rng.integers(-40, 40, n)) * 4) / 4
    records["length"], records["rtype"], records["publisher_id"] = 20, 1, 1
    records["instrument_id"] = np.array([i.native for i in listings])[who]
    records["ts_event"], records["ts_recv"] = times, times + 50_000
    records["ts_in_delta"] = 12_000
    records["price"] = (price * 1e9).astype(np.int64)
    records["bid_px"], records["ask_px"] = records["price"] - 125_000_000, records["price"] + 125_000_000
    records["size"] = rng.integers(1, 30, n)
    records["bid_sz"], records["ask_sz"] = rng.integers(1, 100, n), rng.integers(1, 100, n)
    records["action"] = ord("T")
    records["side"] = rng.choice(np.frombuffer(b"ABN", "u1"), n, p=[0.45, 0.45, 0.1])
    records["sequence"] = np.arange(n)
    for i in np.flatnonzero(rng.random(n) < equal):
        if i:
            records[i] = records[i - 1]
    records["ask_px"][:3] = UNDEF_PRICE
    records["ts_event"][20::9] -= disorder_ns
    return Tape(records, listings, start_ns, start_ns + int(seconds * NS))


def from_dbn(path: str | Path) -> Tape:
    """The tape of a TBBO file (`.dbn` or `.dbn.zst`), its instruments from the metadata's mappings."""
    raw = Path(path).read_bytes()
    if raw[:3] != b"DBN":
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    size = 8 + int.from_bytes(raw[4:8], "little")
    metadata = dbn.Metadata.decode(raw[:size])
    records = np.frombuffer(raw, RECORD, (len(raw) - size) // RECORD.itemsize, size)
    listings = []
    for symbol, intervals in metadata.mappings.items():
        kind = "S" if "-" in symbol or symbol.startswith("UD:") else "F"
        root = symbol.split("-", maxsplit=1)[0].rstrip("0123456789")[:-1] or symbol
        listings += [Listing(int(i["symbol"]), symbol, root, kind, defined=False) for i in intervals]
    ends = int(records["ts_event"].max()) + 1 if len(records) else metadata.start
    return Tape(records, tuple(listings), metadata.start, metadata.end or ends, metadata.dataset)
