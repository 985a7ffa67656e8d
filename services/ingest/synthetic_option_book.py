"""The books of a synthetic option tape: what its futures and options are worth, and its trades as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.normalize import RECORD
from services.ingest.synthetic_chain import YEAR_SECONDS, Option, black_76, family
from services.ingest.synthetic_dbn import Listing
from services.ingest.synthetic_products import PRODUCTS, Contract
from shared.frames import NS

ROOTS = ("NQ", "ES")
MONEY = {"NQ": 364, "ES": 208}  # the strike at the money, in steps
LATENCY_NS = 150_000
CHEAPEST = 2.0  # points; so that every book has two sides
COMBINED = 60.0  # points that a spread is worth

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True)
class Trades:
    """Columns of trades: place of the listing, when, +1 bought or -1 sold, how many, ticks through the book."""

    pieces: list[Ints] = field(default_factory=list)

    def add(self, listing: Any, times: Any, side: Any, size: Any, through: Any = 0) -> None:
        """Columns, or numbers that hold for all."""
        columns = np.broadcast_arrays(listing, times, side, size, through)
        self.pieces.append(np.stack(columns, axis=-1).astype(np.int64).reshape(-1, 5))

    def table(self) -> Ints:
        """Rows in order of time."""
        whole = np.concatenate(self.pieces)
        return whole[np.argsort(whole[:, 1], kind="stable")]


class Book:
    """Bid and ask of `listings` at any time of the sessions that begin at `opens`."""

    def __init__(self, seed: int, opens: Sequence[int], listings: Sequence[Listing]) -> None:
        self._opens, self._listings = np.array(opens), listings
        self._kinds = np.array([_kind(c) for c in listings])
        self._roots = np.array([c.root for c in listings])
        self._strikes = np.array([c.strike if isinstance(c, Option) else 0.0 for c in listings])
        self._expiries = np.array([c.expiry_ns for c in listings])
        self._ticks = np.array([c.tick for c in listings])
        rng = np.random.default_rng([seed & 0xFFFF_FFFF, 8])
        self._shift = {root: rng.uniform(-0.3, 0.3, len(opens)) for root in ROOTS}
        self._phase = {root: rng.uniform(0, 2 * np.pi, len(opens)) for root in ROOTS}

    def records(self, trades: Trades, mirror: bool) -> NDArray[Any]:
        """RECORD records in order of receipt. `mirror`: bought is sold at the same price, and the other way round."""
        table = _turned(trades.table()) if mirror else trades.table()
        listing, times, side, size, through = table.T
        tick = np.round(self._ticks * NS).astype(np.int64)[listing]
        bid = np.floor(self._values(listing, times) / self._ticks[listing]).astype(np.int64) * tick
        price = np.where(side > 0, bid + tick, bid) + side * through * tick
        bought = side < 0 if mirror else side > 0
        rows = np.zeros(len(table), RECORD)
        rows["length"], rows["rtype"], rows["publisher_id"], rows["action"] = 20, 1, 1, ord("T")
        rows["instrument_id"] = np.array([c.native for c in self._listings])[listing]
        rows["ts_event"], rows["ts_recv"], rows["ts_in_delta"] = times, times + LATENCY_NS, 14_000
        rows["price"], rows["size"] = price, size
        rows["side"] = np.where(bought, ord("B"), ord("A"))
        rows["bid_px"], rows["ask_px"] = np.where(bought, price - tick, price), np.where(bought, price, price + tick)
        rows["bid_sz"] = rows["ask_sz"] = 40
        rows["bid_ct"] = rows["ask_ct"] = 6
        rows["sequence"] = np.arange(len(table))
        return rows

    def _values(self, listing: Ints, times: Ints) -> Floats:
        """What each trade's listing is worth, in points."""
        values = np.full(len(listing), COMBINED)
        for root in ROOTS:
            forward = self._forward(root, times)
            future = (self._roots[listing] == root) & (self._kinds[listing] == "F")
            values[future] = forward[future]
            for kind in "CP":
                chosen = (self._roots[listing] == root) & (self._kinds[listing] == kind)
                which = listing[chosen]
                years = (self._expiries[which] - times[chosen]) / NS / YEAR_SECONDS
                vol = family(PRODUCTS[root]).vol
                worth = black_76(forward[chosen], self._strikes[which], years, vol, kind == "C")
                values[chosen] = np.maximum(worth, CHEAPEST)
        return values

    def _forward(self, root: str, times: Ints) -> Floats:
        """The front future's value: about the money, a little elsewhere each session, swinging by an hour."""
        session = np.searchsorted(self._opens, times, side="right") - 1
        at = (times - self._opens[session]) / NS
        swing = 0.2 * np.sin(at * 2 * np.pi / 3600 + self._phase[root][session])
        level: Floats = family(PRODUCTS[root]).step * (MONEY[root] + self._shift[root][session] + swing)
        return level


def _kind(listing: Listing) -> str:
    if isinstance(listing, Option):
        return listing.kind
    return "F" if isinstance(listing, Contract) and listing.far is None else "S"


def _turned(table: Ints) -> Ints:
    """Trades of one listing at one instant in the opposite order: a mirrored sweep goes the other way."""
    edges = np.flatnonzero((table[1:, :2] != table[:-1, :2]).any(axis=1)) + 1
    return np.concatenate([run[::-1] for run in np.split(table, edges)])
