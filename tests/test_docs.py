"""The documentation is true: what it lists is what the code has, and what it shows works."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from services.aggregate.layout import COUNTERS
from services.alerts import rules
from services.alerts.channels import message_of
from services.ingest import gate, tardis_decode, tardis_pass
from services.ingest.normalize import REASONS
from services.ingest.publisher import PublisherOutput
from services.pressure import layout as pressure_layout
from services.signals import baseline, core, plugins, score
from services.sink_bigquery import costs, doctor, ledger, views
from services.sink_bigquery.tables import EVERY, LAYOUTS, LEDGER_LAYOUT
from services.sink_sqlite.schema import migrate
from services.sink_timescale import server as timescale_server
from services.sink_timescale.rollups import ROLLUPS
from services.sink_timescale.store import TimescaleStore
from services.web import app, outbox
from services.web import live as web_live
from services.web import worker as web_worker
from shared import (
    alerts,
    client,
    client_stream,
    dataframes,
    errors,
    import_files,
    live,
    messages,
    metrics,
    reader,
    registry,
    stores,
    usage,
)
from shared.api_rows import key_of
from shared.bus import Bus
from shared.cli import cli
from shared.cli_run import EX_TEMPFAIL
from shared.frames import CANDLE, FEATURE_COLUMNS, FIXED, LATE, NS, PACKED, ROW_KINDS, TICK, Frame
from shared.heartbeat import Beat
from shared.keys import TOPICS, Keys
from shared.log import JsonFormatter, Masker
from shared.plugins import GROUP
from shared.postgres import connect, run
from shared.settings import ALIASES, BIGQUERY_METHODS, NOT_SETTINGS, SECTIONS, AlertRule, Settings, env_name, load
from shared.sink import Store
from shared.stages import STAGES, readers
from shared.tables import MESSAGE_TABLES, TABLES
from tests.deploy.known_metrics import known_metrics, metrics_of
from tests.services.sink_sqlite.tape import Stage, bars, candles, fixed, rows, sinking, stored_seq
from tests.serving import Served, Serving
from tests.shared.test_reader_follow import deploy
from tests.wait import until

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
FILES = ("conf", "db", "js", "json", "log", "md", "pid", "py", "service", "toml")
SETTINGS = [(section, name) for section, kind in SECTIONS.items() for name in kind.__struct_fields__]


def page(name: str) -> str:
    return (DOCS / name).read_text()


def sections(text: str) -> dict[str, str]:
    """Level-2 heading -> what stands below it."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table_rows(text: str) -> Iterator[list[str]]:
    """Cells of every table row (`\\|` is part of a cell)."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|- "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def quoted(text: str) -> list[str]:
    """Everything in backticks."""
    return re.findall(r"`([^`]+)`", text)


def prose(text: str) -> str:
    """Without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def blocks(language: str) -> list[Any]:
    """Fenced code blocks of a language on all pages."""
    return [
        pytest.param(body, id=f"{path.relative_to(ROOT)}:{number}")
        for path in PAGES
        for number, body in enumerate(re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S), 1)
    ]


# -- commands ------------------------------------------------------------------------------------


def commands(group: click.Group = cli, path: str = "tapeline") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its whole name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def options(command: click.Command) -> set[str]:
    return {name for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}


def test_every_command_and_option_is_documented_and_no_other() -> None:
    found = {title.strip("`"): text for title, text in sections(page("cli.md")).items()}
    wanted = dict(commands())
    assert list(found) == [name for name in found if name in wanted]
    assert set(found) == set(wanted)
    for name, command in wanted.items():
        listed = {word for cells in table_rows(found[name]) for word in quoted(cells[0])}
        assert listed == options(command), name
        assert "```console\n" in found[name], f"{name} has no example"
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice):
                assert set(parameter.type.choices) <= set(quoted(found[name])), f"{name}: {parameter.name}"
    before = page("cli.md").partition("\n## ")[0]
    assert {w for cells in table_rows(before) for w in quoted(cells[0])} == options(cli) | {"-h", "--help"}


def test_every_service_is_documented() -> None:
    text = sections(page("cli.md"))["`tapeline run`"]
    assert {"redis", *registry.SERVICES} <= set(quoted(text))
    assert set(STAGES) <= set(registry.SERVICES)


def test_commands_shown_exist() -> None:
    known = dict(commands())
    shown = 0
    for path in PAGES:
        for block in re.findall(r"^```console\n(.*?)^```", path.read_text(), re.M | re.S):
            for line in block.splitlines():
                words = [w for w in shlex.split(line.removeprefix("$ ")) if not re.match(r"^[A-Z_]+=", w)]
                if not words or words[0] != "tapeline":
                    continue
                if words[1] == "--config":
                    del words[1:3]
                name = next((n for n in (" ".join(words[:3]), " ".join(words[:2])) if n in known), None)
                assert name, f"{path.name}: {line}"
                used = {w.partition("=")[0] for w in words if w.startswith("--")}
                if name != "tapeline run":  # its options are the service's
                    assert used <= options(known[name]), f"{path.name}: {line}"
                shown += 1
    assert shown > 20


def test_exit_codes_are_documented() -> None:
    codes = {"0", "1", "2", str(EX_TEMPFAIL), str(errors.EX_CONFIG), "130"}
    readme = sections((ROOT / "README.md").read_text())["Exit codes"]
    assert codes == {cells[0] for cells in table_rows(readme)} - {"code"}


def test_every_error_class_is_documented_with_its_exit_code() -> None:
    listed: dict[str, str] = {}
    for cells in table_rows(sections(page("operations.md"))["Errors"]):
        listed |= dict.fromkeys(quoted(cells[0]), cells[1])
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.TapelineError):
            assert name in listed
            assert listed[name] in ("",) or str(kind.exit_code) in listed[name]


def test_errors_that_are_listed_are_said_somewhere() -> None:
    """The words that a user searches for are the program's."""
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for folder in ("shared", "services")
        for path in (ROOT / folder).rglob("*.py")
    )
    operations = sections(page("operations.md"))
    listed = [r[0] for r in table_rows(operations["Errors"].partition("What a user may meet")[2]) if len(r) == 3]
    buried = [r[0] for r in table_rows(operations["Dead letters"]) if r[0].startswith("`")]
    assert len(buried) >= 4
    for cell in (*listed, *buried):
        for said in quoted(cell):
            for part in filter(None, (piece.strip(" '") for piece in said.split("…"))):
                assert part in source, part


# -- settings ------------------------------------------------------------------------------------


def default(section: str, name: str) -> Any:
    value = getattr(getattr(Settings(), section), name)
    return list(value) if isinstance(value, tuple) else value


def same(given: Any, wanted: Any) -> bool:
    return type(given) is type(wanted) and given == wanted


