"""The alerts worker on a real bus, with a real webhook: every alert arrives, whatever is down or killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY

from services.alerts import worker
from services.alerts.channels import Answer, Message, open_channel
from services.alerts.worker import run
from shared.alerts import DROPPED, REFUSED, SENT
from shared.bus import Bus
from shared.cli import main
from shared.errors import ConfigError, Fenced
from shared.settings import AlertRule, Settings
from tests.services.alerts.receiver import Receiver
from tests.services.alerts.running import Running, alerts, begun, configured, publish, settled, strikes
from tests.services.alerts.test_core import T0, signal
from tests.shared.test_cli import tapeline
from tests.wait import on_disk, until


def environ(settings: Settings, **more: str) -> dict[str, str]:
    """A process's environment with these settings."""
    a = settings.alerts
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TAPELINE_", "REDIS_"))}
    return clean | {
        "REDIS_URL": settings.redis.url,
        "TAPELINE_NAMESPACE": settings.tapeline.namespace,
        "TAPELINE_PARTITIONS": str(settings.tapeline.partitions),
        "TAPELINE_REDIS_LEASE_SECONDS": "1",
        "TAPELINE_ALERTS_CHANNELS": ",".join(f"{name}={url}" for name, url in a.channels.items()),
        "TAPELINE_ALERTS_RETRY_MAX_SECONDS": "0.02",
        **more,
    }


