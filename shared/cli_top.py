"""The command `top`: a live view of the deployment in the terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from shared.cli_common import echo_json
from shared.errors import TapelineError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from shared.cli import App
    from shared.top import Top, View
    from shared.top_reader import TopReader

KEYS = "q quits   p pauses"
PAUSED = "paused: p goes on   q quits"
# Of a snapshot that is not of a terminal.
WIDTH, HEIGHT = 160, 1000
POLL_SECONDS = 0.25
# After so long without an answer the screen says so; the connection itself is given up later.
PATIENCE_SECONDS = 2.0


@click.command()
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, metavar="SECONDS",
    help="How often to look.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="One snapshot (also off a terminal), rates over --every.")
@click.option("--json", "as_json", is_flag=True, help="One snapshot as JSON for programs.")
@click.pass_obj
def top(app: App, *, every: float, once: bool, as_json: bool) -> None:
    """What runs, live: feeds, streams and who is behind, workers, newest candles, gaps, cost. q quits, p pauses.

    Changes nothing, and reads Redis alone. While that does not answer, it says so and goes on trying.
    """
    from rich.console import Console

    from shared.cli import version
    from shared.log import Masker
    from shared.top import Top
    from shared.top_reader import TopReader

    console = Console(highlight=False, markup=False, emoji=False)
    reader = TopReader(app.settings)
    reader.open()
    made = Top(version(), reader.where, Masker(app.settings))
    if as_json or once or not console.is_terminal or console.is_dumb_terminal:
        view = _twice(reader, made, every)
        if as_json:
            echo_json(view)
        else:
            _print(view, console)
        return
    Screen(console, Looker(reader, made, every)).run()


def _twice(reader: TopReader, made: Top, seconds: float) -> View:
    """Two looks, because a rate takes two."""
    made.view(reader.look())
    time.sleep(seconds)
    return made.view(reader.look())


def _print(view: View, console: Console) -> None:
    from shared.top_screen import screen

    if not console.is_terminal:
        console.width = int(os.environ.get("COLUMNS") or WIDTH)
    with console.capture() as printed:
        console.print(screen(view, console.width, HEIGHT))
    click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


class Looker(threading.Thread):
    """Looks every so many seconds in a thread of its own, so that a Redis that does not answer holds up no key.

    `view` is the newest; `wake` has something to read after each look.
    """

    def __init__(self, reader: TopReader, made: Top, every: float) -> None:
        super().__init__(name="top", daemon=True)
        self._reader, self._made, self._every = reader, made, every
        self.where = reader.where
        self.view: View | None = None
        self.wake, self._told = os.pipe()
        self._asked = time.monotonic()
        self._answered = True

    def newest(self) -> View | None:
        """The newest view; one that says so when the look has been waiting for an answer."""
        waited = time.monotonic() - self._asked
        if self._answered or waited < PATIENCE_SECONDS:
            return self.view
        why = f"Redis at {self.where} has not answered for {waited:.0f} s"
        return self._made.away(why, time.time_ns() // 1_000_000)

    def run(self) -> None:
        while True:
            self._asked, self._answered = time.monotonic(), False
            try:
                self.view = self._made.view(self._reader.look())
            except TapelineError as error:
                self.view = self._made.away(str(error), time.time_ns() // 1_000_000)
            except Exception as error:  # what another program wrote must not end the looking
                why = f"what is in Redis cannot be read ({type(error).__name__})"
                self.view = self._made.away(why, time.time_ns() // 1_000_000)
            self._answered = True
            os.write(self._told, b".")
            time.sleep(max(0.1, self._every - (time.monotonic() - self._asked)))


class Screen:
    """Shows the newest view until q, Ctrl-C or SIGTERM; the terminal is left as it was."""

    def __init__(self, console: Console, looker: Looker) -> None:
        self._console, self._looker = console, looker
        self._paused = False
        self._shown: View | None = None

    def run(self) -> None:
        """Raises KeyboardInterrupt after Ctrl-C, SystemExit after SIGTERM."""
        from rich.live import Live

        with (
            _signals() as (ended, wake),
            _keys() as keys,
            Live(console=self._console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
        ):
            self._looker.start()
            size = self._draw(live)
            while not ended:
                ready, _, _ = select.select([*keys, self._looker.wake, wake], [], [], POLL_SECONDS)
                drawn = self._console.size == size and (self._paused or self._looker.newest() is self._shown)
                for source in ready:
                    read = os.read(source, 1024)
                    if source in keys:
                        if not read or b"q" in read or b"Q" in read or b"\x04" in read:
                            return
                        if b"p" in read or b" " in read:
                            self._paused, drawn = not self._paused, False
                    drawn = drawn and (self._paused or source != self._looker.wake)
                if not drawn:
                    size = self._draw(live)
        if ended[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + ended[0])

    def _draw(self, live: Live) -> tuple[int, int]:
        from rich.text import Text

        from shared.top_screen import screen

        width, height = size = self._console.size
        if not self._paused or self._shown is None:
            self._shown = self._looker.newest()
        hint = PAUSED if self._paused else KEYS
        found = (
            Text(f"looking at {self._looker.where}")
            if self._shown is None
            else screen(self._shown, width, height, hint)
        )
        live.update(found, refresh=True)
        return size


@contextmanager
def _signals() -> Iterator[tuple[list[int], int]]:
    """(the signals that asked for the end, a descriptor that wakes a select when one comes)."""
    ended: list[int] = []
    wake, told = os.pipe()
    os.set_blocking(told, False)
    old_wake = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH)

    def take(signum: int, _: object) -> None:
        if signum != signal.SIGWINCH:
            ended.append(signum)

    before = {signum: signal.signal(signum, take) for signum in wanted}
    try:
        yield ended, wake
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(old_wake)
        os.close(wake)
        os.close(told)


@contextmanager
def _keys() -> Iterator[list[int]]:
    """The descriptor of the keyboard, each key as it is struck; none where the input is no terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield [keyboard]
    finally:
        termios.tcsetattr(keyboard, termios.TCSAFLUSH, before)


COMMANDS = [top]