@pytest.mark.parametrize(("section", "name"), SETTINGS, ids=[".".join(s) for s in SETTINGS])
def test_every_setting_is_documented_with_its_default(section: str, name: str) -> None:
    row = next((r for r in table_rows(sections(page("settings.md"))[section]) if r[0] == f"`{section}.{name}`"), None)
    assert row is not None
    assert row[1] == f"`{env_name(f'{section}.{name}')}`"
    given = tomllib.loads(f"x = {row[2].strip('`')}")["x"]
    assert same(given, default(section, name))
    assert row[3]


def test_no_other_setting_is_documented() -> None:
    rows = [r for s in SECTIONS for r in table_rows(sections(page("settings.md"))[s]) if r[0] != "setting"]
    assert [r[0].strip("`") for r in rows] == [f"{s}.{n}" for s, n in SETTINGS]
    aliases = {tuple(map(str.strip, (r[0].strip("`"), r[1].strip("`")))) for r in table_rows(page("settings.md"))}
    assert set(ALIASES.items()) <= aliases


def test_the_example_holds_every_setting_with_its_default_and_a_word_on_it() -> None:
    path = ROOT / "tapeline.example.toml"
    held = tomllib.loads(path.read_text())
    assert [(s, n) for s in held for n in held[s]] == SETTINGS
    for section, name in SETTINGS:
        assert same(held[section][name], default(section, name)), f"{section}.{name}"
    loaded = load(str(path), {})
    assert all(getattr(loaded, section) == getattr(Settings(), section) for section in SECTIONS)
    lines = path.read_text().splitlines()
    for before, line in pairwise(lines):
        if "=" in line and not line.startswith("#"):
            assert before.startswith("# "), line


@pytest.mark.parametrize("text", blocks("toml"))
def test_settings_shown_are_valid(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(text)
    load(str(path), {})


def test_every_setting_and_variable_that_is_named_exists() -> None:
    names = {f"{section}.{name}" for section, name in SETTINGS}
    variables = {env_name(name) for name in names} | set(ALIASES) | NOT_SETTINGS
    variables |= {f"{name}_FILE" for name in variables}
    for path in PAGES:
        text = path.read_text()
        named = set(re.findall(r"\bTAPELINE_[A-Z0-9_]*[A-Z0-9]\b", text))
        assert {name for name in named if not name.startswith("TAPELINE_TEST_")} <= variables, path.name
        for section, name in re.findall(r"`(\w+)\.(\w+)(?: = [^`]+)?`", prose(text)):
            if section in SECTIONS and name not in FILES and f"{section}.{name}" != GROUP:
                assert f"{section}.{name}" in names, f"{path.name}: {section}.{name}"


# -- tables --------------------------------------------------------------------------------------


@pytest.fixture
def schema() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection, "a test")
    yield connection
    connection.close()


