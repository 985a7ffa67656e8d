"""The command `replay`."""

from __future__ import annotations

import signal
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shared.cli_common import echo_json, json_option, progress, source_argument, store_option, terminated, yes_option
from shared.errors import ConfigError
from shared.settings import Settings

if TYPE_CHECKING:
    from shared.cli import App
    from shared.replay import Progress, Summary


class _Speed(click.ParamType[str]):
    name = "speed"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "max":
            return value
        try:
            if 0 < float(value) < float("inf"):
                return value
        except ValueError:
            pass
        return self.fail(f"'{value}' is neither a positive number nor max", param, ctx)


@click.command()
@source_argument
@store_option
@click.option(
    "--speed", type=_Speed(), default="max", show_default=True, metavar="N|max", help="Multiple of market time."
)
@click.option("--aggregators", type=click.IntRange(1, 64), default=1, show_default=True, help="Aggregate workers.")
@click.option(
    "--frame-records", type=click.IntRange(1, 100_000), metavar="N", help="Ticks a frame (default: the setting)."
)
@click.option(
    "--redis", "redis_url", metavar="URL", help="Use this Redis (in a namespace of its own) instead of a throwaway one."
)
@yes_option
@json_option
@click.pass_obj
def replay(
    app: App, *, sources: tuple[str, ...], speed: str, aggregators: int, frame_records: int | None,
    redis_url: str | None, yes: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run recorded markets through the whole pipeline into the store: the rows that live would have made.

    SOURCE is one of these, in any mix:

    \b
      day.dbn, day.dbn.zst          Databento
      day.ndjson[.gz|.zst]          normalized Tardis messages, as recorded
      day.csv[.gz|.zst]             Tardis CSV downloads
      tardis://EXCHANGE?symbols=A,B&from=DAY&to=DAY[&types=trades,quotes][&via=server]
                                    CSV to be downloaded, or history through the server
      databento://DATASET?symbols=A,B&start=WHEN&end=WHEN[&schema=tbbo][&stype=parent]
                                    bought at Databento Historical, once the price was told

    Repeating it is harmless. It ends when the last row is stored; Ctrl-C leaves nothing behind but
    the rows stored so far.
    """

    from shared import replay as engine
    from shared.purchases import VENDOR, local
    from shared.sources import parse, programs
    from shared.stores_check import check_store

    settings = app.settings
    try:
        specs = tuple(parse(source) for source in sources)
        programs([spec for spec in specs if spec.kind != VENDOR], speed)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    check_store(settings.tapeline.store)
    signal.signal(signal.SIGTERM, terminated)
    specs = local(specs, settings, yes=yes, quiet=as_json)
    plan = engine.Plan(
        sources=specs,
        state=Path(tempfile.mkdtemp(prefix="tapeline-replay-")),
        speed=speed,
        aggregators=aggregators,
        frame_records=frame_records,
        redis=redis_url or "",
        namespace=f"replay-{uuid.uuid4().hex[:8]}" if redis_url else settings.tapeline.namespace,
    )
    with progress(as_json, line) as tell:
        summary = engine.run(plan, settings, app.config, tell)
    if as_json:
        echo_json(summary)
    else:
        print_summary(summary, settings)


def line(p: Progress) -> str:
    """How far it is."""
    return f"published {p.published:,}, aggregated {p.aggregated:,}, rows stored {p.stored:,} of {p.made:,}"


def print_summary(s: Summary, settings: Settings) -> None:
    """For people."""
    from shared.log import Masker

    skipped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(s.skipped.items()) if n) or "none"
    click.echo(f"{s.trades:,} trades in {s.seconds:.1f} s ({s.trades_per_second:,.0f} trades/s); skipped: {skipped}")
    others = ((s.books, "books"), (s.tickers, "tickers"), (s.liquidations, "liquidations"),
              (s.option_summaries, "option summaries"))  # fmt: skip
    if any(n for n, _ in others):
        click.echo(", ".join(f"{n:,} {name}" for n, name in others))
    click.echo(
        f"{s.candles:,} candles, {s.candles_1m:,} candles_1m and {s.candles_1s:,} candles_1s rows, "
        f"{s.late:,} late trades, {s.gaps:,} gaps, {s.dead_letters:,} dead letters"
    )
    if s.pressure or s.signals:
        click.echo(f"{s.pressure:,} rows of option pressure, {s.signals:,} signals")
    click.echo(f"stored in {Masker(settings)(settings.tapeline.store)}")


COMMANDS = [replay]
