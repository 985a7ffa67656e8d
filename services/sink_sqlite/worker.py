"""The SQLite sink service."""

from __future__ import annotations

import threading

from services.sink_sqlite.store import of
from shared.settings import Settings
from shared.sink import serve

SERVICE = "sink-sqlite"


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: store what `sink.modes` names of all partitions until stopped."""
    serve(settings, stop, of(settings, stop), SERVICE, settings.sink.batch_rows, settings.sink.batch_ms)
