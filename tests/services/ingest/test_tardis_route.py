"""The router alone: partitions, clocks, repeated trades, outages; what a later process recalls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from services.ingest import tardis_recent
from services.ingest.tardis_recent import Recent
from services.ingest.tardis_route import Router
from services.ingest.tardis_symbols import OptionFacts
from shared.frames import BOOK, CLOCK, NS, TICK, TICKER, TRADE
from shared.instruments import feed_id, instrument_id, partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument
from tests.services.ingest.ndjson import MS, T0, Tapes

PARTITIONS = 8
GRACE = 500 * MS
# Symbols of different partitions.
ONE, TWO = ("binance", "BTCUSDT"), ("binance", "SOLUSDT")
assert partition_of("binance:BTC", PARTITIONS) != partition_of("binance:SOL", PARTITIONS)


class Tape:
    """A router with its output; `push` numbers the records."""

    def __init__(self, **more: Any) -> None:
        self.router = Router("p", PARTITIONS, GRACE, **more)
        self.out = Tapes()
        self.at = 0

    def push(self, *rows: tuple[tuple[str, str], int, int, int]) -> None:
        """(exchange and symbol, ms since T0, sequence, kind) each."""
        made = np.zeros(len(rows), TICK)
        for i, (name, at, sequence, kind) in enumerate(rows):
            made[i]["instrument"] = self.router.symbol(*name, T0)
            made[i]["ts_event_ns"], made[i]["sequence"], made[i]["kind"] = T0 + at * MS, sequence, kind
        self.router.push(made, np.arange(self.at, self.at + len(rows)), self.out, b"")
        self.at += len(rows)

    def rows(self, name: tuple[str, str]) -> Any:
        instrument = self.router.instrument(self.router.symbol(*name, T0))
        return self.out.joined()[partition_of(instrument.root, PARTITIONS)]


def test_clocks_go_where_the_row_does_not() -> None:
    tape = Tape()
    tape.push((ONE, 0, 1, TRADE), (TWO, 100, 2, TRADE), (ONE, 1600, 3, BOOK), (ONE, 1700, 4, TRADE),
              (ONE, 9000, 0, TICKER), (TWO, 1400, 5, TRADE), (TWO, 2500, 6, TRADE))  # fmt: skip
    one, two = tape.rows(ONE), tape.rows(TWO)
    assert one["kind"].tolist() == [TRADE, BOOK, TRADE, TICKER, CLOCK]
    assert two["kind"].tolist() == [TRADE, CLOCK, TRADE, TRADE]
    assert (two["ts_event_ns"][1], two["instrument"][1]) == (T0 + NS, feed_id("p:binance"))
    assert one["ts_event_ns"][-1] == T0 + 2 * NS  # exactly the grace behind the newest trade
    assert np.isnan(two["price"][1])


def test_feeds_have_names_and_times_of_their_own() -> None:
    tape = Tape(feed_of=lambda exchange: f"tardis:{exchange}")
    tape.push((ONE, 5000, 1, TRADE), (("deribit", "BTC-PERPETUAL"), 0, 1, TRADE), (ONE, 5100, 2, TRADE))
    clocks = tape.out.messages(Clock)
    assert [(c.feed, c.watched_from_ns) for c in clocks] == [
        ("tardis:binance", T0 + 5 * NS), ("tardis:deribit", T0),
    ]  # fmt: skip
    assert tape.router.newest_ns("deribit") == T0
    assert tape.router.newest_ns("bitmex") == 0
    tape.push((TWO, 5200, 3, TRADE))  # a new partition must hear of both
    assert [c.feed for c in tape.out.messages(Clock)[2:]] == ["tardis:binance", "tardis:deribit"]
    tape.push((TWO, 5300, 4, TRADE))
    assert len(tape.out.messages(Clock)) == 4


def test_rows_without_a_sane_time_and_spreads_are_counted() -> None:
    tape = Tape()
    made = np.zeros(4, TICK)
    made["instrument"] = tape.router.symbol(*ONE, T0)
    made["instrument"][3] = tape.router.symbol("deribit", "BTC-FS-30SEP22_PERP", T0)
    made["ts_recv_ns"] = T0
    made["ts_event_ns"] = [T0, 0, T0 + 3601 * NS, T0]
    tape.router.push(made, np.arange(4), tape.out, b"")
    assert tape.out.counts == {"bad_time": 2, "spread": 1}
    assert len(tape.rows(ONE)) == 1
    assert [m.symbol for m in tape.out.messages(Instrument)] == ["BTCUSDT"]
    assert tape.router.newest_ns("binance") == T0
    assert [c.feed for c in tape.out.messages(Clock)] == ["p:binance"]


def test_an_option_is_announced_again_when_more_is_known() -> None:
    tape = Tape()
    name = ("nobody-knows", "X-1")
    tape.push((name, 0, 1, TRADE))
    tape.router.symbol(*name, T0, OptionFacts("C", 5.0, T0 + NS, "X"))
    tape.push((name, 1, 2, TRADE))
    tape.router.symbol(*name, T0, OptionFacts("C", 5.0, T0 + NS, "X"))
    tape.push((name, 2, 3, TRADE))
    first, second = tape.out.messages(Instrument)
    assert (first.kind, second.kind, second.strike, first.id) == ("K", "C", 5.0, second.id)


# -- repeated trades ---------------------------------------------------------------------------


def trades(sequence: Any, symbol: int = 0, **more: Any) -> Any:
    rows = np.zeros(len(sequence), TICK)
    rows["sequence"], rows["instrument"] = sequence, symbol
    for name, value in more.items():
        rows[name] = value
    return rows


def test_the_latest_trades_of_each_symbol_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tardis_recent, "LATEST", 64)
    recent = Recent()
    rng = np.random.default_rng(1)
    seen: dict[int, list[int]] = {}
    for _ in range(300):
        size = int(rng.integers(1, 40))
        sequence, symbol = rng.integers(1, 120, size), rng.integers(0, 2, size) * 2
        fresh = recent.fresh(trades(sequence, symbol))
        for s, at, new in zip(symbol.tolist(), sequence.tolist(), fresh.tolist(), strict=True):
            latest = seen.setdefault(s, [])
            if at in latest[-64:]:
                assert not new
            if at not in latest[-128:]:
                assert new
            if new:
                latest.append(at)
    assert len(seen) == 2


def test_a_trade_is_its_id_price_size_and_side() -> None:
    recent = Recent()
    base = trades([7], price=1.0, size=2.0, side=1)
    assert recent.fresh(base).all()
    assert not recent.fresh(trades([7], price=1.0, size=2.0, side=1, ts_event_ns=5)).any()
    for other in ({"price": 1.5}, {"size": 3.0}, {"side": -1}):
        assert recent.fresh(trades([7], **({"price": 1.0, "size": 2.0, "side": 1} | other))).all()
    assert recent.fresh(trades([7], 1, price=1.0, size=2.0, side=1)).all()
    assert recent.fresh(trades([0, 0], price=1.0)).all()  # without an id nothing is known
    assert recent.fresh(trades([7, 7], price=1.0, size=2.0, side=1, kind=BOOK)).all()


def test_many_trades_at_once_and_again() -> None:
    recent = Recent()
    rows = trades(np.arange(1, 50_001))
    assert recent.fresh(rows).all()
    assert not recent.fresh(rows[-tardis_recent.LATEST :]).any()
    assert recent.fresh(rows[: tardis_recent.LATEST]).all()  # long forgotten


def test_a_repeated_trade_moves_no_time_and_ends_no_outage() -> None:
    tape = Tape()
    tape.push((ONE, 0, 1, TRADE))
    tape.router.disconnect("binance", (), T0, "lost", tape.out)
    tape.push((ONE, 60_000, 1, TRADE))
    assert tape.out.counts == {"disconnect": 1, "duplicate": 1}
    assert not tape.out.messages(Gap)
    tape.push((ONE, 70_000, 2, TRADE))
    (gap,) = tape.out.messages(Gap)
    assert (gap.start_ns, gap.end_ns, gap.reason) == (T0, T0 + 70 * NS, "lost")


# -- outages -----------------------------------------------------------------------------------


def test_an_outage_of_all_ends_with_the_first_of_any() -> None:
    tape = Tape()
    tape.push((ONE, 0, 1, TRADE), (TWO, 500, 1, TRADE), (("deribit", "X"), 0, 1, TRADE))
    tape.router.disconnect("binance", (), T0 + 2 * NS, "down", tape.out)
    tape.router.disconnect("binance", (), T0 + 3 * NS, "down", tape.out)  # still the same outage
    tape.push((("deribit", "X"), 1000, 2, TRADE), (ONE, 1500, 0, TICKER))
    assert not tape.out.messages(Gap)
    tape.push((ONE, 100, 5, TRADE), (TWO, 2000, 6, TRADE))
    (gap,), (told,) = tape.out.messages(Gap), tape.out.messages(Disconnect)
    assert (told.at_ns, told.since_ns, told.symbols) == (T0 + 2 * NS, T0 + 500 * MS, ())
    assert (gap.start_ns, gap.end_ns, gap.symbols) == (T0 + 500 * MS, T0 + 500 * MS + 1, ())  # came with an older time


def test_before_the_first_row_there_is_nothing_to_miss() -> None:
    tape = Tape()
    tape.router.disconnect("binance", (), T0, "down", tape.out)
    tape.push((ONE, 0, 1, TRADE))
    tape.router.disconnect("binance", ("solusdt",), T0, "down", tape.out)  # not on the bus yet
    assert not tape.out.messages(Disconnect)
    tape.push((TWO, 5000, 1, TRADE))
    (gap,) = tape.out.messages(Gap)
    assert (gap.start_ns, gap.end_ns, gap.symbols) == (T0, T0 + 5 * NS, ("SOLUSDT",))


def test_a_tape_ends_with_the_gaps_that_are_open() -> None:
    tape = Tape()
    tape.push((ONE, 0, 1, TRADE), (TWO, 0, 1, TRADE), (("deribit", "X"), 7, 1, TRADE))
    tape.router.disconnect("binance", ("BTCUSDT", "unheard"), T0, "down", tape.out)
    tape.push((TWO, 4000, 2, TRADE))
    tape.router.finish(tape.out, {"deribit": T0 + 60 * NS})
    (gap,) = tape.out.messages(Gap)
    assert (gap.start_ns, gap.end_ns, gap.symbols) == (T0, T0 + 4 * NS, ("BTCUSDT",))
    final = [(c.feed, c.watermark_ns) for c in tape.out.messages(Clock) if c.final]
    assert final == [("p:binance", T0 + 4 * NS), ("p:deribit", T0 + 60 * NS)]


# -- a later process ---------------------------------------------------------------------------


def test_a_later_process_recalls_what_is_on_the_bus() -> None:
    before = Tape()
    before.push((ONE, 0, 1, TRADE), (TWO, 900, 2, TRADE), (ONE, 1600, 3, TRADE))
    after = Tape()
    published = np.concatenate([before.rows(ONE), before.rows(TWO)])
    after.router.recall(before.out.messages(Instrument), published)
    assert after.router.newest_ns("binance") == T0 + 1600 * MS
    after.push((ONE, 1600, 3, TRADE), (TWO, 1650, 4, TRADE), (ONE, 2600, 5, TRADE))
    assert after.out.counts == {"duplicate": 1}
    assert after.rows(ONE)["kind"].tolist() == [TRADE]
    two = after.rows(TWO)
    assert two["kind"].tolist() == [TRADE, CLOCK]  # its second was told before; the next one is new
    assert two["instrument"][0] == instrument_id(*TWO)
    assert [c.watched_from_ns for c in after.out.messages(Clock)] == [T0 + 1650 * MS]
    assert {m.symbol for m in after.out.messages(Instrument)} == {"BTCUSDT", "SOLUSDT"}


def test_more_symbols_and_exchanges_than_at_first() -> None:
    tape = Tape()
    names = [(f"exchange{n % 20}", f"C{n}USDT") for n in range(300)]
    tape.push(*[(name, n, 1, TRADE) for n, name in enumerate(names)])
    rows = np.concatenate(list(tape.out.joined(TRADE).values()))
    assert {(i, t) for i, t in zip(rows["instrument"].tolist(), rows["ts_event_ns"].tolist(), strict=True)} == {
        (instrument_id(*name), T0 + n * MS) for n, name in enumerate(names)
    }
    assert len({c.feed for c in tape.out.messages(Clock)}) == 20


def test_a_summary_defines_an_option_whose_name_says_nothing() -> None:
    tape, name = Tape(), ("deribit", "BTC-NEXT-5.5-P")
    tape.push((name, 0, 1, TRADE))
    facts = OptionFacts("P", 5.5, T0 + 30 * 86_400 * NS, "BTC-1JUL24")
    for later in range(3):
        tape.router.symbol(*name, T0 + later * NS, facts)
    tape.push((name, 10, 2, TRADE), (name, 20, 3, TRADE))
    assert [(i.root, i.kind, i.strike) for i in tape.out.messages(Instrument)] == [("deribit:BTC", "P", 5.5)]
    assert tape.out.counts == {"spread": 1}, "until then its name says that it is a combination"
    assert tape.rows(name)["sequence"].tolist() == [2, 3]
