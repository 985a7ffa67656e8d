"""The shell: history from a store, frames out, and the real worker over the real bus."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import replace as with_
from pathlib import Path

import msgspec
import pytest

from services.signals.worker import FRAME_SIGNALS, HISTORY_COLUMNS, SignalStage, pack
from shared.bus import Bus
from shared.errors import StoreUnavailable
from shared.frames import NS, Frame, iso
from shared.messages import Pressure, Signal, decode
from shared.settings import Settings, load
from shared.tables import MESSAGE_TABLES
from shared.worker import Worker
from tests.services.signals.tape import DAY, START, WINDOW, Message, Stage, days, frames, row, window
from tests.wait import until

PAST = days(20, row(10, 10, moneyness=1.0), row(12, 10, strike=6005.0))
NOW = window(row(400, 5, moneyness=1.0), row(12, 10, strike=6005.0))


@pytest.fixture
def settings(store_url: str) -> Settings:
    base = load(environ={})
    return with_(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, partitions=1, store=store_url),
        redis=msgspec.structs.replace(base.redis, lease_seconds=1.0),
        aggregate=msgspec.structs.replace(base.aggregate, calendars={"ES": "24/7"}),
    )


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def store(url: str, messages: Iterable[Message]) -> None:
    """What a sink would have stored, in a table of its columns that matter here."""
    connection = sqlite3.connect(path_of(url))
    connection.execute(
        "CREATE TABLE pressure_metrics (underlying TEXT, expiration TEXT, strike REAL, option_type TEXT, "
        "time_window TEXT, window_seconds INTEGER, bid_volume REAL, ask_volume REAL, unknown_volume REAL, "
        "log_ratio REAL, moneyness REAL, PRIMARY KEY (underlying, expiration, strike, option_type, time_window))"
    )
    rows = [
        (m.underlying, second(m.expiration_ns), m.strike, m.option_type, second(m.time_window_ns), m.window_sec,
         m.bid_volume, m.ask_volume, m.unknown_volume, m.log_ratio, m.moneyness)
        for m in messages if isinstance(m, Pressure)
    ]  # fmt: skip
    with connection:
        connection.executemany("INSERT INTO pressure_metrics VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
    connection.close()


def second(ns: int) -> str:
    return iso(ns)[:19] + "Z"


def signals_in(outputs: dict[str, list[Frame]]) -> list[Signal]:
    return [m for frame in outputs.get("signals", []) for m in decode(frame.body) if isinstance(m, Signal)]


def plain(signals: Iterable[Signal]) -> list[Signal]:
    return [msgspec.structs.replace(s, timestamp_out_ns=0) for s in signals]


def test_a_new_underlying_takes_its_history_from_the_store(settings: Settings, store_url: str) -> None:
    live = Stage()
    wanted = live.take([*PAST, *NOW])
    assert len(wanted) == 1
    store(store_url, [*PAST, *NOW, *window(row(1, 90, START + WINDOW))])
    core = SignalStage(settings).open({})
    result = core.step(frames(NOW))
    found = signals_in(result.outputs)
    assert plain(found) == wanted, "as if it had been there all along, and not knowing what is yet to come"
    assert found[0].timestamp_out_ns > START
    assert {n for n in result.changes if n.startswith("h:")} == {n for n in live.fields if n.startswith("h:")}

    path_of(store_url).unlink()  # once it knows the history, the store is not asked again
    later = window(row(400, 5, START + DAY, moneyness=1.0))
    again = signals_in(SignalStage(settings).open(result.changes).step(frames(later)).outputs)
    assert plain(again) == live.take(later)


def test_only_the_sessions_that_count_and_windows_of_the_same_length(settings: Settings, store_url: str) -> None:
    store(store_url, [*days(40, row(10, 10)), *window(row(10, 10, START - WINDOW, 7000.0, window_sec=60))])
    result = SignalStage(settings).open({}).step(frames(NOW))
    assert len([n for n in result.changes if n.startswith("h:")]) == 20 + 1
    assert msgspec.json.decode(result.changes["counters"])["bootstrapped"] == 20


def test_the_columns_are_those_of_the_stores() -> None:
    assert set(HISTORY_COLUMNS) | {"underlying", "window_seconds"} <= set(MESSAGE_TABLES["pressure"][0].names)


def test_a_store_without_the_table_has_no_history(settings: Settings, store_url: str) -> None:
    assert signals_in(SignalStage(settings).open({}).step(frames(NOW)).outputs) == []
    sqlite3.connect(path_of(store_url)).close()
    assert signals_in(SignalStage(settings).open({}).step(frames(NOW)).outputs) == []


def test_a_store_that_does_not_answer_is_said(settings: Settings, store_url: str) -> None:
    path_of(store_url).mkdir()
    with pytest.raises(StoreUnavailable):
        SignalStage(settings).open({}).step(frames(NOW))


def test_frames_of_signals() -> None:
    made = [Signal("ES", START + i * WINDOW, 300, "block", "BUY", 0.7, "HIGH") for i in range(FRAME_SIGNALS + 1)]
    first, second_ = pack(made, 5)["signals"]
    assert (first.kind, first.count, first.source, second_.count) == ("signal", FRAME_SIGNALS, "signals", 1)
    assert (second_.first_ns, second_.last_ns) == (made[-1].time_window_ns, made[-1].time_window_ns + 300 * NS)
    assert {s.timestamp_out_ns for s in signals_in({"signals": [first, second_]})} == {5}
    assert pack([], 5) == {}


def test_the_worker_over_the_bus_through_a_restart(bus: Bus, settings: Settings) -> None:
    tape = [*PAST, *NOW, *window(row(5, 400, START + WINDOW, moneyness=1.0))]
    wanted = Stage().take(tape)
    assert [s.direction for s in wanted] == ["BUY", "SELL"]
    all_frames = frames(tape)
    half = len(all_frames) - 3  # between a window's rows and its rollup
    bus.attach(0, "test", "me")
    for some, seq in ((all_frames[:half], 1), (all_frames[half:], half + 1)):
        stop = threading.Event()
        worker = threading.Thread(target=Worker(bus.clone(), SignalStage(settings), settings, stop).run, daemon=True)
        worker.start()
        bus.publish(0, "test", "me", seq, some, b"", topic="pressure")
        end = bus.last_id(0, "pressure").encode()
        until(lambda at=end: bus.call("hget", bus.keys.meta(0, "signals"), "pos") == at, what="all frames taken")
        stop.set()
        worker.join(10)
        assert not worker.is_alive()
    assert plain(signals_in({"signals": bus.read(0, "signals", "0-0", 100)})) == wanted
    counters = bus.call("hget", bus.keys.state(0, "signals"), "counters")
    assert msgspec.json.decode(counters)["windows"] == 22
