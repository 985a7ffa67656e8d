"""Arrays of rows that grow: what the stages' states are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from shared.frames import Rows


class Growing:
    """An array that rows are appended to without copying it each time. `rows` is another array after `extend`."""

    def __init__(self, dtype: np.dtype[Any] | type, *tail: int, fill: Rows | None = None) -> None:
        self._held = np.zeros((0, *tail), dtype)
        self._fill = fill
        self.rows = self._held

    def extend(self, count: int) -> None:
        """`count` more rows, as `fill` is (zeros without)."""
        n = len(self.rows)
        if n + count > len(self._held):
            held = np.zeros((max(2 * n, n + count, 8), *self._held.shape[1:]), self._held.dtype)
            held[:n] = self.rows
            self._held = held
        self.rows = self._held[: n + count]
        if self._fill is not None:
            self.rows[n:] = self._fill


def filled(dtype: np.dtype[Any], **values: float) -> Rows:
    """One row of these values, zeros elsewhere."""
    row = np.zeros(1, dtype)
    for name, value in values.items():
        row[name] = value
    return row
