"""The command `usage`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import echo_json, json_option

if TYPE_CHECKING:
    from shared.cli import App
    from shared.usage import Row

LINE = "{:<10}  {:<24} {:>13} {:>10} {:>7} {:>10} {:>9} {:>6}  {}"


@click.command()
@click.option("--days", type=click.IntRange(1, 10_000), default=7, show_default=True, metavar="N", help="UTC days.")
@json_option
@click.pass_obj
def usage(app: App, *, days: int, as_json: bool) -> None:
    """What each feed used on each UTC day, what it cost, and how much of the budget that is.

    Reads the running deployment, and the store for days that it does not hold.
    """
    from shared.usage import DAY_NS, day_of, now_ns
    from shared.usage_book import collect

    rows, missing = collect(app.settings, day_of(now_ns() - (days - 1) * DAY_NS))
    if as_json:
        echo_json([_record(row) for row in rows])
        return
    if missing:
        click.echo(f"not all is known: {missing}", err=True)
    if not rows:
        click.echo(f"nothing was used in the last {days} days" if days > 1 else "nothing was used today")
        return
    click.echo(LINE.format("day", "feed", "events", "MiB", "hours", "cost", "budget", "share", "state"))
    for row in rows:
        r = _record(row)
        budget, share = ("-", "-") if r["share"] is None else (f"${r['budget_usd']:.2f}", f"{r['share']:.0%}")
        amounts = (f"{r['events']:,}", f"{r['mib']:,.1f}", f"{r['hours']:.2f}", f"${r['cost_usd']:.4f}")
        click.echo(LINE.format(r["day"], r["feed"], *amounts, budget, share, r["state"]))


def _record(row: Row) -> dict[str, Any]:
    from shared.frames import iso
    from shared.usage import HOUR_SECONDS, MIB

    return {
        "day": row.day,
        "feed": row.feed,
        "events": row.day_events,
        "bytes": row.day_bytes,
        "mib": row.day_bytes / MIB,
        "connected_seconds": row.day_connected_seconds,
        "hours": row.day_connected_seconds / HOUR_SECONDS,
        "cost_usd": row.day_cost_usd,
        "budget_usd": row.budget_usd,
        "share": row.day_cost_usd / row.budget_usd if row.budget_usd > 0 else None,
        "state": row.state,
        "at": iso(row.at_ns),
    }


COMMANDS = [usage]
