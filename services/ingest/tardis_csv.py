"""Downloaded Tardis CSV files as a feed: any of their data types, merged by time of receipt.

Each file is read in blocks of bounded size, so memory does not grow with the days that are played. The order of
the tape is total (time of receipt, then the file's place, then the line), whatever the blocks.
"""

from __future__ import annotations

import gzip
import logging
import re
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zstandard import ZstdDecompressor, ZstdError

from services.ingest.pacing import Pacer
from services.ingest.source import Output, Resume
from services.ingest.tardis_csv_rows import TYPES, Columns, Layout, layout_of
from services.ingest.tardis_route import Router
from services.ingest.tardis_symbols import EXCHANGES
from shared.errors import SourceError
from shared.frames import NS, TICK, Rows
from shared.settings import Settings

log = logging.getLogger(__name__)

PRODUCER = "tardis-csv"
BLOCK_BYTES = 2 << 20  # of text, per open file; a book of 25 levels makes about as many bytes of rows
READ_BYTES = 1 << 18
FIRST_BYTES = 1 << 16
MAX_LINE = 16 << 20
PUSH_ROWS = 65_536
DAY_NS = 86_400 * NS
_NAMED = re.compile(r"(?P<exchange>[a-z0-9-]+)_[a-z0-9_]+_(?P<day>\d{4}-\d\d-\d\d)_.+\.csv")


@dataclass(frozen=True, slots=True)
class CsvFile:
    """One file: what it holds and when it begins.

    `first` is the time of receipt (ns) of its first record, `exchange` and `day` what its name says.
    """

    path: Path
    layout: Layout
    first: int
    digest: bytes
    exchange: str = ""
    day: int | None = None  # ns of its midnight


@dataclass(slots=True)
class _Open:
    """A file while it is played: the rows of its running block that are not pushed yet, and the time of each."""

    lines: Iterator[bytes]
    layout: Layout
    rows: Rows = field(default_factory=lambda: np.empty(0, TICK))
    keys: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    newest: int = 0
    ended: bool = False


class TardisCsv:
    """Source over CSV files of any number of exchanges. `speed`: None as fast as possible, else times market time.

    Files named as the vendor names them hold a whole day, so the tape begins and ends with such days, and days that
    are left out between them are gaps. The constructor reads the headers and raises SourceError for what it cannot
    play, ConfigError without polars. A run that resumes reads the tape again from its start: what the bus holds is
    dropped there, by ordinal.
    """

    def __init__(self, paths: Iterable[Path | str], settings: Settings, *, speed: float | None = None) -> None:
        self.feed = PRODUCER
        self._files = _open_all(paths)
        self._settings = settings
        self._speed = speed
        self.tape = blake2b(b"".join(f.digest for f in self._files), digest_size=16).hexdigest()

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:  # noqa: ARG002
        """See Source. What lies before a fault in a file has been pushed when SourceError is raised."""
        grace_ns = self._settings.tardis.grace_ms * 1_000_000
        router = Router(self.feed, self._settings.tapeline.partitions, grace_ns)
        pacer = Pacer(self._speed) if self._speed is not None else None
        merge = Merge(self._files, Columns(router.symbol))
        holes, begins, ends = _holes(self._files)
        for exchange, at_ns in begins.items():
            router.begin(exchange, at_ns)
        out.connection("connected", f"{len(self._files)} CSV files")
        ordinal = 0
        try:
            while not stop.is_set() and (head := merge.head()) is not None:
                while holes and holes[0][0] <= head:
                    at_ns, exchange = holes.pop(0)
                    router.disconnect(exchange, (), at_ns, "days without files", out)
                bound = holes[0][0] if holes else None
                if pacer is not None:
                    due = pacer.due(head, stop) + 1
                    bound = due if bound is None else min(bound, due)
                    if head >= bound:
                        continue
                rows = merge.take(bound)
                for reason, n in merge.columns.counted().items():
                    out.count(reason, n)
                for start, end in pairwise(_pieces(rows)):
                    piece = rows[start:end]
                    ordinals = ordinal + np.cumsum(piece["part"] == 0, dtype=np.int64) - 1
                    router.push(piece, ordinals, out, b"")
                    ordinal = int(ordinals[-1]) + 1
                    if stop.is_set():
                        break
        finally:
            out.flush()
        if not stop.is_set():
            router.finish(out, {exchange: max(end, router.newest_ns(exchange)) for exchange, end in ends.items()})
            out.connection("ended", f"{ordinal} records")


