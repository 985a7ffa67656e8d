"""What a feed counts in `shared.metrics`, the labels looked up once. Safe from any thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import Gauge, Histogram

from shared import metrics
from shared.frames import CLOCK, NS, TICK_FRAMES, Frame

# What `Output.connection` may say, and how a feed begins.
STATES = ("starting", "connected", "down", "waiting", "ended", "failed", "budget", "closed")


class FeedTelemetry:
    """One feed. `live`: how old a record is when it is published says something."""

    def __init__(self, feed: str, partitions: int, *, live: bool) -> None:
        self.publish_seconds = metrics.PUBLISH_SECONDS.labels(feed)
        self.waiting, self.gaps = metrics.INGEST_WAITS.labels(feed), metrics.GAPS.labels(feed)
        self._feed, self._state = feed, "starting"
        numbers = [str(p) for p in range(partitions)]
        self._records = [metrics.PUBLISHED.labels(feed, p) for p in numbers]
        self._frames = [metrics.FRAMES.labels(feed, p) for p in numbers]
        self._taken = metrics.INGEST_RECORDS.labels(feed, "published")
        self._bytes, self._connects = metrics.INGEST_BYTES.labels(feed), metrics.FEED_CONNECTS.labels(feed)
        self._latency = metrics.FEED_LATENCY.labels(feed) if live else None
        self._newest: Gauge | None = None  # there is none before the first record
        self._watermark: Gauge | None = None
        for state in STATES:
            metrics.FEED_STATE.labels(feed, state).set(state == self._state)

    def published(self, partition: int, frames: Sequence[Frame]) -> None:
        """These frames are on the bus."""
        self._records[partition].inc(sum(f.count for f in frames))
        self._frames[partition].inc(len(frames))
        if frames[0].kind in TICK_FRAMES:
            self._taken.inc(sum(f.count for f in frames))
            if self._latency is not None:
                self._observe(self._latency, frames[0])

    def _observe(self, latency: Histogram, frame: Frame) -> None:
        """How old the frame's first record is; the rows of clocks are none."""
        if not frame.count:
            return
        rows = frame.rows()
        kinds = rows["kind"]
        first = 0 if kinds[0] != CLOCK else int((kinds != CLOCK).argmax())
        age = time.time() - int(rows["ts_event_ns"][first]) / NS
        if age <= metrics.LIVE_SECONDS:
            latency.observe(max(0.0, age))

    def reached(self, newest_ns: int, watermark_ns: int) -> None:
        """Event time of the newest record, and the feed's watermark; 0 for none yet."""
        if newest_ns:
            self._newest = self._newest or metrics.FEED_EVENT.labels(self._feed)
            self._newest.set(newest_ns / NS)
        if watermark_ns:
            self._watermark = self._watermark or metrics.FEED_WATERMARK.labels(self._feed)
            self._watermark.set(watermark_ns / NS)

    def count(self, outcome: str, records: int, nbytes: int) -> None:
        """Records that were not published, and bytes received."""
        if records:
            metrics.INGEST_RECORDS.labels(self._feed, outcome).inc(records)
        if nbytes:
            self._bytes.inc(nbytes)

    def connection(self, state: str) -> None:
        """The connection's state, from here on."""
        if state == self._state:
            return
        metrics.FEED_STATE.labels(self._feed, self._state).set(0)
        metrics.FEED_STATE.labels(self._feed, state).set(1)
        self._state = state
        if state == "connected":
            self._connects.inc()
