"""The command `instruments`: what the bus knows of futures, options and the rest."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import json_option, looking

if TYPE_CHECKING:
    from shared.cli import App
    from shared.messages import Instrument

KINDS = ("C", "P", "F", "K", "?")
COLUMNS = (
    "symbol", "type", "strike", "expiration", "underlying", "root", "multiplier", "tick", "defined", "feed",
)  # fmt: skip
_NUMBERS = frozenset({"strike", "multiplier", "tick"})


def _day(_: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    try:
        return date.fromisoformat(text).isoformat() if text else None
    except ValueError:
        raise click.BadParameter(f"'{text}' is no day such as 2026-12-18", param=parameter) from None


@click.command()
@click.option("--underlying", metavar="NQ", help="Only of this root or underlying contract; BTC finds deribit:BTC.")
@click.option("--kind", type=click.Choice(KINDS), help="Only calls, puts, futures, spot, or what nobody defined.")
@click.option("--expiration", metavar="DATE", callback=_day, help="Only those that expire on this UTC day.")
@click.option("--at", metavar="DAY", callback=_day, help="As they were defined on this UTC day (default: newest).")
@json_option
@click.pass_obj
def instruments(
    app: App, *, underlying: str | None, kind: str | None, expiration: str | None, at: str | None, as_json: bool
) -> None:
    """List the instruments of a running deployment: definitions of futures and options, by root and expiration."""
    import msgspec

    from shared.instrument_days import day_of, on_day

    with looking(app.settings) as (bus, partitions):
        found = [i for p in range(partitions) for i in on_day(bus, p, at)]
    wanted = sorted(
        (
            i for i in found
            if (underlying is None or underlying.upper() in _names(i)) and (kind is None or i.kind == kind)
            and (expiration is None or (i.expiration_ns is not None and day_of(i.expiration_ns) == expiration))
        ),
        key=_order,
    )  # fmt: skip
    rows = [_row(i) for i in wanted]
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row).decode())
    elif rows:
        _print(rows)
    else:
        click.echo("no such instrument on the bus" if found else "the bus knows no instrument yet")


def _names(i: Instrument) -> set[str]:
    """What `--underlying` may call it."""
    names = {i.root, i.root.rpartition(":")[2], i.underlying or i.root}
    return {name.upper() for name in names}


def _order(i: Instrument) -> tuple[Any, ...]:
    never = i.expiration_ns is None
    return i.root, i.kind in "CP", never, i.expiration_ns or 0, i.strike or 0.0, i.kind, i.symbol, i.venue


def _row(i: Instrument) -> dict[str, Any]:
    from shared.instrument_days import day_of

    expiration = day_of(i.expiration_ns) if i.expiration_ns is not None else None
    return {
        "symbol": i.symbol, "type": i.kind, "strike": i.strike, "expiration": expiration, "underlying": i.underlying,
        "root": i.root, "multiplier": i.multiplier, "tick": i.tick_size,
        "defined": day_of(i.defined_ns) if i.defined_ns is not None else None, "feed": i.feed, "venue": i.venue,
        "expiration_ns": i.expiration_ns, "estimated": i.estimated, "defined_ns": i.defined_ns, "id": i.id,
    }  # fmt: skip


def _print(rows: list[dict[str, Any]]) -> None:
    """An estimated expiration is marked with ~."""
    lines = [COLUMNS, *(tuple(_cell(row, name) for name in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, line, widths, strict=True)
        )
        click.echo("  ".join(cells).rstrip())


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "expiration" and row["estimated"]:
        return f"~{value}"
    return f"{value:.12g}" if name in _NUMBERS else str(value)


COMMANDS = [instruments]
