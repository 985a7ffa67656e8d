"""The commands of `dead-letters`: what a store could not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import bar, busy, echo_json, json_option, store_option
from shared.errors import TapelineError

if TYPE_CHECKING:
    from shared.cli import App
    from shared.dead_letters import Letters
    from shared.restore import Letter

LINE = "{:>{}}  {:<20}  {:<22} {:>4}  {}"
REASON_SHOWN = 110

all_option = click.option("--all", "every", is_flag=True, help="All letters, in place of IDs.")
table_option = click.option("--table", default="", metavar="T", help="Only letters of this table (frames: topic).")


@click.group("dead-letters")
def dead_letters() -> None:
    """What the store could not take: list, show, fix, requeue and drop dead letters."""


@contextmanager
def _open(app: App) -> Iterator[Letters]:
    from shared.dead_letters import letters_of

    letters = letters_of(app.settings)
    try:
        yield letters
    finally:
        letters.close()


def _since(_: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    from shared.instants import instant_ns

    try:
        return None if text is None else instant_ns(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is no time such as 2024-05-09T14:30:00Z", param=parameter) from None


@dead_letters.command("list")
@store_option
@table_option
@click.option("--since", metavar="ISO", callback=_since, help="Only those buried from this time on.")
@click.option("--reason", default="", metavar="TEXT", help="Only those whose reason holds this text.")
@click.option("--last", type=click.IntRange(min=1), default=100, show_default=True, metavar="N", help="Newest N.")
@json_option
@click.pass_obj
def list_letters(app: App, *, table: str, since: int | None, reason: str, last: int, as_json: bool) -> None:
    """The newest dead letters, oldest first."""
    with _open(app) as letters:
        found = letters.find(table=table, since_ns=since, reason=reason, last=last)
    if as_json:
        echo_json([_record(letter) for letter in found])
    elif not found:
        click.echo("no dead letters")
    else:
        width = max(6, *(len(each.id) for each in found))
        click.echo(LINE.format("id", width, "at", "table", "row", "reason"))
        for each in found:
            number = "all" if each.is_frame else each.row_number
            why = each.reason if len(each.reason) <= REASON_SHOWN else f"{each.reason[:REASON_SHOWN]}…"
            click.echo(LINE.format(each.id, width, f"{each.at[:19]}Z", each.table_name, number, " ".join(why.split())))


@dead_letters.command()
@store_option
@click.argument("letter", metavar="ID")
@json_option
@click.pass_obj
def show(app: App, *, letter: str, as_json: bool) -> None:
    """One dead letter: its place on the bus, its reason and its row."""
    with _open(app) as letters:
        record = _record(_known(letters, letter))
    if as_json:
        echo_json(record)
        return
    row = record.pop("row")
    for name, value in record.items():
        click.echo(f"{name:<12} {value}")
    for name, value in row.items() if isinstance(row, dict) else [("row", row)]:
        click.echo(f"  {name:<24} {'null' if value is None else value}")


@dead_letters.command()
@store_option
@click.argument("letter", metavar="ID")
@click.argument("changes", nargs=-1, required=True, metavar="COLUMN=VALUE...")
@click.pass_obj
def fix(app: App, *, letter: str, changes: tuple[str, ...]) -> None:
    """Set columns of a letter's row; `COLUMN=` is null. Then requeue it."""
    from shared.dead_letters import fixed

    pairs = [change.partition("=") for change in changes]
    for name, sign, _ in pairs:
        if not sign or not name:
            raise click.UsageError(f"'{name}' is no COLUMN=VALUE")
    with _open(app) as letters:
        held = _known(letters, letter)
        try:
            row = fixed(held, {name: value for name, _, value in pairs})
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        letters.replace(letter, row)
    click.echo(f"fixed {', '.join(name for name, _, _ in pairs)} of dead letter {letter}")


@dead_letters.command()
@store_option
@click.argument("chosen", nargs=-1, metavar="[ID]...")
@all_option
@table_option
@json_option
@click.pass_context
def requeue(context: click.Context, *, chosen: tuple[str, ...], every: bool, table: str, as_json: bool) -> None:
    """Write letters into their tables, each with its deletion in one transaction (BigQuery: one after the other).

    The rules are the sink's: the highest revision of a key stays. What is refused again stays a letter, with its new
    reason, and the exit code is 1.
    """
    _choice(chosen, every, table)
    left: list[dict[str, str]] = []
    done = stored = buried = 0
    with _open(context.obj) as letters:
        wanted = _ids(letters, chosen, every, table)
        with bar(as_json, "letters", len(wanted)) as tell:
            for number, letter in enumerate(wanted):
                tell(number)
                outcome = letters.requeue(letter)
                if outcome is None:
                    continue  # another has taken it meanwhile
                done, stored, buried = done + (not outcome.reason), stored + outcome.stored, buried + outcome.buried
                if outcome.reason:
                    left.append({"id": letter, "reason": outcome.reason})
    if not as_json:
        for stays in left:
            click.echo(f"{stays['id']} stays: {stays['reason']}")
    if as_json:
        echo_json({"requeued": done, "rows": stored, "new_letters": buried, "left": left})
    else:
        new = f", {buried:,} of its rows are letters of their own now" if buried else ""
        click.echo(f"{done:,} requeued ({stored:,} rows{new}), {len(left):,} left")
    context.exit(1 if left else 0)


@dead_letters.command()
@store_option
@click.argument("chosen", nargs=-1, metavar="[ID]...")
@all_option
@table_option
@click.option("--yes", is_flag=True, help="Do not ask; needed with --all.")
@json_option
@click.pass_obj
def drop(app: App, *, chosen: tuple[str, ...], every: bool, table: str, yes: bool, as_json: bool) -> None:
    """Delete letters for good."""
    _choice(chosen, every, table)
    if every and not yes:
        raise click.UsageError("--all deletes all that the store could not take: say --yes")
    with _open(app) as letters, busy(as_json, "deleting letters"):
        gone = letters.drop(_ids(letters, chosen, every, table))
    if as_json:
        echo_json({"dropped": gone})
    else:
        click.echo(f"{gone:,} dropped")


def _choice(chosen: tuple[str, ...], every: bool, table: str) -> None:
    if bool(chosen) == every:
        raise click.UsageError("give IDs, or --all")
    if table and not every:
        raise click.UsageError("--table goes with --all")


def _ids(letters: Letters, chosen: tuple[str, ...], every: bool, table: str) -> list[str]:
    """The letters that are meant; all must be there, before anything is done to one."""
    if every:
        return letters.ids(table)
    for letter in chosen:
        _known(letters, letter)
    return list(dict.fromkeys(chosen))


def _known(letters: Letters, letter: str) -> Letter:
    found = letters.get(letter)
    if found is None:
        raise TapelineError(f"{letters.where} has no dead letter {letter}: `tapeline dead-letters list` shows them")
    return found


def _record(letter: Letter) -> dict[str, Any]:
    import json
    from dataclasses import asdict

    record = asdict(letter)
    with suppress(ValueError):
        record["row"] = json.loads(letter.row)
    return record


COMMANDS: list[click.Command] = [dead_letters]
