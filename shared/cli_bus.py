"""Commands that look at the bus: `status`, `tail`, `streams`."""

from __future__ import annotations

import sys
import threading
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from shared.cli_common import bar, echo_json, json_option, leaving_at_once, looking
from shared.errors import TapelineError
from shared.keys import TOPICS

if TYPE_CHECKING:
    from rich.table import Table

    from shared.cli import App
    from shared.status import Consumer, Status, Stream

TAIL_TOPICS = ("ticks", "candles", "late", "pressure", "signals", "usage", "gaps", "clocks", "instruments")


@click.command()
@json_option
@click.pass_obj
def status(app: App, as_json: bool) -> None:
    """Where every stage and sink stands, who works, what the feeds say, who holds the trimming."""
    import msgspec

    from shared.feeds import states
    from shared.health import unhealthy, verdicts
    from shared.status import Reader

    with looking(app.settings) as (bus, partitions):
        found = Reader(bus, partitions, app.settings.redis.lease_seconds).read()
        wrong = unhealthy(verdicts(found, states(bus), app.settings))
    if as_json:
        echo_json({**msgspec.structs.asdict(found), "unhealthy": wrong})
        return
    _print_status(found)
    for verdict in wrong:
        click.secho(f"unhealthy {verdict.line}", fg="red")


def _print_status(found: Status) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(f"Redis {found.redis}, {found.partitions} partitions")
    for name, feed in found.feeds.items():
        console.print(f"feed {name}: {_feed(feed, found.now_ms)}", markup=False)
    for stage, counted in found.counters.items():
        if counted:
            console.print(f"{stage}: " + ", ".join(f"{name} {value:,}" for name, value in counted.items()))
    for w in found.workers:
        state = "alive" if w.alive else "[red]dead[/red]"
        parts = f", partitions {','.join(map(str, w.partitions))}" if w.partitions else ""
        console.print(
            f"worker {w.worker}: {state}, seen {w.age_seconds:.1f} s ago{parts}{', ' + w.detail if w.detail else ''}"
        )
    if not found.streams:
        console.print("no stream holds anything yet")
        return
    console.print(_stages(found))
    for stream in found.streams:
        for consumer in stream.consumers:
            if consumer.holds_trimming:
                console.print(f"trimming of {stream.topic} {stream.partition} waits for {consumer.name}")


def _feed(feed: dict[str, Any], now_ms: int) -> str:
    from shared.frames import iso

    parts = [str(feed.get("state", "?")) + (f" ({feed['detail']})" if feed.get("detail") else "")]
    if feed.get("published"):
        parts.append(f"{feed['published']:,} records published")
    if feed.get("last_event_ns"):
        parts.append(f"last event {iso(int(feed['last_event_ns']))[:23]}")
    if feed.get("at_ms"):
        parts.append(f"seen {max(0, now_ms - int(feed['at_ms'])) / 1000:.1f} s ago")
    return ", ".join(parts)


def _stages(found: Status) -> Table:
    from rich.table import Table

    from shared.frames import iso

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("stage", "p", "topic", "position", "behind", "seconds", "last event", "owner"):
        table.add_column(head, justify="right" if head in ("p", "behind", "seconds") else "left", no_wrap=True)
    for stream in found.streams:
        last = iso(stream.last_event_ns)[:23] if stream.last_event_ns else "-"
        table.add_row(
            "(newest)", str(stream.partition), stream.topic, stream.newest, f"{stream.entries} held", "", last, ""
        )
        for c in stream.consumers:
            table.add_row(c.name, str(stream.partition), stream.topic, *_consumer(c))
    return table


def _consumer(c: Consumer) -> tuple[str, ...]:
    behind = ("" if c.exact else ">= ") + str(c.behind_records)
    return c.position, behind, f"{c.behind_seconds:.1f}", c.last_event[:23] or "-", c.owner or "-"


@click.command()
@click.argument("topic", type=click.Choice(TAIL_TOPICS))
@click.option("--symbol", metavar="ES", help="Only this symbol, root, ticker or underlying; BTC-USDT is BTCUSDT, too.")
@click.option(
    "--from",
    "start",
    metavar="WHEN",
    help="`start`, `-5m`, or an ISO time (of arrival on the bus); default: from now on.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N records.")
