"""The partition worker: what every stateful stage (aggregate, pressure, signals) runs in.

A manager thread holds leases and hands them over; each owned partition has one thread that reads
frames, lets the stage's pure core step, and commits state, outputs and input position in one script.
A step that is refused (another owner, another position) wrote nothing: the thread drops what it
knows and loads the committed state again.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from shared import metrics
from shared.bus import Bus, Limits, Step, worker_id
from shared.errors import BusUnavailable, ConfigError, Fenced, TapelineError, Unavailable
from shared.frames import Frame
from shared.heartbeat import beat, leave, living
from shared.leases import fair_share
from shared.outage import Outage
from shared.progress import Progress
from shared.settings import Settings
from shared.stages import STAGES, enabled, readers
from shared.telemetry import StageTelemetry

log = logging.getLogger(__name__)

READ_FRAMES = 100
TRIM_SECONDS = 1.0


@dataclass(slots=True)
class StepResult:
    """What a core made of some frames; `outputs` per topic, in order, without sequences."""

    outputs: dict[str, list[Frame]] = field(default_factory=dict)
    changes: dict[str, bytes] = field(default_factory=dict)
    deletes: tuple[str, ...] = ()


class Core(Protocol):
    """One partition's state of a stage."""

    def step(self, frames: list[Frame]) -> StepResult: ...


class Stage(Protocol):
    """A stateful stage. `open` gives a partition's core from its committed fields (none: cold start)."""

    name: str
    topic: str

    def open(self, fields: dict[str, bytes]) -> Core: ...


class Worker:
    """Runs a stage over its fair share of the partitions until `stop` is set."""

    def __init__(self, bus: Bus, stage: Stage, settings: Settings, stop: threading.Event) -> None:
        self.bus, self.stage, self.settings, self.stop = bus, stage, settings, stop
        self.id = worker_id(stage.name)
        self.ttl_ms = int(settings.redis.lease_seconds * 1000)
        self.progress = Progress()
        self.outage = Outage(log)
        self._lock = threading.Lock()
        self._owned: dict[int, _Partition] = {}
        self._fatal: BaseException | None = None

    def run(self) -> None:
        """Hold leases and heartbeat; raises what ended a partition for good (ConfigError)."""
        metrics.follow(self.progress)
        try:
            while not self.stop.is_set():
                self.progress.mark("the manager")
                started = time.monotonic()
                try:
                    self._tend()
                    self.outage.works("manager")
                except BusUnavailable as error:
                    self.outage.fails("manager", error)
                # New workers and freed partitions are noticed within a second, leases well within their time.
                self.stop.wait(max(0.05, min(1.0, self.ttl_ms / 3000) - (time.monotonic() - started)))
        finally:
            self._leave()
        if self._fatal is not None:
            raise self._fatal

    def _tend(self) -> None:
        beat(self.bus, self.id, self.stage.name, list(self._owned), progress=self.progress)
        for partition, part in list(self._owned.items()):
            if not part.thread.is_alive():
                del self._owned[partition]
            elif not self.bus.renew(partition, self.stage.name, part.token, self.ttl_ms):
                part.lost = True
                part.let_go.set()
        workers = living(self.bus, self.ttl_ms, self.stage.name)
        partitions = self.settings.tapeline.partitions
        owned = [number for number, part in self._owned.items() if not part.let_go.is_set()]
        share = fair_share(workers, self.id, partitions, owned)
        for partition in share.spare:
            log.info("handing over partition %d of %s", partition, self.stage.name, extra={"partition": partition})
            self._owned[partition].let_go.set()
        left = share.wanted
        for partition in share.order:
            if left <= 0 or self.stop.is_set():
                break
            if partition in self._owned:
                continue
            token = self.bus.acquire(partition, self.stage.name, self.id, self.ttl_ms)
            if token is not None:
                log.info("working on partition %d of %s", partition, self.stage.name, extra={"partition": partition})
                self._owned[partition] = _Partition(self, partition, token)
                left -= 1
        metrics.OWNED.labels(self.stage.name).set(len(self._owned))

    def failed(self, error: BaseException) -> None:
        """A partition met something that restarting cannot mend."""
        self._fatal = error
        self.stop.set()

    def _leave(self) -> None:
        self.stop.set()
        for part in self._owned.values():
            part.thread.join(timeout=4)
        metrics.OWNED.labels(self.stage.name).set(0)
        try:
            leave(self.bus, self.id)
        except TapelineError as error:
            log.info("could not say goodbye: %s", error)
        self.bus.close()


