"""Normalized messages to rows: every type, every absence, every kind of garbage."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.tardis_decode import EVENT, Decoded, Decoder
from services.ingest.tardis_symbols import OptionFacts
from services.ingest.tardis_text import sequences, times
from shared.frames import BOOK, LIQUIDATION, NS, OPTION, TICKER, TRADE
from tests.services.ingest.ndjson import MS, T0, disconnect, lines, message, random_tape, trade


class Symbols:
    """Indexes by order of appearance."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], int] = {}
        self.facts: list[OptionFacts] = []

    def __call__(self, exchange: str, symbol: str, on_ns: int, option: OptionFacts | None) -> int:
        assert on_ns > 0
        if option is not None:
            self.facts.append(option)
        return self.known.setdefault((exchange, symbol), len(self.known))


def decode(*messages: Any, symbols: Symbols | None = None) -> Decoded:
    return Decoder(symbols or Symbols())(lines(list(messages)), 0)


def row(made: Decoded, at: int = 0) -> dict[str, Any]:
    assert made.counts == {}
    return {name: made.rows[at][name].item() for name in made.rows.dtype.names or ()}


def same(got: dict[str, Any], **wanted: Any) -> None:
    for name, value in wanted.items():
        assert got[name] == value or (np.isnan(value) and np.isnan(got[name])), (name, got[name], value)


NAN = float("nan")


def test_trade() -> None:
    made = row(decode(trade("binance", "BTCUSDT", 5, 2**32 + 7, price=61800.3, amount=0.006, side="sell")))
    same(made, kind=TRADE, ts_event_ns=T0 + 5 * MS, ts_recv_ns=T0 + 15 * MS, price=61800.3, size=0.006, side=-1,
         sequence=7, bid_px=NAN, ask_px=NAN, bid_sz=0, ask_sz=0, part=0, flags=0)  # fmt: skip
    same(row(decode(trade("bitmex", "XBTUSD", 5, "a-b", side="buy"))), side=1, sequence=crc32(b"a-b"))
    same(row(decode(trade("x", "y", 5, side="unknown", id=None))), side=0, sequence=0)
    same(row(decode(trade("x", "y", 5, id=12))), sequence=12)


def test_liquidation() -> None:
    made = row(decode(message("liquidation", "deribit", "X", 1, price=5, amount=610, side="buy")))
    same(made, kind=LIQUIDATION, price=5, size=610, side=1, sequence=0)


