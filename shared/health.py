"""What is unhealthy: workers that are gone or hang, silent feeds, partitions that nobody owns. Pure.

One place says so for `health`, `status`, `top`, the page, the metrics and the alerts, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import msgspec

from shared.feeds import FeedState, silent
from shared.settings import Settings
from shared.stages import enabled
from shared.status import Status, WorkerState


class Verdict(msgspec.Struct, frozen=True):
    """On a worker (`name` is its id), a feed, or all partitions of a stage (kind `partition`, `name` the stage).

    `service`: whose part it is; `host`: on which machine, empty for partitions; `process`: what its supervisor calls a
    worker. `since_ms`: since when it is not healthy (Redis's clock), and `why`; 0 and empty while it is.
    """

    kind: str
    name: str
    service: str
    host: str
    healthy: bool
    why: str = ""
    since_ms: int = 0
    process: str = ""

    @property
    def what(self) -> str:
        """What it is on, for people."""
        called = f" ({self.process})" if self.process not in ("", self.service) else ""
        return f"{'stage' if self.kind == 'partition' else self.kind} {self.name}{called}"

    @property
    def line(self) -> str:
        """For people: what, and why."""
        return f"{self.what}: {self.why or 'healthy'}"


def verdicts(status: Status, feeds: Mapping[str, FeedState], settings: Settings) -> list[Verdict]:
    """On everything that the bus knows: workers, feeds (of `shared.feeds.states`), then stages that are to run."""
    return [
        *(_worker(w, status.now_ms, settings) for w in status.workers),
        *_feeds(feeds, status, settings),
        *(_stage(stage, status, settings) for stage in enabled(settings)),
    ]


def unhealthy(found: Iterable[Verdict]) -> list[Verdict]:
    """Those that are not healthy."""
    return [v for v in found if not v.healthy]


def of_service(verdict: Verdict, service: str) -> bool:
    """Whether a verdict concerns a service as `tapeline run` calls it (`ingest-tardis`: of every exchange)."""
    return verdict.service == service or verdict.service.startswith(f"{service}:")


def _worker(w: WorkerState, now_ms: int, settings: Settings) -> Verdict:
    why, since = "", 0
    if w.age_seconds > settings.redis.lease_seconds:
        why = f"not seen for {w.age_seconds:.0f} s (stopped, killed or cut off from Redis)"
        since = now_ms - int(w.age_seconds * 1000)
    elif w.stalled_seconds > settings.health.stalled_seconds:
        why = f"{w.part} has not gone on for {w.stalled_seconds:.0f} s"
        since = now_ms - int(w.stalled_seconds * 1000)
    return Verdict("worker", w.worker, w.service, w.host, not why, why, since, w.name)


def _feeds(feeds: Mapping[str, FeedState], status: Status, settings: Settings) -> list[Verdict]:
    quiet = {s.feed: s for s in silent(feeds, settings, status.now_ms)}
    found = []
    for name, feed in sorted(feeds.items()):
        why, since = "", 0
        if name in quiet:
            said = feed.state + (f" ({feed.detail})" if feed.detail else "")
            why, since = f"silent, {quiet[name].why}; it is {said}", quiet[name].since_ms
        host = feed.worker.partition("@")[2].rsplit(":", 2)[0]
        found.append(Verdict("feed", name, f"ingest-{name}", host, not why, why, since))
    return found


def _stage(stage: str, status: Status, settings: Settings) -> Verdict:
    """Partitions without a living owner for longer than a lease; of one that nobody ever owned, while ticks wait."""
    free = {
        lease.partition: lease.free_seconds
        for lease in status.leases
        if lease.stage == stage and lease.free_seconds > settings.redis.lease_seconds
    }
    if not free:
        return Verdict("partition", stage, stage, "", healthy=True)
    longest = max(free.values())
    which = f"partition{'s' if len(free) > 1 else ''} {ranges(sorted(free))}"
    why = f"nobody works on {which}, for {longest:.0f} s"
    return Verdict("partition", stage, stage, "", False, why, status.now_ms - int(longest * 1000))


def ranges(numbers: list[int]) -> str:
    """`0-3, 7` of sorted numbers."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    spans = [(numbers[a], numbers[b - 1]) for a, b in pairwise(starts)]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