class _Partition:
    """One owned partition and its thread."""

    def __init__(self, worker: Worker, number: int, token: str) -> None:
        self.worker, self.number, self.token = worker, number, token
        self.let_go = threading.Event()
        self._part = f"partition {number}"
        worker.progress.mark(self._part)
        self.lost = False  # to another worker
        self._telemetry = StageTelemetry(worker.stage.name, number)
        self.thread = threading.Thread(target=self._run, name=f"{worker.stage.name}-{number}", daemon=True)
        self.thread.start()

    def _done(self) -> bool:
        """Asked in every turn of every loop here, and so the partition goes on."""
        self.worker.progress.mark(self._part)
        return self.let_go.is_set() or self.worker.stop.is_set()

    def _run(self) -> None:
        bus: Bus | None = None
        backoff, change = 0.05, "lost"
        try:
            while not self._done():
                try:
                    bus = bus or self.worker.bus.clone()
                    self._work(bus)
                except Fenced as error:
                    log.info("%s", error)
                    return
                except Unavailable as error:  # Redis, or a store that a new name's history is read from
                    self.worker.outage.fails(self.number, error)
                    self.worker.stop.wait(backoff)
                    backoff = min(2.0, 2 * backoff)
            if bus is not None:
                bus.release(self.number, self.worker.stage.name, self.token)
                change = "lost" if self.lost else "released"
        except BusUnavailable as error:
            log.info("lease of partition %d is left to expire: %s", self.number, error)
        except ConfigError as error:
            self.worker.failed(error)
        except Exception as error:
            # A fault of the program: this worker ends with it in the open, another one takes over.
            log.exception("partition %d of %s failed", self.number, self.worker.stage.name)
            metrics.fault(f"{self.worker.stage.name}.partition")
            self.worker.failed(
                TapelineError(f"{self.worker.stage.name} failed on partition {self.number}: {error!r}; see the log")
            )
        finally:
            self._telemetry.close(change)
            if bus is not None:
                bus.close()
            self.worker.progress.rest(self._part)
            self.worker.outage.leaves(self.number)

    def _work(self, bus: Bus) -> None:
        """Read, step, commit, until let go; every call starts from the committed state."""
        stage = self.worker.stage
        self._register(bus)
        position, out_seq, fields = bus.load(self.number, stage.name, stage.topic)
        core = stage.open(fields)
        trimmed = time.monotonic()
        while not self._done():
            frames = bus.read(self.number, stage.topic, position, READ_FRAMES, bus.limits.block_ms)
            if frames:
                with self._telemetry.step_seconds.time():
                    result = core.step(frames)
                out_seq = _number(result.outputs, out_seq)
                step = Step(
                    token=self.token, stage=stage.name, from_pos=position, to_pos=frames[-1].id,
                    records=sum(f.count for f in frames), last_ns=frames[-1].last_ns, out_seq=out_seq,
                    changes=result.changes, deletes=result.deletes, outputs=result.outputs,
                )  # fmt: skip
                if not self._commit(bus, step):
                    return
                self._telemetry.committed(step, frames)
                position = step.to_pos
            if time.monotonic() - trimmed > TRIM_SECONDS or len(frames) == READ_FRAMES:
                bus.trim(self.number, stage.topic)
                trimmed = time.monotonic()
            self.worker.outage.works(self.number)

    def _register(self, bus: Bus) -> None:
        """Before anything may be trimmed here: the stages that read the same, or what this one writes.

        One that the settings have switched off holds nothing back any more.
        """
        stage, settings = self.worker.stage, self.worker.settings
        writes = STAGES[stage.name].writes if stage.name in STAGES else ()
        for topic in (stage.topic, *writes):
            for reader in readers(topic, settings):
                bus.register(self.number, topic, reader)
            for name in STAGES.keys() - {*enabled(settings), stage.name}:
                if STAGES[name].reads == topic:
                    bus.call("hdel", bus.keys.consumers(self.number, topic), name)

    def _commit(self, bus: Bus, step: Step) -> bool:
        """Commit, waiting while an output stream is full; False when stopped before it was done."""
        wait = 0.002
        while not self._telemetry.commit(partial(bus.commit, self.number, self.worker.stage.topic, step)):
            for topic in step.outputs:
                bus.trim(self.number, topic)
            if self._done() and wait > 0.05:
                return False
            self.worker.stop.wait(wait)
            wait = min(0.1, 2 * wait)
        return True


def _number(outputs: dict[str, list[Frame]], out_seq: int) -> int:
    """Give the output frames their sequences; returns the newest."""
    for frames in outputs.values():
        for frame in frames:
            out_seq += 1
            frame.seq = out_seq
    return out_seq


def wait_for_bus(settings: Settings, stop: threading.Event) -> Bus | None:
    """A Bus as the settings say, once Redis answers; None when stopped first."""
    limits = Limits(settings.redis.stream_max_bytes, settings.redis.window_seconds * 1000)
    wait, told = 0.05, False
    while not stop.is_set():
        try:
            bus = Bus(settings.redis.url, settings.tapeline.namespace, cluster=settings.redis.cluster, limits=limits)
            bus.ping()
            bus.deploy(settings.tapeline.partitions)
        except BusUnavailable as error:
            if not told:
                log.warning("%s; waiting for it", error)
                told = True
            stop.wait(wait)
            wait = min(2.0, 2 * wait)
        else:
            return bus
    return None
