"""The alerts themselves: folding, the hour's limits, deliveries, escalation, acknowledgements. Pure.

The core knows no Redis, no channel and no clock: it is told the time, what the market and the operation say, and
what became of deliveries; it answers with alerts and with what to deliver. Rules that hold:

- the same (key, type) within `fold_seconds` of the first is that alert, counted; a graver repeat raises its severity
  and is said again;
- of each severity at most so many are told in any hour (`SEVERITIES`). What is over it is recorded as suppressed, and
  told once, by number, when there is room again, at most once an hour a severity;
- an EMERGENCY goes to its first channel, and each `escalate_seconds` without acknowledgement (at once if a channel
  refuses it) to the next, until none is left; all other severities go to all channels;
- every channel gets a round of an alert once; an acknowledged alert is not delivered any further.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from services.alerts.rules import Event, Happening, instant, of_event, of_signal, subject
from shared.alerts import DROPPED, PENDING, REFUSED, SEVERITIES, Alert, Delivery
from shared.messages import Signal
from shared.settings import AlertSettings

HOUR_MS = 3_600_000
MAX_ALERTS = 1000
MAX_NOTES = 10
MAX_WINDOWS = 50
RANK = {name: rank for rank, name in enumerate(SEVERITIES)}


class Count(NamedTuple):
    """A counter whose growth is an event; several of the same event and key (`name` tells them apart) add up."""

    name: str
    event: str
    key: str
    value: int
    text: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the operation: what is wrong just now, and how far the counters are."""

    conditions: tuple[Event, ...] = ()
    counts: tuple[Count, ...] = ()


class Job(NamedTuple):
    """A delivery to make."""

    alert: str
    channel: str
    round: int


class Result(NamedTuple):
    """What became of one attempt at a job: SENT, REFUSED for good, or PENDING (failed, to be tried again)."""

    job: Job
    state: str
    reason: str = ""


class Held(msgspec.Struct):
    """Alerts of one severity that were over the limit and not yet told of."""

    types: dict[str, int] = {}
    channels: list[str] = []


class Memory(msgspec.Struct):
    """What is kept beside the alerts. `told`: severity -> when (ms), within the last hour. `conditions`: what is
    wrong -> its alert (empty: no rule wanted it). `counts`: counters as last seen; None before the first look.
    `unsent`: deliveries given up because the outbox was full.
    """

    told: dict[str, list[int]] = {}
    held: dict[str, Held] = {}
    summed: dict[str, int] = {}
    conditions: dict[str, str] = {}
    counts: dict[str, int] | None = None
    unsent: int = 0


@dataclass(slots=True)
class Outcome:
    """Of one step: new alerts (suppressed ones included), new deliveries, deliveries lost to the outbox's bound."""

    alerts: list[Alert] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    lost: int = 0


