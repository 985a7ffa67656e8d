"""How PostgreSQL gets values: instants as datetimes in UTC, flags as booleans, undefined numbers as NULL, JSON text."""

from __future__ import annotations

from datetime import UTC
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

_json = msgspec.json.Encoder()
_FLAGS = {0: False, 1: True}
_BITS = {"integer": 32, "bigint": 64}


class TimescaleForm:
    """See shared.store_rows.Form."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        """Aware datetimes, cut to seconds or microseconds; None where undefined.

        Each different instant is made once: a batch has few.
        """
        different, index = np.unique(times_ns, return_inverse=True)
        kept = different.astype("M8[ns]").astype(f"M8[{'s' if unit == 's' else 'us'}]").astype("M8[us]")
        # UNDEFINED is numpy's NaT, and so None; naive datetimes would be taken for local time.
        made = [None if at is None else at.replace(tzinfo=UTC) for at in kept.tolist()]
        return [made[i] for i in index.tolist()]

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        """None for NaN."""
        undefined = np.isnan(values)
        out: list[Any] = values.tolist()
        for i in np.flatnonzero(undefined).tolist():
            out[i] = None
        return out

    def flags(self, values: NDArray[Any]) -> list[Any]:
        """Booleans. What is neither 0 nor 1 stays as it is, for the server to refuse it."""
        return [_FLAGS.get(value, value) for value in values.tolist()]

    def json(self, values: list[Any]) -> list[Any]:
        """JSON texts."""
        return [_json.encode(value).decode() for value in values]


def unfit(value: Any, kind: str) -> str:
    """Why a value cannot be sent as one of this type of PostgreSQL's; empty if it can."""
    if value is None:
        return ""
    if kind == "text":
        return _no_text(value)
    if kind in _BITS:
        limit = 1 << (_BITS[kind] - 1)
        return "" if isinstance(value, int) and -limit <= value < limit else f"{value!r:.40} is out of range for {kind}"
    if kind == "boolean":
        return "" if isinstance(value, bool) else f"{value!r:.40} is no boolean"
    return ""


def _no_text(value: Any) -> str:
    if not isinstance(value, str):
        return f"{value!r:.40} is no text"
    if "\0" in value:
        return "a text holds the character NUL, which PostgreSQL keeps in none"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "a text is no Unicode"
    return ""
