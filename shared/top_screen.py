"""A view of `tapeline top` as lines of a terminal: what does not fit is left out, nothing wraps."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.health import Verdict, ranges
from shared.records import number
from shared.top import CandleView, ConsumerView, Cost, FeedView, StreamView, View, WorkerView

# From this width on there are two columns of sections; each column's tables have all of their own columns from ROOMY.
WIDE, ROOMY = 150, 96
MOST_TROUBLES = 6
WRONG = "wrong  "
# A lag of so many seconds is worth a colour; an age of a heartbeat, too.
SLOW_SECONDS, VERY_SLOW_SECONDS = 5.0, 30.0
DIGITS = 9


class Column(NamedTuple):
    """A table's column; `roomy`: only where there is room; `rest`: takes what is left of the width."""

    head: str
    right: bool = False
    roomy: bool = False
    rest: bool = False
    least: int = 0


class Section(NamedTuple):
    """A table. `rows`: a cell a column; the first rows are the ones that matter when not all fit."""

    columns: tuple[Column, ...]
    rows: list[tuple[Text, ...]]
    empty: str

    @property
    def lines(self) -> int:
        """With its head, and a line that says that it is empty."""
        return 1 + max(1, len(self.rows))


FEEDS = (
    Column("FEED"), Column("state"), Column("event age", right=True, least=9), Column("rec/s", right=True, least=7),
    Column("published", right=True, roomy=True, least=9), Column("", rest=True),
)  # fmt: skip
STREAMS = (
    Column("STREAM", least=8), Column("rec/s", right=True, least=6), Column("held", right=True, roomy=True, least=8),
    Column("full", right=True, least=4), Column("consumer", least=9), Column("rec/s", right=True, roomy=True, least=6),
    Column("behind", right=True, least=6), Column("for", right=True, least=6), Column("owners", rest=True),
)  # fmt: skip
WORKERS = (
    Column("WORKER"), Column("host", roomy=True), Column("partitions"), Column("seen", right=True, least=6),
    Column("stalled", right=True, least=7), Column("", rest=True),
)  # fmt: skip
CANDLES = (
    Column("CANDLE"), Column("symbol", roomy=True), Column("span", right=True), Column("time", right=True, least=8),
    Column("close", right=True, least=8), Column("change", right=True, least=7), Column("volume", right=True, least=6),
    Column("vd", right=True, least=6), Column("cvd", right=True, least=6), Column("", rest=True),
)  # fmt: skip