def test_every_column_is_documented_and_no_other(schema: sqlite3.Connection) -> None:
    documented = {name: text for title, text in sections(page("tables.md")).items() for name in quoted(title)}
    names = [n for (n,) in schema.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    assert set(documented) == set(names)
    for name in names:
        listed = {r[0].strip("`"): r for r in table_rows(documented[name]) if r[0] != "column"}
        columns = list(schema.execute('SELECT name, type, "notnull" OR pk FROM pragma_table_info(?)', (name,)))
        assert list(listed) == [column for column, _, _ in columns], name
        for column, kind, required in columns:
            row = listed[column]
            assert len(row) == 5, row
            assert row[1] == kind or (not row[1] and name == "late_counts"), f"{name}.{column}"
            assert (row[2] == "never") == bool(required), f"{name}.{column}"
            assert row[2], f"{name}.{column}"


def test_every_column_of_the_message_tables_is_documented(schema: sqlite3.Connection) -> None:
    """Those that every store has, in their order, and what this one adds of its own."""
    documented = {name: text for title, text in sections(page("tables.md")).items() for name in quoted(title)}
    for table in (table for tables in MESSAGE_TABLES.values() for table in tables):
        listed = {r[0].strip("`"): r for r in table_rows(documented[table.name]) if r[0] != "column"}
        assert tuple(listed) == table.names
        for column in table.columns:
            assert (listed[column.name][2] != "never") == column.null or column.path.startswith("components.")
            assert listed[column.name][3] or listed[column.name][4] or column.name in ("feed",), column
        head = documented[table.name].partition("| column |")[0]
        assert set(table.key) <= set(quoted(head)), table.name
        hidden = "SELECT name FROM pragma_table_xinfo(?) WHERE hidden > 1"
        assert {name for (name,) in schema.execute(hidden, (table.name,))} <= set(quoted(head))


@pytest.mark.parametrize("text", blocks("sql"))
def test_queries_shown_run(text: str, schema: sqlite3.Connection) -> None:
    for statement in text.split(";"):
        if statement.strip():
            schema.execute(statement).fetchall()


# -- stores --------------------------------------------------------------------------------------


def levels(text: str) -> dict[str, str]:
    """Level-3 heading -> what stands below it."""
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_kind_of_store_is_documented() -> None:
    lines = {r[0]: r[1:] for r in table_rows(page("stores.md").partition("\n## ")[0])}
    shown = [name for cell in lines["URL"] for name in quoted(cell)]
    assert [stores.parse(url).scheme for url in shown] == list(stores.SCHEMES)
    assert [name for cell in lines["service"] for name in quoted(cell)] == [registry.SINKS[s] for s in stores.SCHEMES]
    managed = [f"letters-{scheme}" in registry.TOOLS for scheme in stores.SCHEMES]
    assert [cell.startswith("yes") for cell in lines["`dead-letters` commands"]] == managed


async def _columns(url: str) -> dict[tuple[str, str], str]:
    connection = await connect(url)
    try:
        found = await connection.fetch(
            "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
        )
        return {(row["table_name"], row["column_name"]): row["data_type"] for row in found}
    finally:
        await connection.close()


@pytest.fixture
def postgres_schema(pg_url: str) -> str:
    """URL of a database with the store's tables and views."""
    store = TimescaleStore(pg_url)
    store.open()
    store.close()
    return pg_url


def test_the_types_of_every_store_are_documented(postgres_schema: str, schema: sqlite3.Connection) -> None:
    # A line of the table -> a column of its kind.
    columns = {
        "text": ("candles", "symbol"), "number": ("candles", "close"), "whole number": ("candles", "trades"),
        "`complete`": ("candles", "complete"), "instant of whole seconds": ("candles", "timestamp_in"),
        "when a row was made": ("candles", "timestamp_out"),
        "instant told by an exchange": ("ticks_trades", "timestamp"),
        "`…_ns` beside it": ("ticks_trades", "timestamp_ns"),
        "list (`bids`, `types`, `top_strikes`)": ("ticks_book_snapshots", "bids"),
    }  # fmt: skip
    lines = {r[0]: r[1:] for r in table_rows(sections(page("stores.md"))["Times and types"])}
    held = run(_columns(postgres_schema))
    names = {"timestamp with time zone": "timestamptz"}
    for line, (table, column) in columns.items():
        sqlite, postgres, bigquery = (re.split(r"[ ,]", cell)[0] for cell in lines[line])
        (kind,) = next(schema.execute("SELECT type FROM pragma_table_info(?) WHERE name = ?", (table, column)))
        kind_there = held[table, column]
        assert sqlite == kind, line
        assert (lines[line][1] if " " in kind_there else postgres).startswith(names.get(kind_there, kind_there)), line
        assert bigquery == LAYOUTS[table].type_of(column), line


def test_every_view_of_postgresql_is_documented(postgres_schema: str) -> None:
    async def look() -> set[str]:
        connection = await connect(postgres_schema)
        try:
            return {r[0] for r in await connection.fetch("SELECT viewname FROM pg_views WHERE schemaname = 'public'")}
        finally:
            await connection.close()

    views_there = run(look())
    parts = levels(sections(page("stores.md"))["PostgreSQL"])
    text = parts["Views for notebooks and Grafana"]
    own = {r[0].strip("`") for r in table_rows(text) if r[0].startswith("`")}
    said = own | set(quoted(text.partition("| view |")[0]))
    assert said == views_there - set(ROLLUPS)
    assert set(ROLLUPS) <= set(quoted(parts["Roll-ups"]))
    held = run(_columns(postgres_schema))
    assert {column for table, column in held if table in ROLLUPS} <= set(quoted(parts["Roll-ups"]))
    model = dict(re.findall(r"^  (\w+) +\w+\??(?: .*@map\(\"(\w+)\"\))?", parts["`ohlc_bars` and Prisma"], re.M))
    assert {mapped or name for name, mapped in model.items()} == {c for t, c in held if t == "ohlc_bars"}
    features = {r[0]: r[1:] for r in table_rows(parts["What TimescaleDB adds"])}
    for feature, meaning in timescale_server.MEANING.items():
        assert features[feature][-1] == meaning
    for setting in (name for r in features.values() for name in quoted(r[0])):
        assert tuple(setting.split(".")) in SETTINGS


@pytest.mark.parametrize("text", blocks("postgresql"))
def test_queries_of_postgresql_shown_run(text: str, postgres_schema: str) -> None:
    async def work() -> None:
        connection = await connect(postgres_schema)
        try:
            transaction = connection.transaction()
            await transaction.start()
            for statement in re.sub(r"^--.*$", "", text, flags=re.M).split(";"):
                if statement.strip():
                    await connection.fetch(statement)
            await transaction.rollback()  # roles are the server's
        finally:
            await connection.close()

    run(work())


def test_every_table_view_and_method_of_bigquery_is_documented() -> None:
    parts = levels(sections(page("stores.md"))["BigQuery"])
    text = parts["Tables and views of BigQuery"]
    told = {name for r in table_rows(text) for name in quoted(r[0])}
    assert told - {"v_<table>_dedup"} == {name for name in views.VIEWS if not name.endswith("_dedup")}
    assert {f"v_{name}_dedup" for name in LAYOUTS} <= set(views.VIEWS)
    assert {field.name for field in LEDGER_LAYOUT.fields} | {ledger.STORED_AT, ledger.LEDGER} <= set(quoted(text))
    for body in re.findall(r"^```bigquery\n(.*?)^```", page("stores.md"), re.M | re.S):
        (name,) = re.findall(r"`my-project\.market\.(\w+)`", body)
        assert name in (*EVERY, *views.VIEWS)
        assert set(re.findall(r"^ORDER BY (\w+)", body, re.M)) <= set(views.VIEW_TYPES[name])
    methods = {r[0].split()[0].strip("`"): r for r in table_rows(parts["Methods"]) if r[0] != "method"}
    assert tuple(methods) == BIGQUERY_METHODS
    for method, price in costs.USD_PER_GIB.items():
        assert methods[method][2].startswith(f"{price:g} USD" if price else "free")
    proofs = [r[0].strip("`") for r in table_rows(parts["What only a real project can prove"]) if r[0] != "line"]
    assert proofs == [name for name, _ in object.__new__(doctor._Proof).all()]


def test_every_column_that_an_import_knows_is_documented() -> None:
    text = sections(page("stores.md"))["Candles from elsewhere"]
    listed = {r[0].strip("`"): tuple(quoted(r[1])) for r in table_rows(text) if r[0] != "ours"}
    for ours, names in import_files.FIELDS.items():
        assert tuple(name for name in listed[ours] if name != "exchange:symbol") == names[1:], ours
    assert set(listed) == set(import_files.FIELDS)


def test_every_call_and_parameter_of_the_reader_is_documented() -> None:
    told = [r for r in table_rows(sections(page("reader.md"))["What it gives"]) if r[0].startswith("`")]
    calls = {re.split(r"\W", name)[0] for r in told if len(r) == 2 for name in quoted(r[0])} - {"since"}
    assert calls == {n for n, m in vars(reader.MarketReader).items() if not n.startswith("_") and m is not None}
    listed = {n: v.strip() for r in told if len(r) == 3
              for n, v in zip(quoted(r[0]), r[1].split(","), strict=True)}  # fmt: skip
    given = inspect.signature(reader.MarketReader).parameters
    wanted = {name: p.default for name, p in given.items() if name not in ("store_url", "clock")}
    assert set(listed) == set(wanted)
    for name, value in wanted.items():
        text = listed[name].strip("`")
        assert (json.loads(text.lower()) if text[0] != '"' else text.strip('"')) == value, name


def test_the_reader_shown_follows(bus: Bus, tmp_path: Path) -> None:
    """From the store on, and over what comes on the bus while it runs."""
    space: dict[str, Any] = {"__name__": "shown"}
    (body,) = re.findall(r"^```python\n(.*?)^```", page("reader.md"), re.M | re.S)
    exec(body, space)
    path, stage = tmp_path / "store.db", Stage(bus)

    async def follow() -> list[tuple[str, float]]:
        url = f"sqlite:///{path}"
        running = asyncio.ensure_future(space["main"](url, bus.url, "ES", 9, bus.keys.namespace))
        for second in (6, 9):
            await asyncio.to_thread(stage.put, candles(rows(6, second)))
        return await asyncio.wait_for(running, 30)

    with sinking(bus, path):
        first = stage.put(candles(rows(12)))
        until(lambda: stored_seq(path, "candles") == first)
        seen = asyncio.run(follow())
    assert len(seen) == 9
    assert [at for at, _ in seen] == sorted({at for at, _ in seen})


# -- the page, its API, the client -----------------------------------------------------------------


def test_every_path_and_parameter_of_the_api_is_documented() -> None:
    text = page("api.md")
    told = set(quoted(prose(text)))
    described = app.create(Settings()).openapi()["paths"]
    shown = {re.sub(r"^(GET|POST) ", "", name) for name in told if re.match(r"^((GET|POST) )?/", name)}
    assert set(described) <= shown
    assert {path for path in shown if path.startswith("/api/")} - {"/api/v1/ws"} <= set(described)
    for path, methods in described.items():
        for method, operation in methods.items():
            if method == "post":
                assert f"POST {path}" in told
            names = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"}
            assert names <= told | {"all", "q"}, path
    assert {"all=true", "q"} <= told
    keys = {q: quoted(r[1]) for r in table_rows(sections(text)["Rows"]) for q in quoted(r[0])}
    assert set(keys) == {
        *(table.name for table in TABLES.values()),
        "pressure_metrics",
        "pressure_rollups",
        "signals",
        "gaps",
    }
    assert all(tuple(named) == key_of(table) for table, named in keys.items())
    body = described["/api/v1/signals/ack"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    known = app.create(Settings()).openapi()["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
    (asked,) = re.findall(r"-d '(\{[^']*\})' http://\S+/signals/ack$", text, re.M)
    assert set(json.loads(asked)) == set(known)


def test_every_message_channel_and_close_code_is_documented() -> None:
    text = sections(page("api.md"))["What is live"]
    requests, _, events = text.partition("The server sends:")
    for kinds, told in ((live.Request, requests), (live.Event, events)):
        listed = {r[0].strip("`"): r[1] for r in table_rows(told) if len(r) == 3 and r[0] != "`op`"}
        for kind in kinds.__subclasses__():
            assert set(kind.__struct_fields__) <= set(quoted(listed[str(kind.__struct_config__.tag)])), kind
    assert [r[0].strip("`") for r in table_rows(requests) if r[0].strip("`") in live.CHANNELS] == list(live.CHANNELS)
    codes = {r[0] for r in table_rows(levels(text)["Slow clients"]) if r[0].isdigit()}
    ours = {live.CLOSE_TOO_SLOW, live.CLOSE_SHUTDOWN, live.CLOSE_TOO_MANY, live.CLOSE_UNAUTHORIZED}
    assert codes == {*map(str, ours), "1009"}
    for line in re.findall(r"^[<>] (\{.*\})$", text, re.M):
        kind = json.loads(line)["op"]
        assert kind in {
            str(k.__struct_config__.tag) for k in (*live.Request.__subclasses__(), *live.Event.__subclasses__())
        }
    bounds = outbox.Bounds()
    slow = levels(text)["Slow clients"]
    assert f"{bounds.coalesce >> 10} KiB" in slow
    assert f"{bounds.drop >> 20} MiB" in slow
    assert f"for {bounds.seconds:g} s" in slow
    assert f"pings each {web_worker.PING_SECONDS:g} s" in slow
    assert f"every {web_live.ALIVE_SECONDS:g} s" in levels(text)["Server-sent events"]


def test_every_error_and_limit_of_the_api_is_documented() -> None:
    text = sections(page("api.md"))["Errors and limits"]
    told = {(r[0], r[1].strip("`")) for r in table_rows(text) if r[0].isdigit()}
    source = "".join(path.read_text() for path in (ROOT / "services" / "web").glob("*.py"))
    said = set(re.findall(r'Problem\((\d{3}), "(\w+)"', source))
    (framework,) = re.findall(r"code = (\{.*?\})\.get\(error\.status_code", source)
    said |= {(status, code) for status, code in re.findall(r'(\d+): "(\w+)"', framework)}
    assert told == said
    limits = {r[0]: r[1] for r in table_rows(text) if len(r) == 2}
    assert limits["subscriptions of a connection"] == str(web_live.MAX_SUBSCRIPTIONS)
    assert f"`web.connections` + {web_worker.SPARE_CONNECTIONS}" in text
    assert all(
        f"`web.{name}`" in text for name in ("requests_per_second", "connections", "max_rows", "max_export_rows")
    )


def test_requests_shown_are_answered(served: Served) -> None:
    """As they stand, but for the port and the streams, which do not end."""
    shown = 0
    for path in (DOCS / "api.md", DOCS / "operations.md", ROOT / "README.md"):
        for line in re.findall(r"^\$ (curl .*)$", path.read_text(), re.M):
            words = shlex.split(line)
            url = next(word for word in words if word.startswith("http://"))
            if "-N" in words:
                url = url.replace("/api/v1/stream?channel=candles", "/api/v1/candles?").replace("&history=1", "")
                if "/stream" in url:
                    continue
            headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
            body = words[words.index("-d") + 1].encode() if "-d" in words else None
            target = "/" + url.split("/", 3)[3]
            answer = served.ask(target, "POST" if "-X" in words else "GET", body, **headers)
            nobody = body is not None and "/alerts/" in target
            assert answer.status == (404 if nobody else 200), (line, answer.body)
            shown += 1
    assert shown > 15


def test_the_keys_and_signs_of_the_page_are_documented() -> None:
    static = ROOT / "services" / "web" / "static"
    told = sections(page("page.md"))
    (listed,) = re.findall(r"const SHORTCUTS = \{(.*?)\};", (static / "app.js").read_text(), re.S)
    shortcuts = set(re.findall(r'(?:^|[,\s])"?([a-z/?])"?:', listed))
    assert len(shortcuts) == 8
    keys = {key.lower() for cells in table_rows(told["Keys"]) for key in quoted(cells[0])}
    assert shortcuts <= keys
    moves = re.findall(r"const step = \{(.*?)\}", (static / "app.js").read_text())[0]
    names = {"ArrowLeft": "←", "ArrowRight": "→"}
    assert {names.get(name, name).lower() for name in re.findall(r"(\w+):", moves)} <= keys
    (signs,) = re.findall(r"const SIGNS = \[(.*?)\n\];", (static / "menus.js").read_text(), re.S)
    assert len(re.findall(r"^  \[", signs, re.M)) == len(list(table_rows(told["Signs on the chart"]))) - 2
    chips = re.findall(r'^  \["\w+", "([^"]+)", \w+\],$', (static / "pipeline-chips.js").read_text(), re.M)
    assert chips == [r[0] for r in table_rows(told["The pipeline strip"]) if r[0] != "part"]
    words = "".join(q for cells in table_rows(told["How live it is"]) for q in quoted(cells[0]))
    standing = (static / "app.js").read_text().partition("function standing()")[2].partition("\n}\n")[0]
    for said in re.findall(r'return \["\w+", ["`]([^"`$]+)', standing):
        assert said in words, said


def test_images_are_small() -> None:
    for path in (DOCS / "images").iterdir():
        assert path.suffix in (".png", ".svg")
        assert path.stat().st_size < (200_000 if path.suffix == ".png" else 20_000), path.name
        assert any(f"images/{path.name}" in p.read_text() for p in PAGES), path.name


def test_drawings_explain_themselves_and_fetch_nothing() -> None:
    """In light and in dark, to a reader who sees none of it, and without a network."""
    for path in (DOCS / "images").glob("*.svg"):
        text = path.read_text()
        drawing = ElementTree.fromstring(text)
        assert drawing.find("{*}title") is not None, path.name
        assert drawing.find("{*}desc") is not None, path.name
        assert "prefers-color-scheme: dark" in text
        assert "href" not in text
        assert "url(http" not in text


def calls(kind: Any) -> set[str]:
    return {name for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")}


def test_every_call_of_the_client_is_documented() -> None:
    text = sections(page("client.md"))
    told = {re.split(r"\W", name)[0] for part in ("Streams", "Requests") for name in quoted(text[part])}
    assert calls(client.Client) <= told
    rows_told = {r[0].strip("`"): r[1] for r in table_rows(text["Streams"]) if r[0] != "call"}
    for call in rows_told:
        name, _, given = call.partition("(")
        found = inspect.signature(getattr(client.Client, name)).parameters
        for parameter in filter(None, given.rstrip(")").split(", ")):
            word, _, value = parameter.partition("=")
            assert word in found
            assert not value or json.loads(value) == found[word].default, call
    assert {client_stream.CONNECTING, client_stream.LIVE, client_stream.WAITING, client_stream.CLOSED} <= told
    assert set(client.TABLES) <= set(quoted(text["Requests"]))
    frames = {name for name in vars(dataframes) if name.startswith("read_") and name != "read_rows"}
    calls_told = {r[0].strip("`") for r in table_rows(text["Data frames"]) if r[0] != "call"}
    assert {call.partition("(")[0] for call in calls_told} == frames
    for call in calls_told:
        found = inspect.signature(getattr(dataframes, call.partition("(")[0])).parameters
        given = [word.partition("=")[0] for word in call.partition("(")[2].rstrip(")").split(", ")]
        assert list(found) == [*given, "since", "until", "columns", "kind", "token"]


def examples_of_client() -> tuple[dict[str, Any], dict[str, Any]]:
    spaces = []
    for body in re.findall(r"^```python\n(.*?)^```", page("client.md"), re.M | re.S):
        space: dict[str, Any] = {"__name__": "shown"}
        exec(body, space)
        spaces.append(space)
    strategy, frames = spaces
    return strategy, frames


def test_the_strategy_shown_trades(bus: Bus, served: Served, tmp_path: Path) -> None:
    main = examples_of_client()[0]["main"]
    deploy(bus)
    path, stage = tmp_path / "store.db", Stage(bus)

    def swing(start: int, count: int) -> Frame:
        made = fixed(2 * count, start)
        turn = np.arange(len(made)) // 2 / 5 + start / 5
        made["close"], made["vd"] = 5000 + 10 * np.sin(turn), np.cos(turn)
        return bars(made)

    async def trade() -> list[tuple[str, float]]:
        running = asyncio.ensure_future(main(served.base, "BTC-USDT", 3))
        for start in range(30, 130, 10):
            await asyncio.to_thread(stage.put, swing(start, 10))
        return await asyncio.wait_for(running, 30)

    with sinking(bus, path):
        first = stage.put(swing(0, 30))
        until(lambda: stored_seq(path, "candles") == first)
        made = asyncio.run(trade())
    assert len(made) == 3
    assert {side for side, _ in made} == {"buy", "sell"}


def test_the_data_frame_shown_is_the_same_from_store_and_server(market: str, serving: Serving) -> None:
    look = examples_of_client()[1]["look"]
    of_store, of_server = look(market), look(serving(tapeline_store=market).base)
    assert of_store.equals(of_server)
    assert len(of_store) >= 4
    assert of_store["net_premium"].notna().any()


# -- the bus -------------------------------------------------------------------------------------


def key_names() -> set[str]:
    keys, out = Keys(), set()
    for name, member in inspect.getmembers(Keys):
        if name.startswith("_") or name == "namespace":
            continue
        if isinstance(member, property):
            out.add(getattr(keys, name))
        elif inspect.isfunction(member):
            parameters = list(inspect.signature(member).parameters)[1:]
            out.add(member(keys, *("p" if p == "partition" else f"<{p}>" for p in parameters)))
    return out


def test_every_key_is_documented_and_no_other() -> None:
    text = sections(page("streams.md"))["Keys"]
    assert {r[0].strip("`") for r in table_rows(text) if r[0] != "key"} == key_names()
    assert set(TOPICS) <= set(quoted(text))


def test_every_frame_kind_and_field_is_documented() -> None:
    text = page("streams.md")
    frames = [r[0].strip("`") for r in table_rows(sections(text)["Frames"])]
    tags = {kind.__struct_config__.tag: kind for kind in messages.Message.__subclasses__()}
    assert {*PACKED, *map(str, tags)} <= set(frames)
    flat = Frame("trade", 1, 0, 0, "feed", b"", names=[("ES", "ESZ6")], of="trade 1").fields(1)
    assert {str(name) for name in flat[::2]} <= set(frames)
    for tag, kind in tags.items():
        row = next(r for r in table_rows(sections(text)["Frames"]) if r[0] == f"`{tag}`" and len(r) == 2)
        assert list(kind.__struct_fields__) == [q for q in quoted(row[1]) if q != "?"]
    parts = {r[0].strip("`"): quoted(r[2]) for r in table_rows(sections(text)["Frames"]) if len(r) == 3}
    for kind in (messages.TopStrike, messages.Components):
        assert parts[kind.__name__] == list(kind.__struct_fields__)
    for name, dtype in (("TICK", TICK), ("FIXED", FIXED), ("CANDLE", CANDLE), ("LATE", LATE)):
        paragraph = next(p for p in text.split("\n\n") if p.startswith(f"`{name}`, {dtype.itemsize} bytes"))
        assert set(dtype.names or ()) <= set(quoted(paragraph)), name


def test_every_kind_of_tick_row_is_documented_by_its_number() -> None:
    rows = [r for r in table_rows(sections(page("streams.md"))["Frames"]) if r[0].isdigit()]
    assert [(int(r[0]), r[1].strip("`")) for r in rows] == list(enumerate(ROW_KINDS))


def test_every_feature_has_its_formula() -> None:
    rows = [r for r in table_rows(sections(page("concepts.md"))["Features"]) if r[0] != "feature"]
    assert sorted(name for r in rows for name in quoted(r[0])) == sorted(FEATURE_COLUMNS)
    assert all(all(cells) and len(cells) == 4 for cells in rows)


def test_every_counter_is_documented() -> None:
    listed = {r[0].strip("`") for r in table_rows(sections(page("streams.md"))["Counters of ingest"])}
    counted = {
        reason
        for path in (ROOT / "services" / "ingest").glob("*.py")
        for reason in re.findall(r'\.count\("(\w+)"', path.read_text())
    }
    # What the decoder of crypto cannot take it counts by a dict.
    strange = {tardis_decode._why(line) for line in (b"no JSON", b'{"type":"of another kind"}')}
    skipped = {*REASONS, *tardis_pass.REASONS, *tardis_decode._SKIPPED.values(), *strange}
    assert listed - {"reason"} == {*skipped, *counted, "usage_bytes"}
    of_aggregate = set(quoted(sections(page("streams.md"))["Counters of ingest"].rpartition("|\n")[2]))
    # The others are the kernel's own: where it stands in its outputs.
    assert set(COUNTERS) - {"rows_1m", "rows_1s", "rows_fixed", "late", "wanted"} <= of_aggregate
    sink = set(quoted(sections(page("operations.md"))["Counters of the sink"]))
    for name in ("sink.py", "sink_reader.py"):
        assert set(re.findall(r'\.count\("(\w+)"', (ROOT / "shared" / name).read_text())) <= sink


def test_every_counter_of_the_stages_is_documented_and_no_other() -> None:
    rows = table_rows(sections(page("streams.md"))["Counters of pressure and signals"])
    listed = [(r[0].strip("`"), r[1].strip("`")) for r in rows if r[0] != "stage"]
    source = inspect.getsource(core)
    judged = {name for place in re.findall(r"_counters\[([^\]]+)\]", source) for name in re.findall(r'"(\w+)"', place)}
    judged |= {*plugins.STATUSES, core.WITHDRAWN}  # counted by a signal's status
    assert len(judged) > 10
    wanted = {("pressure", n) for n in pressure_layout.COUNTERS} | {("signals", n) for n in judged}
    assert len(listed) == len(set(listed))
    assert set(listed) == wanted


def test_every_consumer_of_a_stream_is_documented() -> None:
    rows = {r[0].strip("`"): r for r in table_rows(sections(page("streams.md"))["Bounds and trimming"])}
    assert set(rows) - {"stream"} == set(TOPICS)
    for topic in TOPICS:
        assert set(readers(topic, Settings())) <= set(quoted(rows[topic][1])), topic


# -- what is made of options ------------------------------------------------------------------------


def test_every_measure_of_pressure_has_its_formula() -> None:
    listed = {name for r in table_rows(sections(page("concepts.md"))["Option pressure"]) for name in quoted(r[0])}
    plain = {"bid_volume", "ask_volume", "unknown_volume", "total_trades", "open", "close", "underlying_price",
             "complete", "revision", "strikes", "call_volume", "put_volume", "call_ask_volume", "call_bid_volume",
             "put_ask_volume", "put_bid_volume"}  # fmt: skip
    for kind in (messages.Pressure, messages.PressureRollup):
        measures = {n for n in kind.__struct_fields__ if not n.endswith(("_ns", "_sec"))}
        assert measures - plain - {"underlying", "strike", "option_type"} <= listed, kind


def test_every_part_of_a_score_has_its_formula() -> None:
    text = sections(page("concepts.md"))["Signals"]
    named = [name for r in table_rows(text) for name in quoted(r[0])]
    assert {*messages.Components.__struct_fields__, "score"} <= set(named)
    assert set(named) >= {*plugins.STATUSES, core.WITHDRAWN}
    levels = (baseline.KEY_TIME, baseline.KEY, baseline.MONEYNESS, baseline.INSUFFICIENT)
    assert tuple(name for name in named if name in levels) == levels, "in the order of their turn"
    assert tuple(name for name in named if name in score.TYPES) == score.TYPES, "in the order of precedence"
    grades = {r[0].strip("`"): r[1] for r in table_rows(text) if len(r) == 2}
    assert all(grades[name] == f"from {least:g}" for least, name in score.GRADES)
    assert score.LOW in grades
    limits = (score.Z_LIMIT, score.Z_ANOMALY, score.HIGH_PERCENTILE, score.LOW_PERCENTILE, score.APART_SEC,
              score.REJECTED_ABOVE, score.MONITOR_ABOVE, baseline.BUCKET_WIDTH)  # fmt: skip
    assert all(re.search(rf"(?<![\d.]){limit:g}(?![\d])", text) for limit in limits)


def test_the_plugin_shown_is_one() -> None:
    """It is taken as it stands: by its entry point, and for what it returns."""
    text = page("plugins.md")
    package = tomllib.loads(re.findall(r"^```ini\n(.*?)^```", text, re.M | re.S)[0])
    (point,) = package["project"]["entry-points"][GROUP].values()
    space: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0], space)
    plugin = space[point.partition(":")[2]]()
    assert "TAPELINE_SIGNALS_PLUGINS=call-skew" in text
    rollup = messages.PressureRollup("NQ", 0, 300, 10, 1, 10, 0, 1, 0, 3.0, 1.0, 0.1, 9, 9, 0, 9, 2, 11)
    said = plugins.Plugins({"call-skew": plugin})([], rollup, [])
    assert (len(said.signals), said.errors) == (1, 0)
    assert said.signals[0].source == "call-skew"


# -- of one's own ------------------------------------------------------------------------------------


def shown_python(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page(name), re.M | re.S)


def test_the_venue_shown_makes_candles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bus: Bus) -> None:
    source, player = shown_python("adding-a-venue.md")
    module = ModuleType("services.ingest.acme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    tape, store = tmp_path / "day.csv", tmp_path / "acme.db"
    start = 1_715_265_000 * NS
    symbols = ("BTC-USD", "ETH-USD", "SOL-USD")
    tape.write_text(
        "".join(
            f"{start + i * NS // 10},{symbols[i % 3]},{100 + i % 7},{1 + i % 3},{('buy', 'sell', '')[i % 3]}\n"
            for i in range(2500)
        )
    )
    monkeypatch.setenv("TAPELINE_STORE", f"sqlite:///{store}")
    monkeypatch.setattr(sys, "argv", ["play", str(tape)])

    def rows() -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(store)) as connection:
            query = "SELECT symbol, timeframe, timestamp_in, volume, vd, complete FROM candles ORDER BY 1, 2, 3"
            return list(connection.execute(query))

    exec(player, {"__name__": "shown"})
    made = rows()
    assert {row[0] for row in made} == set(symbols)
    minutes = [row for row in made if row[1] == "1m" and row[0] == "BTC-USD"]
    assert [row[3] for row in minutes] == [200.0] * 4
    assert all(row[4] == row[3] for row in minutes), "who bought is known"
    exec(player, {"__name__": "shown"})
    assert rows() == made, "a second time changes nothing"

    def publish() -> int:
        """The same tape onto the bus; how many rows it holds then."""
        out = PublisherOutput(
            bus, "acme", "worker", 8, Settings().ingest, threading.Event(), live=False, tape=tape.name
        )
        bus.deploy(8)
        module.__dict__["AcmeTape"](tape, 8).run(out, out.attach(), threading.Event())
        out.close()
        return sum(int(bus.call("hget", bus.keys.info(p, "ticks"), "records") or 0) for p in range(8))

    published = publish()
    assert published > 2500
    assert publish() - published <= 8 * 8, "rows that the bus holds are dropped, clocks may come again"


def test_the_sink_shown_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for body in shown_python("adding-a-sink.md"):
        exec(body, {})
    members = {name for name in vars(Store) if not name.startswith("_")} | set(Store.__annotations__)
    listed = {
        re.split(r"\W", r[0].strip("`"))[0] for r in table_rows(sections(page("adding-a-sink.md"))["What a store does"])
    }
    assert members <= listed
    said = set(quoted(sections(page("adding-a-sink.md"))["Making it a store"]))
    known = {f"{name.rpartition('-')[0]}-x" for name in registry.TOOLS if name.endswith("-sqlite")}
    assert known <= said


# -- alerts and usage -------------------------------------------------------------------------------


def test_every_event_severity_and_field_of_alerts_is_documented() -> None:
    text = sections(page("alerts.md"))
    told = [r for r in table_rows(text["Rules"]) if r[0] not in ("field", "event")]
    assert {r[0].strip("`") for r in told if len(r) == 2} == set(AlertRule.__struct_fields__)
    words = {r[0].strip("`"): set(quoted(r[1])) for r in told if len(r) == 2}
    assert words["severity"] == set(alerts.SEVERITIES)
    assert words["grades"] == set(alerts.GRADES)
    assert set(alerts.TYPES) <= words["types"]
    assert {r[0].strip("`"): r[2].strip("`") for r in told if len(r) == 3} == alerts.EVENTS
    for grade, severity in rules.DEFAULT_GRADES.items():
        assert f"`{grade}` `{severity}`" in text["Rules"] or f"`{grade}` are `{severity}`" in text["Rules"]
    limits = [r for r in table_rows(text["Limits and folding"]) if r[0] != "severity"]
    assert {r[0].strip("`"): int(r[1]) for r in limits} == alerts.SEVERITIES
    record = sections(page("alerts.md"))["The record of an alert"]
    fields = [r for r in table_rows(record) if len(r) == 2]
    assert {n for r in fields for n in quoted(r[0])} >= set(alerts.Alert.__struct_fields__)
    deliveries = next(r for r in fields if r[0] == "`deliveries`")
    assert quoted(deliveries[1]) == list(alerts.Delivery.__struct_fields__)
    states = {alerts.PENDING, alerts.SENT, alerts.REFUSED, alerts.DROPPED}
    assert states == {r[0].strip("`") for r in table_rows(record.partition("state of a delivery")[2])} - {"---"}


def test_the_webhook_shown_is_what_is_sent() -> None:
    text = sections(page("alerts.md"))["The webhook"]
    shown = json.loads(re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)[0])
    alert = alerts.Alert("a", "k", "t", "INFO", "title", "text", 0, 0, 0)
    assert list(shown) == list(message_of(alert, 0).body)
    signal = messages.Signal("NQ", 0, 300, "block", "BUY", 1.0, "EXTREME")
    happening = rules.of_signal(signal, load(None, {"TAPELINE_ALERTS_CHANNELS": "ops=https://h.example"}).alerts)
    assert happening is not None
    assert set(shown["details"]) == set(happening.details)
    for body in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        compile(body, "receiver", "exec")


