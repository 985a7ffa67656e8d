"""Databento live: one connection at a time, and what to do when it ends.

Loss semantics: whatever a session misses is asked for again by the next one (`start` a margin
before the last event), and what was published already is left out by (instrument, event time,
count). What the gateway no longer has is fetched from `history`, else it becomes a Gap.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from databento.common.error import BentoError

from services.ingest.databento_feed import Feed, History, Published
from services.ingest.databento_session import Dropped, ReplayTooOld, Wire, one_line
from services.ingest.source import Output, Resume, Stop
from shared.errors import AuthError, ConfigError, Unavailable
from shared.frames import NS
from shared.settings import Databento

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
FIRST_BACKOFF_SECONDS = 0.25
POLL_SECONDS = 0.05
# The gateway's window moves on while we ask for its oldest end.
REPLAY_SLACK_NS = 5 * NS


class DatabentoLive:
    """The live feed of one dataset.

    `history(start_ns, end_ns)` gives blocks of (raw symbol by native id, RECORD records) from
    elsewhere; it may raise Unavailable. `published(partition, since_ns)` gives the tick rows that
    the bus holds of this feed; without it, a restarted process may publish the rows of the resume
    margin twice.
    """

    def __init__(
        self,
        settings: Databento,
        partitions: int,
        feed: str = "databento",
        history: Callable[[int, int], History] | None = None,
        published: Published | None = None,
    ) -> None:
        self.feed = feed
        self._settings = settings
        self._partitions = partitions
        self._history = history
        self._published = published
        self._start_ns = _parse_start(settings.start)
        self._watched_ns: int | None = None
        self._history_failed = False  # in this outage: what it did not give once is given up
        self._host = host_of(settings)

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:
        """Push until `stop` is set.

        Raises AuthError and ConfigError where trying again cannot help, and whatever `out` raises
        (BusBehind: call again with fresh cursors). A bus that has forgotten everything gets it again
        from when this source began to watch, as far as the gateway reaches.
        """
        if not self._settings.api_key:
            raise AuthError("there is no Databento API key: set DATABENTO_API_KEY")
        feed = Feed(self._settings, self._partitions, self.feed, out)
        feed.restore(resume, self._published or getattr(out, "published", None))
        if resume.missed:
            feed.give_up(resume.missed)
        elif resume.since_ns is not None:
            feed.skip_to(resume.since_ns)
        try:
            asyncio.run(self._sessions(feed, out, stop))
        finally:
            self._watched_ns = feed.watched_ns
        if isinstance(stop, Stop) and stop.rests:
            feed.rest()
        out.flush()
        out.connection("ended")

    async def _sessions(self, feed: Feed, out: Output, stop: threading.Event) -> None:
        failures = refused = 0
        start = self._start(feed)
        while not stop.is_set():
            try:
                feed.begin(start, replays=2)
                await self._session(feed, start, stop)
                return
            except ReplayTooOld as error:
                feed.dropped(reason := str(error))
                refused += 1
                start = self._oldest(feed, start, refused)
                if refused <= 2:
                    continue
            except Dropped as error:
                feed.dropped(reason := str(error))
                self._history_failed = self._history_failed and not feed.progress
            failures, refused = (0, 0) if feed.progress else (failures + 1, refused)
            out.count("reconnect", 1)
            delay = min(self._settings.backoff_max_seconds, FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 20))
            delay *= random.uniform(0.5, 1.0)
            log.warning("%s: %s; trying again in %.2f s", self.feed, reason, delay)
            await _pause(delay, stop)
            if not refused:
                start = self._start(feed)

    def _start(self, feed: Feed) -> int | None:
        """From where the next session replays; None: it begins now."""
        if feed.given_up:
            return None
        if feed.resume_ns is not None:
            return feed.resume_ns
        return self._start_ns if self._watched_ns is None else self._watched_ns

    async def _session(self, feed: Feed, start: int | None, stop: threading.Event) -> None:
        """One connection, from connect to `stop`. Raises Dropped when it ends before."""
        s, loop = self._settings, asyncio.get_running_loop()
        where = f"{self._host}:{s.port}"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                transport, wire = await loop.create_connection(
                    lambda: Wire(feed, s.api_key, s.dataset, s.heartbeat_seconds), self._host, s.port
                )
        except TimeoutError:
            raise Dropped(f"{where} does not answer") from None
        except OSError as error:
            raise Dropped(f"cannot connect to {where} ({error.strerror or error})") from None
        try:
            if not await self._wait(wire, stop, wire.authenticated):
                return
            # Definitions first, the whole week of them: a trade needs its instrument before it.
            wire.subscribe("definition", list(s.symbols), s.stype, start=0)
            wire.subscribe("tbbo", list(s.symbols), s.stype, start=start)
            wire.start()
            await self._wait(wire, stop, None)
        finally:
            transport.abort()
            for future in (wire.failed, wire.authenticated, wire.disconnected):
                if future.done():
                    future.exception()  # seen, or asyncio complains

    async def _wait(self, wire: Wire, stop: threading.Event, goal: asyncio.Future[str | None] | None) -> bool:
        """Until `goal` is done (True) or `stop` is set (False); with our own silence timer all along."""
        loop, silence = asyncio.get_running_loop(), self._settings.silence_seconds
        watched = {wire.failed, wire.disconnected} | ({goal} if goal is not None else set())
        while not stop.is_set():
            await asyncio.wait(watched, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if wire.failed.done():
                wire.failed.result()
            if goal is not None and goal.done():
                authenticated(goal, self._settings)
                return True
            if wire.disconnected.done():
                error = wire.disconnected.exception()
                raise Dropped(f"the connection was lost ({error})" if error else "the gateway closed the connection")
            if loop.time() - wire.heard_at > silence:
                raise Dropped(f"nothing heard for {silence:g} s")
        return False

    def _oldest(self, feed: Feed, start: int | None, refused: int) -> int | None:
        """The next start after the gateway called `start` too old, and what becomes of the time before it."""
        reach = feed.heard_ns - int(self._settings.replay_hours * 3600 * NS)
        if refused > 1 and (start is None or start >= reach):
            feed.lost("older than the gateway's replay")  # which is shorter than we believe
            return None
        # Refused again with a start that got too old while history was fetched: only a short stretch is missing.
        oldest, since = reach + REPLAY_SLACK_NS, feed.resume_ns
        if self._history is not None and not self._history_failed and since is not None and since < oldest:
            try:
                feed.backfill(self._history(since, oldest), oldest)
            except Unavailable as error:
                self._history_failed = True
                log.warning("%s: cannot backfill: %s", self.feed, error)
            else:
                return oldest
        feed.lost("older than the gateway's replay", oldest)
        return oldest


def host_of(settings: Databento) -> str:
    """The live gateway of the settings' dataset."""
    return settings.gateway or f"{settings.dataset.lower().replace('.', '-')}.lsg.databento.com"


def authenticated(answer: asyncio.Future[str | None], settings: Databento) -> None:
    """Return when the gateway's answer is that it knows the key. Raises AuthError, ConfigError."""
    try:
        answer.result()
    except BentoError as error:
        text = one_line(str(error), settings.api_key)
        where = f"Databento ({settings.dataset})"
        if "connection limit" in text.lower():
            raise ConfigError(f"{where}: {text}; stop another client of this key") from None
        raise AuthError(f"{where} refused the API key: {text}; check DATABENTO_API_KEY") from None


def _parse_start(text: str) -> int | None:
    if not text:
        return None
    if text.isdigit():
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"databento.start '{text}' is no time: use 2024-05-09T13:30:00Z or nanoseconds") from None
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    since = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * NS + since.microseconds * 1000


async def _pause(seconds: float, stop: threading.Event) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while not stop.is_set() and loop.time() < until:
        await asyncio.sleep(min(POLL_SECONDS, max(0.0, until - loop.time())))
