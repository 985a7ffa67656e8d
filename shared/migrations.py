"""Migrations of a store: numbered SQL files beside its sink."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

_FILE = re.compile(r"^(\d{4})_(\w+)\.sql$")


class Migration(NamedTuple):
    """One step of the schema; `sql` is a script without transaction statements."""

    version: int
    name: str
    sql: str


@cache
def migrations_of(package: str) -> tuple[Migration, ...]:
    """All migrations in a package's folder `migrations`, oldest first."""
    found = []
    for entry in (files(package) / "migrations").iterdir():
        match = _FILE.match(entry.name)
        if match:
            found.append(Migration(int(match[1]), match[2], entry.read_text()))
    return tuple(sorted(found))
