"""`tapeline migrate`: what it would do, what it did, and stores that it leaves alone."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from services.sink_sqlite.schema import migrations as sqlite_migrations
from services.sink_timescale.schema import migrations as postgres_migrations
from shared.cli import App, fail
from shared.cli_migrate import migrate
from shared.errors import StoreUnavailable, VersionError
from shared.settings import load
from tests.postgres import PostgresServer

STEPS = [f"{step.version:04d} {step.name}" for step in sqlite_migrations()]


def run(*args: str, **environ: str) -> Result:
    app = App(None)
    app.__dict__["settings"] = load(environ=environ)
    return CliRunner().invoke(migrate, args, obj=app)


def told(*args: str) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    out: dict[str, Any] = json.loads(result.output)
    return out


def refused(result: Result, capsys: pytest.CaptureFixture[str]) -> tuple[type[BaseException], int, str]:
    """The error, the program's exit code and what it says."""
    assert result.output == ""
    assert result.exception is not None
    code = fail(result.exception)
    return type(result.exception), code, capsys.readouterr().err


def test_a_plan_makes_no_file_and_migrating_does_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    url = f"sqlite:///{path}"
    shown = run("--store", url, "--plan").output.splitlines()
    latest = len(STEPS)
    assert shown == [
        f"SQLite {path}",
        f"the schema is at version 0, this program wants {latest}",
        *(f"  to do: {step}" for step in STEPS),
        "  the file does not exist yet",
    ]
    assert list(tmp_path.iterdir()) == []
    shown = run(DATABASE_URL=url).output.splitlines()
    assert shown == [
        f"SQLite {path}",
        f"the schema is now at version {latest}, it was at 0",
        *(f"  done: {step}" for step in STEPS),
    ]
    for args in ("--plan",), ():
        assert run("--store", url, *args).output.splitlines() == [
            f"SQLite {path}", f"the schema is at version {latest}: nothing to do"
        ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["rows.db"]


def test_an_older_store_is_shown_the_rest_with_its_sql(tmp_path: Path) -> None:
    path = tmp_path / "rows.db"
    first, *rest = sqlite_migrations()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(first.sql)
        connection.execute("CREATE TABLE schema_version (version INTEGER PRIMARY KEY, name TEXT, at TEXT)")
        connection.execute("INSERT INTO schema_version VALUES (1, 'initial', '')")
        connection.commit()
    before = path.read_bytes()
    plan = told("--store", f"sqlite:///{path}", "--plan", "--sql")
    assert (plan["held"], plan["wanted"], plan["applied"]) == (1, len(STEPS), False)
    assert plan["steps"] == [{"version": step.version, "name": step.name, "sql": step.sql} for step in rest]
    text = run("--store", f"sqlite:///{path}", "--plan", "--sql").output
    assert "    CREATE TABLE candles (\n" in text
    assert path.read_bytes() == before
    done = told("--store", f"sqlite:///{path}")
    assert done["applied"]
    assert done["steps"] == [{"version": step.version, "name": step.name} for step in rest]


def test_a_newer_store_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.db"
    run("--store", f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO schema_version VALUES (99, 'later', '')")
        connection.commit()
    for args in ("--plan",), ():
        kind, code, line = refused(run("--store", f"sqlite:///{path}", *args), capsys)
        assert (kind, code) == (VersionError, 78)
        assert line.startswith(f"tapeline: SQLite {path} is of schema version 99, this program knows up to")
        assert line.count("\n") == 1


def test_what_is_no_store_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.db"
    path.write_text("not a database at all, but long enough to be read as the header of one" * 20)
    assert refused(run("--store", f"sqlite:///{path}", "--plan"), capsys)[1] == 78
    assert refused(run("--store", f"sqlite:///{tmp_path}/none/rows.db", "--plan"), capsys)[1] == 78


def test_postgresql_is_planned_migrated_and_planned_again(
    pg_url: str, postgres: PostgresServer, capsys: pytest.CaptureFixture[str]
) -> None:
    database, latest = pg_url.rpartition("/")[2], len(postgres_migrations())
    plan = told("--store", pg_url, "--plan")
    assert plan["store"] == f"PostgreSQL 127.0.0.1:{postgres.port}/{database}"
    assert (plan["held"], plan["wanted"], plan["applied"]) == (0, latest, False)
    assert [step["version"] for step in plan["steps"]] == list(range(1, latest + 1))
    assert "hypertables: off, plain tables: TimescaleDB is not installed" in plan["notes"]
    relations = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert postgres.sql(relations, database) == "0"
    done = told("--store", pg_url)
    assert (done["held"], done["applied"], done["steps"]) == (0, True, plan["steps"])
    assert done["notes"][0].startswith("TimescaleDB is not installed: plain tables")
    assert postgres.sql("SELECT count(*) FROM rollup_1h", database) == "0"
    again = told("--store", pg_url, "--plan")
    assert (again["held"], again["steps"]) == (latest, [])
    assert again["notes"][-1] == "reader role: tapeline_reader"
    postgres.sql("INSERT INTO schema_version VALUES (99, 'later')", database)
    for args in ("--plan",), ():
        kind, code, line = refused(run("--store", pg_url, *args), capsys)
        assert (kind, code) == (VersionError, 78)
        assert "is of schema version 99" in line


def test_a_server_that_does_not_answer_is_a_line_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    kind, code, line = refused(run("--store", "postgresql://me:hunter2@127.0.0.1:1/rows", "--plan"), capsys)
    assert (kind, code) == (StoreUnavailable, 1)
    assert line.startswith("tapeline: PostgreSQL 127.0.0.1:1/rows does not answer")
    assert line.count("\n") == 1
    assert "hunter2" not in line
