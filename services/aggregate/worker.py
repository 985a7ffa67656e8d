"""The aggregate service: ticks in, candles out (the thin shell around `core`)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from services.aggregate.core import JSON_KINDS, Output, PartitionState, warm
from services.aggregate.state import Config
from shared.calendar import calendar_of, sessions
from shared.frames import TICK, TICK_FRAMES, UNREADABLE, Frame, Rows, reason_of, unreadable
from shared.messages import decode, encode
from shared.outage import Seldom
from shared.settings import Settings
from shared.stores import newest_cvds
from shared.timeframes import seconds_of
from shared.worker import StepResult, Worker, wait_for_bus

log = logging.getLogger(__name__)

FRAME_ROWS = 2000
Seed = Callable[[dict[str, int]], dict[str, float]]  # newest CVD of names, each before an instant in ns


class AggregateCore:
    """One partition: gives the pure core its CVD seeds and packs its rows into frames."""

    def __init__(self, state: PartitionState, seed: Seed) -> None:
        self._state = state
        self._seed = seed
        self._bad = Seldom()

    def step(self, frames: list[Frame]) -> StepResult:
        faults = [fault(frame) for frame in frames]
        bad = [
            unreadable(f"partition's ticks {frame.id}: {reason}", frame.body)
            for frame, reason in zip(frames, faults, strict=True)
            if reason
        ]
        if bad:
            if told := self._bad.add(len(bad)):
                log.warning("%d frames on ticks cannot be read: dead letters (%s)", told, next(filter(None, faults)))
            frames = [frame for frame, reason in zip(frames, faults, strict=True) if not reason]
        unseeded = dict(self._state.unseeded(frames))
        seeds = dict.fromkeys(unseeded, 0.0) | (self._seed(unseeded) if unseeded else {})
        outputs = pack(self._state.step(frames, seeds), time.time_ns())
        if bad:
            outputs.setdefault("candles", []).extend(bad)
        return StepResult(outputs, self._state.changes())


def fault(frame: Frame) -> str:
    """What makes a frame of `ticks` unreadable; empty for a sound one."""
    if frame.kind == UNREADABLE:
        return reason_of(frame)
    if frame.kind in TICK_FRAMES:
        return "" if len(frame.body) % TICK.itemsize == 0 else f"{len(frame.body)} bytes are no whole tick rows"
    if frame.kind not in JSON_KINDS:
        return f"no stage reads frames of kind '{frame.kind}'"
    try:
        decode(frame.body)
    except msgspec.DecodeError as error:
        return f"a frame of kind '{frame.kind}' that is not JSON of messages ({error})"
    return ""


class AggregateStage:
    """Rolling and fixed candles of every partition."""

    name = "aggregate"
    topic = "ticks"

    def __init__(self, settings: Settings, seed: Seed | None = None) -> None:
        a = settings.aggregate
        self._config = Config(
            sessions=lambda venue, root: sessions(calendar_of(venue, root, a.calendars)),
            max_lateness_sec=a.max_lateness_seconds,
            quiet_sec=a.quiet_reset_seconds,
            emit_1s=a.candles_1s,
            timeframes=tuple(map(seconds_of, a.timeframes)),
            carry=a.empty_bars == "carry",
            big_trade=a.big_trade,
            big_trade_default=a.big_trade_default,
        )
        self._seed: Seed = seed or (lambda names: newest_cvds(settings.tapeline.store, names))

    def open(self, fields: dict[str, bytes]) -> AggregateCore:
        """Raises ConfigError when the committed state was made with other settings."""
        return AggregateCore(PartitionState.restore(self._config, fields), self._seed)


def pack(output: Output, now_ns: int) -> dict[str, list[Frame]]:
    """Frames of a step's rows: `timestamp_out` is now, names are those that the frame's rows use."""
    candles: list[Frame] = []
    for kind, chunks, names in (
        ("candle_1m", output.candles_1m, output.names),
        ("candle_1s", output.candles_1s, output.names),
        ("candle", output.fixed, output.fixed_names),
    ):
        if not chunks:
            continue
        rows = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        rows["timestamp_out_ns"] = now_ns
        for at in range(0, len(rows), FRAME_ROWS):
            candles.append(_frame(kind, rows[at : at + FRAME_ROWS], "time_ns", names))
    if output.gaps:
        first, last = min(g.start_ns for g in output.gaps), max(g.end_ns for g in output.gaps)
        candles.append(Frame("gap", len(output.gaps), first, last, "aggregate", encode(output.gaps)))
    frames = {"candles": candles}
    if output.late:
        rows = np.concatenate(output.late)
        frame = _frame("late_trade", rows, "watermark_ns", output.names)
        frames["late"] = [frame]
    return {topic: some for topic, some in frames.items() if some}


def _frame(kind: str, rows: Rows, time: str, names: list[tuple[str, str]]) -> Frame:
    used, index = np.unique(rows["name"], return_inverse=True)
    rows["name"] = index
    times = rows[time]
    return Frame(
        kind, len(rows), int(times.min()), int(times.max()), "aggregate", rows.tobytes(),
        names=[names[int(i)] for i in used],
    )  # fmt: skip


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: aggregate this worker's share of the partitions until stopped."""
    warm()
    bus = wait_for_bus(settings, stop)
    if bus is not None:
        Worker(bus, AggregateStage(settings), settings, stop).run()
