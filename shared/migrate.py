"""What bringing a store's schema up to date means: the answer of every store's `migrate(settings, plan)`.

Which function that is stands in shared.registry.TOOLS as `migrate-<scheme>`. With `plan` it changes nothing,
without it does what the plan says; both answer with a Plan. Raises VersionError for a store that a newer program
wrote, ConfigError, AuthError, StoreUnavailable.
"""

from __future__ import annotations

from typing import Protocol, cast

import msgspec

from shared.registry import TOOLS, resolve
from shared.settings import Settings
from shared.stores import parse


class Step(msgspec.Struct, frozen=True):
    """One numbered step of a schema; `sql` is its script."""

    version: int
    name: str
    sql: str


class Plan(msgspec.Struct, frozen=True):
    """A store's schema: version `held` (0: none; after applying, what was held before) and `wanted`.

    `store`: where it is, without credentials. `steps`: pending, or, when `applied`, what was done. `notes`: one line
    each about what this server has or lacks, for people.
    """

    store: str
    held: int
    wanted: int
    steps: list[Step] = []
    notes: list[str] = []
    applied: bool = False


class Migrate(Protocol):
    """A store's own part."""

    def __call__(self, settings: Settings, plan: bool) -> Plan: ...


def migrate(settings: Settings, *, plan: bool) -> Plan:
    """Migrate the store of the settings, or with `plan` only say what would be done.

    Raises what the module says.
    """
    function = cast("Migrate", resolve(TOOLS[f"migrate-{parse(settings.tapeline.store).scheme}"]))
    return function(settings, plan)
