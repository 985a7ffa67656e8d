"""The metrics of bus and store that the web worker tells (`shared.metrics.BUS`), and where those of all workers are.

They are read when Prometheus asks, by the looks that the page shares. What does not answer is told by `tapeline_bus_up`
or `tapeline_store_up` being 0, and by the absence of the rest: a number that nobody knows is not told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.requests import Request

from services.web.context import web_of
from services.web.pipeline import SCRAPE_SECONDS, Answer, Pipeline, Seen
from services.web.problems import Json, Problem
from shared.feeds import FeedState, rests
from shared.frames import NS, ns_of
from shared.metrics import BUS
from shared.settings import Settings
from shared.stages import enabled
from shared.status import Status, WorkerState
from shared.stores import parse

log = logging.getLogger(__name__)

# Ingest tells of its feed every two seconds; a feed that nobody has told of for so long is not up.
FEED_MS = 10_000

Family = CounterMetricFamily | GaugeMetricFamily
_SERVICE_DISCOVERY = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["targets", "labels"],
        "properties": {
            "targets": {"type": "array", "items": {"type": "string", "examples": ["127.0.0.1:9464"]}},
            "labels": {
                "type": "object",
                "required": ["service", "worker"],
                "properties": {"service": {"type": "string"}, "worker": {"type": "string"}},
            },
        },
    },
}

router = APIRouter(prefix="/api/v1/metrics", tags=["pipeline"])


@router.get("/targets", summary="Where each worker's metrics are, as Prometheus discovers them", response_model=None,
            responses={200: {"content": {"application/json": {"schema": _SERVICE_DISCOVERY}}}})  # fmt: skip
async def targets(request: Request) -> Json:
    """For `http_sd_configs`: the address of every living worker that serves metrics, with its service and its name.

    Without Redis nobody knows: 503, with which Prometheus keeps the addresses that it has.
    """
    seen, _ = await web_of(request).pipeline.seen()
    if seen is None:
        raise Problem(503, "unavailable", "Redis does not answer, so the workers are not known", {"Retry-After": "5"})
    living = [(name, worker) for name, worker in by_name(seen.status).items() if worker.alive and worker.metrics]
    # A killed one seems to live for as long as a lease; who took its port beats the later.
    at = {worker.metrics: (name, worker) for name, worker in sorted(living, key=lambda one: -one[1].age_seconds)}
    return Json([
        {"targets": [address], "labels": {"service": worker.service, "worker": name}}
        for address, (name, worker) in sorted(at.items())
    ])  # fmt: skip


def by_name(status: Status) -> dict[str, WorkerState]:
    """Workers by a name that stays when one is started again: `aggregate-1@host`, as its supervisor calls it.

    Without a supervisor the service stands for it; where several of a service run on a host so, each has its own id.
    """
    found: dict[str, WorkerState] = {}
    same: dict[str, list[WorkerState]] = {}
    for worker in sorted(status.workers, key=lambda w: w.age_seconds):
        same.setdefault(f"{worker.name or worker.service}@{worker.host}", []).append(worker)
    for name, workers in sorted(same.items()):
        living = [worker for worker in workers if worker.alive]
        if len(living) < 2 or workers[0].name:
            found[name] = workers[0]
        else:
            found |= {worker.worker: worker for worker in living}
    return found


@contextlib.contextmanager
def exported(pipeline: Pipeline, settings: Settings, registry: CollectorRegistry | None) -> Iterator[None]:
    """Tells BUS through a registry; to be entered in the pipeline's event loop."""
    if registry is None:
        yield
        return
    collector = BusCollector(pipeline, settings, asyncio.get_running_loop())
    registry.register(collector)
    try:
        yield
    finally:
        registry.unregister(collector)


class BusCollector:
    """A collector for prometheus-client; asked on threads of its own, it looks on the loop of the pipeline."""

    def __init__(self, pipeline: Pipeline, settings: Settings, loop: asyncio.AbstractEventLoop) -> None:
        self._pipeline, self._settings, self._loop = pipeline, settings, loop

    def describe(self) -> list[Family]:
        """All names, without a value."""
        return list(_families().values())

    def collect(self) -> Iterable[Family]:
        """Never raises, and comes back soon; nothing while the server itself does not go on."""
        looking = self._pipeline.seen()
        try:
            asked = asyncio.run_coroutine_threadsafe(looking, self._loop)
        except RuntimeError:  # the loop has ended
            looking.close()
            return []
        try:
            seen, store = asked.result(SCRAPE_SECONDS + 1)
            return [family for family in told(seen, store, self._settings).values() if family.samples]
        except Exception as error:
            asked.cancel()
            log.warning("bus and store are not told to Prometheus: %s", type(error).__name__)
            return []