def test_every_state_of_a_feed_is_documented() -> None:
    rows = table_rows(sections(page("operations.md"))["States of a feed"])
    listed = {r[0].strip("`") for r in rows if r[0] != "state"}
    said = {
        state
        for path in (ROOT / "services" / "ingest").glob("*.py")
        for call in re.findall(r"\.connection\(([^,)]+)", path.read_text())
        for state in re.findall(r'"(\w+)"', call)
    }
    first = re.search(r'self\.state, self\.detail = "(\w+)"', (ROOT / "services" / "ingest" / "status.py").read_text())
    assert first
    assert listed == {*said, first[1], gate.BUDGET, gate.CLOSED}
    told = next(r for r in table_rows(sections(page("tables.md"))["`usage_log`"]) if r[0] == "`state`")
    assert {usage.RUNNING, usage.STOPPED} == set(quoted(told[4]))


# -- the operation ----------------------------------------------------------------------------------


def test_every_metric_is_documented_and_no_other() -> None:
    """By its name as scraped, its type and its labels."""
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (told,) = metric.describe()
            wanted[told.name + "_total" * (told.type == "counter")] = (told.type, tuple(metric._labelnames))
    for name, of_bus in metrics.BUS.items():
        wanted[name + "_total" * (of_bus.kind == "counter")] = (of_bus.kind, of_bus.labels)
    rows = [r for r in table_rows(page("metrics.md")) if r[0] != "metric"]
    assert len({r[0] for r in rows}) == len(rows)
    assert {r[0].strip("`"): (r[1], tuple(quoted(r[2]))) for r in rows} == wanted
    assert all(len(r) == 4 and r[3] for r in rows)


