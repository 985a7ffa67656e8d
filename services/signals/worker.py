"""The signals service: completed windows of option pressure in, signals out (the thin shell around `core`)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from services.signals import plugins
from services.signals.baseline import SAMPLE, Samples, bucket_of
from services.signals.core import Config, Hooks, PartitionState, Seed
from services.signals.verdict import Limits
from shared.calendar import GLOBEX, Sessions, calendar_of, sessions
from shared.frames import NS, Frame, iso, ns_of
from shared.messages import Signal, encode
from shared.settings import Settings
from shared.stores import read_rows
from shared.worker import StepResult, Worker, wait_for_bus

log = logging.getLogger(__name__)

FRAME_SIGNALS = 500
# Columns of `pressure_metrics` that a baseline needs.
HISTORY_COLUMNS = (
    "time_window", "expiration", "strike", "option_type", "log_ratio", "ask_volume", "bid_volume", "unknown_volume",
    "moneyness",
)  # fmt: skip


class SignalCore:
    """One partition: packs the pure core's signals into frames."""

    def __init__(self, state: PartitionState) -> None:
        self._state = state

    def step(self, frames: list[Frame]) -> StepResult:
        """Raises StoreUnavailable, ConfigError where the history of a new underlying cannot be read."""
        signals = self._state.step(frames)
        changes, deletes = self._state.changes()
        return StepResult(pack(signals, time.time_ns()), changes, deletes)


class SignalStage:
    """Signals of every partition."""

    name = "signals"
    topic = "pressure"

    def __init__(self, settings: Settings, seed: Seed | None = None, hooks: Hooks | None = None) -> None:
        """`seed` and `hooks` instead of the store and of the plug-ins that the settings name.

        Raises ConfigError for a plug-in that cannot be had.
        """
        s = settings.signals
        self._config = Config(
            sessions=sessions_of(settings.aggregate.calendars),
            count=s.sessions,
            limits=Limits(s.min_samples, s.cluster_width, s.emit_from),
        )
        self._seed = seed or stored(settings.tapeline.store)
        self._hooks = hooks or plugins.load(s.plugins)

    def open(self, fields: dict[str, bytes]) -> SignalCore:
        """Raises ConfigError when another version made the committed state."""
        return SignalCore(PartitionState.restore(self._config, fields, self._seed, self._hooks))


def sessions_of(calendars: dict[str, str]) -> Callable[[str], Sessions]:
    """The sessions of an underlying: roots that name an exchange never close."""
    return lambda name: sessions(calendar_of("" if ":" in name else GLOBEX, name, calendars))


def stored(url: str) -> Seed:
    """The history of an underlying from the store at this URL."""

    def read(underlying: str, window_sec: int, since_ns: int, until_ns: int) -> Mapping[int, Samples]:
        where = {"underlying": underlying, "window_seconds": window_sec}
        since, until = _second(since_ns), _second(until_ns)
        rows = read_rows(url, "pressure_metrics", where, since=since, until=until, columns=HISTORY_COLUMNS)
        return history_of(rows)

    return read


def history_of(rows: list[dict[str, Any]]) -> dict[int, Samples]:
    """Rows of `pressure_metrics` as samples, by the start of their window."""
    windows: dict[str, list[tuple[Any, ...]]] = {}
    instants: dict[str, int] = {}
    for row in rows:
        text = row["expiration"]
        if text not in instants:
            instants[text] = ns_of(text)
        volume = row["ask_volume"] + row["bid_volume"] + row["unknown_volume"]
        windows.setdefault(row["time_window"], []).append((
            instants[text], row["strike"], row["log_ratio"], volume, bucket_of(row["moneyness"]),
            ord(row["option_type"]),
        ))  # fmt: skip
    found = {ns_of(text): np.array(made, SAMPLE) for text, made in windows.items()}
    return {at: np.sort(made, order=["expiration_ns", "strike", "option_type"]) for at, made in found.items()}


def _second(ns: int) -> str:
    """As the stores write the start of a window."""
    return iso(ns // NS * NS)[:19] + "Z"


def pack(signals: list[Signal], now_ns: int) -> dict[str, list[Frame]]:
    """Frames of a step's signals, `timestamp_out_ns` now; from the first window's start to the last one's end."""
    frames = []
    for at in range(0, len(signals), FRAME_SIGNALS):
        some = [replace(signal, timestamp_out_ns=now_ns) for signal in signals[at : at + FRAME_SIGNALS]]
        first = min(s.time_window_ns for s in some)
        last = max(s.time_window_ns + s.window_sec * NS for s in some)
        frames.append(Frame("signal", len(some), first, last, SignalStage.name, encode(some)))
    return {"signals": frames} if frames else {}


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: judge this worker's share of the partitions until stopped."""
    stage = SignalStage(settings)
    bus = wait_for_bus(settings, stop)
    if bus is not None:
        Worker(bus, stage, settings, stop).run()
