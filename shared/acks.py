"""Acknowledgements: of alerts, and of signals; by whom, and for signals when. Kept on the bus.

Who acknowledges an alert only leaves a note; the alerts worker takes it when it commits.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import msgspec

from shared.alerts import Alert, subject_of
from shared.bus import Bus
from shared.errors import ConfigError, TapelineError
from shared.frames import iso
from shared.instants import instant_ns

MOST_KEPT = 10_000
# So many of the oldest go at once, so that not every acknowledgement beyond the bound reads all of them.
_GO = 100


class SignalKey(NamedTuple):
    """The key of a signal; instants in ns."""

    underlying: str
    expiration_ns: int
    strike: float
    option_type: str
    time_window_ns: int
    source: str

    @property
    def subject(self) -> str:
        """What an alert of it is about."""
        return subject_of(self.underlying, self.expiration_ns, self.option_type, self.strike, self.source)


class SignalAck(msgspec.Struct, frozen=True):
    """A signal that somebody has seen: its key as the stores tell it, and who it was, when."""

    underlying: str
    expiration: str
    strike: float
    option_type: str
    time_window: str
    source: str
    by: str
    at: str


def alerts_of(bus: Bus) -> list[Alert]:
    """The alerts as committed, oldest first, with acknowledgements that the worker has not taken yet."""
    acks = {k.decode(): v.decode() for k, v in bus.call("hgetall", bus.keys.alerts("acks")).items()}
    found = []
    for body in bus.call("hvals", bus.keys.alerts("open")):
        alert = msgspec.json.decode(body, type=Alert)
        if alert.id in acks and not alert.acked_by:
            alert = msgspec.structs.replace(alert, acked_by=acks[alert.id])
        found.append(alert)
    return sorted(found, key=lambda a: (a.first_ms, a.id))


def find_alert(bus: Bus, start: str) -> Alert:
    """The one alert whose id begins so. Raises TapelineError for none or several."""
    found = [alert for alert in alerts_of(bus) if start and alert.id.startswith(start)]
    if len(found) != 1:
        what = "several alerts begin" if found else "no alert begins"
        raise TapelineError(f"{what} with '{start}'; `tapeline alerts list --all` shows them")
    return found[0]


def ack_alert(bus: Bus, alert: Alert, by: str) -> None:
    """An alert that is acknowledged is not escalated, nor delivered to whoever has not got it yet."""
    bus.call("hset", bus.keys.alerts("acks"), alert.id, by)


def signal_key(
    underlying: str, expiration: str | None, strike: float | None, option_type: str | None, time_window: str,
    source: str,
) -> SignalKey:  # fmt: skip
    """The key of a signal's row as a store or an answer tells it. Raises ConfigError for what is no instant."""
    expires = _ns(expiration) if expiration else 0
    return SignalKey(underlying, expires, float(strike or 0.0), option_type or "", _ns(time_window), source)


def ack_signal(bus: Bus, key: SignalKey, by: str) -> SignalAck:
    """Acknowledge a signal, and the alerts that cover its window. The newest MOST_KEPT are kept."""
    ack = SignalAck(
        key.underlying, _text(key.expiration_ns), key.strike, key.option_type, _text(key.time_window_ns), key.source,
        by, _text(time.time_ns()),
    )  # fmt: skip
    bus.call("hset", bus.keys.signal_acks, msgspec.json.encode(key), msgspec.json.encode(ack))
    if int(bus.call("hlen", bus.keys.signal_acks)) > MOST_KEPT:
        held = sorted(bus.call("hgetall", bus.keys.signal_acks).items(), key=lambda item: _ack(item[1]).at)
        bus.call("hdel", bus.keys.signal_acks, *(name for name, _ in held[: len(held) - MOST_KEPT + _GO]))
    for alert in alerts_of(bus):
        if alert.subject == key.subject and key.time_window_ns in alert.windows and not alert.acked_by:
            ack_alert(bus, alert, by)
    return ack


def signal_acks(bus: Bus) -> list[SignalAck]:
    """All that are kept, oldest first."""
    return sorted((_ack(body) for body in bus.call("hvals", bus.keys.signal_acks)), key=lambda ack: ack.at)


def _ack(body: Any) -> SignalAck:
    return msgspec.json.decode(body, type=SignalAck)


def _ns(text: str) -> int:
    try:
        return instant_ns(text)
    except ValueError:
        raise ConfigError(f"'{text}' is no instant; write 2023-12-25T23:01:00Z") from None


def _text(ns: int) -> str:
    return iso(ns)[:19] + "Z"
