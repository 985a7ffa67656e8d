"""Live crypto through a tardis-machine server: one exchange, a few connections, one feed.

Loss semantics: nothing brings back what is sent while a connection is away. When one that carries
trades and books drops (or the server says that its own did), windows since the newest event are
suspect until the first event after, and a Gap says so. Losing a connection that carries state only
(funding, liquidations, option summaries) leaves candles whole. A restarted process reads back the
tail of the bus, drops the trades that are sent again, and a Gap covers what it missed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import numpy as np

from services.ingest.source import RECEIVED, Output, Resume
from services.ingest.tardis_decode import EVENT, Decoded, Decoder, Event
from services.ingest.tardis_request import live_requests, symbols_of, unsupported
from services.ingest.tardis_route import Router
from services.ingest.tardis_socket import QUEUE_BYTES, Down, Item, Sockets, Up, Wire
from shared.errors import ConfigError
from shared.frames import BOOK, NS, TICK, TRADE, Rows
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Tardis

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
# Without trades and books for so long, the local clock moves time on, this far behind.
QUIET_NS = NS
LAG_NS = 5 * NS
# How far back trades are read from the bus, to know those that are sent again.
RECALL_NS = 60 * NS
STALE_NS = 5 * NS
RESTARTED = "ingest was not running"
# The same error is logged again after so long; so many are told apart.
ERRORS_AGAIN_NS, ERRORS_KNOWN = 60 * NS, 1000

Published = Callable[[int, int], Rows]


class Cursor(msgspec.Struct, frozen=True):
    """`at`: the feed's newest event time before the rows that this cursor stands with."""

    at: int


@dataclass(slots=True)
class _Line:
    """A connection as the feed sees it. `suspect`: no trade or book came since it (or the one behind it) dropped."""

    wire: Wire
    up: bool = False
    suspect: bool = True

    @property
    def market(self) -> bool:
        return self.wire.request.market


