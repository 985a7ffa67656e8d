"""Commands that make data: `generate`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from shared import registry
from shared.cli_common import bar, echo_json, json_option
from shared.errors import TapelineError

if TYPE_CHECKING:
    from shared.cli import App

DEFAULT_START = "2024-05-09T14:30:00Z"


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.dbn[.zst]")
@click.option("--trades", type=click.IntRange(min=1), default=100_000, show_default=True, help="How many trades.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed makes the same bytes.")
@click.option("--start", default=DEFAULT_START, show_default=True, help="Time of the first trade.")
@click.option("--roots", default="ES,NQ,CL", show_default=True, help="Roots, separated by commas.")
@click.option("--contracts", type=click.IntRange(min=1), default=2, show_default=True, help="Contracts per root.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=50.0,
    show_default=True,
    help="Trades per second of market time.",
)
@click.option(
    "--late-fraction",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of trades that arrive late.",
)
@click.option(
    "--late-seconds", type=click.FloatRange(min=0), default=0.0, show_default=True, help="How late they are at most."
)
@click.option("--definitions", is_flag=True, help="Put instrument definitions before the trades.")
@click.option("--sessions", is_flag=True, help="Keep to the market's hours.")
@click.option("--options", is_flag=True, help="Trade options, too: a tenth of the trades; with --definitions.")
@json_option
@click.pass_obj
def generate(
    _: App, *, out: Path, trades: int, seed: int, start: str, roots: str, contracts: int, rate: float,
    late_fraction: float, late_seconds: float, definitions: bool, sessions: bool, options: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a DBN file of a synthetic market: the same seed, the same file."""
    chosen = tuple(root.strip().upper() for root in roots.split(",") if root.strip())
    if not chosen:
        raise click.BadParameter("name at least one root, such as ES", param_hint="--roots")
    if not out.absolute().parent.is_dir():
        raise TapelineError(f"cannot write {out}: there is no folder {out.absolute().parent}")
    start_ns = _start(start)
    make = registry.resolve(registry.TOOLS["generate"])
    try:
        with bar(as_json, "trades", trades) as tell:
            summary = cast(
                "dict[str, object]",
                make(
                    out, trades=trades, seed=seed, start=start_ns, roots=chosen, contracts=contracts, rate=rate,
                    late_fraction=late_fraction, late_seconds=late_seconds, definitions=definitions, sessions=sessions,
                    options=options, progress=tell,
                ),
            )  # fmt: skip
    except OSError as error:
        raise TapelineError(f"cannot write {out}: {error.strerror}") from None
    if as_json:
        echo_json(summary)
        return
    click.echo(", ".join(f"{name} {value}" for name, value in summary.items()))


def _start(text: str) -> int:
    """Nanoseconds of an ISO time; UTC when it names no zone."""
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter(f"'{text}' is no ISO time such as {DEFAULT_START}", param_hint="--start") from None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return int(at.timestamp()) * 1_000_000_000 + at.microsecond * 1000


COMMANDS = [generate]