def screen(view: View, width: int, height: int, hint: str = "") -> RenderableType:
    """The view in `width` columns and at most `height` lines; `hint`: the keys, in the last of them."""
    head = _head(view, width, max(2, min(MOST_TROUBLES, height // 8)))
    foot = [_counted(view), *([Text(hint, "dim")] if hint else [])]
    room = height - len(head) - len(foot)
    if not view.partitions:  # Redis was never seen: there is nothing else to say
        return _lines([*head, *([Text(hint, "dim")] if hint else [])][:height])
    feeds, streams, workers, candles = (
        _feeds(view.feeds),
        _streams(view.streams),
        _workers(view.workers),
        _candles(view),
    )
    if width >= WIDE:
        half = (width - 3) // 2
        body = Table.grid(padding=(0, 3, 0, 0))
        body.add_column(width=half, no_wrap=True)
        body.add_column(width=half, no_wrap=True)
        body.add_row(_stack([feeds, streams], half, room), _stack([candles, workers], half, room))
        return Group(_lines(head), body, _lines(foot))
    return Group(_lines(head), _stack([feeds, streams, candles, workers], width, room), _lines(foot))


def share_out(wanted: Sequence[int], room: int) -> list[int]:
    """Lines for each section: the longest give way first, down to two lines; then the last ones are left out."""
    found = list(wanted)
    while sum(found) > room and max(found, default=0) > 2:
        found[max(range(len(found)), key=lambda i: (found[i], i))] -= 1
    while sum(found) > max(0, room):
        found[max(i for i, lines in enumerate(found) if lines)] = 0
    return found


def _stack(sections: list[Section], width: int, room: int) -> RenderableType:
    """Sections below each other, with a line between where there is one to spare."""
    lines = share_out([section.lines for section in sections], room)
    spare = room - sum(lines) >= len(sections)
    parts: list[RenderableType] = []
    for section, allowed in zip(sections, lines, strict=True):
        if allowed:
            parts += [Text("")] if spare else []
            parts.append(_table(section, width, allowed))
    if spare:
        parts.append(Text(""))
    return Group(*parts)


def _table(section: Section, width: int, lines: int) -> RenderableType:
    roomy = width >= ROOMY
    shown = [i for i, column in enumerate(section.columns) if roomy or not column.roomy]
    table = Table(box=None, pad_edge=False, padding=(0, 2 if roomy else 1, 0, 0), header_style="", width=width)
    for i in shown:
        column = section.columns[i]
        table.add_column(
            Text(column.head, "dim" if i else "bold", no_wrap=True), justify="right" if column.right else "left",
            no_wrap=True, overflow="ellipsis", min_width=column.least or None, ratio=1 if column.rest else None,
        )  # fmt: skip
    fits = lines - 1
    rows = section.rows if len(section.rows) <= fits else section.rows[: fits - 1]
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    left = len(section.rows) - len(rows)
    more = f"+{left} more" if left else "" if section.rows else section.empty
    return Group(table, Text(more, "dim", no_wrap=True, overflow="ellipsis")) if more else table


def _lines(texts: list[Text]) -> RenderableType:
    for text in texts:
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*texts)


# -- the parts -------------------------------------------------------------------------------


def _head(view: View, width: int, most: int) -> list[Text]:
    about = f"{view.namespace}, {view.partitions} partitions, " if view.partitions else ""
    first = Text.assemble((f"Tapeline {view.version}", "bold"), f"  {view.time[11:]}  {about}Redis {view.redis}")
    if view.healthy:
        return [first, Text("fine", "bold green")]
    lines, told = [first], 0
    for trouble in view.troubles:
        wrapped = wrap(_name(trouble, view) + trouble.why, max(20, width - len(WRONG)))[:most]
        if told and len(lines) + len(wrapped) > most:
            break
        lines += [Text.assemble((" " * len(WRONG) if i else WRONG, "bold red"), line) for i, line in enumerate(wrapped)]
        told += 1
    if told < len(view.troubles):
        lines.append(Text(f"+{len(view.troubles) - told} more are wrong", "bold red"))
    if view.redis_trouble and view.partitions:
        lines.append(Text(f"what follows is of {age(view.age_seconds)} ago", "yellow"))
    return lines


def _name(verdict: Verdict, view: View) -> str:
    if verdict.kind == "redis":
        return ""  # its words name it
    if verdict.kind == "worker":
        return next((f"{w.name}: " for w in view.workers if w.worker == verdict.name), f"{verdict.name}: ")
    return ("feed " if verdict.kind == "feed" else "") + f"{verdict.name}: "


def _counted(view: View) -> Text:
    counted = view.counted
    parts = [(name, value) for name, value in (
        ("gaps", counted.gaps), ("late", counted.late), ("dead letters", counted.dead_letters),
    )]  # fmt: skip
    text = Text()
    for name, value in parts:
        text.append(f"{name} {value:,}", "yellow" if value else "").append("   ")
    text.append("cost today " + _cost(view.costs))
    if counted.ingest:
        told = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counted.ingest.items()))
        text.append(f"   ingest: {told}")
    return text


def _cost(costs: list[Cost]) -> str:
    budget = max((c.budget_usd for c in costs), default=0.0)
    told = f"${sum(c.cost_usd for c in costs):.2f}" + (f" of ${budget:.2f}" if budget else "")
    stopped = [c.feed for c in costs if c.state != "running"]
    return told + (f", stopped: {', '.join(stopped)}" if stopped else "")


def _feeds(feeds: list[FeedView]) -> Section:
    rows: list[tuple[Text, ...]] = []
    for f in sorted(feeds, key=lambda f: not f.why):
        fine = not f.why and f.state in ("connected", "ended")
        newest = Text("-" if f.event_age_seconds is None else age(f.event_age_seconds), _slow(f.event_age_seconds))
        rows.append((
            Text(f.feed), Text(f.state, "green" if fine else "yellow"), newest, Text(rate(f.records_per_second)),
            Text(compact(f.published)), Text(f.why, "red") if f.why else Text(f.detail),
        ))  # fmt: skip
    return Section(FEEDS, rows, "no feed was ever here")


