"""Rows of several exchanges to the partitions of the bus, with their clocks, gaps and without duplicates.

What goes out depends on the order of the rows alone, never on how they were cut into pushes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.ingest.source import Grouped, Output
from services.ingest.tardis_decode import EVENT, Decoded
from services.ingest.tardis_pass import REASONS, SPREAD, classify, scatter, sound
from services.ingest.tardis_recent import Recent
from services.ingest.tardis_symbols import OptionFacts, instrument_of
from shared.frames import BOOK, TICK, TRADE, Rows
from shared.instrument_days import same
from shared.instruments import feed_id, is_spread, partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Feed:
    """An exchange. `down`: lower-case symbol (or "" for all) -> since when its rows are missed, and why."""

    number: int
    exchange: str
    name: str
    known: dict[str, int] = field(default_factory=dict)  # lower-case symbol -> index
    down: dict[str, tuple[int, str]] = field(default_factory=dict)
    watched: bool = False


class Router:
    """Routes the rows of one producer; each exchange is a feed with a time of its own.

    One thread uses it. `feed_of(exchange)`; by default `<producer>:<exchange>`. A feed's watermark is
    `grace_ns` behind the newest event time of its trades and books; a trade that came among the latest of
    its symbol (same id, price, size and side) is dropped.
    """

    def __init__(
        self, producer: str, partitions: int, grace_ns: int, feed_of: Callable[[str], str] | None = None
    ) -> None:
        self.producer, self.partitions, self.grace_ns = producer, partitions, grace_ns
        self._feed_of = feed_of or (lambda exchange: f"{producer}:{exchange}")
        self._index: dict[tuple[str, str], int] = {}
        self._feeds: dict[str, _Feed] = {}
        self._by_number: list[_Feed] = []
        self._by_name: list[_Feed] = []  # messages go out in this order
        self._instruments: list[Instrument] = []
        self._feed_at: list[_Feed] = []  # of each symbol
        self._recent = Recent()
        self._unannounced: set[int] = set()
        self._told: set[int] = set()  # symbols that have been announced once
        self._home = np.zeros(partitions, np.bool_)  # partitions that were told of the feeds
        self._active = np.zeros(partitions, np.bool_)  # partitions that rows have reached
        # By symbol: bus id, partition (SPREAD: none), feed.
        self._id, self._part, self._feed = (np.zeros(64, np.int64) for _ in range(3))
        # By feed: bus id, newest event time of trades and books, next second to tell, first and newest event time.
        self._feed_id, self._high, self._boundary, self._first, self._last = (np.zeros(8, np.int64) for _ in range(5))

    # -- symbols -----------------------------------------------------------------------------

    def symbol(self, exchange: str, symbol: str, on_ns: int, option: OptionFacts | None = None) -> int:
        """Index of a symbol, for `rows["instrument"]`; announced before its first row.

        Given again with `option`, what is known of the contract is announced anew if it changes.
        """
        index = self._index.get((exchange, symbol))
        if index is not None and option is None:
            return index
        feed = self._feed_named(exchange)
        instrument = instrument_of(exchange, symbol, feed.name, on_ns, option)
        if index is None:
            return self._add(feed, instrument)
        if not same(instrument, self._instruments[index]):
            self._instruments[index] = instrument
            self._unannounced.add(index)
            if self._part[index] == SPREAD:  # no combination, as its name had it, but an option
                self._part[index] = partition_of(instrument.root, self.partitions)
        return index

    def instrument(self, index: int) -> Instrument:
        """The contract behind an index."""
        return self._instruments[index]

    def _feed_named(self, exchange: str) -> _Feed:
        feed = self._feeds.get(exchange)
        if feed is None:
            feed = _Feed(len(self._by_number), exchange, self._feed_of(exchange))
            self._feeds[exchange] = feed
            self._by_number.append(feed)
            self._by_name = sorted(self._by_number, key=lambda f: f.name)
            if feed.number == len(self._high):
                for name in ("_feed_id", "_high", "_boundary", "_first", "_last"):
                    setattr(self, name, _doubled(getattr(self, name)))
            self._feed_id[feed.number] = feed_id(feed.name)
        return feed

    def _add(self, feed: _Feed, instrument: Instrument) -> int:
        index = len(self._instruments)
        if index == len(self._id):
            for name in ("_id", "_part", "_feed"):
                setattr(self, name, _doubled(getattr(self, name)))
        self._index[feed.exchange, instrument.symbol] = index
        feed.known[instrument.symbol.lower()] = index
        self._instruments.append(instrument)
        self._feed_at.append(feed)
        spread = is_spread(instrument.symbol, instrument.kind, instrument.root)
        self._id[index] = instrument.id
        self._part[index] = SPREAD if spread else partition_of(instrument.root, self.partitions)
        self._feed[index] = feed.number
        if not spread:
            self._unannounced.add(index)
        return index

    # -- rows --------------------------------------------------------------------------------

    def take(self, decoded: Decoded, out: Output, cursor: bytes) -> None:
        """Publish what a Decoder made: rows, disconnects and errors in tape order, and count what was skipped."""
        for reason, count in decoded.counts.items():
            out.count(reason, count)
        rows, ordinals, at = decoded.rows, decoded.ordinals, 0
        for place in np.flatnonzero(rows["kind"] == EVENT).tolist() if decoded.events else ():
            self.push(rows[at:place], ordinals[at:place], out, cursor)
            event = decoded.events[rows["instrument"][place]]
            if event.kind == "error":
                log.warning("%s reports an error: %s", event.exchange, " ".join(event.details.split())[:300])
                out.count("error", 1)
            else:
                self.disconnect(event.exchange, event.symbols, event.at_ns, "disconnect", out)
            at = place + 1
        self.push(rows[at:], ordinals[at:], out, cursor)

    def push(self, rows: Rows, ordinals: NDArray[np.int64], out: Output, cursor: bytes) -> None:
        """Publish TICK rows in tape order, `instrument` the index of the symbol, `ordinals` parallel to them."""
        if not len(rows):
            return
        keep, skipped = np.empty(len(rows), np.bool_), np.zeros(len(REASONS), np.int64)
        sound(rows, self._part, keep, skipped)
        if skipped.any():
            for reason, count in zip(REASONS, skipped.tolist(), strict=True):
                if count:
                    out.count(reason, count)
            rows, ordinals = rows[keep], ordinals[keep]
        keep = self._recent.fresh(rows)
        if not keep.all():
            out.count("duplicate", len(rows) - int(np.count_nonzero(keep)))
            rows, ordinals = rows[keep], ordinals[keep]
        while len(rows):
            cut = self._recovery(rows) if any(feed.down for feed in self._by_number) else len(rows)
            if cut:
                self._route(rows[:cut], ordinals[:cut], out, cursor)
            if cut < len(rows):
                self._announce(rows[cut : cut + 1], out)
                self._recover(rows[cut], out)
            rows, ordinals = rows[cut:], ordinals[cut:]

    def _route(self, rows: Rows, ordinals: NDArray[np.int64], out: Output, cursor: bytes) -> None:
        crossed, counts = np.empty(len(rows), np.int64), np.zeros(self.partitions, np.int64)
        before = self._active.copy()
        classify(
            rows, self.grace_ns, self._part, self._feed, self._high, self._boundary, self._first,
            self._last, self._active, crossed, counts,
        )  # fmt: skip
        self._announce(rows, out)
        used = np.flatnonzero(counts)
        starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts[used])))
        offsets = np.zeros(self.partitions, np.int64)
        offsets[used] = starts[:-1]
        routed, places = np.empty(int(starts[-1]), TICK), np.empty(int(starts[-1]), np.int64)
        scatter(
            rows, ordinals, self._id, self._part, self._feed, self._feed_id, before, crossed, offsets, routed, places
        )
        out.ticks(Grouped(routed, places, used.tolist(), starts.tolist()), cursor)

    def _announce(self, rows: Rows, out: Output) -> None:
        """Instruments of these rows that are not announced, then the clocks of whom it concerns."""
        new: list[int] = []
        if self._unannounced:
            new = sorted(self._unannounced.intersection(np.unique(rows["instrument"]).tolist()))
        fresh_home = False
        if new:
            out.instruments([self._instruments[i] for i in new])
            self._unannounced.difference_update(new)
            self._told.update(new)
            parts = self._part[new]
            fresh_home = not self._home[parts].all()
            self._home[parts] = True
        for feed in self._by_name:
            begins = not feed.watched and self._first[feed.number] > 0
            if begins or (feed.watched and fresh_home):
                feed.watched = True
                out.broadcast(self._watch(feed))

    def _watch(self, feed: _Feed) -> Clock:
        first = int(self._first[feed.number])
        return Clock(feed.name, first, watched_from_ns=first, grace_ns=self.grace_ns)

    # -- gaps --------------------------------------------------------------------------------

    def disconnect(self, exchange: str, symbols: Iterable[str], at_ns: int, reason: str, out: Output) -> None:
        """The exchange (or some of its symbols, in any case) dropped: Disconnect now, Gap when it comes back.

        What may be missing begins behind the newest event time of the feed: until then its connection lived.
        Of what never gave a row there is nothing to say yet, but its first row closes a gap since the watch began.
        """
        out.count("disconnect", 1)
        feed = self._feeds.get(exchange)
        if feed is None or not feed.watched:
            return
        for name in [s.lower() for s in symbols] or [""]:
            if name in feed.down:
                continue
            since = int(self._high[feed.number] or self._first[feed.number])
            feed.down[name] = (since, reason)
            told = self._named(feed, name)
            if told is not None:
                out.broadcast(Disconnect(feed.name, at_ns, reason, since_ns=since, symbols=told))

    def _named(self, feed: _Feed, name: str) -> tuple[str, ...] | None:
        """How a message names what is down; None while nothing of it is on the bus."""
        if not name:
            return ()
        index = feed.known.get(name, -1)
        return (self._instruments[index].symbol,) if index in self._told else None

    def _recovery(self, rows: Rows) -> int:
        """The first row that ends an outage; the number of rows if none does."""
        wanted = np.zeros(len(self._instruments), np.bool_)
        for feed in self._by_number:
            if "" in feed.down:
                wanted[list(feed.known.values())] = True
            else:
                wanted[[feed.known[name] for name in feed.down if name in feed.known]] = True
        back = wanted[rows["instrument"]] & ((rows["kind"] == TRADE) | (rows["kind"] == BOOK))
        return int(back.argmax()) if back.any() else len(rows)

    def _recover(self, row: Rows, out: Output) -> None:
        index = int(row["instrument"])
        feed, symbol = self._feed_at[index], self._instruments[index].symbol
        for name in ("", symbol.lower()):
            if name in feed.down:
                since, reason = feed.down.pop(name)
                told = (symbol,) if name else ()
                out.broadcast(Gap(feed.name, since, max(since + 1, int(row["ts_event_ns"])), reason, told))

    # -- begin and end -----------------------------------------------------------------------

    def begin(self, exchange: str, at_ns: int) -> None:
        """The exchange is watched from here on, not just from its first record; before its first row."""
        feed = self._feed_named(exchange)
        self._first[feed.number] = at_ns

    def recall(self, instruments: Iterable[Instrument], rows: Rows) -> None:
        """Start from what a former process published: its instruments, and TICK rows as on the bus (bus ids).

        Restores each feed's time and the newest trades known, so that resent ones are dropped. The instruments
        and the watch are announced again with the first row.
        """
        by_id: dict[int, int] = {}
        for instrument in instruments:
            index = self._index.get((instrument.venue, instrument.symbol))
            if index is None:
                index = self._add(self._feed_named(instrument.venue), instrument)
            self._instruments[index] = instrument
            by_id[instrument.id] = index
            self._told.add(index)
            if self._part[index] != SPREAD:
                self._active[self._part[index]] = True
        known = np.array([by_id.get(i, -1) for i in rows["instrument"].tolist()], np.int64)
        rows = rows[known >= 0].copy()
        rows["instrument"] = known[known >= 0]
        self._recent.fresh(rows)
        classify(
            rows, self.grace_ns, self._part, self._feed, self._high, self._boundary,
            np.zeros_like(self._first), self._last, self._active, np.empty(len(rows), np.int64),
            np.zeros(self.partitions, np.int64),
        )  # fmt: skip

    def newest_ns(self, exchange: str) -> int:
        """Newest event time of an exchange's trades and books; 0 without any."""
        feed = self._feeds.get(exchange)
        return int(self._high[feed.number]) if feed is not None else 0

    def finish(self, out: Output, end_ns: dict[str, int] | None = None) -> None:
        """The tape ends: Gap for what did not come back, then the final Clock of each feed.

        A feed ends at `end_ns[exchange]`, by default at the newest event time of its records.
        """
        for feed in self._by_name:
            if not feed.watched:
                continue
            end = (end_ns or {}).get(feed.exchange, int(self._last[feed.number]))
            for name, (since, reason) in feed.down.items():
                told = self._named(feed, name)
                if told is not None:
                    out.broadcast(Gap(feed.name, since, max(since + 1, end), reason, told))
            feed.down.clear()
            out.broadcast(Clock(feed.name, end, final=True))


def _doubled(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate((values, np.zeros_like(values)))


def warm() -> None:
    """Compile (or load from the cache) before the first tick."""
    router = Router("warm", 1, 0)
    rows = np.zeros(1, TICK)
    rows["ts_event_ns"], rows["sequence"] = 1, 1
    rows["instrument"] = router.symbol("warm", "A", 1)
    router.push(rows, np.zeros(1, np.int64), _Nowhere(), b"")


class _Nowhere:
    """An Output that forgets."""

    def instruments(self, messages: Iterable[Instrument]) -> None: ...

    def broadcast(self, message: Clock | Gap | Disconnect) -> None: ...

    def ticks(self, grouped: Grouped, cursor: bytes) -> None: ...

    def flush(self) -> None: ...

    def count(self, reason: str, records: int, usage_bytes: int = 0) -> None: ...

    def connection(self, state: str, detail: str = "") -> None: ...
