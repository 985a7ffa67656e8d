"""DBN files of ready-made bars (ohlcv), under the names that live candles have.

A bar of a contract is of (dataset, raw symbol), as live. Databento's `ES.v.0`, the contract in front by volume, is the
continuous ticker `ES`; other continuous symbols follow other rules, and keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.ingest.dbn_tape import BARS, open_tape
from services.ingest.normalize import UNDEF_PRICE
from shared.frames import NS
from shared.instruments import is_spread
from shared.timeframes import seconds_of

UNNAMED = "an instrument id that the file does not name"
SPREAD = "a spread or user-defined instrument, which has no candles"
_DAY_NS = 86_400 * NS
_EPOCH = date(1970, 1, 1)
_FRONT = re.compile(r"([A-Z0-9]+)\.v\.0")
Intervals = dict[int, list[tuple[int, int, str]]]  # native id -> (first day, day after the last, symbol)


class Bars(NamedTuple):
    """Some bars: columns by name (prices NaN where undefined), and why a row has no symbol (empty: it has one)."""

    columns: dict[str, NDArray[Any]]
    symbols: list[str]
    faults: list[str]


def read(path: Path) -> tuple[str, int, Iterator[Bars]]:
    """(dataset, seconds of a bar, the bars). Raises SourceError here and while it is read."""
    tape = open_tape(path, tuple(BARS))
    named = _named(tape.metadata)
    return (
        str(tape.metadata.dataset),
        seconds_of(tape.schema.rpartition("-")[2]),
        (_bars(r, named) for r in tape.records()),
    )


def _named(metadata: Any) -> Intervals:
    ids_first = str(metadata.stype_in) == "instrument_id"
    found: Intervals = {}
    for name, intervals in metadata.mappings.items():
        for interval in intervals:
            native, symbol = (name, interval["symbol"]) if ids_first else (interval["symbol"], name)
            if symbol and native.isdigit():
                start, end = ((interval[at] - _EPOCH).days for at in ("start_date", "end_date"))
                found.setdefault(int(native), []).append((start, end, symbol))
    return found


def _bars(records: NDArray[Any], named: Intervals) -> Bars:
    days = (records["ts_event"] // _DAY_NS).astype(np.int64)
    pairs, index = np.unique(np.column_stack((records["instrument_id"], days)), axis=0, return_inverse=True)
    found = [_symbol(named.get(native, []), day) for native, day in pairs.tolist()]
    which = index.reshape(-1).tolist()
    columns = {"time_ns": records["ts_event"].astype(np.int64), "volume": records["volume"].astype(np.float64)}
    for name in ("open", "high", "low", "close"):
        columns[name] = np.where(records[name] == UNDEF_PRICE, np.nan, records[name] / 1e9)
    return Bars(columns, [found[i][0] for i in which], [found[i][1] for i in which])


def _symbol(intervals: list[tuple[int, int, str]], day: int) -> tuple[str, str]:
    """(symbol, what is wrong with it)."""
    symbol = next((symbol for start, end, symbol in intervals if start <= day < end), "")
    if not symbol:
        return "", UNNAMED
    front = _FRONT.fullmatch(symbol)
    return front[1] if front else symbol, SPREAD if is_spread(symbol) else ""
