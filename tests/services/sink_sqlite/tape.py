"""Candle frames for the sink's tests, and a sink to run on them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from services.sink_sqlite.store import SqliteStore
from shared.bus import Bus
from shared.frames import (
    BOOK,
    CANDLE,
    CLOCK,
    FIXED,
    LATE,
    LIQUIDATION,
    NS,
    OPTION,
    TICK,
    TICKER,
    TRADE,
    Frame,
    Rows,
    tick_frame,
)
from shared.instruments import instrument_id
from shared.messages import (
    Components,
    Gap,
    Instrument,
    Pressure,
    PressureRollup,
    Signal,
    TopStrike,
    Usage,
    encode,
)  # fmt: skip
from shared.redis_server import EmbeddedRedis
from shared.settings import RedisSettings, Settings, Sink, Tapeline
from shared.sink import SinkLoop, open_store
from tests.wait import on_disk

T0 = 1_703_545_260 * NS  # 2023-12-25T23:01:00Z
NAMES = [("ES", "ESH4"), ("6E", "6EH4")]
FIXED_NAMES = [("binance-futures", "BTCUSDT"), ("deribit", "BTC-PERPETUAL")]
EXPIRY = 1_711_699_200 * NS  # 2024-03-29T08:00:00Z
OPTIONS = {"kind": "C", "strike": 50000.0, "expiration_ns": EXPIRY, "underlying": "BTC-29MAR24"}
INSTRUMENTS = {
    i.id: i
    for i in (
        Instrument(instrument_id("deribit", symbol), "deribit", symbol, "deribit:BTC", "tardis:deribit", **more)
        for symbol, more in (("BTC-PERPETUAL", {}), ("ETH-PERPETUAL", {}), ("BTC-29MAR24-50000-C", OPTIONS))
    )
}
PERPETUAL, ETHER, CALL = INSTRUMENTS


def rows(count: int, start: int = 0, *, revision: int = 0, out_ns: int = T0 + 500_123_456, close: float = 0.0) -> Rows:
    """Candle rows of both names, two a second, from second `start`; values follow from their place."""
    made = np.zeros(count, CANDLE)
    i = np.arange(count) + 2 * start
    made["time_ns"] = T0 + (i // 2) * NS
    made["name"] = i % 2
    for at, name in enumerate(CANDLE.names[2:-3]):
        made[name] = (i % 97) + at if CANDLE[name].kind == "f" else i % 5
    made["low"] = made["open"] = made["high"] = 5000.25
    made["close"] = close or 5000 + i / 4
    made["vwap"][::3] = np.nan
    made["divergence"] = i % 3 - 1
    made["complete"] = 1
    made["revision"] = revision
    made["timestamp_out_ns"] = out_ns
    return made


def candles(made: Rows, kind: str = "candle_1m", names: list[tuple[str, str]] = NAMES) -> Frame:
    return Frame(
        kind, len(made), int(made["time_ns"][0]), int(made["time_ns"][-1]), "test", made.tobytes(), names=names
    )


def fixed(count: int, start: int = 0, *, revision: int = 0, close: float = 0.0, seconds: int = 60) -> Rows:
    """Fixed candles of both names, from candle `start`; values follow from their place."""
    made = np.zeros(count, FIXED)
    i = np.arange(count) + 2 * start
    made["time_ns"] = T0 + (i // 2) * seconds * NS
    made["timeframe_sec"] = seconds
    made["name"] = i % 2
    for at, name in enumerate(FIXED.names[3:-3]):
        made[name] = (i % 97) + at if FIXED[name].kind == "f" else i % 5
    made["low"] = made["open"] = made["high"] = 5000.25
    made["close"] = close or 5000 + i / 4
    made["vwap"][::3] = np.nan
    made["complete"] = 1
    made["revision"] = revision
    made["timestamp_out_ns"] = made["time_ns"] + seconds * NS + 1_500_000
    return made


def bars(made: Rows) -> Frame:
    return candles(made, "candle", FIXED_NAMES)


def ticks(kind: int, count: int, start: int = 0, *, instrument: int = 0, parts: int = 1) -> Rows:
    """Records of one kind; values follow from their place."""
    made = np.zeros(count * parts, TICK)
    record = np.arange(count).repeat(parts) + start
    made["kind"], made["part"] = kind, np.tile(np.arange(parts), count)
    made["instrument"] = instrument or PERPETUAL
    made["ts_event_ns"] = T0 + record * 1000 + 7
    made["ts_recv_ns"] = made["ts_event_ns"] + 100
    for at, name in enumerate(("price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz")):
        made[name] = 100.0 * (at + 1) + np.tile(np.arange(parts), count) + record / 4
    if kind in (TRADE, LIQUIDATION):
        made["side"], made["sequence"] = record % 3 - 1, record
    if kind == TICKER:
        made["sequence"] = np.where(record % 2, T0 // NS + 3600, 0)
    return made


def mixed(start: int = 0) -> Rows:
    """One record of each kind, with a clock among them."""
    return np.concatenate([
        ticks(CLOCK, 1, start), ticks(TRADE, 1, start), ticks(BOOK, 1, start, parts=5), ticks(TICKER, 1, start),
        ticks(LIQUIDATION, 1, start), ticks(OPTION, 1, start, instrument=CALL, parts=3),
    ])  # fmt: skip


def late(count: int, start: int = 0) -> Frame:
    made = np.zeros(count, LATE)
    tick = made["tick"]
    tick["ts_event_ns"] = T0 + np.arange(start, start + count) * 1000 + 7
    tick["ts_recv_ns"] = tick["ts_event_ns"] + 100
    tick["price"], tick["size"] = 5000.5, 2
    tick["side"] = np.arange(count) % 3 - 1
    made["watermark_ns"] = T0 + 300 * NS
    return Frame("late_trade", count, T0, T0 + NS, "test", made.tobytes(), names=NAMES)


def gap(start_ns: int = T0, symbols: tuple[str, ...] = ()) -> Frame:
    message = Gap("glbx", start_ns, start_ns + NS, "replay refused", symbols)
    return Frame("gap", 1, start_ns, start_ns + NS, "test", encode([message]))


WINDOW = 300
T_WINDOW = T0 - 60 * NS  # 2023-12-25T23:00:00Z, where a window begins


def pressure(n: int = 0, **values: Any) -> Pressure:
    """Option pressure of the n-th of four keys and its window; values follow from `n`."""
    start = T_WINDOW + n // 4 * WINDOW * NS
    made = {
        name: 1.25 * (at + 1) + n for at, name in enumerate(Pressure.__struct_fields__) if name not in ("complete",)
    } | {
        "underlying": "NQ", "expiration_ns": EXPIRY, "strike": 17000.5 + n % 4 // 2 * 50, "option_type": "CP"[n % 2],
        "time_window_ns": start, "window_sec": WINDOW, "dominant_side": ("BUY", "SELL", "NEUTRAL")[n % 3],
        "confidence": n % 11 / 10, "total_trades": 20 + n, "pressure_ratio": None if n % 3 else 1.5, "vwap": 12.125 + n,
        "first_ns": start + 1_234_567 + n, "last_ns": start + 299 * NS + 7, "mean_ns": start + 150 * NS + 123_456_789,
        "strike_rank": n, "sweeps": 2, "blocks": 3, "complete": bool(n % 2), "revision": 0,
        "timestamp_out_ns": start + WINDOW * NS + 2_500_000,
    }  # fmt: skip
    return Pressure(**(made | values))


def rollup(n: int = 0, **values: Any) -> PressureRollup:
    """The rollup of the n-th window."""
    start = T_WINDOW + n * WINDOW * NS
    made = {name: 0.75 * (at + 1) + n for at, name in enumerate(PressureRollup.__struct_fields__)} | {
        "underlying": "NQ", "time_window_ns": start, "window_sec": WINDOW, "strikes": 4, "total_trades": 90 + n,
        "put_call_ratio": None if n % 2 else 0.5, "top_strikes": (TopStrike(EXPIRY, 17000.5, "C", 1.5, 30.0),),
        "complete": True, "revision": 0, "timestamp_out_ns": start + WINDOW * NS + 3_000_001,
    }  # fmt: skip
    return PressureRollup(**(made | values))


def signal(n: int = 0, **values: Any) -> Signal:
    """A signal of the n-th pressure row."""
    of = pressure(n)
    numbers = {name: 0.01 * (at + 1) + n for at, name in enumerate(Components.__struct_fields__)}
    made = {
        "underlying": of.underlying, "time_window_ns": of.time_window_ns, "window_sec": WINDOW,
        "signal_type": "block", "direction": "BUY", "score": 0.75, "grade": "HIGH", "expiration_ns": of.expiration_ns,
        "strike": of.strike, "option_type": of.option_type, "types": ("block", "sweep"), "baseline": "key_time",
        "baseline_size": 20 + n, "components": Components(**(numbers | {"cluster_size": 3})), "log_ratio": 1.5,
        "volume": 100.0, "premium": 2.5e6, "underlying_price": 17010.25, "moneyness": 0.99, "timestamp_out_ns":
        of.time_window_ns + WINDOW * NS + 4_000_000,
    }  # fmt: skip
    return Signal(**(made | values))


def usage(n: int = 0, feed: str = "databento", **values: Any) -> Usage:
    """A feed's usage in its n-th minute of the day, which began at T_WINDOW."""
    made = {
        "feed": feed, "day": "2023-12-25", "at_ns": T_WINDOW + (n + 1) * 60 * NS + 1_000, "events": 10 + n,
        "bytes": 800 + n, "connected_seconds": 60.0, "cost_usd": 0.02, "day_events": 10 * (n + 1),
        "day_bytes": 800 * (n + 1), "day_connected_seconds": 60.0 * (n + 1), "day_cost_usd": 0.02 * (n + 1),
        "budget_usd": 25.0,
    }  # fmt: skip
    return Usage(**(made | values))


