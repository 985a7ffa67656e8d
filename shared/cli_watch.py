"""The command `watch`."""

from __future__ import annotations

import os
import sys
import threading
from itertools import islice
from typing import TYPE_CHECKING

import click

from shared.cli_common import TIMEFRAMES, completes, json_option, leaving_at_once, looking
from shared.timeframes import name_of, seconds_of

if TYPE_CHECKING:
    from shared.cli import App


class _Timeframe(click.ParamType[str]):
    name = "timeframe"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        seconds = seconds_of(value)
        if not seconds:
            return self.fail(f"'{value}' is no timeframe such as 15s, 1m, 4h, 1d or 1w", param, ctx)
        return name_of(seconds)


@click.command()
@click.argument("symbols", nargs=-1, required=True, metavar="SYMBOL...")
@click.option(
    "--timeframe", "timeframes", type=_Timeframe(), multiple=True, metavar="1m", shell_complete=completes(*TIMEFRAMES),
    help="Only candles of this length; may be given again (default: all).",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N candles.")
@click.option(
    "--from",
    "start",
    metavar="WHEN",
    help="`start`, `-5m`, or an ISO time (of arrival on the bus); default: from now on.",
)
@click.option("--follow/--no-follow", default=True, help="Wait for more (default), or end at the newest.")
@json_option
@click.pass_obj
def watch(
    app: App, *, symbols: tuple[str, ...], timeframes: tuple[str, ...], count: int | None, start: str | None,
    follow: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print closed candles of SYMBOLs as they come: prices, volumes, tick rate, features. Changes nothing.

    BTC-USDT is BTCUSDT and BTC-USDT-SWAP on every exchange; binance:BTCUSDT is that one, ES the
    continuous ticker. A correction of a candle comes as another line, with its revision.
    """
    import msgspec

    from shared.tail import start_position
    from shared.watch import Watch, colour, line

    made = {name_of(seconds_of(text)) for text in app.settings.aggregate.timeframes}
    for timeframe in timeframes:
        if timeframe not in made:
            told = ", ".join(app.settings.aggregate.timeframes)
            click.echo(f"tapeline: no {timeframe} candles are made by these settings, only {told}", err=True)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    with leaving_at_once(), looking(app.settings) as (bus, partitions):
        if not follow and start is None:
            start = "start"
        found = Watch(bus, partitions, symbols, timeframes)
        position = start_position(bus, start)
        for symbol in found.unknown():
            waits = ", waiting for it" if follow else ""
            click.echo(f"tapeline: nothing on the bus is called {symbol} yet{waits}", err=True)
        for record in islice(found.candles(position, follow, threading.Event()), count):
            if as_json:
                click.echo(msgspec.json.encode(record).decode())
            elif coloured:
                click.echo(click.style(line(record), fg=colour(record)))
            else:
                click.echo(line(record))


COMMANDS = [watch]
