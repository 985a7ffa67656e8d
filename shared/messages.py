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
    `instrument_class` letter: F future, C call, P put, K stock, S/T/M spreads.
    `expiration_ns` orders contracts of a root; without a definition it is estimated from the
    symbol's month code (`estimated = True`).
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


class Clock(Message, frozen=True, tag="clock"):
    """The feed's time stands at `watermark_ns`: no trade older than it is expected.

    `watched_from_ns` is set when a feed begins to be watched (connect, start of a file): warm-up
    counts from there. `final` says that the tape ends here.
    """

    feed: str
    watermark_ns: int
    wall_ns: int | None = None
    watched_from_ns: int | None = None
    final: bool = False


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
    """The feed dropped at `at_ns`; it may resume without loss."""

    feed: str
    at_ns: int
    reason: str


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