def said(*messages: Any, body: bytes | None = None) -> Frame:
    """A frame of messages of one kind, or of that kind with another body."""
    kind = str(messages[0].__struct_config__.tag)
    body = encode(list(messages)) if body is None else body
    return Frame(kind, len(messages), T_WINDOW, T_WINDOW + WINDOW * NS, "test", body)


TOPIC_OF = {"late_trade": "late", "pressure": "pressure", "pressure_rollup": "pressure", "signal": "signals"}


class Stage:
    """Publishes frames with one output sequence over its topics, as a stage does."""

    def __init__(self, bus: Bus, partition: int = 0, name: str = "aggregate") -> None:
        self.bus, self.partition, self.name = bus, partition, name
        self.seq, _ = bus.attach(partition, f"stage-{name}", "tests")

    def put(self, *frames: Frame, topic: str = "") -> int:
        """Returns the newest sequence."""
        for frame in frames:
            to = topic or TOPIC_OF.get(frame.kind, "candles")
            assert self.bus.publish(self.partition, f"stage-{self.name}", "tests", self.seq + 1, [frame], b"", to)
            self.seq += 1
            self.bus.call("hset", self.bus.keys.meta(self.partition, self.name), "out_seq", self.seq)
        return self.seq


class Feed:
    """A producer on `ticks` or `usage`: one of several, each with a sequence of its own."""

    def __init__(
        self, bus: Bus, name: str = "tardis:deribit", partition: int = 0, *, known: bool = True, topic: str = "ticks"
    ) -> None:
        self.bus, self.name, self.partition, self.topic = bus, name, partition, topic
        self.seq, _ = bus.attach(partition, name, "tests")
        if known:
            fields = {str(i.id): msgspec.json.encode(i) for i in INSTRUMENTS.values()}
            bus.call("hset", bus.keys.instruments(partition), mapping=fields)

    def put(self, *frames: Frame | Rows) -> str:
        """Returns the newest entry's id."""
        for frame in frames:
            whole = frame if isinstance(frame, Frame) else tick_frame(frame, self.name)
            assert self.bus.publish(self.partition, self.name, "tests", self.seq + 1, [whole], b"", self.topic)
            self.seq += 1
        return self.bus.last_id(self.partition, self.topic)


