"""Reading the bus aloud: every partition's stream, merged by arrival, as lines or JSON.

Only looks: no position is stored and no consumer is registered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import msgspec

from shared.bus import Bus
from shared.errors import TapelineError
from shared.frames import CLOCK, TICK_FRAMES, UNREADABLE, Frame, iso
from shared.heartbeat import redis_now_ms
from shared.instruments import feed_id
from shared.messages import Clock, Disconnect, Gap, Instrument, Pressure, PressureRollup, Signal, Usage, decode
from shared.records import Record, aliases, fixed, normal, number, option_message, rolling, tick, ticks, usage

# What can be tailed: the stream it is on.
TOPIC_STREAM = {
    "ticks": "ticks", "candles": "candles", "late": "late",
    "gaps": "ticks", "clocks": "ticks", "instruments": "ticks",
    "pressure": "pressure", "signals": "signals", "usage": "usage",
}  # fmt: skip
READ_FRAMES = 64
POLL_SECONDS = 0.05
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LOOK_AGAIN_SECONDS = 1.0
SEEN = 4096


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
        self._look_again = 0.0

    def instrument(self, partition: int, number: int) -> Instrument | None:
        if number not in self._instruments:
            body = self._bus.call("hget", self._bus.keys.instruments(partition), number)
            if body:
                self._instruments[number] = msgspec.json.decode(body, type=Instrument)
        return self._instruments.get(number)

    def feed(self, number: int) -> str:
        if number not in self._feeds and time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
            names = {n.decode() for n in self._bus.call("hkeys", self._bus.keys.feeds)}
            # A producer of several feeds reports as one: the others are known by their instruments.
            names |= {i.feed for i in self.instruments()}
            self._feeds = {feed_id(name): name for name in names}
        return self._feeds.get(number, str(number))

    def instruments(self) -> Iterator[Instrument]:
        """All that any feed has published."""
        for partition in range(self._partitions):
            for body in self._bus.call("hvals", self._bus.keys.instruments(partition)):
                yield msgspec.json.decode(body, type=Instrument)


class Tail:
    """Records of a topic from all partitions."""

    def __init__(self, bus: Bus, partitions: int, topic: str, symbol: str | None = None) -> None:
        self._bus, self._partitions, self._topic = bus, partitions, topic
        self._symbol = normal(symbol) if symbol else None
        self._names = Names(bus, partitions)
        self._seen: dict[Gap | Disconnect, None] = {}

    def records(self, start: str | None, follow: bool, stop: threading.Event) -> Iterator[Record]:
        """Each record as plain values (times both in ns and as ISO text), oldest arrival first."""
        for partition, frame in self.frames(start, follow, stop):
            for record in self._decode(partition, frame):
                about = record.pop("_about")
                if self._symbol is None or about is None or self._symbol in about:
                    yield record

    def frames(self, start: str | None, follow: bool, stop: threading.Event) -> Iterator[tuple[int, Frame]]:
        """(partition, frame) of the topic's stream, oldest arrival first."""
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
        if frame.kind in TICK_FRAMES:
            if self._topic == "ticks":
                yield from self._ticks(partition, frame)
            elif self._topic == "clocks":
                for row in frame.rows():
                    if row["kind"] == CLOCK:
                        feed = self._names.feed(int(row["instrument"]))
                        yield _clock(partition, feed, int(row["ts_event_ns"]), False)
        elif frame.kind in ("candle_1m", "candle_1s"):
            yield from rolling(frame)
        elif frame.kind == "candle":
            yield from fixed(frame)
        elif frame.kind == "late_trade":
            yield from self._late(partition, frame)
        elif frame.kind != UNREADABLE:
            yield from self._messages(frame)

    def _ticks(self, partition: int, frame: Frame) -> Iterator[Record]:
        rows = frame.rows()
        ids = set(rows["instrument"].tolist())
        yield from ticks(rows, {number: self._names.instrument(partition, number) for number in ids}, partition)

    def _late(self, partition: int, frame: Frame) -> Iterator[Record]:
        for row in frame.rows():
            ticker, symbol = frame.names[int(row["name"])]
            number = int(row["tick"]["instrument"])
            record = tick(row["tick"].reshape(1), self._names.instrument(partition, number), partition)
            behind = int(row["watermark_ns"]) - record["ts_event_ns"]
            record |= {
                "type": "late_trade", "ticker": ticker, "symbol": symbol, "watermark": iso(int(row["watermark_ns"])),
                "watermark_ns": int(row["watermark_ns"]), "late_seconds": behind / 1e9,
                "_about": record["_about"] | aliases(record["exchange"] or "", symbol, ticker),
            }  # fmt: skip
            yield record

    def _messages(self, frame: Frame) -> Iterator[Record]:
        try:
            messages = decode(frame.body)
        except msgspec.DecodeError:
            return  # the sinks bury it
        for message in messages:
            if isinstance(message, Instrument) and self._topic == "instruments":
                about = aliases(message.venue, message.symbol, message.root, message.ticker or message.root)
                yield msgspec.to_builtins(message) | {"_about": about}
            elif isinstance(message, Clock) and self._topic == "clocks":
                record = _clock(None, message.feed, message.watermark_ns, message.final)
                yield record | {"watched_from_ns": message.watched_from_ns, "wall_ns": message.wall_ns}
            elif isinstance(message, Gap | Disconnect) and self._topic == "gaps" and self._new(message):
                yield _gap(message)
            elif isinstance(message, Pressure | PressureRollup | Signal) and self._topic in ("pressure", "signals"):
                yield option_message(message)
            elif isinstance(message, Usage) and self._topic == "usage":
                yield usage(message)

    def _new(self, message: Gap | Disconnect) -> bool:
        """Every partition of the feed has it: the first one counts."""
        if message in self._seen:
            return False
        if len(self._seen) >= SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[message] = None
        return True