class TardisLive:
    """The live feed of one exchange, `tardis:<exchange>`.

    `published(partition, since_ns)` gives the trades that the bus holds of this feed, `instruments()` its
    instruments there; without them a restarted process may publish a few trades twice. `now_ns` is the local clock.
    """

    def __init__(
        self,
        settings: Tardis,
        exchange: str,
        partitions: int,
        *,
        published: Published | None = None,
        instruments: Callable[[], Iterable[Instrument]] = tuple,
        now_ns: Callable[[], int] = time.time_ns,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.feed = f"tardis:{exchange}"
        self._settings, self._exchange, self._partitions = settings, exchange, partitions
        self._published, self._instruments, self._now = published, instruments, now_ns
        self._queue_bytes = queue_bytes
        symbols = symbols_of(settings.symbols).get(exchange)
        if not symbols:
            raise ConfigError(f"tardis.symbols has no symbol of {exchange}: add one, such as {exchange}:BTC-USDT")
        self._requests = live_requests(exchange, symbols, settings.data_types, settings.silence_seconds)

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """Push until `stop` is set.

        Raises ConfigError for what the server does not know, and whatever `out` raises (after BusBehind, run again:
        what the bus forgot is a gap).
        """
        s = self._settings
        following = _Following(self, out)
        following.recall(resume)
        with Sockets(
            self._requests, s.host, s.port, s.silence_seconds, s.backoff_max_seconds, queue_bytes=self._queue_bytes
        ) as sockets:
            following.follow(sockets, stop)
        out.flush()

    def router(self) -> Router:
        """A router of this feed, knowing nothing yet."""
        grace_ns = self._settings.grace_ms * 1_000_000
        return Router(self.feed, self._partitions, grace_ns, feed_of=lambda _: self.feed)

    @property
    def exchange(self) -> str:
        """The exchange's id."""
        return self._exchange


class _Following:
    """What one run knows: the router, the state of each connection, and time."""

    def __init__(self, source: TardisLive, out: Output) -> None:
        self._source, self._out = source, out
        self._feed, self._exchange = source.feed, source.exchange
        self._grace_ns = source._settings.grace_ms * 1_000_000
        self._now = source._now
        self._router = source.router()
        self._decode = Decoder(self._router.symbol)
        self._lines: list[_Line] = []
        self._high_ns = 0  # newest event time of trades and books
        self._behind_ns = 0  # how old it was when it came
        self._moved_ns = self._clocked_ns = 0  # local time of it, and of the newest Clock
        self._watermark_ns = 0
        self._missing_ns: int | None = None  # newest event of a former process, until the first one after it
        self._reason = RESTARTED
        self._lagging = False
        self._told: dict[str, int] = {}  # when an error was last logged

    # -- a former process --------------------------------------------------------------------

    def recall(self, resume: Resume) -> None:
        """Go on after a former process: know its trades, and open a gap from the newest event that all of it shows.

        Partitions are never apart by more than a second (clock rows go to all); one further behind is no longer used.
        """
        held = {p: msgspec.json.decode(c, type=Cursor).at for p, c in resume.cursors.items() if c}
        if not held:
            return
        published = self._source._published
        rows = {p: published(p, at - RECALL_NS) for p, at in held.items()} if published is not None else {}
        newest = {p: max(at, *rows[p]["ts_event_ns"].tolist()) if p in rows else at for p, at in held.items()}
        self._router.recall(self._source._instruments(), np.concatenate([np.empty(0, TICK), *rows.values()]))
        self._high_ns = max(newest.values())
        self._missing_ns = min(at for at in newest.values() if at > self._high_ns - STALE_NS)
        if resume.since_ns is not None:
            self._missing_ns = max(self._missing_ns, resume.since_ns)
        self._reason = resume.missed or RESTARTED
        self._out.broadcast(Disconnect(self._feed, self._now(), self._reason, since_ns=self._missing_ns))

    def _end_gap(self, decoded: Decoded, cursor: bytes) -> Decoded:
        """Before the first trade or book that is newer than what a former process published: the Gap up to it."""
        rows, since = decoded.rows, self._missing_ns
        assert since is not None
        newer = ((rows["kind"] == TRADE) | (rows["kind"] == BOOK)) & (rows["ts_event_ns"] > self._high_ns)
        if not newer.any():
            return decoded
        at = int(newer.argmax())
        before = Decoded(rows[:at], decoded.ordinals[:at], decoded.events, decoded.counts)
        self._router.take(before, self._out, cursor)
        end = max(since, int(rows["ts_event_ns"][at]))  # an exchange's clock may be behind
        self._out.broadcast(Gap(self._feed, since, end, self._reason))
        self._missing_ns = None
        return Decoded(rows[at:], decoded.ordinals[at:], decoded.events)

    # -- following ---------------------------------------------------------------------------

    def follow(self, sockets: Sockets, stop: threading.Event) -> None:
        """Until `stop` is set."""
        self._sockets = sockets
        self._lines = [_Line(wire) for wire in sockets.wires]
        while not stop.is_set():
            sockets.news.wait(POLL_SECONDS)
            sockets.news.clear()
            busy = True
            while busy and not stop.is_set():
                busy = False
                for line in self._lines:
                    item = sockets.take(line.wire)
                    if item is not None:
                        busy = True
                        self._item(line, item)
            self._quiet()

    def _item(self, line: _Line, item: Item) -> None:
        if isinstance(item, Up):
            line.up = True
            if all(other.up for other in self._lines if not other.wire.over.is_set()):
                self._out.connection("connected", self._about())
        elif isinstance(item, Down):
            self._down(line, item)
        else:
            self._out.count(RECEIVED, len(item), sum(map(len, item)))
            self._take(line, self._decode(item, 0))

    def _about(self) -> str:
        symbols = len({s for line in self._lines for s in line.wire.request.symbols})
        return f"{self._exchange}: {symbols} symbols on {len(self._lines)} connections"

    def _down(self, line: _Line, down: Down) -> None:
        if down.renewed:  # the server sent nothing but errors
            line.up = False
            return
        self._out.count("reconnect", 1)
        if line.up:
            line.up = False
            now = self._now()
            if line.market:
                line.suspect = True
                symbols = () if line.wire.request.whole else line.wire.request.symbols
                self._router.disconnect(self._exchange, symbols, now, down.reason, self._out)
            else:
                log.warning("%s: %s; state of contracts is old until it is back", self._feed, down.reason)
                self._out.broadcast(Disconnect(self._feed, now, down.reason))
        if line.market or down.absent:
            self._out.connection("waiting" if down.absent else "down", down.reason)

    def _take(self, line: _Line, decoded: Decoded) -> None:
        if decoded.events:
            decoded = self._without(decoded, [self._event(line, event) for event in decoded.events])
        rows, now = decoded.rows, self._now()
        decoded.ordinals[:] = 0
        cursor = msgspec.json.encode(Cursor(self._high_ns))
        if self._missing_ns is not None and line.market:
            decoded = self._end_gap(decoded, cursor)
        self._router.take(decoded, self._out, cursor)
        if not len(rows):
            return
        self._lag(now - int(rows["ts_recv_ns"].max()))
        if line.market:
            self._moved(line, rows, now)

    def _moved(self, line: _Line, rows: Rows, now: int) -> None:
        """Trades and books move time; a disconnect behind the last of them leaves the connection suspect."""
        moves = np.flatnonzero((rows["kind"] == TRADE) | (rows["kind"] == BOOK))
        dropped = np.flatnonzero(rows["kind"] == EVENT)
        if len(moves):
            line.suspect = False
            self._moved_ns = now
            high = self._router.newest_ns(self._exchange)
            if high > self._high_ns:
                self._high_ns, self._behind_ns = high, max(0, now - high)
        if len(dropped) and (not len(moves) or dropped[-1] > moves[-1]):
            line.suspect = True

    # -- what the server says of itself ------------------------------------------------------

    def _event(self, line: _Line, event: Event) -> bool:
        """Whether the router shall see it."""
        if event.kind == "error":
            self._error(line, event.details)
            return False
        if line.market:
            return True
        log.warning("%s: the server lost its connection for state of contracts", self._feed)
        self._out.count("disconnect_state", 1)
        self._out.broadcast(Disconnect(self._feed, event.at_ns, "upstream, state of contracts"))
        return False

    def _without(self, decoded: Decoded, keep: list[bool]) -> Decoded:
        if all(keep):
            return decoded
        rows = decoded.rows
        fine = rows["kind"] != EVENT
        events = np.flatnonzero(~fine)
        fine[events] = np.array(keep)[rows["instrument"][events]]
        return Decoded(rows[fine], decoded.ordinals[fine], decoded.events, decoded.counts)

    def _error(self, line: _Line, details: str) -> None:
        self._out.count("error", 1)
        where = self._sockets.where
        if "not supported exchange" in details:
            raise ConfigError(
                f"{where} has no live feed of {self._exchange} ({details}); take it out of tardis.symbols"
            )
        if "not supported" in details:
            request = line.wire.request
            types = unsupported(details, request.types)
            if "trade" in types:
                raise ConfigError(f"{where} does not know {self._exchange} ({details}); check tardis.symbols")
            if types:
                log.warning("%s has no %s of %s; going on without", where, ", ".join(types), self._exchange)
                left = request.without(types)
                if left is None and line.market:
                    raise ConfigError(f"{where} has none of tardis.data_types of {self._exchange} ({details})")
                self._sockets.ask(line.wire, left)
            return
        now, text = self._now(), " ".join(details.split())[:300]
        if now - self._told.get(text, 0) > ERRORS_AGAIN_NS:
            if len(self._told) >= ERRORS_KNOWN:
                self._told.clear()
            self._told[text] = now
            log.warning("%s: error at the exchange: %s", self._feed, text)

    # -- time --------------------------------------------------------------------------------

    def _quiet(self) -> None:
        """Nothing trades, but all connections stand: time goes on by the local clock."""
        now = self._now()
        if not self._moved_ns or now - self._moved_ns <= QUIET_NS or now - self._clocked_ns < NS:
            return
        if any(line.market and (line.suspect or not line.up) for line in self._lines):
            return
        # An exchange (or a server) that is late by so much stays late.
        watermark = now - self._grace_ns - QUIET_NS - self._behind_ns
        if watermark > max(self._watermark_ns, self._high_ns - self._grace_ns):
            self._out.broadcast(Clock(self._feed, watermark, wall_ns=now))
            self._watermark_ns, self._clocked_ns = watermark, now

    def _lag(self, lag_ns: int) -> None:
        if lag_ns > LAG_NS and not self._lagging:
            self._lagging = True
            text = f"localTimestamp lags by {lag_ns / NS:.1f} s: the server or this process is too slow"
            log.warning("%s: %s", self._feed, text)
            self._out.count("lagging", 1)
            self._out.connection("connected", text)
        elif lag_ns < LAG_NS // 2 and self._lagging:
            self._lagging = False
            log.info("%s: localTimestamp is up to date again", self._feed)
            self._out.connection("connected", self._about())
