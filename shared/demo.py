"""The demo: a synthetic market through the whole pipeline, supervised as in production, into a fresh store."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shared.bus import Bus
from shared.errors import TapelineError, Unavailable
from shared.frames import iso
from shared.settings import Settings, Web
from shared.stores import read_rows
from shared.supervise import layout, programs
from shared.supervision import Supervision

LIVE_SECONDS = 20.0
MOST_SECONDS = 45.0
HISTORY_SECONDS = 600  # what the synthetic feed gives at once, for the warm-up
POLL_SECONDS = 0.25
WINDOW_SECONDS = 60


@dataclass(slots=True)
class Progress:
    """`done` of `total` seconds of market time are stored; `live` once it has caught up with the clock."""

    done: float = 0.0
    total: float = HISTORY_SECONDS + LIVE_SECONDS
    live: bool = False


@dataclass(slots=True)
class Summary:
    """What came out. Latencies are those of rows made live: `timestamp_out` less the window's end."""

    seconds: float
    trades: int
    rows: int
    candles: dict[str, int] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency_p50_ms: float | None = None
    latency_p99_ms: float | None = None


def settings_of(settings: Settings) -> Settings:
    """Own state directory, own Redis without a port, own store, the synthetic feed; the page on a port that is free.

    Windows of option pressure are of a minute, so that ten minutes of history show some, and signals of them.
    """
    state = Path(settings.tapeline.state_dir) / "demo"
    lateness = min(settings.aggregate.max_lateness_seconds, WINDOW_SECONDS)
    return replace(
        settings,
        tapeline=msgspec.structs.replace(
            settings.tapeline, state_dir=str(state), store=f"sqlite:///{state / 'tapeline.db'}", feeds=("synthetic",)
        ),
        redis=msgspec.structs.replace(settings.redis, url="", cluster=False, port=0),
        aggregate=msgspec.structs.replace(settings.aggregate, max_lateness_seconds=lateness),
        pressure=msgspec.structs.replace(settings.pressure, window_seconds=WINDOW_SECONDS),
        web=msgspec.structs.replace(settings.web, port=_free_port(settings.web)),
    )


def _free_port(web: Web) -> int:
    """The port of the settings, or any other where that is taken; 0 where no page is wanted."""
    family = socket.AF_INET6 if ":" in web.host else socket.AF_INET
    for port in (web.port, 0) if web.port else ():
        with suppress(OSError), socket.create_server((web.host, port), family=family) as found:
            return int(found.getsockname()[1])
    return web.port


def supervision(settings: Settings, config: str | None) -> Supervision:
    """What runs the demo; its settings are `settings_of` the given ones."""
    own = settings_of(settings)
    return Supervision(own, programs(own), config, fresh=True)


class Demo:
    """A running demo."""

    def __init__(self, running: Supervision) -> None:
        self._running = running
        self._store = running.settings.tapeline.store
        self._began = time.time()
        self._live_from: float | None = None

    def watch(self, tell: Callable[[Progress], None]) -> None:
        """Returns once LIVE_SECONDS of live market are stored, at the latest after MOST_SECONDS.

        Raises WorkerError, or TapelineError when nothing has been stored by then.
        """
        progress = Progress()
        while time.time() - self._began < MOST_SECONDS:
            self._running.check()
            newest = self._newest()
            now = time.time()
            if newest is not None:
                progress.done = max(progress.done, min(progress.total, newest - (self._began - HISTORY_SECONDS)))
                if self._live_from is None and now - newest < 3:
                    self._live_from = now
            progress.live = self._live_from is not None
            if self._live_from is not None and now - self._live_from >= LIVE_SECONDS:
                progress.done = progress.total
                tell(progress)
                return
            tell(progress)
            time.sleep(POLL_SECONDS)
        if self._newest() is None:
            raise TapelineError(
                f"no candle was stored within {MOST_SECONDS:g} s; see {layout(self._running.settings).logs}"
            )

    def _newest(self) -> float | None:
        """Newest stored window end in seconds of Unix time."""
        try:
            rows = read_rows(self._store, "candles_1m", last=1)
        except Unavailable:
            return None
        return float(np.datetime64(rows[0]["time"].rstrip("Z"), "s").astype(np.int64)) if rows else None

    def summary(self) -> Summary:
        """What is stored now."""
        rows = read_rows(self._store, "candles_1m")
        found = Summary(seconds=round(time.time() - self._began, 1), trades=self._trades(), rows=len(rows))
        since = iso(int((self._live_from or time.time()) + 1) * 10**9)[:19] + "Z"
        for row in rows:
            found.candles[row["ticker"]] = found.candles.get(row["ticker"], 0) + 1
            found.last[row["ticker"]] = {name: row[name] for name in ("time", "symbol", "close", "volume", "cvd_close")}
        live = [row["latency_ms"] for row in rows if row["time"] >= since and row["revision"] == 0]
        if live:
            found.latency_p50_ms, found.latency_p99_ms = (round(float(np.percentile(live, q)), 1) for q in (50, 99))
        return found

    def _trades(self) -> int:
        s = self._running.settings
        bus = Bus(s.redis.url, s.tapeline.namespace)
        try:
            held = (bus.call("hget", bus.keys.info(p, "ticks"), "kind:trade") for p in range(s.tapeline.partitions))
            return sum(int(count or 0) for count in held)
        finally:
            bus.close()
