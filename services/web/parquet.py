"""Rows as a Parquet file, written as it grows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.web.formats import Rows, columns_of


class Parquet:
    """A row group for each page. Instants are of microseconds in UTC, a list is JSON text."""

    def __init__(self, table: str, columns: Sequence[str]) -> None:
        sorts = columns_of(table)
        types = {
            "text": pa.string(), "instant": pa.timestamp("us", tz="UTC"), "real": pa.float64(),
            "integer": pa.int64(), "boolean": pa.bool_(), "json": pa.string(),
        }  # fmt: skip
        self._instants = {name for name in columns if sorts[name].name == "instant"}
        self._flags = {name for name in columns if sorts[name].name == "boolean"}
        self._schema = pa.schema([
            pa.field(name, types[sorts[name].name], nullable=sorts[name].null) for name in columns
        ])  # fmt: skip
        self._file = _Growing()
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")

    def rows(self, rows: Rows) -> bytes:
        if rows:
            arrays = [self._array(field, [row[field.name] for row in rows]) for field in self._schema]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows))
        return self._file.taken()

    def _array(self, field: Any, values: list[Any]) -> Any:
        if field.name in self._instants:
            # Of an instant in ns the last digits are cut off.
            return pa.array(values, pa.string()).cast(pa.timestamp("ns", tz="UTC")).cast(field.type, safe=False)
        if field.name in self._flags:
            values = [None if value is None else bool(value) for value in values]
        return pa.array(values, field.type)

    def end(self) -> bytes:
        self._writer.close()
        return self._file.taken()


class _Growing(io.RawIOBase):
    """A file that is handed on as it grows."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        self._at += len(part)
        return len(part)

    def tell(self) -> int:
        return self._at

    def taken(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
