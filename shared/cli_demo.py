"""The command `demo`."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from shared.cli_common import echo_json, json_option, terminated

if TYPE_CHECKING:
    from shared.cli import App
    from shared.demo import Progress, Summary
    from shared.supervision import Supervision

TELL_SECONDS = 5.0
SHOW_EVERY_SECONDS = 5


@click.command()
@json_option
@click.pass_obj
def demo(app: App, as_json: bool) -> None:
    """A synthetic market through the whole pipeline: ten minutes of history, then live; needs no key.

    Its page is at http://127.0.0.1:8000, or on another port where that one is taken. On a terminal it goes on and
    prints candles until Ctrl-C; elsewhere it stops everything and ends.
    """
    from shared.demo import Demo, supervision

    signal.signal(signal.SIGTERM, terminated)
    with supervision(app.settings, app.config) as running:
        if not as_json:
            click.echo(running.about)
            _page(running)
        at = Demo(running)
        with _progress(as_json) as tell:
            at.watch(tell)
        summary = at.summary()
        if as_json:
            echo_json(summary)
            return
        stays = sys.stdout.isatty() and sys.stdin.isatty()
        _print(summary, running, stays)
        if stays:
            _follow(running)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    if quiet:
        yield lambda _: None
    elif sys.stdout.isatty():
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        with Bar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda p: bar.update(task, description=_phase(p), completed=p.done, total=p.total if p.done else None)
    else:
        next_at = 0.0

        def tell(p: Progress) -> None:
            nonlocal next_at
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + TELL_SECONDS
                click.echo(f"{_phase(p)}: {p.done:.0f} of {p.total:.0f} s of market time stored")

        yield tell


def _page(running: Supervision) -> None:
    from shared.supervise import page_url

    web = running.settings.web
    if web.port:
        click.echo(f"the page: {page_url(web)}")


def _phase(p: Progress) -> str:
    return "live" if p.live else "history" if p.done else "starting"


def _print(s: Summary, running: Supervision, stays: bool) -> None:
    at, store = running.at, running.settings.tapeline.store
    click.echo(f"{s.trades:,} trades in, {s.rows:,} rolling one-minute candles stored in {s.seconds:.0f} s")
    for ticker, last in sorted(s.last.items()):
        click.echo(
            f"  {ticker:<4} {s.candles[ticker]:>5} candles; {last['time']} {last['symbol']} "
            f"close {last['close']:g}, volume {last['volume']:g}, cvd {last['cvd_close']:g}"
        )
    if s.latency_p50_ms is not None:
        click.echo(
            f"latency of live rows, window end to computed: p50 {s.latency_p50_ms} ms, p99 {s.latency_p99_ms} ms"
        )
    click.echo(f"store: {store}\nlogs:  {at.logs}")
    if stays:
        _page(running)
    click.echo("next:")
    if stays:
        click.echo(
            f"  TAPELINE_STATE_DIR={at.state} tapeline status    (in another terminal; also: tail ticks, doctor)"
        )
    path = store.removeprefix("sqlite:///")
    query = "SELECT time, ticker, close, vd FROM candles_1m ORDER BY time DESC LIMIT 5"
    click.echo(f"  sqlite3 {path} '{query}'")
    click.echo(
        "  tapeline up        (the same, to stay; DATABENTO_API_KEY and TAPELINE_FEEDS=databento for the real market)"
    )


def _follow(running: Supervision) -> None:
    """New candles until Ctrl-C."""
    from shared.bus import Bus
    from shared.tail import LINES, Tail

    click.echo(f"new candles every {SHOW_EVERY_SECONDS} s; Ctrl-C ends the demo")
    s = running.settings
    bus = Bus(s.redis.url, s.tapeline.namespace)
    try:
        for record in Tail(bus, s.tapeline.partitions, "candles").records(None, True, threading.Event()):
            if record["type"] == "candle_1m" and record["time_ns"] // 10**9 % SHOW_EVERY_SECONDS == 0:
                click.echo(LINES["candles"](record))
    except KeyboardInterrupt:
        click.echo("stopping")
    finally:
        bus.close()


COMMANDS = [demo]
