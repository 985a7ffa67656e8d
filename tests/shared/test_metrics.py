"""What workers tell of themselves: scraped over HTTP, and equal to what went through."""

from __future__ import annotations

import gzip
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from services.aggregate import worker as aggregate
from services.ingest import worker as ingest
from services.ingest.gate import gate_of
from services.ingest.publisher import PublisherOutput
from services.ingest.source import RECEIVED, Grouped
from services.ingest.synthetic import generate
from services.ingest.telemetry import STATES
from services.ingest.usage import Account
from services.sink_sqlite import worker as sink
from shared import demo, heartbeat, metrics, replay
from shared.batches import Item, Source, batch_of
from shared.bus import Bus, Limits
from shared.errors import ConfigError
from shared.frames import CLOCK, LIQUIDATION, NS, TICK, TRADE, Frame
from shared.messages import Clock, Gap
from shared.progress import Progress
from shared.settings import Settings, load
from shared.telemetry import ages, rows_of
from shared.usage import day_of, now_ns
from shared.worker import StepResult, Worker
from tests.services.ingest.test_publisher import ROOTS, instrument
from tests.services.sink_sqlite.tape import Feed as PutsTicks
from tests.services.sink_sqlite.tape import Stage as Puts
from tests.services.sink_sqlite.tape import bars, candles, fixed, gap, late, query, rows, sinking, ticks
from tests.wait import until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
AT_THE_END = "9999999999999-0"
METRICS = [m for m in vars(metrics).values() if isinstance(m, Counter | Gauge | Histogram)]


