"""The command `import`: historical candles from elsewhere."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.cli_common import TIMEFRAMES, completes, echo_json, json_option, progress, store_option, yes_option

if TYPE_CHECKING:
    from shared.cli import App
    from shared.importing import Summary
    from shared.settings import Settings

SCHEMAS = ("ohlcv-1s", "ohlcv-1m", "ohlcv-1h", "ohlcv-1d")
_CONTINUOUS = re.compile(r"\.[cnv]\.\d+$")


@click.command("import")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@store_option
@click.option("--exchange", default="", metavar="X", help="The exchange (dataset, venue) of all candles.")
@click.option("--symbol", default="", metavar="S", help="The symbol of all candles.")
@click.option(
    "--timeframe", metavar="1m", help="Their length, where the file does not say it.",
    shell_complete=completes(*TIMEFRAMES),
)  # fmt: skip
@click.option("--map", "mapped", multiple=True, metavar="THEIRS=OURS", help="A column's name in the file, and here.")
@click.option("--replace", "over", is_flag=True, help="Replace prices and volume of candles made from ticks, too.")
@click.option(
    "--rejects", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Rejected rows go here."
)
@click.option("--dry-run", is_flag=True, help="Read, check and compare, but write nothing.")
@click.option("--from-databento", type=click.Choice(SCHEMAS), help="Buy the candles at Databento Historical.")
@click.option("--dataset", metavar="D", help="The dataset (default: databento.dataset).")
@click.option("--symbols", metavar="A,B", help="What of it: parents (ES.FUT), contracts (ESH4) or ES.v.0.")
@click.option("--start", metavar="WHEN", help="The first instant, ISO; UTC when it names no zone.")
@click.option("--end", metavar="WHEN", help="The instant behind the last one.")
@yes_option
@json_option
@click.pass_obj
def import_(
    app: App, *, files: tuple[Path, ...], exchange: str, symbol: str, timeframe: str | None,
    mapped: tuple[str, ...], over: bool, rejects: Path | None, dry_run: bool, from_databento: str | None,
    dataset: str | None, symbols: str | None, start: str | None, end: str | None, yes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Bring candles from elsewhere into the table `candles`: CSV, NDJSON, Parquet or DBN files, or from Databento.

    A candle made from ticks stays as it is unless --replace is given. Repeating an import changes nothing.
    """

    from shared.import_files import Given
    from shared.importing import Plan, rejects_file, run
    from shared.stores_check import check_store
    from shared.timeframes import seconds_of

    settings = app.settings
    if timeframe is not None and not seconds_of(timeframe):
        raise click.BadParameter(f"'{timeframe}' is no timeframe such as 1m, 4h or 1d", param_hint="--timeframe")
    given = Given(exchange, symbol, seconds_of(timeframe or ""), _mapped(mapped))
    asked = (dataset, symbols, start, end)
    if bool(files) == bool(from_databento):
        raise click.UsageError("give FILEs, or --from-databento")
    if from_databento is None and any(asked):
        raise click.UsageError("--dataset, --symbols, --start and --end go with --from-databento")
    if from_databento is not None and dry_run:
        raise click.UsageError("--dry-run cannot look at what is not bought yet: buy it, and give the file")
    check_store(settings.tapeline.store)
    if from_databento is not None:
        files = _bought(from_databento, asked, settings, yes=yes, quiet=as_json)
    with ExitStack() as stack:
        told = stack.enter_context(rejects_file(rejects)) if rejects is not None else None
        tell = stack.enter_context(progress(as_json, _line))
        summary = run(Plan(files, given, over, dry_run), settings, tell, told)
    if as_json:
        echo_json({f.name: getattr(summary, f.name) for f in fields(summary)} | {"dry_run": dry_run})
    else:
        _print(summary, settings, dry_run, rejects)


def _mapped(pairs: tuple[str, ...]) -> dict[str, str]:
    from shared.import_files import FIELDS, plain_name

    found = {}
    for pair in pairs:
        theirs, sign, ours = pair.rpartition("=")
        if not sign or not theirs or ours not in FIELDS:
            raise click.BadParameter(f"'{pair}' is no THEIRS=OURS; ours are: {', '.join(FIELDS)}", param_hint="--map")
        found[plain_name(theirs)] = ours
    return found


def _bought(
    schema: str, asked: tuple[str | None, ...], settings: Settings, *, yes: bool, quiet: bool
) -> tuple[Path, ...]:
    """The files of a request, fetched where they are not here yet."""
    from shared.purchases import local
    from shared.sources import SourceSpec

    dataset, names, first, last = asked
    symbols = tuple(dict.fromkeys(part.strip() for part in (names or "").split(",") if part.strip()))
    if not symbols or not first or not last:
        raise click.UsageError("--from-databento wants --symbols, --start and --end")
    start, end = _when("--start", first), _when("--end", last)
    if start >= end:
        raise click.UsageError("--end (exclusive) must be later than --start")
    kinds = {
        "parent" if s.endswith((".FUT", ".OPT", ".SPOT")) else "continuous" if _CONTINUOUS.search(s) else "raw_symbol"
        for s in symbols
    }
    if len(kinds) > 1:
        raise click.UsageError("ask for parents (ES.FUT), contracts (ESH4) and continuous ones (ES.v.0) one at a time")
    venue = dataset or settings.databento.dataset
    text = f"databento://{venue}?schema={schema}&symbols={','.join(symbols)}&start={first}&end={last}"
    spec = SourceSpec("databento", text, None, venue, symbols, (schema,), start, end, kinds.pop())
    return tuple(found.path for found in local([spec], settings, yes=yes, quiet=quiet) if found.path is not None)


def _when(option: str, text: str) -> datetime:
    from shared.instants import instant_ns

    try:
        ns = instant_ns(text)
    except ValueError:
        raise click.BadParameter(f"'{text}' is no time such as 2024-05-09T14:30:00Z", param_hint=option) from None
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC)


def _line(s: Summary) -> str:
    return f"read {s.read:,}, stored {s.stored:,}, replaced {s.replaced:,}, kept {s.kept + s.unchanged:,}"


def _print(s: Summary, settings: Settings, dry_run: bool, rejects: Path | None) -> None:
    """For people."""
    from shared.log import Masker

    for note in s.notes:
        click.echo(note)
    for line in s.told:
        click.echo(f"rejected {line}")
    for what, counts in (("repaired", s.repaired), ("rejected", s.rejected)):
        if counts:
            click.echo(f"{what}: {', '.join(f'{reason} ({n:,})' for reason, n in counts.most_common())}")
    if s.rejected and rejects is not None:
        click.echo(f"all rejected rows are in {rejects}")
    if s.refused:
        click.echo(f"{s.refused:,} refused by the store: see `tapeline dead-letters list --table candles`")
    click.echo(
        f"{s.read:,} rows read: {s.stored:,} stored, {s.replaced:,} replaced, {s.kept:,} kept (made from ticks), "
        f"{s.unchanged:,} there already, {s.duplicates:,} duplicates, {s.rejected.total():,} rejected"
    )
    where = Masker(settings)(settings.tapeline.store)
    click.echo(f"nothing was written (--dry-run): {where}" if dry_run else f"stored in {where}")


COMMANDS: list[click.Command] = [import_]
