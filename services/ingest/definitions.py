"""What Databento calls an instrument, as `shared.messages.Instrument`.

`venue` is the dataset (`GLBX.MDP3`) everywhere, so live and files give the same instrument ids.
The root of an option is that of what it is an option on: a future and its options share a partition.
`option_roots` (the setting `databento.option_roots`) joins weeklies to it where nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from services.ingest.normalize import UNDEF_PRICE
from shared.instruments import (
    OPTION_CLASSES,
    instrument_id,
    is_spread,
    option_root,
    option_series,
    parse_outright,
)
from shared.messages import Instrument

UNDEF_TIMESTAMP = 2**64 - 1
UNKNOWN_KIND = "?"
# Its options are on shares, whose names may look like those of futures.
SHARE_OPTIONS = "OPRA."
_HEAD = re.compile(r"[ .]")


def from_symbol(
    venue: str, symbol: str, feed: str, on_ns: int, option_roots: Mapping[str, str] | None = None
) -> Instrument:
    """The instrument behind a raw symbol as traded at `on_ns`, guessed from its name alone.

    An outright future gets its root and an estimated expiry; a spread or user-defined instrument
    kind `S`; anything else kind `?`, and as root the text before its first space or dot. An option
    stays kind `?`, too, without strike and expiry, until it is defined; its root is its underlying's, but
    it has the continuous ticker of its series, so as not to compete with futures.
    """
    bus_id = instrument_id(venue, symbol)
    if is_spread(symbol):
        leg = symbol.split("-", maxsplit=1)[0]
        outright = parse_outright(leg, on_ns)
        return Instrument(bus_id, venue, symbol, outright[0] if outright else _head(leg), feed, kind="S")
    series = option_series(symbol)
    if series is not None:
        outright = parse_outright(series, on_ns)
        root = option_root(outright[0] if outright else series, option_roots)
        return Instrument(bus_id, venue, symbol, root, feed, kind=UNKNOWN_KIND, ticker=series)
    outright = parse_outright(symbol, on_ns)
    if outright is None:
        return Instrument(bus_id, venue, symbol, _head(symbol), feed, kind=UNKNOWN_KIND)
    root, expiry = outright
    return Instrument(bus_id, venue, symbol, root, feed, kind="F", expiration_ns=expiry, estimated=True)


def from_definition(record: Any, venue: str, feed: str, option_roots: Mapping[str, str] | None = None) -> Instrument:
    """The instrument of a `databento_dbn.InstrumentDefMsg` (any DBN version); undefined fields are None.

    `multiplier` is `unit_of_measure_qty`, `defined_ns` the record's `ts_recv`.
    """
    symbol = record.raw_symbol
    kind = str(record.instrument_class)
    root = _option_root(record, venue, option_roots) if kind in OPTION_CLASSES else record.asset
    return Instrument(
        id=instrument_id(venue, symbol),
        venue=venue,
        symbol=symbol,
        root=root or from_symbol(venue, symbol, feed, record.ts_recv, option_roots).root,
        feed=feed,
        kind=kind if kind.strip("\0 ") else UNKNOWN_KIND,
        expiration_ns=_time(record.expiration),
        strike=_price(record.strike_price),
        underlying=record.underlying or None,
        multiplier=_price(record.unit_of_measure_qty),
        tick_size=_price(record.min_price_increment),
        defined_ns=_time(record.ts_recv),
    )


def _option_root(record: Any, venue: str, option_roots: Mapping[str, str] | None) -> str:
    """The root of what it is an option on: by the underlying contract, by the settings, by its asset."""
    underlying, asset = str(record.underlying), str(record.asset)
    if venue.startswith(SHARE_OPTIONS):
        return option_root(underlying or asset, option_roots)
    outright = parse_outright(underlying, record.ts_recv)
    return outright[0] if outright else option_root(asset, option_roots)


def _head(symbol: str) -> str:
    return _HEAD.split(symbol, maxsplit=1)[0] or symbol


def _time(ns: int) -> int | None:
    return None if ns == UNDEF_TIMESTAMP else int(ns)


def _price(fixed: int) -> float | None:
    """Fixed point to float by one correctly rounded division."""
    return None if fixed == UNDEF_PRICE else int(fixed) / 1e9
