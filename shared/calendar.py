"""Market hours as plain arrays: rows of [open, close) in ns UTC, DST and holidays included."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.cache import cache_base
from shared.errors import ConfigError
from shared.frames import NS

ALWAYS = "24/7"
FIRST_YEAR, LAST_YEAR = 2005, 2045
EQUITY_INDEX = "CME Globex Equity"
# CME equity-index roots; every other root trades always unless the configuration names a calendar,
# because a wrong calendar loses trades and none does not.
EQUITY_ROOTS = frozenset({"ES", "NQ", "RTY", "YM", "EMD", "NKD", "MES", "MNQ", "M2K", "MYM"})
GLOBEX = "GLBX.MDP3"
# Early closes (UTC) that the calendar library does not know.
OVERRIDES = {(EQUITY_INDEX, "2025-01-09"): "2025-01-09T14:30:00"}

Sessions = NDArray[np.int64]


def calendar_of(venue: str, root: str, configured: dict[str, str]) -> str:
    """Name of the calendar of a root: the configuration's, else the venue's default."""
    if root in configured:
        return configured[root]
    return EQUITY_INDEX if venue == GLOBEX and root in EQUITY_ROOTS else ALWAYS


@lru_cache(maxsize=32)
def sessions(name: str) -> Sessions:
    """Sessions of a calendar, shape (n, 2), int64 ns UTC, sorted, years 2005 to 2045.

    A market that never closes has one session a UTC day. Raises ConfigError for an unknown name.
    """
    if name == ALWAYS:
        first = np.datetime64(f"{FIRST_YEAR}-01-01", "D").astype(np.int64)
        last = np.datetime64(f"{LAST_YEAR}-01-01", "D").astype(np.int64)
        days = np.arange(first, last, dtype=np.int64) * (86_400 * NS)
        return np.stack([days, days + 86_400 * NS], axis=1)
    kept = _kept(name)
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        rows: Sessions = np.load(kept)
        return rows
    rows = _computed(name)
    with suppress(OSError):  # a full or read-only disk: computed again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.{os.getpid()}.npy")
        np.save(part, rows)
        part.replace(kept)
    return rows


def joined(tables: Iterable[Sessions]) -> tuple[Sessions, list[tuple[int, int]]]:
    """All calendars in one array, each once, and where each of `tables` stands in it: rows [from, to)."""
    once: list[Sessions] = []
    placed: dict[int, tuple[int, int]] = {}
    spans = []
    at = 0
    for table in tables:
        if id(table) not in placed:
            placed[id(table)] = (at, at + len(table))
            once.append(table)  # and so its id stays its own
            at += len(table)
        spans.append(placed[id(table)])
    return np.concatenate(once) if once else np.zeros((0, 2), np.int64), spans


def _kept(name: str) -> Path:
    """The file of a calendar's sessions: another rule or library, another file."""
    known = (name, version("pandas_market_calendars"), FIRST_YEAR, LAST_YEAR, sorted(OVERRIDES.items()))
    return cache_base() / f"calendar-{blake2b(repr(known).encode(), digest_size=8).hexdigest()}.npy"


def _computed(name: str) -> Sessions:
    import pandas_market_calendars as mcal  # noqa: PLC0415 (takes a second to import)

    try:
        calendar = mcal.get_calendar(name)
    except RuntimeError:
        raise ConfigError(
            f"unknown market calendar '{name}' in [aggregate] calendars; pandas_market_calendars lists the names"
        ) from None
    table = calendar.schedule(f"{FIRST_YEAR}-01-01", f"{LAST_YEAR}-01-01", tz="UTC")
    column = {c: table[c].dt.tz_localize(None).to_numpy("datetime64[ns]").astype(np.int64) for c in table.columns}
    days = table.index.to_numpy("datetime64[D]")
    for (of, day), close in OVERRIDES.items():
        if of == name:
            column["market_close"][days == np.datetime64(day)] = np.datetime64(close, "ns").astype(np.int64)
    pieces = [(column["market_open"], column["market_close"])]
    if "break_start" in column:
        start, end = column["break_start"], column["break_end"]
        has = start > column["market_open"]  # NaT is the smallest integer
        pieces = [
            (column["market_open"], np.where(has, start, column["market_close"])),
            (end[has], column["market_close"][has]),
        ]
    rows = np.concatenate([np.stack(piece, axis=1) for piece in pieces])
    rows = rows[np.argsort(rows[:, 0])]
    return np.ascontiguousarray(rows[rows[:, 1] > rows[:, 0]])
