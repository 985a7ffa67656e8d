"""Recorded normalized Tardis messages as a feed: files of JSON lines, merged by the time they were received.

Time stands on the tape alone, so any speed and any cut give the same rows. After a crash the tape is read from
its start again: the publisher drops what a partition already holds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from services.ingest.pacing import Pacer
from services.ingest.source import Output, Resume
from services.ingest.tardis_decode import EVENT, Decoded, Decoder, Event
from services.ingest.tardis_route import Router, warm
from services.ingest.tardis_tape import Tape, open_tape
from shared.errors import SourceError
from shared.frames import TICK, Rows

log = logging.getLogger(__name__)

BLOCK = 2000  # lines decoded at a time
ALWAYS = np.iinfo(np.int64).max


class TardisFiles:
    """Source over files of normalized messages of any exchanges. `speed`: None as fast as possible, else times real.

    An exchange is watched from its first record on and ends at its newest event time. The constructor looks into
    the files and raises SourceError for what it cannot play.
    """

    def __init__(
        self, paths: Iterable[Path | str], partitions: int, *,
        producer: str = "tardis-files", grace_ns: int = 500_000_000, speed: float | None = None, block: int = BLOCK,
    ) -> None:  # fmt: skip
        self.feed = producer
        self._partitions, self._grace_ns, self._block = partitions, grace_ns, block
        self._tapes = _open_all(paths)
        digests = b"".join(tape.digest for tape in self._tapes)
        self.tape = blake2b(digests + grace_ns.to_bytes(8, "little"), digest_size=16).hexdigest()
        self._pacer = Pacer(speed) if speed is not None else None

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:  # noqa: ARG002
        """See Source. What lies before a fault in a file has been pushed when SourceError is raised."""
        warm()
        router = Router(self.feed, self._partitions, self._grace_ns)
        merge = _Merge(self._tapes, router, out, self._block)
        out.connection("connected", f"{len(self._tapes)} files of Tardis messages")
        records = 0
        try:
            while not stop.is_set():
                head = merge.head()
                if head is None:
                    break
                until = self._pacer.due(head, stop) + 1 if self._pacer is not None else ALWAYS
                if head >= until:
                    continue
                rows = merge.take(until)
                places = records + np.cumsum(rows["part"] == 0) - 1
                if len(rows):
                    router.take(Decoded(rows, places, merge.events), out, b"")
                    records = int(places[-1]) + 1
        finally:
            out.flush()
        if not stop.is_set():
            router.finish(out)
            out.connection("ended", f"{records} records")


class _Lane:
    """What has been read of one file. `keys`: the newest local time so far, so that they never fall."""

    def __init__(self, tape: Tape, block: int) -> None:
        self.lines = tape.lines(block)
        self.rows: Rows = np.empty(0, TICK)
        self.keys = np.empty(0, np.int64)
        self.newest = 0
        self.ended = False
        self.fault: SourceError | None = None

    def put(self, rows: Rows) -> None:
        keys = np.maximum(np.maximum.accumulate(rows["ts_recv_ns"]), self.newest)
        self.newest = int(keys[-1])
        self.rows = np.concatenate((self.rows, rows)) if len(self.rows) else rows
        self.keys = np.concatenate((self.keys, keys)) if len(self.keys) else keys

    def pop(self, count: int) -> tuple[Rows, Rows]:
        taken = self.rows[:count], self.keys[:count]
        self.rows, self.keys = self.rows[count:], self.keys[count:]
        return taken


class _Merge:
    """Rows of several files in the order of receipt; ties go to the earlier file."""

    def __init__(self, tapes: list[Tape], router: Router, out: Output, block: int) -> None:
        self.events: list[Event] = []
        self._lanes = [_Lane(tape, block) for tape in tapes]
        self._decoder = Decoder(router.symbol)
        self._out = out

    def head(self) -> int | None:
        """Local time of the next row; None at the end. Raises SourceError where a faulty file ends."""
        for lane in self._lanes:
            while not len(lane.rows) and not lane.ended:
                self._fill(lane)
            if not len(lane.rows) and lane.fault is not None:
                raise lane.fault
        self._lanes = [lane for lane in self._lanes if len(lane.rows)]
        return min((int(lane.keys[0]) for lane in self._lanes), default=None)

    def take(self, until: int) -> Rows:
        """The next rows, below local time `until`; none when more of a file must be read first (and has been)."""
        bound = until
        for lane in self._lanes:
            if lane.fault is not None:
                bound = min(bound, lane.newest + 1)
            elif not lane.ended and len(self._lanes) > 1:
                bound = min(bound, lane.newest)  # more rows of this time may follow
        taken = [lane.pop(int(np.searchsorted(lane.keys, bound))) for lane in self._lanes]
        rows = np.concatenate([rows for rows, _ in taken])
        if not len(rows):
            for lane in self._lanes:
                if not lane.ended and lane.newest == bound:
                    self._fill(lane)
        elif len(taken) > 1:
            rows = rows[np.argsort(np.concatenate([keys for _, keys in taken]), kind="stable")]
        return rows

    def _fill(self, lane: _Lane) -> None:
        try:
            lines = next(lane.lines, None)
        except SourceError as error:
            lane.ended, lane.fault = True, error
            return
        if lines is None:
            lane.ended = True
            return
        decoded = self._decoder(lines, 0)
        for reason, count in decoded.counts.items():
            self._out.count(reason, count)
        if decoded.events:
            decoded.rows["instrument"][decoded.rows["kind"] == EVENT] += len(self.events)
            self.events += decoded.events
        if len(decoded.rows):
            lane.put(decoded.rows)


def _open_all(paths: Iterable[Path | str]) -> list[Tape]:
    """All files by their first record. Raises SourceError for a file given twice, or none at all."""
    tapes = [open_tape(path) for path in paths]
    if not tapes:
        raise SourceError(
            "no file to play; give files of normalized Tardis messages (.ndjson, .ndjson.zst, .ndjson.gz)"
        )
    seen: set[Path] = set()
    for tape in tapes:
        if tape.path.resolve() in seen:
            raise SourceError(f"{tape.path} is given twice; give each file once")
        seen.add(tape.path.resolve())
    return sorted(tapes, key=lambda t: (t.first_ns, t.path.name))