def settings(
    bus: Bus,
    store: str = "",
    partitions: int = 1,
    batch_rows: int = 5000,
    batch_ms: int = 20,
    modes: tuple[str, ...] = ("candles",),
) -> Settings:
    return Settings(
        tapeline=Tapeline(partitions=partitions, namespace=bus.keys.namespace, store=store),
        redis=RedisSettings(url=bus.url),
        sink=Sink(modes=modes, batch_rows=batch_rows, batch_ms=batch_ms),
    )


@contextmanager
def sinking(bus: Bus, path: Path, store: SqliteStore | None = None, **options: Any) -> Iterator[SinkLoop]:
    """A sink on a thread; an error that ends it is raised when the block ends."""
    stop = threading.Event()
    store = store or SqliteStore(path, busy_seconds=0.1)
    assert open_store(store, stop)
    loop = SinkLoop(bus.clone(), store, "sink-sqlite", settings(bus, **options), stop)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield loop
    finally:
        stop.set()
        thread.join(timeout=10)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def start_sink(
    bus: Bus, url: str, fault: str = "", batch_rows: int = 1, modes: str = "candles"
) -> subprocess.Popen[bytes]:
    """The service as a process of its own."""
    code = (
        "import signal, threading\n"
        "from services.sink_sqlite.worker import run\n"
        "from shared.settings import load\n"
        "stop = threading.Event()\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set())\n"
        "run(load(), stop, ())\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TAPELINE_")} | {
        "REDIS_URL": bus.url,
        "TAPELINE_NAMESPACE": bus.keys.namespace,
        "TAPELINE_STORE": url,
        "TAPELINE_PARTITIONS": "1",
        "TAPELINE_SINK_BATCH_ROWS": str(batch_rows),
        "TAPELINE_SINK_BATCH_MS": "20",
        "TAPELINE_SINK_MODES": modes,
    }
    return subprocess.Popen([sys.executable, "-c", code], env=env | ({"TAPELINE_TEST_FAULT": fault} if fault else {}))