def process(settings: Settings, cwd: Path, **more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-P", "-m", "shared.cli", "run", "alerts"]
    return subprocess.Popen(line, cwd=cwd, env=environ(settings, **more), text=True, stderr=subprocess.PIPE)


class Commands:
    """`tapeline …` within this process, with settings by environment."""

    def __init__(self, settings: Settings, cwd: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        for name in [n for n in os.environ if n.startswith(("TAPELINE_", "REDIS_"))]:
            patch.delenv(name)
        for name, value in environ(settings).items():
            patch.setenv(name, value)
        patch.chdir(cwd)
        self._capsys = capsys

    def __call__(self, *args: str, code: int = 0) -> str:
        """What it says: on stdout when it is to succeed, else its one line on stderr."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        out, err = self._capsys.readouterr()
        assert ended.value.code == code, err
        assert (err == "") if code == 0 else (out == "" and len(err.splitlines()) == 1)
        return out + err


@pytest.fixture
def commands(
    bus: Bus, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Settings], Commands]:
    return lambda settings: Commands(settings, tmp_path, monkeypatch, capsys)


def ended(process: subprocess.Popen[str]) -> str:
    """Its log, after an orderly stop."""
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    return err


def test_it_begins_with_the_newest_signal_and_tells_what_comes(bus: Bus, receiver: Receiver) -> None:
    publish(bus, *strikes(1, 2, 3, grade="EXTREME"))
    publish(bus, *strikes(4), partition=1)
    with Running(configured(bus, {"ops": receiver.url("ops?a=b")})):
        until(lambda: begun(bus))
        publish(bus, signal(grade="EXTREME"), signal(grade="MODERATE", strike=1.0))
        publish(bus, signal(grade="HIGH", strike=2.0, status="monitor"), partition=1)
        publish(bus, signal(grade="VERY_HIGH", strike=3.0), partition=1)
        found = settled(bus, 2)
    assert {g.body["severity"] for g in receiver.got} == {"CRITICAL", "WARNING"}
    assert {g.key for g in receiver.got} == {a.id for a in found}
    got = next(g for g in receiver.got if g.body["severity"] == "CRITICAL")
    assert (got.path, got.headers["content-type"]) == ("/ops?a=b", "application/json")
    assert got.body["title"] == "EXTREME pressure_spike: BUY NQ 2023-12-29 C 17000"
    assert got.body["details"]["strike"] == 17000
    assert [d.state for a in found for d in a.deliveries] == [SENT, SENT]
    held = {p: bus.call("hget", bus.keys.consumers(p, "signals"), "alerts").decode() for p in range(2)}
    assert held == {p: bus.last_id(p, "signals") for p in range(2)}, "trimming may pass what is done"
    assert bus.call("hlen", bus.keys.workers) == 0
    assert bus.call("hget", bus.keys.lease(0, "alerts"), "owner") == b""


def test_a_restart_goes_on_where_it_stood(bus: Bus, receiver: Receiver) -> None:
    s = configured(bus, {"ops": receiver.url("ops")})
    with Running(s):
        until(lambda: begun(bus))
    publish(bus, *strikes(1, 2))
    with Running(s):
        settled(bus, 2)
    publish(bus, *strikes(3))
    publish(bus, *strikes(1, at_ms=T0 + 300_000))
    with Running(s):
        found = settled(bus, 3)
    assert sorted(g.key for g in receiver.got) == sorted(a.id for a in found)
    assert [a.count for a in found].count(2) == 1, "folded into what an earlier process told"


@pytest.mark.parametrize("how", ["answers 503", "answers 429", "cannot be reached"])
def test_a_receiver_that_is_down_then_up_gets_every_alert_once(bus: Bus, receiver: Receiver, how: str) -> None:
    down = {"now": True}
    receiver.answer = lambda path, before: (int(how[-3:]), {"Retry-After": "0"}) if down["now"] else (200, {})
    s = configured(bus, {"ops": receiver.url("ops")})
    if how == "cannot be reached":
        receiver.close()
    with Running(s):
        until(lambda: begun(bus))
        publish(bus, *strikes(*range(50)))
        publish(bus, *strikes(*range(50, 80)), partition=1)
        until(lambda: sum(d.attempts for a in alerts(bus) for d in a.deliveries) > 40, 20, "attempts that fail")
        assert receiver.taken() == []
        down["now"] = False
        if how == "cannot be reached":
            receiver.__init__(receiver.answer, _port=receiver.port)  # type: ignore[misc]
        found = settled(bus, 80)
    assert sorted(g.key for g in receiver.taken()) == sorted(a.id for a in found if not a.suppressed)
    assert len(receiver.taken()) == 60, "INFO: at most 60 an hour"
    assert sum(a.suppressed for a in found) == 20


def test_what_is_refused_for_good_is_not_tried_again(bus: Bus, receiver: Receiver) -> None:
    receiver.answer = lambda path, before: (404, {}) if path == "/gone" else (302, {"Location": receiver.url("ops")})
    channels = {"gone": receiver.url("gone"), "moved": receiver.url("moved")}
    with Running(configured(bus, channels)):
        until(lambda: begun(bus))
        publish(bus, signal())
        found = settled(bus, 1)[0]
    assert [(d.channel, d.state, d.attempts) for d in found.deliveries] == [("gone", REFUSED, 1), ("moved", REFUSED, 1)]
    assert found.deliveries[0].reason == "answered 404 Not Found"
    assert "set the channel to where that leads" in found.deliveries[1].reason
    assert sorted(g.path for g in receiver.got) == ["/gone", "/moved"]


def test_a_channel_that_hangs_or_fails_holds_up_no_other(bus: Bus, receiver: Receiver) -> None:
    receiver.answer = lambda path, before: (500, {}) if path == "/bad" else (200, {})
    channels = {"hang": receiver.url("hang"), "bad": receiver.url("bad"), "good": receiver.url("good")}
    with Running(configured(bus, channels)):
        until(lambda: begun(bus))
        for n in range(10):
            publish(bus, *strikes(n))
            until(lambda: len(receiver.taken("good")) == n + 1)  # noqa: B023
        assert receiver.taken("hang") == receiver.taken("bad") == []
        receiver.release.set()
        receiver.answer = lambda path, before: (200, {})
        settled(bus, 10)
    for path in channels:
        assert len({g.key for g in receiver.taken(path)}) == len(receiver.taken(path)) == 10


def test_alerts_and_attempts_to_deliver_them_are_counted(
    bus: Bus, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"tapeline_{name}_total", labels) or 0.0

    def counts() -> list[float]:
        return [
            told("alerts", severity="INFO", kind="pressure_spike"), told("alerts", severity="INFO", kind="other"),
            told("alert_deliveries", channel="once", result="sent"),
            told("alert_deliveries", channel="once", result="failed"),
            told("alert_deliveries", channel="gone", result="failed"),
            told("alert_deliveries", channel="odd", result="failed"),
            told("alert_deliveries", channel="odd", result="sent"),
            told("faults", where="alerts.outbox"),
            told("lease_changes", stage="alerts", change="acquired"),
            told("lease_changes", stage="alerts", change="released"),
        ]  # fmt: skip

    class Odd:
        def __init__(self) -> None:
            self.failed = 0

        def send(self, message: Message) -> Answer:
            self.failed += 1
            if self.failed == 1:
                raise ZeroDivisionError
            return Answer(SENT)

    odd = Odd()
    monkeypatch.setattr(worker, "open_channel", lambda s, name: odd if name == "odd" else open_channel(s, name))
    receiver.answer = lambda path, before: (404 if path == "/gone" else 200 if before else 503, {"Retry-After": "0"})
    before = counts()
    with Running(configured(bus, {name: receiver.url(name) for name in ("once", "gone", "odd")})):
        until(lambda: begun(bus))
        assert REGISTRY.get_sample_value("tapeline_partitions_owned", {"stage": "alerts"}) == 1
        publish(bus, signal(), signal(signal_type="a type of some plug-in", source="plug-in"))
        settled(bus, 2)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 2, 1, 2, 1, 2, 1, 1, 1]
    assert REGISTRY.get_sample_value("tapeline_partitions_owned", {"stage": "alerts"}) == 0


def test_an_acknowledgement_stops_the_deliveries(
    bus: Bus, receiver: Receiver, commands: Callable[[Settings], Commands]
) -> None:
    receiver.answer = lambda path, before: (503, {})
    s = configured(bus, {"ops": receiver.url("ops")}, rules=(AlertRule("EMERGENCY"),))
    with Running(s):
        until(lambda: begun(bus))
        publish(bus, signal())
        alert = until(lambda: alerts(bus))[0]
        said = commands(s)("alerts", "ack", alert.id[:6], "--by", "ann")
        assert said == f"{alert.id} acknowledged by ann\n"
        held = settled(bus, 1)[0]
        assert bus.call("hlen", bus.keys.alerts("acks")) == 0
    assert (held.acked_by, held.deliveries[0].state) == ("ann", DROPPED)
    assert receiver.taken() == []


def test_escalation_is_a_delivery_of_its_own(bus: Bus, receiver: Receiver) -> None:
    channels = {"ops": receiver.url("ops"), "boss": receiver.url("boss")}
    s = configured(bus, channels, rules=(AlertRule("EMERGENCY", ("ops", "boss")),), escalate_seconds=1)
    with Running(s):
        until(lambda: begun(bus))
        publish(bus, signal())
        until(lambda: receiver.taken("boss"))
        alert = settled(bus, 1)[0]
    assert [(g.path, g.key) for g in receiver.got] == [("/ops", alert.id), ("/boss", f"{alert.id}:1")]


def test_one_works_and_the_other_stands_by(bus: Bus, receiver: Receiver) -> None:
    s = configured(bus, {"ops": receiver.url("ops")})
    with ExitStack() as stack:
        first = stack.enter_context(Running(s))
        until(lambda: begun(bus))
        stack.enter_context(Running(s))
        until(lambda: bus.call("hlen", bus.keys.workers) == 2)
        publish(bus, *strikes(1, 2, 3))
        settled(bus, 3)
        first.__exit__()
        publish(bus, *strikes(4, 5, 6))
        found = settled(bus, 6)
    assert sorted(g.key for g in receiver.got) == sorted(a.id for a in found)


def test_who_lost_the_lease_writes_and_sends_nothing(bus: Bus, receiver: Receiver) -> None:
    token = bus.acquire(0, "alerts", "one", 60_000)
    assert token
    bus.commit_alerts(token, {"memory": b"1"}, {"a": b"x", "b": b"y"}, (), ())
    bus.call("hset", bus.keys.alerts("acks"), "a", "ann")
    bus.commit_alerts(token, {}, {"a": b"z"}, ("b",), ("a",))
    assert bus.call("hgetall", bus.keys.alerts("open")) == {b"a": b"z"}
    assert bus.call("hlen", bus.keys.alerts("acks")) == 0
    bus.release(0, "alerts", token)
    assert bus.acquire(0, "alerts", "two", 60_000)
    with pytest.raises(Fenced, match="two"):
        bus.commit_alerts(token, {"memory": b"2"}, {"a": b"2"}, (), ())
    assert bus.call("hget", bus.keys.alerts("state"), "memory") == b"1"
    assert bus.call("hgetall", bus.keys.alerts("open")) == {b"a": b"z"}


def test_a_thief_is_noticed(bus: Bus, receiver: Receiver) -> None:
    with Running(configured(bus, {"ops": receiver.url("ops")})):
        until(lambda: begun(bus))
        lease = bus.keys.lease(0, "alerts")
        bus.call("hset", lease, mapping={"token": "stolen", "owner": "thief"})
        publish(bus, signal())
        until(lambda: bus.call("hget", lease, "owner") != b"thief", 10, "the thief's lease to expire and be taken")
        found = settled(bus, 1)
    assert [g.key for g in receiver.got] == [found[0].id]


def test_redis_gone_for_a_while(bus: Bus, receiver: Receiver, redis_server: Any) -> None:
    with Running(configured(bus, {"ops": receiver.url("ops")})):
        until(lambda: begun(bus))
        publish(bus, *strikes(1))
        settled(bus, 1)
        on_disk(bus.client)
        redis_server.kill()
        redis_server.start()
        bus.client.connection_pool.disconnect()
        publish(bus, *strikes(2))
        found = settled(bus, 2)
    assert sorted(g.key for g in receiver.got) == sorted(a.id for a in found)


@pytest.mark.parametrize(("point", "times"), [("before-commit", 1), ("before-send", 1), ("after-send", 2)])
def test_killed_between_reading_and_the_commit_of_the_delivery(
    bus: Bus, receiver: Receiver, tmp_path: Path, point: str, times: int
) -> None:
    """Between the answer and its commit nobody can know: then it is sent twice, under the same key."""
    s = configured(bus, {"ops": receiver.url("ops")})
    with Running(s):
        until(lambda: begun(bus))
    publish(bus, *strikes(1, 2))
    victim = process(s, tmp_path, TAPELINE_TEST_FAULT=f"alerts:{point}")
    victim.communicate(timeout=20)
    assert victim.returncode == -9
    with Running(s):
        found = settled(bus, 2)
    keys = sorted(g.key for g in receiver.taken())
    assert set(keys) == {a.id for a in found}
    assert len(keys) == 1 + times


def test_without_a_channel_there_is_no_worker(bus: Bus, tmp_path: Path) -> None:
    done = tapeline("run", "alerts", cwd=tmp_path, REDIS_URL="redis://127.0.0.1:1/0")
    assert (done.returncode, done.stdout) == (78, "")
    assert "no alert channel is configured" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(ConfigError, match="no arguments"):
        run(configured(bus, {"ops": "http://h/x"}), None, ("x",))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_secret_is_told(
    bus: Bus, receiver: Receiver, tmp_path: Path, commands: Callable[[Settings], Commands]
) -> None:
    """Not in the log at its most talkative, not by the commands, not on a command line."""
    receiver.answer = lambda path, before: (503, {}) if before < 2 else (400, {})
    unreachable = "http://user:s3cr3t-pass@127.0.0.1:1/T0KEN-unreachable?key=S3CRETkey"
    channels = {"ops": receiver.url("services/T0KEN-path"), "lost": unreachable}
    channels["odd"] = f"json://127.0.0.1:{receiver.port}/T0KEN-apprise"
    s = configured(bus, channels)
    worker = process(s, tmp_path, TAPELINE_LOG_LEVEL="DEBUG")
    until(lambda: begun(bus), 20)
    publish(bus, signal())

    def over() -> bool:
        states = {d.channel: (d.state, d.attempts) for a in alerts(bus) for d in a.deliveries}
        return bool(states) and states["ops"][0] == REFUSED and min(states["lost"][1], states["odd"][1]) > 1

    until(over, 20, "failures of each channel")
    argv = Path(f"/proc/{worker.pid}/cmdline").read_text()
    log = ended(worker)
    tl = commands(s)
    told = [
        tl("config", "show", "--json"), tl("config", "show"), tl("alerts", "list"),
        tl("alerts", "list", "--json", "--all"), tl("status"),
        *(tl("alerts", "test", name, code=1) for name in s.alerts.channels),
    ]  # fmt: skip
    assert "channel ops refused alert" in log
    assert "channel lost: cannot be reached" in log
    assert "channel odd: apprise could not deliver it" in log
    for text in (log, argv, *told):
        for secret in ("T0KEN", "s3cr3t", "S3CRET"):
            assert secret not in text, text
    shown = {row["setting"]: row["value"] for row in json.loads(told[0])}
    assert shown["alerts.channels"] == {"ops": "***", "lost": "***", "odd": "***"}


def test_the_commands(bus: Bus, receiver: Receiver, commands: Callable[[Settings], Commands]) -> None:
    s = configured(bus, {"ops": receiver.url("ops")})
    told = commands(s)

    def tl(*args: str, code: int = 0) -> str:
        return told("alerts", *args, code=code)

    assert tl("list").startswith("no open alerts")
    assert tl("test", "ops") == "ops took the test message\n"
    assert receiver.got[-1].body["type"] == "test"
    assert "no channel 'nope'; there are: ops" in tl("test", "nope", code=2)
    assert "no alert begins with 'x'" in tl("ack", "x", code=1)
    with Running(s):
        until(lambda: begun(bus))
        publish(bus, *strikes(1, 2))
        first, second = settled(bus, 2)
    assert f"{first.id}  " in tl("list")
    assert "to ops: sent after 1 attempt" in tl("list")
    assert tl("ack", first.id, "--by", "ann") == f"{first.id} acknowledged by ann\n"
    assert tl("ack", first.id) == f"{first.id} was acknowledged by ann before\n"
    assert [a["id"] for a in json.loads(tl("list", "--json"))] == [second.id]
    every = json.loads(tl("list", "--json", "--all"))
    assert [(a["id"], a.get("acked_by")) for a in every] == [(first.id, "ann"), (second.id, None)]


# apprise imports modules that Python will remove.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_apprise_takes_the_other_schemes(bus: Bus, receiver: Receiver) -> None:
    receiver.answer = lambda path, before: (503, {}) if before < 3 else (200, {})
    with Running(configured(bus, {"odd": receiver.url("odd", "json")})):
        until(lambda: begun(bus))
        publish(bus, *strikes(1, 2, grade="EXTREME"))
        found = settled(bus, 2)
    taken = receiver.taken("odd")
    assert sorted(a.id for a in found for g in taken if a.id in g.body["message"]) == sorted(a.id for a in found)
    assert len(taken) == 2
    assert {g.body["type"] for g in taken} == {"failure"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_apprise_does_not_know_is_said_at_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    s = configured(bus, {"odd": "nonsense://T0KEN/x"})
    with pytest.raises(ConfigError) as caught:
        run(s, None, ())  # type: ignore[arg-type]
    assert str(caught.value).startswith("alerts.channels.odd: apprise does not understand this nonsense:// URL")
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ConfigError) as caught:
        run(replace(s, alerts=msgspec.structs.replace(s.alerts)), None, ())  # type: ignore[arg-type]
    assert "pip install 'tapeline[alerts]'" in str(caught.value)
    assert "T0KEN" not in str(caught.value)