class Merge:
    """The rows of all files in the order of the tape. Files are opened when their time comes."""

    def __init__(self, files: list[CsvFile], columns: Columns) -> None:
        self.columns = columns
        self._waiting = sorted(files, key=lambda f: f.first, reverse=True)
        self._place = {f.path: i for i, f in enumerate(files)}
        self._open: dict[int, _Open] = {}

    def head(self) -> int | None:
        """Time of receipt of the next row, ns; None at the end."""
        self._fill()
        return min((int(f.keys[0]) for f in self._open.values() if len(f.keys)), default=None)

    def take(self, bound: int | None) -> Rows:
        """The rows before `bound` (None: all) that are known to be next; not empty when head() < bound."""
        while True:
            self._fill()
            # What a file has not shown yet is not older than the newest that it has.
            edge = min((f.newest for f in self._open.values() if not f.ended), default=None)
            if self._waiting and (edge is None or self._waiting[-1].first <= edge):
                self._open_next()
                continue
            limits = [limit for limit in (edge, bound) if limit is not None]
            limit = min(limits) if limits else None
            parts, keys = [], []
            for place in sorted(self._open):
                file = self._open[place]
                n = len(file.keys) if limit is None else int(np.searchsorted(file.keys, limit))
                parts.append(file.rows[:n])
                keys.append(file.keys[:n])
                file.rows, file.keys = file.rows[n:], file.keys[n:]
            self._open = {p: f for p, f in self._open.items() if len(f.keys) or not f.ended}
            rows = np.concatenate(parts) if parts else np.empty(0, TICK)
            if len(rows):
                return rows if len(parts) == 1 else rows[np.argsort(np.concatenate(keys), kind="stable")]
            if not self._open and not self._waiting:
                return rows
            if limit is not None and limit == bound and (edge is None or bound <= edge):
                return rows
            # All that is shown of the oldest file has one time: see more of it.
            for file in self._open.values():
                if not file.ended and file.newest == edge:
                    self._more(file)

    def _fill(self) -> None:
        while not self._open and self._waiting:
            self._open_next()
        for place, file in list(self._open.items()):
            while not len(file.keys) and not file.ended:
                self._more(file)
            if not len(file.keys):
                del self._open[place]
        if not self._open and self._waiting:
            self._fill()

    def _open_next(self) -> None:
        file = self._waiting.pop()
        opened = _Open(blocks(file.path, BLOCK_BYTES), file.layout)
        self._open[self._place[file.path]] = opened
        self._more(opened, header=True)

    def _more(self, file: _Open, header: bool = False) -> None:
        block = next(file.lines, None)
        if block is None:
            file.ended = True
            return
        if header:
            block = block[len(file.layout.header) :].lstrip(b"\r\n")
        rows, keys = self.columns(file.layout, block)
        if len(keys):
            # The vendor's files are in order of receipt; where one is not, its own order holds.
            keys = np.maximum.accumulate(np.maximum(keys, file.newest))
            file.newest = int(keys[-1])
        file.rows = np.concatenate([file.rows, rows]) if len(file.rows) else rows
        file.keys = np.concatenate([file.keys, keys]) if len(file.keys) else keys


def blocks(path: Path, size: int) -> Iterator[bytes]:
    """Whole lines of a plain, gzip or zstandard file, about `size` bytes at a time.

    Raises SourceError where it is damaged or ends too early, after what lies before.
    """
    pieces: list[bytes] = []
    held = 0
    for piece in _unpacked(path):
        pieces.append(piece)
        held += len(piece)
        if held >= size and b"\n" in piece:
            whole = b"".join(pieces)
            cut = whole.rfind(b"\n") + 1
            yield whole[:cut]
            pieces, held = [whole[cut:]], len(whole) - cut
        elif held > size + MAX_LINE:
            raise SourceError(f"{path} has a line of over {MAX_LINE >> 20} MiB: it is no CSV file")
    if held:
        yield b"".join(pieces)


