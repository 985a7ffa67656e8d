"""Instrument identity: ids, roots, expiries and partitions, all stateless functions of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import blake2b
from zlib import crc32

MONTH_CODES = "FGHJKMNQUVXZ"
# Root, month code, one- or two-digit year: ESZ6, 6EZ6, M2KH25, CLF27.
_OUTRIGHT = re.compile(rf"^(?P<root>[A-Z0-9]{{1,5}}?)(?P<month>[{MONTH_CODES}])(?P<year>\d{{1,2}})$")
SPREAD_CLASSES = frozenset("STM")
OPTION_CLASSES = frozenset("CP")
# CME: series, class and strike (Q1AZ6 C20000). OCC: root, date, class and strike (SPXW  240621C05200000).
_OPTION = re.compile(r"^(?P<series>[A-Z0-9]{2,8}) [CP]\d+(?:\.\d+)?$")
_OCC = re.compile(r"^(?P<root>[A-Z0-9.]{1,6}) *\d{6}[CP]\d{8}$")


def instrument_id(venue: str, symbol: str) -> int:
    """63-bit id of an instrument on the bus; the same everywhere, never 0."""
    digest = blake2b(f"{venue}:{symbol}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) or 1


def feed_id(feed: str) -> int:
    """63-bit id of a feed, as it stands in in-band clock rows."""
    return instrument_id("feed", feed)


def partition_of(root: str, partitions: int) -> int:
    """Partition of an underlying root: a future, its options and its spreads share one."""
    return crc32(root.encode()) % partitions


def is_spread(symbol: str, kind: str | None = None, root: str = "") -> bool:
    """Spreads and user-defined instruments: never candled.

    Crypto roots name their exchange (`deribit:BTC`), and crypto symbols may hold a dash.
    """
    if kind in SPREAD_CLASSES:
        return True
    return ":" not in root and ("-" in symbol or symbol.startswith("UD:"))


def parse_outright(symbol: str, on_ns: int) -> tuple[str, int] | None:
    """(root, estimated expiry in ns) of a futures symbol as traded at `on_ns`; None if it is none.

    The expiry is the end of the contract month, which orders contracts of a root. A one-digit
    year is the first such year not before the trade's year less one.
    """
    match = _OUTRIGHT.match(symbol)
    if match is None:
        return None
    month = MONTH_CODES.index(match["month"]) + 1
    digits = match["year"]
    base = datetime.fromtimestamp(on_ns / 1e9, UTC).year
    span = 10 ** len(digits)
    year = base - 1 + (int(digits) - (base - 1)) % span
    year, month = (year + 1, 1) if month == 12 else (year, month + 1)
    return match["root"], int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * 1_000_000_000


def option_series(symbol: str) -> str | None:
    """The series that an option's symbol names (`Q1AZ6` of `Q1AZ6 C20000`, OCC's root); None if it is no option's."""
    match = _OPTION.match(symbol) or _OCC.match(symbol)
    return match[1] if match else None


def option_root(root: str, option_roots: Mapping[str, str] | None) -> str:
    """Whose options those of `root` are: the first pattern that matches, else `root` itself (Q1A -> NQ)."""
    for pattern, underlying in (option_roots or {}).items():
        if fnmatchcase(root, pattern):
            return underlying
    return root
