"""Places on the bus: up to where a client has the rows of a topic. Text for it, opaque, in each message's `id`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from services.web.channels import topic_of
from services.web.problems import bad
from shared.batches import BACKFILL, Cursor, CursorKey
from shared.errors import Unavailable
from shared.sink_tail import START

if TYPE_CHECKING:
    from services.web.hub import Hub

SETTLE_SECONDS = 1.0
_MAX_CHARS = 64 << 10
_encode = msgspec.msgpack.Encoder().encode
# Bus, topic's first letter, then of each partition: number, sequence, and both halves of the entry's id.
_decode = msgspec.msgpack.Decoder(tuple[str, str, list[tuple[int, int, int, int]]])


@dataclass(frozen=True, slots=True)
class Place:
    """How far each of some partitions of a topic was read; of a partition that is not here nothing is followed."""

    bus: str
    topic: str
    cursors: Mapping[int, Cursor] = field(default_factory=dict)

    def text(self) -> str:
        """As clients get it."""
        parts = [(p, c.seq, *map(int, c.stream_id.split("-"))) for p, c in self.cursors.items()]
        return base64.urlsafe_b64encode(_encode((self.bus, self.topic[0], parts))).decode().rstrip("=")


def place_of_text(text: str, topic: str) -> Place:
    """The place that a client gives. Raises Problem (400) for text that is none, or none of this topic."""
    try:
        if len(text) > _MAX_CHARS:
            raise ValueError
        bus, letter, parts = _decode.decode(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
        sound = all(min(part) >= 0 and max(part) < 1 << 64 for part in parts) and bus and parts
    except (ValueError, binascii.Error, msgspec.DecodeError):
        sound = False
    if not sound:
        raise bad("`after` is no place: give the `id` of an earlier message, or of a REST answer")
    if letter != topic[0]:
        raise bad("`after` is a place of another channel: give the `id` of an earlier message of this one")
    return Place(bus, topic, {p: Cursor(seq, f"{ms}-{n}") for p, seq, ms, n in parts})


def place_of_store(
    cursors: Mapping[CursorKey, Cursor], topic: str, bus: str, partitions: int, begun: Collection[int], *, was: str = ""
) -> Place | None:
    """Up to where a store's snapshot goes on this bus; None while that cannot be said.

    A partition that the store has no cursor of is read from its start. But a sink that comes from another bus (whose
    cursors are here; or `was`) may still write rows of that one, until it stores of this one: of some partition, and of
    each that has `begun`. A backfill is no bus, and has nothing in hand.
    """
    held = {p: c for (b, t, p), c in cursors.items() if b == bus and t == topic and p < partitions}
    others = {was, *(b for b, t, _ in cursors if t == topic and not b.startswith(BACKFILL))} - {"", bus}
    if others and not (held and held.keys() >= set(begun)):
        return None
    return Place(bus, topic, {p: held.get(p, Cursor(0, START)) for p in range(partitions)})


async def place_of(hub: Hub, cursors: Mapping[CursorKey, Cursor], channel: str) -> str | None:
    """The place of a store's snapshot for `after` of a subscription to the channel; None while that cannot be said.

    `cursors`: those of the channel's topic (`channels.topic_of`), as shared.store_pages.Page has them.
    """
    topic = topic_of(channel)
    if not topic or not hub.history:
        return None
    stream = hub.stream(topic)
    try:
        # History does not wait for a bus that is known not to answer.
        await stream.settled(SETTLE_SECONDS)
    except Unavailable:
        return None
    place = place_of_store(cursors, topic, stream.bus, stream.partitions, stream.begun, was=stream.was)
    return None if place is None else place.text()
