"""Where usage is kept: on the bus while a deployment runs, in the store for good, and for what a command bought in a
file of the state directory.

A day's frames on the topic `usage` hold each thing once: the cursor behind a frame says how much was told with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from shared.bus import Bus, Limits, worker_id
from shared.errors import BusBehind, Fenced, TapelineError
from shared.frames import Frame, ns_of
from shared.instruments import partition_of
from shared.messages import Usage, encode
from shared.settings import BIGQUERY_METHODS, Settings
from shared.stores import read_rows
from shared.supervise import find_bus
from shared.usage import (
    DAY_NS,
    HISTORY,
    KEPT_DAYS,
    NOTHING,
    RUNNING,
    Meter,
    Row,
    Totals,
    day_of,
    now_ns,
    stop_usd,
    totals_of,
    vendor,
)

log = logging.getLogger(__name__)

TOPIC = "usage"
# What writing to a store costs is told like a feed, but no ingest runs it.
STORES = {f"bigquery:{method}" for method in BIGQUERY_METHODS}


class Book:
    """The account of a meter on the bus. Every call may raise BusUnavailable; repeating it is harmless.

    `skipped` is kept beside the totals, see Row.
    """

    def __init__(self, bus: Bus, meter: Meter, owner: str, partitions: int, store: str) -> None:
        self.bus, self.meter, self.skipped = bus, meter, ""
        self._owner, self._store = owner, store
        self._partition = partition_of(meter.feed, partitions)
        self._producer = f"usage:{meter.feed}"
        self._key = bus.keys.usage(meter.feed)
        self._seq: int | None = None  # of the newest frame; None: to be asked for
        self._begun = False

    def attach(self) -> None:
        """Own the account from now on, and go on with what is known of it."""
        seq, cursor = self.bus.attach(self._partition, self._producer, self._owner)
        out = msgspec.json.decode(cursor, type=dict[str, Totals]) if cursor else {}
        rows = {day.decode(): row_of(body) for day, body in self.bus.call("hgetall", self._key).items()}
        today = self.meter.day
        before = max((day for day in rows if day < today), default="")
        for day in filter(None, (before, today)):
            self._join(day, rows.get(day), out.get(day, NOTHING) if seq else None)
        if not self._begun:
            newest = rows.get(max((day for day in rows if day <= today), default=""))
            self.skipped = newest.skipped if newest is not None else ""
        self._begun, self._seq = True, seq
        old = [day for day in rows if day < day_of(self.meter.at_ns - KEPT_DAYS * DAY_NS)]
        if old:
            self.bus.call("hdel", self._key, *old)

    def _join(self, day: str, row: Row | None, told: Totals | None) -> None:
        """What is known of a day: on the bus, and in the store. `told` None: the bus does not know what was told."""
        stored = stored_day(self._store, self.meter.feed, day)
        if told is None:
            told = stored or self.meter.told.get(day, NOTHING)  # what the store lacks went with the bus: once more
        elif stored is not None:
            told = told.join(stored)
        held = totals_of(row) if row is not None else NOTHING
        self.meter.join(day, held.join(told), told, row.state if row is not None and not self._begun else "")

    def keep(self) -> None:
        """Write the days as they stand."""
        self._write(self.meter.rows(self.skipped))

    def _write(self, rows: list[Row]) -> None:
        self.bus.call("hset", self._key, mapping={row.day: msgspec.json.encode(row) for row in rows})

    def publish(self) -> bool:
        """Tell what is new; False when it must be tried again (a full stream). Raises Fenced for another's account."""
        if self._seq is None:
            self.attach()
        rows = self.meter.rows(self.skipped)
        told = self.meter.told | {row.day: totals_of(row) for row in rows}
        cursor = msgspec.json.encode({day: told[day] for day in sorted(told)[-2:]})
        frames = [self._frame(row) for row in rows]
        # Until the answer is here nobody knows whether they are out: then the cursor tells.
        seq, self._seq = self._seq or 0, None
        try:
            done = self.bus.publish(self._partition, self._producer, self._owner, seq + 1, frames, cursor, TOPIC)
        except BusBehind:
            return False
        except Fenced:
            if not self._still_ours():
                raise
            return False
        if not done:
            self._seq = seq
            self.bus.trim(self._partition, TOPIC)
            return False
        self.meter.tell(rows)
        self._seq = seq + len(frames)
        nothing = {"events": 0, "bytes": 0, "connected_seconds": 0.0, "cost_usd": 0.0}
        self._write([msgspec.structs.replace(row, **nothing) for row in rows])
        return True

    def _still_ours(self) -> bool:
        """Whether the feed itself is: a Redis that lost its last second may have forgotten the account's owner only."""
        owner = self.bus.call("hget", self.bus.keys.producers(self._partition), f"{self.meter.feed}:owner")
        return owner is None or owner.decode() == self._owner

    def _frame(self, row: Row) -> Frame:
        told = Usage(**{name: getattr(row, name) for name in Usage.__struct_fields__})
        return Frame("usage", 1, row.at_ns, row.at_ns, self.meter.feed, encode([told]))


