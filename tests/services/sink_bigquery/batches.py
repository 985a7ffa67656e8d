"""Batches of known rows for sinks on a BigQuery of the tests' own, and whether each row is there once."""

from __future__ import annotations

from collections import Counter
from typing import Any

from shared.bus import Bus
from shared.frames import NS, Frame
from tests.fakes.bigquery import BigQueryServer
from tests.fakes.bigquery_sinks import Sinks
from tests.services.sink_sqlite.tape import FIXED_NAMES, NAMES, T0, Stage, bars, candles, fixed, rows
from tests.wait import until

METHODS = ("load", "storage_write", "insert_all")
ROWS = 10
# What a sink weighs a batch's three frames: so each batch here is one of the sink's.
WEIGHT = 2 * (1 + ROWS) + 1
LOAD, APPEND, INSERT = "jobs.insert.load", "AppendRows", "tabledata.insertAll"
WRITE = {"load": LOAD, "storage_write": APPEND, "insert_all": INSERT}
Key = tuple[Any, ...]


class Batches:
    """Each batch is ten rolling candles, ten fixed candles and a frame that is none, a dead letter."""

    def __init__(self, bus: Bus, server: BigQueryServer, sinks: Sinks, method: str) -> None:
        self.server, self.sinks = server, sinks
        self.stage = Stage(bus)
        self.count = 0
        sinks.environ |= {"TAPELINE_BIGQUERY_METHOD": method, "TAPELINE_BIGQUERY_BATCH_ROWS": str(WEIGHT)}
        self.refused: Counter[Key] = Counter()

    def put(self, count: int = 1) -> None:
        for _ in range(count):
            start = self.count * ROWS // 2
            unreadable = Frame("candle_1m", 3, T0, T0, "test", b"xyz")
            self.stage.put(candles(rows(ROWS, start)), bars(fixed(ROWS, start)), unreadable)
            self.count += 1

    def expected(self, table: str) -> Counter[Key]:
        """The rows that are to be there by now; of dead letters just how many."""
        made, names = (rows, NAMES) if table == "candles_1m" else (fixed, FIXED_NAMES)
        every = made(ROWS * self.count)
        keys = zip(every["name"].tolist(), every["time_ns"].tolist(), every["close"].tolist(), strict=True)
        return Counter((names[name][1], time_ns // NS, close) for name, time_ns, close in keys) - self.refused

    def stored(self, table: str) -> Counter[Key]:
        time = "time" if table == "candles_1m" else "timestamp_in"
        return Counter((r["symbol"], r[time] // 1_000_000, r["close"]) for r in self.server.rows(table))

    def letters(self) -> Counter[Key]:
        return Counter((r["stream_id"], r["table_name"], r["row_number"]) for r in self.server.rows("dead_letters"))

    def none_twice(self) -> None:
        """No row is there that should not be, none twice, and no batch has been announced twice."""
        for table in ("candles_1m", "candles"):
            assert not self.stored(table) - self.expected(table)
        assert not [key for key, times in self.letters().items() if times > 1]
        announced = Counter((r["bus"], r["n"]) for r in self.server.rows("sink_batches"))
        assert not [key for key, times in announced.items() if times > 1]

    def complete(self, timeout: float = 15.0, *, twice: bool = False) -> None:
        """Wait for all that was put, then see that each row is there exactly once (`twice`: or more often)."""
        try:
            until(self._there, timeout, "all rows")
        except AssertionError as error:
            raise AssertionError(f"{error}; the sink says:\n{self.sinks.newest.text}") from None
        if not twice:
            self.none_twice()
        for table in ("candles_1m", "candles"):
            assert set(self.stored(table)) == set(self.expected(table))
            assert twice or self.stored(table) == self.expected(table)
        assert len(self.letters()) == self.count + self.refused.total()

    def _there(self) -> bool:
        status = self.sinks.newest.status
        assert status is None, f"the sink ended with {status}:\n{self.sinks.newest.text}"
        tables = ("candles_1m", "candles")
        return len(self.letters()) >= self.count + self.refused.total() and all(
            len(self.stored(table)) >= len(self.expected(table)) for table in tables
        )