def _gap(message: Gap | Disconnect) -> Record:
    """A gap or disconnect without symbols is about each symbol."""
    exchange = message.feed.rpartition(":")[2]
    about = frozenset().union(*(aliases(exchange, s) for s in message.symbols)) if message.symbols else None
    record: Record = msgspec.to_builtins(message) | {"_about": about}
    if isinstance(message, Gap):
        return record | {"start": iso(message.start_ns), "end": iso(message.end_ns)}
    return record | {"at": iso(message.at_ns), "since": None if message.since_ns is None else iso(message.since_ns)}


def _clock(partition: int | None, feed: str, watermark_ns: int, final: bool) -> Record:
    return {
        "type": "clock", "time": iso(watermark_ns), "watermark_ns": watermark_ns, "feed": feed,
        "final": final, "partition": partition, "_about": set(),
    }  # fmt: skip


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, sequence = entry_id.partition("-")
    return int(ms), int(sequence)


def _tick_line(r: Record) -> str:
    return f"{r['time']}  {label(r):<10} {_TICK_TEXT[r['type']](r)}".rstrip()


def label(r: Record) -> str:
    """The symbol; with its exchange where the same symbol may stand for several."""
    return f"{r['exchange']}:{r['symbol']}" if r.get("exchange") and ":" in (r.get("root") or ":") else str(r["symbol"])


def _trade_text(r: Record) -> str:
    late = f"  {r['late_seconds']:.3f} s late" if r["type"] == "late_trade" else ""
    return f"{number(r['price']):>12} x {number(r['size']):<6} {r['side']:<4}{_bbo(r)}{late}"


def _bbo(r: Record) -> str:
    if r["bid_px"] is None and r["ask_px"] is None:
        return ""
    return f"  bid {number(r['bid_px'])} x {number(r['bid_sz'])}  ask {number(r['ask_px'])} x {number(r['ask_sz'])}"


def _book_text(r: Record) -> str:
    sides = "  ".join(
        f"{name} {number(levels[0][0])} x {number(levels[0][1])}" if levels else f"{name} -"
        for name, levels in (("bid", r["bids"]), ("ask", r["asks"]))
    )
    what = "quote" if r["depth"] == 1 else f"book of {r['depth']}"
    return f"{what}  {sides}{_valued(r, {'imbalance': 'book_imbalance_5'})}"


def _ticker_text(r: Record) -> str:
    named = {
        "last": "last_price", "mark": "mark_price", "index": "index_price", "open interest": "open_interest",
        "funding": "funding_rate", "predicted": "predicted_funding_rate",
    }  # fmt: skip
    return f"ticker{_valued(r, named)}" + (f"  next funding {r['funding_time']}" if r["funding_time"] else "")


def _liquidation_text(r: Record) -> str:
    return f"liquidation  {number(r['price'])} x {number(r['size'])}  {r['liquidated'] or 'position'} liquidated"


def _option_text(r: Record) -> str:
    named = {
        "last": "last_price", "mark": "mark_price", "underlying": "underlying_price", "IV": "mark_iv",
        "open interest": "open_interest", "delta": "delta", "gamma": "gamma", "vega": "vega", "theta": "theta",
    }  # fmt: skip
    return f"option{_bbo(r)}{_valued(r, named)}"


