"""`tapeline top`: what it shows of a deployment that works, at every width, and how it leaves the terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from services.aggregate import worker as aggregate
from services.ingest import worker as ingest
from services.ingest.synthetic import generate
from shared.bus import Bus
from shared.heartbeat import Beat, beat, redis_now_ms
from shared.log import Masker
from shared.records import number
from shared.redis_server import EmbeddedRedis
from shared.settings import Settings, load
from shared.status import Reader
from shared.top import Cost, Counted, Rates, Top, View
from shared.top_reader import TopReader
from shared.top_screen import age, compact, screen, share_out, size
from tests.shared.test_cli import tapeline
from tests.wait import until

PARTITIONS = 3
Pipeline = tuple[Bus, Settings]


@pytest.fixture(scope="module")
def pipeline(_redis: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A tape of three futures that has been played, and an aggregate worker that goes on living."""
    _redis.start()
    folder = tmp_path_factory.mktemp("top")
    tape = folder / "tape.dbn"
    generate(tape, trades=3000, rate=20.0, roots=("ES", "NQ", "CL"))
    base = load(environ={"TAPELINE_PARTITIONS": str(PARTITIONS), "TAPELINE_PRESSURE_WORKERS": "0"})
    settings = replace(
        base,
        tapeline=msgspec.structs.replace(base.tapeline, namespace="top", state_dir=str(folder)),
        redis=msgspec.structs.replace(base.redis, url=_redis.url),
    )
    stop = threading.Event()
    thread = threading.Thread(target=aggregate.run, args=(settings, stop, ()), daemon=True)
    thread.start()
    bus = Bus(_redis.url, "top")
    ingest.run_files(settings, threading.Event(), ("--speed=max", str(tape)))
    until(lambda: all(c.behind_records == 0 for s in status(bus).streams for c in s.consumers), 30, "all to be read")
    until(lambda: [w.partitions for w in status(bus).workers] == [[0, 1, 2]], what="the worker to say what it owns")
    yield bus, settings
    stop.set()
    thread.join()
    bus.close()


def status(bus: Bus) -> Any:
    return Reader(bus, PARTITIONS, 5.0).read()


@pytest.fixture
def view(pipeline: Pipeline) -> View:
    return look(pipeline)


def look(pipeline: Pipeline, looks: int = 2) -> View:
    _, settings = pipeline
    reader = TopReader(settings)
    reader.open()
    made = Top("1.2.3", reader.where, Masker(settings))
    try:
        return [made.view(reader.look()) for _ in range(looks)][-1]
    finally:
        reader.close()


def lines(view: View, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), highlight=False)
    with console.capture() as printed:
        console.print(screen(view, width, height, "the keys"))
    return [line.rstrip() for line in printed.get().splitlines()]


def row(found: list[str], start: str) -> str:
    return next(line for line in found if start in line)


# -- what is shown ---------------------------------------------------------------------------


def test_the_view_is_the_state_of_the_deployment(pipeline: Pipeline, view: View) -> None:
    bus, _ = pipeline
    now = status(bus)
    assert (view.version, view.namespace, view.partitions, view.redis_trouble) == ("1.2.3", "top", PARTITIONS, "")
    assert view.healthy
    assert view.troubles == []
    (feed,) = view.feeds
    assert (feed.feed, feed.state, feed.why) == ("files", "ended", "")
    assert feed.published == now.feeds["files"]["published"] > 0
    assert feed.event_age_seconds is not None
    assert feed.event_age_seconds > 86_400
    ticks = next(s for s in view.streams if s.topic == "ticks")
    held = [s for s in now.streams if s.topic == "ticks"]
    assert ticks.records == sum(s.records for s in held) > 0
    assert ticks.bytes == sum(s.bytes for s in held)
    assert ticks.full == max(s.bytes for s in held) / (64 << 20)
    assert ticks.records_per_second == 0.0
    (consumer,) = ticks.consumers
    assert (consumer.name, consumer.lag_records, consumer.exact) == ("aggregate", 0, True)
    (worker,) = view.workers
    assert (worker.service, worker.alive, worker.partitions, worker.why) == ("aggregate", True, [0, 1, 2], "")
    assert consumer.owners == {worker.name: [s.partition for s in held]}
    assert view.counted.ingest == {"spread": 3000 - feed.published}


def test_the_newest_candle_of_each_ticker(pipeline: Pipeline, view: View) -> None:
    bus, _ = pipeline
    newest: dict[str, Any] = {}
    for partition in range(PARTITIONS):
        for frame in bus.read(partition, "candles", "0-0", 100_000):
            if frame.kind == "candle_1m":
                for found in frame.rows():
                    ticker = frame.names[int(found["name"])][0]
                    if ticker not in newest or found["time_ns"] >= newest[ticker]["time_ns"]:
                        newest[ticker] = found
    assert [c.ticker for c in view.candles] == sorted(newest) == ["CL", "ES", "NQ"]
    for candle in view.candles:
        found = newest[candle.ticker]
        assert candle.close == found["close"]
        assert candle.change == pytest.approx(found["close"] - found["open"])
        assert (candle.volume, candle.vd, candle.cvd) == (found["volume"], found["vd"], found["cvd_close"])
        assert candle.complete == bool(found["complete"])
        assert candle.symbol.startswith(candle.ticker)


