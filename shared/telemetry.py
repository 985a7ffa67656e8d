"""What a stage's partitions and a sink count in `shared.metrics`, the labels looked up once.

A partition that is let go takes its gauges with it; its counters stay, so that the last of them is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from shared import metrics
from shared.batches import Batch
from shared.bus import Step
from shared.errors import Fenced
from shared.frames import NS, Frame
from shared.tables import TABLES, TICK_TABLES


class StageTelemetry:
    """One partition of a stage, from getting its lease to giving it back. Used by its thread."""

    def __init__(self, stage: str, partition: int) -> None:
        at = (stage, str(partition))
        self.step_seconds = metrics.STEP_SECONDS.labels(stage)
        self._at = at
        self._commit_seconds = metrics.COMMIT_SECONDS.labels(stage)
        self._done, self._full, self._refused = (
            metrics.COMMITS.labels(*at, result) for result in ("committed", "full", "refused")
        )
        self._records, self._frames = metrics.STAGE_RECORDS.labels(*at), metrics.STAGE_FRAMES.labels(*at)
        self._latency = metrics.STAGE_LATENCY.labels(stage)
        self._newest_ns = 0
        self._changes = {c: metrics.LEASES.labels(stage, c) for c in ("acquired", "released", "lost")}
        self._changes["acquired"].inc()

    def commit(self, attempt: Callable[[], bool]) -> bool:
        """One attempt to commit: what it answers. Raises what it raises."""
        try:
            with self._commit_seconds.time():
                done = attempt()
        except Fenced:
            self._refused.inc()
            raise
        (self._done if done else self._full).inc()
        return done

    def committed(self, step: Step, frames: list[Frame]) -> None:
        """A step of these frames is on the bus."""
        self._records.inc(step.records)
        self._frames.inc(len(frames))
        for topic, made in step.outputs.items():
            metrics.STAGE_OUTPUT.labels(step.stage, topic).inc(sum(f.count for f in made))
        published_ms = int(frames[0].id.partition("-")[0])
        self._latency.observe(max(0.0, time.time() - published_ms / 1000))
        newest_ns = max(f.last_ns for f in frames)
        if newest_ns > self._newest_ns:
            self._newest_ns = newest_ns
            metrics.STAGE_EVENT.labels(*self._at).set(newest_ns / NS)

    def close(self, change: str) -> None:
        """The partition is not ours any more: `released` or `lost`."""
        self._changes[change].inc()
        metrics.STAGE_EVENT.remove(*self._at)


class SinkTelemetry:
    """One sink."""

    def __init__(self, service: str) -> None:
        self.waiting, self.owned = metrics.STORE_WAITS.labels(service), metrics.OWNED.labels(service)
        self._service = service
        self._batches, self._dead = metrics.SINK_BATCHES.labels(service), metrics.DEAD_LETTERS.labels(service)
        self._seconds, self._end_to_end = metrics.WRITE_SECONDS.labels(service), metrics.END_TO_END.labels(service)

    def count(self, event: str, times: int = 1) -> None:
        """Something out of the ordinary happened."""
        metrics.SINK_EVENTS.labels(self._service, event).inc(times)

    def stored(self, batch: Batch, dead: int, seconds: float) -> None:
        """A batch is in the store."""
        self._batches.inc()
        self._seconds.observe(seconds)
        if dead:
            self._dead.inc(dead)
        if batch.ignored:
            self.count("ignored", batch.ignored)
        for table, rows in rows_of(batch):
            if rows:
                metrics.SINK_ROWS.labels(self._service, table).inc(rows)
        if not batch.mend:
            for age in ages(batch, time.time_ns()):
                self._end_to_end.observe(age)


def rows_of(batch: Batch) -> Iterator[tuple[str, int]]:
    """(table, rows) of a batch; in sum `batch.rows`."""
    for kind, chunks in batch.candles.items():
        yield TABLES[kind].name, sum(len(c.rows) for c in chunks)
    yield "late_trades", sum(len(c.rows) for c in batch.late)
    yield "gaps", len(batch.gaps)
    for name, messages in batch.messages.items():
        yield name, len(messages)
    if batch.ticks:
        kinds = np.zeros(256, np.int64)
        for chunk in batch.ticks:
            kinds += np.bincount(chunk.rows["kind"][chunk.rows["part"] == 0], minlength=256)
        for row_kind, table in TICK_TABLES.items():
            yield table.name, int(kinds[row_kind])


def ages(batch: Batch, now_ns: int) -> Iterator[float]:
    """How long ago (s) the oldest window of each frame of candles ended, for what came live.

    Revisions are left out, for it was a late trade that made them, and so is what is older than LIVE_SECONDS.
    """
    oldest_ns = now_ns - int(metrics.LIVE_SECONDS * NS)
    for kind, chunks in batch.candles.items():
        for chunk in chunks:
            ends = TABLES[kind].end_ns(chunk.rows)[chunk.rows["revision"] == 0]
            if len(ends) and (end_ns := int(ends.min())) >= oldest_ns:
                yield max(0.0, (now_ns - end_ns) / NS)
