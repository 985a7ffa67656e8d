"""`tapeline doctor`: each check fine, and failing with what to do about it."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from shared import doctor, doctor_bus, doctor_machine
from shared.bus import Bus
from shared.cli import cli
from shared.doctor import Caution, Check, Finding
from shared.errors import AuthError, ConfigError, TapelineError
from shared.heartbeat import beat
from shared.log import Masker
from shared.redis_server import EmbeddedRedis
from shared.settings import Settings, load
from tests.postgres import PostgresServer


def settings(tmp_path: Path, **environ: str) -> Settings:
    return load(environ={"TAPELINE_STATE_DIR": str(tmp_path / "state"), "TAPELINE_REDIS_PORT": "0"} | environ)


def found_of(given: Settings, *, offline: bool = False) -> dict[str, Finding]:
    mask = Masker(given)
    return {f.check: f for f in doctor.examine(doctor.checks_of(given), mask, offline=offline)}


@contextmanager
def listening(answer: bytes | None = None) -> Iterator[int]:
    """The port of a server that takes connections, and says nothing or `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for connection in held:
                connection.close()


# -- the runner -----------------------------------------------------------------------------


def test_checks_run_at_once_in_order_and_one_that_hangs_holds_nobody_up() -> None:
    never, second = threading.Event(), threading.Event()

    def first() -> str:
        assert second.wait(10)  # so it cannot have waited for the first
        return "one"

    def fails() -> str:
        second.set()
        raise AuthError("the key\n s3cret-key is  wrong: mend it")

    def broken() -> str:
        raise KeyError("s3cret-key")

    found = list(
        doctor.examine(
            [
                Check("first", first),
                Check("second", fails),
                Check("hangs", lambda: str(never.wait()), patience=0.05, silence="plug it in"),
                Check("broken", broken),
                Check("odd", lambda: Caution("look")),
                Check("away", lambda: "reached", leaves=True),
            ],
            lambda text: text.replace("s3cret-key", "***"),
            offline=True,
        )
    )
    never.set()
    assert [(f.check, f.state, f.fine) for f in found] == [
        ("first", "ok", True), ("second", "FAIL", False), ("hangs", "FAIL", False), ("broken", "FAIL", False),
        ("odd", "warn", True), ("away", "skip", True),
    ]  # fmt: skip
    says = {f.check: f.says for f in found}
    assert says["second"] == "the key *** is wrong: mend it"
    assert says["hangs"] == "no answer within 0.05 s: plug it in"
    assert says["broken"].startswith("unexpected KeyError: '***'")
    assert says["away"] == "not asked (--offline)"


def test_offline_asks_this_machine_alone(tmp_path: Path) -> None:
    away = settings(
        tmp_path, REDIS_URL="rediss://u:hush@redis.example:6380/0", TAPELINE_STORE="postgresql://u:hush@db.example/m",
        TAPELINE_FEEDS="databento,tardis", DATABENTO_API_KEY="db-hush", TARDIS_API_KEY="TD.hush",
        TAPELINE_TARDIS_HOST="machine.example", GCP_PROJECT_ID="p", BIGQUERY_DATASET="d",
    )  # fmt: skip
    found = found_of(away, offline=True)
    assert {name for name, f in found.items() if f.state == "skip"} == {
        "redis", "redis memory", "workers", "clock of redis", "store", "store features", "clock of store", "bigquery",
        "databento live", "databento archive", "tardis-machine", "tardis key",
    }  # fmt: skip
    here = settings(
        tmp_path, REDIS_URL="unix:///tmp/redis.sock?db=0", TAPELINE_STORE="postgresql://u@127.0.0.1/m",
        TAPELINE_FEEDS="databento,tardis", DATABENTO_API_KEY="db-hush", TAPELINE_DATABENTO_GATEWAY="127.0.0.1",
        GCP_PROJECT_ID="p", BIGQUERY_DATASET="d", TAPELINE_BIGQUERY_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert not any(check.leaves for check in doctor.checks_of(here))


# -- Redis ----------------------------------------------------------------------------------


@pytest.fixture
def ours(bus: Bus, tmp_path: Path) -> Settings:
    """Settings of the session's Redis."""
    return settings(tmp_path, REDIS_URL=bus.url, TAPELINE_NAMESPACE=bus.keys.namespace)


def test_a_redis_that_may_lose_the_bus(bus: Bus, ours: Settings) -> None:
    assert doctor_bus.redis(ours).endswith("answers, append-only, noeviction")
    for name, bad, remedy in (
        ("maxmemory-policy", "allkeys-lru", "CONFIG SET maxmemory-policy noeviction"),
        ("appendonly", "no", "CONFIG SET appendonly yes"),
    ):
        before = bus.call("config_get", name)[name]
        bus.call("config_set", name, bad)
        try:
            with pytest.raises(ConfigError, match=remedy):
                doctor_bus.redis(ours)
        finally:
            bus.call("config_set", name, before)


def test_the_memory_of_redis_against_what_the_streams_may_hold(bus: Bus, ours: Settings) -> None:
    assert doctor_bus.memory(ours).endswith("the streams of 8 partitions hold 3.0 GiB at most; no maxmemory")
    used = int(bus.call("info", "memory")["used_memory"])
    try:
        bus.call("config_set", "maxmemory", 4 << 30)
        assert doctor_bus.memory(ours).endswith("hold 3.0 GiB at most, maxmemory is 4.0 GiB")
        bus.call("config_set", "maxmemory", 1 << 30)
        said = doctor_bus.memory(ours)
        assert isinstance(said, Caution)
        assert f"set TAPELINE_REDIS_STREAM_MAX_BYTES to {(1 << 30) // 48}" in said
        bus.call("config_set", "maxmemory", int(used * 1.05))
        with pytest.raises(ConfigError, match="at the limit it refuses all writes: raise maxmemory"):
            doctor_bus.memory(ours)
    finally:
        bus.call("config_set", "maxmemory", 0)


def test_a_redis_that_is_away_deaf_or_wants_a_password(
    tmp_path: Path, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_of(settings(tmp_path, REDIS_URL="redis://u:hush-hush@127.0.0.1:1/0"))
    assert "127.0.0.1:1/0 does not answer (" in found["redis"].says
    assert found["redis"].says.endswith("look whether it is up, and whether a firewall stands between (REDIS_URL)")
    assert {f.says for name, f in found.items() if name in ("redis memory", "workers", "clock of redis")} == {
        "not known: see redis"
    }
    assert "hush" not in "".join(f.says for f in found.values())
    monkeypatch.setattr(doctor, "PATIENCE_SECONDS", 0.2)
    with listening() as port:
        deaf = settings(tmp_path, REDIS_URL=f"redis://127.0.0.1:{port}/0")
        check = next(c for c in doctor.checks_of(deaf) if c.name == "redis")
        (found_,) = doctor.examine([check], str)
    assert found_.says.startswith("no answer within 0.2 s: look whether it is up, and whether a firewall")
    bus = Bus(redis_server.url)
    bus.call("config_set", "requirepass", "right-password")
    try:
        with pytest.raises(AuthError, match="refused the credentials; check REDIS_URL"):
            doctor_bus.redis(settings(tmp_path, REDIS_URL=redis_server.url))
        with pytest.raises(AuthError, match="refused the credentials; check REDIS_URL"):
            doctor_bus.redis(settings(tmp_path, REDIS_URL=f"{redis_server.url}&password=wrong-password"))
    finally:
        bus.call("config_set", "requirepass", "")
        bus.close()


def test_workers_that_are_gone_are_named(bus: Bus, ours: Settings) -> None:
    assert doctor_bus.workers(ours) == "none runs"
    beat(bus, "aggregate@a:1", "aggregate")
    said = doctor_bus.workers(ours)
    assert said == "1 are healthy, and so are their feeds and partitions"
    body = json.loads(bus.call("hget", bus.keys.workers, "aggregate@a:1"))
    bus.call("hset", bus.keys.workers, "aggregate@a:1", json.dumps(body | {"at_ms": body["at_ms"] - 60_000}))
    with pytest.raises(TapelineError, match=r"worker aggregate@a:1: not seen for 60 s .*: look into the logs"):
        doctor_bus.workers(ours)


# -- clocks ---------------------------------------------------------------------------------


def test_skew_is_what_two_looks_prove() -> None:
    second = 10**9
    assert doctor_machine.skew(10 * second, 11 * second, 12 * second) == 0  # between: nothing is proved
    assert doctor_machine.skew(10 * second, 8 * second, 12 * second) == 2
    assert doctor_machine.skew(10 * second, 15 * second, 12 * second) == -3
    assert doctor_machine.compared("Redis", (0, 5, 10)) == "0.00 s from ours"
    with pytest.raises(ConfigError, match=r"this machine's clock is 2.0 s ahead of that of Redis: let NTP set both"):
        doctor_machine.compared("Redis", (10 * second, 8 * second, 12 * second))


def test_the_clocks_of_redis_and_the_store(
    bus: Bus, tmp_path: Path, postgres: PostgresServer, pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = settings(tmp_path, REDIS_URL=bus.url, TAPELINE_STORE=pg_url)
    found = found_of(here)
    assert found["clock of redis"].says == found["clock of store"].says == "0.00 s from ours"
    assert found["clock of redis"].fine
    assert "hypertables: " in found["store features"].says
    # A server whose clock is ten seconds late, as this program sees it.
    database = pg_url.rpartition("/")[2].partition("?")[0]
    postgres.sql(
        "CREATE SCHEMA late; CREATE FUNCTION late.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
        "'SELECT pg_catalog.clock_timestamp() - interval ''10 s'''; "
        f"ALTER DATABASE {database} SET search_path = late, pg_catalog, public",
        database,
    )
    check = next(c for c in doctor.checks_of(here) if c.name == "clock of store")
    with pytest.raises(ConfigError, match=r"clock is 10.0 s ahead of that of the store: let NTP set both"):
        check.look()


# -- stores ---------------------------------------------------------------------------------


def test_a_sqlite_store_tells_its_version_journal_and_schema(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'market.db'}"
    version = sqlite3.sqlite_version
    assert found_of(settings(tmp_path, TAPELINE_STORE=url))["store"].says == (
        f"{tmp_path / 'market.db'} (will be made, by SQLite {version})"
    )
    assert CliRunner().invoke(cli, ["migrate", "--store", url]).exit_code == 0
    said = found_of(settings(tmp_path, TAPELINE_STORE=url))["store"].says
    newest = said.rpartition(" ")[2]
    assert said.startswith(f"{tmp_path / 'market.db'}: SQLite {version}, WAL, schema version ")
    with sqlite3.connect(tmp_path / "market.db") as connection:
        connection.execute("DELETE FROM schema_version WHERE version = ?", (newest,))
    connection.close()
    said = found_of(settings(tmp_path, TAPELINE_STORE=url))["store"].says
    assert said.endswith(f"schema version {int(newest) - 1}: will be migrated to {newest} by the sink or "
                         "`tapeline migrate`")  # fmt: skip
    with sqlite3.connect(tmp_path / "market.db") as connection:
        connection.execute("INSERT INTO schema_version VALUES (999, 'later', '')")
    connection.close()
    later = found_of(settings(tmp_path, TAPELINE_STORE=url))["store"]
    assert not later.fine
    assert "upgrade Tapeline, or name another file in TAPELINE_STORE" in later.says


def test_a_wrong_password_of_the_store_is_not_told(postgres: PostgresServer, tmp_path: Path) -> None:
    hba = postgres.data / "pg_hba.conf"
    kept, role = hba.read_text(), f"r{uuid.uuid4().hex[:8]}"
    try:
        hba.write_text(f"host all {role} 127.0.0.1/32 scram-sha-256\n{kept}")
        postgres.sql(f"CREATE ROLE {role} LOGIN PASSWORD 's3cret'; SELECT pg_reload_conf()")
        found = found_of(settings(tmp_path, TAPELINE_STORE=postgres.url("postgres", role, "wr0ng-word")))
    finally:
        hba.write_text(kept)
        postgres.sql(f"DROP ROLE {role}; SELECT pg_reload_conf()")
    assert "check the name and password in TAPELINE_STORE" in found["store"].says
    assert (found["store features"].state, found["store features"].says) == ("skip", "not known: see store")
    assert "wr0ng" not in "".join(f.says for f in found.values())


# -- this machine ---------------------------------------------------------------------------


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.disk(tmp_path / "not" / "yet", "TAPELINE_STATE_DIR").endswith(f"GiB free at {tmp_path}")
    monkeypatch.setattr(doctor_machine, "LOW_DISK_BYTES", 1 << 80)
    with pytest.raises(ConfigError, match="make room, or set TAPELINE_STATE_DIR to another disk"):
        doctor_machine.disk(tmp_path, "TAPELINE_STATE_DIR")
    if os.getuid():
        with pytest.raises(ConfigError, match="/ is not writable: set TAPELINE_STATE_DIR"):
            doctor_machine.disk(Path("/nothing"), "TAPELINE_STATE_DIR")


def test_ports_that_are_free_ours_or_of_somebody_else(bus: Bus, tmp_path: Path) -> None:
    with listening() as port:
        environ = {"TAPELINE_WEB_PORT": str(port), "REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace}
        here = settings(tmp_path, **environ)
        with pytest.raises(ConfigError, match=rf"{port} of 127.0.0.1 is taken: set TAPELINE_WEB_PORT .*ss -ltnp"):
            doctor_machine.web_port(here)
        beat(bus, "web@here:1", "web")
        assert doctor_machine.web_port(here) == f"{port}, served by our web worker"
        bus.call("hdel", bus.keys.workers, "web@here:1")
        with pytest.raises(ConfigError, match=rf"port {port} is taken, .*set TAPELINE_REDIS_PORT"):
            doctor_machine.redis_port(settings(tmp_path, TAPELINE_REDIS_PORT=str(port)))
    assert doctor_machine.web_port(here) == f"{port} is free"
    assert doctor_machine.redis_port(settings(tmp_path, TAPELINE_REDIS_PORT=str(port))) == f"{port} is free"
    assert "TAPELINE_WEB_PORT is 0" in doctor_machine.web_port(settings(tmp_path, TAPELINE_WEB_PORT="0"))
    nowhere = settings(tmp_path, TAPELINE_WEB_HOST="192.0.2.1", TAPELINE_WEB_TOKEN="0123456789abcdef")
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1"):
        doctor_machine.web_port(nowhere)


def test_the_port_of_the_redis_that_up_runs(tmp_path: Path) -> None:
    with listening() as port:
        pass
    server = EmbeddedRedis(tmp_path / "state" / "redis", port)
    server.start()
    try:
        (tmp_path / "state" / "redis.url").write_text(server.url + "\n")
        said = doctor_machine.redis_port(settings(tmp_path, TAPELINE_REDIS_PORT=str(port)))
        assert said == f"{port}, served by the Redis of `tapeline up`"
    finally:
        server.stop()


def test_ports_for_metrics(bus: Bus, tmp_path: Path) -> None:
    assert "TAPELINE_METRICS_PORT is 0" in doctor_machine.metrics_port(settings(tmp_path, TAPELINE_METRICS_PORT="0"))
    with listening() as port:
        here = settings(tmp_path, TAPELINE_METRICS_PORT=str(port))
        assert re.search(rf"free from {port} on, \d+ taken by others", doctor_machine.metrics_port(here))
    with socket.create_server(("127.0.0.1", 65535)) as _:
        last = settings(tmp_path, TAPELINE_METRICS_PORT="65535")
        with pytest.raises(ConfigError, match=r"no port from 65535 to 65535 .*: set TAPELINE_METRICS_PORT"):
            doctor_machine.metrics_port(last)
    few = doctor_machine.metrics_port(settings(tmp_path, TAPELINE_METRICS_PORT="65534"))
    assert isinstance(few, Caution)
    assert "workers want one: set TAPELINE_METRICS_PORT" in few


def test_who_reaches_the_page(tmp_path: Path) -> None:
    def said(**environ: str) -> str:
        return doctor_machine.page(settings(tmp_path, **environ))

    wide = {"TAPELINE_WEB_HOST": "0.0.0.0"}
    assert said().endswith("from this machine alone")
    assert said(**wide, TAPELINE_WEB_TOKEN="0123456789abcdef").endswith("from other machines with the token")
    assert "TRUSTED_NETWORK" in said(**wide, TAPELINE_WEB_TRUSTED_NETWORK="true")
    short = said(**wide, TAPELINE_WEB_TOKEN="letters8")
    assert isinstance(short, Caution)
    assert "take 16 or more" in short
    assert "letters8" not in short


def test_open_files_and_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = settings(tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    with pytest.raises(ConfigError, match=r"256 files, 1100 are wanted: `ulimit -n 1100`, LimitNOFILE=1100"):
        doctor_machine.open_files(here)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert doctor_machine.open_files(here) == "unlimited"
    assert "processes, 3 of them stages" in doctor_machine.cpus(here)
    many = doctor_machine.cpus(settings(tmp_path, TAPELINE_AGGREGATE_WORKERS="64"))
    assert isinstance(many, Caution) == (len(os.sched_getaffinity(0)) < 64)


# -- the command ----------------------------------------------------------------------------


def test_settings_that_cannot_be_read_are_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value, remedy in (
        ("TAPELINE_STORE", "oracle://u:hush-hush@h/db", "is not a store URL"),
        ("TAPELINE_WEB_HOST", "0.0.0.0", "set (TAPELINE_WEB_TOKEN)"),
        ("TAPELINE_FEEDS", "nyse", "no feed 'nyse'"),
        ("TAPELINE_DATABENTO_HOURS", "Nope", "unknown market calendar 'Nope'"),
    ):
        with monkeypatch.context() as with_it:
            with_it.setenv(variable, value)
            done = CliRunner().invoke(cli, ["doctor", "--json"])
        (finding,) = json.loads(done.output)
        assert (done.exit_code, finding["check"], finding["state"]) == (1, "settings", "FAIL")
        assert remedy in finding["says"]
        assert "hush" not in finding["says"]
    done = CliRunner().invoke(cli, ["doctor", "--offline", "--bigquery"])
    assert done.exit_code == 2


def test_a_secret_from_a_file_is_counted_and_not_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("db-of-a-file\n")
    given = settings(tmp_path, DATABENTO_API_KEY_FILE=str(tmp_path / "key"), TAPELINE_PARTITIONS="4")
    assert doctor.settings_line(given) == "read from defaults and 3 variables, and 1 file that variables name"


def test_the_screen_of_a_terminal(tmp_path: Path) -> None:
    """Wrapped with an indent at 80 columns, one line each at 200; symbols and no `ok`."""
    environ = {
        "TAPELINE_STATE_DIR": str(tmp_path), "REDIS_URL": "redis://127.0.0.1:1/0", "TAPELINE_REDIS_PORT": "0",
        "TAPELINE_WEB_PORT": "0", "TAPELINE_STORE": f"sqlite:///{tmp_path}/x.db",
    }  # fmt: skip
    for columns, wraps in ((80, True), (200, False)):
        lines = on_terminal(["doctor"], columns, environ)
        assert max(map(len, lines)) <= columns
        assert any(line.startswith("✓ settings ") for line in lines)
        at = next(i for i, line in enumerate(lines) if line.startswith("✗ redis "))
        assert lines[at + 1].startswith(" " * 20) == wraps
        assert " to be mended, " in lines[-1]
        assert " fine, " in lines[-1]


def on_terminal(args: list[str], columns: int, environ: dict[str, str]) -> list[str]:
    """What stands on a terminal after a command, line by line, colours and cursor movements taken out."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "PYTHONPATH")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shared.cli", *args],
        env=clean | environ | {"TERM": "xterm-256color"}, stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    data = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        data += part
    os.close(leader)
    process.wait(30)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())
    return [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").splitlines() if line.strip()]


def test_findings_as_json_and_off_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("TAPELINE_REDIS_PORT", "0"), ("TAPELINE_WEB_PORT", "0"), ("TAPELINE_METRICS_PORT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor_machine, "kernel", lambda: "compiled")
    plain = CliRunner().invoke(cli, ["doctor"])
    assert plain.exit_code == 0, plain.output
    assert all(line.startswith("ok    ") for line in plain.output.splitlines())
    records = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
    assert [f"ok    {r['check']}: {r['says']}" for r in records][:3] == plain.output.splitlines()[:3]
    assert set(records[0]) == {"check", "fine", "state", "says"}