def test_a_stage_that_nobody_runs_and_a_worker_that_is_gone_are_told(pipeline: Pipeline) -> None:
    bus, settings = pipeline
    wants = replace(settings, pressure=msgspec.structs.replace(settings.pressure, workers=1))
    gone = Beat("sink-sqlite@elsewhere:7:0001", "sink-sqlite", "elsewhere", 7, redis_now_ms(bus) - 60_000)
    hangs = Beat(
        "alerts@here:8:0002", "alerts", "here", 8, redis_now_ms(bus), name="alerts", stalled_ms=90_000,
        part="the outbox", counters={"dead_letters": 4},
    )  # fmt: skip
    for b in (gone, hangs):
        bus.call("hset", bus.keys.workers, b.worker, msgspec.json.encode(b))
    try:
        view = look((bus, wants))
    finally:
        bus.call("hdel", bus.keys.workers, gone.worker, hangs.worker)
    assert not view.healthy
    told = {(v.kind, v.name): v.why for v in view.troubles}
    assert "not seen for" in told["worker", gone.worker]
    assert "the outbox has not gone on for" in told["worker", hangs.worker]
    assert view.counted.dead_letters == 4
    for width in (80, 200):
        found = lines(view, width, 40)
        assert any(line.startswith("wrong") and "sink-sqlite@elsewhere:7" in line for line in found)
        # Of the workers those that something is wrong with stand first.
        table = found[next(i for i, line in enumerate(found) if "WORKER" in line) :]
        at = [
            next(i for i, line in enumerate(table) if name in line)
            for name in ("alerts ", "sink-sqlite@", "aggregate@")
        ]
        assert max(at[:2]) < at[2]


