"""DBN files of any make, and an Output that only remembers."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import databento_dbn as dbn
import numpy as np
import zstandard

from services.ingest.normalize import RECORD, TRADES_RECORD
from services.ingest.source import Grouped
from shared.frames import NS
from shared.messages import Clock, Disconnect, Gap, Instrument

T0 = 1_700_006_400 * NS  # 2023-11-15 00:00 UTC
DAY = 86_400 * NS
VENUE = "GLBX.MDP3"


def day_of(ns: int) -> date:
    return date(1970, 1, 1) + timedelta(days=ns // DAY)


def records(times: Any, native: Any = 1, price: Any = 100, sequence: Any = None) -> np.ndarray:
    """Records received at these ns, made 100 µs before."""
    times = np.asarray(times, np.int64)
    rows = np.zeros(len(times), RECORD)
    rows["length"], rows["rtype"], rows["publisher_id"], rows["action"] = 20, 1, 1, ord("T")
    rows["ts_recv"], rows["ts_event"] = times, times - 100_000
    rows["instrument_id"] = native
    rows["price"] = np.asarray(price) * NS
    rows["size"], rows["side"] = 1, ord("B")
    rows["bid_px"], rows["ask_px"] = rows["price"] - NS, rows["price"]
    rows["sequence"] = np.arange(len(times)) if sequence is None else sequence
    return rows


def header(
    start: int, end: int | None, mappings: Any, schema: str | None = "tbbo", ts_out: bool = False, **more: Any
) -> bytes:
    """`mappings`: (raw symbol, native id, first day ns, end day ns) rows."""

    class Mapping:
        def __init__(self, symbol: str, rows: list[tuple[str, int, int, int]]) -> None:
            self.raw_symbol = symbol
            self.intervals = [
                SimpleNamespace(start_date=day_of(a), end_date=day_of(b), symbol=str(native))
                for _, native, a, b in rows
            ]

    symbols = list(dict.fromkeys(m[0] for m in mappings))
    made = dbn.Metadata(
        dataset=more.pop("dataset", VENUE), start=start, stype_in=more.pop("stype_in", dbn.SType.RAW_SYMBOL),
        stype_out=dbn.SType.INSTRUMENT_ID, schema=dbn.Schema.from_str(schema) if schema else None, symbols=symbols,
        partial=[], not_found=[], mappings=[Mapping(s, [m for m in mappings if m[0] == s]) for s in symbols],
        end=end, ts_out=ts_out, version=more.pop("version", 3), **more,
    )  # fmt: skip
    return bytes(made.encode())


def write(path: Path, head: bytes, *bodies: Any, frames: int = 1) -> Path:
    """A file of a header and records; `.zst` compressed, in several zstd frames if wished."""
    whole = head + b"".join(b.tobytes() if isinstance(b, np.ndarray) else bytes(b) for b in bodies)
    if path.suffix == ".zst":
        size = -(-len(whole) // frames)
        whole = b"".join(zstandard.compress(whole[i : i + size]) for i in range(0, len(whole), size))
    path.write_bytes(whole)
    return path


def simple(path: Path, times: Any, native: Any = 1, symbol: str = "ESZ3", **more: Any) -> Path:
    """One contract, watched for whole days."""
    times = np.asarray(times, np.int64)
    first = int(times[0]) // DAY * DAY if len(times) else T0
    last = (int(times[-1]) // DAY + 1) * DAY if len(times) else T0 + DAY
    start, end = more.pop("start", first), more.pop("end", last)
    head = header(start, end, [(symbol, native, first, last)])
    return write(path, head, records(times, native, **more))


def as_trades(rows: np.ndarray) -> np.ndarray:
    out = np.zeros(len(rows), TRADES_RECORD)
    for name in TRADES_RECORD.names or ():
        out[name] = rows[name]
    out["length"], out["rtype"] = 12, 0
    return out


def definition(symbol: str, native: int, at: int, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "asset": "ES", "security_type": "FUT", "instrument_class": dbn.InstrumentClass.FUTURE,
        "expiration": at + 30 * DAY, "min_price_increment": NS // 4,
    }  # fmt: skip
    return dbn.InstrumentDefMsg(
        publisher_id=1, instrument_id=native, ts_event=at, ts_recv=at, raw_symbol=symbol, display_factor=NS,
        security_update_action=dbn.SecurityUpdateAction.ADD, **(fields | more),
    )  # fmt: skip


class Memory:
    """An Output that keeps what it is given: `log` in order, `rows` per partition."""

    def __init__(self, stop_after: int | None = None, stop: Any = None) -> None:
        self.log: list[Any] = []
        self.rows: dict[int, list[np.ndarray]] = {}
        self.pieces: list[tuple[int, int, np.ndarray]] = []  # (chunk, partition, rows)
        self.counts: dict[str, int] = {}
        self.cursors: list[bytes] = []
        self.states: list[str] = []
        self._stop_after, self._stop = stop_after, stop

    def instruments(self, messages: Iterable[Instrument]) -> None:
        self.log += list(messages)

    def broadcast(self, message: Clock | Gap | Disconnect) -> None:
        self.log.append(message)

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        self.cursors.append(cursor)
        self.log.append(len(grouped.rows))
        for g, p in enumerate(grouped.partitions):
            piece = slice(grouped.starts[g], grouped.starts[g + 1])
            self.rows.setdefault(p, []).append(grouped.rows[piece])
            self.pieces.append((len(self.cursors) - 1, p, grouped.rows[piece]))
            assert (np.diff(grouped.ordinals[piece]) > 0).all()
        if self._stop_after is not None and len(self.cursors) >= self._stop_after:
            self._stop.set()

    def flush(self) -> None:
        self.log.append("flush")

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + records

    def connection(self, state: str, detail: str = "") -> None:
        self.states.append(state)

    @property
    def clocks(self) -> list[Clock]:
        return [m for m in self.log if isinstance(m, Clock)]

    @property
    def symbols(self) -> list[str]:
        return [m.symbol for m in self.log if isinstance(m, Instrument)]

    def joined(self, kind: int | None = None) -> dict[int, np.ndarray]:
        out = {p: np.concatenate(pieces) for p, pieces in self.rows.items()}
        return {p: r if kind is None else r[r["kind"] == kind] for p, r in out.items()}

    def trades(self) -> np.ndarray:
        """All trades in tape order (receipt, sequence)."""
        rows = np.concatenate(list(self.joined(0).values()))
        return rows[np.lexsort((rows["sequence"], rows["ts_recv_ns"]))]