@pytest.mark.parametrize("text", blocks("promql"))
def test_queries_of_metrics_shown_parse(text: str) -> None:
    known = known_metrics()
    for query in re.sub(r"^#.*$", "", text, flags=re.M).split("\n\n"):
        for name, labels in metrics_of(query):
            assert name in known
            assert labels <= known[name], query


def test_every_alert_has_its_entry_in_the_runbook_and_no_other() -> None:
    found = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "tapeline.yml").read_text())
    wanted = {rule["alert"]: rule for group in found["groups"] for rule in group["rules"]}
    told = page("runbook.md")
    entries = levels(told)
    of_prometheus = {name for name in entries if not name.startswith("`")}
    assert of_prometheus == set(wanted)
    for name, rule in wanted.items():
        assert entries[name].strip().startswith(f"`{rule['labels']['severity']}`."), name
        assert all(f"- **{part}**: " in entries[name] for part in ("Why", "Look", "Do")), name
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{name.lower()}"
        assert name.lower() in anchors(DOCS / "runbook.md")
    assert {name.strip("`") for name in entries if name.startswith("`")} == set(alerts.EVENTS)


def test_the_figures_of_the_scaling_guide_are_those_that_were_measured() -> None:
    text = page("scaling.md")
    held = json.loads((ROOT / "benchmarks" / "results" / "latest.json").read_text())
    figures = [r for r in table_rows(sections(text)["What one machine does"]) if r[0] != "what"]
    assert len(figures) > 10
    for what, figure, where in figures:
        value = held
        for key in quoted(where):
            value = value[key]
        digits = figure.replace(",", "").rstrip("0").replace(".", "").lstrip("0")
        assert f"{float(figure.replace(',', '')):g}" == f"{float(f'{value:.{max(2, len(digits))}g}'):g}", what
    machine = held["machine"]
    for said in (machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']:g} GiB", machine["system"],
                 f"Python {machine['python']}"):  # fmt: skip
        assert said in " ".join(text.split()), said
    for kind in (TICK, CANDLE, FIXED):
        assert str(kind.itemsize) in sections(text)["Memory"]
    assert "six streams" in text
    assert len(TOPICS) == 6


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yml").read_text())
    return found


