"""Every Redis key name of Tapeline, and nothing else.

All keys of a partition carry the hash tag `{p}`, so on a Redis Cluster they share a slot and one
script can touch input position, state and output together.
"""

from __future__ import annotations

from dataclasses import dataclass

TOPICS = ("ticks", "candles", "late", "pressure", "signals", "usage")


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names under one namespace (default `md`)."""

    namespace: str = "md"

    def _p(self, partition: int, *rest: str) -> str:
        return ":".join((self.namespace, f"{{{partition}}}", *rest))

    def stream(self, partition: int, topic: str) -> str:
        """Stream of frames."""
        return self._p(partition, topic)

    def info(self, partition: int, topic: str) -> str:
        """Hash: `bytes` held, `records` and `frames` ever added, `last_ns` newest event time.

        `kind:<kind>`: records of that kind ever added.
        """
        return self._p(partition, topic, "info")

    def consumers(self, partition: int, topic: str) -> str:
        """Hash: consumer name -> id of the last entry it is done with (trimming waits for it)."""
        return self._p(partition, topic, "consumers")

    def producers(self, partition: int) -> str:
        """Hash: `<producer>:seq`, `<producer>:cursor`, `<producer>:owner`."""
        return self._p(partition, "prod")

    def instruments(self, partition: int) -> str:
        """Hash: instrument id -> JSON of the newest Instrument."""
        return self._p(partition, "instruments")

    def lease(self, partition: int, stage: str) -> str:
        """Hash: `token`, `owner`, `epoch`, `expires_ms`."""
        return self._p(partition, stage, "lease")

    def meta(self, partition: int, stage: str) -> str:
        """Hash: `pos` input position, `out_seq` newest output sequence, `records` consumed."""
        return self._p(partition, stage, "meta")

    def state(self, partition: int, stage: str) -> str:
        """Hash: the stage's committed state, a field per changed piece."""
        return self._p(partition, stage, "state")

    def alerts(self, part: str) -> str:
        """Of the one alerts worker, in partition 0's slot.

        `state`: hash, what it committed; `open`: hash, alert id -> JSON of the Alert; `acks`: hash, alert id -> who.
        """
        return self._p(0, "alerts", part)

    @property
    def signal_acks(self) -> str:
        """Hash: a signal's key -> JSON of who acknowledged it, and when."""
        return self._p(0, "signals", "acks")

    def usage(self, feed: str) -> str:
        """Hash: UTC day -> JSON of the feed's Usage so far."""
        return f"{self.namespace}:usage:{feed}"

    def instrument_days(self, partition: int) -> str:
        """Hash: `<instrument id>@<UTC day>` -> JSON of the Instrument as that day defined it anew."""
        return self._p(partition, "instruments", "days")

    @property
    def workers(self) -> str:
        """Hash: worker id -> JSON heartbeat."""
        return f"{self.namespace}:workers"

    @property
    def deployment(self) -> str:
        """Hash: what is fixed per deployment (`partitions`)."""
        return f"{self.namespace}:deployment"

    @property
    def feeds(self) -> str:
        """Hash: feed -> JSON of its connection state as ingest last saw it."""
        return f"{self.namespace}:feeds"

    def ingest_counters(self, feed: str) -> str:
        """Hash: reason -> records that ingest of this feed did not publish, and `usage_bytes`."""
        return f"{self.namespace}:ingest:{feed}:counters"
