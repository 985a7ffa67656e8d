"""When the parts of a worker last went on: a worker lives as well as its slowest part does.

A part is whatever could hang by itself: a partition's thread, a sink's writer, the source of a feed. It marks every
turn of its loop, also one that had nothing to do or that waits for a store which does not answer; a part that is over,
or has nothing to do by intent (a closed market), rests.
"""

from __future__ import annotations

import time


class Progress:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def mark(self, part: str = "main") -> None:
        """The part goes on."""
        self._at[part] = time.monotonic()

    def rest(self, part: str = "main") -> None:
        """Nothing is expected of the part until it marks again."""
        self._at.pop(part, None)

    def slowest(self) -> tuple[str, float]:
        """(the part that went on longest ago, seconds since then); ("", 0.0) when nothing is expected of any."""
        at = list(self._at.items())
        if not at:
            return "", 0.0
        part, then = min(at, key=lambda item: item[1])
        return part, max(0.0, time.monotonic() - then)