def test_every_service_and_profile_of_the_containers_is_documented() -> None:
    text = sections(page("containers.md"))
    services = compose()["services"]
    listed = {name: r[2].strip("`") for r in table_rows(text["What runs"]) for name in quoted(r[0])}
    assert listed == {name: ",".join(service.get("profiles", ())) for name, service in services.items()}
    used = re.findall(r"--profile (\w+)", "".join(p.read_text() for p in PAGES))
    assert set(used) <= set(filter(None, listed.values()))
    ports = [port for service in services.values() for port in service.get("ports", ())]
    for port in ports:
        variable, default = re.findall(r"\$\{(\w+):-(\d+)\}", port)[0]
        assert f"{default} (`{variable}`)" in " ".join(text["What runs"].split())
    for line in re.findall(r"^\$ docker compose (.*)$", "".join(p.read_text() for p in PAGES), re.M):
        for file in re.findall(r"-f (\S+)", line):
            assert (ROOT / file).exists(), line
        for name in re.findall(r"--scale ([\w-]+)=", line) + re.findall(r"exec ([\w-]+) ", line):
            assert name in services, line


def test_variables_of_the_containers_shown_are_known() -> None:
    example = (ROOT / "deploy" / ".env.example").read_text()
    known = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", example, re.M))
    for block in re.findall(r"^```\n(.*?)^```", page("containers.md"), re.M | re.S):
        assert set(re.findall(r"^([A-Z][A-Z0-9_]+)=", block, re.M)) <= known