def _families() -> dict[str, Family]:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    return {name: kinds[metric.kind](name, metric.help, labels=metric.labels) for name, metric in BUS.items()}


class _Told:
    """Families that are being filled; what is None is left out."""

    def __init__(self) -> None:
        self.families = _families()

    def add(self, name: str, value: float | None, *labels: Any) -> None:
        if value is not None:
            self.families[name].add_metric([str(label) for label in labels], value)


def told(seen: Seen | None, store: Answer | None, settings: Settings) -> dict[str, Family]:
    """All of BUS. `seen`, `store`: None for what does not answer."""
    out = _Told()
    out.add("tapeline_bus_up", seen is not None)
    if seen is not None:
        _bus(out, seen, settings)
    if parse(settings.tapeline.store).scheme != "bigquery":  # which is not asked, as each look would cost
        _store(out, store)
    return out.families


def _bus(out: _Told, seen: Seen, settings: Settings) -> None:
    status, answer = seen.status, seen.answer
    used, limit = seen.memory or (None, None)
    out.add("tapeline_bus_memory_bytes", used)
    out.add("tapeline_bus_memory_limit_bytes", limit)
    out.add("tapeline_bus_stream_limit_bytes", settings.redis.stream_max_bytes)
    for stream in status.streams:
        at = (stream.topic, stream.partition)
        out.add("tapeline_bus_stream_entries", stream.entries, *at)
        out.add("tapeline_bus_stream_bytes", stream.bytes, *at)
        out.add("tapeline_bus_stream_records", stream.records, *at)
        for consumer in stream.consumers:
            out.add("tapeline_bus_lag_seconds", consumer.behind_seconds, *at, consumer.name)
            out.add("tapeline_bus_lag_records", consumer.behind_records, *at, consumer.name)
    for stage, counters in status.counters.items():
        for outcome, records in counters.items():
            out.add("tapeline_bus_stage_records", records, stage, outcome)
    _workers(out, status, settings)
    _feeds(out, status, answer)


def _workers(out: _Told, status: Status, settings: Settings) -> None:
    for lease in status.leases:
        if lease.stage in enabled(settings):
            out.add("tapeline_bus_partition_owned", bool(lease.owner), lease.stage, lease.partition)
    for name, worker in by_name(status).items():
        out.add("tapeline_bus_worker_up", worker.alive, name, worker.service)
        out.add("tapeline_bus_worker_stalled_seconds", worker.stalled_seconds, name, worker.service)


def _feeds(out: _Told, status: Status, answer: Answer) -> None:
    for feed in answer["feeds"]:
        name = feed["feed"]
        if name not in status.feeds:  # it was there a moment later
            continue
        said = msgspec.convert(status.feeds[name], FeedState)
        connected = said.state == "connected" and status.now_ms - said.at_ms <= FEED_MS
        out.add("tapeline_bus_feed_up", connected or rests(said), name)
        out.add("tapeline_bus_feed_silent", feed["silent"], name)
        newest = said.last_event_ns / NS if said.last_event_ns else None
        out.add("tapeline_bus_feed_newest_event_timestamp_seconds", newest, name)
    for used in answer["usage"]:
        out.add("tapeline_bus_usage_dollars", used["cost_usd"], used["feed"])
        out.add("tapeline_bus_budget_dollars", used["budget_usd"], used["feed"])


def _store(out: _Told, store: Answer | None) -> None:
    out.add("tapeline_store_up", store is not None)
    if store is not None:
        newest = store["newest"]
        out.add("tapeline_store_newest_row_timestamp_seconds", ns_of(newest) / NS if newest else None)
        out.add("tapeline_store_gaps", store["gaps"]["last_hour"])
        out.add("tapeline_store_dead_letters", store["dead_letters"])
