"""Supervision: what is run, how it stops, what a kill leaves behind (nothing)."""

from __future__ import annotations

import configparser
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import psutil
import pytest

from shared import supervise
from shared.bus import Bus
from shared.cli import cli
from shared.errors import ConfigError
from shared.redis_server import answers
from shared.registry import SERVICES
from shared.settings import Settings, load
from shared.supervise import Program, programs, render, sample
from shared.supervised import last_error
from shared.supervision import Supervision, WorkerError
from tests.wait import until

ROOT = Path(__file__).resolve().parents[2]
REDIS = Program("redis", ("redis",), final=(78,))


def settings_in(folder: Path, **environ: str) -> Settings:
    s = load(environ={"TAPELINE_STATE_DIR": str(folder / "state"), **environ})
    return replace(s, redis=msgspec.structs.replace(s.redis, port=0))


def below(folder: Path) -> list[psutil.Process]:
    """Processes that mention a folder in their command line or run in it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder) in " ".join(
                [*process.cmdline(), process.cwd()]
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [p for p in found if p.pid != os.getpid()]


def test_the_committed_configuration_is_the_generated_one() -> None:
    assert (ROOT / "deploy" / "supervisord.conf").read_text() == sample()


def test_the_systemd_unit_runs_what_there_is() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    text = (ROOT / "deploy" / "tapeline.service").read_text()
    unit.read_string(text)
    service = unit["Service"]
    # Only its supervisor is told to stop, which needs its time.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) > supervise.STOP_SECONDS + supervise.REDIS_STOP_SECONDS
    assert service["RestartPreventExitStatus"] == "78"
    commands = re.findall(r"^Exec\w+=/opt/tapeline/bin/tapeline (.+)$", text, re.M)
    assert commands == ["config check", "warm", "up"]
    for line in commands:
        group: click.Command = cli
        for word in line.split():
            assert isinstance(group, click.Group)
            group = group.commands[word]
    given = dict(re.findall(r"^Environment=(TAPELINE_\w+)=(.+)$", text, re.M))
    assert given.pop("TAPELINE_CONFIG") == "/etc/tapeline/tapeline.toml"
    assert load(environ=given).tapeline.state_dir.startswith("/var/lib/tapeline/")


def test_only_where_alerts_are_sent_a_listener_runs(tmp_path: Path) -> None:
    for channels, wanted in (("", False), ("ops=https://example.org/hook", True)):
        s = settings_in(tmp_path, TAPELINE_ALERTS_CHANNELS=channels)
        lock = supervise.claim(supervise.layout(s))
        supervise.prepare(s, programs(s))
        os.close(lock)
        conf = configparser.RawConfigParser()
        conf.read(supervise.layout(s).conf)
        section = f"eventlistener:{supervise.LISTENER}"
        assert conf.has_section(section) == wanted
        if wanted:
            assert supervise.LISTENER in SERVICES
            assert "PROCESS_STATE_FATAL" in conf[section]["events"]
            assert conf[section]["stdout_logfile"] == "NONE", "stdout is the protocol"


def test_what_up_runs_follows_the_settings() -> None:
    def names(**environ: str) -> list[str]:
        return [w for p in programs(load(environ=environ)) for w in p.workers()]

    assert names() == ["redis", "ingest-synthetic", "aggregate", "pressure", "signals", "web", "sink-sqlite"]
    assert "web" not in names(TAPELINE_WEB_PORT="0")
    assert "alerts" in names(TAPELINE_ALERTS_CHANNELS="ops=https://example.org/hook")
    assert "signals" not in names(TAPELINE_PRESSURE_WORKERS="0")
    assert names(TAPELINE_PRESSURE_WORKERS="2", TAPELINE_SIGNALS_WORKERS="0")[3:5] == ["pressure-1", "pressure-2"]
    assert names(TAPELINE_SINK_MODES="ticks")[1:] == ["ingest-synthetic", "web", "sink-sqlite"]
    assert "redis" not in names(REDIS_URL="redis://elsewhere:6379/0")
    assert names(TAPELINE_AGGREGATE_WORKERS="3")[2:5] == ["aggregate-1", "aggregate-2", "aggregate-3"]
    assert names(TAPELINE_STORE="postgresql://h/db")[-1:] == ["sink-timescale"]
    assert names(TAPELINE_STORE="postgres://h/db", TAPELINE_TIMESCALE_WORKERS="2")[-2:] == [
        "sink-timescale-1",
        "sink-timescale-2",
    ]
    assert names(TAPELINE_STORE="bigquery://project/dataset", TAPELINE_TIMESCALE_WORKERS="2")[-1] == "sink-bigquery"
    assert names(GCP_PROJECT_ID="p")[-1] == "sink-sqlite"
    assert names(GCP_PROJECT_ID="p", BIGQUERY_DATASET="d")[-2:] == ["sink-sqlite", "sink-bigquery"]
    assert {p.args[0] for p in programs(Settings())} <= set(SERVICES) | {"redis"}


def test_an_unknown_feed_is_named_with_its_origin() -> None:
    with pytest.raises(ConfigError, match="env TAPELINE_FEEDS: no feed 'nyse'"):
        programs(load(environ={"TAPELINE_FEEDS": "nyse"}))


def test_no_secret_is_written_into_the_configuration(tmp_path: Path) -> None:
    s = settings_in(tmp_path, DATABENTO_API_KEY="db-secret-key", REDIS_URL="redis://:hush-hush@127.0.0.1:1/0",
                    TAPELINE_FEEDS="databento")  # fmt: skip
    os.close(supervise.claim(supervise.layout(s)))
    _, about = supervise.prepare(s, programs(s))
    text = supervise.layout(s).conf.read_text()
    for said in (text, about):
        assert "db-secret-key" not in said
        assert "hush-hush" not in said


def test_workers_load_the_settings_that_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPELINE_AGGREGATE_WORKERS", "2")
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:1/0")
    file = tmp_path / "t.toml"
    file.write_text('[tapeline]\nstore = "sqlite:///from_file.db"\n')
    given = load(str(file))
    own = replace(
        given,
        tapeline=msgspec.structs.replace(given.tapeline, store="sqlite:///own.db", state_dir=str(tmp_path / "s")),
        redis=msgspec.structs.replace(given.redis, url="unix:///own?db=0", cluster=True, window_seconds=0),
        aggregate=msgspec.structs.replace(given.aggregate, workers=5, big_trade={"NG": 5.0, "ES": 1.0}),
        synthetic=msgspec.structs.replace(given.synthetic, roots=("ES", "6E")),
    )
    seen = load(environ=supervise.environment(own, str(file)))
    assert replace(seen, origin={}) == replace(own, origin={})


def test_exit_78_rests_and_percent_signs_survive() -> None:
    text = render([Program("odd", ("a b", "50%"))], "/s", "/s/x.sock", ("tapeline",))
    assert "command=tapeline run 'a b' 50%%" in text
    assert "exitcodes=0,78" in text
    assert "inet_http_server" not in text


def test_supervision_runs_redis_and_leaves_nothing(tmp_path: Path) -> None:
    s = settings_in(tmp_path)
    with Supervision(s, [REDIS], None) as supervision:
        at = supervision.at
        sock = at.redis / "redis.sock"
        until(lambda: answers(sock), what="Redis to answer")
        assert supervision.about.endswith("append-only")
        assert supervise.find_bus(s).redis.url == supervision.settings.redis.url
        pids = [p.pid for p in below(tmp_path)]
        assert len(pids) == 2, "the supervisor and the real Redis process, nothing between"
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    left = {p.relative_to(at.state).as_posix() for p in at.state.rglob("*") if not p.is_dir()}
    assert not {"tapeline.pid", "redis.url", "supervisor.sock", "redis/redis.sock"} & left
    with pytest.raises(ConfigError, match="no `tapeline up` runs in"):
        supervise.find_bus(s)


def test_a_killed_redis_comes_back_with_its_data(tmp_path: Path) -> None:
    with Supervision(settings_in(tmp_path), [REDIS], None) as supervision:
        bus = Bus(supervision.settings.redis.url)
        sock = supervision.at.redis / "redis.sock"
        until(lambda: answers(sock), what="Redis to answer")
        bus.call("set", "kept", "yes")
        first = next(p.pid for p in until(supervision.processes) if p.name == "redis")
        os.kill(first, signal.SIGKILL)
        until(lambda: any(p.pid not in (0, first) for p in supervision.processes()), what="another Redis process")
        until(lambda: answers(sock), what="Redis to answer again")
        bus.client.connection_pool.disconnect()
        assert bus.call("get", "kept") == b"yes"
        bus.close()
        events = supervision.at.logs / "events.log"
        until(lambda: "redis " in (text := events.read_text()) and "starting it again" in text, what="the event told")


def test_kill_9_of_the_supervisor_leaves_no_orphan_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    s = settings_in(tmp_path)
    at = supervise.layout(s)
    sock = at.redis / "redis.sock"
    with Supervision(s, [REDIS], None) as first:
        until(lambda: answers(sock), what="Redis to answer")
        os.kill(int(at.pid.read_text()), signal.SIGKILL)
        until(lambda: len(below(tmp_path)) == 0, what="Redis to follow its supervisor")
        assert at.url.exists(), "a killed supervisor cannot clean up"
        with pytest.raises(WorkerError):
            first.check()
    at.pid.write_text("999999\n")  # as a killed `up` leaves it
    at.url.write_text("unix:///nowhere\n")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(at.socket))
    stale.close()
    with Supervision(s, [REDIS], None) as second:
        until(lambda: answers(sock), what="Redis to answer again")
        until(second.processes, what="the supervisor's own socket")


def test_the_supervisor_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import time\nfrom pathlib import Path\n"
        "from tests.shared.test_supervise import REDIS, settings_in\n"
        "from shared.supervision import Supervision\n"
        f"with Supervision(settings_in(Path({str(tmp_path)!r})), [REDIS], None, remove=True):\n"
        "    time.sleep(60)\n"
    )
    state = tmp_path / "state"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        until(lambda: answers(state / "redis" / "redis.sock"), what="Redis to answer")
        parent.kill()
    until(lambda: not below(tmp_path) and not state.exists(), what="everything to go")


def test_a_state_directory_has_one_owner(tmp_path: Path) -> None:
    at = supervise.layout(settings_in(tmp_path))
    lock = supervise.claim(at)
    with pytest.raises(ConfigError, match=rf"in use by a running tapeline \(pid {os.getpid()}\)"):
        supervise.claim(at)
    os.close(lock)
    os.close(supervise.claim(at))


def test_a_state_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match="cannot use the state directory"):
        supervise.claim(supervise.layout(settings_in(tmp_path)))


def test_an_error_of_a_worker_becomes_the_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.dbn"
    empty.touch()
    broken = Program("ingest-files", ("ingest-files", str(empty)), final=(0, 1, 78))
    with Supervision(settings_in(tmp_path), [REDIS, broken], None) as supervision:

        def ended() -> WorkerError | None:
            try:
                supervision.check()
            except WorkerError as error:
                return error
            return None

        error = until(ended, what="the worker's end")
    assert error.exit_code == 1
    assert str(error).startswith(f"{empty} is empty")


def test_a_redis_that_cannot_run_ends_the_supervisor(tmp_path: Path) -> None:
    s = settings_in(tmp_path)
    with Supervision(s, [REDIS], None) as supervision:
        until(lambda: answers(supervision.at.redis / "redis.sock"), what="Redis to answer")
        conf = supervision.at.conf
    # The port is taken only after `prepare` has looked.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = supervise.environment(s, None) | {"TAPELINE_REDIS_PORT": str(taken.getsockname()[1])}
        assert conf.exists()
        done = subprocess.run(
            supervise.daemon(supervise.layout(s)), env=env, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 78
    assert "redis ended with exit code 78: port" in done.stdout


def test_last_error_reads_only_our_own_lines(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    log.write_text('{"message": "x"}\ntapeline: first\nnoise\ntapeline: second\n{"message": "y"}\n')
    assert last_error(log) == "second"
    assert last_error(tmp_path / "absent.log") == ""
