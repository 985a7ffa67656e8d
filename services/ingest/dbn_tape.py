"""One DBN file as columns: header, then records in pieces of a few MB; memory does not grow with the file.

Every fault is a SourceError that names the file and the record; the whole records before it have
been yielded by then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import databento_dbn
import numpy as np
import zstandard
from numpy.typing import NDArray

from services.ingest.definitions import UNDEF_TIMESTAMP
from services.ingest.normalize import RECORD, TRADES_RECORD, widen
from shared.errors import SourceError

BATCH = 65_536  # records read at a time
TAPES = ("tbbo", "trades", "definition")
# Schemas of ready-made bars, and the type of their records.
BARS = {"ohlcv-1s": 32, "ohlcv-1m": 33, "ohlcv-1h": 34, "ohlcv-1d": 35}
BAR_RECORD = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher_id", "<u2"), ("instrument_id", "<u4"), ("ts_event", "<u8"),
        ("open", "<i8"), ("high", "<i8"), ("low", "<i8"), ("close", "<i8"), ("volume", "<u8"),
    ]
)  # fmt: skip
ACCEPTED = "tbbo or trades (and definition files beside them)"
MAX_HEADER = 1 << 30
_ZSTD = b"\x28\xb5\x2f\xfd"
_HEAD = np.dtype([("length", "u1"), ("rtype", "u1")])


@dataclass(slots=True)
class Tape:
    """A DBN file with its header read. `start_ns`/`end_ns`: the interval it holds whole, None where unknown."""

    path: Path
    metadata: Any
    header: int  # bytes
    compressed: bool
    digest: bytes
    version: int  # as written (decoding lifts the metadata's to the newest)
    start_ns: int | None = None
    end_ns: int | None = None
    schema: str = ""
    width: int = field(default=0)  # bytes of a record, send time included
    _head: tuple[int, int] = (0, 0)

    def pieces(self, skip: int = 0) -> Iterator[bytes]:
        """The uncompressed bytes behind the header, from byte `skip` on, in pieces."""
        skip += self.header
        if not self.compressed:
            with self.path.open("rb") as file:
                file.seek(skip)
                while piece := file.read(BATCH * 80):
                    yield piece
            return
        for piece in _inflate(self.path):
            if skip >= len(piece):
                skip -= len(piece)
                continue
            yield piece[skip:]
            skip = 0

    def records(self, first: int = 0) -> Iterator[NDArray[Any]]:
        """Trades from record `first` on as RECORD arrays of about BATCH (bars: BAR_RECORD).

        Raises SourceError at the first fault.
        """
        at, rest, held = first, bytearray(), 0
        source = self.pieces(first * self.width)
        while True:
            fault: SourceError | None = None
            piece = b""
            try:
                piece = next(source, b"")
            except SourceError as error:
                fault = SourceError(f"{error}; {at + len(rest) // self.width} whole records before it")
            rest += piece
            held = len(rest) // self.width
            if held >= BATCH or (held and not piece):
                whole = bytes(rest[: held * self.width])
                del rest[: held * self.width]
                rows = self._rows(whole)
                good = self._good(whole)
                if good:
                    yield rows[:good]
                if good < held:
                    raise self._strange(whole, at, good)
                at += held
            if fault is not None:
                raise fault
            if not piece:
                break
        if rest:
            raise SourceError(
                f"{self.path} is cut off: {len(rest)} of {self.width} bytes of record {at} "
                f"at byte {self.header + at * self.width}; fetch the file again"
            )

    def _rows(self, whole: bytes) -> NDArray[Any]:
        layout = TRADES_RECORD if self.schema == "trades" else BAR_RECORD if self.schema in BARS else RECORD
        if self.width > layout.itemsize:
            wide = np.frombuffer(whole, np.uint8).reshape(-1, self.width)
            whole = wide[:, : layout.itemsize].tobytes()
        rows = np.frombuffer(whole, layout)
        return widen(rows) if self.schema == "trades" else rows

    def _good(self, whole: bytes) -> int:
        """How many records from the first on are what the header promised."""
        words = np.frombuffer(whole, np.dtype({"names": ["head"], "formats": ["<u2"], "itemsize": self.width}))["head"]
        strange = words != self._head[0] | self._head[1] << 8
        return int(strange.argmax() if strange.any() else len(words))

    def _strange(self, whole: bytes, at: int, index: int) -> SourceError:
        length, rtype = np.frombuffer(whole, _HEAD, 1, index * self.width)[0]
        return SourceError(
            f"{self.path}: record {at + index} at byte {self.header + (at + index) * self.width} is no {self.schema} "
            f"record (type {rtype}, {4 * int(length)} bytes): the file is damaged; fetch it again"
        )


def open_tape(path: Path | str, schemas: Collection[str] = TAPES) -> Tape:
    """Read a file's header. Raises SourceError for anything but a DBN file with one accepted schema."""
    accepted = ACCEPTED if schemas is TAPES else ", ".join(schemas)
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    if not size:
        raise SourceError(f"{path} is empty (0 bytes); fetch the file again")
    compressed = magic == _ZSTD
    head = _header(path, compressed, accepted)
    try:
        metadata = databento_dbn.Metadata.decode(head)
    except (databento_dbn.DBNError, ValueError) as error:
        raise SourceError(f"{path} has a damaged DBN header ({error}); fetch the file again") from None
    digest = blake2b(head + size.to_bytes(8, "little"), digest_size=16).digest()
    tape = Tape(path, metadata, len(head), compressed, digest, head[3])
    tape.schema = str(metadata.schema) if metadata.schema is not None else "mixed (live session)"
    if tape.schema not in schemas:
        raise SourceError(f"{path} holds schema {tape.schema}; accepted are {accepted}")
    words, rtype = (14, BARS[tape.schema]) if tape.schema in BARS else (12, 0) if tape.schema == "trades" else (20, 1)
    tape.width = 4 * words + (8 if metadata.ts_out else 0)
    tape._head = (tape.width // 4, rtype)
    tape.start_ns = metadata.start if metadata.start and metadata.start != UNDEF_TIMESTAMP else None
    # A query with a limit may have ended anywhere before its end.
    tape.end_ns = metadata.end if metadata.end and metadata.end != UNDEF_TIMESTAMP and not metadata.limit else None
    return tape


def _header(path: Path, compressed: bool, accepted: str) -> bytes:
    head, wanted = bytearray(), 8
    for piece in _inflate(path) if compressed else _plain(path):
        head += piece
        if wanted == 8 and len(head) >= 8:
            if head[:3] != b"DBN":
                break
            if not 1 <= head[3] <= databento_dbn.DBN_VERSION:
                raise SourceError(
                    f"{path} is DBN version {head[3]}; this program reads 1 to {databento_dbn.DBN_VERSION}: "
                    "upgrade databento-dbn"
                )
            wanted += int.from_bytes(head[4:8], "little")
            if wanted > MAX_HEADER:
                raise SourceError(f"{path} has a damaged DBN header (length {wanted - 8}); fetch the file again")
        if len(head) >= wanted > 8:
            return bytes(head[:wanted])
    if head[:3] != b"DBN"[: len(head)] or not head:
        raise SourceError(f"{path} is not a DBN file; accepted are .dbn and .dbn.zst files of {accepted}")
    raise SourceError(f"{path} is cut off in its header at byte {len(head)} of {wanted}; fetch the file again")


def _plain(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(1 << 16):
            yield piece


def _inflate(path: Path) -> Iterator[bytes]:
    """Decompressed bytes, frame after frame; a frame without its end is an error, not an end."""
    with path.open("rb") as file:
        inflater: Any = None
        while piece := file.read(1 << 16):
            while piece:
                if inflater is None:
                    inflater = zstandard.ZstdDecompressor().decompressobj()
                try:
                    data = inflater.decompress(piece)
                except zstandard.ZstdError as error:
                    raise SourceError(
                        f"{path}: broken zstd data within 64 KiB before byte {file.tell()} ({error})"
                    ) from None
                if data:
                    yield data
                piece = inflater.unused_data if inflater.eof else b""
                inflater = None if inflater.eof else inflater
        if inflater is not None:
            raise SourceError(f"{path} is cut off: the zstd frame does not end at byte {file.tell()}")


def definitions(tape: Tape) -> Iterator[Any]:
    """The records of a definition file, any DBN version upgraded to the newest."""
    decoder = databento_dbn.DBNDecoder(
        has_metadata=False, ts_out=tape.metadata.ts_out, input_version=tape.version,
    )  # fmt: skip
    count = 0
    try:
        for piece in tape.pieces():
            decoder.write(piece)
            for record in decoder.decode():
                if isinstance(record, databento_dbn.InstrumentDefMsg):
                    yield record
                    count += 1
    except databento_dbn.DBNError as error:
        raise SourceError(f"{tape.path}: damaged after definition {count} ({error}); fetch the file again") from None
    if decoder.buffer():
        raise SourceError(f"{tape.path} is cut off in definition {count}; fetch the file again")
