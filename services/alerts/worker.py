"""The alerts service: signals and the state of the operation in, messages to people out (the shell around `core`).

One process of a deployment is active, by the lease of stage `alerts` on partition 0; others stand by. Each turn reads
the `signals` streams of all partitions, steps the core and commits alerts, deliveries and read positions in one
script; only what is committed is delivered.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from services.alerts.channels import Channel, Message, message_of, open_channel
from services.alerts.core import AlertCore, Job, Seen
from services.alerts.outbox import Outbox
from services.alerts.watch import NAME, Watch
from shared import faults, metrics
from shared.alerts import EVENTS, TYPES
from shared.bus import Bus, sound, worker_id
from shared.errors import BusUnavailable, ConfigError, Fenced, TapelineError
from shared.frames import Frame
from shared.heartbeat import beat, leave, redis_now_ms
from shared.messages import Signal, decode
from shared.outage import Outage
from shared.progress import Progress
from shared.settings import Settings
from shared.worker import wait_for_bus

log = logging.getLogger(__name__)

TOPIC = "signals"
READ_FRAMES = 100
TURN_SECONDS = 0.25
LOOK_SECONDS = 1.0
TRIM_SECONDS = 5.0
# Of its time, at most this share goes into looking: with very many partitions it looks more seldom.
SHARE = 0.2
STOP_SECONDS = 3.0
KINDS = frozenset((*TYPES, *EVENTS, "suppressed"))  # told one by one; a plug-in's types are without bound


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:
    """Service entry: alert until stopped. Raises ConfigError when no channel is configured, or one cannot be used."""
    if args:
        raise ConfigError(f"alerts takes no arguments, got {' '.join(args)}")
    if not settings.alerts.channels:
        raise ConfigError("no alert channel is configured: set alerts.channels, or TAPELINE_ALERTS_CHANNELS=NAME=URL")
    channels = {name: open_channel(settings, name) for name in settings.alerts.channels}
    bus = wait_for_bus(settings, stop)
    if bus is None:
        return
    lease = Lease(bus, settings, stop)
    metrics.follow(lease.progress)
    lease.goes_on()
    lease.thread.start()
    try:
        while not stop.is_set():
            lease.goes_on()
            token = lease.wait(0.5)
            if token:
                Leader(bus, settings, channels, lease, token).run(stop)
    finally:
        lease.end()
        bus.close()
    if lease.failed is not None:
        raise lease.failed


class Lease:
    """Takes and renews the lease, and says that this process lives, on a thread of its own."""

    def __init__(self, bus: Bus, settings: Settings, stop: threading.Event) -> None:
        self._bus, self._stop = bus.clone(), stop
        self._ttl_ms = int(settings.redis.lease_seconds * 1000)
        self._changed = threading.Condition()
        self._worker = worker_id(NAME)
        self._sure_until = 0.0
        self.token: str | None = None
        self.failed: TapelineError | None = None
        self.detail = ""
        self.progress = Progress()
        self.outage = Outage(log)
        self._over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="alerts-lease", daemon=True)

    def wait(self, seconds: float) -> str | None:
        """The token, once there is one within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.token is not None or self._stop.is_set(), seconds)
            return self.token

    def sure(self) -> bool:
        """Whether nobody else can have the lease: a process that slept does not send before it has asked."""
        return self.token is not None and time.monotonic() < self._sure_until

    def goes_on(self) -> None:
        """Whoever reads signals, or waits for the lease, does so in every turn."""
        self.progress.mark("the alert loop")

    def end(self) -> None:
        """Give the lease back, so that the next one need not wait for it to expire."""
        self._over.set()
        self.thread.join(STOP_SECONDS)

    def _run(self) -> None:
        pause = max(0.05, min(1.0, self._ttl_ms / 3000))
        while not self._over.is_set():  # kept until the last delivery is over
            try:
                self._tend()
                self.outage.works("lease")
            except BusUnavailable as error:
                self.outage.fails("lease", error)
            except TapelineError as error:
                self.failed = error
                self._stop.set()
            self._over.wait(pause)
        try:
            if self.token is not None:
                self._bus.release(0, NAME, self.token)
                metrics.LEASES.labels(NAME, "released").inc()
                metrics.OWNED.labels(NAME).set(0)
            leave(self._bus, self._worker)
        except TapelineError as error:
            log.info("could not say goodbye: %s", error)
        self._bus.close()

    def _tend(self) -> None:
        detail = self.detail if self.token else "standing by"
        beat(self._bus, self._worker, NAME, [0] if self.token else [], detail, progress=self.progress)
        asked = time.monotonic()
        token = self.token
        if token is None and not self._stop.is_set():
            token = self._bus.acquire(0, NAME, self._worker, self._ttl_ms)
        elif token is not None and not self._bus.renew(0, NAME, token, self._ttl_ms):
            token = None
        with self._changed:
            if token:
                self._sure_until = asked + self._ttl_ms / 1000
            if token != self.token:
                log.info("alerts are sent from here now" if token else "another process sends the alerts now")
                metrics.LEASES.labels(NAME, "acquired" if token else "lost").inc()
                metrics.OWNED.labels(NAME).set(1 if token else 0)
                self.token = token
                self._changed.notify_all()


