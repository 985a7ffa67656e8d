"""Several tapes as one, in the order of receipt, read no further ahead than the order needs.

The order of records with one time is that of the files, then of the records: it depends on the
files alone, not on how they were buffered, so a position on the merged tape means the same in
every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.dbn_tape import Tape
from services.ingest.normalize import RECORD

NEVER = 2**62


class _Reader:
    """One open file: the records that are read but not taken, and their keys.

    A key is the time of receipt, or the largest before it where that goes backwards.
    """

    def __init__(self, tape: Tape, position: int = 0, key: int = 0, last_event_ns: int = 0) -> None:
        self.tape, self.position = tape, position
        self.key = max(key, tape.start_ns or 0)
        self.last_event_ns = last_event_ns
        self.ended = False
        self.rows: NDArray[Any] = np.empty(0, RECORD)
        self.keys: NDArray[np.int64] = np.empty(0, np.int64)
        self._source = tape.records(position)

    def extend(self) -> None:
        """Read one more batch behind what is buffered."""
        rows = next(self._source, None)
        if rows is None:
            self.ended = True
            return
        times = rows["ts_recv"]
        if (times <= 0).any():
            times = np.where(times > 0, times, rows["ts_event"])
        newest = int(self.keys[-1]) if len(self.keys) else self.key
        keys = np.maximum(np.maximum.accumulate(times), newest)
        self.rows = np.concatenate((self.rows, rows)) if len(self.rows) else rows
        self.keys = np.concatenate((self.keys, keys)) if len(self.keys) else keys

    def take(self, n: int) -> NDArray[Any]:
        """The first n records."""
        rows, self.rows = self.rows[:n], self.rows[n:]
        self.key, self.keys = int(self.keys[n - 1]), self.keys[n:]
        self.position += n
        self.last_event_ns = max(self.last_event_ns, min(int(rows["ts_event"].max()), self.key))
        return rows


class Merge:
    """The merged tape. `next` is the first file that is not open yet."""

    def __init__(self, tapes: Sequence[Tape], opened: int = 0, at: dict[str, list[int]] | None = None) -> None:
        self.tapes = tapes
        self.next = opened
        self.finished_ns = 0  # newest event of the files that ended since this was last set to 0
        self._open = {int(i): _Reader(tapes[int(i)], *where) for i, where in sorted((at or {}).items())}

    @property
    def open(self) -> bool:
        """Whether a file is open."""
        return bool(self._open)

    def open_next(self) -> int | None:
        """Open the next file; returns the time of its first event, None when it has no record."""
        reader = self._open[self.next] = _Reader(self.tapes[self.next])
        self.next += 1
        reader.extend()
        return int(reader.rows["ts_event"][0]) if len(reader.rows) else None

    def next_start(self) -> int:
        """No record of the files that are not open is older."""
        return (self.tapes[self.next].start_ns or 0) if self.next < len(self.tapes) else NEVER

    def head(self) -> int | None:
        """Key of the next record of the open files; None when all of them have ended."""
        for i, reader in list(self._open.items()):
            while not len(reader.keys) and not reader.ended:
                reader.extend()
            if not len(reader.keys):
                self.finished_ns = max(self.finished_ns, reader.last_event_ns)
                del self._open[i]
        return min((int(r.keys[0]) for r in self._open.values()), default=None)

    def where(self) -> dict[str, list[int]]:
        """Positions of the open files, for the constructor."""
        return {str(i): [r.position, r.key, r.last_event_ns] for i, r in self._open.items()}

    def take(self, bound: int) -> NDArray[Any]:
        """Records with keys below `bound` and in order for certain: some, perhaps none (call `head` again)."""
        bound = min(bound, self.next_start())
        readers = list(self._open.values())
        if len(readers) > 1:
            # What a file has behind its buffer is not older than the buffer's newest key.
            behind, first = min(
                ((int(r.keys[-1]), i) for i, r in enumerate(readers) if not r.ended), default=(NEVER, 0)
            )
            if behind < bound and behind <= min(int(r.keys[0]) for r in readers):
                readers[first].extend()
                return np.empty(0, RECORD)
            bound = min(bound, behind)
        counts = [int(np.searchsorted(r.keys, bound)) for r in readers]
        keys = [r.keys[:n] for r, n in zip(readers, counts, strict=True) if n]
        rows = [r.take(n) for r, n in zip(readers, counts, strict=True) if n]
        if len(rows) < 2:
            return rows[0] if rows else np.empty(0, RECORD)
        return np.concatenate(rows)[np.argsort(np.concatenate(keys), kind="stable")]
