"""Senders: one thread a channel, so that none holds up another, nor the reading.

A delivery is made at least once: whoever dies between a channel's answer and the commit makes it again, under the
same key. While the process lives, what was answered is never sent again, even if the commit fails for a while.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from services.alerts.channels import Answer, Channel, Message
from services.alerts.core import Job, Result
from shared import faults, metrics
from shared.alerts import PENDING, SENT
from shared.progress import Progress

log = logging.getLogger(__name__)

BACKOFF_SECONDS = 1.0


class Outbox:
    """Makes the jobs that `sync` names. `may_send`: asked before each attempt; `wake` is set with each result.

    `progress`: of each attempt.
    """

    def __init__(
        self,
        channels: dict[str, Channel],
        retry_max: float,
        may_send: Callable[[], bool],
        wake: threading.Event,
        progress: Progress | None = None,
    ) -> None:
        self.progress = progress or Progress()
        self._lock = threading.Lock()
        self._wake, self._stop = wake, threading.Event()
        self._results: list[Result] = []
        self._ended: set[Job] = set()
        self._senders = {name: _Sender(self, name, c, retry_max, may_send) for name, c in channels.items()}

    def start(self) -> None:
        for sender in self._senders.values():
            sender.thread.start()

    def sync(self, jobs: Iterable[Job], message: Callable[[Job], Message]) -> None:
        """The deliveries that are committed and wait: new ones are queued, others are no longer made."""
        wanted: dict[str, list[Job]] = {name: [] for name in self._senders}
        for job in jobs:
            wanted[job.channel].append(job)
        with self._lock:
            self._ended &= {job for some in wanted.values() for job in some}
        for name, sender in self._senders.items():
            sender.sync(wanted[name], message)

    def has_ended(self, job: Job) -> bool:
        """Whether a job ended, and its end is perhaps not committed yet."""
        with self._lock:
            return job in self._ended

    def results(self) -> list[Result]:
        """What is not settled yet, in order."""
        with self._lock:
            return list(self._results)

    def settled(self, count: int) -> None:
        """The first `count` results are committed."""
        with self._lock:
            del self._results[:count]

    def stop(self, seconds: float) -> None:
        """End the threads, waiting so long at most; a delivery under way may end with the process."""
        self._stop.set()
        deadline = time.monotonic() + seconds
        for sender in self._senders.values():
            sender.wake.set()
        for sender in self._senders.values():
            sender.thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def stopping(self) -> threading.Event:
        return self._stop

    def ended(self, result: Result) -> None:
        """A sender's word; a job that ended is not queued again while its end is being committed."""
        with self._lock:
            self._results.append(result)
            if result.state != PENDING:
                self._ended.add(result.job)
        self._wake.set()


class _Sender:
    """One channel. After a failure the whole channel waits, and the next attempt is another delivery's."""

    def __init__(
        self, outbox: Outbox, name: str, channel: Channel, retry_max: float, may_send: Callable[[], bool]
    ) -> None:
        self._outbox, self._name, self._channel = outbox, name, channel
        self._retry_max, self._may_send = retry_max, may_send
        self._queue: deque[tuple[Job, Message]] = deque()
        self._wanted: set[Job] = set()
        self._current: Job | None = None
        self._lock = threading.Lock()
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"alerts-to-{name}", daemon=True)

    def sync(self, jobs: list[Job], message: Callable[[Job], Message]) -> None:
        with self._lock:
            self._wanted = set(jobs)
            self._queue = deque(item for item in self._queue if item[0] in self._wanted)
            known = {item[0] for item in self._queue} | {self._current}
            # Its end is told before it is no longer the current one: a job is in one of the three places.
            new = [job for job in jobs if job not in known and not self._outbox.has_ended(job)]
            self._queue.extend((job, message(job)) for job in new)
        if jobs:
            self.wake.set()

    def _run(self) -> None:
        wait, told = 0.0, False
        stop = self._outbox.stopping
        while not stop.is_set():
            self.wake.clear()
            taken = self._take()
            if taken is None:
                self.wake.wait(0.5)
                continue
            job, message = taken
            sending = f"channel {self._name}"
            self._outbox.progress.mark(sending)
            try:
                answer = self._channel.send(message)
            except Exception as error:
                log.exception("channel %s failed", self._name)
                metrics.fault("alerts.outbox")
                answer = Answer(PENDING, f"failed: {type(error).__name__}")
            self._outbox.progress.rest(sending)
            faults.point("alerts:after-send")
            metrics.DELIVERIES.labels(self._name, "sent" if answer.state == SENT else "failed").inc()
            self._outbox.ended(Result(job, answer.state, answer.reason))
            failed = answer.state == PENDING
            with self._lock:
                self._current = None
                if failed and job in self._wanted:
                    self._queue.append(taken)
            if not failed:
                if answer.state != SENT:
                    log.warning("channel %s refused alert %s for good: %s", self._name, job.alert, answer.reason)
                elif told:
                    log.info("channel %s takes alerts again", self._name)
                wait, told = 0.0, False
                continue
            if not told:
                log.warning("channel %s: %s; trying again", self._name, answer.reason)
            told = True
            wait = min(self._retry_max, max(BACKOFF_SECONDS, 2 * wait))
            stop.wait(max(answer.after, wait * random.uniform(0.5, 1.0)))

    def _take(self) -> tuple[Job, Message] | None:
        with self._lock:
            if not self._queue or not self._may_send():
                return None
            taken = self._queue.popleft()
            self._current = taken[0]
        faults.point("alerts:before-send")
        return taken
