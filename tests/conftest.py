"""What the tests share: a real Redis, a bus on a namespace of its own, stores and recorded data."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.redis_server import EmbeddedRedis
from tests.postgres import PostgresServer

pytest_plugins = ("tests.bigquery", "tests.serving")


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(_redis: EmbeddedRedis) -> EmbeddedRedis:
    """The session's server, alive whatever the test before did to it."""
    _redis.start()
    return _redis


@pytest.fixture
def bus(redis_server: EmbeddedRedis) -> Iterator[Bus]:
    """A bus on a namespace of its own."""
    made = Bus(redis_server.url, f"t{uuid.uuid4().hex[:10]}")
    yield made
    redis_server.start()
    made.client.connection_pool.disconnect()
    for key in list(made.client.scan_iter(f"{made.keys.namespace}:*", count=1000)):
        made.client.delete(key)
    made.close()


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """URL of a SQLite store that does not exist yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[dict[str, PostgresServer]]:
    """PostgreSQL servers by version (tests.postgres.versions), started as they are asked for."""
    servers: dict[str, PostgresServer] = {}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture
def postgres(postgres_servers: dict[str, PostgresServer], request: pytest.FixtureRequest) -> PostgresServer:
    """A running server: PostgreSQL 16, or the version that the test is parametrized with (`indirect`)."""
    version = getattr(request, "param", "16")
    if version not in postgres_servers:
        postgres_servers[version] = PostgresServer(version)
    return postgres_servers[version].start()


@pytest.fixture
def pg_url(postgres: PostgresServer) -> Iterator[str]:
    """URL of an empty database of its own."""
    name = f"t{uuid.uuid4().hex[:10]}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    postgres.start()
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Recorded market data beside the project; the test is skipped where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder
