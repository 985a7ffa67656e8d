"""The SQLite store's part of `tapeline migrate`, see shared.migrate."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from services.sink_sqlite.schema import check, migrations, version
from services.sink_sqlite.store import BUSY_SECONDS, of
from shared.errors import ConfigError, StoreUnavailable
from shared.migrate import Plan, Step
from shared.settings import Settings
from shared.stores_check import check_store


def migrate(settings: Settings, plan: bool) -> Plan:
    """Migrate the file of the settings, or say what that would do: then a file that is not there is not made."""
    store = of(settings, threading.Event())
    notes = [] if store.path.exists() else ["the file does not exist yet"]
    check_store(settings.tapeline.store)
    held = _held(store.path, store.where)
    check(held, store.where, migrations())
    if not plan:
        store.open()
        store.close()
    steps = [Step(step.version, step.name, step.sql) for step in migrations() if step.version > held]
    return Plan(store.where, held, migrations()[-1].version, steps, notes if plan else [], not plan)


def _held(path: Path, where: str) -> int:
    if not path.exists():
        return 0
    # Not read-only, for that would leave its index of the write-ahead log behind.
    target = f"file:{quote(str(path.absolute()))}?mode=rw"
    try:
        with closing(sqlite3.connect(target, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            return version(connection)
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(f"{where} cannot be read now ({error})") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"{where} is not a Tapeline store ({error}): name another file in TAPELINE_STORE") from None