def get(address: str, **headers: str) -> tuple[Any, bytes]:
    request = urllib.request.Request(f"http://{address}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers, answer.read()


class Scraped:
    """Samples of one scrape; what it has not got is 0."""

    def __init__(self, address: str) -> None:
        self.text = get(address)[1].decode()
        self.samples: Samples = {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(self.text)
            for s in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over all samples of this name with these labels."""
        return sum(
            value
            for (own, having), value in self.samples.items()
            if own == name and labels.items() <= dict(having).items()
        )

    def has(self, name: str, **labels: str) -> bool:
        return any(own == name and labels.items() <= dict(having).items() for own, having in self.samples)


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as found:
        return int(found.getsockname()[1])


def settings_of(port: int, host: str = "127.0.0.1") -> Settings:
    base = load(environ={})
    return replace(base, metrics=msgspec.structs.replace(base.metrics, host=host, port=port))


@contextmanager
def served(settings: Settings, service: str = "test") -> Iterator[metrics.Server]:
    server = metrics.serve(settings, service, "1.2.3")
    assert server is not None
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        heartbeat.metrics_are_at("")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where this process's metrics are."""
    with served(settings_of(free_port())) as server:
        yield server.address


@pytest.fixture
def moved(address: str) -> Callable[..., float]:
    """By how much a sample has grown since the test began."""
    before = Scraped(address)

    def since(name: str, **labels: str) -> float:
        return Scraped(address)(name, **labels) - before(name, **labels)

    return since


class Thread:
    """A service in a thread, as the command line runs it."""

    def __init__(self, run: Callable[..., None], settings: Settings, *args: str) -> None:
        self.stop, self.error = threading.Event(), list[BaseException]()
        self.thread = threading.Thread(target=self._run, args=(run, settings, args), daemon=True)
        self.thread.start()

    def _run(self, run: Callable[..., None], settings: Settings, args: tuple[str, ...]) -> None:
        try:
            run(settings, self.stop, args)
        except Exception as error:
            self.error.append(error)

    def __enter__(self) -> Thread:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert not self.error


# -- the server --------------------------------------------------------------------------------


def test_names_and_texts_are_as_prometheus_wants_them(address: str) -> None:
    text = Scraped(address).text
    promtool = shutil.which("promtool")
    if promtool:
        told = subprocess.run([promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        assert (told.returncode, told.stderr) == (0, "")
    families = {f.name: f for f in text_string_to_metric_families(text)}
    for metric in METRICS:
        family = families[metric._name]
        assert family.type == metric._type
        assert re.fullmatch(r"\S.*[^\s.]", family.documentation)
        assert family.name.startswith("tapeline_")
        unit = family.name.removeprefix("tapeline_")
        assert not unit.endswith(("_ms", "_ns", "_minutes", "_total", "_count")), "base units, and no suffix twice"
        assert isinstance(metric, Histogram) <= unit.endswith("_seconds")
        assert "_timestamp" not in unit or unit.endswith("_timestamp_seconds")
        assert len(metric._labelnames) <= 3
    assert "_created" not in text
    assert {m._name for m in METRICS}.isdisjoint(metrics.BUS)


def test_it_is_served_as_prometheus_asks_for_it(address: str) -> None:
    headers, body = get(address, **{"Accept-Encoding": "gzip", "Accept": "application/openmetrics-text;version=1.0.0"})
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    text = gzip.decompress(body).decode()
    assert text.endswith("# EOF\n")
    assert 'tapeline_build_info{service="test",version="1.2.3"} 1.0' in text


def test_one_who_says_nothing_holds_up_nobody(address: str) -> None:
    host, port = address.split(":")
    with ExitStack() as stack:
        for said in (b"", b"GET", b"\x16\x03\x01\x02\x00", b"BREW / HTTP/1.1\r\n\r\n"):
            silent = stack.enter_context(socket.create_connection((host, int(port))))
            silent.sendall(said)
        assert Scraped(address).has("tapeline_build_info")


def test_the_next_free_port_is_taken(bus: Bus) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), served(settings_of(port)) as server:
        assert int(server.address.rpartition(":")[2]) > port
        heartbeat.beat(bus, "me", "test")
        assert heartbeat.living(bus, 5000)[0].metrics == server.address
        with served(settings_of(port)) as another:
            assert another.address != server.address
            assert Scraped(another.address).has("tapeline_build_info")


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PORTS", 1)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"no port from {port} to {port}"):
        metrics.serve(settings_of(port), "test", "1")


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_a_host_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot serve metrics at {host}.*TAPELINE_METRICS_HOST"):
        metrics.serve(settings_of(free_port(), host), "test", "1")


def test_none_are_served_where_none_are_wanted() -> None:
    assert metrics.serve(settings_of(0), "test", "1") is None


@pytest.mark.parametrize("host", ["[::1]", "::", "0.0.0.0", "localhost"])
def test_hosts(host: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with served(settings_of(free_port(host.strip("[]")), host)) as server:
        name, _, port = server.address.rpartition(":")
        local = {"::": "[::1]", "0.0.0.0": "127.0.0.1"}.get(host)
        assert name == (socket.gethostname() if local else f"[{host.strip('[]')}]" if ":" in host else host)
        assert Scraped(f"{local or name}:{port}").has("tapeline_build_info")


def test_progress_is_that_of_the_slowest_part(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, progress = time.monotonic(), Progress()
    try:
        metrics.follow(progress)
        assert time.time() - Scraped(address)("tapeline_worker_progress_timestamp_seconds") < 5, "nothing is expected"
        progress.mark("slow")
        monkeypatch.setattr("shared.progress.time.monotonic", lambda: at + 1000)
        progress.mark("quick")
        assert 990 < time.time() - Scraped(address)("tapeline_worker_progress_timestamp_seconds") < 1010
    finally:
        metrics.PROGRESS.set_function(time.time)


def test_a_replay_serves_none_and_a_demo_does(tmp_path: Path) -> None:
    base = load(environ={})
    assert replay.settings_of(replay.Plan((), tmp_path), base).metrics.port == 0
    assert demo.settings_of(base).metrics.port == base.metrics.port > 0


# -- what went through -------------------------------------------------------------------------


def test_what_is_published_is_committed_and_stored(
    bus: Bus, tmp_path: Path, address: str, moved: Callable[..., float]
) -> None:
    tape, store = tmp_path / "tape.dbn", tmp_path / "store.db"
    generate(tape, trades=4000, rate=20.0, roots=("ES", "NQ", "CL"), late_fraction=0.01, late_seconds=400.0)
    base = settings_of(0)
    settings = replace(
        base,
        tapeline=msgspec.structs.replace(
            base.tapeline, partitions=3, namespace=bus.keys.namespace, store=f"sqlite:///{store}"
        ),
        redis=msgspec.structs.replace(base.redis, url=bus.url),
    )
    with (
        Thread(sink.run, settings),
        Thread(aggregate.run, settings),
        Thread(ingest.run_files, settings, str(tape)),
    ):
        until(lambda: feed_state(bus) == "ended", 30, "the tape to end")
        until(lambda: at_the_end(bus), 30, "all of it to be stored")
        now = Scraped(address)

    info = [bus.call("hgetall", bus.keys.info(p, "ticks")) for p in range(3)]
    for p in range(3):
        held = int(info[p].get(b"records", 0))
        assert moved("tapeline_ingest_published_records_total", feed="files", partition=str(p)) == held
        assert moved("tapeline_stage_records_total", stage="aggregate", partition=str(p)) == held
        frames = int(info[p].get(b"frames", 0))
        assert moved("tapeline_ingest_published_frames_total", feed="files", partition=str(p)) == frames
        assert moved("tapeline_stage_frames_total", stage="aggregate", partition=str(p)) == frames
        if held:
            assert (
                now("tapeline_stage_newest_event_timestamp_seconds", partition=str(p)) == int(info[p][b"last_ns"]) / NS
            )
    assert moved("tapeline_ingest_records_total", feed="files") == 4000
    trades = sum(int(i.get(b"kind:trade", 0)) for i in info)
    assert moved("tapeline_ingest_records_total", feed="files", outcome="published") == trades
    assert moved("tapeline_ingest_records_total", feed="files", outcome="spread") == 4000 - trades > 0
    assert moved("tapeline_stage_commits_total", stage="aggregate", result="committed") > 0
    assert moved("tapeline_stage_commits_total", stage="aggregate", result="refused") == 0
    assert moved("tapeline_stage_step_seconds_count", stage="aggregate") > 0
    assert moved("tapeline_stage_commit_seconds_count") >= moved("tapeline_stage_commits_total")
    assert 0 <= moved("tapeline_stage_latency_seconds_sum") < 60 * moved("tapeline_stage_latency_seconds_count")

    out = {
        t: sum(int(bus.call("hget", bus.keys.info(p, t), "records") or 0) for p in range(3))
        for t in ("candles", "late")
    }
    for topic, count in out.items():
        assert moved("tapeline_stage_output_records_total", stage="aggregate", topic=topic) == count > 0
    assert moved("tapeline_sink_rows_total", service="sink-sqlite") == sum(out.values())
    for name in ("candles_1m", "candles_1s", "candles"):
        rows_held, revisions = query(store, f"SELECT count(*), sum(revision) FROM {name}")[0]
        assert 0 < rows_held <= moved("tapeline_sink_rows_total", table=name) <= rows_held + revisions
    assert (
        moved("tapeline_sink_rows_total", table="late_trades") == query(store, "SELECT count(*) FROM late_trades")[0][0]
    )
    assert moved("tapeline_sink_batches_total") == moved("tapeline_sink_write_seconds_count") > 0
    assert moved("tapeline_dead_letters_total") == 0
    assert moved("tapeline_end_to_end_seconds_count") == 0, "a tape of long ago is no live market"
    assert moved("tapeline_feed_latency_seconds_count") == 0

    assert now("tapeline_feed_state", feed="files") == now("tapeline_feed_state", feed="files", state="ended") == 1
    assert moved("tapeline_feed_connects_total", feed="files") == 1
    assert (
        now("tapeline_partitions_owned", stage="aggregate")
        == now("tapeline_partitions_owned", stage="sink-sqlite")
        == 3
    )
    after = Scraped(address)
    assert after("tapeline_partitions_owned") == 0
    assert not after.has("tapeline_stage_newest_event_timestamp_seconds"), "no partition's gauge outlives its lease"
    assert moved("tapeline_lease_changes_total", stage="aggregate", change="acquired") == 3
    assert moved("tapeline_lease_changes_total", stage="aggregate", change="released") == 3
    assert moved("tapeline_faults_total") == 0


def feed_state(bus: Bus) -> str:
    body = bus.call("hget", bus.keys.feeds, "files")
    return str(msgspec.json.decode(body)["state"]) if body else ""


def at_the_end(bus: Bus) -> bool:
    """Whether each consumer has taken all of each stream."""
    for p in range(3):
        for topic in ("ticks", "candles", "late"):
            done = bus.call("hgetall", bus.keys.consumers(p, topic))
            wanted = {b"aggregate"} if topic == "ticks" else {n for n in done if n.startswith(b"sqlite:")}
            if not wanted or any(done.get(n, b"").decode() != bus.last_id(p, topic) for n in wanted):
                return False
    return True


# -- ingest ------------------------------------------------------------------------------------


def output(bus: Bus, feed: str, **more: Any) -> PublisherOutput:
    base = load(environ={})
    out = PublisherOutput(bus, feed, "me", 3, base.ingest, threading.Event(), True, **more)
    out.attach()
    return out


def pushed(out: PublisherOutput, *records: tuple[int, int], partition: int = 0) -> None:
    """(kind, event time) each, in one frame."""
    made = np.zeros(len(records), TICK)
    made["kind"], made["ts_event_ns"] = zip(*records, strict=True)
    out.ticks(Grouped(made, np.arange(len(made)), [partition], [0, len(made)]), b"{}")
    out.flush()


def test_a_feed_is_in_exactly_one_state(bus: Bus, address: str) -> None:
    out = output(bus, "states")

    def told() -> tuple[float, list[str]]:
        now = Scraped(address)
        on = [s for s in STATES if now("tapeline_feed_state", feed="states", state=s)]
        assert now("tapeline_feed_state", feed="states") == 1
        return now("tapeline_feed_connects_total", feed="states"), on

    assert told() == (0, ["starting"])
    for state, connects in (("connected", 1), ("down", 1), ("connected", 2), ("connected", 2), ("budget", 2)):
        out.connection(state, "whatever it is")
        assert told() == (connects, [state])
    out.close()


def test_what_a_feed_counts(bus: Bus, address: str, moved: Callable[..., float]) -> None:
    out = output(bus, "counts")
    out.count("unknown_instrument", 3)
    out.count("unknown_instrument", 2)
    out.count(RECEIVED, 7, 4096)
    assert moved("tapeline_ingest_records_total", feed="counts", outcome="unknown_instrument") == 5
    assert not Scraped(address).has("tapeline_ingest_records_total", feed="counts", outcome=RECEIVED)
    assert moved("tapeline_ingest_received_bytes_total", feed="counts") == 4096
    out.broadcast(Gap("counts", 1, 2, "nobody is there"))
    assert moved("tapeline_gaps_total", feed="counts") == 0, "no partition has anything of the feed"
    out.instruments([instrument(root, "counts") for root in ROOTS.values()])
    out.broadcast(Gap("counts", 1, 2, "lost"))
    assert moved("tapeline_gaps_total", feed="counts") == 1, "one for the feed, not for each partition"
    assert moved("tapeline_ingest_published_records_total", feed="counts") == 6
    assert moved("tapeline_ingest_records_total", feed="counts", outcome="published") == 0
    assert moved("tapeline_ingest_publish_seconds_count", feed="counts") == 6
    out.close()


def test_how_far_and_how_late_a_live_feed_is(bus: Bus, address: str, moved: Callable[..., float]) -> None:
    out, now = output(bus, "late", by_ordinal=False), time.time_ns()

    def told() -> tuple[float, float]:
        scraped = Scraped(address)
        newest, watermark = (
            scraped(f"tapeline_feed_{name}_timestamp_seconds", feed="late") for name in ("newest_event", "watermark")
        )
        return round(now / NS - newest, 3), round(now / NS - watermark, 3)

    out.instruments([instrument(root, "late") for root in ROOTS.values()])
    out.broadcast(Clock("late", now - 60 * NS, watched_from_ns=now - 60 * NS, grace_ns=2 * NS))
    assert not Scraped(address).has("tapeline_feed_newest_event_timestamp_seconds", feed="late")
    pushed(out, (CLOCK, now - 50 * NS), (TRADE, now - 8 * NS), (TRADE, now - 6 * NS))
    assert told() == (6, 8), "the watermark stays behind by the feed's grace"
    name = "tapeline_feed_latency_seconds"
    assert moved(f"{name}_count", feed="late") == 1
    assert 8 <= moved(f"{name}_sum", feed="late") < 28
    pushed(out, (CLOCK, now), partition=1)
    assert moved(f"{name}_count", feed="late") == 1, "a clock is no record"
    pushed(out, (TRADE, now + 3600 * NS), partition=2)
    assert moved(f"{name}_count", feed="late") == 2
    assert moved(f"{name}_sum", feed="late") < 28, "never below 0"
    pushed(out, (TRADE, now - 400 * NS))
    assert moved(f"{name}_count", feed="late") == 2, "history is not live"
    out.broadcast(Clock("late", now + 3700 * NS))
    assert told()[1] == -3700
    out.close()


def test_a_full_bus_holds_a_feed_up(redis_server: Any, bus: Bus, address: str) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=2000))
    out = output(small, "full", by_ordinal=False)
    out.instruments([instrument(ROOTS[0], "full")])
    small.register(0, "ticks", "slow")

    def push() -> None:
        for _ in range(50):
            pushed(out, *[(TRADE, time.time_ns())] * 10)

    thread = threading.Thread(target=push, daemon=True)
    thread.start()
    until(lambda: Scraped(address)("tapeline_ingest_waiting", feed="full") == 1, what="the feed to wait")
    small.done_with(0, "ticks", "slow", AT_THE_END)
    until(lambda: not thread.is_alive(), what="all to be published")
    assert Scraped(address)("tapeline_ingest_waiting", feed="full") == 0
    out.close()
    small.close()


# -- stages ------------------------------------------------------------------------------------


class Failing:
    """A stage whose core does as it is told."""

    name, topic = "signals", "pressure"

    def __init__(self, fail: bool = False) -> None:
        self._fail = fail

    def open(self, fields: dict[str, bytes]) -> Failing:
        return self

    def step(self, frames: list[Frame]) -> StepResult:
        if self._fail:
            raise ZeroDivisionError
        return StepResult({"signals": [replace(f) for f in frames]})


def working(bus: Bus, stage: Failing, partitions: int = 2) -> Thread:
    base = load(environ={})
    settings = replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, partitions=partitions),
        redis=msgspec.structs.replace(base.redis, lease_seconds=1.0),
    )
    return Thread(lambda s, stop, _: Worker(bus.clone(), stage, s, stop).run(), settings)


def put(bus: Bus, partition: int, seq: int, count: int = 1) -> None:
    frame = Frame("pressure", count, seq * NS, seq * NS, "t", b"[]")
    assert bus.publish(partition, "test", "me", seq, [frame], b"", topic="pressure")


def test_partitions_that_go_take_their_gauges_along(bus: Bus, address: str, moved: Callable[..., float]) -> None:
    def newest(partition: int) -> float:
        return Scraped(address)(
            "tapeline_stage_newest_event_timestamp_seconds", stage="signals", partition=str(partition)
        )

    for p in range(2):
        bus.attach(p, "test", "me")
    with working(bus, Failing()):
        for p in range(2):
            put(bus, p, 1, count=3)
            until(lambda p=p: newest(p) == 1, what="the frame to be committed")
        assert Scraped(address)("tapeline_partitions_owned", stage="signals") == 2
        bus.call("hset", bus.keys.lease(0, "signals"), mapping={"token": "stolen", "owner": "thief"})
        put(bus, 0, 2)
        until(lambda: moved("tapeline_lease_changes_total", stage="signals", change="lost") == 1, what="the loss")
        until(lambda: newest(0) == 2, 10, "the partition to be ours again")
    assert moved("tapeline_stage_commits_total", stage="signals", result="refused") <= 1
    assert moved("tapeline_stage_commits_total", stage="signals", result="committed") == 3
    assert moved("tapeline_stage_records_total", stage="signals", partition="0") == 4
    assert moved("tapeline_stage_output_records_total", stage="signals", topic="signals") == 7
    assert moved("tapeline_lease_changes_total", stage="signals", change="acquired") == 3
    assert moved("tapeline_lease_changes_total", stage="signals", change="released") == 2
    after = Scraped(address)
    assert after("tapeline_partitions_owned", stage="signals") == 0
    assert not after.has("tapeline_stage_newest_event_timestamp_seconds", stage="signals")


def test_commits_that_found_no_room(bus: Bus, moved: Callable[..., float]) -> None:
    small = Bus(bus.url, bus.keys.namespace, limits=Limits(stream_max_bytes=300))
    bus.attach(0, "test", "me")
    bus.register(0, "signals", "slow")
    with working(small, Failing(), 1):
        for seq in range(1, 4):
            put(bus, 0, seq)
            until(lambda seq=seq: moved("tapeline_stage_commits_total", stage="signals") >= seq, what="an attempt")
        until(lambda: moved("tapeline_stage_commits_total", stage="signals", result="full") > 0, what="no room")
        bus.done_with(0, "signals", "slow", AT_THE_END)
        until(lambda: moved("tapeline_stage_frames_total", stage="signals") == 3, 20, "room")
    small.close()


def test_a_fault_of_a_core_is_counted(bus: Bus, moved: Callable[..., float]) -> None:
    bus.attach(0, "test", "me")
    worker = working(bus, Failing(fail=True), 1)
    put(bus, 0, 1)
    until(lambda: not worker.thread.is_alive(), what="the worker to end")
    assert "ZeroDivisionError" in str(worker.error[0])
    assert moved("tapeline_faults_total", where="signals.partition") == 1
    assert moved("tapeline_lease_changes_total", stage="signals", change="lost") == 1, "left to expire"
    assert moved("tapeline_stage_records_total", stage="signals") == 0


def test_usage_that_cannot_be_told_is_a_fault(bus: Bus, moved: Callable[..., float]) -> None:
    base = load(environ={})
    account = Account(bus.clone(), "mine", "me", base, gate_of(base, "mine", "", ""))
    account.attach()
    bus.call("hset", bus.keys.feeds, "other", b"{}")
    bus.call("hset", bus.keys.usage("other"), day_of(now_ns()), b"{")  # what another program wrote
    account._others_at = 0.0  # else it looks only after some seconds
    until(lambda: moved("tapeline_faults_total", where="ingest.usage") > 0, what="the fault")
    account.close()


# -- sinks -------------------------------------------------------------------------------------


def test_rows_by_table_dead_letters_and_events(bus: Bus, tmp_path: Path, moved: Callable[..., float]) -> None:
    path = tmp_path / "store.db"
    stage, raw = Puts(bus), PutsTicks(bus, known=False)
    bad = rows(2)
    bad["name"][1] = 7
    with sinking(bus, path, modes=("candles", "ticks")) as loop:
        stage.put(candles(rows(50)), candles(rows(8), "candle_1s"), bars(fixed(4)), late(2), gap(5), candles(bad))
        stage.put(Frame("candle_1m", 1, 0, 0, "t", b"odd"))
        raw.put(ticks(TRADE, 5), ticks(LIQUIDATION, 3))
        until(lambda: loop.counters["rows"] == 50 + 8 + 4 + 2 + 1 + 2 + 5 + 3, what="all rows")
        until(lambda: loop.counters["dead_letters"] == 2 + 8, what="the dead letters (no instrument is known)")

    def stored(table: str) -> float:
        return moved("tapeline_sink_rows_total", service="sink-sqlite", table=table)

    assert [stored(t) for t in ("candles_1m", "candles_1s", "candles", "late_trades", "gaps")] == [52, 8, 4, 2, 1]
    assert [stored(t) for t in ("ticks_trades", "ticks_liquidations")] == [5, 3]
    assert moved("tapeline_sink_rows_total") == loop.counters["rows"]
    assert moved("tapeline_dead_letters_total", service="sink-sqlite") == 10
    assert moved("tapeline_sink_batches_total") == loop.counters["batches"]
    assert moved("tapeline_sink_events_total") == 0


def test_a_store_that_does_not_answer(bus: Bus, tmp_path: Path, address: str, moved: Callable[..., float]) -> None:
    path = tmp_path / "store.db"
    stage = Puts(bus)
    with sinking(bus, path):
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        stage.put(candles(rows(4)))
        until(lambda: Scraped(address)("tapeline_sink_waiting", service="sink-sqlite") == 1, what="the sink to wait")
        assert moved("tapeline_sink_events_total", event="store_waits") >= 1
        assert moved("tapeline_sink_batches_total") == 0
        other.close()
        until(lambda: moved("tapeline_sink_rows_total", table="candles_1m") == 4, what="the rows")
        assert Scraped(address)("tapeline_sink_waiting", service="sink-sqlite") == 0


def test_a_store_that_does_not_open(bus: Bus, tmp_path: Path, address: str) -> None:
    path = tmp_path / "store.db"
    base = settings_of(0)
    settings = replace(
        base,
        tapeline=msgspec.structs.replace(
            base.tapeline, partitions=1, namespace=bus.keys.namespace, store=f"sqlite:///{path}"
        ),
        redis=msgspec.structs.replace(base.redis, url=bus.url),
    )
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with Thread(sink.run, settings):
        until(lambda: Scraped(address)("tapeline_sink_waiting", service="sink-sqlite") == 1, what="the sink to wait")
        other.close()
        until(lambda: Scraped(address)("tapeline_sink_waiting", service="sink-sqlite") == 0, what="the store")


def test_a_live_candle_is_timed_from_end_to_end(bus: Bus, tmp_path: Path, moved: Callable[..., float]) -> None:
    shift = time.time_ns() // NS * NS - int(rows(1)["time_ns"][0])
    live = rows(2)
    live["time_ns"] += shift - 3 * NS
    stage, name = Puts(bus), "tapeline_end_to_end_seconds"
    with sinking(bus, tmp_path / "store.db"):
        stage.put(candles(rows(6)), candles(live))
        until(lambda: moved("tapeline_sink_rows_total", table="candles_1m") == 8, what="the rows")
        until(lambda: moved(f"{name}_count", service="sink-sqlite") == 1, what="the live frame, and only that")
    assert 3 <= moved(f"{name}_sum", service="sink-sqlite") < 60


def batch(*frames: Frame) -> Any:
    return batch_of([Item(Source("x", "candles", 0, i + 1, f"{i + 1}-0"), f) for i, f in enumerate(frames)])


def test_from_which_instant_a_candle_is_old() -> None:
    a_minute, a_second, five = rows(1), rows(1), fixed(1, seconds=300)
    begin, end = int(rows(1)["time_ns"][0]), int(rows(1)["time_ns"][0]) + 10 * NS
    assert list(ages(batch(candles(a_minute)), end)) == [10.0], "its time is its end"
    assert list(ages(batch(candles(a_second, "candle_1s")), end)) == [9.0], "its time is its beginning"
    assert list(ages(batch(bars(five)), end + 300 * NS)) == [10.0]
    assert list(ages(batch(candles(rows(20))), end)) == [10.0], "of a frame the oldest"
    assert list(ages(batch(candles(rows(4, revision=1))), end)) == [], "a revision is late by intent"
    assert list(ages(batch(candles(rows(2)), candles(rows(2, revision=1))), end)) == [10.0]
    assert list(ages(batch(candles(a_minute)), begin - 5 * NS)) == [0.0], "clocks differ"
    assert list(ages(batch(candles(a_minute)), begin + 300 * NS)) == [300.0]
    assert list(ages(batch(candles(a_minute)), begin + 301 * NS)) == []


def test_the_rows_of_a_batch_are_all_of_them() -> None:
    made = batch(candles(rows(5)), candles(rows(7)), late(3), gap(1), gap(2), bars(fixed(2)))
    assert dict(rows_of(made)) == {"candles_1m": 12, "candles": 2, "late_trades": 3, "gaps": 2}
    assert sum(count for _, count in rows_of(made)) == made.rows


# -- a process ---------------------------------------------------------------------------------


def test_a_worker_of_the_command_line(bus: Bus, tmp_path: Path) -> None:
    """Its own port, nothing but declared names and labels, and no secret in any of it."""
    environ = {
        "PATH": "/usr/bin:/bin", "TAPELINE_METRICS_PORT": str(free_port()), "REDIS_URL": bus.url,
        "TAPELINE_NAMESPACE": bus.keys.namespace, "TAPELINE_STATE_DIR": str(tmp_path), "TAPELINE_PARTITIONS": "2",
        "DATABENTO_API_KEY": "db-SECRET", "TAPELINE_STORE": "postgresql://me:SECRET@127.0.0.1/x",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shared.cli", "run", "ingest-synthetic"], env=environ, stderr=subprocess.DEVNULL
    )
    try:
        found = until(lambda: [b.metrics for b in heartbeat.living(bus, 60_000) if b.metrics], 30, "its heartbeat")
        until(lambda: Scraped(found[0])("tapeline_ingest_published_records_total") > 1000, 30, "trades")
        now = Scraped(found[0])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    declared = {m._name: set(m._labelnames) for m in METRICS}
    for (name, having), _ in now.samples.items():
        if name.startswith("tapeline_"):
            own = next(
                n
                for n in (name, *(name.removesuffix(s) for s in ("_total", "_bucket", "_sum", "_count")))
                if n in declared
            )
            assert {label for label, _ in having} - {"le"} == declared[own]
    assert now("tapeline_feed_state", feed="synthetic", state="connected") == now("tapeline_feed_state") == 1
    assert now("tapeline_build_info", service="ingest-synthetic") == 1
    assert now("process_resident_memory_bytes") > 0
    assert "SECRET" not in now.text
    assert len([n for n, _ in now.samples if n.startswith("tapeline_")]) < 150