class AlertCore:
    """All alerts of a deployment; `memory` and `alerts` are what is committed."""

    def __init__(self, settings: AlertSettings, memory: Memory | None = None, alerts: Iterable[Alert] = ()) -> None:
        self.settings = settings
        self.memory = memory or Memory()
        self.alerts: dict[str, Alert] = {}
        self._newest: dict[tuple[str, str], str] = {}
        self._about: dict[str, set[str]] = {}
        self._dirty: set[str] = set()
        self._gone: set[str] = set()
        self._before = msgspec.json.encode(self.memory)
        self._out = Outcome()
        self._now = 0
        for alert in sorted(alerts, key=_order):
            self._now = max(self._now, alert.last_ms)
            self._add(alert)

    @classmethod
    def restore(cls, settings: AlertSettings, memory: bytes | None, alerts: Iterable[bytes]) -> AlertCore:
        """The core of what was committed. Alerts are JSON of `shared.alerts.Alert`."""
        return cls(
            settings,
            msgspec.json.decode(memory, type=Memory) if memory else None,
            [msgspec.json.decode(body, type=Alert) for body in alerts],
        )

    def changes(self) -> tuple[bytes | None, dict[str, bytes], list[str]]:
        """(memory, changed alerts, ids of removed alerts) since the last call; memory None when unchanged."""
        memory = msgspec.json.encode(self.memory)
        changed = {i: msgspec.json.encode(self.alerts[i]) for i in sorted(self._dirty) if i in self.alerts}
        gone = sorted(self._gone)
        known = self._before
        self._before, self._dirty, self._gone = memory, set(), set()
        return (memory if memory != known else None), changed, gone

    def jobs(self) -> list[Job]:
        """Every delivery that waits, the oldest alert's first."""
        waiting = sorted((a for a in self.alerts.values() if a.waiting), key=_order)
        return [Job(a.id, d.channel, d.round) for a in waiting for d in a.deliveries if d.state == PENDING]

    def step(
        self,
        now_ms: int,
        *,
        signals: Iterable[Signal] = (),
        seen: Seen | None = None,
        acks: Mapping[str, str] | None = None,
        results: Iterable[Result] = (),
    ) -> Outcome:
        """One step at `now_ms` (a clock that went back is taken to stand still). `acks`: alert id -> by whom."""
        now = self._now = max(self._now, now_ms)
        out = self._out = Outcome()
        for severity, times in self.memory.told.items():
            self.memory.told[severity] = [t for t in times if t > now - HOUR_MS]
        for result in results:
            self._result(result, now)
        for alert_id, by in (acks or {}).items():
            self._acknowledge(alert_id, by, now)
        self._sum_up(now)  # before what is new, which could take the room again and again
        for signal in signals:
            self._signal(signal, now)
        if seen is not None:
            self._look(seen, now)
        self._escalate(now)
        self._prune()
        waiting = set(self.jobs()) if out.jobs else set()
        out.jobs = [job for job in out.jobs if job in waiting]
        return out

    # -- what happens --------------------------------------------------------------------------

    def _signal(self, signal: Signal, now: int) -> None:
        happening = of_signal(signal, self.settings)
        if happening is not None:
            self._raise(happening, now)
        elif signal.status != "emitted":
            for alert in [self.alerts[i] for i in sorted(self._about.get(subject(signal), ()))]:
                if signal.time_window_ns in alert.windows:
                    why = f": {signal.reason}" if signal.reason else ""
                    at = instant(signal.time_window_ns // 1_000_000)
                    self._note(alert, f"the signal of {at} is {signal.status} now{why}")

    def _look(self, seen: Seen, now: int) -> None:
        held = self.memory.conditions
        wrong = {f"{event.event} {event.key}": event for event in seen.conditions}
        for name in [name for name in held if name not in wrong]:
            told = self.alerts.get(held.pop(name))
            if told is not None:
                self._note(told, f"over at {instant(now)}")
        for name, event in wrong.items():
            if name not in held:
                held[name] = self._event(event, now)
        before = self.memory.counts
        grown: dict[tuple[str, str], tuple[int, str]] = {}
        for count in seen.counts:
            more = count.value - before.get(count.name, 0) if before is not None else 0
            if more > 0:
                total, _ = grown.get((count.event, count.key), (0, ""))
                grown[count.event, count.key] = total + more, count.text
        for (kind, key), (more, text) in grown.items():
            self._event(Event(kind, key, now, f"{more} more {text}"), now)
        self.memory.counts = {count.name: count.value for count in seen.counts}

    def _event(self, event: Event, now: int) -> str:
        """The id of the alert that it became or was folded into; empty when no rule wants it."""
        happening = of_event(event, self.settings)
        return self._raise(happening, now) if happening else ""

    def _raise(self, h: Happening, now: int) -> str:
        alert_id = _id(h)
        newest = self.alerts.get(self._newest.get((h.key, h.type), ""))
        if newest is not None and now - newest.first_ms < self.settings.fold_seconds * 1000:
            self._again(newest, h, now)
            return newest.id
        if alert_id in self.alerts:  # told already: the same thing, read again or revised
            self._again(self.alerts[alert_id], h, now)
            return alert_id
        alert = Alert(
            alert_id, h.key, h.type, h.severity, h.title, h.text, h.at_ms, now, now, subject=h.subject,
            windows=(h.window,) if h.window else (), details=h.details,
        )  # fmt: skip
        self._add(alert)
        self._dirty.add(alert_id)
        if self._room(h.severity):
            self._tell(alert, h.channels, now)
        else:
            self._hold(h)
            self._put(replace(alert, suppressed=True))
        self._out.alerts.append(self.alerts[alert_id])
        return alert_id

    def _again(self, alert: Alert, h: Happening, now: int) -> None:
        """A repeat: counted (but not a revision of a window that is counted), and said again if it is graver."""
        if not h.window or h.window not in alert.windows:
            windows = (*alert.windows, h.window)[-MAX_WINDOWS:] if h.window else alert.windows
            alert = replace(alert, count=alert.count + 1, last_ms=now, windows=windows)
        if RANK[h.severity] > RANK[alert.severity]:
            alert = replace(alert, severity=h.severity, title=h.title, text=h.text, details=h.details)
            if self._room(h.severity):
                again = f"said again as {h.severity}"
                deliveries = tuple(_end(d, DROPPED, again, now) for d in alert.deliveries)
                alert = replace(alert, deliveries=deliveries, suppressed=False, acked_by="", acked_ms=0)
                self._tell(alert, h.channels, now)
                return
            self._hold(h)
        self._put(alert)

    # -- telling -------------------------------------------------------------------------------

    def _room(self, severity: str) -> bool:
        return len(self.memory.told.get(severity, ())) < SEVERITIES[severity]

    def _hold(self, h: Happening) -> None:
        held = self.memory.held.setdefault(h.severity, Held())
        held.types[h.type] = held.types.get(h.type, 0) + 1
        held.channels += [channel for channel in h.channels if channel not in held.channels]

    def _tell(self, alert: Alert, channels: tuple[str, ...], now: int) -> None:
        """Put it into the outbox: for all channels, an EMERGENCY for the first."""
        self.memory.told.setdefault(alert.severity, []).append(now)
        first = channels[:1] if alert.severity == "EMERGENCY" else channels
        self._deliver(alert, first, channels[len(first) :], now)

    def _deliver(self, alert: Alert, channels: tuple[str, ...], later: tuple[str, ...], now: int) -> None:
        number = max((d.round for d in alert.deliveries), default=-1) + 1
        deliveries = (*alert.deliveries, *(Delivery(channel, number) for channel in channels))
        at = now + self.settings.escalate_seconds * 1000 if later else 0
        self._put(replace(alert, deliveries=deliveries, escalate_to=later, escalate_ms=at))
        self._out.jobs += [Job(alert.id, channel, number) for channel in channels]

    def _escalate(self, now: int) -> None:
        due = [a for a in self.alerts.values() if 0 < a.escalate_ms <= now]
        for alert in sorted(due, key=_order):
            following, *later = alert.escalate_to
            noted = replace(alert, notes=_noted(alert, f"escalated to {following}"))
            self._deliver(noted, (following,), tuple(later), now)

    def _sum_up(self, now: int) -> None:
        """Say what was over a limit, once there is room."""
        for severity in [s for s in self.memory.held if self._room(s)]:
            if now - self.memory.summed.get(severity, -HOUR_MS) < HOUR_MS:
                continue
            held = self.memory.held.pop(severity)
            self.memory.summed[severity] = now
            types = ", ".join(f"{kind} {count}" for kind, count in Counter(held.types).most_common())
            channels = tuple(c for c in self.settings.channels if c in held.channels)
            alert = Alert(
                _hash("limit", severity, now), f"limit {severity}", "suppressed", severity,
                f"{sum(held.types.values())} {severity} alerts were suppressed",
                f"more than {SEVERITIES[severity]} in an hour: {types}; `tapeline alerts list --all` shows them",
                now, now, now, subject="limit",
            )  # fmt: skip
            self._add(alert)
            self._dirty.add(alert.id)
            self._tell(alert, channels, now)
            self._out.alerts.append(self.alerts[alert.id])

    # -- what became of it ---------------------------------------------------------------------

    def _result(self, result: Result, now: int) -> None:
        alert = self.alerts.get(result.job.alert)
        if alert is None:
            return
        refused = False
        deliveries = []
        for d in alert.deliveries:
            # One that was dropped while it was under way has arrived all the same.
            if (d.channel, d.round) == result.job[1:] and d.state in (PENDING, DROPPED):
                ended = result.state != PENDING
                if ended or d.state == PENDING:
                    at = now if ended else 0
                    d = replace(  # noqa: PLW2901
                        d, state=result.state, attempts=d.attempts + 1, reason=result.reason, at_ms=at
                    )
                    refused |= d.state == REFUSED
            deliveries.append(d)
        alert = replace(alert, deliveries=tuple(deliveries))
        if refused and alert.escalate_ms:
            alert = replace(alert, escalate_ms=now)
        self._put(alert)

    def _acknowledge(self, alert_id: str, by: str, now: int) -> None:
        alert = self.alerts.get(alert_id)
        if alert is not None and not alert.acked_ms:
            deliveries = tuple(_end(d, DROPPED, "acknowledged", now) for d in alert.deliveries)
            self._put(replace(alert, acked_by=by, acked_ms=now, escalate_to=(), escalate_ms=0, deliveries=deliveries))

    # -- records -------------------------------------------------------------------------------

    def _add(self, alert: Alert) -> None:
        """An alert that is not known here; channels that the settings no longer have get nothing more."""
        self.alerts[alert.id] = alert
        self._newest[alert.key, alert.type] = alert.id
        self._about.setdefault(alert.subject, set()).add(alert.id)
        gone = {d.channel for d in alert.deliveries if d.channel not in self.settings.channels}
        later = tuple(c for c in alert.escalate_to if c in self.settings.channels)
        if gone or later != alert.escalate_to:
            why = "the channel is not configured any more"
            deliveries = tuple(_end(d, DROPPED, why, self._now) if d.channel in gone else d for d in alert.deliveries)
            at = alert.escalate_ms if later else 0
            self._put(replace(alert, deliveries=deliveries, escalate_to=later, escalate_ms=at))

    def _put(self, alert: Alert) -> None:
        if self.alerts.get(alert.id) != alert:
            self.alerts[alert.id] = alert
            self._dirty.add(alert.id)
            self._gone.discard(alert.id)

    def _note(self, alert: Alert, note: str) -> None:
        if not alert.notes or alert.notes[-1] != note:
            self._put(replace(alert, notes=_noted(alert, note)))

    def _prune(self) -> None:
        """Keep the newest MAX_ALERTS; those that still wait for a channel leave last, and are counted."""
        over = len(self.alerts) - MAX_ALERTS
        if over <= 0:
            return
        in_turn = sorted(self.alerts.values(), key=lambda a: (a.waiting or a.escalate_ms > 0, _order(a)))
        for alert in in_turn[:over]:
            del self.alerts[alert.id]
            self._gone.add(alert.id)
            self._about[alert.subject].discard(alert.id)
            if not self._about[alert.subject]:
                del self._about[alert.subject]
            if self._newest.get((alert.key, alert.type)) == alert.id:
                del self._newest[alert.key, alert.type]
            self._out.lost += sum(d.state == PENDING for d in alert.deliveries)
        self.memory.unsent += self._out.lost


def _order(alert: Alert) -> tuple[int, str]:
    """The oldest first; no other order survives a restart."""
    return alert.first_ms, alert.id


def _end(delivery: Delivery, state: str, reason: str, now: int) -> Delivery:
    return replace(delivery, state=state, reason=reason, at_ms=now) if delivery.state == PENDING else delivery


def _noted(alert: Alert, note: str) -> tuple[str, ...]:
    return (*alert.notes, note)[-MAX_NOTES:]


def _id(h: Happening) -> str:
    return _hash(h.key, h.type, h.at_ms)


def _hash(key: str, kind: str, at_ms: int) -> str:
    """Stable id of an alert: of (key, type, first time), so that the same one is never two."""
    return hashlib.blake2b(f"{key}\0{kind}\0{at_ms}".encode(), digest_size=8).hexdigest()