@click.option("--follow/--no-follow", default=True, help="Wait for more (default), or end at the newest.")
@json_option
@click.pass_obj
def tail(
    app: App, *, topic: str, symbol: str | None, start: str | None, count: int | None, follow: bool, as_json: bool
) -> None:
    """Print what is on the bus, decoded, from all partitions. Changes nothing.

    With --no-follow and no --from it begins at the oldest entry held.
    """
    import msgspec

    from shared.tail import LINES, Tail, start_position

    with leaving_at_once(), looking(app.settings) as (bus, partitions):
        if not follow and start is None:
            start = "start"
        line = LINES[topic]
        records = Tail(bus, partitions, topic, symbol).records(start_position(bus, start), follow, threading.Event())
        for record in islice(records, count):
            click.echo(msgspec.json.encode(record).decode() if as_json else line(record))


@click.group()
def streams() -> None:
    """The streams of the bus: list, info, trim, drop-consumer."""


def _streams(app: App) -> list[Stream]:
    from shared.status import Reader

    with looking(app.settings) as (bus, partitions):
        return Reader(bus, partitions, app.settings.redis.lease_seconds).read().streams


@streams.command("list")
@json_option
@click.pass_obj
def list_streams(app: App, as_json: bool) -> None:
    """Every stream with what it holds."""
    found = _streams(app)
    if as_json:
        echo_json(found)
        return
    click.echo(f"{'topic':<8} {'p':>4} {'entries':>9} {'bytes':>12} {'records ever':>13}  consumers")
    for s in found:
        names = ", ".join(c.name for c in s.consumers) or "none"
        click.echo(f"{s.topic:<8} {s.partition:>4} {s.entries:>9} {s.bytes:>12} {s.records:>13}  {names}")


@streams.command()
@click.argument("topic", type=click.Choice(TOPICS))
@click.argument("partition", type=click.IntRange(min=0))
@json_option
@click.pass_obj
def info(app: App, topic: str, partition: int, as_json: bool) -> None:
    """One stream and how far each of its consumers is."""
    found = [s for s in _streams(app) if (s.topic, s.partition) == (topic, partition)]
    if not found:
        raise TapelineError(
            f"nothing was ever added to {topic} of partition {partition}; `tapeline streams list` shows what there is"
        )
    if as_json:
        echo_json(found[0])
        return
    s = found[0]
    click.echo(f"{s.topic} of partition {s.partition}: {s.entries} entries, {s.bytes} bytes held, newest {s.newest}")
    click.echo(f"ever added: {s.records} records in {s.frames} frames")
    for c in s.consumers:
        behind = ("" if c.exact else "at least ") + str(c.behind_records)
        holds = ", holds the trimming" if c.holds_trimming else ""
        click.echo(f"{c.name}: at {c.position}, {behind} records ({c.behind_seconds:.1f} s) behind{holds}")


@streams.command()
@click.option("--topic", type=click.Choice(TOPICS), help="Only this topic.")
@json_option
@click.pass_obj
def trim(app: App, topic: str | None, as_json: bool) -> None:
    """Remove what every consumer is done with and the debugging window does not want (workers do so, too)."""
    removed = {}
    with looking(app.settings) as (bus, partitions):
        topics = (topic,) if topic else TOPICS
        with bar(as_json, "streams", partitions * len(topics)) as tell:
            for number, name in enumerate(topics):
                removed[name] = 0
                for partition in range(partitions):
                    removed[name] += bus.trim(partition, name)
                    tell(number * partitions + partition + 1)
    if as_json:
        echo_json(removed)
        return
    for name, entries in removed.items():
        click.echo(f"{name}: {entries} entries removed")


@streams.command("drop-consumer")
@click.argument("consumer")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def drop_consumer(app: App, consumer: str, yes: bool, as_json: bool) -> None:
    """Forget a consumer that will not come back, so that trimming no longer waits for it.

    What it has not read may be trimmed; its store misses those rows if it comes back after all.
    """
    with looking(app.settings) as (bus, partitions):
        held = [
            (p, topic) for p in range(partitions) for topic in TOPICS
            if bus.call("hexists", bus.keys.consumers(p, topic), consumer)
        ]  # fmt: skip
        if not held:
            raise TapelineError(f"no consumer '{consumer}'; `tapeline streams list` shows who there is")
        if not yes:
            click.confirm(f"forget '{consumer}' on {len(held)} streams?", abort=True, err=True)
        for p, topic in held:
            bus.call("hdel", bus.keys.consumers(p, topic), consumer)
    if as_json:
        echo_json({"consumer": consumer, "streams": len(held)})
        return
    click.echo(f"'{consumer}' forgotten on {len(held)} streams")


COMMANDS = [status, tail, streams]
