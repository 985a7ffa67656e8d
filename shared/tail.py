"""Reading the bus aloud: every partition's stream, merged by arrival, as lines or JSON.

Only looks: no position is stored and no consumer is registered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from shared.bus import Bus
from shared.errors import TapelineError
from shared.frames import BUY, CLOCK, SELL, TRADE, Frame, iso
from shared.heartbeat import redis_now_ms
from shared.instruments import feed_id
from shared.messages import Clock, Disconnect, Gap, Instrument, decode

# What can be tailed: the stream it is on.
TOPIC_STREAM = {
    "ticks": "ticks", "candles": "candles", "late": "late",
    "gaps": "ticks", "clocks": "ticks", "instruments": "ticks",
}  # fmt: skip
READ_FRAMES = 64
POLL_SECONDS = 0.05
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
Record = dict[str, Any]


def start_position(bus: Bus, text: str | None) -> str | None:
    """Stream id from `start`, `-5m` or an ISO instant (of arrival on the bus); None for "from now on".

    Raises TapelineError for anything else.
    """
    if text is None:
        return None
    if text == "start":
        return "0-0"
    try:
        if text.startswith("-") and text[-1] in _UNITS:
            ms = redis_now_ms(bus) - int(float(text[1:-1]) * _UNITS[text[-1]] * 1000)
        else:
            at = datetime.fromisoformat(text.replace("Z", "+00:00"))
            ms = int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except ValueError:
        raise TapelineError(
            f"--from wants `start`, `-5m` or an ISO time such as 2024-05-09T14:30:00Z, not '{text}'"
        ) from None
    return f"{max(0, ms - 1)}-{2**64 - 1}"


class Names:
    """Symbols and feeds behind the ids on the bus, read again when an unknown one comes by."""

    def __init__(self, bus: Bus, partitions: int) -> None:
        self._bus, self._partitions = bus, partitions
        self._instruments: dict[int, Instrument] = {}
        self._feeds: dict[int, str] = {}

    def instrument(self, partition: int, number: int) -> Instrument | None:
        if number not in self._instruments:
            body = self._bus.call("hget", self._bus.keys.instruments(partition), number)
            if body:
                self._instruments[number] = msgspec.json.decode(body, type=Instrument)
        return self._instruments.get(number)

    def feed(self, number: int) -> str:
        if number not in self._feeds:
            self._feeds = {feed_id(n.decode()): n.decode() for n in self._bus.call("hkeys", self._bus.keys.feeds)}
        return self._feeds.get(number, str(number))


class Tail:
    """Records of a topic from all partitions."""

    def __init__(self, bus: Bus, partitions: int, topic: str, symbol: str | None = None) -> None:
        self._bus, self._partitions, self._topic = bus, partitions, topic
        self._symbol = symbol.upper() if symbol else None
        self._names = Names(bus, partitions)

    def records(self, start: str | None, follow: bool, stop: threading.Event) -> Iterator[Record]:
        """Each record as plain values (times both in ns and as ISO text), oldest arrival first."""
        for partition, frame in self._frames(start, follow, stop):
            for record in self._decode(partition, frame):
                if self._symbol is None or self._symbol in record.pop("_about"):
                    record.pop("_about", None)
                    yield record

    def _frames(self, start: str | None, follow: bool, stop: threading.Event) -> Iterator[tuple[int, Frame]]:
        stream = TOPIC_STREAM[self._topic]
        at = {p: start or self._bus.last_id(p, stream) for p in range(self._partitions)}
        held: list[tuple[tuple[int, int], int, Frame]] = []
        while not stop.is_set():
            horizon: tuple[int, int] | None = None
            got = False
            for partition, position in at.items():
                frames = self._bus.read(partition, stream, position, READ_FRAMES)
                held += [(_order(f.id), partition, f) for f in frames]
                if frames:
                    got, at[partition] = True, frames[-1].id
                if len(frames) == READ_FRAMES:
                    # More to come from here: later arrivals elsewhere wait for it.
                    horizon = min(horizon or _order(frames[-1].id), _order(frames[-1].id))
            held.sort(key=lambda item: item[:2])
            ready = [item for item in held if horizon is None or item[0] <= horizon]
            held = held[len(ready) :]
            for _, partition, frame in ready:
                yield partition, frame
            if not got:
                if not follow:
                    return
                stop.wait(POLL_SECONDS)

    def _decode(self, partition: int, frame: Frame) -> Iterator[Record]:
        if frame.kind == "trade":
            if self._topic in ("ticks", "clocks"):
                yield from self._ticks(partition, frame)
        elif frame.kind in ("candle_1m", "candle_1s"):
            yield from _candles(frame)
        elif frame.kind == "late_trade":
            yield from self._late(partition, frame)
        else:
            yield from self._messages(frame)

    def _ticks(self, partition: int, frame: Frame) -> Iterator[Record]:
        wanted = TRADE if self._topic == "ticks" else CLOCK
        for row in frame.rows():
            if row["kind"] != wanted:
                continue
            if wanted == CLOCK:
                yield _clock(partition, self._names.feed(int(row["instrument"])), int(row["ts_event_ns"]), False)
            else:
                yield self._trade(partition, row)

    def _trade(self, partition: int, row: Any) -> Record:
        found = self._names.instrument(partition, int(row["instrument"]))
        symbol = found.symbol if found else str(row["instrument"])
        return {
            "type": "trade", "time": iso(int(row["ts_event_ns"])), "ts_event_ns": int(row["ts_event_ns"]),
            "ts_recv_ns": int(row["ts_recv_ns"]), "symbol": symbol, "root": found.root if found else None,
            "price": _plain(row["price"]), "size": _plain(row["size"]), "side": _side(int(row["side"])),
            "bid_px": _plain(row["bid_px"]), "bid_sz": _plain(row["bid_sz"]), "ask_px": _plain(row["ask_px"]),
            "ask_sz": _plain(row["ask_sz"]), "sequence": int(row["sequence"]), "flags": int(row["flags"]),
            "partition": partition, "_about": _about(symbol, found.root if found else None),
        }  # fmt: skip

    def _late(self, partition: int, frame: Frame) -> Iterator[Record]:
        for row in frame.rows():
            ticker, symbol = frame.names[int(row["name"])]
            record = self._trade(partition, row["tick"])
            behind = int(row["watermark_ns"]) - record["ts_event_ns"]
            record |= {
                "type": "late_trade", "ticker": ticker, "symbol": symbol, "watermark": iso(int(row["watermark_ns"])),
                "watermark_ns": int(row["watermark_ns"]), "late_seconds": behind / 1e9,
                "_about": _about(symbol, ticker),
            }  # fmt: skip
            yield record

    def _messages(self, frame: Frame) -> Iterator[Record]:
        for message in decode(frame.body):
            if isinstance(message, Instrument) and self._topic == "instruments":
                yield msgspec.to_builtins(message) | {"_about": _about(message.symbol, message.root)}
            elif isinstance(message, Clock) and self._topic == "clocks":
                record = _clock(None, message.feed, message.watermark_ns, message.final)
                yield record | {"watched_from_ns": message.watched_from_ns, "wall_ns": message.wall_ns}
            elif isinstance(message, Gap) and self._topic == "gaps":
                times = {"start": iso(message.start_ns), "end": iso(message.end_ns)}
                yield msgspec.to_builtins(message) | times | {"_about": {s.upper() for s in message.symbols}}
            elif isinstance(message, Disconnect) and self._topic == "gaps":
                yield msgspec.to_builtins(message) | {"at": iso(message.at_ns), "_about": set()}


def _candles(frame: Frame) -> Iterator[Record]:
    for row in frame.rows():
        ticker, symbol = frame.names[int(row["name"])]
        record: Record = {"type": frame.kind, "time": iso(int(row["time_ns"])), "ticker": ticker, "symbol": symbol}
        for name in row.dtype.names:
            if name not in ("name", "complete"):
                record[name] = _plain(row[name])
        record["complete"] = bool(row["complete"])
        record["_about"] = _about(symbol, ticker)
        yield record


def _clock(partition: int | None, feed: str, watermark_ns: int, final: bool) -> Record:
    return {
        "type": "clock", "time": iso(watermark_ns), "watermark_ns": watermark_ns, "feed": feed,
        "final": final, "partition": partition, "_about": set(),
    }  # fmt: skip


def _about(symbol: str, root: str | None) -> set[str]:
    return {symbol.upper(), (root or symbol).upper()}


def _side(side: int) -> str:
    return {BUY: "buy", SELL: "sell"}.get(side, "none")


def _plain(value: Any) -> int | float | None:
    """Python numbers; undefined is None."""
    if isinstance(value, np.integer):
        return int(value)
    number = float(value)
    return None if math.isnan(number) else number


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition("-")
    return int(ms), int(sequence)


def number(value: float | None) -> str:
    """As the exchange writes it: no exponent, no `.0`."""
    if value is None:
        return "-"
    return f"{value:.10f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _trade_line(r: Record) -> str:
    book = f"bid {number(r['bid_px'])} x {number(r['bid_sz'])}  ask {number(r['ask_px'])} x {number(r['ask_sz'])}"
    late = f"  {r['late_seconds']:.3f} s late" if r["type"] == "late_trade" else ""
    return (
        f"{r['time']}  {r['symbol']:<10} {number(r['price']):>12} x {number(r['size']):<6} {r['side']:<4}  {book}{late}"
    )


def _candle_line(r: Record) -> str:
    prices = " ".join(
        f"{letter} {number(r[name])}" for letter, name in zip("OHLC", ("open", "high", "low", "close"), strict=True)
    )
    marks = ("" if r["complete"] else "  incomplete") + (f"  revision {r['revision']}" if r["revision"] else "")
    return (
        f"{r['time'][:19]}Z  {r['type'].removeprefix('candle_')}  {r['ticker']:<5} {r['symbol']:<8} {prices}  "
        f"V {number(r['volume'])}  vd {number(r['vd'])}  cvd {number(r['cvd_close'])}  n {r['trades']}{marks}"
    )


def _gap_line(r: Record) -> str:
    if r["type"] == "disconnect":
        return f"{r['at']}  {r['feed']} dropped: {r['reason']}"
    about = ", ".join(r.get("symbols", ())) or "all symbols"
    return f"{r['start']} .. {r['end']}  {r['feed']} gap ({about}): {r['reason']}"


def _clock_line(r: Record) -> str:
    return f"{r['time']}  {r['feed']}" + ("  ends here" if r["final"] else "")


def _instrument_line(r: Record) -> str:
    expiry = iso(r["expiration_ns"])[:10] if r.get("expiration_ns") else "-"
    about = f"root {r['root']:<6} kind {r.get('kind', 'F')}  expires {expiry}"
    return f"{r['symbol']:<12} {r['venue']:<8} {about}  id {r['id']}"


LINES: dict[str, Callable[[Record], str]] = {
    "ticks": _trade_line, "late": _trade_line, "candles": _candle_line,
    "gaps": _gap_line, "clocks": _clock_line, "instruments": _instrument_line,
}  # fmt: skip