def test_the_manifests_shown_are_of_this_program() -> None:
    texts = re.findall(r"^```yaml\n(.*?)^```", page("deployment.md"), re.M | re.S)
    held = [manifest for text in texts for manifest in yaml.safe_load_all(text)]
    assert {"ConfigMap", "Secret", "Job", "Deployment", "Service"} == {m["kind"] for m in held}
    names = {env_name(f"{s}.{n}") for s, n in SETTINGS} | set(ALIASES)
    given: dict[str, str] = {}
    for manifest in held:
        given |= manifest.get("data", {}) | manifest.get("stringData", {})
        if manifest["kind"] not in ("Job", "Deployment"):
            continue
        template = manifest["spec"]["template"]
        for container in template["spec"]["containers"]:
            command, *rest = container["args"]
            assert f"tapeline {command}" in dict(commands())
            assert all(service in registry.SERVICES for service in rest)
            given |= {e["name"]: e["value"] for e in container.get("env", ())}
            probe = container.get("livenessProbe", {}).get("exec", {}).get("command", ["tapeline", "health"])
            assert {w for w in probe if w.startswith("--")} <= options(dict(commands())[" ".join(probe[:2])])
        if manifest["kind"] == "Deployment":
            assert manifest["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert set(given) <= names
    load(None, given)


def test_every_check_of_doctor_is_documented() -> None:
    folders = (ROOT / "shared", ROOT / "services" / "ingest")
    source = "".join(path.read_text() for folder in folders for path in folder.glob("doctor*.py"))
    names = {"settings", *re.findall(r'\b(?:Check|_vendor)\(\s*"([^"]+)"', source)}
    assert len(names) > 10
    told = sections(page("cli.md"))["`tapeline doctor`"]
    listed = {name for r in table_rows(told) if len(r) == 2 and not r[0].startswith("`") for name in r[0].split(", ")}
    assert listed - {"", "option", "check"} == names


def test_every_field_of_heartbeats_and_log_lines_is_documented() -> None:
    rows = {r[0]: r[2] for r in table_rows(sections(page("streams.md"))["Keys"])}
    assert set(Beat.__struct_fields__) - {"worker"} <= set(quoted(rows["`md:workers`"]))
    record = logging.LogRecord("shared.sink", logging.ERROR, "sink.py", 1, "said", (), (OSError, OSError("x"), None))
    fields = json.loads(JsonFormatter("sink-sqlite", "sink-sqlite", Masker()).format(record))
    listed = [n for r in table_rows(sections(page("observability.md"))["Logs"]) for n in quoted(r[0])]
    assert listed == list(fields)


def test_every_dashboard_is_documented() -> None:
    folder = ROOT / "deploy" / "grafana" / "dashboards"
    titles = {json.loads(path.read_text())["title"] for path in folder.glob("*.json")}
    told = [r[0] for r in table_rows(sections(page("observability.md"))["Grafana"]) if r[0] != "dashboard"]
    assert set(told) == titles


# -- the site ---------------------------------------------------------------------------------------


def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for html in pages:
        text = html.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"([^\"]+)", text)
        fetched += re.findall(r"<link[^>]*rel=\"(?:stylesheet|icon|preconnect)\"[^>]*href=\"([^\"]+)", text)
        assert not [url for url in fetched if re.match(r"(https?:)?//", url)], html
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    # What the repository's pages link to, the site has as well.
    for name in ("concepts", "runbook", "tables", "stores"):
        ids = set(re.findall(r'<h[1-6] id="([^"]+)"', (site / name / "index.html").read_text()))
        assert anchors(DOCS / f"{name}.md") <= ids, name


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text, re.M)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


