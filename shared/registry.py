"""Which function is behind each service name: the one line that a new service adds.

Each is `run(settings, stop, args)`: works until `stop` is set or its input ends, raises
TapelineError with the one line for the user.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module

from shared.errors import TapelineError
from shared.settings import Settings

Service = Callable[[Settings, threading.Event, tuple[str, ...]], None]

SERVICES = {
    "ingest-databento": "services.ingest.worker:run_databento",
    "ingest-tardis": "services.ingest.worker:run_tardis",
    "ingest-synthetic": "services.ingest.worker:run_synthetic",
    "ingest-files": "services.ingest.worker:run_files",
    "ingest-tardis-csv": "services.ingest.worker:run_tardis_csv",
    "ingest-tardis-replay": "services.ingest.worker:run_tardis_replay",
    "ingest-tardis-files": "services.ingest.worker:run_tardis_files",
    "aggregate": "services.aggregate.worker:run",
    "pressure": "services.pressure.worker:run",
    "signals": "services.signals.worker:run",
    "alerts": "services.alerts.worker:run",
    "supervisor-alerts": "services.alerts.supervisor:run",
    "sink-sqlite": "services.sink_sqlite.worker:run",
    "sink-timescale": "services.sink_timescale.worker:run",
    "sink-bigquery": "services.sink_bigquery.worker:run",
    "web": "services.web.worker:run",
}
# Scheme of a store's URL -> the service that writes it.
SINKS = {"sqlite": "sink-sqlite", "postgresql": "sink-timescale", "bigquery": "sink-bigquery"}
# Of the services that play a tape: the source alone, `open(settings, args)`, see shared.sources.make.
TAPES = {
    "ingest-files": "services.ingest.worker:open_files",
    "ingest-tardis-csv": "services.ingest.worker:open_tardis_csv",
    "ingest-tardis-files": "services.ingest.worker:open_tardis_files",
    "ingest-tardis-replay": "services.ingest.worker:open_tardis_replay",
}
# What else is taken from a service (or, by a store's scheme, from this package) without importing it statically.
TOOLS = {
    "databento-bars": "services.ingest.dbn_bars:read",
    "databento-order": "services.ingest.databento_download:Order",
    "generate": "services.ingest.synthetic:generate",
    "aggregate-stage": "services.aggregate.worker:AggregateStage",
    "pressure-stage": "services.pressure.worker:PressureStage",
    "signals-stage": "services.signals.worker:SignalStage",
    "alerts-test": "services.alerts.channels:send_test",
    "store-sqlite": "services.sink_sqlite.store:of",
    "store-postgresql": "services.sink_timescale.store:of",
    "store-bigquery": "services.sink_bigquery.store:of",
    "letters-sqlite": "services.sink_sqlite.letters:of",
    "letters-postgresql": "services.sink_timescale.letters:of",
    "letters-bigquery": "services.sink_bigquery.letters:of",
    "migrate-sqlite": "services.sink_sqlite.migrate:migrate",
    "migrate-postgresql": "services.sink_timescale.migrate:migrate",
    "migrate-bigquery": "services.sink_bigquery.migrate:migrate",
    "read-sqlite": "shared.store_sqlite:read_rows",
    "read-postgresql": "shared.store_postgres:read_rows",
    "read-bigquery": "services.sink_bigquery.reading:read_rows",
    "cvds-sqlite": "shared.store_sqlite:newest_cvds",
    "cvds-postgresql": "shared.store_postgres:newest_cvds",
    "cvds-bigquery": "services.sink_bigquery.reading:newest_cvds",
    "plot": "services.web.plots.plot:plot",
    "pending-postgresql": "services.sink_timescale.schema:pending",
    "lacking-postgresql": "services.sink_timescale.schema:lacking",
    "check-databento-live": "services.ingest.doctor:live",
    "check-databento-archive": "services.ingest.doctor:archive",
    "check-tardis-key": "services.ingest.doctor:tardis_key",
    "check-tardis-machine": "services.ingest.doctor:tardis_machine",
    "check-bigquery": "services.sink_bigquery.doctor:check",
    "prove-bigquery": "services.sink_bigquery.doctor:prove",
    "warm-aggregate": "services.aggregate.core:warm",
    "warm-pressure": "services.pressure.kernel:warm",
    "warm-ingest": "services.ingest.normalize:warm",
}


def resolve(path: str) -> Callable[..., object]:
    """The function behind `module:name`."""
    module, _, name = path.partition(":")
    function: Callable[..., object] = getattr(import_module(module), name)
    return function


def service(name: str) -> Callable[..., object]:
    """Raises TapelineError for an unknown service."""
    if name not in SERVICES:
        raise TapelineError(f"no service '{name}'; there are: {', '.join(SERVICES)}")
    return resolve(SERVICES[name])
