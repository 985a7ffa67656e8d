"""The live crypto source against a real WebSocket server with faults on order."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from services.ingest.source import Grouped
from services.ingest.tardis_decode import Decoder
from services.ingest.tardis_live import TardisLive
from services.ingest.tardis_route import Router
from shared.errors import AuthError, ConfigError
from shared.frames import BOOK, LIQUIDATION, NS, OPTION, TICKER, TRADE
from shared.instruments import partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Tardis
from tests.fakes.tardis_machine import Machine, Session
from tests.services.ingest.collect import Collect, Running, Store
from tests.services.ingest.tardis_messages import (
    MS,
    T0,
    book,
    book_ticker,
    disconnect,
    error,
    liquidation,
    option,
    quote,
    ticker,
    trade,
    trades,
)
from tests.wait import until

PARTITIONS = 4
FEED = "tardis:binance-futures"


class Wall:
    """The local clock, moved by hand."""

    def __init__(self) -> None:
        self.ns = T0

    def __call__(self) -> int:
        return self.ns


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as made:
        yield made


def live(machine: Machine, *symbols: str, wall: Any = None, queue_bytes: int = 64 << 20, **changes: Any) -> TardisLive:
    basis = {"port": machine.port, "symbols": symbols or ("binance-futures:BTCUSDT",), "backoff_max_seconds": 0.02}
    if basis["symbols"][0].startswith("binance-futures"):
        basis["data_types"] = ("trade", "quote", "book_snapshot_5_1s", "derivative_ticker", "liquidation")
    settings = Tardis(**({"silence_seconds": 20.0} | basis | changes))
    exchange = settings.symbols[0].partition(":")[0]
    return TardisLive(settings, exchange, PARTITIONS, now_ns=wall or Wall(), queue_bytes=queue_bytes)


def connected(machine: Machine, market: int = 1) -> Session:
    """The living market session, when there are so many of them."""
    return until(lambda: s[0] if len(s := machine.of("trade")) == market else None, what="a session")


def total(store: Store, kind: int = TRADE) -> int:
    return sum(int((rows["kind"] == kind).sum()) for p in list(store.rows) for rows in list(store.rows[p]))


def sequences(store: Store) -> list[int]:
    found = [rows[rows["kind"] == TRADE]["sequence"] for p in store.rows for rows in store.rows[p]]
    return sorted(np.concatenate(found).tolist()) if found else []


def wanted(*numbers: int) -> list[int]:
    return [1000 + n for n in numbers]


# -- what comes through ----------------------------------------------------------------------


def test_every_type_arrives_and_options_live_with_their_underlying(machine: Machine) -> None:
    names = ["BTC-PERPETUAL", "BTC-28JUN24-70000-C"]
    at = {"exchange": "deribit", "symbol": names[0]}
    messages = [
        trade(1, **at), quote(T0, **at), book(T0, **at), ticker(T0, **at), liquidation(T0, **at),
        option(T0, names[1], 70_000), trade(2, names[1], "deribit"),
    ]  # fmt: skip
    types = (*Tardis().data_types, "book_ticker")
    source, out = live(machine, *(f"deribit:{n}" for n in names), data_types=types), Collect()
    with Running(source, out):
        connected(machine)
        until(lambda: machine.of("liquidation"))
        machine.send([*messages, book_ticker(T0, **at)])
        until(lambda: total(out.store) == 2 and total(out.store, OPTION) and total(out.store, LIQUIDATION))
        until(lambda: total(out.store, BOOK) == 1 + 5 + 1 and total(out.store, TICKER) == 1)
    market, state = sorted(machine.sessions, key=lambda s: "trade" not in s.types)
    assert market.types == {"trade", "quote", "book_snapshot_5_1s", "book_ticker"}
    assert state.types == {"derivative_ticker", "liquidation", "option_summary"}
    for session in (market, state):
        assert session.path == "/ws-stream-normalized"
        assert all(o["withDisconnectMessages"] and o["withErrorMessages"] for o in session.options)
    known = {i.symbol: i for i in out.store.of(Instrument)}
    assert known[names[1]].strike == 70_000
    assert known[names[1]].kind == "C"
    assert {i.root for i in known.values()} == {"deribit:BTC"}
    assert set(out.store.rows) == {partition_of("deribit:BTC", PARTITIONS)}
    assert not out.store.of(Gap)


@pytest.mark.parametrize(
    ("entry", "symbol"),
    [
        ("binance:BTC-USDT", "BTCUSDT"), ("okex-swap:BTC-USDT", "BTC-USDT-SWAP"), ("okex:BTC-USDT", "BTC-USDT"),
        ("bitmex:BTC-USD", "XBTUSD"), ("bybit:BTC-USDT", "BTCUSDT"), ("huobi-dm:BTC_CQ", "BTC_CQ"),
        ("deribit:BTC-USD", "BTC-PERPETUAL"), ("ftx:BTC-PERP", "BTC-PERP"),
    ],
)  # fmt: skip
def test_pairs_as_people_write_them_are_asked_as_the_exchange_does(machine: Machine, entry: str, symbol: str) -> None:
    exchange, out = entry.partition(":")[0], Collect()
    with Running(live(machine, entry, data_types=("trade",)), out):
        assert connected(machine).symbols == [symbol]
        machine.send(trades(0, 3, symbol=symbol, exchange=exchange))
        until(lambda: total(out.store) == 3)
    assert out.store.of(Instrument)[0].symbol == symbol


def test_messages_that_are_none_are_counted_and_stop_nothing(machine: Machine) -> None:
    out = Collect()
    with Running(live(machine, data_types=("trade",)), out):
        session = connected(machine)
        machine.send([b"not json", b"", b"[]", b'{"type":"trade"}', b'{"type":"novelty"}', b"\x7b"], to=[session])
        machine.send(trades(0, 5))
        until(lambda: total(out.store) == 5)
    assert out.store.counts["garbage"] == 5
    assert out.store.counts["unknown_type"] == 1
    assert len(machine.sessions) == 1


def test_messages_of_many_megabytes(machine: Machine) -> None:
    """A whole book, and 8 MB of garbage: there is no limit to a frame, and what follows is there."""
    out = Collect()
    with Running(live(machine), out):
        connected(machine)
        large = book(T0, 140_000)
        machine.send([trade(0), large, trade(1)])
        machine.send([b"x" * (8 << 20)], to=machine.of("trade"))
        machine.send(trades(2, 10))
        until(lambda: total(out.store) == 10)
    assert sequences(out.store) == wanted(*range(10))
    assert total(out.store, BOOK) == 25
    assert out.store.counts["garbage"] == 1
    assert len(machine.of("trade")) + len(machine.of("liquidation")) <= len(machine.sessions) == 2
    assert not out.store.of(Gap)


class Slow(Collect):
    """Blocks until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.blocked = threading.Event()

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        self.blocked.set()
        assert self.go.wait(20)
        super().ticks(grouped, cursor)


