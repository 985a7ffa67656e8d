"""The low-rate messages on the bus: JSON that reads plainly in redis-cli.

Times are int64 nanoseconds UTC. Messages are immutable.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """Base of all JSON messages."""


class Instrument(Message, frozen=True, tag="instrument"):
    """A definition or symbol mapping; published before the first record that uses it.

    `id` is `shared.instruments.instrument_id(venue, symbol)`. `kind` is Databento's
    `instrument_class` letter: F future (a perpetual has no expiration), C call, P put, K stock or
    spot, S/T/M spreads. `expiration_ns` orders contracts of a root; without a definition it is
    estimated from the symbol's month code (`estimated = True`). `ticker` is the continuous ticker
    that it competes for, its root if None; crypto symbols are each their own (`binance:BTCUSDT`).
    """

    id: int
    venue: str
    symbol: str
    root: str
    feed: str
    kind: str = "F"
    expiration_ns: int | None = None
    estimated: bool = False
    strike: float | None = None
    underlying: str | None = None
    multiplier: float | None = None
    tick_size: float | None = None
    defined_ns: int | None = None
    ticker: str | None = None


class Clock(Message, frozen=True, tag="clock"):
    """The feed's time stands at `watermark_ns`: no trade older than it is expected.

    `watched_from_ns` is set when a feed begins to be watched (connect, start of a file): warm-up
    counts from there. `final` says that the tape ends here. `grace_ns`, given with `watched_from_ns`:
    how far behind the newest event time of the feed's rows its watermark stays.
    """

    feed: str
    watermark_ns: int
    wall_ns: int | None = None
    watched_from_ns: int | None = None
    final: bool = False
    grace_ns: int = 0


class Gap(Message, frozen=True, tag="gap"):
    """Trades in [start_ns, end_ns) may be missing and cannot be recovered.

    `symbols` empty: every instrument of the feed.
    """

    feed: str
    start_ns: int
    end_ns: int
    reason: str
    symbols: tuple[str, ...] = ()


class Disconnect(Message, frozen=True, tag="disconnect"):
    """The feed dropped at `at_ns`; it may resume without loss.

    With `since_ns` it cannot: what lies behind that event time is suspect (of `symbols`, or of all)
    until a Gap with the same `start_ns` and symbols tells where the tape goes on.
    """

    feed: str
    at_ns: int
    reason: str
    since_ns: int | None = None
    symbols: tuple[str, ...] = ()


AnyMessage = Instrument | Clock | Gap | Disconnect

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(list[AnyMessage])


def encode(messages: list[Any]) -> bytes:
    """JSON array of messages."""
    return _encoder.encode(messages)


def decode(body: bytes) -> list[AnyMessage]:
    """Messages of a JSON frame body.

    Raises msgspec.ValidationError for anything that is not such an array.
    """
    return _decoder.decode(body)
