"""What a live gateway no longer replays comes from Databento Historical, else it is a gap."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from services.ingest.databento_history import DatabentoHistory
from services.ingest.databento_live import DatabentoLive
from services.ingest.worker import run_databento
from shared.bus import Bus
from shared.errors import AuthError, ConfigError, Unavailable
from shared.messages import Gap
from shared.settings import Databento, RedisSettings, load
from tests.fakes.gateway import KEY, Gateway
from tests.fakes.history import History
from tests.fakes.tape import NS, START, Tape, generate
from tests.services.ingest.collect import Collect, Running
from tests.services.ingest.live import PARTITIONS, SYMBOLS, assert_whole, connected, settings, total
from tests.services.ingest.test_databento_refusals import drop_and_return
from tests.wait import until

# When a download fails, the vendor's client leaves its file to be closed when nobody refers to it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file .*stretch.dbn.zst:ResourceWarning")

REACH = 60 * NS
NOW = START + 200 * NS
COST, RANGE, RESOLVE = "metadata.get_cost", "timeseries.get_range", "symbology.resolve"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def tape() -> Tape:
    return generate(seconds=300, per_second=10)


def source(gateway: Gateway, history: History, limit: float = 1.0, silence: float = 20.0) -> DatabentoLive:
    given = settings(gateway, replay_hours=REACH / NS / 3600, history_gateway=history.url, history_max_usd=limit)
    past = DatabentoHistory(given, threading.Event(), silence_seconds=silence)
    return DatabentoLive(given, PARTITIONS, history=past)


@contextmanager
def outage(gateway: Gateway, live: DatabentoLive) -> Iterator[Collect]:
    """140 s away of which the gateway replays 60."""
    out = Collect()
    with Running(live, out):
        drop_and_return(gateway, out, 500, NOW)
        until(lambda: gateway.live)
        yield out


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "cannot backfill" in r.getMessage()]


def test_the_stretch_is_fetched_and_leaves_no_trace(tape: Tape) -> None:
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        with outage(gateway, source(gateway, history)) as out:
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
        assert_whole(out.store, tape)
        assert not out.store.of(Gap)
        assert not history.complaints
        assert [name for name, _ in history.requests] == [COST, RANGE]
        (priced,), (bought,) = history.of(COST), history.of(RANGE)
        assert priced.items() <= bought.items()
        assert (bought["symbols"], bought["stype_in"]) == (",".join(SYMBOLS), "parent")
        assert int(bought["end"]) >= NOW - REACH


def test_received_late_or_early_belongs_to_its_event_time() -> None:
    """The archive cuts by receipt: what happened before the end but came after it is in neither half."""
    tape = generate(seconds=300, per_second=10)
    tape.records["ts_recv"] = tape.records["ts_event"] + 2 * NS
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        with outage(gateway, source(gateway, history)) as out:
            gateway.finish()
            until(lambda: out.store.total() >= total(tape))
        assert_whole(out.store, tape)
        assert not out.store.of(Gap)


@pytest.mark.parametrize("stype", ["parent", "raw_symbol", "continuous"])
def test_ids_mean_what_they_meant_on_their_day(stype: str) -> None:
    start = START + 3600 * NS - 100 * NS  # midnight is within the stretch
    tape = generate(seconds=300, per_second=10, start_ns=start)
    symbols = {"parent": SYMBOLS, "raw_symbol": ("ESH4", "ESM4"), "continuous": ("ES.c.0", "NQ.c.0")}[stype]
    wanted = {i.symbol: i.native for s in symbols for i in tape.resolve(stype, s)}
    mine = tape.records[np.isin(tape.records["instrument_id"], list(wanted.values()))]
    since, until_ns = start + 20 * NS, start + 250 * NS
    stop = threading.Event()
    with History(tape, shift=1) as history:  # an id of the first day is another one's on the second
        given = Databento(api_key=KEY, symbols=symbols, stype=stype, history_gateway=history.url, history_max_usd=1.0)
        blocks = list(DatabentoHistory(given, stop)(since, until_ns))
        assert not history.complaints
        assert len(history.of(RESOLVE)) == (stype == "continuous")
    assert len(blocks) >= 2
    got = []
    for names, records in blocks:
        back = records.copy()
        back["instrument_id"] = [wanted[names[i]] for i in records["instrument_id"].tolist()]
        got.append(back)
    ts = mine["ts_event"]
    assert np.concatenate(got).tobytes() == mine[(ts >= since) & (ts < until_ns)].tobytes()


@pytest.mark.parametrize(
    ("cost", "limit", "says"),
    [
        (0.75, 0.5, "costs $0.7500 at Databento Historical, more than databento.history_max_usd (0.5)"),
        (0.75, 0.0, "costs $0.7500 at Databento Historical, and databento.history_max_usd is 0 (never fetch)"),
        (0.0, 0.0, "costs $0.0000"),
        ("much", 1.0, "does not tell the price: it says 'much'"),
        (float("nan"), 1.0, "does not tell the price"),
    ],
)
def test_what_is_too_dear_is_a_gap(
    tape: Tape, cost: Any, limit: float, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape, cost=cost) as history:
        with outage(gateway, source(gateway, history, limit)) as out:
            gateway.finish()
            until(lambda: out.store.of(Gap))
        assert not history.of(RANGE), "nothing was bought"
    (gap,) = out.store.of(Gap)
    assert gap.end_ns == NOW - REACH + 5 * NS
    (line,) = warnings_of(caplog)
    assert says in line


@pytest.mark.parametrize(
    ("endpoint", "kind", "says"),
    [
        (COST, "500", "does not tell the price: 500"),
        (COST, "403", "does not tell the price: 403"),
        (COST, "hang", "Read timed out"),
        (COST, "garbage", "does not tell the price"),
        (RANGE, "500", "does not send the stretch: 500"),
        (RANGE, "403", "does not send the stretch: 403"),
        (RANGE, "422", "does not send the stretch: 422"),
        (RANGE, "hang", "Read timed out"),
        (RANGE, "garbage", "does not send the stretch"),
        (RANGE, "empty", "does not send the stretch"),
        (RANGE, "torn", "does not send the stretch: Error streaming response"),
    ],
)  # fmt: skip
def test_a_failure_is_a_gap_and_one_line(
    tape: Tape, endpoint: str, kind: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        history.fault(endpoint, kind)
        with outage(gateway, source(gateway, history, silence=0.3 if kind == "hang" else 20.0)) as out:
            gateway.finish()
            until(lambda: out.store.of(Gap))
        assert len(history.of(endpoint)) == 1, "not asked again and again"
    (gap,) = out.store.of(Gap)
    assert gap.end_ns == NOW - REACH + 5 * NS
    (line,) = warnings_of(caplog)
    assert says in line
    assert "\n" not in line
    assert KEY not in line


def test_what_came_before_the_damage_is_kept(tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        history.fault(RANGE, "damaged")
        with outage(gateway, source(gateway, history)) as out:
            gateway.finish()
            until(lambda: out.store.of(Gap))
    (line,) = warnings_of(caplog)
    assert "what it sent is cut off" in line
    (gap,) = out.store.of(Gap)
    assert (gap.start_ns > START + 100 * NS, gap.end_ns) == (True, NOW - REACH + 5 * NS)


@pytest.mark.parametrize("endpoint", [COST, RANGE])
def test_a_refused_key_ends_the_source(tape: Tape, endpoint: str) -> None:
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        history.fault(endpoint, "401")
        out = Collect()
        with Running(source(gateway, history), out) as running:
            connected(gateway)
            gateway.fault("eof", at=500, refuse=True)
            gateway.advance_to(int(tape.records["ts_event"][500]))
            until(lambda: len(out.store.states) > 1)
            gateway.advance_to(NOW)
            gateway.listen()
            error = running.ended()
    assert type(error) is AuthError
    assert "refused the API key" in str(error)
    assert "DATABENTO_API_KEY" in str(error)
    assert KEY not in str(error)


def test_a_key_that_only_the_archive_does_not_know(tape: Tape) -> None:
    with History(tape, keys=("another",)) as history:
        given = Databento(api_key=KEY, history_gateway=history.url, history_max_usd=1.0)
        with pytest.raises(AuthError, match="401 auth_authentication_failed"):
            list(DatabentoHistory(given, threading.Event())(START, NOW))


def test_a_long_fetch_is_followed_by_a_short_one() -> None:
    """While history was on its way the start became too old again: only what is missing now is asked for."""
    tape = generate(seconds=400, per_second=10)
    slow = [30 * NS]

    with Gateway(tape, replay_ns=REACH) as gateway:

        def before(endpoint: str) -> None:
            if endpoint == RANGE and slow:
                gateway.advance_to(NOW + slow.pop())

        with History(tape, before=before) as history:
            with outage(gateway, source(gateway, history)) as out:
                until(lambda: gateway.live)
                gateway.finish()
                until(lambda: out.store.total() >= total(tape))
            assert_whole(out.store, tape)
            assert not out.store.of(Gap)
            first, second = history.of(RANGE)
            assert int(second["end"]) == int(first["end"]) + 30 * NS
            assert int(second["end"]) - int(second["start"]) < 60 * NS


def test_stop_does_not_wait_for_the_archive(tape: Tape) -> None:
    stop = threading.Event()
    with History(tape) as history:
        history.fault(RANGE, "hang")
        given = Databento(api_key=KEY, symbols=SYMBOLS, history_gateway=history.url, history_max_usd=1.0)
        asked = threading.Thread(target=lambda: (until(lambda: history.of(RANGE)), stop.set()), daemon=True)
        asked.start()
        with pytest.raises(Unavailable, match="stopped before"):
            list(DatabentoHistory(given, stop)(START, NOW))
        asked.join(timeout=5)


def test_a_fetch_without_end_is_given_up(tape: Tape) -> None:
    with History(tape) as history:
        history.fault(COST, "hang")
        given = Databento(api_key=KEY, symbols=SYMBOLS, history_gateway=history.url, history_max_usd=1.0)
        with pytest.raises(Unavailable, match=r"not done within 0\.2 s"):
            list(DatabentoHistory(given, threading.Event(), whole_seconds=0.2)(START, NOW))


def test_nobody_there_is_unavailable(tape: Tape) -> None:
    with History(tape) as history:
        given = Databento(api_key=KEY, history_gateway=history.url, history_max_usd=1.0)
    with pytest.raises(Unavailable, match="does not tell the price"):
        list(DatabentoHistory(given, threading.Event())(START, NOW))


@pytest.mark.parametrize(
    ("gateway", "says"),
    [
        ("http://hist.example.com", "would show the API key"),
        ("http://10.0.0.1:80", "would show the API key"),
        ("http://", "is no address"),
        ("ftp://127.0.0.1", "is no address"),
    ],
)
def test_gateways_that_cannot_be_used(gateway: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DatabentoHistory(Databento(api_key=KEY, history_gateway=gateway), threading.Event())


@pytest.mark.parametrize("gateway", ["", "https://hist.example.com", "hist.example.com", "http://localhost:1"])
def test_gateways_that_can(gateway: str) -> None:
    DatabentoHistory(Databento(api_key=KEY, history_gateway=gateway), threading.Event())


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_the_limit_is_an_amount(value: str) -> None:
    with pytest.raises(ConfigError, match="history_max_usd must be 0"):
        load(environ={"TAPELINE_DATABENTO_HISTORY_MAX_USD": value})


@pytest.mark.parametrize("key", ["", " "])
def test_no_key_is_said_before_redis_is_waited_for(key: str) -> None:
    base = load(environ={})
    nowhere = replace(base, databento=Databento(api_key=key), redis=RedisSettings(url="redis://127.0.0.1:1/0"))
    with pytest.raises(AuthError, match="set DATABENTO_API_KEY"):
        run_databento(nowhere, threading.Event(), ())


def test_the_service_asks_the_archive(bus: Bus, tape: Tape, caplog: pytest.LogCaptureFixture) -> None:
    """A first start further back than the gateway reaches, through the real output."""
    caplog.set_level(logging.INFO)
    stop, errors = threading.Event(), list[BaseException]()
    with Gateway(tape, replay_ns=REACH) as gateway, History(tape) as history:
        gateway.advance_to(NOW)
        base = load(environ={})
        configured = replace(
            base,
            tapeline=msgspec.structs.replace(base.tapeline, namespace=bus.keys.namespace, partitions=PARTITIONS),
            redis=RedisSettings(url=bus.url),
            databento=settings(
                gateway, replay_hours=REACH / NS / 3600, start=str(START),
                history_gateway=history.url, history_max_usd=1.0,
            ),
        )  # fmt: skip

        def run() -> None:
            try:
                run_databento(configured, stop, ())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            connected(gateway, 2)
            until(lambda: errors or history.of(RANGE))
            gateway.finish()
            last = int(tape.records["ts_event"].max()) // NS
            until(lambda: errors or any(_newest(bus, p) // NS >= last for p in range(PARTITIONS)), what="the end")
        finally:
            stop.set()
            thread.join(timeout=10)
        assert not errors
        assert int(history.of(COST)[0]["start"]) <= START
    assert not warnings_of(caplog)


def _newest(bus: Bus, partition: int) -> int:
    return int(bus.call("hget", bus.keys.info(partition, "ticks"), "last_ns") or 0)