def _unpacked(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    while piece := unpacked.read(READ_BYTES):
                        yield piece
            elif magic == b"\x28\xb5\x2f\xfd":
                yield from _unpacked_zstd(file)
            else:
                while piece := file.read(READ_BYTES):
                    yield piece
    except EOFError:
        raise SourceError(f"{path} is truncated: fetch the file again") from None
    except (gzip.BadGzipFile, zlib.error, ZstdError) as error:
        raise SourceError(f"{path} is damaged ({error}): fetch the file again") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None


def _unpacked_zstd(file: Any) -> Iterator[bytes]:
    """Frame by frame, as only so a frame that does not end is noticed."""
    frame = None
    while chunk := file.read(READ_BYTES):
        while chunk:
            frame = frame or ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError


def _pieces(rows: Rows) -> list[int]:
    """Where to cut rows so that a piece has about PUSH_ROWS, and no record is torn."""
    starts = np.append(np.flatnonzero(rows["part"] == 0), len(rows))
    cuts = starts[np.searchsorted(starts, np.arange(0, len(rows), PUSH_ROWS))]
    return [int(cut) for cut in np.unique(np.append(cuts, len(rows)))]


def _open_all(paths: Iterable[Path | str]) -> list[CsvFile]:
    """Headers of all files, in the order that decides ties: by data type, then by name."""
    seen: dict[Path, Path] = {}
    files = []
    for text in paths:
        path = Path(text)
        if path.resolve() in seen:
            raise SourceError(f"{path} is given twice: its records would count twice")
        seen[path.resolve()] = path
        file = _head(path)
        if file is None:
            log.warning("%s is empty: the vendor has no data for it", path)
        else:
            files.append(file)
    if not files:
        named = ", ".join(map(str, seen.values())) or "no file"
        raise SourceError(f"nothing to play: {named} without a record (the vendor has no data for it)")
    return sorted(files, key=lambda f: (TYPES.index(f.layout.data_type), f.path.name, str(f.path)))


def _head(path: Path) -> CsvFile | None:
    """What a file says of itself; None for an empty one."""
    whole = next(blocks(path, FIRST_BYTES), b"")
    if not whole.strip():
        return None
    header = whole.partition(b"\n")[0]
    layout = layout_of(path, header.rstrip(b"\r"))
    about = path.stat().st_size.to_bytes(8, "little") + layout.data_type.encode()
    digest = blake2b(whole[:FIRST_BYTES] + about, digest_size=16).digest()
    first = layout.first_receipt(whole[len(header) + 1 :])
    exchange, day = _named(path.name)
    return CsvFile(path, layout, first, digest, exchange, day)


def _named(name: str) -> tuple[str, int | None]:
    """Exchange and day (ns of its midnight) of a file named as the vendor names them."""
    match = _NAMED.match(name)
    if match is None or match["exchange"] not in EXCHANGES:
        return "", None
    try:
        day = datetime.fromisoformat(match["day"]).replace(tzinfo=UTC)
    except ValueError:
        return "", None
    return match["exchange"], int(day.timestamp()) * NS


def _holes(files: list[CsvFile]) -> tuple[list[tuple[int, str]], dict[str, int], dict[str, int]]:
    """Where days without files end: (ns, exchange), by time; where the days of each exchange begin and end."""
    days: dict[str, set[int]] = {}
    for file in files:
        if file.day is not None:
            days.setdefault(file.exchange, set()).add(file.day)
    holes = [
        (after, exchange)
        for exchange, known in days.items()
        for before, after in pairwise(sorted(known))
        if after - before > DAY_NS
    ]
    begins = {exchange: min(known) for exchange, known in days.items()}
    return sorted(holes), begins, {exchange: max(known) + DAY_NS for exchange, known in days.items()}
