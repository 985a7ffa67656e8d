"""Features on a real TimescaleDB, Community or Apache build: TAPELINE_TEST_TIMESCALE_URL names a server's database.

Each test makes a database of its own there, and drops it. Policies' jobs run in the background, so no row is older
than a retention that is set.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from services.sink_timescale import rollups
from services.sink_timescale.features import apply, plan
from services.sink_timescale.parts import LAYOUTS
from services.sink_timescale.rollups import ROLLUPS
from services.sink_timescale.statements import FORGET_TICKS
from shared.postgres import connect
from shared.settings import Timescale
from tests.services.sink_timescale.featured import Row, Statements, candles, held, make_tables, rolled, store

URL = os.environ.get("TAPELINE_TEST_TIMESCALE_URL", "")
pytestmark = pytest.mark.skipif(not URL, reason="TAPELINE_TEST_TIMESCALE_URL names no TimescaleDB")

APACHE = (
    "the Apache build of TimescaleDB is without the columnstore, retention and continuous aggregates: "
    "no compression, no retention, roll-ups are plain views"
)
SETTINGS = Timescale(reader_role="")
# Half a day past, so that buckets of both lengths have settled.
START = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=14, hours=3, minutes=30)
Work = Callable[[Any], Awaitable[None]]


def run(work: Work, prepare: str = "SELECT") -> None:
    """Run it with a connection to a database that has the tables, after `prepare`, and no extension."""

    async def all_of_it() -> None:
        name = f"t{uuid.uuid4().hex[:10]}"
        admin = await connect(URL)
        await admin.execute(f"CREATE DATABASE {name}")
        try:
            connection = await connect(URL.rpartition("/")[0] + f"/{name}")
            try:
                await connection.execute(prepare)
                await make_tables(connection)
                await work(connection)
            finally:
                await connection.close()
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await admin.close()

    asyncio.run(all_of_it())


async def is_community(connection: Any) -> bool:
    """Known once the extension is there."""
    return bool(await connection.fetchval("SELECT current_setting('timescaledb.license') = 'timescale'"))


async def policies(connection: Any, procedure: str, key: str) -> dict[str, Any]:
    rows = await connection.fetch(
        "SELECT hypertable_name, (config ->> $2)::interval FROM timescaledb_information.jobs WHERE proc_name = $1",
        procedure, key,
    )  # fmt: skip
    return dict(map(tuple, rows))


def test_all_that_this_build_has_is_on_and_a_second_time_changes_nothing() -> None:
    async def work(connection: Any) -> None:
        before = await plan(connection, SETTINGS)
        assert before[0].startswith("TimescaleDB: to be installed")
        notes = await apply(connection, SETTINGS)
        community = await is_community(connection)
        assert notes == ([] if community else [APACHE])
        rows = await connection.fetch("SELECT hypertable_name, time_interval FROM timescaledb_information.dimensions "
                                      "WHERE hypertable_schema = 'public'")  # fmt: skip
        assert dict(map(tuple, rows)) == dict.fromkeys(LAYOUTS, timedelta(days=1))
        ticks = {name for name, layout in LAYOUTS.items() if layout.ticks}
        assert len(ticks) == 5
        assert len(LAYOUTS) == 11
        day = timedelta(days=1)
        compressed = await policies(connection, "policy_compression", "compress_after")
        assert compressed == (dict.fromkeys(LAYOUTS, 7 * day) if community else {})
        dropped = await policies(connection, "policy_retention", "drop_after")
        assert dropped == (dict.fromkeys(ticks, 30 * day) if community else {})
        with Statements(connection) as told:
            assert await apply(connection, SETTINGS) == notes
        assert told.texts
        assert not told.changes
        lines = await plan(connection, SETTINGS)
        assert lines[0].startswith("TimescaleDB 2.")
        assert "hypertables: on, chunks of 1 day" in lines
        if community:
            assert "columnstore: on, for chunks older than 7 days" in lines
            assert "retention: candles, pressure and signals off by the settings, ticks of 30 days" in lines
            assert "continuous aggregates: on, rollup_1h, rollup_1d" in lines
        else:
            assert f"columnstore: off, no compression: {APACHE.partition(':')[0]}" in lines

    run(work)


def test_the_reader_reads_hypertables_and_rollups() -> None:
    role = f"r{uuid.uuid4().hex[:8]}"

    async def work(connection: Any) -> None:
        await store(connection, candles(START, 100))
        await apply(connection, Timescale(reader_role=role))
        await connection.execute(f"SET ROLE {role}")
        for name in (*LAYOUTS, *ROLLUPS, "v_latest", "ohlc_bars"):
            assert bool(await connection.fetch(f"SELECT * FROM {name} LIMIT 1")) == (
                name in ("candles", *ROLLUPS, "v_latest", "ohlc_bars")
            )
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("DELETE FROM candles")
        await connection.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")

    run(work)


def test_a_user_who_may_not_install_it_goes_on_without() -> None:
    user = f"u{uuid.uuid4().hex[:8]}"

    async def work(connection: Any) -> None:
        assert (await plan(connection, SETTINGS))[0].startswith("TimescaleDB: this user may not install it")
        notes = await apply(connection, SETTINGS)
        assert notes[0].startswith("TimescaleDB is not installed: plain tables, no compression, no retention")
        assert notes[1].startswith("CREATE EXTENSION is refused: permission denied")
        assert len(notes) == 2
        assert await held(connection, "rollup_1d") == []
        await connection.execute(f"RESET ROLE; DROP OWNED BY {user}; DROP ROLE {user}")

    run(work, f"CREATE ROLE {user}; GRANT CREATE, USAGE ON SCHEMA public TO {user}; SET ROLE {user}")


def test_other_settings_replace_what_there_was() -> None:
    async def work(connection: Any) -> None:
        await apply(connection, SETTINGS)
        day, community = timedelta(days=1), await is_community(connection)
        changed = Timescale(
            chunk_days=2, compress_after_days=0, retention_days=90, ticks_retention_days=0, reader_role=""
        )
        await apply(connection, changed)
        lengths = await connection.fetch("SELECT DISTINCT time_interval FROM timescaledb_information.dimensions "
                                         "WHERE hypertable_schema = 'public'")  # fmt: skip
        assert [row[0] for row in lengths] == [2 * day]
        if not community:
            return
        assert not await policies(connection, "policy_compression", "compress_after")
        rows = {name for name, layout in LAYOUTS.items() if not layout.ticks}
        assert await policies(connection, "policy_retention", "drop_after") == dict.fromkeys(rows, 90 * day)
        # A refresh that looked back farther than candles are kept would empty the roll-ups there.
        starts = await policies(connection, "policy_refresh_continuous_aggregate", "start_offset")
        assert starts == dict.fromkeys(ROLLUPS, 90 * day)
        with Statements(connection) as told:
            await apply(connection, changed)
        assert not told.changes
        assert await apply(connection, Timescale(retention_days=2, reader_role="")) == []
        starts = await policies(connection, "policy_refresh_continuous_aggregate", "start_offset")
        assert starts == {"rollup_1h": 2 * day}  # two days are not two whole days and the one that settles
        assert await apply(connection, SETTINGS) == []
        starts = await policies(connection, "policy_refresh_continuous_aggregate", "start_offset")
        assert starts == dict.fromkeys(ROLLUPS)

    run(work)


def test_a_plain_store_gets_timescaledb_later_with_its_rows() -> None:
    async def work(connection: Any) -> None:
        rows = candles(START, 3000)
        await store(connection, rows)
        for name in ROLLUPS:
            for statement in rollups.plain("public", name):
                await connection.execute(statement)
        plain = {name: await held(connection, name) for name in ROLLUPS}
        await apply(connection, SETTINGS)
        assert await connection.fetchval("SELECT count(*) FROM candles") == len(rows)
        assert await connection.fetchval("SELECT count(*) FROM ONLY candles") == 0
        found = {row[0] for row in await connection.fetch(
            "SELECT view_name FROM timescaledb_information.continuous_aggregates"
        )}  # fmt: skip
        assert found == (set(ROLLUPS) if await is_community(connection) else set())
        for name, rollup in ROLLUPS.items():
            assert await held(connection, name) == plain[name] == rolled(rows, rollup.length)

    run(work)


def test_rollups_agree_live_and_stored_and_outlive_dropped_candles() -> None:
    async def work(connection: Any) -> None:
        await connection.execute("SET TIME ZONE 'America/New_York'")
        assert await apply(connection, SETTINGS) in ([], [APACHE])
        rows = candles(START, 3000)
        await store(connection, rows)
        expected = {name: rolled(rows, rollup.length) for name, rollup in ROLLUPS.items()}
        for name in ROLLUPS:
            assert await held(connection, name) == expected[name]
        if not await is_community(connection):
            return
        for name in ROLLUPS:
            await stored_now(connection, name)
            assert await held(connection, name) == expected[name]
        await connection.execute("SELECT drop_chunks('candles', older_than => INTERVAL '5 days')")
        assert await connection.fetchval("SELECT count(*) FROM candles") == 0
        for name in ROLLUPS:
            # As the policy does where `retention_days` is 5.
            await connection.execute(
                f"CALL refresh_continuous_aggregate('{name}', now() - INTERVAL '5 days', now() - INTERVAL '1 day')"
            )
            assert await held(connection, name) == expected[name]

    run(work)


async def stored_now(connection: Any, name: str) -> None:
    """What the policy does, without waiting for it (nor meeting it)."""
    await connection.execute(f"SELECT remove_continuous_aggregate_policy('{name}', if_exists => true)")
    await connection.execute(f"CALL refresh_continuous_aggregate('{name}', NULL, now() - INTERVAL '1 day')")


def test_a_correction_into_a_compressed_chunk_is_stored_and_rolled_up() -> None:
    async def work(connection: Any) -> None:
        # Too late for the background job to come between.
        await apply(connection, Timescale(compress_after_days=1000, reader_role=""))
        if not await is_community(connection):
            pytest.skip("the Apache build does not compress")
        rows = candles(START, 3000)
        await store(connection, rows)
        for name in ROLLUPS:
            await stored_now(connection, name)
        chunks = await connection.fetch("SELECT show_chunks('candles')::text")
        for (chunk,) in chunks:
            await connection.execute(f"CALL convert_to_columnstore('{chunk}')")
        packed = await connection.fetchval("SELECT count(*) FROM timescaledb_information.chunks WHERE is_compressed")
        assert packed == len(chunks) > 2

        def corrected(row: Row, revision: int, close: float) -> Row:
            return (*row[:7], close, row[8] + 2.0, *row[9:16], revision, *row[17:])

        # Of many segments and batches: every third row, of which every ninth comes as an older revision again.
        later = {row[:4]: corrected(row, 2, 101.25) for row in rows[::3] if row[4] is not None}
        await store(connection, later.values())
        await store(connection, [corrected(row, 1, 55.0) for row in rows[::9] if row[4] is not None])
        await store(connection, later.values())
        final = [later.get(row[:4], row) for row in rows]
        kept = await connection.fetch(
            "SELECT exchange, symbol, timeframe, timestamp_in, close, volume, revision FROM candles"
        )
        assert sorted(map(tuple, kept)) == sorted((*row[:4], row[7], row[8], row[16]) for row in final)
        for name, rollup in ROLLUPS.items():
            await stored_now(connection, name)
            assert await held(connection, name) == rolled(final, rollup.length)

    run(work)


def test_ticks_that_come_again_into_a_compressed_chunk_are_stored_once() -> None:
    async def work(connection: Any) -> None:
        await apply(connection, SETTINGS)
        if not await is_community(connection):
            pytest.skip("the Apache build does not compress")
        insert = (
            "INSERT INTO ticks_trades (timestamp, timestamp_ns, local_timestamp_ns, exchange, symbol, price, amount, "
            "side, sequence, bus, partition, entry_ms, entry_seq, row) SELECT $1::timestamptz + i * interval '1 ms', "
            "i, i, 'GLBX', 'NQZ5', i, 1, 'BUY', i, 'b', i % 3, i / 100, 0, i % 100 FROM generate_series($2::int, $3) i "
            "ON CONFLICT DO NOTHING"
        )
        await connection.execute(insert, START, 1, 4000)
        for (chunk,) in await connection.fetch("SELECT show_chunks('ticks_trades')::text"):
            await connection.execute(f"CALL convert_to_columnstore('{chunk}')")
        async with connection.transaction():
            await connection.execute("SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0")
            assert await connection.execute(insert, START, 3001, 5000) == "INSERT 0 1000"
        assert tuple(await connection.fetchrow("SELECT count(*), sum(price) FROM ticks_trades")) == (5000, 12502500.0)
        async with connection.transaction():
            await connection.execute("SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0")
            for sql in FORGET_TICKS:  # what the bus has lost behind its entry 29-0, of one partition
                await connection.execute(sql, "b", 1, 29, 0)
        left = [i for i in range(1, 5001) if i % 3 != 1 or i // 100 <= 29]
        assert await connection.fetchval("SELECT count(*) FROM ticks_trades") == len(left)

    run(work)


def test_sinks_that_start_together_do_not_meet() -> None:
    async def work(connection: Any) -> None:
        url = URL.rpartition("/")[0] + "/" + await connection.fetchval("SELECT current_database()")
        await store(connection, candles(START, 600))

        async def start() -> list[str]:
            own = await connect(url)
            try:
                return await apply(own, SETTINGS)
            finally:
                await own.close()

        notes = await asyncio.gather(*(start() for _ in range(4)))
        assert all(found == notes[0] for found in notes)
        assert notes[0] in ([], [APACHE])

    run(work)


def test_functions_in_a_schema_of_their_own_and_tables_in_another() -> None:
    prepare = (
        'CREATE SCHEMA ts; CREATE EXTENSION timescaledb SCHEMA ts; CREATE SCHEMA "My tape"; SET search_path = "My tape"'
    )

    async def work(connection: Any) -> None:
        rows = candles(START, 600)
        await store(connection, rows)
        assert await apply(connection, SETTINGS) in ([], [APACHE])
        for name, rollup in ROLLUPS.items():
            assert await held(connection, name) == rolled(rows, rollup.length)
        with Statements(connection) as told:
            await apply(connection, SETTINGS)
        assert not told.changes

    run(work, prepare)


def test_a_view_upon_a_plain_rollup_keeps_it_plain_and_all_else_is_on() -> None:
    async def work(connection: Any) -> None:
        for statement in rollups.plain("public", "rollup_1h"):
            await connection.execute(statement)
        await connection.execute("CREATE VIEW mine AS SELECT close FROM rollup_1h")
        notes = await apply(connection, SETTINGS)
        if not await is_community(connection):
            assert notes == [APACHE]
            return
        assert len(notes) == 1
        assert notes[0].startswith("continuous aggregates off for rollup_1h: cannot drop view rollup_1h because")
        found = await connection.fetch("SELECT view_name FROM timescaledb_information.continuous_aggregates")
        assert [row[0] for row in found] == ["rollup_1d"]
        assert await connection.fetch("SELECT * FROM mine") == []

    run(work)
