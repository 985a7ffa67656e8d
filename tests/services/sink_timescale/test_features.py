"""Features on plain PostgreSQL: roll-ups as views, a reader's role, and what is said of the rest."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import asyncpg
import pytest

from services.sink_timescale.features import apply, plan
from services.sink_timescale.rollups import ROLLUPS
from services.sink_timescale.server import MEANING, Server
from shared.errors import StoreUnavailable
from shared.postgres import connect, errors
from shared.settings import Timescale
from tests.postgres import PostgresServer, versions
from tests.services.sink_timescale.featured import Statements, candles, held, make_tables, rolled, store

START = datetime.fromisoformat("2025-03-08T21:30:00+00:00")
PLAIN = "TimescaleDB is not installed: plain tables, no compression, no retention, roll-ups are plain views"
each_server = pytest.mark.parametrize("postgres", versions(), indirect=True)


@pytest.fixture
def settings(postgres: PostgresServer) -> Timescale:
    """With a reader's role of its own, for roles are the server's."""
    role = f'reader {uuid.uuid4().hex[:8]} "x"'
    return Timescale(reader_role=role)


def run(url: str, work: Callable[[Any], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        connection = await connect(url)
        try:
            await make_tables(connection)
            await work(connection)
        finally:
            await connection.close()

    asyncio.run(all_of_it())


@each_server
def test_rollups_are_views_and_a_second_time_changes_nothing(pg_url: str, settings: Timescale) -> None:
    async def work(connection: Any) -> None:
        # Buckets are UTC's, whatever the session's time zone; here is one whose clocks change in these days.
        await connection.execute("SET TIME ZONE 'America/New_York'")
        rows = candles(START, 2000)
        await store(connection, rows)
        assert await apply(connection, settings) == [PLAIN]
        for name, rollup in ROLLUPS.items():
            expected = rolled(rows, rollup.length)
            assert len(expected) > 4
            assert {row[-1] for row in expected} == {True, False}
            assert await held(connection, name) == expected
        with Statements(connection) as told:
            assert await apply(connection, settings) == [PLAIN]
        assert told.texts
        assert not told.changes

    run(pg_url, work)


@each_server
def test_the_reader_reads_what_is_the_stores_and_nothing_else(
    pg_url: str, postgres: PostgresServer, settings: Timescale
) -> None:
    user, role = f"u{uuid.uuid4().hex[:8]}", settings.reader_role.replace('"', '""')

    async def work(connection: Any) -> None:
        await connection.execute("CREATE TABLE users (secret text)")  # another program's
        await apply(connection, settings)
        await connection.execute(f'CREATE ROLE {user} LOGIN; GRANT "{role}" TO {user}')
        reader = await connect(pg_url.replace("//postgres@", f"//{user}@"))
        try:
            for name in ("candles", "ohlc_bars", "v_latest", "signals", "dead_letters", *ROLLUPS):
                assert await reader.fetch(f"SELECT * FROM {name}") == []
            for refused in ("SELECT * FROM users", "DELETE FROM candles", "CREATE TABLE mine (x int)"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await reader.execute(refused)
        finally:
            await reader.close()
        # A table of a later version is granted when that version starts.
        await connection.execute(f'REVOKE SELECT ON signals FROM "{role}"')
        await apply(connection, settings)
        assert await connection.fetchval("SELECT has_table_privilege($1, 'signals', 'SELECT')", settings.reader_role)

    run(pg_url, work)


def test_without_the_right_to_make_roles_all_else_is_on(
    pg_url: str, postgres: PostgresServer, settings: Timescale
) -> None:
    user = f"u{uuid.uuid4().hex[:8]}"
    database = pg_url.rpartition("/")[2]
    postgres.sql(f"CREATE ROLE {user} LOGIN; ALTER DATABASE {database} OWNER TO {user}")

    async def work(connection: Any) -> None:
        notes = await apply(connection, settings)
        assert notes[0] == PLAIN
        assert notes[1].startswith(f"reader role off for {settings.reader_role}: permission denied to create role")
        assert len(notes) == 2
        assert await held(connection, "rollup_1h") == []
        assert (await plan(connection, settings))[-1].startswith("reader role: off: this user may not make roles")

    run(pg_url.replace("//postgres@", f"//{user}@"), work)


def test_what_is_in_the_way_of_one_feature_is_told_and_leaves_the_others(pg_url: str, settings: Timescale) -> None:
    async def work(connection: Any) -> None:
        await connection.execute("CREATE TABLE rollup_1h (mine int)")
        notes = await apply(connection, settings)
        assert notes == [PLAIN, 'roll-ups off for rollup_1h: relation "rollup_1h" already exists']
        assert await held(connection, "rollup_1d") == []
        assert await connection.fetchval("SELECT count(*) FROM rollup_1h") == 0

    run(pg_url, work)


def test_switched_off_there_are_none(pg_url: str) -> None:
    async def work(connection: Any) -> None:
        notes = await apply(connection, Timescale(rollups=False, reader_role=""))
        assert notes == ["TimescaleDB is not installed: plain tables, no compression, no retention"]
        assert not await connection.fetch("SELECT FROM pg_views WHERE viewname LIKE 'rollup%'")

    run(pg_url, work)


def test_sinks_that_start_together_do_not_meet(pg_url: str, settings: Timescale) -> None:
    async def work(_: Any) -> None:
        async def start() -> list[str]:
            connection = await connect(pg_url)
            try:
                return await apply(connection, settings)
            finally:
                await connection.close()

        assert await asyncio.gather(*(start() for _ in range(6))) == [[PLAIN]] * 6

    run(pg_url, work)


def test_the_plan_changes_nothing(pg_url: str, settings: Timescale) -> None:
    async def work(connection: Any) -> None:
        with Statements(connection) as told:
            lines = await plan(connection, settings)
        assert not told.changes
        why = "TimescaleDB is not installed"
        assert lines == [
            f"hypertables: off, plain tables: {why}",
            f"columnstore: off, no compression: {why}",
            f"retention: off, no retention: {why}",
            f"continuous aggregates: off, roll-ups are plain views: {why}",
            f"reader role: {settings.reader_role}, to be made",
        ]

    run(pg_url, work)


def test_a_lost_connection_is_no_missing_feature(pg_url: str, postgres: PostgresServer, settings: Timescale) -> None:
    async def work(connection: Any) -> None:
        killer = await connect(postgres.url())
        await killer.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
        await killer.close()
        with pytest.raises(StoreUnavailable), errors(pg_url):
            await apply(connection, settings)

    run(pg_url, work)


def test_no_value_is_lost_in_a_bucket_without_trades(pg_url: str, settings: Timescale) -> None:
    async def work(connection: Any) -> None:
        quiet = [row for row in candles(START, 60) if row[8] == 0.0]
        await store(connection, quiet)
        await apply(connection, settings)
        (first, *_) = await held(connection, "rollup_1d")
        assert first[3:10] == (None, None, None, None, 0.0, 0, None)

    run(pg_url, work)


def test_what_versions_and_builds_lack() -> None:
    everything = set(MEANING)
    assert set(Server("public").lacks) == everything
    assert "shared_preload_libraries" in Server("public", offered=True).lacks["retention"]
    assert set(Server("public", (2, 12, 1)).lacks) == everything
    assert Server("public", (2, 17, 2)).lacks == {"columnstore": "TimescaleDB 2.17.2 is older than 2.18"}
    assert set(Server("public", (2, 17, 2), apache=True).lacks) == everything - {"hypertables"}
    assert Server("public", (2, 29, 2)).lacks == {}
    assert Server("public", (3, 0)).lacks == {}
