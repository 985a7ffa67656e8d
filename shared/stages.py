"""The stateful stages: what each reads and writes, and which of them a deployment runs.

A stream must not be trimmed before every stage that reads it has begun: whoever may trim registers
those first (`Bus.register`).
"""

from __future__ import annotations

from typing import NamedTuple

from shared.settings import Settings


class Flow(NamedTuple):
    """A stage's input topic and its output topics."""

    reads: str
    writes: tuple[str, ...]


STAGES = {
    "aggregate": Flow("ticks", ("candles", "late")),
    "pressure": Flow("ticks", ("pressure",)),
    "signals": Flow("pressure", ("signals",)),
}
# Topic -> the stage whose output sequence its frames carry; topics that are not here have several producers.
PRODUCER = {topic: stage for stage, flow in STAGES.items() for topic in flow.writes}


def enabled(settings: Settings) -> tuple[str, ...]:
    """The stages that this deployment runs: none when only raw ticks are kept."""
    if "candles" not in settings.sink.modes:
        return ()
    wanted = {"aggregate": 1, "pressure": settings.pressure.workers}
    wanted["signals"] = min(settings.pressure.workers, settings.signals.workers)
    return tuple(stage for stage in STAGES if wanted[stage])


def readers(topic: str, settings: Settings) -> tuple[str, ...]:
    """The enabled stages that read a topic."""
    return tuple(stage for stage in enabled(settings) if STAGES[stage].reads == topic)
