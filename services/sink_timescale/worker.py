"""The PostgreSQL sink service."""

from __future__ import annotations

import threading

from services.sink_timescale.store import of
from shared.settings import Settings
from shared.sink import serve

SERVICE = "sink-timescale"


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: store what `sink.modes` names, of this sink's share of the partitions, until stopped."""
    serve(settings, stop, of(settings, stop), SERVICE, settings.sink.batch_rows, settings.sink.batch_ms)
