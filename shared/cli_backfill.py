"""The command `backfill`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from shared.cli_common import busy, echo_json, json_option, progress, source_argument, store_option, yes_option
from shared.cli_replay import line, print_summary
from shared.errors import ConfigError

if TYPE_CHECKING:
    from shared.cli import App


@click.command()
@source_argument
@store_option
@yes_option
@json_option
@click.pass_obj
def backfill(app: App, *, sources: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Bring recorded tapes into the store: the rows of `replay`, without Redis, in this one process.

    Rows that a gap left incomplete are mended by the whole ones of the tapes. Repeating it changes
    nothing; interrupted, it leaves the rows stored so far.
    """

    from shared import backfill as engine
    from shared.purchases import local
    from shared.sources import make, parse
    from shared.stores_check import check_store

    settings = app.settings
    try:
        specs = [parse(source) for source in sources]
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    check_store(settings.tapeline.store)
    with _stopping() as stopping:
        here = local(specs, settings, yes=yes, quiet=as_json)
        with busy(as_json, "fetching and opening the sources"):
            tapes = make(here, settings)
        stopping.gently = True
        with progress(as_json, line) as tell:
            summary = engine.run(tapes, settings, tell, stopping.stop)
        stopping.unwind()
    if as_json:
        echo_json(summary)
    else:
        print_summary(summary, settings)


class _Stopping:
    """The first SIGINT or SIGTERM asks the run to end behind its batch, a second one ends it anyhow."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.gently = False
        self._signal = 0

    def __call__(self, signum: int, _: object) -> None:
        again, self._signal = self._signal != 0, signum
        self.stop.set()
        if again or not self.gently:
            self.unwind()

    def unwind(self) -> None:
        """Raise what the signal means, if there was one."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal:
            sys.exit(128 + self._signal)


@contextmanager
def _stopping() -> Iterator[_Stopping]:
    handler = _Stopping()
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handler
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


COMMANDS = [backfill]
