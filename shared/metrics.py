"""Every metric of a worker, and the small HTTP server that Prometheus reads them from.

Counters end in `_total` where Prometheus reads them; seconds and bytes are base units; instants are Unix seconds. What
only the bus and the store know (lag, owners, dead workers) is in `BUS`: the web worker tells it, read when it is asked.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram, MetricsHandler, disable_created_metrics

from shared.errors import ConfigError
from shared.heartbeat import metrics_are_at
from shared.progress import Progress
from shared.settings import Settings

log = logging.getLogger(__name__)

PORTS = 64  # workers of one machine that each find a port of their own
ANYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - then told to others by the machine's name
LIVE_SECONDS = 300.0  # what is older came from a backlog or a tape: no latency of a live market
QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for each counter and histogram, of when this process began

INFO = Gauge("tapeline_build_info", "1, for the version that runs and the worker's service", ["version", "service"])
PROGRESS = Gauge("tapeline_worker_progress_timestamp_seconds", "When the slowest part of this worker last went on")
PROGRESS.set_function(time.time)  # until something is expected of the worker, see `follow`
FAULTS = Counter("tapeline_faults", "Errors of the program itself that were caught; the log says more", ["where"])

# -- ingest: of one feed
INGEST_RECORDS = Counter(
    "tapeline_ingest_records", "Records of the feed by what became of them: published, or why not", ["feed", "outcome"]
)
PUBLISHED = Counter(
    "tapeline_ingest_published_records", "Records published on ticks, what is said beside the market's included",
    ["feed", "partition"],
)  # fmt: skip
FRAMES = Counter("tapeline_ingest_published_frames", "Frames published on ticks", ["feed", "partition"])
INGEST_BYTES = Counter("tapeline_ingest_received_bytes", "Bytes received, as the vendor counts them", ["feed"])
PUBLISH_SECONDS = Histogram("tapeline_ingest_publish_seconds", "One publishing call to Redis", ["feed"], buckets=QUICK)
INGEST_WAITS = Gauge("tapeline_ingest_waiting", "1 while the bus takes nothing: full, or Redis is away", ["feed"])
FEED_STATE = Gauge("tapeline_feed_state", "1 for the state that the feed's connection is in", ["feed", "state"])
FEED_CONNECTS = Counter("tapeline_feed_connects", "Times that the feed's connection was made", ["feed"])
FEED_EVENT = Gauge(
    "tapeline_feed_newest_event_timestamp_seconds", "Event time of the newest record published", ["feed"]
)
FEED_WATERMARK = Gauge(
    "tapeline_feed_watermark_timestamp_seconds", "No record older than this is expected any more", ["feed"]
)
FEED_LATENCY = Histogram(
    "tapeline_feed_latency_seconds",
    "From the event time of a frame's first record to its being published, live feeds; older than 300 s are left out",
    ["feed"], buckets=SLOW,
)  # fmt: skip
GAPS = Counter("tapeline_gaps", "Gaps told: spans of the feed that cannot be had any more", ["feed"])

# -- aggregate, pressure, signals
STAGE_RECORDS = Counter("tapeline_stage_records", "Records that the stage has committed", ["stage", "partition"])
STAGE_FRAMES = Counter("tapeline_stage_frames", "Frames that the stage has committed", ["stage", "partition"])
STAGE_OUTPUT = Counter("tapeline_stage_output_records", "Rows that the stage has published", ["stage", "topic"])
COMMITS = Counter(
    "tapeline_stage_commits", "Commits: committed, full (an output stream had no room), refused (another owner)",
    ["stage", "partition", "result"],
)  # fmt: skip
STEP_SECONDS = Histogram("tapeline_stage_step_seconds", "One step of the core", ["stage"], buckets=QUICK)
COMMIT_SECONDS = Histogram("tapeline_stage_commit_seconds", "One commit to Redis", ["stage"], buckets=QUICK)
STAGE_LATENCY = Histogram(
    "tapeline_stage_latency_seconds",
    "From the publishing of the oldest frame of a step to the commit of what was made of it",
    ["stage"], buckets=(*QUICK, 10.0, 60.0),
)  # fmt: skip
STAGE_EVENT = Gauge(
    "tapeline_stage_newest_event_timestamp_seconds", "Event time up to which the stage has committed",
    ["stage", "partition"],
)  # fmt: skip
LEASES = Counter(
    "tapeline_lease_changes", "Partitions acquired, released, or lost (to another, or left to expire)",
    ["stage", "change"],
)  # fmt: skip
OWNED = Gauge("tapeline_partitions_owned", "Partitions that this worker owns now", ["stage"])

# -- sinks
SINK_ROWS = Counter(
    "tapeline_sink_rows", "Rows stored, each revision of one counted; rows that the store refused, too",
    ["service", "table"],
)  # fmt: skip
SINK_BATCHES = Counter("tapeline_sink_batches", "Batches stored", ["service"])
DEAD_LETTERS = Counter("tapeline_dead_letters", "Rows and frames that became dead letters", ["service"])
SINK_EVENTS = Counter(
    "tapeline_sink_events",
    "rewinds, missing and ignored entries, fenced batches, store_waits (attempts in vain), sequence_steps_back",
    ["service", "event"],
)  # fmt: skip
WRITE_SECONDS = Histogram("tapeline_sink_write_seconds", "One batch into the store", ["service"], buckets=SLOW)
END_TO_END = Histogram(
    "tapeline_end_to_end_seconds",
    "From the end of a candle's window to its row in the store: of each frame the oldest window, no revisions, nothing "
    "older than 300 s",
    ["service"], buckets=SLOW,
)  # fmt: skip
STORE_WAITS = Gauge("tapeline_sink_waiting", "1 while the store does not answer", ["service"])

# -- alerts
ALERTS = Counter("tapeline_alerts", "Alerts raised, those over the hour's limit included", ["severity", "kind"])
DELIVERIES = Counter("tapeline_alert_deliveries", "Attempts to deliver: sent, failed", ["channel", "result"])

# -- web
REQUESTS = Counter("tapeline_web_requests", "HTTP requests answered", ["route", "status"])
REQUEST_SECONDS = Histogram("tapeline_web_request_seconds", "One HTTP request", ["route"], buckets=SLOW)
LIVE_CLIENTS = Gauge("tapeline_web_live_clients", "Live connections that are open", ["transport"])
LIVE_MESSAGES = Counter("tapeline_web_live_messages", "Messages sent to live clients", ["transport"])


class BusMetric(NamedTuple):
    """A metric that is read from the bus or the store when Prometheus asks the web worker."""

    kind: str  # gauge or counter
    help: str
    labels: tuple[str, ...] = ()


_STREAM = ("topic", "partition")
_CONSUMER = ("topic", "partition", "consumer")
BUS = {
    "tapeline_bus_up": BusMetric("gauge", "1 while Redis answers"),
    "tapeline_bus_memory_bytes": BusMetric("gauge", "Memory that Redis uses (of a cluster: all nodes)"),
    "tapeline_bus_memory_limit_bytes": BusMetric("gauge", "maxmemory of Redis; 0 is none"),
    "tapeline_bus_lag_seconds": BusMetric(
        "gauge", "How long the oldest entry that the consumer has not taken has waited", _CONSUMER
    ),
    "tapeline_bus_lag_records": BusMetric("gauge", "Records that the consumer has not taken (at least)", _CONSUMER),
    "tapeline_bus_stream_entries": BusMetric("gauge", "Entries held", _STREAM),
    "tapeline_bus_stream_bytes": BusMetric("gauge", "Bytes held, as counted against the stream's bound", _STREAM),
    "tapeline_bus_stream_limit_bytes": BusMetric("gauge", "The bound of every stream (redis.stream_max_bytes)"),
    "tapeline_bus_stream_records": BusMetric("counter", "Records ever added", _STREAM),
    "tapeline_bus_stage_records": BusMetric(
        "counter",
        "What the stage's committed state has counted: records taken, late, and those left out, by reason",
        ("stage", "outcome"),
    ),
    "tapeline_bus_partition_owned": BusMetric("gauge", "1 while a living worker owns it", ("stage", "partition")),
    "tapeline_bus_worker_up": BusMetric("gauge", "1 while the worker's heartbeat is fresh", ("worker", "service")),
    "tapeline_bus_worker_stalled_seconds": BusMetric(
        "gauge", "How long the slowest part of the worker has not gone on", ("worker", "service")
    ),
    "tapeline_bus_feed_up": BusMetric("gauge", "1 while the feed is connected, or rests in order", ("feed",)),
    "tapeline_bus_feed_silent": BusMetric("gauge", "1 for a feed that says nothing in its market's hours", ("feed",)),
    "tapeline_bus_feed_newest_event_timestamp_seconds": BusMetric(
        "gauge", "Event time of the feed's newest record", ("feed",)
    ),
    "tapeline_bus_usage_dollars": BusMetric("gauge", "Cost of the feed's use this UTC day", ("feed",)),
    "tapeline_bus_budget_dollars": BusMetric("gauge", "Budget of a UTC day; 0 is none", ("feed",)),
    "tapeline_store_up": BusMetric("gauge", "1 while the store answers"),
    "tapeline_store_newest_row_timestamp_seconds": BusMetric("gauge", "End of the newest candle in the store"),
    "tapeline_store_gaps": BusMetric("gauge", "Gaps that began in the last hour"),
    "tapeline_store_dead_letters": BusMetric("gauge", "Dead letters in the store (at most 10,000 are counted)"),
}


def serve(settings: Settings, service: str, version: str) -> Server | None:
    """Serve this process's metrics from the first free port from metrics.port on; nothing where that is 0.

    Raises ConfigError when none of PORTS is free, or the host is not ours.
    """
    INFO.labels(version, service).set(1)
    host, first = settings.metrics.host.strip("[]"), settings.metrics.port
    if not first:
        return None
    last = min(first + PORTS, 65536)
    for port in range(first, last):
        try:
            server = Server(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise ConfigError(
                f"cannot serve metrics at {host}, port {port} ({error.strerror or error}): set "
                "TAPELINE_METRICS_HOST and TAPELINE_METRICS_PORT (0: none)"
            ) from None
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        name = socket.gethostname() if host in ANYWHERE else host
        server.address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
        metrics_are_at(server.address)
        log.debug("metrics are at http://%s/metrics", server.address)  # each heartbeat says it, too
        return server
    raise ConfigError(f"no port from {first} to {last - 1} is free for metrics: set TAPELINE_METRICS_PORT (0: none)")


class Server(ThreadingTCPServer):
    """HTTP on one port, reached at `address`. Unlike http.server's it asks no name server for this machine's name."""

    allow_reuse_address = True
    daemon_threads = True
    address = ""

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError."""
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, where = found[0][0], str(found[0][4][0])
        super().__init__((where, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - of socketserver
        """Whoever asked is gone, or spoke no HTTP."""
        log.debug("metrics could not be told to %s", client_address, exc_info=True)


class _Handler(MetricsHandler):
    timeout = 10  # seconds that one who says nothing keeps a thread


def follow(progress: Progress) -> None:
    """PROGRESS is of these parts from now on."""
    PROGRESS.set_function(lambda: time.time() - progress.slowest()[1])


def fault(where: str) -> None:
    """Count an error of the program that was caught, and logged, at `where`."""
    FAULTS.labels(where).inc()
