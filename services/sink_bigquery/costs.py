"""What writing to BigQuery costs, counted plainly.

List prices of the US multi-region: load jobs are free; the Storage Write API is 0.025 USD a GiB (of which the first
2 TiB a month are free, which is not subtracted here); insertAll is 0.05 USD a GiB, of rows of at least 1 KB each.
Storage and queries are not counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shared.usage import Totals

GIB = 1 << 30
USD_PER_GIB = {"load": 0.0, "storage_write": 0.025, "insert_all": 0.05}


def feed_of(method: str) -> str:
    """The name of a method in the usage of feeds."""
    return f"bigquery:{method}"


class Spent:
    """Rows, bytes and cost by method, safe from any thread.

    Bytes are what was sent: the Parquet file, the protocol buffers, or for insertAll JSON of at least 1 KB a row.
    """

    def __init__(self, method: str) -> None:
        self.by_method: dict[str, Totals] = {method: Totals()}
        self._lock = threading.Lock()
        self.listen: Callable[[str, str, Totals], None] | None = None

    @property
    def rows(self) -> int:
        """All rows."""
        with self._lock:
            return sum(total.events for total in self.by_method.values())

    def add(self, method: str, table: str, rows: int, nbytes: int) -> None:
        """Rows that were written."""
        more = Totals(rows, nbytes, 0.0, nbytes / GIB * USD_PER_GIB[method])
        with self._lock:
            self.by_method[method] = self.by_method.get(method, Totals()) + more
        if self.listen is not None:
            self.listen(method, table, more)

    def told(self) -> str:
        """For people."""
        with self._lock:
            return ", ".join(
                f"{name} {total.events} rows {total.bytes / (1 << 20):.1f} MiB ~{total.cost_usd:.4f} USD"
                for name, total in self.by_method.items()
            )
