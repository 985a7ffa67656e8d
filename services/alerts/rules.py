"""What becomes an alert: signals and operational events, by the settings' rules. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from shared.alerts import EVENTS, subject_of
from shared.messages import Signal
from shared.settings import AlertRule, AlertSettings

# Without rules: the severity of a signal's grade; lower grades alert nobody.
DEFAULT_GRADES = {"HIGH": "INFO", "VERY_HIGH": "WARNING", "EXTREME": "CRITICAL"}


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that a rule wants told. (`key`, `type`) is what folds; `at_ms` when it happened (market time of a
    signal), `window` the signal's window (0: none), `channels` in order.
    """

    key: str
    type: str
    severity: str
    channels: tuple[str, ...]
    at_ms: int
    title: str
    text: str
    subject: str = ""
    window: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """An operational event of one of the kinds of `shared.alerts.EVENTS`; `key` is what it is about."""

    event: str
    key: str
    at_ms: int
    title: str
    text: str = ""


def of_signal(signal: Signal, settings: AlertSettings) -> Happening | None:
    """None for a signal that no rule wants, or that is not `emitted`."""
    if signal.status != "emitted":
        return None
    chosen = _default(DEFAULT_GRADES.get(signal.grade), settings)
    if settings.rules:
        chosen = _chosen(next((rule for rule in settings.rules if _wants(rule, signal)), None), settings)
    if chosen is None:
        return None
    severity, channels = chosen
    about = subject(signal)
    at = instant(signal.time_window_ns // 1_000_000)
    said = [f"score {signal.score:.2f}", f"window of {signal.window_sec} s from {at}"]
    for name, value in (("volume", signal.volume), ("premium", signal.premium), ("price", signal.underlying_price)):
        if value is not None:
            said.append(f"{name} {value:,.10g}")
    if len(signal.types) > 1:
        said.append(f"also {', '.join(signal.types[1:])}")
    if not signal.complete:
        said.append("the window has a gap")
    details = {
        "underlying": signal.underlying, "strike": signal.strike or None, "option_type": signal.option_type or None,
        "expiration": instant(signal.expiration_ns // 1_000_000) if signal.expiration_ns else None, "window": at,
        "window_sec": signal.window_sec, "direction": signal.direction, "grade": signal.grade, "score": signal.score,
        "types": list(signal.types) or [signal.signal_type], "source": signal.source,
    }  # fmt: skip
    return Happening(
        f"{about} {signal.direction}", signal.signal_type, severity, channels, signal.time_window_ns // 1_000_000,
        f"{signal.grade} {signal.signal_type}: {signal.direction} {about}", "; ".join(said), about,
        signal.time_window_ns, details,
    )  # fmt: skip


def of_event(event: Event, settings: AlertSettings) -> Happening | None:
    """None for an event that no rule wants."""
    chosen = _default(EVENTS[event.event], settings)
    if settings.rules:
        chosen = _chosen(next((rule for rule in settings.rules if _watches(rule, event)), None), settings)
    if chosen is None:
        return None
    return Happening(event.key, event.event, *chosen, event.at_ms, event.title, event.text, event.key)


def subject(signal: Signal) -> str:
    """What a signal is about, see shared.alerts."""
    s = signal
    return subject_of(s.underlying, s.expiration_ns, s.option_type, s.strike, s.source)


def _default(severity: str | None, settings: AlertSettings) -> tuple[str, tuple[str, ...]] | None:
    return (severity, tuple(settings.channels)) if severity else None


def _chosen(rule: AlertRule | None, settings: AlertSettings) -> tuple[str, tuple[str, ...]] | None:
    return (rule.severity, tuple(dict.fromkeys(rule.channels)) or tuple(settings.channels)) if rule else None


def _wants(rule: AlertRule, signal: Signal) -> bool:
    """A rule that names events only is about no signal."""
    if rule.events and not (rule.grades or rule.types or rule.underlyings):
        return False
    return (
        (not rule.grades or signal.grade in rule.grades)
        and (not rule.types or not {signal.signal_type, *signal.types}.isdisjoint(rule.types))
        and (not rule.underlyings or signal.underlying in rule.underlyings)
    )


def _watches(rule: AlertRule, event: Event) -> bool:
    """A rule that names grades, types or underlyings only is about no event."""
    if rule.events:
        return event.event in rule.events
    return not (rule.grades or rule.types or rule.underlyings)


def instant(ms: int) -> str:
    """`2023-12-25T23:00:00Z`."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
