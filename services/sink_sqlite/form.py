"""How SQLite keeps values: instants as ISO text of fixed width, flags as 0 and 1, lists as JSON text."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.batches import iso_texts
from shared.tables import UNDEFINED

_json = msgspec.json.Encoder()


class SqliteForm:
    """See shared.store_rows.Form."""

    def instants(self, times_ns: NDArray[np.int64], unit: str) -> list[Any]:
        """Texts such as 2023-12-25T23:01:00Z; None where undefined."""
        texts: list[Any] = iso_texts(times_ns, unit)
        if len(texts) and times_ns.min() == UNDEFINED:
            return [None if at == UNDEFINED else text for at, text in zip(times_ns.tolist(), texts, strict=True)]
        return texts

    def reals(self, values: NDArray[np.float64]) -> list[Any]:
        """NaN needs nothing: SQLite stores a bound NaN as NULL."""
        out: list[Any] = values.tolist()
        return out

    def flags(self, values: NDArray[Any]) -> list[Any]:
        """0 and 1."""
        out: list[Any] = values.astype(np.int64).tolist()
        return out

    def json(self, values: list[Any]) -> list[Any]:
        """JSON texts."""
        return [_json.encode(value).decode() for value in values]
