"""The costs of this store among the usage of feeds, as the feed `bigquery:<method>`: in Redis at once, in the store by
and by. They draw on no budget: a budget is of a vendor's feeds.

All of it happens on a thread with a connection of its own: neither Redis nor a full stream holds the sink up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from services.sink_bigquery.costs import Spent, feed_of
from shared import metrics
from shared.bus import Bus, worker_id
from shared.errors import BusUnavailable, Fenced, TapelineError
from shared.settings import Settings
from shared.usage import Meter, Totals, now_ns
from shared.usage_book import Book
from shared.worker import wait_for_bus

log = logging.getLogger(__name__)

KEEP_SECONDS = 2.0
# Seldom, for each is a batch of its own where nothing else happens: a load job is one of 1,500 a table and day.
TELL_SECONDS = 600.0
LAST_SECONDS = 2.0
# Rows that are there because of the accounts themselves are counted, but are no news.
_OWN = frozenset(("usage_log", "usage_daily", "sink_batches"))


@contextmanager
def accounts(settings: Settings, spent: Spent, stop: threading.Event) -> Iterator[None]:
    """What is spent inside is put on the accounts."""
    keeper = _Keeper(settings, stop)
    spent.listen = keeper.add
    thread = threading.Thread(target=keeper.run, name="bigquery-costs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        spent.listen = None
        keeper.over.set()
        thread.join(LAST_SECONDS)


class _Keeper:
    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self.over = threading.Event()
        self._settings, self._stop = settings, stop
        self._owner = worker_id("bigquery-costs")
        self._meters: dict[str, Meter] = {}
        self._books: dict[str, Book] = {}
        self._changed: set[str] = set()
        self._news: set[str] = set()
        self._lock = threading.Lock()

    def add(self, method: str, table: str, more: Totals) -> None:
        """Something was written."""
        feed, now = feed_of(method), now_ns()
        with self._lock:
            meter = self._meters.get(feed) or self._meters.setdefault(feed, Meter(feed, self._settings.usage, now))
            meter.advance(now, 0)
            meter.add(more)
            self._changed.add(feed)
            if table not in _OWN:
                self._news.add(feed)

    def run(self) -> None:
        """Until `over`, and once more."""
        bus = wait_for_bus(self._settings, self._stop)
        if bus is None:
            return
        told_at = time.monotonic()
        try:
            while not self.over.wait(KEEP_SECONDS):
                due = time.monotonic() - told_at > TELL_SECONDS
                self._write(bus, tell=due)
                told_at = time.monotonic() if due else told_at
            self._write(bus, tell=True)
        except Exception:
            # A fault of the program: the rows are worth more than the account of them, and the log has both.
            log.exception("the costs of BigQuery are not on the usage accounts any more")
            metrics.fault("sink_bigquery.accounts")
        finally:
            bus.close()

    def _write(self, bus: Bus, *, tell: bool) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
            news = set(self._news) if tell else set()
            self._news -= news
        for feed in changed | news:
            try:
                book = self._book(bus, feed)
                book.keep()
                if feed in news and not book.publish():
                    raise BusUnavailable("the usage stream is full")
            except Fenced:
                # The next sink has the account; what it was not told of is in the log of this one.
                with self._lock:
                    self._meters.pop(feed, None)
                    self._books.pop(feed, None)
            except TapelineError as error:
                log.debug("usage of %s is told later: %s", feed, error)
                with self._lock:
                    self._changed.add(feed)
                    self._news |= {feed} & news

    def _book(self, bus: Bus, feed: str) -> Book:
        book = self._books.get(feed)
        if book is None:
            tapeline = self._settings.tapeline
            book = Book(bus, self._meters[feed], self._owner, tapeline.partitions, tapeline.store)
            book.attach()
            self._books[feed] = book
        return book
