"""Alerts workers in threads of the test, on a real bus, and signals for them."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import msgspec

from services.alerts.worker import run
from shared.alerts import Alert
from shared.bus import Bus
from shared.errors import TapelineError
from shared.frames import Frame
from shared.messages import Signal, encode
from shared.settings import AlertSettings, Settings, load
from tests.services.alerts.test_core import signal
from tests.wait import until

PARTITIONS = 2


def configured(bus: Bus, channels: dict[str, str], **alerts: Any) -> Settings:
    base = load(environ={})
    values = {"retry_max_seconds": 0.02, "silent_seconds": 600.0, "backlog_seconds": 600.0} | alerts
    return replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, namespace=bus.keys.namespace, partitions=PARTITIONS),
        redis=msgspec.structs.replace(base.redis, url=bus.url, lease_seconds=1.0),
        alerts=AlertSettings(channels=channels, **values),
    )


class Running:
    """One alerts worker from `__enter__` to `__exit__`."""

    def __init__(self, settings: Settings) -> None:
        self.stop = threading.Event()
        self.settings = settings
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            run(self.settings, self.stop, ())
        except TapelineError as error:
            self.error = error

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive(), "a worker stops within seconds"
        assert self.error is None


def begun(bus: Bus) -> bool:
    """Whether a worker has taken its place in the streams."""
    return all(bus.call("hexists", bus.keys.consumers(p, "signals"), "alerts") for p in range(PARTITIONS))


def publish(bus: Bus, *signals: Signal, partition: int = 0) -> None:
    seq, _ = bus.attach(partition, "test", "test")
    frame = Frame("signal", len(signals), 0, 0, "test", encode(list(signals)))
    assert bus.publish(partition, "test", "test", seq + 1, [frame], b"", topic="signals")


def strikes(*numbers: int, **more: Any) -> list[Signal]:
    return [signal(strike=float(n), **more) for n in numbers]


def alerts(bus: Bus) -> list[Alert]:
    """As committed, oldest first."""
    found = [msgspec.json.decode(body, type=Alert) for body in bus.call("hvals", bus.keys.alerts("open"))]
    return sorted(found, key=lambda a: (a.first_ms, a.id))


def settled(bus: Bus, count: int) -> list[Alert]:
    """All alerts, once there are so many and none waits any more."""
    return until(lambda: len(all_ := alerts(bus)) == count and not any(a.waiting for a in all_) and all_, 20)
