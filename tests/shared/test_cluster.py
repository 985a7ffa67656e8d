"""The same code on a Redis Cluster: three real masters, and the tables that one Redis gives."""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from services.ingest.synthetic import generate
from services.ingest.worker import run_files
from shared.bus import Bus, Step
from shared.errors import AuthError, BusBehind, BusUnavailable, ConfigError, Fenced
from shared.frames import Frame
from shared.heartbeat import beat, leave, living, redis_now_ms
from shared.redis_server import EmbeddedRedis, find_redis, port_is_free
from shared.settings import Settings
from shared.status import Reader
from shared.worker import wait_for_bus
from tests.e2e.test_live import configured, drained, pipeline
from tests.e2e.test_replay import rows
from tests.shared.test_cli import tapeline
from tests.shared.test_cli_bus import publish, trades
from tests.wait import until

pytestmark = pytest.mark.heavy
PARTITIONS = 4
SLOTS = 16384


class Node:
    """One cluster node on 127.0.0.1, with an append-only file; `kill` and `start` as the power does."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        folder.mkdir()
        self.client = redis.Redis(port=port, socket_timeout=5)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        options = {
            "port": self.port, "bind": "127.0.0.1", "dir": self.folder, "cluster-enabled": "yes",
            "cluster-config-file": "nodes.conf", "cluster-node-timeout": 1000, "appendonly": "yes", "save": "",
        }  # fmt: skip
        config = self.folder / "redis.conf"
        config.write_text("".join(f'{name} "{value}"\n' for name, value in options.items()))
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([find_redis()[0], str(config)], stdout=log, stderr=log)
        until(self.answers, 20, f"the node at {self.port}")

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def says(self) -> str:
        """`ok` or `fail`, as this node sees the cluster."""
        try:
            return self.client.execute_command("CLUSTER INFO")["cluster_state"]
        except redis.ConnectionError:
            return "gone"

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.client.connection_pool.disconnect()


class Cluster:
    """Three masters with a third of the slots each."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [Node(folder / str(i), _free_port()) for i in range(3)]
        self.url = f"redis://127.0.0.1:{self.nodes[0].port}"

    def start(self) -> None:
        """Make it, or bring killed nodes back; returns when every node says ok."""
        new = not (self.nodes[0].folder / "nodes.conf").exists()
        for node in self.nodes:
            node.start()
        if new:
            self._join()
        until(lambda: all(n.says() == "ok" for n in self.nodes), 30, "the cluster to be ok")

    def _join(self) -> None:
        edges = [0, SLOTS // 3, 2 * SLOTS // 3, SLOTS]
        for i, node in enumerate(self.nodes):
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            node.client.execute_command("CLUSTER ADDSLOTS", *range(edges[i], edges[i + 1]))
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].port)

    def of(self, key: str) -> Node:
        """The node that holds a key."""
        slot = self.nodes[0].client.execute_command("CLUSTER KEYSLOT", key)
        return self.nodes[min(2, next(i for i in range(3) if slot < (i + 1) * SLOTS // 3))]

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()


def _free_port() -> int:
    """A port that is free together with the one 10,000 above, which the nodes use among themselves."""
    while True:
        port = random.randint(20_000, 29_999)
        if port_is_free(port) and port_is_free(port + 10_000):
            return port


@pytest.fixture(scope="module")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """The module's cluster, whole whatever the test before did to it."""
    _cluster.start()
    return _cluster


@pytest.fixture
def cbus(cluster: Cluster) -> Iterator[Bus]:
    """A bus on the cluster, on a namespace of its own."""
    made = Bus(cluster.url, f"t{uuid.uuid4().hex[:10]}", cluster=True)
    yield made
    made.close()


def test_partitions_are_on_all_nodes(cluster: Cluster, cbus: Bus) -> None:
    """Else the tests here would prove nothing."""
    assert len({cluster.of(cbus.keys.stream(p, "ticks")).port for p in range(PARTITIONS)}) == 3


def test_every_call_of_the_bus(cbus: Bus) -> None:
    cbus.ping()
    cbus.deploy(PARTITIONS)
    assert cbus.identity() == cbus.clone().identity()
    for p in range(PARTITIONS):
        assert cbus.attach(p, "files", "me") == (0, b"")
        frames = [trades(7, 3, 100.0 + p), trades(7, 2, 200.0 + p)]
        assert cbus.publish(p, "files", "me", 1, frames, b"here")
        assert cbus.publish(p, "files", "me", 1, frames, b"here"), "a duplicate is harmless"
        with pytest.raises(BusBehind):
            cbus.publish(p, "files", "me", 9, frames, b"there")
        assert cbus.attach(p, "files", "other") == (2, b"here")
        with pytest.raises(Fenced):
            cbus.publish(p, "files", "me", 3, frames, b"late")
        token = cbus.acquire(p, "aggregate", "w", 60_000)
        assert token
        assert cbus.acquire(p, "aggregate", "v", 60_000) is None
        assert cbus.renew(p, "aggregate", token, 60_000)
        assert cbus.load(p, "aggregate", "ticks") == ("0-0", 0, {})
        read = cbus.read(p, "ticks", "0-0", 10, 200)
        assert [(f.seq, f.count) for f in read] == [(1, 3), (2, 2)]
        out = Frame("candle_1m", 1, 1, 2, "aggregate", b"body", seq=1)
        step = Step(token, "aggregate", "0-0", read[-1].id, 5, 2, 1, {"a": b"1"}, (), {"candles": [out]})
        assert cbus.commit(p, "ticks", step)
        with pytest.raises(Fenced):
            cbus.commit(p, "ticks", step)
        assert cbus.load(p, "aggregate", "ticks") == (read[-1].id, 1, {"a": b"1"})
        cbus.register(p, "candles", "sink")
        cbus.done_with(p, "candles", "sink", cbus.last_id(p, "candles"))
        began = time.monotonic()
        assert cbus.read(p, "ticks", read[-1].id, 10, 50) == []
        assert time.monotonic() - began >= 0.045, "it waits for the first entry"
        cbus.release(p, "aggregate", token)
        assert cbus.acquire(p, "aggregate", "v", 60_000)
    assert beat(cbus, "w", "aggregate", [1]) == pytest.approx(redis_now_ms(cbus), abs=2000)
    assert [w.worker for w in living(cbus, 5000)] == ["w"]
    leave(cbus, "w")
    assert living(cbus, 5000) == []


def test_trimming(cbus: Bus) -> None:
    cbus.limits = replace(cbus.limits, window_ms=0)
    for _ in range(40):
        publish(cbus, 2, trades(7, 3, 1.0))
    cbus.register(2, "ticks", "one")
    assert cbus.trim(2, "ticks") == 0
    cbus.done_with(2, "ticks", "one", cbus.last_id(2, "ticks"))
    assert cbus.trim(2, "ticks") == 24
    assert cbus.call("xlen", cbus.keys.stream(2, "ticks")) == 16


def test_what_cannot_be_is_one_clear_error(cluster: Cluster, redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a unix socket nor databases"):
        Bus(redis_server.url, cluster=True)
    with pytest.raises(ConfigError, match="neither a unix socket nor databases"):
        Bus(cluster.url + "/3", cluster=True)
    single = EmbeddedRedis(tmp_path, _free_port())
    single.start()
    try:
        with pytest.raises(ConfigError, match="is no cluster; unset TAPELINE_REDIS_CLUSTER"):
            Bus(f"redis://127.0.0.1:{single.port}", cluster=True)
    finally:
        single.stop()
    with pytest.raises(BusUnavailable, match=str(single.port)):
        Bus(f"redis://127.0.0.1:{single.port}", cluster=True)
    plain = Bus(cluster.url)
    elsewhere = next(p for p in range(99) if cluster.of(plain.keys.stream(p, "ticks")) is not cluster.nodes[0])
    with pytest.raises(ConfigError, match="is a cluster; set TAPELINE_REDIS_CLUSTER=true"):
        plain.register(elsewhere, "ticks", "x")
    plain.close()


def test_a_password(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.client.config_set("requirepass", "s3cret")
    try:
        with pytest.raises(AuthError) as caught:
            Bus(cluster.url, cluster=True)
        with pytest.raises(AuthError) as wrong:
            Bus(cluster.url.replace("//", "//:n0tit@"), cluster=True)
        assert "n0tit" not in str(caught.value) + str(wrong.value)
        right = Bus(cluster.url.replace("//", "//:s3cret@"), cluster=True)
        right.ping()
        right.register(1, "ticks", "x")
        right.close()
    finally:
        for node in cluster.nodes:
            node.client.config_set("requirepass", "")


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tape") / "market.dbn"
    generate(out, trades=20_000, roots=["ES", "NQ", "CL", "GC", "RTY"], late_fraction=0.01, late_seconds=5.0)
    return out


def run_whole(settings: Settings, tape: Path, *speed: str, midway: Any = None) -> dict[str, list[tuple[Any, ...]]]:
    """The tape through ingest, aggregate and sink; the tables."""
    bus = wait_for_bus(settings, threading.Event())
    assert bus is not None
    db = Path(settings.tapeline.store.removeprefix("sqlite:///"))
    with pipeline(settings, run_files, *speed, str(tape)):
        if midway is not None:
            midway(bus, db)
        until(lambda: everything_is_stored(bus), 60, "everything to be stored")
    bus.close()
    return rows(db)


def everything_is_stored(bus: Bus) -> bool:
    try:
        feeds = Reader(bus, PARTITIONS, 1.0).feeds()
        read = all(bus.call("hlen", bus.keys.consumers(p, t)) for p in range(PARTITIONS) for t in ("ticks", "candles"))
        return read and feeds.get("files", {}).get("state") == "ended" and drained(bus, PARTITIONS)
    except BusUnavailable:
        return False


def on_cluster(cbus: Bus, db: Path) -> Settings:
    settings = configured(cbus, db)
    return replace(settings, redis=msgspec.structs.replace(settings.redis, cluster=True))


@pytest.fixture(scope="module")
def truth(_redis: EmbeddedRedis, tape: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tables that one Redis gives."""
    bus = Bus(_redis.url, f"t{uuid.uuid4().hex[:10]}")
    found = run_whole(configured(bus, tmp_path_factory.mktemp("truth") / "one.db"), tape)
    bus.close()
    assert all(found.values())
    return found


def test_the_tables_are_those_of_one_redis(cbus: Bus, tape: Path, truth: Any, tmp_path: Path) -> None:
    settings = on_cluster(cbus, tmp_path / "c.db")
    settings = replace(settings, redis=msgspec.structs.replace(settings.redis, window_seconds=3600))
    assert run_whole(settings, tape) == truth
    look_at(cbus, tmp_path)


def look_at(cbus: Bus, tmp_path: Path) -> None:
    """The commands that look, on what the run has left."""
    kinds = [cbus.call("hget", cbus.keys.info(p, "ticks"), "kind:trade") for p in range(PARTITIONS)]

    def run(*args: str) -> str:
        env = {"REDIS_URL": cbus.url, "TAPELINE_REDIS_CLUSTER": "true", "TAPELINE_NAMESPACE": cbus.keys.namespace}
        env |= {"TAPELINE_WEB_PORT": "0", "TAPELINE_METRICS_PORT": "0"}
        done = tapeline(*args, cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    status = json.loads(run("status", "--json"))
    assert status["partitions"] == PARTITIONS
    assert {s["partition"] for s in status["streams"] if s["topic"] == "candles"} == set(range(PARTITIONS))
    assert {c["behind_records"] for s in status["streams"] for c in s["consumers"]} == {0}
    assert status["feeds"]["files"]["state"] == "ended"
    ticks = [json.loads(line) for line in run("tail", "ticks", "--no-follow", "--json").splitlines()]
    assert len(ticks) == sum(map(int, kinds))
    assert {t["root"] for t in ticks} == {"ES", "NQ", "CL", "GC", "RTY"}
    minute = run("tail", "candles", "--no-follow", "--symbol", "ES", "--count", "3", "--from", "-5m")
    assert minute.count("ES") >= 3
    assert "aggregate" in run("streams", "list")
    assert f"candles of partition {PARTITIONS - 1}" in run("streams", "info", "candles", str(PARTITIONS - 1))
    assert "entries removed" in run("streams", "trim", "--topic", "ticks")
    name = next(c["name"] for s in status["streams"] if s["topic"] == "candles" for c in s["consumers"])
    assert "forgotten" in run("streams", "drop-consumer", name, "--yes")
    doctor = run("doctor")
    assert "answers as a cluster of 3 primaries, append-only, noeviction" in doctor
    assert re.search(r"clock of redis: 0\.\d\d s from ours", doctor)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_master_is_waited_for(
    cluster: Cluster, cbus: Bus, tape: Path, truth: Any, tmp_path: Path, victim: int
) -> None:
    """No replica takes over here: the cluster is down until the node is back, and nothing is lost or doubled."""
    node = cluster.nodes[victim]

    def midway(bus: Bus, db: Path) -> None:
        until(lambda: stored(db) > 100, 30, "rows in the midst")
        node.kill()
        others = [n for n in cluster.nodes if n is not node]
        until(lambda: all(n.says() == "fail" for n in others), 20, "the others to notice")
        for p in range(PARTITIONS):
            with pytest.raises(BusUnavailable):
                bus.read(p, "ticks", "0-0", 1)
            with pytest.raises(BusUnavailable):
                bus.trim(p, "ticks")
        with pytest.raises(BusUnavailable):
            bus.identity()
        cluster.start()

    settings = on_cluster(cbus, tmp_path / "k.db")
    assert run_whole(settings, tape, "--speed", "80", midway=midway) == truth


def stored(db: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM candles_1s").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