def test_backlog_and_rates_come_of_two_looks(bus: Bus) -> None:
    settings = load(
        environ={"REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace, "TAPELINE_PARTITIONS": "1"}
    )
    from tests.shared.test_cli_bus import ES, message, publish

    bus.deploy(1)
    publish(bus, 0, message("instrument", ES))
    bus.register(0, "ticks", "sqlite:1234")
    reader, made = TopReader(settings), Top("1", "here")
    try:
        first = made.view(reader.look())
        publish(bus, 0, message("instrument", ES), message("instrument", ES))
        second = made.view(reader.look())
    finally:
        reader.close()
    (before,), (after,) = first.streams, second.streams
    assert before.records_per_second is None
    assert after.records_per_second is not None
    assert after.records_per_second > 0
    (consumer,) = after.consumers
    assert (consumer.lag_records, consumer.records_per_second) == (3, 0.0)
    assert consumer.owners == {}


def test_secrets_in_what_workers_write_are_masked(bus: Bus) -> None:
    environ = {"REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace, "DATABENTO_API_KEY": "db-SECRETkey"}
    settings = load(environ=environ)
    beat(bus, "web@here:1:1", "web", detail="refused db-SECRETkey at postgresql://u:hunter22@h/db")
    feed = {"state": "down", "detail": "key db-SECRETkey refused", "at_ms": 1, "last_event_ns": 1}
    bus.call("hset", bus.keys.feeds, "databento", msgspec.json.encode(feed))
    reader, made = TopReader(settings), Top("1", "here", Masker(settings))
    try:
        view = made.view(reader.look())
    finally:
        reader.close()
    told = msgspec.json.encode(view).decode() + "\n".join(lines(view, 200, 60))
    assert "***" in told
    for secret in ("SECRETkey", "hunter22"):
        assert secret not in told


# -- the screen ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 149, 150, 200])
@pytest.mark.parametrize("height", [10, 24, 50])
def test_no_line_is_longer_than_the_screen_and_no_screen_too_high(view: View, width: int, height: int) -> None:
    found = lines(view, width, height)
    assert len(found) <= height
    assert all(len(line) <= width for line in found)
    assert found[0].startswith("Tapeline 1.2.3")
    assert found[1] == "fine"
    assert found[-1] == "the keys"
    assert any("dead letters 0" in line for line in found)


@pytest.mark.parametrize("width", [80, 200])
def test_all_that_matters_is_on_it(view: View, width: int) -> None:
    found = lines(view, width, 50)
    assert re.search(r"files\s+ended\s+\d+ d ", row(found, "files "))
    worker = view.workers[0].name
    assert re.search(rf"ticks\s+0 .*aggregate.*\s0\s+-\s+{re.escape(worker)[:10]}", row(found, "ticks "))
    assert re.search(rf"{re.escape(worker)}.* 0-2 .*fine", row(found, " 0-2 "))
    for candle in view.candles:
        shown = row(found, candle.ticker + " ")
        assert candle.time[11:19] in shown
        assert f"{candle.change_percent:+.2f}%" in shown
        assert number(candle.close) in shown
    assert f"spread {view.counted.ingest['spread']}" in row(found, "cost today")
    # The symbols behind the tickers, and what streams hold, want room.
    assert (view.candles[0].symbol in "\n".join(found)) == (width == 200)


def test_what_does_not_fit_is_counted(view: View) -> None:
    many = [msgspec.structs.replace(view.workers[0], name=f"aggregate-{i:02}", why="") for i in range(40)]
    crowded = msgspec.structs.replace(view, workers=many)
    found = lines(crowded, 80, 30)
    assert len(found) <= 30
    more = [int(m[1]) for line in found if (m := re.fullmatch(r"\+(\d+) more", line))]
    assert more == [40 - sum(line.startswith("aggregate-") for line in found)]


def test_costs_gaps_and_dead_letters_are_in_the_last_line(view: View) -> None:
    counted = Counted(gaps=2, late=3, dead_letters=4, ingest={"duplicate": 5})
    costs = [Cost("databento", 1.5, 20.0, "stopped"), Cost("databento:history", 0.25, 20.0, "running")]
    found = lines(msgspec.structs.replace(view, counted=counted, costs=costs), 120, 40)
    shown = "gaps 2   late 3   dead letters 4   cost today $1.75 of $20.00, stopped: databento   ingest: duplicate 5"
    assert shown in found


def test_a_redis_that_is_away_is_told_beside_what_was_known(view: View) -> None:
    made = Top("1.2.3", "redis:6379")
    fresh = made.away("Redis at redis:6379 does not answer", 1_700_000_000_000)
    found = lines(fresh, 80, 24)
    assert "wrong  Redis at redis:6379 does not answer" in found
    made._last, made._last_ms = view, 1_700_000_000_000
    later = made.away("Redis at redis:6379 does not answer", 1_700_000_034_000)
    found = lines(later, 80, 40)
    assert "what follows is of 34 s ago" in found
    assert any("CL " in line for line in found)


@pytest.mark.parametrize(
    ("wanted", "room", "found"),
    [
        ([2, 8, 4, 9], 30, [2, 8, 4, 9]),
        ([2, 8, 4, 9], 18, [2, 6, 4, 6]),
        ([2, 8, 4, 9], 8, [2, 2, 2, 2]),
        ([2, 8, 4, 9], 5, [2, 2, 0, 0]),
        ([2, 8], -3, [0, 0]),
    ],
)
def test_lines_are_shared_out(wanted: list[int], room: int, found: list[int]) -> None:
    assert share_out(wanted, room) == found


def test_numbers_are_short() -> None:
    assert [compact(v) for v in (0, 9.5, 950, 9999, 12_345, -456_000, 7_650_000, 1.5e10)] == [
        "0", "9.5", "950", "9999", "12.3k", "-456k", "7.65M", "15G",
    ]  # fmt: skip
    assert [age(v) for v in (0.44, 34, 119, 1200, 30_000, 400_000)] == [
        "0.4 s",
        "34 s",
        "119 s",
        "20 min",
        "8 h",
        "5 d",
    ]
    assert [size(v) for v in (12, 1 << 20, 5 << 30)] == ["12 B", "1 MiB", "5 GiB"]


def test_rates_begin_anew_with_what_they_count() -> None:
    rates = Rates()
    assert rates.take({"a": (1000, 5)}) == {}
    assert rates.take({"a": (2000, 15)}) == {"a": 10.0}
    assert rates.take({"a": (2000, 15)}) == {"a": 10.0}  # nothing new was told
    assert rates.take({"a": (4000, 3)}) == {}
    assert rates.take({"a": (5000, 4)}) == {"a": 1.0}


# -- the command -----------------------------------------------------------------------------


def environ(settings: Settings) -> dict[str, str]:
    return {
        "REDIS_URL": settings.redis.url, "TAPELINE_NAMESPACE": settings.tapeline.namespace,
        "TAPELINE_PRESSURE_WORKERS": "0",
    }  # fmt: skip


def test_off_a_terminal_it_is_one_snapshot(pipeline: Pipeline, tmp_path: Path) -> None:
    _, settings = pipeline
    done = tapeline("top", "--every", "0.2", cwd=tmp_path, COLUMNS="80", **environ(settings))
    assert (done.returncode, done.stderr) == (0, "")
    found = done.stdout.splitlines()
    assert found[1] == "fine"
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 and line == line.rstrip() for line in found)
    assert [row(found, ticker) for ticker in ("CL ", "ES ", "NQ ")]


def test_as_json_it_is_one_document(pipeline: Pipeline, tmp_path: Path) -> None:
    _, settings = pipeline
    done = tapeline("top", "--json", "--every", "0.2", cwd=tmp_path, **environ(settings))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"] is True
    assert found["streams"][0]["topic"] == "ticks"
    assert msgspec.json.decode(done.stdout, type=View).workers[0].service == "aggregate"


def test_without_a_redis_a_snapshot_is_an_error(tmp_path: Path) -> None:
    done = tapeline("top", "--once", cwd=tmp_path, REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 1
    assert done.stderr.startswith("tapeline: Redis at 127.0.0.1:1/0 does not answer")
    assert tapeline("top", cwd=tmp_path).returncode == 78


class OnTerminal:
    """`tapeline top` on a terminal of its own; `screen` is what it last drew."""

    def __init__(self, width: int, height: int, cwd: Path, environ: dict[str, str]) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.before = termios.tcgetattr(self.theirs)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("TAPELINE_", "REDIS_", "COLUMNS", "LINES"))}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shared.cli", "top", "--every", "0.2"],
            stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
            env=clean | {"TERM": "xterm-256color"} | environ,
        )  # fmt: skip
        self.seen = ""

    def screen(self) -> str:
        while select.select([self.ours], [], [], 0.0)[0]:
            self.seen += os.read(self.ours, 65536).decode()
        # The last one may be half drawn: with the one before it.
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", "".join(self.seen.split("\x1b[H")[-2:]))

    def shows(self, *texts: str, timeout: float = 20.0) -> None:
        until(lambda: all(text in self.screen() for text in texts), timeout, f"{texts} on the screen")

    def press(self, key: bytes) -> None:
        os.write(self.ours, key)

    def ended(self) -> int:
        def over() -> bool:
            self.screen()  # whoever does not read what it writes holds it up
            return self.process.poll() is not None

        until(over, what="it to end")
        self.screen()
        return self.process.returncode


@contextmanager
def on_terminal(width: int, height: int, cwd: Path, environ: dict[str, str]) -> Iterator[OnTerminal]:
    made = OnTerminal(width, height, cwd, environ)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.kill()
        made.process.wait()
        os.close(made.ours)
        os.close(made.theirs)


LEAVING: dict[str, tuple[Callable[[OnTerminal], None], int]] = {
    "q": (lambda t: t.press(b"q"), 0),
    "Ctrl-C": (lambda t: t.press(b"\x03"), 130),
    "SIGTERM": (lambda t: t.process.send_signal(signal.SIGTERM), 143),
}


@pytest.mark.parametrize("how", LEAVING)
def test_however_it_is_left_the_terminal_is_as_it_was(pipeline: Pipeline, tmp_path: Path, how: str) -> None:
    leave, code = LEAVING[how]
    with on_terminal(80, 24, tmp_path, environ(pipeline[1])) as terminal:
        terminal.shows("fine", "aggregate", "q quits")
        assert termios.tcgetattr(terminal.theirs) != terminal.before
        leave(terminal)
        assert terminal.ended() == code
        assert termios.tcgetattr(terminal.theirs) == terminal.before
        # The other screen is left, and the cursor is back.
        tail = terminal.seen[terminal.seen.rindex("\x1b[?25h") :]
        assert "\x1b[?1049l" in tail
        assert tail.rstrip().endswith("interrupted") == (how == "Ctrl-C")
        assert "Traceback" not in terminal.seen


def test_it_outlives_redis_pauses_and_follows_the_size(bus: Bus, redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    bus.deploy(2)
    beat(bus, "web@here:1:1", "web", detail="as before")
    given = {
        "REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace, "TAPELINE_REDIS_LEASE_SECONDS": "600",
    }  # fmt: skip
    with on_terminal(80, 24, tmp_path, given) as terminal:
        terminal.shows("as before", "2 partitions")
        redis_server.kill()
        terminal.shows("does not answer", "what follows is of", "as before")
        redis_server.start()
        terminal.shows("as before", "q quits")
        until(lambda: "does not answer" not in terminal.screen(), what="Redis to be back on the screen")
        terminal.press(b"p")
        terminal.shows("paused")
        beat(bus, "web@here:1:1", "web", detail="as after")
        fcntl.ioctl(terminal.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        terminal.process.send_signal(signal.SIGWINCH)
        until(lambda: any(len(line) > 100 for line in terminal.screen().splitlines()), what="the wide screen")
        terminal.shows("as before", "paused")
        assert "as after" not in terminal.screen()
        terminal.press(b"p")
        terminal.shows("as after", "q quits")
        terminal.press(b"q")
        assert terminal.ended() == 0
