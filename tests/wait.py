"""Wait for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], timeout: float = 10.0, what: str = "the condition") -> T:
    """The condition's first truthy value; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        time.sleep(0.005)


def on_disk(client: Any) -> None:
    """Wait for a Redis's file to hold all that it has answered: while an fsync runs, it may put off writing.

    `client`: of redis-py. What is not in the file is lost with `kill -9`.
    """

    def written() -> bool:
        info = client.info("persistence")
        return not info["aof_buffer_length"] and not info["aof_pending_bio_fsync"]

    until(written, what="the append-only file to be written")
