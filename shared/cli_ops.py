"""Commands about the installation: `config`, `doctor`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import click

from shared.cli_common import echo_json, json_option
from shared.errors import TapelineError
from shared.settings import SECRETS, SECTIONS, Settings, env_name

if TYPE_CHECKING:
    from shared.cli import App
    from shared.doctor import Finding

ROOM_FOR_VARIABLES = 140


@click.group()
def config() -> None:
    """The settings: show, check."""


@config.command()
@click.option("--changed", is_flag=True, help="Only what is not left at its default.")
@json_option
@click.pass_obj
def show(app: App, changed: bool, as_json: bool) -> None:
    """Every setting, its value, where it came from and its environment variable. Secrets are masked.

    A value comes from the environment, from a file that a variable names (`NAME_FILE`), from the settings file, or is
    the default.
    """
    rows = [row for row in _rows(app.settings) if not changed or row["origin"] != "default"]
    if as_json:
        echo_json(rows)
    elif not rows:
        click.echo("every setting is at its default")
    elif sys.stdout.isatty():
        _print_rows(rows)
    else:
        wide = max(len(r["setting"]) for r in rows)
        for r in rows:
            click.echo(f"{r['setting']:<{wide}}  {_text(r['value'])}  ({r['origin']}; {r['variable']})")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """A table; what is not a default stands out. Where there is no room for variables, `env` is the setting's own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    names = ["setting", "value", "origin"] + (["variable"] if console.width >= ROOM_FOR_VARIABLES else [])
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("setting", "variable"))
    for row in rows:
        style = "dim" if row["origin"] == "default" else "bold"
        cells = row | {"value": _text(row["value"], ", ")}
        if "variable" not in names and row["origin"] == f"env {row['variable']}":
            cells["origin"] = "env"
        table.add_row(*(Text(str(cells[name]), style if name != "setting" else "") for name in names))
    console.print(table)


def _rows(settings: Settings) -> list[dict[str, Any]]:
    from shared.log import MASK, Masker
    from shared.stores import redact

    mask = Masker(settings)
    rows = []
    for section, kind in SECTIONS.items():
        for name in kind.__struct_fields__:
            setting = f"{section}.{name}"
            value = getattr(getattr(settings, section), name)
            if setting in SECRETS:
                value = dict.fromkeys(value, MASK) if isinstance(value, dict) else MASK if value else ""
            elif isinstance(value, str):
                value = mask(redact(value) if "://" in value else value)
            origin = mask(settings.origin.get(setting, "default"))
            rows.append({"setting": setting, "value": value, "origin": origin, "variable": env_name(setting)})
    return rows


def _text(value: Any, between: str = ",") -> str:
    if isinstance(value, dict):
        return between.join(f"{k}={v}" for k, v in value.items()) or "-"
    if isinstance(value, tuple):
        return between.join(item if isinstance(item, str) else _json(item) for item in value) or "-"
    return str(value) if value != "" else "-"


def _json(value: Any) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()


@config.command()
@json_option
@click.pass_obj
def check(app: App, as_json: bool) -> None:
    """Whether the settings can work together; says the first thing that is wrong (exit 78)."""
    from shared.doctor import check_calendars
    from shared.stores import parse
    from shared.supervise import programs

    check_calendars(app.settings)
    chosen = [worker for program in programs(app.settings) for worker in program.workers()]
    parse(app.settings.tapeline.store)
    if as_json:
        echo_json({"fine": True, "workers": chosen})
        return
    click.echo(f"the settings are fine; `tapeline up` would run {', '.join(chosen)}")


@click.command()
@click.option("--offline", is_flag=True, help="Ask nobody but this machine: no vendor, and no server elsewhere.")
@click.option("--bigquery", is_flag=True, help="Prove on the BigQuery project itself that no row is lost or doubled.")
@json_option
@click.pass_context
def doctor(context: click.Context, offline: bool, bigquery: bool, as_json: bool) -> None:
    """Check what Tapeline needs, one line each with the remedy; exit 1 when anything fails.

    Keys are tried by the vendors' own handshakes, which cost nothing. Changes nothing.
    """
    if offline and bigquery:
        raise click.UsageError("--bigquery asks Google: not with --offline")
    found = list(_shown(_findings(context.obj, offline=offline, bigquery=bigquery), as_json))
    if as_json:
        echo_json([finding.record() for finding in found])
    if not all(finding.fine for finding in found):
        context.exit(1)


def _findings(app: App, *, offline: bool, bigquery: bool) -> Iterator[Finding]:
    from shared import doctor as engine
    from shared.log import Masker

    mask: Callable[[str], str] = Masker()
    try:
        mask = Masker(app.settings)
        line = engine.settings_line(app.settings)
        checks = [] if bigquery else engine.checks_of(app.settings)
    except TapelineError as error:
        yield engine.Finding("settings", engine.FAIL, mask(" ".join(str(error).split())))
        return
    if bigquery:
        yield from _prove(app.settings, mask)
        return
    yield engine.Finding("settings", engine.OK, mask(line))
    yield from engine.examine(checks, mask, offline=offline)


def _prove(settings: Settings, mask: Callable[[str], str]) -> Iterator[Finding]:
    """What trying it on the real project shows, up to the first error that ends it."""
    from shared.doctor import FAIL, OK, Finding
    from shared.registry import TOOLS, resolve

    try:
        proofs = cast("Iterable[tuple[str, bool, str]]", resolve(TOOLS["prove-bigquery"])(settings))
        for check, fine, says in proofs:
            yield Finding(check, OK if fine else FAIL, mask(says))
    except TapelineError as error:
        yield Finding("bigquery", FAIL, mask(str(error)))


def _shown(findings: Iterator[Finding], as_json: bool) -> Iterator[Finding]:
    """The findings, each printed as it comes: symbols and colours are for terminals."""
    if as_json:
        yield from findings
    elif sys.stdout.isatty():
        yield from _on_terminal(findings)
    else:
        for finding in findings:
            click.echo(f"{finding.state:<4}  {finding.check}: {finding.says}")
            yield finding


NAME_WIDTH = 17
LOOKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "FAIL": ("✗", "bold red"), "skip": ("-", "dim")}


def _on_terminal(findings: Iterator[Finding]) -> Iterator[Finding]:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, states = Console(highlight=False), Counter[str]()
    with console.status("looking"):
        for finding in findings:
            symbol, style = LOOKS[finding.state]
            row = Table.grid(padding=(0, 1), expand=True)
            for width in (1, NAME_WIDTH):
                row.add_column(width=width, no_wrap=width == 1)
            row.add_column(ratio=1, overflow="fold")
            row.add_row(Text(symbol, style), finding.check, Text(finding.says, style if finding.state != "ok" else ""))
            console.print(row)
            states[finding.state] += 1
            yield finding
    told = ((states["FAIL"], "to be mended"), (states["warn"], "worth a look"), (states["skip"], "skipped"))
    rest = "".join(f", {count} {what}" for count, what in told if count)
    console.print(f"{states['ok']} fine{rest}")


COMMANDS = [config, doctor]
