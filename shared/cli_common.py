"""What several commands share: opening the bus to look at it, printing JSON."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from shared.settings import Settings

if TYPE_CHECKING:
    from shared.bus import Bus

TELL_SECONDS = 2.0
T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def _use_store(context: click.Context, _: click.Parameter, url: str | None) -> None:
    if url is not None:
        context.obj.use_store(url)


store_option = click.option(
    "--store", metavar="URL", expose_value=False, callback=_use_store, help="The store (default: TAPELINE_STORE)."
)

yes_option = click.option(
    "--yes", is_flag=True, help="Buy what databento:// sources cost, above the day's budget, too; do not ask."
)


@contextmanager
def looking(settings: Settings) -> Iterator[tuple[Bus, int]]:
    """(bus, its number of partitions) of the given Redis or of the `up` in the state directory; registers nothing.

    Raises ConfigError, BusUnavailable.
    """
    from shared.bus import Bus, Limits
    from shared.supervise import find_bus

    settings = find_bus(settings)
    r = settings.redis
    limits = Limits(r.stream_max_bytes, r.window_seconds * 1000)
    bus = Bus(r.url, settings.tapeline.namespace, cluster=r.cluster, limits=limits)
    try:
        bus.ping()
        held = bus.call("hget", bus.keys.deployment, "partitions")
        yield bus, int(held) if held else settings.tapeline.partitions
    finally:
        bus.close()


def echo_json(value: Any) -> None:
    """One JSON document on stdout."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ctrl-C ends the process where it stands (130): for commands that only look on, and have nothing to tidy up.

    An exception instead may be raised amid the locks of a library, and leave the process hanging.
    """

    def leave(signum: int, _: object) -> None:
        os.write(2, b"\ntapeline: interrupted\n")
        os._exit(128 + signum)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def terminated(signum: int, _: object) -> NoReturn:
    """A SIGTERM handler that unwinds, so that what a command started is stopped."""
    sys.exit(128 + signum)


@contextmanager
def progress(quiet: bool, line: Callable[[T], str]) -> Iterator[Callable[[T], None]]:
    """A moving line on a terminal, a plain one now and then off it; stderr is left to the one error line."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("starting")
            yield lambda so_far: bar.update(task, description=line(so_far))
    else:
        next_at = time.monotonic() + TELL_SECONDS

        def tell(so_far: T) -> None:
            nonlocal next_at
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + TELL_SECONDS
                click.echo(line(so_far))

        yield tell
