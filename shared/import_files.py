"""Files of candles from elsewhere, in pieces: CSV, NDJSON, Parquet and DBN.

What a row says is read here; whether it is a sound candle is judged in `shared.importing`. A file that cannot be read
to its end raises SourceError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdDecompressor, ZstdError

from shared import registry
from shared.errors import ConfigError, SourceError
from shared.instants import instant_ns
from shared.tables import UNDEFINED
from shared.timeframes import UNITS, seconds_of

PIECE_ROWS = 50_000
# One candle; undefined is NaN (`time_ns`: UNDEFINED, `trades`: -1 where the file does not say them).
PRICES = ("open", "high", "low", "close")
BAR = np.dtype(
    [
        ("time_ns", "<i8"), ("seconds", "<i8"), ("name", "<i8"), *((name, "<f8") for name in (*PRICES, "volume")),
        ("trades", "<i8"),
    ]
)  # fmt: skip
ACCEPTED = ".csv[.gz|.zst], .ndjson[.gz|.zst], .parquet and .dbn[.zst]"
# What a column may be called, in lower case; of several in one file the first here counts.
FIELDS = {
    "time": ("time", "timestamp", "timestamp_in", "ts_event", "datetime", "date_time", "open_time", "opentime", "ts",
             "t", "start", "date"),
    "open": ("open", "o"), "high": ("high", "h"), "low": ("low", "l"), "close": ("close", "c"),
    "volume": ("volume", "v", "vol"),
    "trades": ("trades", "trade_count", "number_of_trades", "num_trades", "count", "n"),
    "symbol": ("symbol", "contract_id", "ticker", "raw_symbol", "instrument"),
    "exchange": ("exchange", "venue", "dataset"),
    "timeframe": ("timeframe", "interval", "rtype"),
}  # fmt: skip
_NULLS = frozenset(("", "null", "none", "nan", "na", "n/a", "nat", "-"))
_LENGTH = re.compile(r"(\d+)\s*(s|secs?|seconds?|m|mins?|minutes?|h|H|hours?|d|D|days?|w|W|weeks?)")
_RTYPES = {"32": "1s", "33": "1m", "34": "1h", "35": "1d"}  # of Databento's records
_FILE = re.compile(r"\.(csv|ndjson|jsonl|parquet|dbn)(\.gz|\.zst)?$", re.IGNORECASE)


@dataclass(slots=True)
class Given:
    """What a user says about files: names for all rows, the timeframe (seconds, 0: none) where a file says none, and
    their column names (`mapped`: theirs, in lower case, -> a key of FIELDS)."""

    exchange: str = ""
    symbol: str = ""
    seconds: int = 0
    mapped: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Names:
    """(exchange, symbol) pairs, numbered."""

    ids: dict[tuple[str, str], int] = field(default_factory=dict)

    def number(self, exchange: str, symbol: str) -> int:
        return self.ids.setdefault((exchange, symbol), len(self.ids))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(self.ids)


@dataclass(slots=True)
class Piece:
    """Some rows of a file: `lines[i]` is row i's line (or its number, from 1), `faults` why rows are none, and `raw`
    a row as the file has it."""

    path: Path
    bars: NDArray[Any]
    lines: Sequence[int]
    faults: dict[int, str]
    raw: Callable[[int], dict[str, Any]]


Line = tuple[int, Sequence[Any] | str]  # its number, and its cells or what is wrong with it
Read = Iterator[Any]  # the header, then Lines


def pieces(path: Path, given: Given, names: Names, note: Callable[[str], None]) -> Iterator[Piece]:
    """The rows of a file. `note` is told what of it is not read. Raises SourceError, ConfigError."""
    kind = _kind(path)
    if kind == "dbn":
        yield from _dbn(path, given, names)
        return
    read = {"csv": _csv, "parquet": _parquet}.get(kind, _ndjson)
    with _faults(path):
        rows = read(path)
        header: list[str] = next(rows)
        columns = _columns(path, header, given)
        ignored = [name for i, name in enumerate(header) if i not in columns.values()]
        if ignored:
            note(f"{path}: not read: {', '.join(ignored)}")
        table = _Table(path, header, columns, given, names)
        any_row = False
        while held := list(islice(rows, PIECE_ROWS)):
            any_row = True
            yield table.piece(held)
        if not any_row:
            raise SourceError(f"{path} has a header, but no rows")


def _kind(path: Path) -> str:
    if path.is_dir():
        raise SourceError(f"{path} is a directory: give the files in it")
    if not path.exists():
        raise SourceError(f"{path} does not exist")
    match = _FILE.search(path.name)
    packed = match[2] if match else None
    kind = match[1].lower() if match else ""
    if match is None or (packed and kind == "parquet") or (kind == "dbn" and packed not in (None, ".zst")):
        raise SourceError(f"{path} is no file of candles by its name; there are: {ACCEPTED}")
    if not path.stat().st_size:
        raise SourceError(f"{path} is empty (0 bytes)")
    return kind


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise SourceError(f"{path} is cut off: its compressed data does not end; fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error, ZstdError) as error:
        raise SourceError(f"{path} is damaged ({error}): fetch the file again") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is no UTF-8 text ({error.reason})") from None
    except csv.Error as error:
        raise SourceError(f"{path} is no CSV file ({error})") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None


# -- columns ---------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A column's name as FIELDS has it: `<Open Time>` is open_time."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _columns(path: Path, header: Sequence[str], given: Given) -> dict[str, int]:
    """Which column holds what. Raises SourceError for what is missing."""
    named = [plain_name(name) for name in header]
    absent = [name for name in given.mapped if name not in named]
    if absent:
        raise SourceError(f"{path} has no column {', '.join(absent)} (--map); it has: {', '.join(header)[:200]}")
    found = {given.mapped[name]: i for i, name in reversed(list(enumerate(named))) if name in given.mapped}
    for ours, names in FIELDS.items():
        at = next((named.index(name) for name in names if name in named and name not in given.mapped), None)
        if ours not in found and at is not None and at not in found.values():
            found[ours] = at
    missing = [ours for ours in ("time", *PRICES) if ours not in found]
    if missing:
        shown = ", ".join(header[:12])
        raise SourceError(
            f"{path} has no column for {', '.join(missing)} (it has: {shown[:200]}): name it with --map theirs=ours"
        )
    for ours, said in (("symbol", given.symbol), ("timeframe", given.seconds)):
        if ours not in found and not said:
            raise SourceError(f"{path} does not say the {ours} of its candles: give --{ours}")
    if "exchange" not in found and not given.exchange and "contract_id" not in (named[i] for i in found.values()):
        raise SourceError(f"{path} does not say the exchange of its candles: give --exchange")
    return found


class _Table:
    """Makes candles of a file's rows."""

    def __init__(
        self, path: Path, header: Sequence[str], columns: Mapping[str, int], given: Given, names: Names
    ) -> None:
        self._path, self._header, self._columns, self._given, self._names = path, header, columns, given, names
        timeframe = columns.get("timeframe")
        # Databento's own CSV may give prices as they are in DBN, in units of 1e-9: then all are whole numbers.
        self._fixed_point = timeframe is not None and plain_name(header[timeframe]) == "rtype"
        symbol = columns.get("symbol")
        self._contract_id = symbol is not None and plain_name(header[symbol]) == "contract_id"
        self._seen: dict[str, set[str]] = {"symbol": set(), "exchange": set()}

    def piece(self, rows: Sequence[Line]) -> Piece:
        bars = np.zeros(len(rows), BAR)
        faults: dict[int, str] = {}
        made = []
        for i, (_, cells) in enumerate(rows):
            try:
                made.append(self._bar(cells))
            except ValueError as error:
                faults[i] = str(error)
                made.append((UNDEFINED, 0, -1, *(np.nan,) * 5, -1))
        bars[:] = made
        if self._fixed_point:
            self._scale(bars, rows)
        return Piece(self._path, bars, [line for line, _ in rows], faults, partial(self._raw, rows))

    def _bar(self, cells: Sequence[Any] | str) -> tuple[Any, ...]:
        """The values of a BAR. Raises ValueError with the reason."""
        if isinstance(cells, str):
            raise ValueError(cells)
        if len(cells) != len(self._header):
            raise ValueError("another number of cells than the header")
        get = {name: cells[at] for name, at in self._columns.items()}
        exchange, symbol = self._name(get)
        seconds = _seconds(get.get("timeframe")) or self._given.seconds
        if not seconds:
            raise ValueError("a timeframe that is none")
        time = get["time"]
        if _null(time):
            raise ValueError("null time")
        try:
            time_ns = instant_ns(time)
        except ValueError:
            raise ValueError("a time that is none") from None
        numbers = [_number(name, get[name]) for name in PRICES]
        trades = _number("trades", get.get("trades"))
        return (
            time_ns, seconds, self._names.number(exchange, symbol), *numbers, _number("volume", get.get("volume")),
            -1 if math.isnan(trades) else int(min(max(trades, -2), 1 << 53)),
        )  # fmt: skip

    def _name(self, get: Mapping[str, Any]) -> tuple[str, str]:
        exchange, symbol = ("" if _null(get.get(name)) else str(get[name]).strip() for name in ("exchange", "symbol"))
        if self._contract_id and ":" in symbol:
            exchange, _, symbol = symbol.partition(":")
        said = {"exchange": self._given.exchange, "symbol": self._given.symbol}
        for name, text in (("exchange", exchange), ("symbol", symbol)):
            seen = self._seen[name]
            if said[name] and text and text not in seen:
                seen.add(text)
                if len(seen) > 1:
                    raise SourceError(
                        f"{self._path} is of several {name}s ({', '.join(sorted(seen))}): --{name} would make them one"
                    )
        exchange, symbol = said["exchange"] or exchange, said["symbol"] or symbol
        if not exchange or not symbol:
            raise ValueError("null symbol" if not symbol else "null exchange")
        return exchange, symbol

    def _scale(self, bars: NDArray[Any], rows: Sequence[Line]) -> None:
        at = [self._columns[name] for name in PRICES]
        if not any("." in str(cells[i]) for _, cells in rows if len(cells) == len(self._header) for i in at):
            for name in PRICES:
                bars[name] /= 1e9

    def _raw(self, rows: Sequence[Line], i: int) -> dict[str, Any]:
        cells = rows[i][1]
        if isinstance(cells, str):
            return {}
        return dict(zip(self._header, (c if isinstance(c, int | float | str) else str(c) for c in cells), strict=False))


