"""Alerts: the words their settings may use, and the records that the alerts worker keeps on the bus.

Times are ms UTC by Redis's clock, but for those that come from the market (`at_ms` of a signal's alert).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    from shared.settings import AlertSettings

# Severity -> most alerts in any hour, in rising order.
SEVERITIES = {"INFO": 60, "WARNING": 30, "CRITICAL": 12, "EMERGENCY": 6}
GRADES = ("MODERATE", "HIGH", "VERY_HIGH", "EXTREME")
TYPES = ("institutional_flow", "pressure_spike", "volume_anomaly", "order_imbalance", "sweep", "block")
EVENTS = {
    "feed_silent": "CRITICAL", "gap": "WARNING", "budget": "CRITICAL", "backlog": "WARNING", "dead_letters": "WARNING",
    "worker": "CRITICAL",
}  # fmt: skip
WEBHOOK = ("http", "https")
# What is known of a delivery: waiting for its channel, or ended in one of these ways.
PENDING, SENT, REFUSED, DROPPED = "pending", "sent", "refused", "dropped"

_NAME = re.compile(r"[\w-]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S")


class Delivery(msgspec.Struct, frozen=True, omit_defaults=True):
    """One alert on its way to one channel. `round`: 0 at first, higher when the alert was said again.

    `reason`: why it was refused or dropped, or why the last attempt failed. `at_ms`: when it ended.
    """

    channel: str
    round: int = 0
    state: str = PENDING
    attempts: int = 0
    reason: str = ""
    at_ms: int = 0


class Alert(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of one alert.

    `subject`: what it is about, `key` the same with the direction of a signal; (`key`, `type`) is what folds.
    `at_ms`: when it happened, `first_ms` and `last_ms`: when it was raised and last repeated; `count` with the
    repeats. `windows`: start (ns) of the signal windows in it. `suppressed`: over the hour's limit, told to nobody.
    `escalate_ms`: when it goes to the first channel of `escalate_to` unless acknowledged; 0 never.
    """

    id: str
    key: str
    type: str
    severity: str
    title: str
    text: str
    at_ms: int
    first_ms: int
    last_ms: int
    subject: str = ""
    count: int = 1
    windows: tuple[int, ...] = ()
    deliveries: tuple[Delivery, ...] = ()
    suppressed: bool = False
    escalate_to: tuple[str, ...] = ()
    escalate_ms: int = 0
    acked_by: str = ""
    acked_ms: int = 0
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = {}

    @property
    def waiting(self) -> bool:
        """Whether some channel has not got it yet."""
        return any(d.state == PENDING for d in self.deliveries)


def subject_of(underlying: str, expiration_ns: int, option_type: str, strike: float, source: str) -> str:
    """What a signal is about, whichever its direction: `NQ 2023-12-29 C 17000`; a plug-in's also names its source."""
    parts = [underlying]
    if expiration_ns:
        parts.append(datetime.fromtimestamp(expiration_ns // 10**9, UTC).strftime("%Y-%m-%d"))
    if option_type:
        parts += [option_type, f"{strike:.10g}"]
    if source != "tapeline":
        parts.append(f"({source})")
    return " ".join(parts)


def fault(settings: AlertSettings, plugins: bool) -> tuple[str, str] | None:
    """(setting, what it must be) of the first thing wrong with the alert settings; never holds a URL.

    `plugins`: signals may come from plug-ins, whose types nobody knows here.
    """
    for name, url in settings.channels.items():
        problem = _channel_fault(name, url)
        if problem:
            return f"alerts.channels.{name}" if _NAME.fullmatch(name) else "alerts.channels", problem
    for i, rule in enumerate(settings.rules):
        lists: list[tuple[str, Iterable[str], Iterable[str], bool]] = [
            ("severity", (rule.severity,), SEVERITIES, False),
            ("channels", rule.channels, settings.channels, False),
            ("grades", rule.grades, GRADES, False),
            ("types", rule.types, TYPES, plugins),
            ("events", rule.events, EVENTS, False),
        ]
        for field, given, known, open_ended in lists:
            strange = [] if open_ended else [word for word in given if word not in known]
            if strange:
                there = ", ".join(known) or "none, [alerts] channels is empty"
                said = "a URL" if "://" in strange[0] else f"'{strange[0]}'"
                return f"alerts.rules[{i}].{field}", f"of those there are ({there}), not {said}"
    numbers = [
        (settings.fold_seconds >= 0, "fold_seconds", "0 (never fold) or more"),
        (settings.escalate_seconds >= 1, "escalate_seconds", "at least 1"),
        (settings.silent_seconds > 0, "silent_seconds", "above 0"),
        (settings.backlog_seconds > 0, "backlog_seconds", "above 0"),
        (settings.retry_max_seconds > 0, "retry_max_seconds", "above 0"),
    ]
    return next(((f"alerts.{name}", want) for fine, name, want in numbers if not fine), None)


def _channel_fault(name: str, url: str) -> str:
    if not _NAME.fullmatch(name):
        return "names of letters, digits, _ and - with a URL each"
    if not _SCHEME.match(url):
        return "a URL (https://… or any that apprise takes)"
    if scheme(url) in WEBHOOK:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - raises for what is no port
        except ValueError:
            return "a URL with a sound host and port"
        if not parts.hostname or re.search(r"[\s\x00-\x20]", url):
            return "a URL with a host and without spaces"
    return ""


def scheme(url: str) -> str:
    """`https` of `https://…`, in small letters."""
    return url.partition("://")[0].lower()


def split_channels(text: str) -> dict[str, str] | None:
    """Channels of `ops=https://…,x=json://…`; a comma that no `NAME=SCHEME://` follows belongs to the URL.

    None when it is not so written.
    """
    found: dict[str, str] = {}
    for part in re.split(r",\s*(?=[\w-]+\s*=\s*[A-Za-z][A-Za-z0-9+.-]*://)", text.strip()):
        name, equals, url = part.partition("=")
        if part.strip() and not (equals and name.strip()):
            return None
        if part.strip():
            found[name.strip()] = url.strip().removesuffix(",")
    return found