def _streams(streams: list[StreamView]) -> Section:
    rows: list[tuple[float, tuple[Text, ...]]] = []
    for s in streams:
        full = Text(f"{s.full:.0%}", "red" if s.full > 0.8 else "yellow" if s.full > 0.5 else "")
        own = (Text(s.topic), Text(rate(s.records_per_second)), Text(size(s.bytes)), full)
        if not s.consumers:
            rows.append((0.0, (*own, Text("-"), *(Text("") for _ in range(4)))))
        for i, c in enumerate(s.consumers):
            first = own if i == 0 else tuple(Text(t.plain, "dim") for t in own)
            rows.append((c.lag_seconds, (*first, *_consumer(c))))
    # Whoever is slow stands first, the others in their order.
    rows.sort(key=lambda row: row[0] < SLOW_SECONDS)
    return Section(STREAMS, [cells for _, cells in rows], "no stream holds anything yet")


def _consumer(c: ConsumerView) -> tuple[Text, ...]:
    behind = ("" if c.exact else ">") + compact(c.lag_records)
    owners = ", ".join(f"{name} {ranges(parts)}" for name, parts in sorted(c.owners.items()))
    if len(c.owners) > 2:  # who has what is told of each worker
        owners = f"{len(c.owners)} workers"
    seconds = age(c.lag_seconds) if c.lag_records else "-"
    return (
        Text(c.name), Text(rate(c.records_per_second)), Text(behind), Text(seconds, _slow(c.lag_seconds)), Text(owners),
    )  # fmt: skip


def _workers(workers: list[WorkerView]) -> Section:
    rows: list[tuple[Text, ...]] = []
    for w in sorted(workers, key=lambda w: (not w.why, w.name)):
        stalled = age(w.stalled_seconds) if w.stalled_seconds >= SLOW_SECONDS else "-"
        rows.append((
            Text(w.name, "red" if w.why else ""), Text(w.host), Text(ranges(w.partitions) if w.partitions else "-"),
            Text(age(w.age_seconds), _slow(w.age_seconds)), Text(stalled, _slow(w.stalled_seconds)),
            Text(w.why, "red") if w.why else Text(w.detail or "fine"),
        ))  # fmt: skip
    return Section(WORKERS, rows, "no worker was ever here")


def _candles(view: View) -> Section:
    return Section(CANDLES, [_candle(c) for c in view.candles], "no candle yet")


def _candle(c: CandleView) -> tuple[Text, ...]:
    colour = "" if not c.change else "green" if c.change > 0 else "red"
    change = "-" if c.change_percent is None else f"{c.change_percent:+.2f}%"
    return (
        Text(c.ticker, "bold"), Text(c.symbol), Text(c.timeframe), Text(c.time[11:19]), Text(_price(c.close), colour),
        Text(change, colour), Text(_amount(c.volume)), Text(_amount(c.vd)), Text(_amount(c.cvd)),
        Text("" if c.complete else "incomplete", "yellow"),
    )  # fmt: skip


def _slow(seconds: float | None) -> str:
    if seconds is None or seconds < SLOW_SECONDS:
        return ""
    return "yellow" if seconds < VERY_SLOW_SECONDS else "red"


# -- numbers ---------------------------------------------------------------------------------


def compact(value: float) -> str:
    """At most six characters: 950, 12.3k, 4.56M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= scale:
            value /= 1e3 if unit == "k" else scale
            return f"{value:.3g}{unit}" if value < 1000 else f"{value:.0f}{unit}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"


def rate(value: float | None) -> str:
    """Per second; `-` where it is not known."""
    return "-" if value is None else compact(value)


def size(count: int) -> str:
    """Bytes: 912 B, 12.3 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def age(seconds: float) -> str:
    """0.4 s, 34 s, 12 min, 5.2 h, 12 d."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, scale, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def _price(value: float | None) -> str:
    return number(value, DIGITS)


def _amount(value: float | None) -> str:
    if value is None:
        return "-"
    return compact(value) if abs(value) >= 100_000 else number(value, 5)