def test_ticker() -> None:
    made = row(decode(message(
        "derivative_ticker", "deribit", "X", 1, lastPrice=1.5, openInterest=2, markPrice=3, indexPrice=4,
        fundingRate=1e-6, predictedFundingRate=2e-6, fundingTimestamp="2024-06-01T08:00:00.000Z",
    )))  # fmt: skip
    same(made, kind=TICKER, price=1.5, size=2, bid_px=3, ask_px=4, bid_sz=1e-6, ask_sz=2e-6,
         sequence=T0 // NS + 8 * 3600)  # fmt: skip
    bare = row(decode(message("derivative_ticker", "deribit", "X", 1, lastPrice=None)))
    same(bare, price=NAN, size=NAN, bid_px=NAN, ask_px=NAN, bid_sz=NAN, ask_sz=NAN, sequence=0)


def test_quotes_in_every_form() -> None:
    flat = message("book_ticker", "d", "X", 1, bidPrice=1, bidAmount=2, askPrice=3, askAmount=4)
    deep = {"bids": [{"price": 1, "amount": 2}], "asks": [{"price": 3, "amount": 4}]}
    forms = [flat, flat | {"type": "quote"}, message("quote", "d", "X", 1, **deep),
             message("book_snapshot", "d", "X", 1, depth=1, name="quote", **deep)]  # fmt: skip
    for form in forms:
        made = decode(form)
        assert len(made.rows) == 1
        same(row(made), kind=BOOK, bid_px=1, bid_sz=2, ask_px=3, ask_sz=4, size=1, price=NAN)
    same(row(decode(message("book_ticker", "d", "X", 1, bidPrice=1))), bid_px=1, bid_sz=NAN, ask_px=NAN, ask_sz=0)


def levels(count: int, price: float, step: float) -> list[dict[str, float]]:
    return [{"price": price + i * step, "amount": i + 1.0} for i in range(count)]


@pytest.mark.parametrize("depth", [2, 5, 25, 40])
def test_book(depth: int) -> None:
    sides = {"bids": levels(depth, 100, -1), "asks": levels(depth, 101, 1)}
    sides["asks"][0]["amount"] = 7
    made = decode(message("book_snapshot", "d", "X", 1, depth=depth, **sides), trade("d", "X", 2))
    kept = min(depth, 25)
    rows = made.rows[:kept]
    assert made.rows["part"].tolist() == [*range(kept), 0]
    assert made.ordinals.tolist() == [0] * kept + [1]
    assert rows["bid_px"].tolist() == [100 - i for i in range(kept)]
    assert rows["ask_sz"].tolist() == [7.0, *(i + 1.0 for i in range(1, kept))]
    bid = sum(range(1, min(depth, 5) + 1))
    assert rows["price"][0] == pytest.approx((bid - (bid + 6)) / (2 * bid + 6))
    assert rows["size"][0] == depth
    assert (rows["ts_event_ns"] == T0 + MS).all()


def test_shallow_and_empty_books() -> None:
    shallow = message("book_snapshot", "d", "X", 1, depth=3, bids=[{"price": 1, "amount": 2}, {}, {}], asks=[{}, {}])
    made = decode(shallow, message("book_snapshot", "d", "X", 1, depth=5, bids=[], asks=[]))
    assert made.rows["part"].tolist() == [0, 1, 2, 0]
    assert np.isnan(made.rows["bid_px"][1:]).all()
    assert np.isnan(made.rows["ask_px"]).all()
    assert made.rows["bid_sz"].tolist() == [2, 0, 0, 0]
    assert made.rows["price"][0] == 1
    assert np.isnan(made.rows["price"][3])
    assert made.rows["size"].tolist() == [3, 0, 0, 5]


def option(exchange: str, **more: Any) -> dict[str, Any]:
    return message("option_summary", exchange, "BTC-28JUN24-70000-C", 1, **more)


FULL = {
    "optionType": "call", "strikePrice": 70000, "expirationDate": "2024-06-28T08:00:00.000Z", "bestBidPrice": 1,
    "bestBidAmount": 2, "bestBidIV": 54, "bestAskPrice": 3, "bestAskAmount": 4, "bestAskIV": 56, "lastPrice": 5,
    "openInterest": 6, "markPrice": 7, "markIV": 55, "delta": 0.4, "gamma": 0.5, "vega": 0.6, "theta": -0.7,
    "rho": 0.8, "underlyingPrice": 67000, "underlyingIndex": "BTC-28JUN24",
}  # fmt: skip


def test_option_summary() -> None:
    symbols = Symbols()
    made = decode(option("deribit", **FULL), option("deribit", **FULL), symbols=symbols)
    assert made.rows["part"].tolist() == [0, 1, 2] * 2
    assert made.ordinals.tolist() == [0, 0, 0, 1, 1, 1]
    assert (made.rows["kind"] == OPTION).all()
    same(row(made, 0), price=5, size=6, bid_px=1, bid_sz=2, ask_px=3, ask_sz=4)
    same(row(made, 1), price=7, size=67000, bid_px=54, ask_px=56, bid_sz=55, ask_sz=0.4)
    same(row(made, 2), price=0.5, size=0.6, bid_px=-0.7, ask_px=0.8, bid_sz=NAN, ask_sz=NAN)
    assert symbols.facts == [OptionFacts("C", 70_000, 1_719_561_600 * NS, "BTC-28JUN24")]
    bare = decode(option("deribit"))
    assert np.isnan(bare.rows["size"]).all()


def test_implied_volatility_is_in_percent() -> None:
    made = decode(option("okex-options", bestBidIV=0.54, markIV=0.55, delta=0.4))
    same(row(made, 1), bid_px=54, bid_sz=pytest.approx(55), ask_px=NAN, ask_sz=0.4)


# -- times and ids -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9_200_000_000 * NS), st.integers(0, 9))
def test_times_are_exact(ns: int, digits: int) -> None:
    ns -= ns % 10 ** (9 - digits)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=ns // NS)
    text = f"{moment:%Y-%m-%dT%H:%M:%S}" + (f".{ns % NS:09d}"[: digits + 1] if digits else "")
    assert times([text + "Z", text + "+00:00"]).tolist() == [ns, ns]


@pytest.mark.parametrize(
    "text",
    ["", "Z", "2024-06-01", "2024-06-01T00:00:00", "2024-13-01T00:00:00Z", "2023-02-29T00:00:00Z",
     "2024-06-31T00:00:00Z", "2024-06-01T24:00:00Z", "2024-06-01T00:60:00Z", "2024-06-01 00:00:00Z",
     "2024-06-01T00:00:00.Z", "2024-06-01T00:00:00.0123456789Z", "2024-06-01T00:00:00+02:00", "1969-12-31T23:59:59Z",
     "2024-06-01T00:00:0éZ", "2024-06-01T00:\n0:00Z", "99999-06-01T00:00:00Z", "yesterday, in the afternoon Z"],
)  # fmt: skip
def test_what_is_no_time(text: str) -> None:
    good = "2024-06-01T00:00:00Z"
    assert times([good, text, good]).tolist() == [T0, -1, T0]


@given(st.lists(st.one_of(st.none(), st.integers(0, 2**70), st.text(max_size=40).filter(lambda t: "\n" not in t))))
@settings(deadline=None)
def test_sequences(ids: list[Any]) -> None:
    def wanted(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) & 0xFFFFFFFF:
            return int(text) & 0xFFFFFFFF
        return crc32(text.encode("utf-8", "replace"))

    assert sequences(ids).tolist() == [0 if i in (None, "") else wanted(str(i)) for i in ids]


# -- what is skipped ---------------------------------------------------------------------------


def test_skipped_and_garbage_lines_are_counted_by_reason() -> None:
    good = trade("binance", "BTCUSDT", 1)
    absent = [{k: v for k, v in good.items() if k != name} for name in ("symbol", "price", "timestamp", "exchange")]
    bad = [good | {"timestamp": "soon"}, good | {"localTimestamp": "2024-06-01"}, good | {"price": None},
           good | {"amount": "2"}, disconnect("binance", 1) | {"localTimestamp": "?"}]  # fmt: skip
    raw = [b"", b"[]", b"{", b"nonsense", b"\xff\xfe", b'{"type":5}', b"null", b'{"type":"trade"}{"type":"trade"}',
           b'{"a":1', b',"b":2}']  # fmt: skip
    rest = [{"type": "brand_new"}, {"type": "book_change"}, {"type": "book_change"}, {"type": "trade_bar"}]
    made = decode(good, *absent, *bad, *raw, *rest, good)
    assert made.counts == {
        "garbage": len(absent) + len(bad) + len(raw), "unknown_type": 1, "book_change": 2, "trade_bar": 1,
    }  # fmt: skip
    assert made.ordinals.tolist() == [0, 1 + len(absent) + len(bad) + len(raw) + len(rest)]


def test_a_bad_time_within_records_of_several_rows() -> None:
    sides = {"bids": levels(3, 10, -1), "asks": levels(3, 11, 1)}
    books = [message("book_snapshot", "d", "X", at, depth=3, **sides) for at in range(4)]
    books[0]["timestamp"] = books[2]["localTimestamp"] = "?"
    made = decode(*books)
    assert made.counts == {"garbage": 2}
    assert made.ordinals.tolist() == [1, 1, 1, 3, 3, 3]
    assert made.rows["bid_px"].tolist() == [10, 9, 8] * 2


def test_disconnects_and_errors_keep_their_place() -> None:
    error = {"type": "error", "exchange": "d", "details": "x", "localTimestamp": "?", "subSequentErrorsCount": 1}
    made = decode(trade("d", "X", 1), disconnect("d", 2, "x", "y"), trade("d", "X", 3), error, disconnect("e", 9))
    assert made.rows["kind"].tolist() == [TRADE, EVENT, TRADE, EVENT, EVENT]
    events = [made.events[i] for i in made.rows["instrument"][made.rows["kind"] == EVENT]]
    assert [(e.kind, e.exchange, e.at_ns, e.symbols, e.details) for e in events] == [
        ("disconnect", "d", T0 + 2 * MS, ("x", "y"), ""), ("error", "d", 0, (), "x"),
        ("disconnect", "e", T0 + 9 * MS, (), ""),
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50))
def test_any_cut_gives_the_same_rows(seed: int, block: int) -> None:
    tape = lines(random_tape(seed, 100))
    symbols = Symbols()
    whole, decoder = Decoder(symbols)(tape, 0), Decoder(symbols)
    pieces = [decoder(tape[at : at + block], at) for at in range(0, len(tape), block)]
    rows = np.concatenate([p.rows for p in pieces])
    keep = rows["kind"] != EVENT  # these number the events of their piece
    assert rows[keep].tobytes() == whole.rows[keep].tobytes()
    assert np.concatenate([p.ordinals for p in pieces]).tolist() == whole.ordinals.tolist()
    assert [e for p in pieces for e in p.events] == whole.events


def test_values_are_those_of_the_json() -> None:
    texts = ["0.1", "1e-9", "123456789.123456789", "5e-324", "9007199254740993", "-37014.5", "12"]
    made = Decoder(Symbols())(
        [json.dumps(trade("d", "X", 1, n + 1)).replace("100.5", text).encode() for n, text in enumerate(texts)], 0
    )
    assert made.rows["price"].tolist() == [float(text) for text in texts]