# -- the project ---------------------------------------------------------------------------------


def test_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in [*PAGES, ROOT / ".ci" / "run"]:
        shown = re.findall(r"(?:^|`|\$ )make (?:--[a-z-]+ )?([a-z]+)", path.read_text(), re.M)
        assert set(shown) <= targets, path.name
    assert {"demo", "test", "check", "bench"} <= targets


def packages(needed: list[str]) -> set[str]:
    """Names of packages without their versions."""
    return {re.split(r"[^\w-]", text, maxsplit=1)[0] for text in needed}


def test_every_library_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = sections((ROOT / "README.md").read_text())["Libraries"]
    needs, _, extras = readme.partition("| extra |")
    listed = {name for cells in table_rows(needs) if cells[1] != "library" for name in quoted(cells[1])}
    assert listed == packages(project["dependencies"])
    optional = {cells[0].strip("`"): set(quoted(cells[1])) for cells in table_rows(extras) if cells[0].startswith("`")}
    assert optional == {name: packages(of) for name, of in project["optional-dependencies"].items()}
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["license"] == "Apache-2.0"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"^[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        assert aim.exists(), target
        assert not anchor or anchor in anchors(aim), target
    for name in quoted(text):
        if re.match(r"^(shared|services|tests|deploy|docs|benchmarks|\.ci)/[\w./*-]*$", name):
            assert list(ROOT.glob(name.rstrip("/"))), name


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    for path in DOCS.rglob("*.md"):
        if path != DOCS / "README.md":
            assert f"({path.relative_to(DOCS)})" in index, path.name


def test_architecture_is_short_and_decisions_are_a_page() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 80
    for path in (DOCS / "adr").glob("*.md"):
        assert re.match(r"^\d{4}-[a-z0-9-]+\.md$", path.name)
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_no_file_names_a_place_of_one_machine() -> None:
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    places = [f"/{name}/".encode() for name in ("work", "farm")]
    for name in filter(None, listing.split("\0")):
        file = ROOT / name
        if file.is_file():
            assert not any(place in file.read_bytes() for place in places), name
