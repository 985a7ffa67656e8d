"""Rows of the `ticks` topic as records of the tick tables, column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.batches import Chunk, DeadLetter, dead_row
from shared.frames import BOOK, CLOCK, LIQUIDATION, NS, OPTION, TICKER, TRADE, Rows
from shared.messages import Instrument
from shared.tables import TICK_TABLES, UNDEFINED, TickTable

SIDES = np.array(["SELL", "UNKNOWN", "BUY"], object)
OPTION_PARTS = 3
MAX_DEPTH = 1 << 20
_OPTION_TYPES = {"C": "CALL", "P": "PUT"}
_TORN = "a part of no record, or a record that lacks parts"

Index = NDArray[np.int64]
Columns = dict[str, Any]


@dataclass(slots=True)
class Records:
    """Records of one table in arrival order.

    `columns[name]` are arrays, or lists where values are text or levels ([[price, amount], …] a
    record); instants are ns. Record i starts at row `row[i]` of chunk `chunk[i]`.
    """

    table: TickTable
    columns: Columns
    chunk: Index
    row: Index


def records(chunks: Sequence[Chunk]) -> tuple[list[Records], list[DeadLetter]]:
    """All records of the chunks by table; rows that make no sound record become dead letters.

    Clock rows are no records.
    """
    rows = np.concatenate([chunk.rows for chunk in chunks])
    chunk = np.repeat(np.arange(len(chunks)), [len(c.rows) for c in chunks])
    row = np.concatenate([np.arange(len(c.rows)) for c in chunks])
    kept = rows["kind"] != CLOCK
    rows, chunk, row = rows[kept], chunk[kept], row[kept]
    if not len(rows):
        return [], []
    head = np.flatnonzero(~_goes_on(rows, chunk))
    parts = np.diff(np.append(head, len(rows)))
    ids, which = np.unique(rows["instrument"][head], return_inverse=True)
    known = list({id(c.instruments): c.instruments for c in chunks}.values())
    # An id names venue and symbol, so it means the same in every partition.
    instruments = [next((some[number] for some in known if number in some), None) for number in ids.tolist()]
    found = np.array([i is not None for i in instruments])[which]
    reason = _reasons(rows[head], parts, found)
    dead = list(_dead(chunks, rows, chunk, row, head, parts, reason)) if reason.any() else []
    out = []
    for kind, table in TICK_TABLES.items():
        chosen = np.flatnonzero((rows["kind"][head] == kind) & (reason == 0))
        if len(chosen):
            at = head[chosen]
            columns = _common(rows, at, instruments, which[chosen])
            columns |= _place(chunks, chunk[at], row[at])
            columns |= _own(kind, rows, at, parts[chosen], instruments, which[chosen])
            out.append(Records(table, columns, chunk[at], row[at]))
    return out, dead


def _goes_on(rows: Rows, chunk: Index) -> NDArray[np.bool_]:
    """Whether a row is a further part of the record of the row before it."""
    same = np.zeros(len(rows), np.bool_)
    same[1:] = (rows["part"][1:] > 0) & (rows["part"][1:] == rows["part"][:-1].astype(np.int64) + 1)
    same[1:] &= chunk[1:] == chunk[:-1]
    for name in ("kind", "instrument", "ts_event_ns"):
        same[1:] &= rows[name][1:] == rows[name][:-1]
    return same


_REASONS = ("", "a kind that no table takes", _TORN, "a time or side that cannot be", "an unknown instrument")


def _reasons(heads: Rows, parts: Index, found: NDArray[np.bool_]) -> Index:
    """Index into _REASONS per record, 0 for a sound one."""
    kind, side = heads["kind"], heads["side"].astype(np.int64)
    want = np.where(kind == OPTION, OPTION_PARTS, np.where(kind == BOOK, parts, 1))
    wrong = [
        ~np.isin(kind, list(TICK_TABLES)),
        (heads["part"] != 0) | (parts != want),
        (heads["ts_event_ns"] == UNDEFINED) | (np.abs(side) > 1),
        ~found,
    ]
    return np.select(wrong, [1, 2, 3, 4], 0)


def _dead(
    chunks: Sequence[Chunk], rows: Rows, chunk: Index, row: Index, head: Index, parts: Index, reason: Index
) -> Iterator[DeadLetter]:
    for record in np.flatnonzero(reason).tolist():
        for at in range(int(head[record]), int(head[record] + parts[record])):
            table = TICK_TABLES.get(int(rows["kind"][at]))
            named = zip(rows.dtype.names or (), rows[at].tolist(), strict=True)
            source = chunks[int(chunk[at])].source
            yield dead_row(source, table.name if table else "ticks", int(row[at]), _REASONS[reason[record]], named)


def _common(rows: Rows, at: Index, instruments: list[Instrument | None], which: Index) -> Columns:
    return {
        "timestamp": rows["ts_event_ns"][at],
        "timestamp_ns": rows["ts_event_ns"][at],
        "local_timestamp_ns": rows["ts_recv_ns"][at],
        "exchange": _of(instruments, which, "venue"),
        "symbol": _of(instruments, which, "symbol"),
    }


def _of(instruments: list[Instrument | None], which: Index, name: str) -> list[Any]:
    values = [getattr(i, name, None) for i in instruments]
    return [values[i] for i in which.tolist()]


def _place(chunks: Sequence[Chunk], chunk: Index, row: Index) -> Columns:
    sources = [c.source for c in chunks]
    ids = [tuple(map(int, s.id.split("-"))) for s in sources]
    numbers = chunk.tolist()
    return {
        "bus": [sources[i].bus for i in numbers],
        "partition": [sources[i].partition for i in numbers],
        "entry_ms": [ids[i][0] for i in numbers],
        "entry_seq": [ids[i][1] for i in numbers],
        "row": row,
    }


def _own(kind: int, rows: Rows, at: Index, parts: Index, instruments: list[Instrument | None], which: Index) -> Columns:
    """The columns of one table beside the common ones; see TICK for where they stand."""
    first = rows[at]
    if kind == TRADE:
        return {
            "price": first["price"], "amount": first["size"], "side": _side(first), "sequence": first["sequence"],
            **_best(first),
        }  # fmt: skip
    if kind == BOOK:
        return {
            "depth": _depth(first, parts), **_best(first), "book_imbalance_5": first["price"],
            "bids": _levels(rows, at, parts, "bid_px", "bid_sz"),
            "asks": _levels(rows, at, parts, "ask_px", "ask_sz"),
        }  # fmt: skip
    if kind == TICKER:
        funding = first["sequence"].astype(np.int64) * NS
        return {
            "last_price": first["price"], "open_interest": first["size"], "funding_rate": first["bid_sz"],
            "predicted_funding_rate": first["ask_sz"], "funding_timestamp": np.where(funding > 0, funding, UNDEFINED),
            "mark_price": first["bid_px"], "index_price": first["ask_px"],
        }  # fmt: skip
    if kind == LIQUIDATION:
        return {"price": first["price"], "amount": first["size"], "side": _side(first)}
    second, third = rows[at + 1], rows[at + 2]
    kinds = _of(instruments, which, "kind")
    expirations = [UNDEFINED if ns is None else ns for ns in _of(instruments, which, "expiration_ns")]
    return {
        "option_type": [_OPTION_TYPES.get(k) for k in kinds],
        "strike": _of(instruments, which, "strike"),
        "expiration": np.array(expirations, np.int64),
        "underlying": _of(instruments, which, "underlying"),
        "last_price": first["price"], "open_interest": first["size"], **_best(first),
        "mark_price": second["price"], "underlying_price": second["size"],
        "bid_iv": second["bid_px"], "ask_iv": second["ask_px"], "mark_iv": second["bid_sz"], "delta": second["ask_sz"],
        "gamma": third["price"], "vega": third["size"], "theta": third["bid_px"], "rho": third["ask_px"],
    }  # fmt: skip


def _side(rows: Rows) -> list[str]:
    out: list[str] = SIDES[rows["side"].astype(np.int64) + 1].tolist()
    return out


def _depth(rows: Rows, parts: Index) -> Index:
    """As the feed names it; a book may have fewer levels than that."""
    size = rows["size"]
    fine = (size >= 1) & (size <= MAX_DEPTH)
    return np.where(fine, np.where(fine, size, 0), parts).astype(np.int64)


def _best(rows: Rows) -> Columns:
    return {
        "bid_price": rows["bid_px"], "bid_amount": rows["bid_sz"],
        "ask_price": rows["ask_px"], "ask_amount": rows["ask_sz"],
    }  # fmt: skip


def _levels(rows: Rows, at: Index, parts: Index, price: str, amount: str) -> list[list[list[float]]]:
    """[[price, amount], …] per record, best first; a side that has fewer levels than the other is shorter."""
    pairs = np.column_stack((rows[price], rows[amount])).tolist()
    spans = zip(at.tolist(), (at + parts).tolist(), strict=True)
    if np.isnan(rows[price]).any():
        return [[pair for pair in pairs[start:end] if pair[0] == pair[0]] for start, end in spans]
    return [pairs[start:end] for start, end in spans]
