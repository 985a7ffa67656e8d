"""When a feed may be connected: within the day's budget, and in market hours. No Redis, no clock."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.calendar import Sessions, sessions
from shared.errors import ConfigError
from shared.frames import NS, iso
from shared.settings import Settings, UsageSettings
from shared.usage import day_end, priced, stop_usd

# The last trades of a session are on their way for a while.
GRACE_NS = 60 * NS
BUDGET, CLOSED = "budget", "closed"
NEVER = 2**62


@dataclass(frozen=True, slots=True)
class Shut:
    """A feed must not be connected before `until_ns`. `state`: BUDGET or CLOSED.

    `ended_ns`: when the last session ended (CLOSED; 0 if there was none).
    """

    state: str
    until_ns: int
    detail: str
    ended_ns: int = 0


class Gate:
    """Whether a feed may be connected. `budget` None: it costs nothing; `calendar` empty: the market never closes.

    Raises ConfigError naming `setting` for a calendar that does not exist.
    """

    def __init__(
        self, budget: UsageSettings | None, calendar: str = "", setting: str = "", *, grace_ns: int = GRACE_NS
    ) -> None:
        self._budget, self._calendar, self._grace_ns = budget, calendar, grace_ns
        self._sessions = _sessions(calendar, setting) if calendar else None

    def until(self, now_ns: int, spent_usd: float, *, running: bool = False) -> Shut | None:
        """None while the feed may be connected; one that is running may stay a little beyond its session."""
        return self._over_budget(now_ns, spent_usd) or self._closed(now_ns, running)

    def _over_budget(self, now_ns: int, spent_usd: float) -> Shut | None:
        b = self._budget
        if b is None or spent_usd < stop_usd(b):
            return None
        until = day_end(now_ns)
        detail = (
            f"${spent_usd:.2f} spent of ${b.daily_usd:.2f} a day, stops at {b.stop_at:.0%}: goes on at {_iso(until)}"
        )
        return Shut(BUDGET, until, detail)

    def _closed(self, now_ns: int, running: bool) -> Shut | None:
        if self._sessions is None:
            return None
        at = int(np.searchsorted(self._sessions[:, 0], now_ns, "right"))
        ended = int(self._sessions[at - 1, 1]) if at else 0
        if now_ns < ended + (self._grace_ns if running else 0):
            return None
        if at == len(self._sessions):
            return Shut(CLOSED, NEVER, f"{self._calendar} is closed, and knows no later session", ended)
        opens = int(self._sessions[at, 0])
        return Shut(CLOSED, opens, f"{self._calendar} is closed: opens at {_iso(opens)}", ended)

    def opens_ns(self, ended_ns: int) -> int | None:
        """When the session behind one that ended then begins; None if there is none."""
        if self._sessions is None:
            return None
        at = int(np.searchsorted(self._sessions[:, 0], ended_ns))
        return int(self._sessions[at, 0]) if at < len(self._sessions) else None


def gate_of(settings: Settings, feed: str, calendar: str, setting: str) -> Gate:
    """A feed's gate; `setting` names its calendar. Raises ConfigError for one that does not exist."""
    return Gate(settings.usage if priced(feed, settings.usage) else None, calendar, setting)


def _sessions(calendar: str, setting: str) -> Sessions:
    try:
        return sessions(calendar)
    except ConfigError:
        raise ConfigError(
            f"unknown market calendar '{calendar}' in {setting}; pandas_market_calendars lists the names"
        ) from None


def _iso(ns: int) -> str:
    return f"{iso(ns)[:19]}Z"
