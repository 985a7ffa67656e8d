"""Dead letters: what a store could not take, listed, mended and put back.

A store's letters are found through the registry (`letters-<scheme>`, a factory `of(settings)`). All stores restore a
letter with `shared.restore` and write it as their sink writes a row, so it keeps to the same rules: the highest
revision of a key wins, a tick has its place on the bus.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from shared import registry
from shared.errors import RowRejected, TapelineError
from shared.frames import TICK, iso
from shared.instants import instant_ns
from shared.messages import Message
from shared.restore import Letter, Sort, columns_of, plain, raw_message, raw_tick, values_of
from shared.settings import Settings
from shared.stores import parse
from shared.tables import MESSAGE_TABLES


class Outcome(NamedTuple):
    """What came of a letter: rows that went into their tables, rows of a frame that are letters of their own now, and
    why the letter stays (empty: it is gone)."""

    stored: int
    buried: int
    reason: str


class Letters(Protocol):
    """The dead letters of an open store. `where` is for people. Every call may raise StoreUnavailable."""

    where: str

    def find(self, *, table: str = "", since_ns: int | None = None, reason: str = "", last: int = 0) -> list[Letter]:
        """Letters, oldest first: of a table, from an instant on, whose reason holds a text, the newest of these."""

    def ids(self, table: str = "") -> list[str]:
        """Which letters there are, oldest first."""

    def get(self, letter: str) -> Letter | None:
        """The letter of this id."""

    def replace(self, letter: str, row: str) -> None:
        """Another row (JSON) in the place of a letter's own."""

    def requeue(self, letter: str) -> Outcome | None:
        """Write a letter into its table and delete it, in one transaction; None where there is none of this id.

        What cannot be restored, or is refused again, stays under its new reason. Of a whole frame the rows that are
        refused become letters of their own, unless all are: then it stays.
        """

    def drop(self, letters: Collection[str]) -> int:
        """Delete letters; returns how many there were."""

    def close(self) -> None: ...


def letters_of(settings: Settings) -> Letters:
    """The letters of the store of the settings, opened. Raises ConfigError, VersionError, StoreUnavailable."""
    path = registry.TOOLS[f"letters-{parse(settings.tapeline.store).scheme}"]
    return cast("Callable[[Settings], Letters]", registry.resolve(path))(settings)


def counted(rows: Sequence[Any], dead: int) -> int:
    """Rows that went in, of all `Prepared` and those that are refused."""
    return sum(len(made.rows) + len(made.spare) for made in rows) - dead


# -- fixing ----------------------------------------------------------------------------------


def fixed(letter: Letter, changes: Mapping[str, str]) -> str:
    """The letter's row with some columns set to what these texts say; an empty text is null.

    Raises ValueError for a column that it cannot have, or a value that its column cannot hold; TapelineError for a
    letter without columns.
    """
    if letter.is_frame:
        raise TapelineError(f"dead letter {letter.id} is a whole frame: it has no columns to fix")
    try:
        values = values_of(letter)
    except RowRejected as error:
        raise TapelineError(f"dead letter {letter.id} cannot be fixed: {error}") from None
    known = _columns(letter, values)
    for name, text in changes.items():
        if name not in known:
            raise ValueError(f"{letter.table_name} has no column '{name}'; there are: {', '.join(known)}")
        values[name] = _value(name, known[name], text)
    return json.dumps(values)


def _columns(letter: Letter, values: Mapping[str, Any]) -> dict[str, Sort | None]:
    """What may be set; None: a field as it was on the bus, which says no sort."""
    if raw_tick(letter, values):
        return {"exchange": Sort("text"), "symbol": Sort("text")} | dict.fromkeys(TICK.names or ())
    if raw_message(letter, values):
        tags = {
            kind: tables for kind, tables in MESSAGE_TABLES.items() if letter.table_name in (t.name for t in tables)
        }
        return dict.fromkeys(("type", *(f for m in Message.__subclasses__()
                                        if m.__struct_config__.tag in tags for f in m.__struct_fields__)))  # fmt: skip
    return dict.fromkeys(values) | dict(columns_of(letter.table_name))


def _value(name: str, sort: Sort | None, text: str) -> Any:
    if not text:
        return None
    if sort is None:
        try:
            return json.loads(text)
        except ValueError:
            return text
    try:
        if sort.name == "text":
            return text
        if sort.name == "time":
            return iso(instant_ns(text))
        return plain(name, sort, json.loads(text.lower() if sort.name == "boolean" else text))
    except RowRejected as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise ValueError(f"{name} cannot be '{text}'") from None
