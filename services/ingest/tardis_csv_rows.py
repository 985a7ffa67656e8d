"""Tardis CSV text to tick rows, column by column: the very rows that the same normalized message makes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.ingest.tardis_decode import KINDS, SIDES, Symbol
from services.ingest.tardis_symbols import IV_IN_PERCENT, OptionFacts
from services.ingest.tardis_text import sequences
from shared.errors import ConfigError, SourceError
from shared.frames import BOOK, LIQUIDATION, OPTION, TICK, TICKER, TRADE, Rows

# In the order that decides ties of receipt: a trade stands before the book that it changed.
TYPES = (
    "trades", "liquidations", "quotes", "book_snapshot_5", "book_snapshot_25", "derivative_ticker", "options_chain",
)  # fmt: skip
NEEDS_POLARS = "CSV files of Tardis need polars: pip install 'tapeline[history]'"
NAN = float("nan")
US = 1000  # ns
MAX_US = (1 << 63) // US - 1
BEST = 5  # levels of a book that its imbalance is of

_COMMON = ("exchange", "symbol", "timestamp", "local_timestamp")
_TEXT = frozenset({"exchange", "symbol", "id", "side", "type", "underlying_index"})
_TIMES = frozenset({"timestamp", "local_timestamp", "funding_timestamp", "expiration"})
_TRADE = ("id", "side", "price", "amount")
_QUOTE = ("ask_amount", "ask_price", "bid_price", "bid_amount")
_TICKER = (
    "funding_timestamp", "funding_rate", "predicted_funding_rate", "open_interest", "last_price", "index_price",
    "mark_price",
)  # fmt: skip
_OPTION = (
    "type", "strike_price", "expiration", "open_interest", "last_price", "bid_price", "bid_amount", "bid_iv",
    "ask_price", "ask_amount", "ask_iv", "mark_price", "mark_iv", "underlying_index", "underlying_price", "delta",
    "gamma", "vega", "theta", "rho",
)  # fmt: skip
# TICK columns of each part of a row, from CSV columns.
_OPTION_PARTS = (
    {"price": "last_price", "size": "open_interest", "bid_px": "bid_price", "bid_sz": "bid_amount",
     "ask_px": "ask_price", "ask_sz": "ask_amount"},
    {"price": "mark_price", "size": "underlying_price", "bid_px": "bid_iv", "ask_px": "ask_iv",
     "bid_sz": "mark_iv", "ask_sz": "delta"},
    {"price": "gamma", "size": "vega", "bid_px": "theta", "ask_px": "rho"},
)  # fmt: skip
_IV = frozenset({"bid_iv", "ask_iv", "mark_iv"})
_TICKER_PART = {
    "price": "last_price", "size": "open_interest", "bid_px": "mark_price", "ask_px": "index_price",
    "bid_sz": "funding_rate", "ask_sz": "predicted_funding_rate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file holds: its header line (without line end), data type and, of books, levels."""

    path: Path
    header: bytes
    data_type: str
    columns: tuple[str, ...]
    levels: int = 0

    def first_receipt(self, text: bytes) -> int:
        """Time of receipt (ns) of the first sound line of the text; 0 when there is none."""
        at = self.columns.index("local_timestamp")
        for line in text.splitlines():
            cells = line.split(b",")
            if len(cells) > at and cells[at].isdigit() and 0 < int(cells[at]) < MAX_US:
                return int(cells[at]) * US
        return 0


def layout_of(path: Path, header: bytes) -> Layout:
    """The data type that a header line shows. Raises SourceError when it is none that can be played.

    Trades and liquidations have the same columns: the latter say so in their file's (or folder's) name.
    """
    columns = tuple(name.strip() for name in header.decode("utf-8", "replace").split(","))
    has = set(columns)
    levels = sum(name.startswith("asks[") and name.endswith("].price") for name in columns)
    if levels:
        data_type = "book_snapshot_5" if levels <= BEST else "book_snapshot_25"
        needed = _book_columns(levels)
    elif "strike_price" in has:
        data_type, needed = "options_chain", _OPTION
    elif "funding_rate" in has:
        data_type, needed = "derivative_ticker", _TICKER
    elif "ask_price" in has:
        data_type, needed = "quotes", _QUOTE
    elif "is_snapshot" in has:
        raise SourceError(f"{path} holds incremental_book_L2, which makes no row: give book_snapshot_5 or _25 files")
    elif "side" in has:
        named = "liquidation" in path.name.lower() or any(p.name == "liquidations" for p in path.absolute().parents)
        data_type, needed = "liquidations" if named else "trades", _TRADE
    else:
        raise SourceError(f"{path} is no Tardis CSV file by its first line; there are: {', '.join(TYPES)}")
    lacking = [name for name in (*_COMMON, *needed) if name not in has]
    if lacking or len(has) != len(columns):
        what = f"lacks {', '.join(lacking)}" if lacking else "names a column twice"
        raise SourceError(f"{path}: the header {what}, as {data_type} should not; fetch the file again")
    return Layout(path, header, data_type, columns, levels)


