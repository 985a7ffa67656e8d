"""The BigQuery sink service."""

from __future__ import annotations

import threading

from services.sink_bigquery.accounts import accounts
from services.sink_bigquery.store import of
from shared.settings import Settings
from shared.sink import serve

SERVICE = "sink-bigquery"


def run(settings: Settings, stop: threading.Event, args: tuple[str, ...]) -> None:  # noqa: ARG001
    """Service entry: store what `sink.modes` names of all partitions until stopped."""
    store = of(settings, stop)
    with accounts(settings, store.spent, stop):
        serve(settings, stop, store, SERVICE, settings.bigquery.batch_rows, settings.bigquery.batch_ms)
