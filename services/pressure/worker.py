"""The pressure service: ticks in, option pressure out (the thin shell around `core`)."""

from __future__ import annotations

import logging
import threading
import time

import msgspec

from services.pressure import greeks
from services.pressure.core import JSON_KINDS, Output, PartitionState, Undefined
from services.pressure.kernel import warm
from services.pressure.state import Config
from shared import metrics
from shared.calendar import calendar_of, sessions
from shared.frames import NS, TICK, TICK_FRAMES, Frame, unreadable
from shared.messages import decode, encode
from shared.outage import Seldom
from shared.settings import Settings
from shared.worker import StepResult, Worker, wait_for_bus

log = logging.getLogger(__name__)

FRAME_MESSAGES = 500
_told: set[type[Exception]] = set()


class PressureCore:
    """One partition: packs what the pure core puts out into frames."""

    def __init__(self, state: PartitionState) -> None:
        self._state = state
        self._undefined = Seldom()

    def step(self, frames: list[Frame]) -> StepResult:
        # What cannot be read becomes a dead letter of the aggregate stage, which reads the same frames.
        output = self._state.step([frame for frame in frames if readable(frame)], time.time_ns())
        undefined = [one for one in output if isinstance(one, Undefined)]
        if undefined:
            trades = sum(len(one.rows) for one in undefined)
            if told := self._undefined.add(trades):
                log.warning("%d option trades without a definition: dead letters (%s)", told, undefined[0].reason)
        packed = pack(output)
        return StepResult({"pressure": packed} if packed else {}, self._state.changes())


def readable(frame: Frame) -> bool:
    """Whether a frame of `ticks` is sound and of a kind that this stage reads."""
    if frame.kind in TICK_FRAMES:
        return len(frame.body) % TICK.itemsize == 0
    if frame.kind not in JSON_KINDS:
        return False
    try:
        decode(frame.body)
    except msgspec.DecodeError:
        return False
    return True


class PressureStage:
    """Option pressure of every partition."""

    name = "pressure"
    topic = "ticks"

    def __init__(self, settings: Settings) -> None:
        p, a = settings.pressure, settings.aggregate
        self._config = Config(
            sessions=lambda venue, root: sessions(calendar_of(venue, root, a.calendars)),
            window_sec=p.window_seconds,
            max_lateness_sec=a.max_lateness_seconds,
            wait_sec=p.definition_wait_seconds,
            block_size=p.block_size,
            block_size_default=p.block_size_default,
            greeks=p.greeks,
            rate=p.rate,
        )

    def open(self, fields: dict[str, bytes]) -> PressureCore:
        """Raises ConfigError when the committed state was made with other settings."""
        return PressureCore(PartitionState.restore(self._config, fields))


def pack(output: Output) -> list[Frame]:
    """Frames of a step's output: of each window its rows, then its rollup, which marks it complete."""
    frames = []
    for one in output:
        if isinstance(one, Undefined):
            frames.append(unreadable(one.reason, one.rows.tobytes()))
            continue
        start = one.rollup.time_window_ns
        end = start + one.rollup.window_sec * NS
        for at in range(0, len(one.rows), FRAME_MESSAGES):
            some = one.rows[at : at + FRAME_MESSAGES]
            frames.append(Frame("pressure", len(some), start, end, "pressure", encode(some)))
        frames.append(Frame("pressure_rollup", 1, start, end, "pressure", encode([one.rollup])))
    return frames


def fault(error: Exception) -> None:
    """An option has no greeks though it could have some."""
    if type(error) not in _told:
        _told.add(type(error))
        log.error("iv and delta of an option cannot be computed (%r); further such faults are only counted", error)
    metrics.fault("pressure.greeks")


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: the pressure of this worker's share of the partitions until stopped."""
    if settings.pressure.greeks and not greeks.available():
        log.warning("iv and delta stay empty but where the exchange gives them: pip install tapeline[greeks]")
    greeks.on_fault = fault
    warm()
    bus = wait_for_bus(settings, stop)
    if bus is not None:
        Worker(bus, PressureStage(settings), settings, stop).run()
