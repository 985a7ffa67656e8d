"""Whether a store can be used, before anything is started for it.

Of a store on a server only the URL is looked at here, and by `doctor` more.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from shared.errors import ConfigError
from shared.stores import parse


def check_store(store: str) -> str:
    """Look whether rows could be written, and write none; returns one line about the store.

    Raises ConfigError with the remedy.
    """
    parsed = parse(store)
    return _check_sqlite(parsed.path) if parsed.scheme == "sqlite" else parsed.shown


def _check_sqlite(path: Path) -> str:
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(f"the store {path} is a folder: name a file in it, such as sqlite:///{path}/tapeline.db")
    if not folder.is_dir():
        raise ConfigError(f"the store {path} has no folder {folder}: make it, or set TAPELINE_STORE")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the store {path} cannot be written: {folder} is not writable; set TAPELINE_STORE")
    if not path.exists():
        return f"{path} (will be made)"
    if not os.access(path, os.W_OK):
        raise ConfigError(f"the store {path} is not writable: check its permissions, or set TAPELINE_STORE")
    try:
        connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return f"{path} (in use)"
        raise ConfigError(f"the store {path} cannot be opened ({error}): set TAPELINE_STORE") from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(f"the store {path} is no SQLite database ({error}): set TAPELINE_STORE") from None
    return str(path)
