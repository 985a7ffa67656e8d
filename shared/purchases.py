"""What a command buys before it plays it: the price is said, the budget asked, and then it is fetched.

A request above what is left of the day's budget needs `--yes`; on a terminal, any that costs something is asked about.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import click

from shared import registry
from shared.cli_common import busy
from shared.errors import ConfigError, TapelineError
from shared.settings import Settings
from shared.sources import SourceSpec, parse
from shared.usage import MIB

VENDOR = "databento"
TELL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request costs, USD, and the bytes of its records (None: the vendor does not tell)."""

    what: str
    cost_usd: float
    nbytes: int | None = None

    def __str__(self) -> str:
        size = "" if self.nbytes is None else f", {self.nbytes / MIB:.1f} MiB"
        return f"{self.what}: ${self.cost_usd:.4f}{size}"


class Order(Protocol):
    """See services.ingest.databento_download."""

    paths: list[Path]

    def quotes(self) -> list[Quote]: ...

    def fetch(self, tell: Callable[[str], None]) -> None: ...


def local(specs: Sequence[SourceSpec], settings: Settings, *, yes: bool, quiet: bool) -> tuple[SourceSpec, ...]:
    """The sources with files in place of `databento://`, bought where they are not here yet.

    `quiet`: stdout is for programs. Raises TapelineError when that would be too dear, AuthError, ConfigError,
    Unavailable.
    """
    wanted = [spec for spec in specs if spec.kind == VENDOR]
    if not wanted:
        return tuple(specs)
    for spec in wanted:
        if wanted.count(spec) > 1:
            raise ConfigError(f"{spec.text} is given twice: its trades would count twice")
    make = registry.resolve(registry.TOOLS["databento-order"])
    order = cast("Order", make(wanted, settings, threading.Event()))
    with busy(quiet, "asking Databento for the price"):
        quotes = order.quotes()
    for quote in quotes:
        click.echo(str(quote), err=quiet)
    if quotes:
        _agree(sum(quote.cost_usd for quote in quotes), settings, yes, quiet)
        with _telling(quiet) as tell:
            order.fetch(tell)
    bought = [parse(str(path)) for path in order.paths]
    return (*(spec for spec in specs if spec.kind != VENDOR), *bought)


def _agree(cost: float, settings: Settings, yes: bool, quiet: bool) -> None:
    from shared.usage_book import left_usd  # noqa: PLC0415

    left = left_usd(settings, VENDOR)
    if cost > left and not yes:
        raise TapelineError(
            f"this costs ${cost:.4f} at Databento Historical, more than the ${left:.2f} that is left of today's "
            f"budget: ask for less, raise usage.daily_usd (now {settings.usage.daily_usd:g}), or buy it with --yes"
        )
    if cost > 0:
        rest = "" if left == float("inf") else f"; ${left:.2f} of today's budget was left"
        click.echo(f"buying it for ${cost:.4f} at Databento Historical{rest}", err=quiet)
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            click.confirm("go on?", abort=True, err=True)


@contextmanager
def _telling(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A moving line on a terminal, a plain one now and then off it."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415

        with Console(stderr=True).status("fetching") as status:
            yield status.update
    else:
        next_at = 0.0

        def tell(text: str) -> None:
            nonlocal next_at
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + TELL_SECONDS
                click.echo(text)

        yield tell
