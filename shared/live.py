"""What the live API speaks over a WebSocket: JSON texts, one message each, the same for server and client.

A subscription names a channel and what of it. It begins with a `snapshot` (history of the store, perhaps none), or,
after a place that the client had reached before, with `resumed`. From there every row of the bus comes as `rows`, none
left out and none of it twice. Rows are those of the store's tables; of one key the highest revision counts. What a
slow client could not be sent in time is coalesced: of one key only the newest row, and `skipped` counts the others.
"""

from __future__ import annotations

from typing import Any

import msgspec

# Channel -> the table whose rows it has; `symbol` means a series' name, an underlying, or nothing (all).
CHANNELS = {
    "candles": "candles, candles_1m or candles_1s by timeframe",
    "pressure": "pressure_metrics",
    "rollups": "pressure_rollups",
    "signals": "signals",
    "gaps": "gaps",
    "pipeline": "",
}
# Why a connection was closed (WebSocket close codes), or a request to it refused.
CLOSE_TOO_SLOW, CLOSE_SHUTDOWN, CLOSE_TOO_MANY, CLOSE_UNAUTHORIZED = 4008, 1001, 4029, 4001


class Request(msgspec.Struct, frozen=True, tag_field="op", forbid_unknown_fields=True):
    """What a client sends."""


class Subscribe(Request, frozen=True, tag="subscribe"):
    """`sub`: the client's own name for it. `symbol`: a series (`ES`, `exchange:symbol`) or an underlying; empty is all.

    `timeframe` of candles: `rolling`, `seconds` or a length. `history`: the newest so many rows first (0: none), or all
    `since` an ISO instant. `after`: the `id` of the last message that it had, or of a REST answer: go on from there.
    """

    sub: str
    channel: str
    symbol: str = ""
    timeframe: str = ""
    history: int = 0
    since: str = ""
    after: str = ""


class Unsubscribe(Request, frozen=True, tag="unsubscribe"):
    """Ends a subscription; answered by `unsubscribed`."""

    sub: str


class Ping(Request, frozen=True, tag="ping"):
    """Answered by `pong` with the same `t`."""

    t: int | float | str = 0


class Event(msgspec.Struct, frozen=True, tag_field="op", omit_defaults=True):
    """What the server sends."""


class Snapshot(Event, frozen=True, tag="snapshot"):
    """History; what the client held of this subscription before is void. `id` is the place where the rows go on."""

    sub: str
    rows: list[dict[str, Any]]
    id: str = ""


class Resumed(Event, frozen=True, tag="resumed"):
    """The subscription goes on behind the place that the client gave."""

    sub: str
    id: str = ""


class Rows(Event, frozen=True, tag="rows"):
    """Rows as they were made, oldest first; `skipped` older ones of the same keys were left out."""

    sub: str
    rows: list[dict[str, Any]]
    id: str = ""
    skipped: int = 0


class Unsubscribed(Event, frozen=True, tag="unsubscribed"):
    sub: str


class Pong(Event, frozen=True, tag="pong"):
    t: int | float | str = 0


class Notice(Event, frozen=True, tag="notice"):
    """The subscription waits (`waiting`, for what, says `message`), or goes on (`live`)."""

    sub: str
    code: str
    message: str = ""


class Error(Event, frozen=True, tag="error"):
    """A request was refused: `code` is one word, `message` one line. `sub` is empty when it was none's."""

    code: str
    message: str
    sub: str = ""


AnyRequest = Subscribe | Unsubscribe | Ping
AnyEvent = Snapshot | Resumed | Rows | Unsubscribed | Pong | Notice | Error
