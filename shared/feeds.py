"""The feeds as their ingest tells them on the bus, and which of them are silent though they should not be."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from shared.bus import Bus
from shared.calendar import sessions
from shared.settings import Settings

# A feed in such a state has nothing to say, and that is in order.
RESTING = frozenset({"ended", "budget", "closed"})
DAY_MS = 86_400_000


class FeedState(msgspec.Struct):
    """What ingest says of its feed: as much of it as matters to others. `at_ms`: when it said so."""

    state: str
    at_ms: int
    last_event_ns: int = 0
    detail: str = ""


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


class Silence:
    """Looks at the feeds again and again. Events of a feed are judged by their moving on, not by their time, so that
    a recorded tape is no silent feed; what was seen is kept in memory only.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._moved: dict[str, tuple[int, int]] = {}  # feed -> (newest event, since when it stands there)

    def of(self, feeds: Mapping[str, FeedState], now_ms: int) -> list[Silent]:
        """Those that have said nothing for alerts.silent_seconds though their market is open."""
        patience = self._settings.alerts.silent_seconds * 1000
        found = []
        for name, feed in sorted(feeds.items()):
            at, newest = feed.at_ms, feed.last_event_ns
            resting = feed.state in RESTING or now_ms - at > DAY_MS or not in_session(name, self._settings, now_ms)
            moved = self._moved.get(name)
            if moved is None or moved[0] != newest or resting:
                moved = self._moved[name] = (newest, now_ms)
            if resting or now_ms - min(at, moved[1]) <= patience:
                continue
            if now_ms - at > patience:
                found.append(Silent(name, at, f"its process has not been seen since {_instant(at)}"))
            else:
                found.append(Silent(name, moved[1], f"nothing new since {_instant(moved[1])}"))
        return found


def in_session(feed: str, settings: Settings, now_ms: int) -> bool:
    """Whether a feed should be connected: always, unless its `hours` name a calendar that is closed now."""
    hours = {"databento": settings.databento.hours, "tardis": settings.tardis.hours}
    name = hours.get(feed.partition(":")[0], "")
    if not name:
        return True
    spans, now_ns = sessions(name), now_ms * 1_000_000
    at = int(spans[:, 0].searchsorted(now_ns, "right")) - 1
    return at >= 0 and now_ns < int(spans[at, 1])


def _instant(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
