"""The feeds as their ingest tells them on the bus, and which of them are silent though they should not be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import NamedTuple

import msgspec

from shared.bus import Bus
from shared.calendar import ALWAYS, calendar_of, sessions
from shared.settings import Databento, Settings

# A feed in such a state has nothing to say, and that is in order.
RESTING = frozenset({"ended", "budget", "closed"})
STOPPED = ("down", "stopped")  # the state and detail of one whose process was asked to stop
DAY_MS = 86_400_000
# `ES` of ES.FUT, ES.c.0, ESZ4 and ESZ4 C5000.
_ROOT = re.compile(r"([A-Z0-9]+?)(?:[FGHJKMNQUVXZ]\d{1,2})?(?:[. ].*)?")


class FeedState(msgspec.Struct):
    """What ingest says of its feed: as much of it as matters to others. `at_ms`: when it said so.

    `heard_ms`: when it last brought data, or began to be expected to; 0 where ingest does not tell.
    """

    state: str
    at_ms: int
    last_event_ns: int = 0
    detail: str = ""
    heard_ms: int = 0
    worker: str = ""


class Silent(NamedTuple):
    """A silent feed, since when (ms), and why it is called so."""

    feed: str
    since_ms: int
    why: str


def states(bus: Bus) -> dict[str, FeedState]:
    """Every feed that ingest ever told of. Raises BusUnavailable."""
    found = {}
    for name, body in bus.call("hgetall", bus.keys.feeds).items():
        try:
            found[name.decode()] = msgspec.json.decode(body, type=FeedState)
        except msgspec.DecodeError:
            continue  # somebody else's mistake must not end a watch
    return found


def rests(feed: FeedState) -> bool:
    """Whether a feed has nothing to say by intent, or its process was asked to stop."""
    return feed.state in RESTING or (feed.state, feed.detail) == STOPPED


def silent(feeds: Mapping[str, FeedState], settings: Settings, now_ms: int) -> list[Silent]:
    """Those that have brought nothing for alerts.silent_seconds though their market is open.

    Judged by when data came, not by its time: a recorded tape is no silent feed, nor one whose heartbeats alone move
    time on.
    """
    patience = settings.alerts.silent_seconds * 1000
    found = []
    for name, feed in sorted(feeds.items()):
        at = feed.at_ms
        if rests(feed) or now_ms - at > DAY_MS:
            continue
        opened = opened_ms(name, settings, now_ms)
        if opened is None:
            continue
        gone = max(at, opened)
        heard = max(feed.heard_ms or at, opened)
        if now_ms - gone > patience:
            found.append(Silent(name, gone, f"its process has not been seen since {_instant(gone)}"))
        elif now_ms - heard > patience:
            found.append(Silent(name, heard, f"nothing new since {_instant(heard)}"))
    return found


def in_session(feed: str, settings: Settings, now_ms: int) -> bool:
    """Whether the market of a feed is open now."""
    return opened_ms(feed, settings, now_ms) is not None


def opened_ms(feed: str, settings: Settings, now_ms: int) -> int | None:
    """Since when the market of a feed is open: 0 always, None not now.

    Its calendar is that of its `hours`; without, Databento's are those of its symbols, and others never close.
    """
    opened: list[int] = []
    now_ns = now_ms * 1_000_000
    for name in _calendars(feed.partition(":")[0], settings):
        if name == ALWAYS:
            return 0
        spans = sessions(name)
        at = int(spans[:, 0].searchsorted(now_ns, "right")) - 1
        if at >= 0 and now_ns < int(spans[at, 1]):
            opened.append(int(spans[at, 0]) // 1_000_000)
    return min(opened, default=None)


def _calendars(vendor: str, settings: Settings) -> set[str]:
    hours = {"databento": settings.databento.hours, "tardis": settings.tardis.hours}.get(vendor)
    if hours:
        return {hours}
    if vendor != "databento":
        return {ALWAYS}
    d = settings.databento
    return {calendar_of(d.dataset, _root(symbol, d), settings.aggregate.calendars) for symbol in d.symbols}


def _root(symbol: str, settings: Databento) -> str:
    found = _ROOT.fullmatch(symbol)
    root = found[1] if found else symbol
    return next((whose for pattern, whose in settings.option_roots.items() if fnmatchcase(root, pattern)), root)


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