def row_of(body: bytes) -> Row:
    """A day as it is kept on the bus."""
    return msgspec.json.decode(body, type=Row)


def stored_day(store: str, feed: str, day: str) -> Totals | None:
    """A day's totals in the store; None where there are none, or no store that can be read now."""
    try:
        found = read_rows(store, "usage_daily", {"feed": feed, "day": day})
    except TapelineError as error:
        log.debug("usage in the store is not known: %s", error)
        return None
    return _stored(found[0]) if found else None


def _stored(row: dict[str, object]) -> Totals:
    return msgspec.convert({name: row[name] for name in Totals.__struct_fields__}, Totals)


def spent_by_others(bus: Bus, feed: str, day: str, state_dir: str) -> float:
    """What a vendor's other feeds (and what was bought) cost on a day, USD."""
    feeds = {name.decode() for name in bus.call("hkeys", bus.keys.feeds)} | {HISTORY}
    found = {HISTORY: purchases(state_dir).get(day, NOTHING)}
    for other in feeds:
        body = bus.call("hget", bus.keys.usage(other), day)
        if body is not None:
            found[other] = found.get(other, NOTHING).join(totals_of(row_of(body)))
    return sum(t.cost_usd for name, t in found.items() if name != feed and vendor(name) == vendor(feed))


# -- what a command buys ---------------------------------------------------------------------


def _file(state_dir: str) -> Path:
    return Path(state_dir).expanduser().absolute() / "databento" / "spent.json"


def purchases(state_dir: str) -> dict[str, Totals]:
    """What commands bought with this state directory, by day."""
    try:
        return msgspec.json.decode(_file(state_dir).read_bytes(), type=dict[str, Totals])
    except (OSError, msgspec.DecodeError):
        return {}


def bought(settings: Settings, more: Totals) -> None:
    """Put a purchase on the account HISTORY: in the state directory, and on the bus of a running deployment."""
    path, now = _file(settings.tapeline.state_dir), now_ns()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        days = purchases(settings.tapeline.state_dir)
        before = days.get(day_of(now), NOTHING)
        days[day_of(now)] = before + more
        limit = day_of(now - KEPT_DAYS * DAY_NS)
        fresh = path.with_suffix(".part")
        fresh.write_bytes(msgspec.json.encode({day: t for day, t in days.items() if day >= limit}))
        os.replace(fresh, path)
        try:
            _tell(settings, before, more, now)
        except TapelineError as error:
            log.debug("the purchase is not on the bus: %s", error)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tell(settings: Settings, before: Totals, more: Totals, now: int) -> None:
    with _deployment(settings) as (bus, partitions):
        if not partitions:
            return
        meter = Meter(HISTORY, settings.usage, now)
        book = Book(bus, meter, worker_id("history"), partitions, settings.tapeline.store)
        book.attach()
        meter.join(meter.day, before, meter.told.get(meter.day, NOTHING))
        meter.add(more)
        book.keep()
        book.publish()


