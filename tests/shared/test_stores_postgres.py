"""What is read from a PostgreSQL store: the same as from SQLite, and errors of one line."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner

from services.signals.worker import stored
from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.schema import migrations
from services.sink_timescale.statements import WRITTEN
from services.sink_timescale.store import TimescaleStore
from shared import registry, store_postgres, stores
from shared.cli import cli
from shared.errors import AuthError, ConfigError, StoreUnavailable, VersionError
from shared.explain import explain, find
from shared.frames import NS
from shared.settings import Settings
from shared.stores import newest_cvds, read_rows
from shared.stores_check import check_store
from shared.usage_book import stored_day
from tests.postgres import PostgresServer, free_port
from tests.services.sink_sqlite.tape import T0, T_WINDOW, WINDOW, candles, rows
from tests.services.sink_timescale.tables import OWN, VIEWS, batch, story

BOTH = pytest.mark.parametrize("postgres", ["16", "18"], indirect=True)
# A summary of instants, of which PostgreSQL keeps microseconds; values as the store would have had them.
CUT = {**OWN, "late_counts": {"first", "last"}, "dead_letters": {*OWN["dead_letters"], "row"}}


@pytest.fixture
def filled(pg_url: str, tmp_path: Path) -> tuple[str, str]:
    """(SQLite, PostgreSQL) with the same rows in every table."""
    path = tmp_path / "store.db"
    lite, store = SqliteStore(path), TimescaleStore(pg_url)
    lite.open()
    store.open()
    for each in story():
        lite.write(each)
        store.write(each)
    lite.close()
    store.close()
    return f"sqlite:///{path}", pg_url


def asked(table: str) -> Iterator[dict[str, Any]]:
    """Ways to ask for rows of a table."""
    yield {}
    yield {"last": 3}
    yield {"since": "2023-12-25T23:01:03Z", "until": "2023-12-25T23:05:00.000000001Z", "last": 5}
    yield {"since": "2023-12-25T23:01:00.000005007Z", "until": "2023-12-25T23:01:00.000009008Z"}
    if table.startswith("candles_1"):
        yield {"where": {"ticker": "ES", "complete": 1, "trades": 3}, "columns": ["time", "complete", "close"]}
    if table == "pressure_metrics":
        where = {"underlying": "NQ", "expiration": "2024-03-29T08:00:00Z", "strike": "17000.5"}
        yield {"where": where, "columns": ["time_window", "log_ratio"]}
    if table.startswith("ticks_"):
        yield {"where": {"timestamp": "2023-12-25T23:01:00.000005007Z"}, "columns": ["timestamp", "symbol"]}


@BOTH
def test_every_store_tells_the_same(filled: tuple[str, str]) -> None:
    lite, server = filled
    answers = 0
    for table in (*WRITTEN, *VIEWS):
        own = CUT.get(table, set())
        for question in asked(table):
            if question and table in ("sink_cursors", "late_counts", "dead_letters"):
                continue  # has no time, or that of the moment
            ours, theirs = (
                [{c: v for c, v in row.items() if c not in own} for row in read_rows(url, table, **question)]
                for url in filled
            )
            assert ours == theirs, (table, question)
            assert json.dumps(ours) == json.dumps(theirs)  # and of the same types
            assert ours or question, table
            answers += len(ours) if question else 0
    assert answers > 100
    names = {
        name: T0 + second * NS
        for second in (900, 3)
        for name in ("ES", "6E", "ESH4", "binance-futures:BTCUSDT", "deribit:BTC-PERPETUAL", "deribit:X", "GC")
    }
    assert newest_cvds(server, names) == newest_cvds(lite, names)
    assert newest_cvds(server, names).keys() == {"ES", "6E"}
    later = {name: at + 9000 * NS for name, at in names.items()}
    assert newest_cvds(server, later) == newest_cvds(lite, later)
    assert newest_cvds(server, later).keys() == {"ES", "6E", "binance-futures:BTCUSDT", "deribit:BTC-PERPETUAL"}


def test_who_reads_the_store_reads_this_one_too(filled: tuple[str, str]) -> None:
    # Baselines of the signals stage, and the budget of ingest: the latter inside a running event loop.
    history, same = (stored(url)("NQ", WINDOW, T_WINDOW, T_WINDOW + 2 * WINDOW * NS) for url in filled)
    assert history.keys() == same.keys() == {T_WINDOW, T_WINDOW + WINDOW * NS}
    assert all((history[at] == same[at]).all() for at in history)

    async def inside() -> Any:
        return stored_day(filled[1], "databento", "2023-12-25")

    assert asyncio.run(inside()) == stored_day(filled[0], "databento", "2023-12-25") is not None
    for table in ("candles", "signals"):
        found = [find(url, table, {"complete": "1"}, 2) for url in filled]
        assert found[0] == found[1] != []
        assert [explain(filled[0], table, r) for r in found[0]] == [explain(filled[1], table, r) for r in found[1]]
    with pytest.raises(ConfigError, match="strike wants a number, not 'much'"):
        read_rows(filled[1], "pressure_metrics", {"strike": "much"})


def test_queries_go_by_the_index(filled: tuple[str, str], postgres: PostgresServer) -> None:
    database = filled[1].rpartition("/")[2]
    postgres.sql("ANALYZE", database)

    def plan(sql: str, *values: str) -> str:
        for i, value in enumerate(values):
            sql = sql.replace(f"${i + 1}", value)
        return postgres.sql(f"SET enable_seqscan = off; SET enable_bitmapscan = off; EXPLAIN {sql}", database)

    names = ("ARRAY['ES']", f"ARRAY[to_timestamp({T0 // NS + 9})]")
    told = plan(store_postgres._OF_TICKERS.format(table="candles_1m"), *names)
    assert "Index Scan Backward using candles_1m_pkey" in told
    told = plan(store_postgres._OF_TICKERS.format(table="candles_1s"), *names)
    assert "Index Scan Backward using candles_1s_ticker" in told
    one = ("ARRAY['a:b']", "ARRAY['a']", "ARRAY['b']", "ARRAY['1m']")
    assert "Index Only Scan using candles_pkey" in plan(store_postgres._TIMEFRAMES, *one[:3])
    told = plan(store_postgres._OF_CONTRACTS.format(which=store_postgres._BY_KEY), *one, names[1])
    assert "Index Scan Backward using candles_pkey" in told
    # What hypertables are asked gives the same, chunks or not.
    found = store_postgres._OF_TICKERS.format(table="candles_1m").replace("$1", names[0]).replace("$2", names[1])
    in_chunks = store_postgres._OF_TICKERS_IN_CHUNKS.format(table="candles_1m")
    in_chunks = in_chunks.replace("$1", names[0]).replace("$2", names[1])
    assert postgres.sql(found, database) == postgres.sql(in_chunks, database) == "ES|30"


def test_the_newest_of_a_series_is_found_by_its_key(
    pg_url: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TimescaleStore(pg_url)
    store.open()
    store.write(batch(candles(rows(400))))
    store.close()
    postgres.sql("ANALYZE", pg_url.rpartition("/")[2])
    plans: list[str] = []
    fetch = asyncpg.Connection.fetch

    async def explained(self: Any, sql: str, *values: Any, **more: Any) -> Any:
        if sql.startswith('SELECT "time"'):
            plans.append("\n".join(row[0] for row in await fetch(self, f"EXPLAIN {sql}", *values)))
        return await fetch(self, sql, *values, **more)

    monkeypatch.setattr(asyncpg.Connection, "fetch", explained)
    for ticker, count in (("ES", 2), ("GC", 0)):
        assert len(read_rows(pg_url, "candles_1m", {"ticker": ticker}, last=2)) == count
        assert "Index Scan Backward using candles_1m_pkey" in plans.pop()


def test_what_is_not_there_holds_nothing(pg_url: str, postgres: PostgresServer) -> None:
    database = pg_url.rpartition("/")[2]
    for url in (pg_url, postgres.url("nowhere")):
        assert read_rows(url, "candles_1m", {"ticker": "ES"}, last=1) == []
        assert newest_cvds(url, {"ES": T0, "a:b": T0}) == {}
    postgres.sql(f"ALTER DATABASE {database} SET search_path TO missing", database)
    assert read_rows(pg_url, "candles_1m") == []
    with pytest.raises(ConfigError, match="no schema of the user's search_path exists"):
        check_store(pg_url)
    with pytest.raises(ConfigError, match="no table or column"):
        read_rows(pg_url, 'gaps"; DROP TABLE gaps; --')


def test_what_a_server_refuses_is_said_in_a_line(
    pg_url: str, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = pg_url.rpartition("/")[2]
    assert "no tables yet: the sink or `tapeline migrate` makes them (schema version" in check_store(pg_url)
    store = TimescaleStore(pg_url)
    store.open()
    store.close()
    newest = migrations()[-1].version
    said = check_store(pg_url)
    assert said == f"PostgreSQL 127.0.0.1:{postgres.port}/{database} is {said.split(' is ')[1].split(',')[0]}, " + (
        f"plain PostgreSQL, schema version {newest}"
    )
    role = f"r{database}"
    postgres.sql(f"CREATE ROLE {role} LOGIN", database)
    try:
        url = postgres.url(database, role)
        with pytest.raises(ConfigError, match=r"permission denied.*; grant it"):
            read_rows(url, "candles_1m")
        with pytest.raises(ConfigError, match=f"{role} may not write candles, .*GRANT SELECT, INSERT"):
            check_store(url)
        postgres.sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}", database)
        assert f"schema version {newest}" in check_store(url)
        postgres.sql(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC", database)
        with pytest.raises(ConfigError, match="GRANT TEMPORARY ON DATABASE"):
            check_store(url)
        postgres.sql(f"DELETE FROM schema_version WHERE version = {newest}", database)
        assert f"schema version {newest - 1}: will be migrated to {newest}" in check_store(pg_url)
        with pytest.raises(ConfigError, match="GRANT CREATE ON SCHEMA"):
            check_store(url)
    finally:
        postgres.sql(f"DROP OWNED BY {role}; DROP ROLE {role}", database)
    postgres.sql(f"INSERT INTO schema_version (version, name) VALUES ({newest + 1}, 'later')", database)
    with pytest.raises(VersionError, match="upgrade Tapeline"):
        check_store(pg_url)
    with pytest.raises(ConfigError, match="does not exist; create it"):
        check_store(postgres.url("nowhere"))
    # As `doctor` prints it.
    monkeypatch.setenv("TAPELINE_STORE", pg_url)
    findings = {f["check"]: f for f in json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)}
    assert not findings["store"]["fine"]
    assert f"knows up to {newest}: upgrade Tapeline" in findings["store"]["says"]


def test_wrong_credentials_and_servers_that_are_down(postgres: PostgresServer, tmp_path: Path) -> None:
    hba = postgres.data / "pg_hba.conf"
    kept = hba.read_text()
    try:
        hba.write_text("host all bob 127.0.0.1/32 scram-sha-256\n" + kept)
        postgres.sql("CREATE ROLE bob LOGIN PASSWORD 's3cret'; SELECT pg_reload_conf()")
        url = postgres.url("postgres", "bob", "wr0ng")
        for call in (lambda: read_rows(url, "gaps"), lambda: newest_cvds(url, {"ES": T0}), lambda: check_store(url)):
            with pytest.raises(AuthError, match="check the name and password in TAPELINE_STORE") as error:
                call()
            assert "wr0ng" not in str(error.value)
            assert "\n" not in str(error.value)
        assert read_rows(postgres.url("postgres", "bob", "s3cret"), "candles") == []
    finally:
        hba.write_text(kept)
        postgres.sql("DROP ROLE bob; SELECT pg_reload_conf()")
    nobody = f"postgresql://a:s3cret@127.0.0.1:{free_port()}/x"
    for call in (lambda: read_rows(nobody, "gaps"), lambda: check_store(nobody)):
        with pytest.raises(StoreUnavailable, match="does not answer") as error:
            call()
        assert "s3cret" not in str(error.value)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"postgresql://127.0.0.1:{deaf.getsockname()[1]}/x?sslmode=disable"
        connect = store_postgres.connect
        assert connect.__kwdefaults__["timeout"] <= 10
        monkeypatch.setattr(store_postgres, "connect", lambda url, **more: connect(url, timeout=0.2, **more))
        with pytest.raises(StoreUnavailable, match="does not answer"):
            read_rows(url, "gaps")


def test_bigquery_is_read_by_its_own_service(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []

    def resolve(path: str) -> Any:
        named.append(path)
        return lambda *given, **more: [{"given": given, **more}] if "rows" in path else {"ES": 1.0}

    monkeypatch.setattr(stores, "resolve", resolve)
    (row,) = read_rows("bigquery://p/d", "gaps", {"feed": "x"}, last=2, columns=["feed"])
    assert row == {"given": ("bigquery://p/d", "gaps", {"feed": "x"}), "since": None, "until": None, "last": 2,
                   "columns": ["feed"]}  # fmt: skip
    assert newest_cvds("bigquery://p/d", {"ES": T0}) == {"ES": 1.0}
    assert named == ["services.sink_bigquery.reading:read_rows", "services.sink_bigquery.reading:newest_cvds"]
    assert check_store("bigquery://p/d") == "bigquery://p/d"


def test_doctor_asks_and_proves_bigquery(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(settings: Settings) -> str:
        return f"dataset of {settings.tapeline.store}"

    def prove(settings: Settings) -> Iterator[tuple[str, bool, str]]:
        yield "load job", True, "stored once"
        yield "stream", False, "stored twice"
        raise ConfigError(f"{settings.bigquery.project}: no quota")

    monkeypatch.setattr(registry, "resolve", lambda path: {"check": check, "prove": prove}[path.rpartition(":")[2]])
    monkeypatch.setenv("TAPELINE_STORE", "bigquery://p/d")
    findings = {f["check"]: f for f in json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)}
    assert findings["store"] == {"check": "store", "fine": True, "state": "ok",
                                 "says": "dataset of bigquery://p/d"}  # fmt: skip
    assert "bigquery" not in findings
    monkeypatch.setenv("TAPELINE_STORE", "sqlite:///x.db")
    monkeypatch.setenv("GCP_PROJECT_ID", "p")
    monkeypatch.setenv("BIGQUERY_DATASET", "d")
    findings = {f["check"]: f for f in json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)}
    assert findings["bigquery"]["says"] == "dataset of sqlite:///x.db"
    proved = CliRunner().invoke(cli, ["doctor", "--bigquery"])
    assert proved.exit_code == 1
    assert proved.output.splitlines() == [
        "ok    load job: stored once", "FAIL  stream: stored twice", "FAIL  bigquery: p: no quota"
    ]  # fmt: skip
