"""What can be looked at: as the bus knows it, and as the store does."""

from __future__ import annotations

import msgspec
import pytest

from services.web.instruments import Listed, listed_of, listed_of_store, matching
from shared.bus import Bus
from shared.instruments import instrument_id
from shared.messages import Instrument
from shared.settings import Settings
from shared.store_pages import Names
from tests.postgres import free_port
from tests.services.sink_sqlite.tape import EXPIRY
from tests.serving import Served, Serving
from tests.wait import until


def made(venue: str, symbol: str, root: str, **more: object) -> Instrument:
    return Instrument(instrument_id(venue, symbol), venue, symbol, root, "feed", **more)  # type: ignore[arg-type]


KNOWN = [
    made("GLBX", "ESM4", "ES", expiration_ns=EXPIRY),
    made("GLBX", "ESH4", "ES", expiration_ns=EXPIRY - 1, estimated=True),
    made("GLBX", "ESH4 C5000", "ES", kind="C", expiration_ns=EXPIRY, strike=5000.0, underlying="ESH4"),
    made("GLBX", "E1AZ6 C20000", "ES", kind="?", ticker="E1AZ6"),
    made("GLBX", "ESH4-ESM4", "ES", kind="S"),
    made("GLBX", "6EH4", "6E", expiration_ns=EXPIRY),
    made("binance", "BTCUSDT", "binance:BTC", kind="K", ticker="binance:BTCUSDT"),
    made("binance-futures", "BTCUSDT", "binance-futures:BTC", ticker="binance-futures:BTCUSDT"),
    made("deribit", "BTC-PERPETUAL", "deribit:BTC", ticker="deribit:BTC-PERPETUAL"),
    made("deribit", "BTC-29MAR24", "deribit:BTC", expiration_ns=EXPIRY, ticker="deribit:BTC-29MAR24"),
    made("deribit", "BTC-29MAR24-50000-P", "deribit:BTC", kind="P", expiration_ns=EXPIRY, strike=50000.0),
]


def names(found: list[Listed]) -> list[str]:
    return [one.name for one in found]


def test_the_bus_tells_all_that_has_candles() -> None:
    listed = listed_of(KNOWN)
    assert names(matching(listed, "", None)) == [
        "6E", "6EH4", "ES", "ESH4", "ESM4", "binance-futures:BTCUSDT", "binance:BTCUSDT",
        "deribit:BTC-29MAR24", "deribit:BTC-PERPETUAL",
    ]  # fmt: skip
    by_name = {one.name: one for one in listed}
    assert by_name["ES"] == Listed("ES", "GLBX", "ES", "continuous", "ES", "ES", True)
    assert by_name["ESM4"] == Listed("ESM4", "GLBX", "ESM4", "future", "ES", "ES", False, "2024-03-29T08:00:00Z")
    assert by_name["6E"].underlying is None
    assert by_name["deribit:BTC-PERPETUAL"] == Listed(
        "deribit:BTC-PERPETUAL", "deribit", "BTC-PERPETUAL", "perpetual", "deribit:BTC", "deribit:BTC", True
    )
    assert by_name["binance:BTCUSDT"].kind == "spot"
    options = matching(listed, "", "option")
    assert [(o.name, o.strike, o.option_type) for o in options] == [
        ("ESH4 C5000", 5000.0, "C"), ("E1AZ6 C20000", None, None), ("BTC-29MAR24-50000-P", 50000.0, "P")
    ]  # fmt: skip
    assert names(matching(listed, "", "spread")) == ["ESH4-ESM4"]


def test_one_symbol_of_two_venues_is_written_with_them() -> None:
    listed = listed_of([made("A", "ESM4", "ES"), made("B", "ESM4", "ES")])
    assert names(listed) == ["A:ES", "B:ES", "A:ESM4", "B:ESM4"]
    assert not any(one.rolling for one in listed)


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("es", ["ES", "ESH4", "ESM4", "binance-futures:BTCUSDT"]),
        ("btc-usdt", ["binance-futures:BTCUSDT", "binance:BTCUSDT"]),
        ("Binance Futures btc", ["binance-futures:BTCUSDT"]),
        ("deribit:btc-perp", ["deribit:BTC-PERPETUAL"]),
        ("h4", ["6EH4", "ESH4"]),
        ("nothing", []),
    ],
)
def test_parts_of_a_name_find_it(q: str, found: list[str]) -> None:
    assert names(matching(listed_of(KNOWN), q, None)) == found


def test_the_store_tells_its_series() -> None:
    series = [("GLBX", "ES"), ("GLBX", "ESM4"), ("GLBX", "ESM4 C5100"), ("binance", "BTCUSDT"), ("bybit", "BTCUSDT"),
              ("deribit", "BTC-PERPETUAL"), ("deribit", "BTC-29MAR24-50000-C")]  # fmt: skip
    listed = listed_of_store(Names(series, ["ES", "binance:BTCUSDT", "deribit:BTC-PERPETUAL"], ["ES", "deribit:BTC"]))
    assert {(one.name, one.kind, one.underlying, one.rolling) for one in listed} == {
        ("ES", "continuous", "ES", True), ("ESM4", "future", "ES", False),
        ("binance:BTCUSDT", "perpetual", None, True), ("bybit:BTCUSDT", "future", None, False),
        ("deribit:BTC-PERPETUAL", "perpetual", "deribit:BTC", True),
    }  # fmt: skip


def test_instruments_come_as_they_are_defined(served: Served, bus: Bus) -> None:
    bus.call("hset", bus.keys.deployment, "partitions", 1)
    assert served.get("/api/v1/instruments") == {"instruments": []}
    fields = {str(i.id): msgspec.json.encode(i) for i in KNOWN}
    bus.call("hset", bus.keys.instruments(0), mapping=fields)
    until(lambda: served.get("/api/v1/instruments?q=es")["instruments"])
    assert served.get("/api/v1/instruments?q=es&limit=1")["instruments"] == [
        {"name": "ES", "exchange": "GLBX", "symbol": "ES", "kind": "continuous", "root": "ES", "underlying": "ES",
         "rolling": True, "expiration": None, "strike": None, "option_type": None}
    ]  # fmt: skip
    more = made("GLBX", "NQM4", "NQ")
    bus.call("hset", bus.keys.instruments(0), str(more.id), msgspec.json.encode(more))
    until(lambda: served.get("/api/v1/instruments?q=nq")["instruments"])
    for bad in ("limit=0", "limit=10001", "kind=bond", "q=a&q=b", "who=me", f"q={'x' * 101}"):
        assert served.ask(f"/api/v1/instruments?{bad}").status == 400


def test_without_a_bus_the_store_tells(serving: Serving, market: str, web_settings: Settings) -> None:
    served = serving(tapeline_store=market, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    found = served.get("/api/v1/instruments")["instruments"]
    assert {"ES", "NQ", "CL"} <= {one["name"] for one in found if one["kind"] == "continuous" and one["rolling"]}
    assert {one["underlying"] for one in found} == {"ES", "NQ", "CL"}
    # What is named so can be asked for.
    for one in found:
        assert served.get(f"/api/v1/candles?symbol={one['name']}&limit=1")["rows"]
