"""What Databento calls an instrument, as `shared.messages.Instrument`.

`venue` is the dataset (`GLBX.MDP3`) everywhere, so live and files give the same instrument ids.
"""

from __future__ import annotations

import re
from typing import Any

from services.ingest.normalize import UNDEF_PRICE
from shared.instruments import instrument_id, is_spread, parse_outright
from shared.messages import Instrument

UNDEF_TIMESTAMP = 2**64 - 1
UNKNOWN_KIND = "?"
_HEAD = re.compile(r"[ .]")


def from_symbol(venue: str, symbol: str, feed: str, on_ns: int) -> Instrument:
    """The instrument behind a raw symbol as traded at `on_ns`, guessed from its name alone.

    An outright future gets its root and an estimated expiry; a spread or user-defined instrument
    kind `S`; anything else kind `?`, and as root the text before its first space or dot.
    """
    bus_id = instrument_id(venue, symbol)
    if is_spread(symbol):
        leg = symbol.split("-", maxsplit=1)[0]
        outright = parse_outright(leg, on_ns)
        return Instrument(bus_id, venue, symbol, outright[0] if outright else _head(leg), feed, kind="S")
    outright = parse_outright(symbol, on_ns)
    if outright is None:
        return Instrument(bus_id, venue, symbol, _head(symbol), feed, kind=UNKNOWN_KIND)
    root, expiry = outright
    return Instrument(bus_id, venue, symbol, root, feed, kind="F", expiration_ns=expiry, estimated=True)


def from_definition(record: Any, venue: str, feed: str) -> Instrument:
    """The instrument of a `databento_dbn.InstrumentDefMsg` (any DBN version); undefined fields are None.

    `multiplier` is `unit_of_measure_qty`, `defined_ns` the record's `ts_recv`.
    """
    symbol = record.raw_symbol
    kind = str(record.instrument_class)
    return Instrument(
        id=instrument_id(venue, symbol),
        venue=venue,
        symbol=symbol,
        root=record.asset or from_symbol(venue, symbol, feed, record.ts_recv).root,
        feed=feed,
        kind=kind if kind.strip("\0 ") else UNKNOWN_KIND,
        expiration_ns=_time(record.expiration),
        strike=_price(record.strike_price),
        underlying=record.underlying or None,
        multiplier=_price(record.unit_of_measure_qty),
        tick_size=_price(record.min_price_increment),
        defined_ns=_time(record.ts_recv),
    )


def _head(symbol: str) -> str:
    return _HEAD.split(symbol, maxsplit=1)[0] or symbol


def _time(ns: int) -> int | None:
    return None if ns == UNDEF_TIMESTAMP else int(ns)


def _price(fixed: int) -> float | None:
    """Fixed point to float by one correctly rounded division."""
    return None if fixed == UNDEF_PRICE else int(fixed) / 1e9
