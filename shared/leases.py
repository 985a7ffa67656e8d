"""Who works on which partition: each worker of a kind takes its fair share, by leases on the bus."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

from shared import metrics
from shared.bus import Bus
from shared.heartbeat import Beat, living

log = logging.getLogger(__name__)


class Share(NamedTuple):
    """What a worker does next: hand over `spare`, and take up to `wanted` of `order`, in that order."""

    spare: list[int]
    order: list[int]
    wanted: int


def fair_share(workers: Sequence[Beat], me: str, partitions: int, owned: Sequence[int]) -> Share:
    """Each worker looks first where its rank points, so that newcomers do not all grab the same."""
    size = -(-partitions // max(1, len(workers)))
    rank = next((i for i, worker in enumerate(workers) if worker.worker == me), 0)
    order = [(rank * size + i) % partitions for i in range(partitions)]
    return Share(list(owned[size:]), [p for p in order if p not in owned], max(0, size - len(owned)))


class Leases:
    """The leases of a worker that keeps no thread per partition (a sink). Used by one thread.

    `leader`: all partitions or none, for a store that one worker at a time writes.
    """

    def __init__(self, stage: str, worker: str, service: str, partitions: int, ttl_ms: int, *, leader: bool) -> None:
        self.stage, self.worker, self.service = stage, worker, service
        self.partitions, self.ttl_ms, self.leader = partitions, ttl_ms, leader
        self._held: dict[int, str] = {}
        self._acquired, self._released, self._lost = (
            metrics.LEASES.labels(service, change) for change in ("acquired", "released", "lost")
        )

    @property
    def mine(self) -> list[int]:
        """Partitions to work on."""
        return list(range(self.partitions)) if self.leader and self._held else sorted(self._held)

    def tend(self, bus: Bus) -> list[int]:
        """Renew what is held and take what is due; returns the partitions to hand over. Raises BusUnavailable."""
        for partition, token in list(self._held.items()):
            if not bus.renew(partition, self.stage, token, self.ttl_ms):
                log.warning("partition %d of '%s' is another worker's now", partition, self.stage,
                            extra={"partition": partition})  # fmt: skip
                del self._held[partition]
                self._lost.inc()
        if self.leader:
            share = Share([], [0], 1 - len(self._held))
        else:
            workers = living(bus, self.ttl_ms, self.service)
            share = fair_share(workers, self.worker, self.partitions, list(self._held))
        left = share.wanted
        for partition in share.order:
            if left <= 0:
                break
            taken = bus.acquire(partition, self.stage, self.worker, self.ttl_ms)
            if taken is not None:
                self._held[partition] = taken
                self._acquired.inc()
                left -= 1
        return share.spare

    def release(self, bus: Bus, partitions: Collection[int] | None = None) -> None:
        """Give these up, or all."""
        for partition in list(self._held) if partitions is None else partitions:
            token = self._held.pop(partition, None)
            if token is not None:
                bus.release(partition, self.stage, token)
                self._released.inc()
