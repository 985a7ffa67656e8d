"""Runs a source whenever its feed may be connected: within its budget and in market hours.

Outside of them the process lives on without a connection. Time that passes while the market is closed passes for the
consumers, too: after a session that was seen to its end, Clocks say so. Before midnight, a feed that was stopped at
its budget says nothing: what it misses is a Gap once it goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress

from services.ingest.gate import BUDGET, Shut
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Source
from services.ingest.usage import STOPPED_AT_BUDGET, Account
from shared.errors import BusUnavailable
from shared.frames import NS
from shared.messages import Clock, Disconnect

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
OWNER_SECONDS = 2.0
CLOCK_NS = 60 * NS


class Keeper:
    """One source and its output. `stop` ends everything."""

    def __init__(self, source: Source, out: PublisherOutput, account: Account, stop: threading.Event) -> None:
        self._source, self._out, self._account, self._stop = source, out, account, stop
        self._was: Shut | None = None  # why the last run was stopped, until that was told

    def run(self) -> bool:
        """Go on from the bus, once: run the source, or wait until it may. False when it must be called again.

        Raises what the source and the output raise.
        """
        out, account = self._out, self._account
        resume = out.attach()
        shut = account.shut()
        if shut is not None or self._was is not None:
            self._wait(shut)
            return False
        resume.missed, resume.since_ns = account.skipping()
        run = account.open(self._stop)
        out.stop_at(run)
        try:
            self._source.run(out, resume, run)
            out.flush()
        finally:
            out.stop_at(self._stop)
            self._was = account.over(0 if out.halted else out.reached_ns)
        return self._was is None

    def _wait(self, shut: Shut | None) -> None:
        """Say why the run was stopped, and wait for the gate."""
        out, account = self._out, self._account
        was, self._was = self._was, None
        if was is not None:
            self._say(was)
        told: Shut | None = None
        clocked_ns, owned_at = account.now_ns, time.monotonic()
        while shut is not None and not self._stop.is_set():
            if told is None or told.state != shut.state:
                level = logging.WARNING if shut.state == BUDGET else logging.INFO
                log.log(level, "%s is not connected: %s", account.feed, shut.detail)
            if shut != told:
                out.connection(shut.state, shut.detail)
                told = shut
            now = account.now_ns
            if now - clocked_ns >= CLOCK_NS and account.session_ended_ns:
                out.broadcast(Clock(account.feed, min(now, shut.until_ns), wall_ns=now))
                clocked_ns = now
            if time.monotonic() - owned_at >= OWNER_SECONDS:
                owned_at = time.monotonic()
                with suppress(BusUnavailable):
                    out.check_owner()
            self._stop.wait(LOOK_SECONDS)
            shut = account.shut()

    def _say(self, was: Shut) -> None:
        out, account = self._out, self._account
        if was.state == BUDGET:
            out.count("budget_stop", 1)
            out.broadcast(Disconnect(account.feed, account.now_ns, STOPPED_AT_BUDGET))
        elif account.session_ended_ns:
            out.broadcast(Clock(account.feed, was.ended_ns, wall_ns=account.now_ns))
