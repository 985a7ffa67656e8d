"""DBN files as a feed: `.dbn` and `.dbn.zst`, tbbo or trades, definitions beside them, in order of receipt.

A file is watched from its header's start to its end; files whose intervals touch are one watch, a
hole between them begins another. Time stands on the tape alone, so any speed gives the same rows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec

from services.ingest.dbn_merge import Merge
from services.ingest.dbn_tape import ACCEPTED, Tape, definitions, open_tape
from services.ingest.normalize import REASONS, Normalizer
from services.ingest.pacing import Pacer
from services.ingest.source import Output, Resume
from services.ingest.symbology import DAY, Symbology
from shared.errors import SourceError
from shared.messages import Clock
from shared.settings import Databento

log = logging.getLogger(__name__)


class Cursor(msgspec.Struct, forbid_unknown_fields=True):
    """Where a chunk begins. `at`: open file -> its record, key and newest event; files below `opened` that
    are not in it have ended. `watch_ns` is where the running watch began, `cover_ns` how far files reach."""

    ordinal: int = 0
    boundary: int = 0
    opened: int = 0
    at: dict[str, list[int]] = {}
    watch_ns: int | None = None
    cover_ns: int | None = None


class DbnFiles:
    """Source over a set of files of one dataset. `speed`: None as fast as possible, else times event time.

    `option_roots`: the setting `databento.option_roots`, its default if None.

    The constructor reads the headers and raises SourceError for what it cannot play.
    """

    def __init__(
        self,
        paths: Iterable[Path | str],
        partitions: int,
        *,
        feed: str = "files",
        speed: float | None = None,
        option_roots: Mapping[str, str] | None = None,
    ) -> None:
        self.feed = feed
        self._option_roots = Databento().option_roots if option_roots is None else option_roots
        tapes = _open_all(paths)
        self._definitions = [t for t in tapes if t.schema == "definition"]
        self._tapes = [t for t in tapes if t.schema != "definition"]
        if not self._tapes:
            named = ", ".join(str(t.path) for t in tapes) or "no file"
            raise SourceError(f"no trades to play ({named}, schema definition only); give {ACCEPTED}")
        for tape in self._tapes:
            if tape.schema == "trades":
                log.warning("%s has no best bid and offer (schema trades): prefer tbbo", tape.path)
                break
        self.venue = self._tapes[0].metadata.dataset
        self.tape = blake2b(b"".join(t.digest for t in tapes), digest_size=16).hexdigest()
        self._pacer = Pacer(speed) if speed is not None else None
        self._normalizer = Normalizer(feed, partitions)
        self._counted = [0] * len(REASONS)
        self._day = -1

    # -- Source ------------------------------------------------------------------------------

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """See Source. What lies before a fault in a file has been pushed when SourceError is raised."""
        symbology = Symbology(self.venue, self.feed, self._option_roots)
        for tape in self._definitions:
            symbology.add_definitions(definitions(tape))
        for tape in self._tapes:
            symbology.add_metadata(tape.metadata)
        symbology.close()
        cursor = _oldest(resume)
        merge = Merge(self._tapes, cursor.opened, cursor.at)
        self._normalizer = Normalizer(self.feed, self._normalizer.partitions)
        self._normalizer.boundary_ns = cursor.boundary
        self._counted, self._day = [0] * len(REASONS), -1
        out.connection("connected", f"{len(self._tapes)} files of {self.venue}")
        try:
            self._play(out, merge, cursor, symbology, stop)
        finally:
            out.flush()
        if not stop.is_set():
            self._finish(out, cursor, symbology)

    def _play(self, out: Output, merge: Merge, cursor: Cursor, symbology: Symbology, stop: threading.Event) -> None:
        while not stop.is_set():
            head = self._head(out, merge, cursor)
            if head is None:
                return
            if head // DAY != self._day:
                self._enter(out, head // DAY, cursor, symbology)
            bound = (head // DAY + 1) * DAY
            if self._pacer is not None:
                bound = min(bound, self._pacer.due(head, stop) + 1)
                if head >= bound:
                    continue
            cursor.opened, cursor.at, cursor.boundary = merge.next, merge.where(), self._normalizer.boundary_ns
            here = msgspec.json.encode(cursor)
            records = merge.take(bound)
            if len(records):
                out.ticks(self._normalizer(records, cursor.ordinal), here)
                cursor.ordinal += len(records)
                self._count(out)

    def _head(self, out: Output, merge: Merge, cursor: Cursor) -> int | None:
        """Time of the next record, after the files that may hold it were opened."""
        head = merge.head()
        while merge.next < len(merge.tapes) and (head is None or head >= merge.next_start()):
            self._settle(merge, cursor)
            tape = merge.tapes[merge.next]
            alone = not merge.open
            first = merge.open_next()
            start = tape.start_ns if tape.start_ns is not None else first
            if start is not None and (cursor.watch_ns is None or (alone and start > (cursor.cover_ns or 0))):
                if cursor.cover_ns is not None:
                    out.broadcast(Clock(self.feed, cursor.cover_ns))
                cursor.watch_ns = start
                self._watch(out, cursor)
            if tape.end_ns is not None:
                cursor.cover_ns = max(cursor.cover_ns or 0, tape.end_ns)
            head = merge.head()
        self._settle(merge, cursor)
        return head

    @staticmethod
    def _settle(merge: Merge, cursor: Cursor) -> None:
        """Files that ended reach at least to their last record."""
        if merge.finished_ns:
            cursor.cover_ns = max(cursor.cover_ns or 0, merge.finished_ns)
            merge.finished_ns = 0

    def _enter(self, out: Output, day: int, cursor: Cursor, symbology: Symbology) -> None:
        """A new UTC date: instruments that begin on or before it are published, ids mean what they mean today."""
        active = self._normalizer.active_partitions()
        begun = symbology.begun(self._day, day)
        out.instruments(instrument for _, instrument in begun)
        for native, instrument in begun:  # a partition that ever had an instrument gets clock rows from then on
            self._normalizer.map(native, instrument)
        self._normalizer.forget()
        for native, instrument in symbology.on(day):
            self._normalizer.map(native, instrument)
        self._day = day
        if self._normalizer.active_partitions() != active:
            self._watch(out, cursor)

    def _watch(self, out: Output, cursor: Cursor) -> None:
        if cursor.watch_ns is not None:
            out.broadcast(Clock(self.feed, cursor.watch_ns, watched_from_ns=cursor.watch_ns))

    def _finish(self, out: Output, cursor: Cursor, symbology: Symbology) -> None:
        if self._day < 0 and cursor.watch_ns is not None:  # an interval without a trade was watched all the same
            self._enter(out, cursor.watch_ns // DAY, cursor, symbology)
        if cursor.cover_ns is not None:
            out.broadcast(Clock(self.feed, cursor.cover_ns, final=True))
        out.connection("ended", f"{cursor.ordinal} records")

    def _count(self, out: Output) -> None:
        for i, total in enumerate(self._normalizer.skipped.tolist()):
            if total != self._counted[i]:
                out.count(REASONS[i], total - self._counted[i])
                self._counted[i] = total


def _open_all(paths: Iterable[Path | str]) -> list[Tape]:
    """Headers of all files, by start and name. Raises SourceError for two datasets or a file given twice."""
    tapes = [open_tape(path) for path in paths]
    seen: dict[Path, Path] = {}
    for tape in tapes:
        if tape.path.resolve() in seen:
            raise SourceError(f"{tape.path} is given twice: its trades would count twice")
        seen[tape.path.resolve()] = tape.path
        if tape.metadata.dataset != tapes[0].metadata.dataset:
            raise SourceError(
                f"{tape.path} is of {tape.metadata.dataset}, {tapes[0].path} of {tapes[0].metadata.dataset}: "
                "play one dataset at a time"
            )
    return sorted(tapes, key=lambda t: (t.start_ns or 0, t.path.name))


def _oldest(resume: Resume) -> Cursor:
    """The cursor that lets every partition get what it lacks."""
    held: Sequence[bytes] = list(resume.cursors.values())
    if not held or not all(held):
        return Cursor()
    return min((msgspec.json.decode(c, type=Cursor) for c in held), key=lambda c: c.ordinal)