def _null(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.strip().lower() in _NULLS
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _number(name: str, cell: Any) -> float:
    """A number, NaN for null. Raises ValueError."""
    try:
        if isinstance(cell, str) and "_" not in cell:
            return float(cell)
        if isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
            return float(cell)
    except (ValueError, OverflowError):
        pass
    if _null(cell):
        return math.nan
    raise ValueError(f"{name} that is no number")


def _seconds(cell: Any) -> int:
    """Seconds of a timeframe as others write it; 0 where it is not said. Raises ValueError for one that is none."""
    return 0 if _null(cell) else _length(str(cell).strip())


@cache
def _length(text: str) -> int:
    match = _LENGTH.fullmatch(_RTYPES.get(text, text))
    seconds = int(match[1]) * UNITS[match[2][0].lower()] if match else 0
    if not seconds or not seconds_of(f"{match[1]}{match[2][0].lower()}" if match else ""):
        raise ValueError("a timeframe that is none")
    return seconds


# -- text ------------------------------------------------------------------------------------


def _text(path: Path) -> TextIO:
    ending = path.name.lower()
    if ending.endswith(".gz"):
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    if ending.endswith(".zst"):
        return io.TextIOWrapper(io.BufferedReader(_Inflated(path)), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


class _Inflated(io.RawIOBase):
    """The content of a zstd file, frame after frame; one without its end raises EOFError."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb")
        self._inflater: Any = None
        self._held = self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._held:
            piece = self._rest or self._file.read(1 << 16)
            if not piece:
                if self._inflater is not None:
                    raise EOFError
                return 0
            self._inflater = self._inflater or ZstdDecompressor().decompressobj()
            self._held, self._rest = self._inflater.decompress(piece), b""
            if self._inflater.eof:
                self._rest, self._inflater = self._inflater.unused_data, None
        n = min(len(into), len(self._held))
        into[:n], self._held = self._held[:n], self._held[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


def _csv(path: Path) -> Read:
    with _text(path) as file:
        first = file.readline()
        separator = max(",;\t|", key=first.count)
        yield [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]
        reader = csv.reader(file, delimiter=separator, strict=True)
        for cells in reader:
            if cells:
                yield reader.line_num + 1, cells


def _ndjson(path: Path) -> Read:
    """The first object says which columns there are."""
    with _text(path) as file:
        first = _object(file.readline())
        if first is None:
            raise SourceError(f"{path} is no NDJSON: its first line is no JSON object")
        header = [str(name) for name in first]
        yield header
        yield 1, list(first.values())
        for number, line in enumerate(file, 2):
            if line.strip():
                row = _object(line)
                yield number, "a line that is no JSON object" if row is None else [row.get(name) for name in header]


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _parquet(path: Path) -> Read:
    try:
        import polars  # noqa: PLC0415
    except ImportError:
        raise ConfigError("Parquet needs an extra: pip install 'tapeline[history]'") from None
    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise SourceError(f"{path} is no Parquet file ({' '.join(str(error).split())})") from None
    times = []
    for column in frame:
        if isinstance(column.dtype, polars.Datetime):  # Python's own would lose the nanoseconds
            utc = column.dt.convert_time_zone("UTC") if column.dtype.time_zone else column
            times.append(utc.dt.strftime("%Y-%m-%dT%H:%M:%S%.9f"))
    yield frame.columns
    yield from enumerate(frame.with_columns(times).iter_rows(), 1)


# -- DBN -------------------------------------------------------------------------------------


def _dbn(path: Path, given: Given, names: Names) -> Iterator[Piece]:
    with _faults(path):
        yield from _dbn_pieces(path, given, names)


def _dbn_pieces(path: Path, given: Given, names: Names) -> Iterator[Piece]:
    dataset, seconds, found = cast("Any", registry.resolve(registry.TOOLS["databento-bars"]))(path)
    exchange, first = given.exchange or dataset, 1
    if given.seconds not in (0, seconds):
        raise SourceError(f"{path} holds candles of {seconds} s: --timeframe says another length")
    seen: set[str] = set()
    for some in found:
        bars = np.zeros(len(some.symbols), BAR)
        for name, values in some.columns.items():
            bars[name] = values
        bars["seconds"], bars["trades"] = seconds, -1
        seen.update(s for s, fault in zip(some.symbols, some.faults, strict=True) if not fault)
        if given.symbol and len(seen) > 1:
            raise SourceError(
                f"{path} is of several symbols ({', '.join(sorted(seen)[:5])}): --symbol would make them one"
            )
        bars["name"] = [names.number(exchange, given.symbol or symbol) for symbol in some.symbols]
        faults = {i: fault for i, fault in enumerate(some.faults) if fault}
        lines = range(first, first + len(bars))
        yield Piece(path, bars, lines, faults, partial(_bar_as_told, bars, some.symbols))
        first += len(bars)
    if first == 1:
        raise SourceError(f"{path} has a header, but no records")


def _bar_as_told(bars: NDArray[Any], symbols: Sequence[str], i: int) -> dict[str, Any]:
    row = {name: bars[name][i].item() for name in ("time_ns", *PRICES, "volume")}
    return {"symbol": symbols[i]} | {name: None if _null(value) else value for name, value in row.items()}
