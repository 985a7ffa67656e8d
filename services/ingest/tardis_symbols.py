"""Names of instruments at the exchanges: what a symbol says about its contract, and what a user may write for it.

Symbols are as the vendor's server emits them (upper case nearly everywhere, whatever the exchange itself does).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shared.frames import NS
from shared.instruments import MONTH_CODES, instrument_id
from shared.messages import Instrument


def _ids(names: str) -> frozenset[str]:
    return frozenset(names.split())


SPOT = _ids(
    "aster binance binance-us binance-jersey binance-dex bitfinex bitflyer bitget bitstamp blockchain-com bullish "
    "bybit-spot coinbase crypto-com ftx-us gate-io gemini hitbtc huobi kraken kucoin mexc okcoin okex poloniex serum "
    "star-atlas upbit"
)
OPTIONS = _ids("binance-european-options binance-options bybit-options huobi-dm-options okex-options")
DERIVATIVES = _ids(
    "aster-futures binance-delivery binance-futures bitfinex-derivatives bitget-futures bitmex bitnomial bybit "
    "coinbase-international coinflex crypto-com-derivatives cryptofacilities delta deribit dydx dydx-v4 ftx "
    "gate-io-futures huobi-dm huobi-dm-linear-swap huobi-dm-swap hyperliquid kucoin-futures lighter mango mexc-futures "
    "okex-futures okex-swap phemex"
)
# Every id that the server knows or knew.
EXCHANGES = SPOT | OPTIONS | DERIVATIVES | {"ascendex", "okex-spreads", "polymarket", "woo-x"}
# Exchanges that give implied volatility in percent; all others give fractions.
IV_IN_PERCENT = frozenset({"deribit"})
# Their names are numbers, or mean something else in another case.
CASED = frozenset({"hyperliquid", "kraken", "lighter", "polymarket", "star-atlas"})

_QUOTES = (
    "FDUSD", "USDT", "USDC", "BUSD", "TUSD", "RLUSD", "USDD", "USDE", "GUSD", "AUSD", "DAI", "PAX", "UST",
    "USD", "EUR", "GBP", "JPY", "KRW", "TRY", "BRL", "AUD", "CAD", "CHF", "BTC", "ETH", "BNB", "XBT",
)  # fmt: skip
# Quotes that may as well be the last letter of a base and USD (BNB-USD, DOT-USD), where they are quotes.
_LETTER_USD = {
    "BUSD": _ids("binance binance-futures binance-jersey"),
    "TUSD": _ids("binance"),
    "GUSD": _ids("gemini"),
    "AUSD": _ids("bullish"),
}
_PAIR = re.compile(rf"^([A-Za-z0-9]+)[-/_]({'|'.join(_QUOTES)})$", re.IGNORECASE)
# How an exchange writes the pair {b}ase and {q}uote of its main contract; a missing one keeps what the user wrote.
_STYLES = {
    "{b}{q}": "aster aster-futures binance binance-futures binance-jersey binance-us bitfinex bitget bitget-futures "
              "bitmex bitstamp bullish bybit bybit-spot delta gemini hitbtc huobi mexc phemex",
    "{b}-{q}": "blockchain-com coinbase dydx dydx-v4 huobi-dm-linear-swap huobi-dm-swap kucoin okcoin okex",
    "{b}_{q}": "bitflyer binance-dex crypto-com gate-io gate-io-futures mexc-futures poloniex",
    "{b}/{q}": "ascendex ftx ftx-us kraken serum star-atlas",
    "{b}-{q}-SWAP": "okex-swap",
    "{b}{q}_PERP": "binance-delivery",
    "{b}{q}-PERP": "crypto-com-derivatives",
    "{b}-{q}-SWAP-LIN": "coinflex",
    "{b}-PERP": "coinbase-international mango",
    "PERP_{b}_{q}": "woo-x",
    "PF_{b}{q}": "cryptofacilities",
    "{b}{q}M": "kucoin-futures",
    "{b}F0:{q}F0": "bitfinex-derivatives",
    "{q}-{b}": "upbit",
    "{b}": "hyperliquid",
}  # fmt: skip
_STYLE = {exchange: style for style, names in _STYLES.items() for exchange in names.split()}
_XBT = frozenset({"bitmex", "cryptofacilities", "kraken", "kucoin-futures"})

_DATE = r"(?P<date>\d{1,2}[A-Z]{3}\d{2}|\d{8}|\d{6})"
_BASE = r"(?P<base>[A-Z0-9]+)(?:[-_][A-Z]{3,5})?"
_OPTION_FORMS = (
    re.compile(rf"^{_BASE}-{_DATE}-(?P<strike>\d+(?:[.D]\d+)?)-(?P<kind>[CP])(?:-[A-Z]+)?$"),
    re.compile(rf"^{_BASE}-{_DATE}-(?P<kind>[CP])-(?P<strike>\d+(?:\.\d+)?)$"),
)
_OPTION_DMY = re.compile(r"^(?P<kind>[CP])-(?P<base>[A-Z0-9]+)-(?P<strike>\d+(?:\.\d+)?)-(?P<date>\d{6})$")
_DATED = re.compile(rf"^(?P<stem>.+)[-_]{_DATE}$")
_MONTH_DAY = re.compile(r"^(?P<stem>.+)-(?P<month>\d\d)(?P<day>\d\d)$")
_MONTH_CODE = re.compile(rf"^(?P<stem>[A-Z0-9]+?)(?P<month>[{MONTH_CODES}])(?P<year>\d\d?)$")
_PERPETUAL = re.compile(r"PERP|SWAP|^FX_|F0:")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_PREFIX = re.compile(r"^(?:P[IFV]|F[IF]|SPOT|PERP|FX)_")
_CODED = frozenset({"bitmex", "bybit", "bitget-futures", "bitnomial"})  # dated futures have a month code
# UTC hour of expiry; 8 elsewhere.
_EXPIRY_HOUR = {"bitmex": 12, "ftx": 3, "cryptofacilities": 15, "delta": 12}
# Option amounts are in the base currency.
_UNIT_OPTIONS = frozenset({"binance-european-options", "binance-options", "bybit-options", "deribit"})


@dataclass(frozen=True, slots=True)
class OptionFacts:
    """What an option summary says of its contract; None where it does not."""

    kind: str | None = None  # C or P
    strike: float | None = None
    expiration_ns: int | None = None
    underlying: str | None = None


@dataclass(slots=True)
class _Contract:
    kind: str
    base: str
    expiration_ns: int | None = None
    estimated: bool = False
    strike: float | None = None


def instrument_of(exchange: str, symbol: str, feed: str, on_ns: int, summary: OptionFacts | None = None) -> Instrument:
    """The contract behind a symbol as traded at `on_ns` (it decides years and decades that a name leaves out).

    Any name gives an instrument: one that follows no known rule is its own base. `summary` beats the name, but in
    the root: that is the name's alone, or a contract's rows would change partition when its summary comes.
    `on_ns` is when an option was defined.
    """
    found = _contract(exchange, symbol.upper(), on_ns)
    if summary is not None and summary.kind is not None:
        found.kind = summary.kind
    option = found.kind in "CP"
    if option and summary is not None:
        found.strike = summary.strike if summary.strike is not None else found.strike
        if summary.expiration_ns is not None:
            found.expiration_ns, found.estimated = summary.expiration_ns, False
    named = summary.underlying if summary is not None else None
    return Instrument(
        id=instrument_id(exchange, symbol),
        venue=exchange,
        symbol=symbol,
        root=f"{exchange}:{found.base}",
        feed=feed,
        kind=found.kind,
        expiration_ns=found.expiration_ns,
        estimated=found.estimated,
        strike=found.strike,
        underlying=(named or found.base) if option else None,
        multiplier=1.0 if option and exchange in _UNIT_OPTIONS else None,
        defined_ns=on_ns if option else None,
        ticker=None if option else f"{exchange}:{symbol}",
    )


def native_symbol(exchange: str, text: str) -> str:
    """What the exchange calls what a user wrote: `BTC-USDT`, `BTC/USDT`, `btcusdt` or the exchange's own name.

    A pair means the main contract of the exchange: spot where it is a spot exchange, else the perpetual.
    """
    text = text.strip()
    name = text if exchange in CASED else text.upper()
    if exchange == "deribit":
        return _deribit(name)
    pair = _PAIR.match(name)
    style = _STYLE.get(exchange)
    if pair is None or style is None:
        return name
    base, quote = pair[1].upper() if pair[1].islower() else pair[1], pair[2].upper()
    if (
        exchange == "upbit"
        and base in (markets := ("KRW", "USDT", "BTC"))
        and markets.index(base) < (markets.index(quote) if quote in markets else len(markets))
    ):
        return name  # its own style: the market first
    if exchange in _XBT:
        base = "XBT" if base == "BTC" else base
    if exchange.startswith("bitfinex") and quote == "USDT":
        quote = "UST"
    return style.format(b=base, q=quote)


def _deribit(name: str) -> str:
    """Inverse perpetuals are named by the base alone; `BTC_USDC` is spot there."""
    if name.endswith("-PERP"):
        return f"{name}ETUAL"
    pair = _PAIR.match(name)
    if pair is None or "_" in name:
        return name
    return f"{pair[1]}-PERPETUAL" if pair[2] == "USD" else f"{pair[1]}_{pair[2]}-PERPETUAL"


def _contract(exchange: str, name: str, on_ns: int) -> _Contract:
    option = _option(exchange, name)
    if option is not None:
        return option
    if exchange in SPOT and not _PERPETUAL.search(name) and not (exchange == "bullish" and _DATED.match(name)):
        return _Contract("K", _base(exchange, name))
    if _spread(exchange, name):
        return _Contract("S", _base(exchange, name))
    dated = _dated(exchange, name, on_ns)
    if dated is not None:
        return dated
    return _Contract("F" if _is_future(exchange, name) else "K", _base(exchange, name))


def _spread(exchange: str, name: str) -> bool:
    """Combinations of contracts; options have been found before."""
    return exchange == "okex-spreads" or "-SPR-" in name or (exchange == "deribit" and name.count("-") > 1)


def _is_future(exchange: str, name: str) -> bool:
    if name.startswith("SPOT_") or (exchange in ("ftx", "ascendex") and "/" in name):
        return False
    if exchange == "deribit":
        return "-" in name
    return bool(_PERPETUAL.search(name)) or exchange in DERIVATIVES


def _option(exchange: str, name: str) -> _Contract | None:
    forms = (_OPTION_DMY,) if exchange == "delta" else _OPTION_FORMS
    for form in forms:
        match = form.match(name)
        if match is not None:
            at = _day(match["date"], day_first=form is _OPTION_DMY)
            if at is not None:
                strike = float(match["strike"].replace("D", "."))
                return _Contract(match["kind"], _plain(match["base"]), _expiry(exchange, at), strike=strike)
    return None


def _dated(exchange: str, name: str, on_ns: int) -> _Contract | None:
    """A future with a delivery date or month in its name."""
    match = _DATED.match(name)
    if match is not None and (at := _day(match["date"])) is not None:
        return _Contract("F", _base(exchange, match["stem"]), _expiry(exchange, at))
    if exchange in ("ftx", "ftx-us") and (match := _MONTH_DAY.match(name)) is not None:
        on = datetime.fromtimestamp(on_ns // NS, UTC)
        for year in (on.year, on.year + 1):
            at = _date(year, int(match["month"]), int(match["day"]))
            if at is not None and at + timedelta(days=1) >= on:
                return _Contract("F", _base(exchange, match["stem"]), _expiry(exchange, at))
    if exchange in _CODED and (match := _MONTH_CODE.match(name)) is not None:
        digits = match["year"]
        span = 10 ** len(digits)
        first = datetime.fromtimestamp(on_ns // NS, UTC).year - (1 if span == 10 else 50)
        at = _last_friday(first + (int(digits) - first) % span, MONTH_CODES.index(match["month"]) + 1)
        return _Contract("F", _base(exchange, match["stem"]), _expiry(exchange, at), estimated=True)
    return None


def _base(exchange: str, name: str) -> str:
    name = _PREFIX.sub("", name)
    parts = re.split(r"[-/_:]", name)
    base = parts[-1] if _quote_first(exchange, parts) else parts[0]
    if exchange == "bitfinex-derivatives":
        base = base.removesuffix("F0")
    if exchange == "kucoin-futures":
        base = base.removesuffix("M")
    base = base.removesuffix("PERP") or base
    if base.startswith("XBT"):
        return "BTC"
    if len(parts) == 1 or parts[1] not in _QUOTES:  # a joined pair: BTCUSDT, BTCUSDT_240628, BTCUSD-PERP
        for quote in _QUOTES:
            known = exchange in _LETTER_USD.get(quote, EXCHANGES) and (len(parts) == 1 or "USD" in quote)
            if known and base.endswith(quote) and base != quote:
                base = base.removesuffix(quote)
                break
    return base or name or "?"


def _quote_first(exchange: str, parts: list[str]) -> bool:
    if exchange == "poloniex" and len(parts) > 1:
        return parts[0] in ("USDT", "USDC") or (parts[0] == "BTC" and "USD" not in parts[1])
    return exchange == "upbit"


def _plain(base: str) -> str:
    return "BTC" if base == "XBT" else base


def _day(text: str, day_first: bool = False) -> datetime | None:
    """28JUN24, 240628, 20240628 or (day first) 280624."""
    if text.isdigit():
        if day_first:
            text = text[4:] + text[2:4] + text[:2]
        year = int(text[:-4]) + (2000 if len(text) == 6 else 0)
        return _date(year, int(text[-4:-2]), int(text[-2:]))
    month = text[-5:-2]
    return _date(2000 + int(text[-2:]), _MONTHS.index(month) + 1, int(text[:-5])) if month in _MONTHS else None


def _date(year: int, month: int, day: int) -> datetime | None:
    try:
        return datetime(year, month, day, tzinfo=UTC)
    except ValueError:
        return None


def _last_friday(year: int, month: int) -> datetime:
    last = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC) - timedelta(days=1)
    return last - timedelta(days=(last.weekday() - 4) % 7)


def _expiry(exchange: str, day: datetime) -> int:
    return int(day.timestamp()) * NS + _EXPIRY_HOUR.get(exchange, 8) * 3600 * NS
