"""Rows of candles_1m into PostgreSQL over one connection: the sink's own write, COPY alone, and executemany."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from services.sink_timescale.form import TimescaleForm
from services.sink_timescale.statements import INTO
from services.sink_timescale.store import TimescaleStore
from shared.batches import Batch, Item, Source, batch_of
from shared.frames import CANDLE, NS, Frame
from shared.postgres import connect, run
from shared.store_rows import prepare
from tests.postgres import PostgresServer

CONTRACTS = 24
START = 1_780_000_200 * NS
SYNCED = "fsync = on\nsynchronous_commit = on\nfull_page_writes = on\n"
INTO_TABLE = INTO["candles_1m"]
FORM = TimescaleForm()


def batches(rows: int) -> Iterator[Batch]:
    """Batches of rolling minutes of 24 contracts, one a second and contract; no key twice."""
    names = [(f"T{i}", f"T{i}H6") for i in range(CONTRACTS)]
    rng = np.random.default_rng(1)
    at = 0
    while True:
        made = np.zeros(rows, CANDLE)
        place = np.arange(at, at + rows)
        for name in CANDLE.names[2:]:
            made[name] = rng.integers(1, 9000, rows) if CANDLE[name].kind == "i" else rng.random(rows) * 100
        made["time_ns"] = START + place // CONTRACTS * NS
        made["name"], made["complete"], made["revision"] = place % CONTRACTS, 1, 0
        made["low"], made["high"], made["timestamp_out_ns"] = 1.0, 200.0, made["time_ns"] + 3_000_000
        at += rows
        frame = Frame("candle_1m", rows, 0, 0, "bench", made.tobytes(), names=names)
        yield batch_of([Item(Source("bench", "candles", 0, at, f"{at}-0"), frame)])


def once(sync: bool, rows: int, turns: int) -> dict[str, int]:
    """Rows a second of each way, one batch of each in turn; medians."""
    server = PostgresServer("16", config=SYNCED if sync else "").start()
    try:
        store = TimescaleStore(server.url())
        store.open()
        connection = run(connect(server.url()))
        run(connection.execute("CREATE TABLE copied (LIKE candles_1m INCLUDING ALL)"))
        run(connection.execute("CREATE TABLE inserted (LIKE candles_1m INCLUDING ALL)"))
        ways: dict[str, Callable[[Batch], Any]] = {
            "the store's write": store.write,
            "COPY alone": lambda batch: run(copy(connection, batch)),
            "executemany": lambda batch: run(insert(connection, batch)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        tape = batches(rows)
        for turn in range(turns + 1):
            batch = next(tape)
            for way, write in ways.items():
                began = time.perf_counter()
                write(batch)
                if turn:  # the first one is warm-up
                    seconds[way].append(time.perf_counter() - began)
        run(connection.close())
        store.close()
    finally:
        server.stop()
    return {way: round(rows / statistics.median(taken)) for way, taken in seconds.items()}


def columns_of(batch: Batch) -> list[list[Any]]:
    """The converted values, as the store makes them."""
    (prepared,), _ = prepare(batch, FORM)
    return prepared.rows.columns


async def copy(connection: Any, batch: Batch) -> None:
    """Into a table with the same indexes, which no row of them may be in yet."""
    records = zip(*columns_of(batch), strict=True)
    await connection.copy_records_to_table("copied", columns=INTO_TABLE.columns, records=records)


async def insert(connection: Any, batch: Batch) -> None:
    """An upsert a row, in one transaction."""
    names = ", ".join(f'"{c}"' for c in INTO_TABLE.columns)
    marks = ", ".join(f"${i + 1}" for i in range(len(INTO_TABLE.columns)))
    sets = ", ".join(f'"{c}" = excluded."{c}"' for c in INTO_TABLE.columns if c not in ("ticker", "time"))
    sql = (
        f"INSERT INTO inserted ({names}) VALUES ({marks}) ON CONFLICT (ticker, time) DO UPDATE SET {sets} "
        "WHERE excluded.revision >= inserted.revision"
    )
    await connection.executemany(sql, list(zip(*columns_of(batch), strict=True)))


def run_all(turns: int = 25) -> dict[str, Any]:
    """Rows a second, by batch size, without and with the server's syncing to disk."""
    return {
        f"batches of {rows}, fsync {'on' if sync else 'off'}": once(sync, rows, turns)
        for sync in (False, True)
        for rows in (5000, 10_000)
    }