@contextlib.contextmanager
def _deployment(settings: Settings) -> Iterator[tuple[Bus, int]]:
    """The running deployment's bus and its number of partitions (0: none ever ran). Raises ConfigError, Unavailable."""
    settings = find_bus(settings)
    limits = Limits(settings.redis.stream_max_bytes, settings.redis.window_seconds * 1000)
    bus = Bus(settings.redis.url, settings.tapeline.namespace, cluster=settings.redis.cluster, limits=limits)
    try:
        held = bus.call("hget", bus.keys.deployment, "partitions")
        yield bus, int(held or 0)
    finally:
        bus.close()


# -- looking ---------------------------------------------------------------------------------


def collect(settings: Settings, first_day: str) -> tuple[list[Row], str]:
    """Every feed's days from `first_day` on, newest first, and why some may be missing (empty: none are).

    The bus, the store and the state directory may each know a day; all that only grows is the largest of them.
    """
    found: dict[tuple[str, str], Row] = {}
    missing = ""

    def add(row: Row) -> None:
        if row.day < first_day:
            return
        held = found.get((row.feed, row.day))
        if held is None:
            found[row.feed, row.day] = row
            return
        total, newer = totals_of(held).join(totals_of(row)), max(held, row, key=lambda r: r.at_ns)
        found[row.feed, row.day] = msgspec.structs.replace(newer, **_day_fields(total))

    try:
        for row in read_rows(settings.tapeline.store, "usage_daily", since=first_day):
            at_ns, budget = ns_of(str(row["at"])), float(row["budget_usd"])
            add(_bare(str(row["feed"]), str(row["day"]), _stored(row), at_ns, budget, str(row["state"])))
    except TapelineError as error:
        missing = str(error)
    for day, total in purchases(settings.tapeline.state_dir).items():
        add(_bare(HISTORY, day, total, ns_of(day), settings.usage.daily_usd))
    if settings.redis.url or _embedded(settings):
        try:
            with _deployment(settings) as (bus, _):
                feeds = {name.decode() for name in bus.call("hkeys", bus.keys.feeds)}
                for feed in feeds | {HISTORY} | STORES | {feed for feed, _ in found}:
                    for body in bus.call("hvals", bus.keys.usage(feed)):
                        add(row_of(body))
        except TapelineError as error:
            missing = str(error)
    by_feed = sorted(found.values(), key=lambda r: r.feed)
    return sorted(by_feed, key=lambda r: r.day, reverse=True), missing


def today(bus: Bus, settings: Settings, feeds: Iterable[str]) -> list[Row]:
    """Of the running UTC day, as far as the bus and this machine know it: feeds, what was bought, what stores cost.

    Raises BusUnavailable.
    """
    day, found = day_of(now_ns()), []
    for feed in sorted({*feeds, HISTORY, *settings.usage.priced_feeds, *STORES}):
        body = bus.call("hget", bus.keys.usage(feed), day)
        row = row_of(body) if body else None
        if feed == HISTORY and (here := purchases(settings.tapeline.state_dir).get(day, NOTHING)) != NOTHING:
            held = row or _bare(feed, day, NOTHING, ns_of(day), settings.usage.daily_usd)
            row = msgspec.structs.replace(held, **_day_fields(totals_of(held).join(here)))
        if row is not None:
            found.append(row)
    return found


def _embedded(settings: Settings) -> bool:
    from shared.supervise import layout  # noqa: PLC0415

    return layout(settings).url.exists()


def _bare(feed: str, day: str, total: Totals, at_ns: int, budget_usd: float, state: str = RUNNING) -> Row:
    """A day of which no interval is known."""
    return Row(
        feed, day, at_ns, 0, 0, 0.0, 0.0,
        total.events, total.bytes, total.connected_seconds, total.cost_usd, budget_usd, state,
    )  # fmt: skip


def _day_fields(total: Totals) -> dict[str, Any]:
    return {f"day_{name}": getattr(total, name) for name in Totals.__struct_fields__}


def left_usd(settings: Settings, of: str) -> float:
    """What may still be spent on a vendor today before its feeds are stopped, USD; infinite without a budget."""
    limit = stop_usd(settings.usage)
    if limit == float("inf"):
        return limit
    rows, _ = collect(settings, day_of(now_ns()))
    return max(0.0, limit - sum(row.day_cost_usd for row in rows if vendor(row.feed) == of))
