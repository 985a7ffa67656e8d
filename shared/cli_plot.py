"""The command `plot`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import TIMEFRAMES, busy, completes, echo_json, json_option, store_option
from shared.errors import ConfigError, TapelineError

if TYPE_CHECKING:
    from shared.cli import App

KINDS = {".png": "png", ".html": "html", ".htm": "html"}
MOST_BARS = 200_000


@click.command()
@click.argument("symbol")
@click.option(
    "--timeframe", default="1m", show_default=True, help="A length (15s, 1m, 4h), rolling or seconds.",
    shell_complete=completes(*TIMEFRAMES, "rolling", "seconds"),
)  # fmt: skip
@click.option("--since", metavar="WHEN", help="The first instant, ISO; UTC when it names no zone.")
@click.option("--until", metavar="WHEN", help="The instant behind the last one.")
@click.option(
    "--last", type=click.IntRange(1, MOST_BARS), help="The newest N bars (default: 500 where no range is given)."
)
@click.option("--underlying", default="", metavar="U", help="Whose option pressure (default: found by the symbol).")
@store_option
@click.option("--theme", type=click.Choice(["light", "dark"]), help="Colours (default: light; HTML: the reader's).")
@click.option(
    "--out", metavar="FILE", help="Where to: .png or .html; - is stdout. An existing file is replaced.",
    shell_complete=completes(files=True),
)  # fmt: skip
@click.option("--format", "kind", type=click.Choice(["png", "html"]), help="The format (default: by FILE, else png).")
@json_option
@click.pass_obj
def plot(
    app: App, *, symbol: str, timeframe: str, since: str | None, until: str | None, last: int | None,
    underlying: str, theme: str | None, out: str | None, kind: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Draw candles, order flow and option pressure of a symbol as a PNG or a self-contained HTML file.

    \b
      tapeline plot ES --last 300
      tapeline plot NQ --since 2026-11-20T14:30Z --until 2026-11-20T21:00Z --theme dark --out nq.png
      tapeline plot binance-futures:BTCUSDT --timeframe 1h --out btc.html

    SYMBOL as in the store: ES, ESZ6, or exchange:symbol.
    """
    from shared import registry
    from shared.reader_bars import series_of

    chosen = _kind(out, kind)
    if out == "-" and as_json:
        raise click.UsageError("--out - writes the plot to stdout, where --json would, too")
    if out == "-" and sys.stdout.isatty():
        raise click.UsageError("a plot is not for a terminal: redirect it, or give --out FILE")
    try:
        series_of(symbol, timeframe)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    first, end = _when("--since", since), _when("--until", until)
    if first is not None and end is not None and first >= end:
        raise click.UsageError("--until (exclusive) must be later than --since")
    if out not in (None, "-"):
        _check_folder(Path(str(out)))
    draw: Any = registry.resolve(registry.TOOLS["plot"])
    with busy(as_json, f"drawing {symbol}", data=out == "-"):
        body, summary = draw(
            app.settings, chosen, theme, symbol=symbol, timeframe=timeframe, since=first, until=end, last=last,
            underlying=underlying,
        )  # fmt: skip
    if out == "-":
        sys.stdout.buffer.write(body)
        return
    path = Path(out or default_name(summary, chosen))
    write(path, body)
    if as_json:
        echo_json({"file": str(path), "format": chosen} | summary)
    else:
        click.echo(f"{path}: {_told(summary)}, {_size(len(body))}")


def _kind(out: str | None, given: str | None) -> str:
    by_name = KINDS.get(Path(out).suffix.lower()) if out and out != "-" else None
    if given:
        return given
    if out and out != "-" and by_name is None:
        raise click.BadParameter(f"'{out}' ends in neither .png nor .html: give --format", param_hint="--out")
    return by_name or "png"


def _when(option: str, text: str | None) -> str | None:
    """An instant as an ISO text in UTC."""
    from shared.frames import iso
    from shared.instants import instant_ns

    if text is None:
        return None
    try:
        return iso(instant_ns(text))
    except ValueError:
        raise click.BadParameter(f"'{text}' is no time such as 2024-05-09T14:30:00Z", param_hint=option) from None


def default_name(summary: dict[str, Any], kind: str) -> str:
    """`NQ_1m_20240508T140000Z_20240508T170000Z.png`: letters that any file system takes."""
    symbol = re.sub(r"[^A-Za-z0-9.]+", "-", summary["symbol"]).strip("-.") or "plot"
    start, end = (re.sub(r"[-:]", "", summary[name]) for name in ("start", "end"))
    return f"{symbol}_{summary['timeframe']}_{start}_{end}.{kind}"


def _check_folder(path: Path) -> None:
    """Before the store is read. Raises TapelineError."""
    if path.is_dir():
        raise TapelineError(f"cannot write {path}: it is a folder")
    if not path.absolute().parent.is_dir():
        raise TapelineError(f"cannot write {path}: there is no folder {path.absolute().parent}")


def write(path: Path, body: bytes) -> None:
    """Write a file whole or not at all; what stood there is replaced. Raises TapelineError."""
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name[:200]}.{os.getpid()}.part")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(body)  # a pipe or a device
            return
        try:
            part.write_bytes(body)
            if target.exists():
                part.chmod(target.stat().st_mode & 0o777)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise TapelineError(f"cannot write {path}: {error.strerror}") from None


def _told(summary: dict[str, Any]) -> str:
    told = [f"{summary['rows']:,} {summary['timeframe']} bars of {summary['symbol']}"]
    if summary["incomplete"]:
        told[0] += f" ({summary['incomplete']:,} incomplete)"
    for name, what in (("big_trades", "big trades"), ("signals", "signals")):
        if summary[name]:
            told.append(f"{summary[name]:,} {what}")
    if summary["pressure_columns"]:
        told.append(f"option pressure of {summary['underlying']}")
    return ", ".join([*told, f"{summary['start']} to {summary['end']}"])


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1000:.0f} kB"


COMMANDS = [plot]