def test_a_slow_bus_holds_the_server_back_and_loses_nothing(machine: Machine) -> None:
    out, many = Slow(), [json.dumps(t).encode() for t in trades(1, 60_000)]
    with Running(live(machine, data_types=("trade",), queue_bytes=100_000, silence_seconds=0.5), out):
        session = connected(machine)
        machine.send(trades(0, 1))
        assert out.blocked.wait(10)
        machine.send(many, wait=False)
        # All buffers between us are full: the server cannot go on. Our silence timer must not take that for silence.
        held = [0, 0]
        until(lambda: held.append(session.sent) or held[-1] == held[-150 if len(held) > 150 else 0] > 0, 20)
        assert session.sent < 60_000
        out.go.set()
        until(lambda: total(out.store) == 60_000, 30)
    assert len(machine.sessions) == 1
    assert not out.store.of(Gap)


@pytest.mark.parametrize(
    ("name", "exchange"), [("binance-futures_2024-08-08", "binance-futures"), ("deribit_2024-06-01", "deribit")]
)
def test_recorded_streams(machine: Machine, shared_data: Path, name: str, exchange: str) -> None:
    """Real trades, in the order of the tape; the recorded disconnects and no others."""
    packed = (shared_data / "tardis" / f"{name}.ndjson.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(packed).splitlines()[:12_000]
    messages = [json.loads(line) for line in lines]
    symbols = {m["symbol"] for m in messages if "symbol" in m}
    types = {m.get("name", m["type"]) for m in messages} & {
        "trade",
        "derivative_ticker",
        "option_summary",
        "liquidation",
    }
    books = {m["name"] for m in messages if m["type"] == "book_snapshot"}
    router, want, out = (
        Router(f"tardis:{exchange}", PARTITIONS, 500 * MS, lambda e: f"tardis:{e}"),
        Collect(),
        Collect(),
    )
    decoded = Decoder(router.symbol)(lines, 0)
    decoded.ordinals[:] = 0
    router.take(decoded, want, b"")
    source = live(machine, *(f"{exchange}:{s}" for s in sorted(symbols)), data_types=(*types, *books))
    with Running(source, out):
        until(lambda: out.store.states and out.store.states[-1][0] == "connected")
        machine.send(messages)
        until(lambda: out.store.total() == want.store.total(), 20)
    for p in range(PARTITIONS):
        assert out.store.trades(p).tobytes() == want.store.trades(p).tobytes()
    assert [d.since_ns for d in out.store.of(Disconnect) if d.since_ns] == [
        d.since_ns for d in want.store.of(Disconnect)
    ]
    assert len(machine.sessions) == 2


# -- faults ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "close", "finished", "stall", "unplug"])
def test_after_a_fault_it_comes_back_and_says_what_it_missed(machine: Machine, fault: str) -> None:
    out = Collect()
    silence = 0.2 if fault == "stall" else 20.0
    with Running(live(machine, data_types=("trade", "quote"), silence_seconds=silence), out):
        session = connected(machine)
        machine.send(trades(0, 100))
        until(lambda: total(out.store) == 100)
        if fault == "drop":
            machine.drop([session])
        elif fault == "close":
            machine.close(1011, "Too many subsequent errors when connecting to  binance-futures WS API", [session])
        elif fault == "finished":
            machine.close(1000, "WS stream-normalized finished", [session])
        elif fault == "stall":
            machine.stall([session])
        else:
            machine.unplug()
        machine.send(trades(100, 110))  # lost: nobody hears it
        if fault == "unplug":
            until(lambda: "waiting" in (s[0] for s in out.store.states))
            machine.plug()
        until(lambda: len(out.store.of(Disconnect)) == 1)
        until(lambda: [s for s in machine.of("trade") if s is not session and not s.stalled])
        machine.send([quote(trade_ns(110) - MS), *trades(110, 200)])
        until(lambda: total(out.store) == 190)
    assert sequences(out.store) == wanted(*range(100), *range(110, 200))
    gone = out.store.of(Disconnect)[0]
    assert gone.since_ns == trade_ns(99)
    assert gone.symbols == ()
    gap = out.store.of(Gap)[0]
    assert (gap.feed, gap.start_ns, gap.end_ns, gap.symbols) == (FEED, trade_ns(99), trade_ns(110) - MS, ())
    assert gap.reason == gone.reason
    assert out.store.counts["reconnect"] >= 1
    assert {"connected"} < {state for state, _ in out.store.states}


def trade_ns(n: int) -> int:
    return T0 + n * 10 * MS


def test_losing_the_connection_for_state_leaves_candles_whole(machine: Machine) -> None:
    out = Collect()
    with Running(live(machine), out):
        connected(machine)
        state = until(lambda: machine.of("liquidation"))
        machine.send([*trades(0, 5), ticker(T0)])
        until(lambda: total(out.store) == 5 and total(out.store, TICKER) == 1)
        machine.send([disconnect(T0 + NS)], to=state)
        machine.drop(state)
        again = until(lambda: [s for s in machine.of("liquidation") if s not in state])
        machine.send([ticker(T0 + 2 * NS), *trades(5, 10)])
        until(lambda: total(out.store) == 10 and total(out.store, TICKER) == 2)
    assert again[0].types == state[0].types
    assert not out.store.of(Gap)
    told = out.store.of(Disconnect)
    assert len(told) == 2
    assert all(d.since_ns is None for d in told)


def test_disconnects_and_errors_that_the_server_reports(machine: Machine) -> None:
    out = Collect()
    with Running(live(machine, "binance-futures:BTCUSDT", "binance-futures:ETHUSDT"), out):
        market = [connected(machine)]
        machine.send([trade(0), trade(1, "ETHUSDT"), trade(2)], to=market)
        machine.send(
            [error(T0, "Received error message: rate limit"), disconnect(T0 + NS, symbols=["btcusdt"])], to=market
        )
        machine.send([trade(3, "ETHUSDT"), trade(4), trade(5)], to=market)
        until(lambda: total(out.store) == 6)
        machine.send([disconnect(T0 + 2 * NS), trade(6)], to=market)
        until(lambda: total(out.store) == 7)
    gaps = [(g.start_ns, g.end_ns, g.symbols) for g in out.store.of(Gap)]
    assert gaps == [(trade_ns(2), trade_ns(4), ("BTCUSDT",)), (trade_ns(5), trade_ns(6), ())]
    assert [(d.since_ns, d.symbols) for d in out.store.of(Disconnect)] == [
        (trade_ns(2), ("BTCUSDT",)), (trade_ns(5), ()),
    ]  # fmt: skip
    assert out.store.counts["error"] == 1
    assert len(machine.sessions) == 2


def test_trades_that_are_sent_again_after_a_reconnect_count_once(machine: Machine) -> None:
    out = Collect()
    with Running(live(machine, data_types=("trade",)), out):
        session = connected(machine)
        machine.send(trades(0, 50))
        until(lambda: total(out.store) == 50)
        machine.drop([session])
        until(lambda: [s for s in machine.of("trade") if s is not session])
        machine.send(trades(20, 80))
        until(lambda: total(out.store) == 80)
    assert sequences(out.store) == wanted(*range(80))
    assert out.store.counts["duplicate"] == 30
    assert [(g.start_ns, g.end_ns) for g in out.store.of(Gap)] == [(trade_ns(49), trade_ns(50))]


# -- many symbols ----------------------------------------------------------------------------


def chain(count: int) -> list[str]:
    return [f"BTC-28JUN24-{10_000 + 500 * i}-{'CP'[i % 2]}" for i in range(count)]


def test_hundreds_of_options_are_spread_over_connections(machine: Machine) -> None:
    names, out = chain(1500), Collect()
    with Running(live(machine, *(f"deribit:{n}" for n in names)), out):
        until(lambda: out.store.states and out.store.states[-1][0] == "connected")
        market, state = machine.of("trade"), machine.of("option_summary")
        for sessions in (market, state):
            assert len(sessions) > 2
            assert sorted(s for session in sessions for s in session.symbols) == sorted(names)
            assert max(s.url_bytes for s in sessions) <= 16_000
        machine.send([trade(i, n, "deribit") for i, n in enumerate(names)])
        until(lambda: total(out.store) == 1500)
        lost = market[1]
        machine.drop([lost])
        until(lambda: len(out.store.of(Disconnect)) == len(lost.symbols))
        assert {d.symbols[0] for d in out.store.of(Disconnect)} == set(lost.symbols)
        until(lambda: len(machine.of("trade")) == len(market))
        machine.send([trade(2000 + i, n, "deribit") for i, n in enumerate(names)])
        until(lambda: total(out.store) == 3000)
    assert machine.refused == 0
    assert sorted(g.symbols[0] for g in out.store.of(Gap)) == sorted(lost.symbols)


# -- time ------------------------------------------------------------------------------------


def clocks(store: Store) -> list[int]:
    return [c.watermark_ns for c in store.of(Clock) if c.watched_from_ns is None]


def test_time_goes_on_through_a_quiet_market_but_not_while_we_are_away(machine: Machine) -> None:
    out, wall = Collect(), Wall()
    with Running(live(machine, wall=wall, data_types=("trade",), grace_ms=500), out):
        session = connected(machine)
        wall.ns = T0 + 100 * MS  # the trade is 100 ms old when it comes: what follows may be, too
        machine.send(trades(0, 1))
        until(lambda: total(out.store) == 1)
        assert not clocks(out.store)
        for seconds in (10, 11, 30):
            wall.ns = T0 + seconds * NS
            at = wall.ns - 500 * MS - NS - 100 * MS
            until(lambda want=at: clocks(out.store) and clocks(out.store)[-1] == want)
        assert len(clocks(out.store)) == 3
        machine.drop([session])
        until(lambda: out.store.of(Disconnect))
        wall.ns = T0 + 60 * NS
        until(lambda: [s for s in machine.of("trade") if s is not session])
        until(lambda: out.store.states[-1][0] == "connected")
        wall.ns = T0 + 61 * NS
        machine.send([trade(1, at_ns=T0 + 60 * NS)])
        until(lambda: total(out.store) == 2)
        assert len(clocks(out.store)) == 3
        wall.ns = T0 + 90 * NS
        until(lambda: len(clocks(out.store)) == 4)
        machine.send([disconnect(T0 + 91 * NS)])
        until(lambda: len(out.store.of(Disconnect)) == 2)
        wall.ns = T0 + 120 * NS
        machine.send([trade(2, at_ns=T0 + 119 * NS)])
        until(lambda: total(out.store) == 3)
    assert clocks(out.store) == sorted(clocks(out.store))
    assert len(clocks(out.store)) == 4
    assert [(g.start_ns, g.end_ns) for g in out.store.of(Gap)] == [
        (T0, T0 + 60 * NS), (T0 + 60 * NS, T0 + 119 * NS),
    ]  # fmt: skip


def test_an_exchange_whose_clock_is_ahead_never_moves_time_back(machine: Machine) -> None:
    out, wall = Collect(), Wall()
    with Running(live(machine, wall=wall, data_types=("trade",), grace_ms=0), out):
        connected(machine)
        machine.send([trade(0, at_ns=T0 + 5 * NS)])
        until(lambda: total(out.store) == 1)
        for seconds in (2, 4, 6):  # local time less a second is behind the trade
            wall.ns = T0 + seconds * NS
        machine.send([ticker(T0)], to=machine.of("trade"))  # seen after all of them
        until(lambda: total(out.store, TICKER) == 1)
        assert not clocks(out.store)
        wall.ns = T0 + 8 * NS
        until(lambda: clocks(out.store) == [T0 + 7 * NS])


def test_a_lagging_server_is_told_once(machine: Machine) -> None:
    out, wall = Collect(), Wall()
    with Running(live(machine, wall=wall, data_types=("trade",)), out):
        connected(machine)
        for lag in (1, 6, 8, 7):
            wall.ns += NS
            n = wall.ns // NS
            machine.send([trade(n, at_ns=wall.ns - lag * NS)])
            until(lambda s=lag: total(out.store) == (1, 6, 8, 7).index(s) + 1)
        assert out.store.counts["lagging"] == 1
        assert "lags by 6.0 s" in [text for state, text in out.store.states if state == "connected"][-1]
        machine.send([trade(1, at_ns=wall.ns)])
        until(lambda: "lags" not in out.store.states[-1][1])


# -- what cannot work ------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_waited_for(machine: Machine) -> None:
    machine.unplug()
    out = Collect()
    with Running(live(machine, data_types=("trade",)), out):
        until(lambda: out.store.counts["reconnect"] > 2)
        state, text = out.store.states[-1]
        assert state == "waiting"
        assert f"127.0.0.1:{machine.port} is not there" in text
        machine.plug()
        connected(machine)
        machine.send(trades(0, 3))
        until(lambda: total(out.store) == 3)
        assert out.store.states[-1][0] == "connected"
    assert not out.store.of(Gap)


def test_what_the_server_cannot_make_is_left_out(machine: Machine) -> None:
    """Spot has no funding: it goes on with what there is."""
    out = Collect()
    types = (*Tardis().data_types, "book_ticker")
    with Running(live(machine, "binance:BTCUSDT", data_types=types), out):
        until(lambda: sum(s.over and "trade" not in s.types for s in machine.sessions) == 3)
        machine.send(trades(0, 3, exchange="binance"))
        until(lambda: total(out.store) == 3)
    asked = [sorted(s.types) for s in machine.sessions if "trade" not in s.types]
    assert asked == [
        ["derivative_ticker", "liquidation", "option_summary"], ["liquidation", "option_summary"], ["option_summary"],
    ]  # fmt: skip
    assert sum("trade" in s.types for s in machine.sessions) == 1


def test_an_exchange_the_server_does_not_know(machine: Machine) -> None:
    with Running(live(machine, "phemex:BTCUSD"), Collect()) as running:
        failure = running.ended()
    assert isinstance(failure, ConfigError)
    assert "does not know phemex (normalizeTrades: phemex not supported); check tardis.symbols" in str(failure)


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [(404, ConfigError, "set tardis.port to its WebSocket port"), (401, AuthError, "wants credentials")],
)
def test_a_server_that_is_none_of_ours(machine: Machine, status: int, kind: type, text: str) -> None:
    machine.status = status
    with Running(live(machine), Collect()) as running:
        failure = running.ended()
    assert type(failure) is kind
    assert text in str(failure)


