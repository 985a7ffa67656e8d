"""The ingest processes: they wait for Redis, mend what it forgot, give way to a newer one, and stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from services.ingest import worker
from services.ingest.dbn_file import DbnFiles
from services.ingest.source import Resume
from shared.bus import Bus
from shared.errors import EX_CONFIG, ConfigError, SourceError
from shared.frames import NS
from shared.heartbeat import beat
from shared.instruments import partition_of
from shared.redis_server import EmbeddedRedis
from shared.settings import RedisSettings, Settings, Tapeline
from shared.settings import Synthetic as SyntheticSettings
from tests.services.ingest.dbn import T0, Memory, simple
from tests.wait import until

TIMES = T0 + np.arange(1, 3001) * (NS // 10)


@pytest.fixture
def configured(redis_server: EmbeddedRedis, bus: Bus) -> Settings:
    return Settings(
        tapeline=Tapeline(partitions=3, namespace=bus.keys.namespace), redis=RedisSettings(url=redis_server.url)
    )


class Running:
    """A service in a thread, as the CLI runs it."""

    def __init__(self, run: Callable[..., None], settings: Settings, *args: str) -> None:
        self.stop, self.error = threading.Event(), None
        self.thread = threading.Thread(target=self._run, args=(run, settings, args), daemon=True)
        self.thread.start()

    error: BaseException | None

    def _run(self, run: Callable[..., None], settings: Settings, args: Any) -> None:
        try:
            run(settings, self.stop, args)
        except Exception as error:  # handed to the test
            self.error = error

    def end(self, timeout: float = 5) -> None:
        self.stop.set()
        self.thread.join(timeout)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*args: Any) -> Running:
        started.append(Running(*args))
        return started[-1]

    yield start
    for one in started:
        one.end()


def feed_state(bus: Bus, feed: str = "files") -> str:
    body = bus.call("hget", bus.keys.feeds, feed)
    return str(msgspec.json.decode(body)["state"]) if body else ""


def held(bus: Bus) -> dict[int, bytes]:
    return {
        p: body
        for p in range(3)
        if (body := b"".join(f.body for f in bus.read(p, "ticks", "0-0", 10**6) if f.kind == "trade"))
    }


def expected(*paths: Path) -> dict[int, bytes]:
    out = Memory()
    DbnFiles(paths, 3).run(out, Resume(), threading.Event())
    return {p: r.tobytes() for p, r in out.joined().items()}


def test_files_are_played_once(bus: Bus, configured: Settings, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    for _ in range(2):
        worker.run_files(configured, threading.Event(), (str(path),))
        assert held(bus) == expected(path)
    assert feed_state(bus) == "ended"
    assert bus.call("hgetall", bus.keys.workers) == {}
    more = simple(tmp_path / "b.dbn", TIMES + 86_400 * NS)
    worker.run_files(configured, threading.Event(), ("--speed=max", str(more)))
    both = held(bus)
    assert {p: len(b) for p, b in both.items()} == {p: 2 * len(b) for p, b in expected(path).items()}


def test_a_damaged_file_fails_after_what_is_whole(bus: Bus, configured: Settings, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    whole = expected(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(SourceError, match="record 2999"):
        worker.run_files(configured, threading.Event(), (str(path),))
    (p,) = whole
    assert held(bus)[p] == whole[p][:-80]
    assert feed_state(bus) == "failed"


@pytest.mark.parametrize(
    "args", [(), ("--speed",), ("--speed", "0", "x"), ("--speed=fast", "x"), ("--speed", "inf", "x"), ("--loud", "x")]
)
def test_wrong_arguments(configured: Settings, args: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        worker.run_files(configured, threading.Event(), args)
    assert error.value.exit_code == EX_CONFIG
    with pytest.raises(ConfigError):
        worker.run_synthetic(configured, threading.Event(), ("x",))


def test_a_newer_process_takes_over(bus: Bus, configured: Settings, running: Any) -> None:
    old = running(worker.run_synthetic, configured)
    until(lambda: feed_state(bus, "synthetic") == "connected" and held(bus))
    new = running(worker.run_synthetic, configured)
    until(lambda: not old.thread.is_alive())
    assert isinstance(old.error, ConfigError)
    assert old.error.exit_code == EX_CONFIG
    assert "another process" in str(old.error)
    new.end()
    assert new.error is None
    assert feed_state(bus, "synthetic") == "down"


def test_an_owner_that_is_gone_is_no_rival(bus: Bus, configured: Settings, running: Any) -> None:
    one = running(worker.run_synthetic, configured)
    home = partition_of("ES", 3)
    until(lambda: home in held(bus))
    for p in range(3):  # as a Redis that lost its last second would say
        bus.attach(p, "synthetic", "long gone")
    position = bus.last_id(home, "ticks")
    until(lambda: bus.read(home, "ticks", position, 10))
    beat(bus, "alive", "test")
    bus.attach(home, "synthetic", "alive")
    until(lambda: not one.thread.is_alive())
    assert isinstance(one.error, ConfigError)


def test_what_redis_forgot_is_published_again(bus: Bus, configured: Settings, running: Any, tmp_path: Path) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    one = running(worker.run_files, configured, "--speed", "100", str(path))  # 3 s
    until(lambda: sum(map(len, held(bus).values())) > 80_000)
    bus.client.delete(*list(bus.client.scan_iter(f"{bus.keys.namespace}:*")))
    until(lambda: not one.thread.is_alive())
    assert one.error is None
    assert held(bus) == expected(path)


def test_redis_comes_later_and_goes_away(
    bus: Bus, redis_server: EmbeddedRedis, configured: Settings, running: Any, tmp_path: Path
) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    redis_server.kill()
    given_up = running(worker.run_files, configured, str(path))
    one = running(worker.run_files, configured, "--speed", "100", str(path))
    given_up.end(timeout=2)
    assert given_up.error is None
    redis_server.start()
    until(lambda: held(bus))
    redis_server.kill()
    redis_server.start()
    until(lambda: not one.thread.is_alive())
    assert one.error is None
    assert held(bus) == expected(path)


def test_another_number_of_partitions_is_refused(bus: Bus, configured: Settings, tmp_path: Path) -> None:
    bus.deploy(5)
    with pytest.raises(ConfigError, match="5 partitions"):
        worker.run_files(configured, threading.Event(), (str(simple(tmp_path / "a.dbn", TIMES)),))


def test_stopped_it_says_so_and_goes_on_later(bus: Bus, configured: Settings, running: Any) -> None:
    settings = replace(configured, synthetic=SyntheticSettings(trades_per_second=200.0))
    for _ in range(2):
        before = sum(map(len, held(bus).values()))
        one = running(worker.run_synthetic, settings)
        until(lambda before=before: sum(map(len, held(bus).values())) > before)
        assert bus.call("hlen", bus.keys.workers) == 1
        one.end()
        assert one.error is None
        assert feed_state(bus, "synthetic") == "down"
    for p in range(3):
        seqs = [f.seq for f in bus.read(p, "ticks", "0-0", 10**6)]
        assert seqs == list(range(1, len(seqs) + 1))
