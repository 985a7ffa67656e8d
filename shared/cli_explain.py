"""`tapeline explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import busy, echo_json, json_option, store_option

if TYPE_CHECKING:
    from shared.cli import App

SHOWN_TRADES = 20


@click.command()
@click.argument("table")
@click.argument("where", nargs=-1, metavar="[COLUMN=VALUE]...")
@store_option
@click.option("--last", default=1, show_default=True, type=click.IntRange(1, 1000), help="Explain the newest N rows.")
@json_option
@click.pass_obj
def explain(app: App, table: str, where: tuple[str, ...], last: int, as_json: bool) -> None:
    """Show why stored rows are what they are.

    \b
      tapeline explain signals underlying=NQ strike=21000 option_type=C
      tapeline explain candles_1m ticker=ES time=2026-11-20T14:31:00Z

    Of a signal: its window and how its score comes about. Of a candle: the trades behind it (where the
    store keeps ticks), and whether they give the row's numbers.
    """
    from shared import explain as engine

    pairs: dict[str, str] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"'{text}' is not COLUMN=VALUE")
        pairs[column] = value
    url = app.settings.tapeline.store
    with busy(as_json, f"reading {table}"):
        found = [engine.explain(url, table, row) for row in engine.find(url, table, pairs, last)]
    if as_json:
        echo_json(found)
        return
    if not found:
        click.echo(f"no such row in {table}")
    for number, one in enumerate(found):
        if number:
            click.echo()
        _print(one)


def _print(one: dict[str, Any]) -> None:
    _values(one["table"], one["row"])
    if one.get("score"):
        click.echo("\n".join(f"  {line}" for line in one["score"]))
    if one.get("window"):
        _values("its window in pressure_metrics", one["window"])
    if "trades" not in one:
        return
    trades = one["trades"]
    if not trades:
        click.echo("  the store has no trades of it (TAPELINE_SINK_MODES=candles,ticks keeps them)")
        return
    for t in trades[:SHOWN_TRADES]:
        click.echo(f"  {t['timestamp']}  {t['side']:>7}  {t['price']:g} x {t['amount']:g}")
    if len(trades) > SHOWN_TRADES:
        click.echo(f"  ... and {len(trades) - SHOWN_TRADES:,} more (--json lists all)")
    for name, said in one["recount"].items():
        verdict = "agrees" if said["agrees"] else "DIFFERS"
        click.echo(f"  {name}: stored {said['stored']}, counted {said['counted']}: {verdict}")


def _values(title: str, row: dict[str, Any]) -> None:
    shown = ", ".join(f"{name} {_text(value)}" for name, value in row.items() if value not in (None, ""))
    click.echo(f"{title}: {shown}")


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


COMMANDS = [explain]