def test_a_server_that_is_overloaded_is_asked_again(machine: Machine) -> None:
    machine.status = 503
    out = Collect()
    with Running(live(machine, data_types=("trade",)), out):
        until(lambda: machine.refused > 2)
        assert out.store.states[-1] == ("waiting", f"tardis-machine at 127.0.0.1:{machine.port} answers 503")
        machine.status = None
        connected(machine)


def test_a_data_type_that_the_server_calls_invalid(machine: Machine) -> None:
    with Running(live(machine, data_types=("trade", "book_snapshot_x_1s")), Collect()) as running:
        failure = running.ended()
    assert isinstance(failure, ConfigError)
    assert "invalid depth: x, data type: book_snapshot_x_1s; check" in str(failure)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"symbols": ("binance",)}, "'binance' is not exchange:symbol"),
        ({"symbols": ("binance:",)}, "'binance:' is not exchange:symbol"),
        ({"symbols": ("binance:BTCUSDT", "binnace:ETHUSDT")}, "'binnace:ETHUSDT': no exchange 'binnace'"),
        ({"symbols": ("okex:BTC-USDT",)}, "tardis.symbols has no symbol of binance"),
        ({"data_types": ("trade", "trades")}, "there is no 'trades'"),
        ({"data_types": ("liquidation",)}, "add trade"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TardisLive(Tardis(**({"symbols": ("binance:BTCUSDT",)} | changes)), "binance", 1)
