"""Fault points for tests: a process kills itself where the test asks for it.

`TAPELINE_TEST_FAULT=sink:before-commit` dies the first time that point is passed,
`sink:before-commit:3` the third time. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal


def _ordered(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition(":")
    return (name, int(count)) if count.isdigit() else (text, 1)


_armed, _left = _ordered(os.environ.get("TAPELINE_TEST_FAULT", ""))


def point(name: str) -> None:
    """Die here by SIGKILL, as `kill -9` would, if this is the ordered point and its turn."""
    global _left  # noqa: PLW0603 - one process, one order
    if name != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
