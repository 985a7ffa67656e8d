"""What several commands share: opening the bus to look at it, printing JSON, telling how far they are."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from shared.settings import Settings

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.progress import Progress, ProgressColumn

    from shared.bus import Bus

TELL_SECONDS = 2.0
BUSY_SECONDS = 5.0
T = TypeVar("T")

Completer = Callable[[click.Context, click.Parameter, str], "list[CompletionItem[str]]"]


def completes(*words: str, files: bool = False) -> Completer:
    """What a shell offers for an argument: these words, or the names of files.

    A shell cannot mix the two, so words are offered where no file is called so.
    """

    def offer(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(word) for word in words if word.startswith(begun)]
        if files and (not found or not begun or any(name.startswith(begun) for name in os.listdir())):
            return [CompletionItem(begun, type="file")]
        return found

    return offer


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def _use_store(context: click.Context, _: click.Parameter, url: str | None) -> None:
    if url is not None:
        context.obj.use_store(url)


store_option = click.option(
    "--store", metavar="URL", expose_value=False, callback=_use_store, help="The store (default: TAPELINE_STORE).",
    shell_complete=completes("sqlite:///", "postgresql://", "bigquery://"),
)  # fmt: skip
source_argument = click.argument(
    "sources", nargs=-1, required=True, metavar="SOURCE...",
    shell_complete=completes("tardis://", "databento://", files=True),
)  # fmt: skip
TIMEFRAMES = ("15s", "30s", "1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w")

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
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        with _moving(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as moving:
            task = moving.add_task("starting")
            yield lambda so_far: moving.update(task, description=line(so_far))
    else:
        yield _now_and_then(line)


@contextmanager
def bar(quiet: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A moving bar on a terminal, a plain line now and then off it; it is told how many of `total` are done."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with _moving(*columns) as moving:
            task = moving.add_task(what, total=total)
            yield lambda done: moving.update(task, completed=done)
    else:
        yield _now_and_then(lambda done: f"{what}: {done:,} of {total:,}")


@contextmanager
def busy(quiet: bool, what: str, *, data: bool = False) -> Iterator[None]:
    """For what cannot say how far it is: `what` and the time it takes. `data`: stdout is for that alone."""
    if quiet or sys.stderr.isatty():
        with progress(quiet, str) as tell:
            tell(what)
            yield
        return
    over, began = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(BUSY_SECONDS):
            click.echo(f"{what}: {time.monotonic() - began:.0f} s", err=data)

    thread = threading.Thread(target=tick, name="busy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _moving(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True)


def _now_and_then(line: Callable[[T], str]) -> Callable[[T], None]:
    next_at = time.monotonic() + TELL_SECONDS

    def tell(so_far: T) -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + TELL_SECONDS
            click.echo(line(so_far))

    return tell
