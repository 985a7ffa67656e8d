"""Candles from elsewhere into the table `candles`: checked, mended where they may be, and never over our own.

All of the input is read before the first row is written, so a file that ends in garbage changes nothing; a row takes
about 200 bytes of memory. What is in the store already decides row by row: candles that the pipeline made from ticks
stay (unless they are to be replaced, and then only their prices and volume are), what is incomplete or was imported
before is replaced under the next revision, and what is the same is left alone: an import that is repeated changes
nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from shared.batches import Batch, Chunk, Cursor, Source
from shared.errors import SourceError, StoreUnavailable, TapelineError
from shared.frames import FIXED, NS
from shared.import_files import BAR, PRICES, Given, Names, Piece, pieces
from shared.instants import instant_ns, iso_second
from shared.settings import Settings
from shared.sink import Store, store_of
from shared.stores import parse, read_rows
from shared.timeframes import MONDAY_SEC, UNITS, name_of

TOLD = 5  # rejected rows that a summary shows
WAIT_SECONDS = 60.0  # for a store that does not take rows now
_VALUES = (*PRICES, "volume")
_LOOKED_AT = ("timestamp_in", *_VALUES, "trades", "ask_volume", "complete", "revision")
_NUMBERS = [name for name in FIXED.names or () if FIXED[name].kind == "f"]


@dataclass(slots=True)
class Summary:
    """What came of an import, in rows: `read` is the sum of all but `repaired`, which counts rules, and `refused` is
    by the store (its dead letters). `told`: the first rejected rows, for people."""

    read: int = 0
    stored: int = 0
    replaced: int = 0
    kept: int = 0
    unchanged: int = 0
    duplicates: int = 0
    refused: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """An import: what is `given` about the files, whether our own candles are replaced, and whether any are written."""

    paths: Sequence[Path]
    given: Given = field(default_factory=Given)
    replace: bool = False
    dry_run: bool = False


def run(plan: Plan, settings: Settings, tell: Callable[[Summary], None], rejects: TextIO | None = None) -> Summary:
    """Import files. `rejects` gets every rejected row as NDJSON; `tell` is called now and then.

    Raises SourceError for files that cannot be read or hold no candle, ConfigError, StoreUnavailable.
    """
    summary, names = Summary(), Names()
    bars = _read(plan, summary, names, tell, rejects)
    rows = _newest(bars)
    summary.duplicates = len(bars) - len(rows)
    writer = _Writer(settings, names.pairs, summary, dry_run=plan.dry_run)
    try:
        for part in _parts(rows, batch_rows(settings)):
            writer.add(_changed(part, names.pairs, settings.tapeline.store, plan.replace, summary))
            tell(summary)
        writer.flush()
    finally:
        writer.close()
    return summary


# -- reading and checking --------------------------------------------------------------------


def _read(
    plan: Plan, summary: Summary, names: Names, tell: Callable[[Summary], None], rejects: TextIO | None
) -> NDArray[Any]:
    """All sound candles, in the order of the input."""
    now_ns, found = time.time_ns(), [np.zeros(0, BAR)]
    for path in plan.paths:
        for piece in pieces(path, plan.given, names, summary.notes.append):
            summary.read += len(piece.bars)
            found.append(_sound(piece, now_ns, summary, rejects))
            tell(summary)
    bars = np.concatenate(found)
    if not len(bars):
        (reason, count), *_ = summary.rejected.most_common(1)
        raise SourceError(
            f"none of {summary.read:,} rows of {', '.join(map(str, plan.paths))} is a candle: {count:,} have {reason}"
        )
    return bars


def _sound(piece: Piece, now_ns: int, summary: Summary, rejects: TextIO | None) -> NDArray[Any]:
    """The candles of a piece that are sound, or could be mended; the others are counted and told."""
    bars, faults = piece.bars, piece.faults
    wrong = np.zeros(len(bars), bool)
    wrong[list(faults)] = True
    for reason, mask in _reasons(bars, now_ns):
        for i in np.flatnonzero(mask & ~wrong).tolist():
            faults[i] = reason
        wrong |= mask
    for i in sorted(faults):
        _reject(piece, i, faults[i], summary, rejects)
    return _mended(bars[~wrong], summary)


def _reasons(bars: NDArray[Any], now_ns: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for name in PRICES:
        yield f"null {name}", np.isnan(bars[name])
    for name in _VALUES:
        yield f"infinite {name}", np.isinf(bars[name])
    seconds = np.maximum(bars["seconds"], 1)
    offset = np.where(seconds == UNITS["w"], MONDAY_SEC, 0)
    yield "a time that is not aligned to the timeframe", (bars["time_ns"] // NS - offset) % seconds != 0
    yield "a time that is not aligned to the timeframe", bars["time_ns"] % NS != 0
    yield "an end in the future", bars["time_ns"] // NS + seconds > now_ns // NS


def _reject(piece: Piece, i: int, reason: str, summary: Summary, rejects: TextIO | None) -> None:
    summary.rejected[reason] += 1
    if len(summary.told) < TOLD:
        summary.told.append(f"{piece.path}:{piece.lines[i]}: {reason}")
    if rejects is not None:
        row = {"file": str(piece.path), "line": piece.lines[i], "reason": reason, "row": piece.raw(i)}
        rejects.write(json.dumps(row) + "\n")


def _mended(bars: NDArray[Any], summary: Summary) -> NDArray[Any]:
    bars = bars.copy()
    top, bottom = np.maximum(bars["open"], bars["close"]), np.minimum(bars["open"], bars["close"])
    rules: list[tuple[str, str, NDArray[np.bool_], Any]] = [
        ("high raised to the higher of open and close", "high", bars["high"] < top, top),
        ("low lowered to the lower of open and close", "low", bars["low"] > bottom, bottom),
        ("null volume set to 0", "volume", np.isnan(bars["volume"]), 0.0),
        ("negative volume set to 0", "volume", bars["volume"] < 0, 0.0),
        ("negative trades set to 0", "trades", bars["trades"] < -1, 0),
    ]
    for rule, name, mask, value in rules:
        if mask.any():
            summary.repaired[rule] += int(mask.sum())
            bars[name] = np.where(mask, value, bars[name])
    return bars


def _newest(bars: NDArray[Any]) -> NDArray[Any]:
    """In the order of the key, of each the one that came last."""
    order = np.lexsort((bars["time_ns"], bars["seconds"], bars["name"]))
    ordered = bars[order]
    last = np.ones(len(bars), bool)
    last[:-1] = np.any([ordered[name][1:] != ordered[name][:-1] for name in ("name", "seconds", "time_ns")], axis=0)
    newest: NDArray[Any] = ordered[last]
    return newest


# -- what is stored already ------------------------------------------------------------------


def _parts(bars: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    """Candles of one name and timeframe, so many at most, over a time in which the store holds not many more."""
    differs = np.any([bars[name][1:] != bars[name][:-1] for name in ("name", "seconds")], axis=0)
    for start, end in pairwise([0, *(np.flatnonzero(differs) + 1).tolist(), len(bars)]):
        some = bars[start:end]
        at = 0
        while at < len(some):
            reach = some["time_ns"][at] + 4 * size * some["seconds"][at] * NS
            stop = min(at + size, int(np.searchsorted(some["time_ns"], reach)))
            yield some[at:stop]
            at = stop


def _changed(
    bars: NDArray[Any], names: Sequence[tuple[str, str]], store: str, replace: bool, summary: Summary
) -> NDArray[Any]:
    """The rows to write of candles of one name and timeframe; counts the others."""
    exchange, symbol = names[int(bars["name"][0])]
    length_ns = int(bars["seconds"][0]) * NS
    stored = {
        instant_ns(row["timestamp_in"]): row
        for row in read_rows(
            store, "candles",
            {"exchange": exchange, "symbol": symbol, "timeframe": name_of(length_ns // NS)},
            since=iso_second(int(bars["time_ns"][0])),
            until=iso_second(int(bars["time_ns"][-1]) + length_ns),
            columns=("timestamp_in", *(n for n in FIXED.names or () if n not in _NOT_COLUMNS)) if replace
            else _LOOKED_AT,
        )
    }  # fmt: skip
    rows = np.zeros(len(bars), FIXED)
    rows["time_ns"], rows["timeframe_sec"], rows["name"] = bars["time_ns"], bars["seconds"], bars["name"]
    for name in _NUMBERS:
        rows[name] = bars[name] if name in _VALUES else np.nan
    rows["trades"], rows["complete"] = np.maximum(bars["trades"], 0), 1
    if not stored:
        summary.stored += len(rows)
        return rows
    chosen = [i for i in range(len(bars)) if _decide(bars[i], rows[i : i + 1], stored, replace, summary)]
    return rows[chosen]


_NOT_COLUMNS = ("time_ns", "timeframe_sec", "name", "timestamp_out_ns")


def _decide(bar: Any, row: NDArray[Any], stored: dict[int, dict[str, Any]], replace: bool, summary: Summary) -> bool:
    """Whether a candle is to be written, and then as what."""
    held = stored.get(int(bar["time_ns"]))
    if held is None:
        summary.stored += 1
        return True
    same = all(held[name] == bar[name] for name in _VALUES)
    if held["complete"] and held["ask_volume"] is not None:  # made from ticks: nobody else knows who was the aggressor
        if same or not replace:
            summary.kept += 1
            return False
        for name in _NUMBERS:
            if name not in _VALUES:
                row[name] = np.nan if held[name] is None else held[name]
        row["trades"] = held["trades"]
    elif held["complete"]:
        if bar["trades"] < 0:
            row["trades"] = held["trades"]
        if same and row["trades"][0] == held["trades"]:
            summary.unchanged += 1
            return False
    row["revision"] = held["revision"] + 1
    summary.replaced += 1
    return True


# -- writing ---------------------------------------------------------------------------------


def batch_rows(settings: Settings) -> int:
    """Rows of a batch: few and large ones where each is a load."""
    section = settings.bigquery if parse(settings.tapeline.store).scheme == "bigquery" else settings.sink
    return section.batch_rows


class _Writer:
    """Rows into the store, in batches of its size. The store is opened with the first of them.

    A candle that the pipeline writes between the look and this write is overwritten: both are of bars that have ended,
    so the pipeline's would have to be late by all of the import's reading.
    """

    def __init__(
        self, settings: Settings, names: Sequence[tuple[str, str]], summary: Summary, *, dry_run: bool
    ) -> None:
        self._settings, self._names, self._summary, self._dry_run = settings, names, summary, dry_run
        self._store: Store | None = None
        self._held: list[NDArray[Any]] = []
        self._batches, self._began_ms = 0, time.time_ns() // 1_000_000
        self._rows = batch_rows(settings)

    def add(self, rows: NDArray[Any]) -> None:
        self._held.append(rows)
        if sum(map(len, self._held)) >= self._rows:
            self.flush()

    def flush(self) -> None:
        """Write what is held. Raises StoreUnavailable when the store takes nothing for WAIT_SECONDS."""
        rows = np.concatenate([np.zeros(0, FIXED), *self._held])
        self._held = []
        if self._dry_run or not len(rows):
            return
        rows["timestamp_out_ns"] = time.time_ns()
        used, rows["name"] = np.unique(rows["name"], return_inverse=True)
        # As if from a bus of its own, for stores tell batches by their cursors; its place tells the dead letters of
        # one import from those of another.
        self._batches += 1
        source = Source("import", "candles", 0, self._batches, f"{self._began_ms}-{self._batches}")
        cursors = {("import", "candles", 0): Cursor(source.seq, source.id)}
        chunk = Chunk(source, rows, [self._names[i] for i in used.tolist()])
        dead = self._write(Batch(candles={"candle": [chunk]}, cursors=cursors, rows=len(rows)))
        s = self._summary
        new = min(dead, s.stored)
        s.refused, s.stored, s.replaced = s.refused + dead, s.stored - new, s.replaced - (dead - new)

    def _write(self, batch: Batch) -> int:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                if self._store is None:
                    store = store_of(self._settings, threading.Event())
                    store.open()
                    store.cursors()  # a store that numbers its batches goes on behind those of earlier imports,
                    store.redo = {}  # the last of which need not be ended: what is stored was looked at
                    self._store = store
                return self._store.write(batch)
            except StoreUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def rejects_file(path: Path) -> TextIO:
    """A file for rejected rows. Raises TapelineError for a place that cannot be."""
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise TapelineError(f"cannot write {path}: {error.strerror}") from None
