"""The embedded Redis: found, durable, and clear about what stands in its way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from shared.bus import Bus
from shared.errors import BusUnavailable, ConfigError
from shared.redis_server import EmbeddedRedis, answers, find_redis, socket_path
from tests.wait import on_disk, until


def test_a_server_is_found_and_is_new_enough() -> None:
    path, description = find_redis()
    assert os.access(path, os.X_OK)
    assert description.startswith(("Redis ", "Valkey "))


def test_an_old_server_on_path_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=00000000:0 malloc=libc bits=64'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    find_redis.cache_clear()
    try:
        assert find_redis()[0] != str(old)
    finally:
        find_redis.cache_clear()


def test_data_survives_kill_9(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "r")
    server.start()
    try:
        client = redis.Redis.from_url(server.url)
        client.set("kept", "yes")
        on_disk(client)
        server.kill()
        assert not server.alive
        server.start()
        client.connection_pool.disconnect()
        assert client.get("kept") == b"yes"
        client.close()
    finally:
        server.stop()
    assert not server.socket.exists()


def test_the_server_is_configured_for_a_bus(redis_server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(redis_server.url, decode_responses=True)
    want = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
    assert {name: client.config_get(name)[name] for name in want} == want
    client.close()


def test_tcp_port_only_on_loopback(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = EmbeddedRedis(tmp_path / "r", port=port)
    server.start()
    try:
        assert f"127.0.0.1:{port}" in server.describe()
        assert "append-only" in server.describe()
        client = redis.Redis(port=port, decode_responses=True)
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        client.close()
    finally:
        server.stop()


def test_a_taken_port_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} .* TAPELINE_REDIS_PORT"):
            EmbeddedRedis(tmp_path, port=port).start()


def test_a_deep_folder_gets_a_short_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    server = EmbeddedRedis(folder)
    short = server.socket.parent
    assert short != folder
    assert len(str(server.socket)) < 100
    server.start()
    try:
        assert answers(server.socket)
        bus = Bus(server.url)
        bus.ping()
        bus.close()
    finally:
        server.stop()
    assert not short.exists()


def test_a_short_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    short = socket_path(folder, "redis.sock").parent
    try:
        short.chmod(0o777)
        with pytest.raises(ConfigError, match="not a private folder"):
            socket_path(folder, "redis.sock")
    finally:
        short.rmdir()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    (tmp_path / "appendonly.aof").mkdir()
    with pytest.raises(BusUnavailable, match=r"did not start: .*log: "):
        server.start(timeout=5)


def test_exec_redis_is_the_process_itself_and_dies_with_its_parent(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    config = server.write()
    child = f"from pathlib import Path; from shared.redis_server import exec_redis; exec_redis(Path({str(config)!r}))"
    code = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until(lambda: answers(server.socket), what="Redis to answer")
        assert "redis" in Path(f"/proc/{pid}/comm").read_text()
        parent.send_signal(signal.SIGKILL)
        until(lambda: not answers(server.socket), what="Redis to go")
        until(lambda: not _runs(pid), what="its process to end")


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
