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
    "ingest-synthetic": "services.ingest.worker:run_synthetic",
    "ingest-files": "services.ingest.worker:run_files",
    "aggregate": "services.aggregate.worker:run",
    "sink-sqlite": "services.sink_sqlite.worker:run",
}
# What else the CLI takes from a service without importing it statically.
TOOLS = {
    "generate": "services.ingest.synthetic:generate",
    "warm-aggregate": "services.aggregate.core:warm",
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