def _valued(r: Record, named: dict[str, str]) -> str:
    return "".join(f"  {text} {number(r[name], 8)}" for text, name in named.items() if r[name] is not None)


_TICK_TEXT: dict[str, Callable[[Record], str]] = {
    "trade": _trade_text, "late_trade": _trade_text, "book": _book_text, "ticker": _ticker_text,
    "liquidation": _liquidation_text, "option_summary": _option_text,
}  # fmt: skip


def ohlc(r: Record) -> str:
    """`O 1 H 2 L 0.5 C 1.5`"""
    return " ".join(
        f"{letter} {number(r[name])}" for letter, name in zip("OHLC", ("open", "high", "low", "close"), strict=True)
    )


def marks(r: Record) -> str:
    """What sets a candle apart."""
    return ("" if r["complete"] else "  incomplete") + (f"  revision {r['revision']}" if r["revision"] else "")


def _candle_line(r: Record) -> str:
    if r["type"] == "candle":
        named = f"{r['timeframe']}  {label(r)}"
    else:
        named = f"{r['type'].removeprefix('candle_')}  {r['ticker']:<5} {r['symbol']:<8}"
    return (
        f"{r['time'][:19]}Z  {named} {ohlc(r)}  "
        f"V {number(r['volume'])}  vd {number(r['vd'])}  cvd {number(r['cvd_close'])}  n {r['trades']}{marks(r)}"
    )


def _gap_line(r: Record) -> str:
    about = ", ".join(r.get("symbols", ())) or "all symbols"
    if r["type"] == "disconnect":
        suspect = f" ({about} suspect since {r['since']})" if r["since"] else ""
        return f"{r['at']}  {r['feed']} dropped: {r['reason']}{suspect}"
    return f"{r['start']} .. {r['end']}  {r['feed']} gap ({about}): {r['reason']}"


def _clock_line(r: Record) -> str:
    return f"{r['time']}  {r['feed']}" + ("  ends here" if r["final"] else "")


def _pressure_line(r: Record) -> str:
    if r["type"] == "pressure_rollup":
        told = (
            f"all of {r['strikes']} strikes  calls {number(r['call_volume'])}  puts {number(r['put_volume'])}  "
            f"put/call {number(r['put_call_ratio'], 4)}  net premium {number(r['net_premium'], 8)}"
        )
    else:
        told = (
            f"{_option(r)}  {r['dominant_side']:<7} ask {number(r['ask_volume'])} bid {number(r['bid_volume'])}  "
            f"log ratio {number(r['log_ratio'], 4)}  confidence {number(r['confidence'], 4)}"
        )
    return f"{_second(r['time'])}  {r['underlying']:<6} {told}  n {r['total_trades']}{marks(r)}"


def _signal_line(r: Record) -> str:
    status = "" if r["status"] == "emitted" else f"  {r['status']}" + (f" ({r['reason']})" if r["reason"] else "")
    return (
        f"{_second(r['time'])}  {r['underlying']:<6} {_option(r)}  {r['direction']:<4} {r['grade']:<9} "
        f"{number(r['score'], 4)}  {', '.join(r['types']) or r['signal_type']}{status}{marks(r)}"
    )


def _usage_line(r: Record) -> str:
    stopped = "" if r["state"] == "running" else f"  {r['state']}"
    return (
        f"{_second(r['time'])}  {r['feed']}  {r['events']:,} events  {r['bytes']:,} bytes  "
        f"{number(r['cost_usd'], 4)} USD  day {number(r['day_cost_usd'], 4)} of {number(r['budget_usd'])} USD{stopped}"
    )


def _option(r: Record) -> str:
    if not r["option_type"]:
        return "all strikes"
    return f"{(r['expiration'] or '-')[:10]} {number(r['strike'])} {r['option_type']}"


def _second(time: str | None) -> str:
    return f"{time[:19]}Z" if time else "-"


def _instrument_line(r: Record) -> str:
    expiry = iso(r["expiration_ns"])[:10] if r.get("expiration_ns") else "-"
    about = f"root {r['root']:<6} kind {r.get('kind', 'F')}  expires {expiry}"
    return f"{r['symbol']:<12} {r['venue']:<8} {about}  id {r['id']}"


LINES: dict[str, Callable[[Record], str]] = {
    "ticks": _tick_line, "late": _tick_line, "candles": _candle_line,
    "gaps": _gap_line, "clocks": _clock_line, "instruments": _instrument_line,
    "pressure": _pressure_line, "signals": _signal_line, "usage": _usage_line,
}  # fmt: skip
