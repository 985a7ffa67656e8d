"""What is asked of a tardis-machine server, and what its refusals mean: no socket here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from services.ingest.tardis_symbols import EXCHANGES, native_symbol
from shared.errors import AuthError, ConfigError, TapelineError

LIVE, REPLAY = "/ws-stream-normalized", "/ws-replay-normalized"
# The server refuses headers over 20,000 bytes; proxies are often stricter than that.
URL_BYTES = 16_000
# What the server calls the part of it that makes a data type.
_MAKERS = {
    "normalizeTrades": ("trade",),
    "normalizeBookChanges": ("book_snapshot_", "quote"),
    "normalizeBookTickers": ("book_ticker",),
    "normalizeDerivativeTickers": ("derivative_ticker",),
    "normalizeLiquidations": ("liquidation",),
    "normalizeOptionsSummary": ("option_summary",),
}
_MARKET = re.compile(r"trade|quote(_\w+)?|book_ticker|book_snapshot_\w+")
_STATE = ("derivative_ticker", "liquidation", "option_summary")
_UNSUPPORTED = re.compile(r"(normalize\w+): (\S+) not supported")
_BAD_OPTIONS = re.compile(r"[Ii]nvalid |SyntaxError|not supported|without any normalizers|There is no such")
_STATUS = re.compile(r"status code: (\d{3})")


@dataclass(frozen=True, slots=True)
class Request:
    """One connection. `market`: it carries trades and books, whose loss makes candles incomplete.

    `options` as the server takes them, one for each exchange. `whole`: no other connection carries
    data of this kind, so that losing it loses all symbols.
    """

    options: tuple[dict[str, Any], ...]
    market: bool = True
    whole: bool = True
    path: str = LIVE

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols of it."""
        return tuple(s for option in self.options for s in option["symbols"])

    @property
    def types(self) -> tuple[str, ...]:
        """All data types of it."""
        return tuple(dict.fromkeys(t for option in self.options for t in option["dataTypes"]))

    def target(self) -> str:
        """Path and query, encoded."""
        options = self.options[0] if len(self.options) == 1 else list(self.options)
        return f"{self.path}?options={quote(json.dumps(options, separators=(',', ':')), safe=',:')}"

    def without(self, types: Iterable[str]) -> Request | None:
        """The same with less; None when nothing is left."""
        left = [t for t in self.types if t not in set(types)]
        options = tuple(option | {"dataTypes": left} for option in self.options)
        return Request(options, self.market, self.whole, self.path) if left else None


def symbols_of(entries: Sequence[str], where: str = "tardis.symbols") -> dict[str, tuple[str, ...]]:
    """Symbols by exchange, as the exchange writes them, from `exchange:symbol` entries.

    Raises ConfigError naming the entry that is none, or whose exchange no server knows.
    """
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        exchange, _, text = (part.strip() for part in entry.partition(":"))
        if not exchange or not text:
            raise ConfigError(f"{where}: '{entry}' is not exchange:symbol, such as binance-futures:BTCUSDT")
        if exchange not in EXCHANGES:
            raise ConfigError(
                f"{where}: '{entry}': no exchange '{exchange}'; there are: {', '.join(sorted(EXCHANGES))}"
            )
        found.setdefault(exchange, {})[native_symbol(exchange, text)] = None
    return {exchange: tuple(symbols) for exchange, symbols in found.items()}


def live_requests(
    exchange: str, symbols: Sequence[str], data_types: Sequence[str], silence_seconds: float, url_bytes: int = URL_BYTES
) -> list[Request]:
    """The connections that follow an exchange: trades and books apart from slow state, no URL too long.

    The server is told to renew a silent connection of its own before our silence timer gives up on it.
    Raises ConfigError for a data type that is none of ours, and when there are no trades among them.
    """
    unknown = [t for t in data_types if not _MARKET.fullmatch(t) and t not in _STATE]
    if unknown:
        there = "trade, quote, book_ticker, book_snapshot_5_1s (or of another depth and interval)"
        raise ConfigError(f"tardis.data_types: there is no '{unknown[0]}'; there are: {there}, {', '.join(_STATE)}")
    market = [t for t in data_types if _MARKET.fullmatch(t)]
    if not market:
        raise ConfigError("tardis.data_types holds neither trades nor books: no time passes without them; add trade")
    requests = []
    for types, is_market in ((market, True), ([t for t in data_types if t in _STATE], False)):
        if types:
            patience = silence_seconds * (1 if is_market else STATE_PATIENCE)
            basis = {
                "exchange": exchange,
                "dataTypes": types,
                "withDisconnectMessages": True,
                "withErrorMessages": True,
                "timeoutIntervalMS": int(patience * 1000 * 2 / 3),
            }
            shards = _shards(basis, symbols, url_bytes)
            requests += [Request((basis | {"symbols": s},), is_market, len(shards) == 1) for s in shards]
    return requests


# How much longer state may be silent than trades and books.
STATE_PATIENCE = 10


def _shards(basis: dict[str, Any], symbols: Sequence[str], url_bytes: int) -> list[list[str]]:
    """As few equal parts as keep each URL under its limit."""
    empty = len(Request((basis | {"symbols": []},)).target())
    sizes = [len(quote(json.dumps(s), safe=",:")) + 1 for s in symbols]
    parts = max(1, -(-sum(sizes) // max(1, url_bytes - empty)))
    while True:
        step = -(-len(symbols) // parts)
        cuts = range(0, len(symbols), step)
        if step == 1 or all(empty + sum(sizes[at : at + step]) <= url_bytes for at in cuts):
            return [list(symbols[at : at + step]) for at in cuts]
        parts += 1


def unsupported(text: str, types: Sequence[str]) -> tuple[str, ...]:
    """Which of these data types the server cannot make, by its own words."""
    match = _UNSUPPORTED.search(text)
    makes = _MAKERS.get(match[1], ()) if match else ()
    return tuple(t for t in types if t.startswith(makes)) if makes else ()


def refusal(text: str, where: str) -> TapelineError | None:
    """The error that a text of the server stands for when trying again cannot help, else None."""
    status = _STATUS.search(text)
    if status is not None:
        code = int(status[1])
        if code in (401, 403):
            return AuthError(f"{where}: {text}; give the server (not Tapeline) a Tardis key for this data: TM_API_KEY")
        if code in (400, 404, 422):
            return ConfigError(f"{where}: {text}; check exchange, symbols, data types and interval")
        return None
    if _BAD_OPTIONS.search(text):
        return ConfigError(
            f"{where}: {text}; check exchange, symbols and data types (tardis.symbols, tardis.data_types)"
        )
    return None


def refused_upgrade(status: int, where: str) -> TapelineError | None:
    """What an HTTP status instead of a WebSocket means: an error where trying again cannot help, else None."""
    if status in (401, 403):
        return AuthError(f"{where} answers {status}: it (or a proxy before it) wants credentials; check tardis.host")
    if 400 <= status < 500 and status not in (408, 425, 429):
        return ConfigError(
            f"{where} answers {status} and no WebSocket: set tardis.port to its WebSocket port (HTTP port + 1)"
        )
    return None
