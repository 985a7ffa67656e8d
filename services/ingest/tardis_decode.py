"""Normalized JSON messages to tick rows: typed decoding, then columns.

Whole blocks are decoded at once; only a block with something strange in it is looked at line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from services.ingest.tardis_symbols import IV_IN_PERCENT, OptionFacts
from services.ingest.tardis_text import sequences, times
from shared.frames import BOOK, LIQUIDATION, NS, OPTION, TICK, TICKER, TRADE, Rows

EVENT = 255  # kind of a row that stands for a disconnect or error record: `instrument` is its place in `events`
LEVELS = 25  # of a book that are kept
SIDES = {"buy": 1, "sell": -1}
KINDS = {"call": "C", "put": "P"}
NAN = float("nan")

Symbol = Callable[[str, str, int, OptionFacts | None], int]
Number = float | None


class _Message(msgspec.Struct, gc=False, tag_field="type"):
    """A message; what is absent or null is None."""


class _Of(_Message, gc=False):
    """Of a symbol."""

    symbol: str
    exchange: str
    timestamp: str
    localTimestamp: str  # noqa: N815


class _Trade(_Of, gc=False, tag="trade"):
    price: float
    amount: float
    side: str = ""
    id: str | int | None = None


class _Liquidation(_Of, gc=False, tag="liquidation"):
    price: float
    amount: float
    side: str = ""
    id: str | int | None = None


class _Level(msgspec.Struct, gc=False):
    price: Number = None
    amount: Number = None


class _Book(_Of, gc=False, tag="book_snapshot"):
    bids: list[_Level]
    asks: list[_Level]
    depth: int | None = None


class _BookTicker(_Of, gc=False, tag="book_ticker"):
    bidPrice: Number = None  # noqa: N815
    bidAmount: Number = None  # noqa: N815
    askPrice: Number = None  # noqa: N815
    askAmount: Number = None  # noqa: N815


class _Quote(_Of, gc=False, tag="quote"):
    """A book of depth 1, in either of the two forms."""

    bids: list[_Level] = []
    asks: list[_Level] = []
    bidPrice: Number = None  # noqa: N815
    bidAmount: Number = None  # noqa: N815
    askPrice: Number = None  # noqa: N815
    askAmount: Number = None  # noqa: N815


class _Ticker(_Of, gc=False, tag="derivative_ticker"):
    lastPrice: Number = None  # noqa: N815
    openInterest: Number = None  # noqa: N815
    markPrice: Number = None  # noqa: N815
    indexPrice: Number = None  # noqa: N815
    fundingRate: Number = None  # noqa: N815
    predictedFundingRate: Number = None  # noqa: N815
    fundingTimestamp: str | None = None  # noqa: N815


class _Option(_Of, gc=False, tag="option_summary"):
    optionType: str | None = None  # noqa: N815
    strikePrice: Number = None  # noqa: N815
    expirationDate: str | None = None  # noqa: N815
    underlyingIndex: str | None = None  # noqa: N815
    bestBidPrice: Number = None  # noqa: N815
    bestBidAmount: Number = None  # noqa: N815
    bestBidIV: Number = None  # noqa: N815
    bestAskPrice: Number = None  # noqa: N815
    bestAskAmount: Number = None  # noqa: N815
    bestAskIV: Number = None  # noqa: N815
    lastPrice: Number = None  # noqa: N815
    openInterest: Number = None  # noqa: N815
    markPrice: Number = None  # noqa: N815
    markIV: Number = None  # noqa: N815
    delta: Number = None
    gamma: Number = None
    vega: Number = None
    theta: Number = None
    rho: Number = None
    underlyingPrice: Number = None  # noqa: N815


class _BookChange(_Message, gc=False, tag="book_change"):
    pass


class _TradeBar(_Message, gc=False, tag="trade_bar"):
    pass


class _Disconnect(_Message, gc=False, tag="disconnect"):
    exchange: str
    localTimestamp: str  # noqa: N815
    symbols: list[str] | None = None


class _Error(_Message, gc=False, tag="error"):
    exchange: str = ""
    localTimestamp: str = ""  # noqa: N815
    details: str = ""


_Any = (
    _Trade | _Liquidation | _Book | _BookTicker | _Quote | _Ticker | _Option
    | _BookChange | _TradeBar | _Disconnect | _Error
)  # fmt: skip
_SKIPPED = {_BookChange: "book_change", _TradeBar: "trade_bar"}
_KNOWN = {t.__struct_config__.tag for t in _Any.__args__}


class _Head(msgspec.Struct):
    type: str


_any = msgspec.json.Decoder(_Any)
_head = msgspec.json.Decoder(_Head)


@dataclass(slots=True)
class Event:
    """A disconnect or error record of the tape; `symbols` empty: the whole exchange."""

    kind: str  # disconnect or error
    exchange: str
    at_ns: int
    symbols: tuple[str, ...] = ()
    details: str = ""


@dataclass(slots=True)
class Decoded:
    """TICK rows in tape order, `instrument` the index that `symbol` gave, and the tape position behind each row.

    An Event has a row of kind EVENT at its place.
    """

    rows: Rows
    ordinals: NDArray[np.int64]
    events: list[Event] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # what was skipped, by reason


class Decoder:
    """`Decoder(router.symbol)`; give what it returns to `router.take`."""

    def __init__(self, symbol: Symbol) -> None:
        self._symbol = symbol
        self._index: dict[tuple[str, str], int] = {}
        self._options: set[tuple[str, str]] = set()

    def __call__(self, lines: Sequence[bytes], first_ordinal: int) -> Decoded:
        """Lines (one JSON message each) at tape positions first_ordinal, first_ordinal + 1, …"""
        counts: dict[str, int] = {}
        messages = _decode(lines, counts)
        groups: dict[type, tuple[list[int], list[Any]]] = {}
        for i, message in enumerate(messages):
            group = groups.get(type(message))
            if group is None:
                group = groups[type(message)] = ([], [])
            group[0].append(i)
            group[1].append(message)
        groups.pop(type(None), None)
        for skipped, reason in _SKIPPED.items():
            if skipped in groups:
                counts[reason] = len(groups.pop(skipped)[0])
        width = np.zeros(len(messages) + 1, np.int64)
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], Rows]] = []
        events: list[Event] = []
        for kind, (at, some) in groups.items():
            rows, widths = _events(some, events) if kind in (_Disconnect, _Error) else self._rows(kind, some)
            places = np.array(at, np.int64)
            bad = rows["ts_recv_ns"] < 0
            if bad.any():
                counts["garbage"] = counts.get("garbage", 0) + int(bad[rows["part"] == 0].sum())
                first = np.cumsum(widths) - widths
                widths = np.where(bad[first], 0, widths)
                rows = rows[~bad]
            width[places + 1] = widths
            parts.append((places, widths, rows))
        starts = np.cumsum(width)
        whole = np.empty(int(starts[-1]), TICK)
        ordinals = np.repeat(np.arange(first_ordinal, first_ordinal + len(messages)), width[1:])
        for places, widths, rows in parts:
            whole[np.repeat(starts[places], widths) + rows["part"]] = rows
        return Decoded(whole, ordinals, events, counts)

    def _rows(self, kind: type, some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
        """Rows of messages of one kind, and how many each has. Those without sound times have ts_recv_ns -1."""
        event = times([m.timestamp for m in some])
        receipt = times([m.localTimestamp for m in some])
        keys = [(m.exchange, m.symbol) for m in some]
        if kind is _Option:
            self._learn_options(keys, some, event)
        try:
            index = [self._index[key] for key in keys]
        except KeyError:
            for key, at in zip(keys, event.tolist(), strict=True):
                if key not in self._index and at >= 0:
                    self._index[key] = self._symbol(*key, at, None)
            index = [self._index.get(key, -1) for key in keys]
        rows, widths = _MAKERS[kind](some)
        spread = np.repeat(np.arange(len(some)), widths)
        receipt[event < 0] = -1
        rows["ts_event_ns"], rows["ts_recv_ns"] = event[spread], receipt[spread]
        rows["instrument"] = np.array(index, np.int64)[spread]
        return rows, widths

    def _learn_options(self, keys: list[tuple[str, str]], some: list[_Option], event: NDArray[np.int64]) -> None:
        """The first summary of an option tells what its name may not."""
        for key, m, at in zip(keys, some, event.tolist(), strict=True):
            if key not in self._options and at >= 0:
                self._options.add(key)
                expiry = int(times([m.expirationDate or ""])[0])
                facts = OptionFacts(
                    KINDS.get(m.optionType or ""), m.strikePrice, expiry if expiry >= 0 else None, m.underlyingIndex
                )
                self._index[key] = self._symbol(*key, at, facts)


def _decode(lines: Sequence[bytes], counts: dict[str, int]) -> list[Any]:
    """The message of each line; None (and counted) for a line that is none."""
    try:
        messages = _any.decode_lines(b"\n".join(lines))
        if len(messages) == len(lines):
            return messages
    except msgspec.MsgspecError:
        pass
    out: list[Any] = []
    for line in lines:
        try:
            out.append(_any.decode(line))
        except msgspec.MsgspecError:
            out.append(None)
            reason = _why(line)
            counts[reason] = counts.get(reason, 0) + 1
    return out


def _why(line: bytes) -> str:
    try:
        return "garbage" if _head.decode(line).type in _KNOWN else "unknown_type"
    except msgspec.MsgspecError:
        return "garbage"


def _events(some: list[Any], events: list[Event]) -> tuple[Rows, NDArray[np.int64]]:
    """Rows that stand for disconnects and errors; a disconnect without a time has ts_recv_ns -1."""
    rows = _blank(len(some), EVENT)
    at = times([m.localTimestamp for m in some])
    for i, (m, at_ns) in enumerate(zip(some, at.tolist(), strict=True)):
        rows["instrument"][i] = len(events)
        if isinstance(m, _Disconnect):
            events.append(Event("disconnect", m.exchange, at_ns, tuple(m.symbols or ())))
        else:
            at[i] = max(at_ns, 0)
            events.append(Event("error", m.exchange, max(at_ns, 0), details=m.details))
    rows["ts_event_ns"] = rows["ts_recv_ns"] = at
    return rows, np.ones(len(some), np.int64)


# -- rows of each kind; times and instrument are filled in by the caller ---------------------------------


def _blank(count: int, kind: int) -> Rows:
    rows = np.zeros(count, TICK)
    rows["kind"] = kind
    for name in ("price", "bid_px", "ask_px"):
        rows[name] = NAN
    return rows


def _column(some: list[Any], name: str) -> NDArray[np.float64]:
    """None is NaN."""
    return np.array(list(map(attrgetter(name), some)), np.float64)


def _trades(some: list[Any], kind: int = TRADE) -> tuple[Rows, NDArray[np.int64]]:
    rows = _blank(len(some), kind)
    rows["price"], rows["size"] = _column(some, "price"), _column(some, "amount")
    rows["side"] = [SIDES.get(m.side, 0) for m in some]
    rows["sequence"] = sequences([m.id for m in some])
    return rows, np.ones(len(some), np.int64)


def _liquidations(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    return _trades(some, LIQUIDATION)


def _tickers(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    rows = _blank(len(some), TICKER)
    rows["price"], rows["size"] = _column(some, "lastPrice"), _column(some, "openInterest")
    rows["bid_px"], rows["ask_px"] = _column(some, "markPrice"), _column(some, "indexPrice")
    rows["bid_sz"], rows["ask_sz"] = _column(some, "fundingRate"), _column(some, "predictedFundingRate")
    rows["sequence"] = np.maximum(times([m.fundingTimestamp or "" for m in some]), 0) // NS & 0xFFFFFFFF
    return rows, np.ones(len(some), np.int64)


def _options(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    rows = _blank(3 * len(some), OPTION)
    iv = np.array([1.0 if m.exchange in IV_IN_PERCENT else 100.0 for m in some])
    for part, columns in enumerate(_OPTION_PARTS):
        rows["part"][part::3] = part
        for column in ("price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz"):
            name = columns.get(column)
            values: Any = NAN if name is None else _column(some, name)
            rows[column][part::3] = values * iv if name is not None and name.endswith("IV") else values
    return rows, np.full(len(some), 3, np.int64)


_OPTION_PARTS = (
    {"price": "lastPrice", "size": "openInterest", "bid_px": "bestBidPrice", "bid_sz": "bestBidAmount",
     "ask_px": "bestAskPrice", "ask_sz": "bestAskAmount"},
    {"price": "markPrice", "size": "underlyingPrice", "bid_px": "bestBidIV", "ask_px": "bestAskIV",
     "bid_sz": "markIV", "ask_sz": "delta"},
    {"price": "gamma", "size": "vega", "bid_px": "theta", "ask_px": "rho"},
)  # fmt: skip


def _quotes(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    rows = _blank(len(some), BOOK)
    rows["size"] = 1
    for side in ("bid", "ask"):
        price, size = _column(some, f"{side}Price"), _column(some, f"{side}Amount")
        rows[f"{side}_px"], rows[f"{side}_sz"] = price, np.where(np.isnan(price), 0.0, size)
    return rows, np.ones(len(some), np.int64)


def _any_quotes(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    for m in some:
        if m.bids:
            m.bidPrice, m.bidAmount = m.bids[0].price, m.bids[0].amount
        if m.asks:
            m.askPrice, m.askAmount = m.asks[0].price, m.asks[0].amount
    return _quotes(some)


def _books(some: list[Any]) -> tuple[Rows, NDArray[np.int64]]:
    deep = {side: np.array([len(getattr(m, f"{side}s")) for m in some], np.int64) for side in ("bid", "ask")}
    most = np.maximum(deep["bid"], deep["ask"])
    widths = np.clip(most, 1, LEVELS)
    depth = np.array([NAN if m.depth is None else m.depth for m in some])
    depth = np.where(np.isnan(depth), np.maximum(most, 1), depth)
    first = np.cumsum(widths) - widths
    rows = _blank(int(widths.sum()), BOOK)
    rows["part"] = np.arange(len(rows)) - np.repeat(first, widths)
    sums = {}
    for side, count in deep.items():
        levels = list(chain.from_iterable(getattr(m, f"{side}s") for m in some))
        book = np.repeat(np.arange(len(some)), count)
        level = np.arange(len(levels)) - np.repeat(np.cumsum(count) - count, count)
        price, size = _column(levels, "price"), _column(levels, "amount")
        size = np.where(np.isnan(price), 0.0, size)
        kept = level < LEVELS
        at = first[book[kept]] + level[kept]
        rows[f"{side}_px"][at], rows[f"{side}_sz"][at] = price[kept], size[kept]
        best = level < 5
        sums[side] = np.bincount(book[best], np.nan_to_num(size[best]), len(some))
    whole = sums["bid"] + sums["ask"]
    known = (depth > 1) & (whole > 0)
    rows["size"][first] = depth
    rows["price"][first] = np.where(known, (sums["bid"] - sums["ask"]) / np.where(known, whole, 1.0), NAN)
    return rows, widths


_MAKERS: dict[type, Callable[[list[Any]], tuple[Rows, NDArray[np.int64]]]] = {
    _Trade: _trades, _Liquidation: _liquidations, _Book: _books, _BookTicker: _quotes, _Quote: _any_quotes,
    _Ticker: _tickers, _Option: _options,
}  # fmt: skip
