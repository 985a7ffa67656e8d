"""The SQLite sink service."""

from __future__ import annotations

import threading

from services.sink_sqlite.store import SqliteStore
from shared.errors import ConfigError
from shared.settings import Settings
from shared.sink import SinkLoop, open_store
from shared.stores import parse
from shared.worker import wait_for_bus

SERVICE = "sink-sqlite"


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: store what `sink.modes` names of all partitions until stopped."""
    url = parse(settings.tapeline.store)
    if url.scheme != "sqlite":
        raise ConfigError(f"{SERVICE} writes sqlite:/// stores, TAPELINE_STORE is {url.shown}")
    store = SqliteStore(url.path, ohlc_bars=settings.sink.ohlc_bars)
    # The store first: a wrong path is said at once, not when Redis comes up.
    if not open_store(store, stop):
        return
    bus = wait_for_bus(settings, stop)
    if bus is None:
        store.close()
        return
    SinkLoop(bus, store, SERVICE, settings, stop).run()
