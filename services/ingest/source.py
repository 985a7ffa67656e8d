"""The contract between a source of market data and what publishes it.

A source is one file here with one class: it reads its feed and pushes what it got into an
`Output`, in feed order. Everything about Redis (sequences, cursors, back-pressure) is behind the
Output, so adding a venue touches its own file and one line of `services.ingest.worker`.
"""

from __future__ import annotations

import threading
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


@dataclass(slots=True)
class Resume:
    """Where the bus stands when a source starts: the cursor that each partition holds (or b"")."""

    cursors: dict[int, bytes] = field(default_factory=dict)


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
        """Count records that were not published, with the reason; nothing vanishes uncounted."""

    def connection(self, state: str, detail: str = "") -> None:
        """Tell operators: `connected`, `down`, `waiting`, `ended`, `failed`."""


class Source(Protocol):
    """A feed."""

    feed: str

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """Push until the tape ends or `stop` is set. Raises SourceError, ConfigError, AuthError."""
