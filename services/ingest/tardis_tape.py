"""One file of normalized JSON lines, plain, gzip or zstd, in blocks of lines; memory does not grow with the file.

Every fault is a SourceError that names the file; the whole lines before it have been yielded by then.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from services.ingest.tardis_text import times
from shared.errors import SourceError

PIECE = 1 << 16  # bytes read at a time
MAX_LINE = 16 << 20
HEAD_LINES = 10_000  # among which there must be a record
_MAGIC: dict[bytes, tuple[str, Callable[[], Any]]] = {
    b"\x28\xb5\x2f\xfd": ("zstd", lambda: zstandard.ZstdDecompressor().decompressobj()),
    b"\x1f\x8b": ("gzip", lambda: zlib.decompressobj(31)),
}


class _Head(msgspec.Struct):
    type: str
    exchange: str
    localTimestamp: str  # noqa: N815


_head = msgspec.json.Decoder(_Head)


@dataclass(slots=True)
class Tape:
    """A file that begins with records. `digest` tells it from other files; `first_ns` is its first local time."""

    path: Path
    digest: bytes
    first_ns: int

    def lines(self, most: int) -> Iterator[list[bytes]]:
        """Its lines in blocks of at most `most`, without empty ones. Raises SourceError at the first fault."""
        rest = b""
        for piece in _pieces(self.path):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            if len(rest) > MAX_LINE:
                raise SourceError(f"{self.path} has a line of over {MAX_LINE >> 20} MiB: it is no file of JSON lines")
            lines = [line for line in lines if line and not line.isspace()]
            for at in range(0, len(lines), most):
                yield lines[at : at + most]
        if rest and not rest.isspace():
            yield [rest]


def open_tape(path: Path | str) -> Tape:
    """Look into a file. Raises SourceError for one that cannot be read or does not begin with records."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(PIECE)
            file.seek(max(0, size - PIECE))
            ends += file.read(PIECE)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from None
    if not size:
        raise SourceError(f"{path} is empty (0 bytes); fetch the file again")
    tape = Tape(path, blake2b(ends + size.to_bytes(8, "little"), digest_size=16).digest(), 0)
    seen = 0
    for block in islice(tape.lines(100), HEAD_LINES // 100):
        for line in block:
            seen += 1
            try:
                head = _head.decode(line)
            except msgspec.MsgspecError:
                continue
            tape.first_ns = int(times([head.localTimestamp])[0])
            if tape.first_ns >= 0:
                return tape
    raise SourceError(
        f"{path} has no record in its first {seen} lines; wanted are normalized Tardis messages, one JSON object a line"
    )


def _pieces(path: Path) -> Iterator[bytes]:
    """Uncompressed bytes; a compressed stream without its end is an error, not an end."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        name, make = next((_MAGIC[m] for m in _MAGIC if magic.startswith(m)), ("", None))
        inflater: Any = None
        while piece := file.read(PIECE):
            if make is None:
                yield piece
                continue
            while piece:
                inflater = inflater or make()
                try:
                    data = inflater.decompress(piece)
                except (zstandard.ZstdError, zlib.error) as error:
                    raise SourceError(
                        f"{path}: broken {name} data within 64 KiB before byte {file.tell()} ({error}); "
                        "fetch the file again"
                    ) from None
                if data:
                    yield data
                piece = inflater.unused_data if inflater.eof else b""
                inflater = None if inflater.eof else inflater
        if inflater is not None:
            raise SourceError(f"{path} is cut off: its {name} data does not end; fetch the file again")
