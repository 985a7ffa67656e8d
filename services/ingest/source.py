"""The contract between a source of market data and what publishes it.

A source is one file here with one class: it reads its feed and pushes what it got into an
`Output`, in feed order. Everything about Redis (sequences, cursors, back-pressure) is behind the
Output, so adding a venue touches its own file and one line of `services.ingest.worker`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.frames import Rows
from shared.messages import Clock, Disconnect, Gap, Instrument


@dataclass(slots=True)
class Grouped:
    """Tick rows grouped by partition, each group in feed order.

    Group g is `rows[starts[g]:starts[g + 1]]` of partition `partitions[g]`. `ordinals` is parallel
    to `rows`: the position on the tape of the record behind each row, rising within a group.
    """

    rows: Rows
    ordinals: NDArray[np.int64]
    partitions: list[int]
    starts: list[int]


# What a source counts with its bytes, as it came over the wire; see Output.count.
RECEIVED = "received"
LOOK_SECONDS = 0.05


@dataclass(slots=True)
class Resume:
    """Where the bus stands when a source starts: the cursor that each partition holds (or b"").

    `missed`: all since then is given up for this reason, as a Gap until now; it must not be asked for again.
    `since_ns`: nothing was to be seen before it, the market was closed; what came after it is to be had as ever.
    """

    cursors: dict[int, bytes] = field(default_factory=dict)
    missed: str = ""
    since_ns: int | None = None


class Stop(threading.Event):
    """Set when its parent is, or for itself: then the feed `rests`, on purpose and perhaps for long."""

    def __init__(self, parent: threading.Event) -> None:
        super().__init__()
        self._parent = parent

    @property
    def rests(self) -> bool:
        """Whether the feed, not the process, is to stop."""
        return super().is_set() and not self._parent.is_set()

    def is_set(self) -> bool:
        return super().is_set() or self._parent.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """As long as asked for, looking at the parent many times a second."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                break
            super().wait(min(left, LOOK_SECONDS))
        return self.is_set()


class Output(Protocol):
    """What a source pushes into. Every call may block (back-pressure) and raises Fenced when
    another process has taken this feed over, BusBehind when the source must resume from the bus."""

    def instruments(self, messages: Iterable[Instrument]) -> None:
        """Publish definitions, each to the partition of its root, before their first trade."""

    def broadcast(self, message: Clock | Gap | Disconnect) -> None:
        """Publish to every partition that has an instrument of this feed, after all ticks put so far."""

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        """Publish rows. `cursor` is where to resume so that these rows and all later ones come
        again: rows that a partition already holds (by ordinal) are dropped there."""

    def flush(self) -> None:
        """Publish what lingers."""

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:
        """Count records that were not published, with the reason; nothing vanishes uncounted.

        With reason RECEIVED: records that came from the vendor, and their bytes, whatever becomes of them."""

    def connection(self, state: str, detail: str = "") -> None:
        """Tell operators: `connected`, `down`, `waiting`, `ended`, `failed`; `budget` and `closed` while not to be."""


class Source(Protocol):
    """A feed."""

    feed: str

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """Push until the tape ends or `stop` is set. Raises SourceError, ConfigError, AuthError."""