@contextmanager
def without_tail(server: EmbeddedRedis, bus: Bus) -> Iterator[None]:
    """What is added inside is lost, as by a power cut: the server comes back with its older file."""
    aof, copy = server.folder / "appendonly.aof", server.folder / "older.aof"
    on_disk(bus.client)
    shutil.copy(aof, copy)
    yield
    server.kill()
    shutil.copy(copy, aof)
    server.start()
    bus.client.connection_pool.disconnect()


def query(path: Path, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Rows of a query on a store that may be in use; [] while it has no such table."""
    connection = sqlite3.connect(path, timeout=5)
    try:
        return connection.execute(sql, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        connection.close()


def stored_seq(path: Path, topic: str = "candles", partition: int = 0) -> int:
    """The newest sequence that the store has of any bus in this stream."""
    found = query(path, "SELECT max(seq) FROM sink_cursors WHERE topic = ? AND partition = ?", (topic, partition))
    return int(found[0][0] or 0) if found else 0


def stored_id(path: Path, topic: str = "ticks", partition: int = 0) -> str:
    """The entry up to which the store has this stream, of the bus that it read last."""
    found = query(
        path, "SELECT stream_id FROM sink_cursors WHERE topic = ? AND partition = ? ORDER BY rowid DESC LIMIT 1",
        (topic, partition),
    )  # fmt: skip
    return str(found[0][0]) if found else ""


def table(path: Path, name: str = "candles_1m") -> list[tuple[Any, ...]]:
    """A candle table without what differs between runs, in key order."""
    connection = sqlite3.connect(path, timeout=5)
    try:
        columns = [r[1] for r in connection.execute(f"PRAGMA table_info({name})")]
        order = "exchange, symbol, timeframe, timestamp_in" if name == "candles" else "ticker, symbol, time"
        same = ", ".join(c for c in columns if c not in ("timestamp_out", "latency_ms"))
        return connection.execute(f"SELECT {same} FROM {name} ORDER BY {order}").fetchall()
    finally:
        connection.close()