def _book_columns(levels: int) -> tuple[str, ...]:
    return tuple(
        f"{side}[{n}].{what}" for n in range(levels) for side in ("asks", "bids") for what in ("price", "amount")
    )


class Columns:
    """Text blocks to TICK rows. `symbol` gives the index that stands in `instrument`."""

    def __init__(self, symbol: Symbol) -> None:
        self._symbol = symbol
        self._index: dict[tuple[str, str], int] = {}
        self._options: set[tuple[str, str]] = set()
        self._counts: Counter[str] = Counter()
        self._polars = _polars()

    def counted(self) -> dict[str, int]:
        """What was skipped since the last call, by reason."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def __call__(self, layout: Layout, text: bytes) -> tuple[Rows, NDArray[np.int64]]:
        """Rows of whole lines (no header), in their order, and the time of receipt of each, ns."""
        table = self._table(layout, text)
        sound = self._sound(layout, table)
        if not sound.all():
            self._counts["garbage"] += int(len(sound) - sound.sum())
            table = table.filter(sound)
        if not len(table):
            return np.empty(0, TICK), np.empty(0, np.int64)
        rows, width = _MAKERS[layout.data_type](table, layout)
        index = self._indices(layout, table)
        for column, values in (
            ("ts_event_ns", table["timestamp"].to_numpy() * US),
            ("ts_recv_ns", table["local_timestamp"].to_numpy() * US),
            ("instrument", index),
        ):
            rows[column] = np.repeat(values, width) if width > 1 else values
        return rows, rows["ts_recv_ns"].copy()

    def _table(self, layout: Layout, text: bytes) -> Any:
        pl = self._polars
        schema = {name: _dtype(pl, name) for name in layout.columns}
        lines = text.count(b"\n") + (not text.endswith(b"\n") and bool(text))
        try:
            table = pl.read_csv(
                io.BytesIO(layout.header + b"\n" + text),
                schema=schema,
                ignore_errors=True,
                truncate_ragged_lines=True,
                quote_char=None,
                encoding="utf8-lossy",
            )
        except pl.exceptions.PolarsError as error:
            raise SourceError(
                f"{layout.path} is damaged ({' '.join(str(error).split())[:120]}): fetch it again"
            ) from None
        if len(table) < lines:
            self._counts["garbage"] += lines - len(table)
        return table

    def _sound(self, layout: Layout, table: Any) -> NDArray[np.bool_]:
        """Which lines have the times, a symbol and (trades, liquidations) a price and size."""
        pl = self._polars
        time = [pl.col(name).is_between(1, MAX_US) for name in ("timestamp", "local_timestamp")]
        text = [pl.col(name).is_not_null() & (pl.col(name) != "") for name in ("exchange", "symbol")]
        number = [
            pl.col(name).is_finite() for name in ("price", "amount") if layout.data_type in ("trades", "liquidations")
        ]
        found: NDArray[np.bool_] = table.select(pl.all_horizontal(*time, *text, *number).fill_null(False))[
            :, 0
        ].to_numpy()
        return found

    def _indices(self, layout: Layout, table: Any) -> Any:
        pl = self._polars
        names = table.select(pl.concat_str("exchange", "symbol", separator="\n")).to_series()
        seen = names.unique(maintain_order=True).to_list()
        first = {name: i for i, name in enumerate(seen)}
        for name in seen:
            exchange, _, symbol = name.partition("\n")
            key = (exchange, symbol)
            if key not in self._index or (layout.data_type == "options_chain" and key not in self._options):
                line = table.row(int(names.index_of(name)), named=True)
                facts = _facts(line) if layout.data_type == "options_chain" else None
                if facts is not None:
                    self._options.add(key)
                self._index[key] = self._symbol(exchange, symbol, line["timestamp"] * US, facts)
        known = [self._index[(name.partition("\n")[0], name.partition("\n")[2])] for name in seen]
        if len(seen) == 1:
            return np.full(len(table), known[0], np.int64)
        places = names.replace_strict(seen, list(first.values()), return_dtype=pl.Int64).to_numpy()
        return np.array(known, np.int64)[places]


def _polars() -> Any:
    try:
        import polars  # noqa: PLC0415
    except ImportError:
        raise ConfigError(NEEDS_POLARS) from None
    return polars


def _dtype(pl: Any, name: str) -> Any:
    if name in _TIMES:
        return pl.Int64
    return pl.String if name in _TEXT else pl.Float64


def _facts(line: dict[str, Any]) -> OptionFacts:
    expiry = line["expiration"]
    return OptionFacts(
        KINDS.get(line["type"] or ""), line["strike_price"], expiry * US if expiry is not None else None,
        line["underlying_index"] or None,
    )  # fmt: skip


# -- rows of each data type; times and instrument are filled in by the caller ----------------------------


def _blank(count: int, kind: int) -> Rows:
    rows = np.zeros(count, TICK)
    rows["kind"] = kind
    for name in ("price", "bid_px", "ask_px"):
        rows[name] = NAN
    return rows


def _numbers(table: Any, name: str) -> NDArray[np.float64]:
    """Empty cells, and those that are no finite number, are NaN."""
    values = table[name].fill_null(NAN).to_numpy()
    return np.where(np.isfinite(values), values, NAN)


def _trades(table: Any, layout: Layout) -> tuple[Rows, int]:
    rows = _blank(len(table), LIQUIDATION if layout.data_type == "liquidations" else TRADE)
    rows["price"], rows["size"] = _numbers(table, "price"), _numbers(table, "amount")
    side = table["side"].fill_null("")
    for name, value in SIDES.items():
        rows["side"][(side == name).to_numpy()] = value
    rows["sequence"] = sequences(table["id"].fill_null("").to_list())
    return rows, 1


def _quotes(table: Any, layout: Layout) -> tuple[Rows, int]:  # noqa: ARG001
    rows = _blank(len(table), BOOK)
    rows["size"] = 1
    for side in ("bid", "ask"):
        price, size = _numbers(table, f"{side}_price"), _numbers(table, f"{side}_amount")
        rows[f"{side}_px"], rows[f"{side}_sz"] = price, np.where(np.isnan(price), 0.0, size)
    return rows, 1


def _books(table: Any, layout: Layout) -> tuple[Rows, int]:
    levels = layout.levels
    rows = _blank(levels * len(table), BOOK)
    sums = {side: np.zeros(len(table)) for side in ("bid", "ask")}
    for n in range(levels):
        rows["part"][n::levels] = n
        for side, total in sums.items():
            price, size = _numbers(table, f"{side}s[{n}].price"), _numbers(table, f"{side}s[{n}].amount")
            size = np.where(np.isnan(price), 0.0, size)
            rows[f"{side}_px"][n::levels], rows[f"{side}_sz"][n::levels] = price, size
            if n < BEST:
                np.add(total, np.nan_to_num(size), out=total)
    whole = sums["bid"] + sums["ask"]
    known = (levels > 1) & (whole > 0)
    rows["size"][::levels] = levels
    rows["price"][::levels] = np.where(known, (sums["bid"] - sums["ask"]) / np.where(known, whole, 1.0), NAN)
    return rows, levels


def _tickers(table: Any, layout: Layout) -> tuple[Rows, int]:  # noqa: ARG001
    rows = _blank(len(table), TICKER)
    for column, name in _TICKER_PART.items():
        rows[column] = _numbers(table, name)
    funding = table["funding_timestamp"].fill_null(0).to_numpy()
    rows["sequence"] = np.maximum(funding, 0) // 1_000_000 & 0xFFFFFFFF
    return rows, 1


def _options(table: Any, layout: Layout) -> tuple[Rows, int]:  # noqa: ARG001
    rows = _blank(3 * len(table), OPTION)
    iv = np.where(table["exchange"].is_in(list(IV_IN_PERCENT)).to_numpy(), 1.0, 100.0)
    for part, columns in enumerate(_OPTION_PARTS):
        rows["part"][part::3] = part
        for column in ("price", "size", "bid_px", "ask_px", "bid_sz", "ask_sz"):
            name = columns.get(column)
            values: Any = NAN if name is None else _numbers(table, name)
            rows[column][part::3] = values * iv if name in _IV else values
    return rows, 3


_MAKERS: dict[str, Callable[[Any, Layout], tuple[Rows, int]]] = {
    "trades": _trades, "liquidations": _trades, "quotes": _quotes, "book_snapshot_5": _books,
    "book_snapshot_25": _books, "derivative_ticker": _tickers, "options_chain": _options,
}  # fmt: skip
