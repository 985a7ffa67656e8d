"""History through a tardis-machine server: a finite tape, the same in every run.

One connection with all data types, so that the order is the server's. Where the connection breaks, the
same is asked again and what was read before is left out, by position; so does a restarted process, by
what the bus holds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b

import msgspec
import numpy as np

from services.ingest.pacing import Pacer
from services.ingest.source import Output, Resume
from services.ingest.tardis_decode import Decoded, Decoder
from services.ingest.tardis_request import REPLAY, STATE_PATIENCE, URL_BYTES, Request
from services.ingest.tardis_route import Router
from services.ingest.tardis_socket import QUEUE_BYTES, Down, Sockets, Up
from services.ingest.tardis_symbols import EXCHANGES, native_symbol
from shared.errors import ConfigError
from shared.frames import NS
from shared.settings import Settings
from shared.sources import SourceSpec

PRODUCER = "tardis-replay"
POLL_SECONDS = 0.05


class TardisReplay:
    """Source over `tardis://…&via=server` specs, merged by the server. `speed` None: as fast as possible.

    The constructor raises ConfigError for what cannot be asked; `run` also raises AuthError.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        settings: Settings,
        *,
        speed: float | None = None,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self.feed = PRODUCER
        self._settings, self._speed, self._queue_bytes = settings, speed, queue_bytes
        self._request = Request(tuple(_option(spec) for spec in specs), path=REPLAY)
        if len(self._request.target()) > URL_BYTES:
            raise ConfigError(f"{specs[0].text[:60]}… names too many symbols for one replay: split it")
        self._begins: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        for spec in specs:
            self._begins[spec.venue] = min(self._begins.get(spec.venue, _ns(spec.start)), _ns(spec.start))
            self._ends[spec.venue] = max(self._ends.get(spec.venue, 0), _ns(spec.end))
        self.tape = blake2b(msgspec.json.encode(self._request.options), digest_size=16).hexdigest()

    def run(self, out: Output, resume: Resume, stop: threading.Event) -> None:  # noqa: ARG002
        """See Source."""
        s = self._settings.tardis
        router = Router(self.feed, self._settings.tapeline.partitions, s.grace_ms * 1_000_000)
        for exchange, at_ns in self._begins.items():
            router.begin(exchange, at_ns)
        decode = Decoder(router.symbol)
        pacer = Pacer(self._speed) if self._speed is not None else None
        read = skip = 0  # messages; the latter of them again
        patience = s.silence_seconds * STATE_PATIENCE  # the server fetches before it plays
        with Sockets(
            [self._request], s.host, s.port, patience, s.backoff_max_seconds, once=True, queue_bytes=self._queue_bytes
        ) as sockets:
            while not stop.is_set():
                item = sockets.take(sockets.wires[0])
                if item is None:
                    sockets.news.wait(POLL_SECONDS)
                    sockets.news.clear()
                elif isinstance(item, Up):
                    skip = read
                    out.connection("connected", f"replay of {', '.join(self._ends)}")
                elif isinstance(item, Down):
                    if item.ended:
                        break
                    out.count("reconnect", 1)
                    out.connection("waiting" if item.absent else "down", item.reason)
                else:
                    lines = item[skip:]
                    skip = max(0, skip - len(item))
                    self._push(router, decode(lines, read), pacer, out, stop)
                    read += len(lines)
        out.flush()
        if not stop.is_set():
            router.finish(out, {name: max(end, router.newest_ns(name)) for name, end in self._ends.items()})
            out.connection("ended", f"{read} messages")

    def _push(self, router: Router, decoded: Decoded, pacer: Pacer | None, out: Output, stop: threading.Event) -> None:
        if pacer is None or not len(decoded.rows):
            router.take(decoded, out, b"")
            return
        received = np.maximum.accumulate(decoded.rows["ts_recv_ns"])
        counts, at = decoded.counts, 0
        while at < len(received) and not stop.is_set():
            due = pacer.due(int(received[at]), stop)
            end = int(np.searchsorted(received, due, side="right"))
            if end > at:
                part = Decoded(decoded.rows[at:end], decoded.ordinals[at:end], decoded.events, counts)
                router.take(part, out, b"")
                at, counts = end, {}


def _option(spec: SourceSpec) -> dict[str, object]:
    if spec.venue not in EXCHANGES:
        raise ConfigError(f"{spec.text}: no exchange '{spec.venue}'; there are: {', '.join(sorted(EXCHANGES))}")
    return {
        "exchange": spec.venue,
        "symbols": [native_symbol(spec.venue, s) for s in spec.symbols],
        "dataTypes": list(spec.types),
        "from": _iso(spec.start),
        "to": _iso(spec.end),
        "withDisconnectMessages": True,
    }


def _iso(at: datetime | None) -> str:
    assert at is not None
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _ns(at: datetime | None) -> int:
    assert at is not None
    return int(at.timestamp()) * NS
