"""Symbols of the exchanges: what they say, and what a user may write instead."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.ingest.tardis_symbols import EXCHANGES, OptionFacts, instrument_of, native_symbol
from shared.frames import NS
from shared.instruments import instrument_id, partition_of

ON = int(datetime(2024, 6, 1, tzinfo=UTC).timestamp()) * NS


def at(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}:00+00:00").timestamp()) * NS


@pytest.mark.parametrize(
    ("exchange", "symbol", "kind", "base", "expiry"),
    [
        ("binance", "BTCUSDT", "K", "BTC", None),
        ("binance", "BNBBTC", "K", "BNB", None),
        ("binance", "BNBBUSD", "K", "BNB", None),
        ("binance-us", "BNBUSD", "K", "BNB", None),
        ("binance-futures", "1000PEPEUSDT", "F", "1000PEPE", None),
        ("binance-futures", "BTCUSDT_240628", "F", "BTC", "2024-06-28T08:00"),
        ("binance-delivery", "BTCUSD_PERP", "F", "BTC", None),
        ("binance-delivery", "BTCUSD_200925", "F", "BTC", "2020-09-25T08:00"),
        ("bitmex", "XBTUSD", "F", "BTC", None),
        ("bitmex", "DOTUSD", "F", "DOT", None),
        ("bitmex", "ETHM19", "F", "ETH", "2019-06-28T12:00"),
        ("bitmex", "XBTZ24", "F", "BTC", "2024-12-27T12:00"),
        ("deribit", "BTC-PERPETUAL", "F", "BTC", None),
        ("deribit", "LINK_USDC-PERPETUAL", "F", "LINK", None),
        ("deribit", "BTC-7JUN24", "F", "BTC", "2024-06-07T08:00"),
        ("deribit", "BTC_USDC", "K", "BTC", None),
        ("deribit", "BTC-FS-30SEP22_PERP", "S", "BTC", None),
        ("deribit", "BTC-CSR12-16SEP22-21000_23000", "S", "BTC", None),
        ("ftx", "BTC-PERP", "F", "BTC", None),
        ("ftx", "BTC/USD", "K", "BTC", None),
        ("ftx", "BTC-0624", "F", "BTC", "2024-06-24T03:00"),
        ("ftx", "BTC-0331", "F", "BTC", "2025-03-31T03:00"),
        ("ftx", "BTC-20210625", "F", "BTC", "2021-06-25T03:00"),
        ("okex", "BTC-USDT", "K", "BTC", None),
        ("okex-swap", "BTC-USDT-SWAP", "F", "BTC", None),
        ("okex-futures", "BTC-USD-240628", "F", "BTC", "2024-06-28T08:00"),
        ("okex-spreads", "BTC-USD-SWAP_BTC-USD-231229", "S", "BTC", None),
        ("huobi", "BTCUSDT", "K", "BTC", None),
        ("huobi-dm", "BTC_CQ", "F", "BTC", None),
        ("huobi-dm-swap", "BTC-USD", "F", "BTC", None),
        ("bybit", "BTCPERP", "F", "BTC", None),
        ("bybit", "BTCUSDM21", "F", "BTC", "2021-06-25T08:00"),
        ("bybit", "BTC-28JUN24", "F", "BTC", "2024-06-28T08:00"),
        ("bybit-spot", "BITBTC", "K", "BIT", None),
        ("kraken", "XBT/USD", "K", "BTC", None),
        ("cryptofacilities", "PI_XBTUSD", "F", "BTC", None),
        ("cryptofacilities", "FI_XBTUSD_190426", "F", "BTC", "2019-04-26T15:00"),
        ("bitfinex-derivatives", "BTCF0:USTF0", "F", "BTC", None),
        ("upbit", "KRW-DOGE", "K", "DOGE", None),
        ("poloniex", "BTC_XMR", "K", "XMR", None),
        ("woo-x", "PERP_BTC_USDT", "F", "BTC", None),
        ("crypto-com", "APEUSD-PERP", "F", "APE", None),
        ("dydx", "WBTC-USD", "F", "WBTC", None),
        ("nobody-knows", "FOO-BAR", "K", "FOO", None),
        ("nobody-knows", "ÄÖ…", "K", "ÄÖ…", None),
    ],
)
def test_spot_perpetuals_and_futures(exchange: str, symbol: str, kind: str, base: str, expiry: str | None) -> None:
    made = instrument_of(exchange, symbol, "f", ON)
    assert (made.kind, made.root) == (kind, f"{exchange}:{base}")
    assert made.expiration_ns == (at(expiry) if expiry else None)
    assert (made.id, made.venue, made.symbol, made.feed) == (instrument_id(exchange, symbol), exchange, symbol, "f")
    assert made.ticker == f"{exchange}:{symbol}"
    assert made.strike is None


@pytest.mark.parametrize(
    ("exchange", "symbol", "base", "expiry", "strike", "kind"),
    [
        ("deribit", "BTC-28JUN24-70000-C", "BTC", "2024-06-28T08:00", 70_000, "C"),
        ("deribit", "ETH-5JUN20-310-P", "ETH", "2020-06-05T08:00", 310, "P"),
        ("deribit", "MATIC_USDC-9MAR24-1D02-C", "MATIC", "2024-03-09T08:00", 1.02, "C"),
        ("okex-options", "BTC-USD-240628-70000-P", "BTC", "2024-06-28T08:00", 70_000, "P"),
        ("binance-options", "BTC-240628-70000-C", "BTC", "2024-06-28T08:00", 70_000, "C"),
        ("binance-european-options", "DOGE-231006-0.06-C", "DOGE", "2023-10-06T08:00", 0.06, "C"),
        ("bybit-options", "SOL-28APR23-24-P", "SOL", "2023-04-28T08:00", 24, "P"),
        ("bybit-options", "SOL-28APR25-24-P-USDT", "SOL", "2025-04-28T08:00", 24, "P"),
        ("huobi-dm-options", "BTC-USDT-210625-C-87000", "BTC", "2021-06-25T08:00", 87_000, "C"),
        ("bullish", "BTC-USDC-20260425-70000-C", "BTC", "2026-04-25T08:00", 70_000, "C"),
        ("delta", "P-BTC-33000-210423", "BTC", "2023-04-21T12:00", 33_000, "P"),
    ],
)
def test_options(exchange: str, symbol: str, base: str, expiry: str, strike: float, kind: str) -> None:
    made = instrument_of(exchange, symbol, "f", ON)
    assert (made.kind, made.strike, made.expiration_ns, made.underlying) == (kind, strike, at(expiry), base)
    assert made.ticker is None
    perpetual = instrument_of(exchange, f"{base}-PERPETUAL", "f", ON)
    assert partition_of(made.root, 64) == partition_of(perpetual.root, 64)


def test_a_summary_beats_the_name() -> None:
    facts = OptionFacts("P", 5.5, at("2030-01-01T00:00"), "IDX")
    made = instrument_of("nobody-knows", "X1", "f", ON, facts)
    assert (made.kind, made.strike, made.expiration_ns, made.underlying) == ("P", 5.5, at("2030-01-01T00:00"), "IDX")
    named = instrument_of("deribit", "BTC-28JUN24-70000-C", "f", ON, OptionFacts(underlying="SYN.BTC-28JUN24"))
    assert (named.kind, named.strike, named.underlying) == ("C", 70_000, "SYN.BTC-28JUN24")


@pytest.mark.parametrize("exchange", ["deribit", "okex-options", "bybit-options", "binance-european-options"])
def test_options_of_a_base_share_a_partition_whatever_their_names(exchange: str) -> None:
    facts = OptionFacts("P", 5.5, at("2030-01-01T00:00"), "BTC-1JAN30")
    odd = instrument_of(exchange, "BTC-NEXT-5.5-P", "f", ON, facts)
    assert (odd.kind, odd.strike, odd.expiration_ns, odd.defined_ns) == ("P", 5.5, at("2030-01-01T00:00"), ON)
    even = instrument_of(exchange, "BTC-28JUN24-70000-C", "f", ON)
    future = instrument_of(exchange, "BTC-PERPETUAL", "f", ON)
    assert odd.root == even.root == future.root == f"{exchange}:BTC"
    assert even.defined_ns == ON
    assert future.defined_ns is None
    assert instrument_of(exchange, "BTC-NEXT-5.5-P", "f", ON).root == odd.root, "the same before its summary came"


def test_impossible_dates_are_no_expiries() -> None:
    for symbol in ("BTC-31FEB24-70000-C", "BTC-99XXX24"):
        assert instrument_of("deribit", symbol, "f", ON).expiration_ns is None
    assert instrument_of("okex-futures", "BTC-USD-249999", "f", ON).expiration_ns is None


@pytest.mark.parametrize(
    ("exchange", "written", "native"),
    [
        ("binance", "BTC-USDT", "BTCUSDT"),
        ("binance", "btc/usdt", "BTCUSDT"),
        ("binance", "BTCUSDT", "BTCUSDT"),
        ("binance-futures", "btc_usdt", "BTCUSDT"),
        ("binance-futures", "BTCUSDT_240628", "BTCUSDT_240628"),
        ("binance-delivery", "BTC-USD", "BTCUSD_PERP"),
        ("okex", "btc-usdt", "BTC-USDT"),
        ("okex-swap", "BTC-USDT", "BTC-USDT-SWAP"),
        ("okex-swap", "BTC-USDT-SWAP", "BTC-USDT-SWAP"),
        ("okex-options", "BTC-USD-240628-70000-C", "BTC-USD-240628-70000-C"),
        ("huobi", "btcusdt", "BTCUSDT"),
        ("huobi", "BTC-USDT", "BTCUSDT"),
        ("huobi-dm", "BTC_CQ", "BTC_CQ"),
        ("huobi-dm-swap", "BTC/USD", "BTC-USD"),
        ("huobi-dm-linear-swap", "BTC-USDT", "BTC-USDT"),
        ("bitmex", "BTC-USD", "XBTUSD"),
        ("bitmex", "ETH-USD", "ETHUSD"),
        ("bitmex", "XBTUSD", "XBTUSD"),
        ("ftx", "BTC-USD", "BTC/USD"),
        ("ftx", "BTC/USD", "BTC/USD"),
        ("ftx", "BTC-PERP", "BTC-PERP"),
        ("deribit", "BTC-USD", "BTC-PERPETUAL"),
        ("deribit", "BTC-USDC", "BTC_USDC-PERPETUAL"),
        ("deribit", "BTC_USDC", "BTC_USDC"),
        ("deribit", "BTC-PERPETUAL", "BTC-PERPETUAL"),
        ("deribit", "btc-28jun24-70000-c", "BTC-28JUN24-70000-C"),
        ("bybit", "BTC-USDT", "BTCUSDT"),
        ("bybit-spot", "BTC-USDT", "BTCUSDT"),
        ("kraken", "BTC/USD", "XBT/USD"),
        ("kraken", "AAPLx/USD", "AAPLx/USD"),
        ("kraken", "eth-usd", "ETH/USD"),
        ("coinbase", "BTC-USD", "BTC-USD"),
        ("gate-io-futures", "BTC-USDT", "BTC_USDT"),
        ("upbit", "BTC-KRW", "KRW-BTC"),
        ("upbit", "KRW-BTC", "KRW-BTC"),
        ("bitfinex", "BTC-USDT", "BTCUST"),
        ("nobody-knows", "BTC-USDT", "BTC-USDT"),
        ("polymarket", " 0xAbC ", "0xAbC"),
    ],
)
def test_what_a_user_may_write(exchange: str, written: str, native: str) -> None:
    assert native_symbol(exchange, written) == native
    assert native_symbol(exchange, native) == native


def test_the_exchanges_that_the_server_knows() -> None:
    wanted = {"binance", "binance-futures", "bitmex", "deribit", "ftx", "okex", "okex-swap", "okex-futures",
              "okex-options", "huobi", "huobi-dm", "bybit"}  # fmt: skip
    assert wanted < EXCHANGES
    assert len(EXCHANGES) > 60