class Leader:
    """The active process, from getting the lease to losing it."""

    def __init__(self, bus: Bus, settings: Settings, channels: dict[str, Channel], lease: Lease, token: str) -> None:
        self.bus, self.settings, self.lease, self.token = bus, settings, lease, token
        self._wake = threading.Event()
        self._outbox = Outbox(channels, settings.alerts.retry_max_seconds, lease.sure, self._wake, lease.progress)
        self._watch = Watch(bus, settings)
        self._core = AlertCore(settings.alerts)
        self._positions: dict[int, str] = {}
        self._look_at = self._trim_at = 0.0
        self._sound = False  # whether the core is what is committed

    def run(self, stop: threading.Event) -> None:
        """Until stopped or fenced. Raises what waiting cannot mend."""
        self._outbox.start()
        wait = 0.05
        try:
            while not stop.is_set() and self.lease.token == self.token:
                self.lease.goes_on()
                try:
                    self._load()
                    wait = 0.05
                    while not stop.is_set() and self.lease.token == self.token:
                        self._turn()
                        self.lease.outage.works("alerts")
                except BusUnavailable as error:
                    self._sound = False
                    self.lease.outage.fails("alerts", error)
                    stop.wait(wait)
                    wait = min(2.0, 2 * wait)
            self._outbox.stop(STOP_SECONDS if stop.is_set() else 0.0)
            self._leave()
        except Fenced as error:
            log.info("%s", error)
        finally:
            self.lease.outage.leaves("alerts")
            self._outbox.stop(0.0)

    def _leave(self) -> None:
        """Commit what the channels answered last."""
        try:
            if not self._sound:
                self._load()
            self._step([], None, {})
        except BusUnavailable as error:
            log.info("the last deliveries could not be committed, and may be made again: %s", error)

    def _load(self) -> None:
        """What is committed; on the very first start, the newest signals are the first place."""
        keys = self.bus.keys
        state = {k.decode(): v for k, v in self.bus.call("hgetall", keys.alerts("state")).items()}
        alerts = self.bus.call("hvals", keys.alerts("open"))
        self._core = AlertCore.restore(self.settings.alerts, state.get("memory"), alerts)
        held = msgspec.json.decode(state.get("positions", b"{}"), type=dict[int, str])
        partitions = range(self.settings.tapeline.partitions)
        self._positions = {p: held[p] if p in held else self.bus.last_id(p, TOPIC) for p in partitions}
        if held.keys() != self._positions.keys():
            self.bus.commit_alerts(self.token, {"positions": msgspec.json.encode(self._positions)}, {}, (), ())
        for partition, position in self._positions.items():
            self.bus.done_with(partition, TOPIC, NAME, position)
        self._sound = True
        self._sync()

    def _turn(self) -> None:
        self.lease.goes_on()
        began = time.monotonic()
        signals, moved = self._read()
        acks = {k.decode(): v.decode() for k, v in self.bus.call("hgetall", self.bus.keys.alerts("acks")).items()}
        seen = None
        if began >= self._look_at:
            seen = self._watch.look(redis_now_ms(self.bus))
            self._look_at = began + max(LOOK_SECONDS, (time.monotonic() - began) / SHARE)
        self._step(signals, seen, acks, moved)
        if began >= self._trim_at:
            for partition in self._positions:
                self.bus.trim(partition, TOPIC)
            self._trim_at = began + max(TRIM_SECONDS, (time.monotonic() - began) / SHARE)
        if not moved:
            self._wake.wait(min(1.0, max(TURN_SECONDS, (time.monotonic() - began) / SHARE)))
        self._wake.clear()

    def _read(self) -> tuple[list[Signal], dict[int, str]]:
        """(signals, new positions of the partitions that had any), in order of the partitions."""
        signals: list[Signal] = []
        moved: dict[int, str] = {}
        partitions = list(self._positions)
        groups = [[p] for p in partitions] if self.bus.cluster else [partitions]
        for group in groups:
            streams = {self.bus.keys.stream(p, TOPIC): p for p in group}
            reply = self.bus.xread({s: self._positions[p] for s, p in streams.items()}, READ_FRAMES)
            found = {k: [e for part in v for e in part] for k, v in reply.items()} if isinstance(reply, dict) else reply
            for stream, entries in sorted(found.items() if isinstance(found, dict) else found or ()):
                partition = streams[stream.decode()]
                moved[partition] = entries[-1][0].decode()
                for entry_id, fields in entries:
                    signals += _signals(sound(entry_id, fields))
        return signals, moved

    def _step(
        self, signals: list[Signal], seen: Seen | None, acks: dict[str, str], moved: dict[int, str] | None = None
    ) -> None:
        """Step the core and commit; nothing is forgotten of the results before that."""
        results = self._outbox.results()
        out = self._core.step(redis_now_ms(self.bus), signals=signals, seen=seen, acks=acks, results=results)
        memory, changed, gone = self._core.changes()
        state = {"memory": memory} if memory is not None else {}
        if moved:
            state["positions"] = msgspec.json.encode(self._positions | moved)
        if state or changed or gone or acks:
            if out.alerts:
                faults.point("alerts:before-commit")
            self.bus.commit_alerts(self.token, state, changed, gone, list(acks))
        self._outbox.settled(len(results))
        for partition, position in (moved or {}).items():
            self._positions[partition] = position
            self.bus.done_with(partition, TOPIC, NAME, position)
        for alert in out.alerts:
            metrics.ALERTS.labels(alert.severity, alert.type if alert.type in KINDS else "other").inc()
            how = "suppressed, over the hour's limit" if alert.suppressed else "alert"
            about = {"symbol": alert.subject}
            log.info("%s %s %s: %s", how, alert.severity, alert.id, alert.title, extra=about)
        if out.lost:
            log.warning("%d deliveries of the oldest alerts were given up: the outbox is full", out.lost)
        if changed or gone:
            self._sync()

    def _sync(self) -> None:
        jobs = self._core.jobs()
        self._outbox.sync(jobs, self._message)
        self.lease.detail = f"alerts {len(self._core.alerts)}, waiting {len(jobs)}"

    def _message(self, job: Job) -> Message:
        return message_of(self._core.alerts[job.alert], job.round)


def _signals(frame: Frame) -> list[Signal]:
    if frame.kind != "signal":
        return []
    try:
        return [message for message in decode(frame.body) if isinstance(message, Signal)]
    except msgspec.DecodeError as error:
        log.warning("entry %s of signals is not JSON of signals (%s); passed over", frame.id, error)
        return []
