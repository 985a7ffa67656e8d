"""Grafana's data sources and dashboards: well formed, and every query answered by our metrics and a real store."""

from __future__ import annotations

import json
import math
import re
import subprocess
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
import yaml

from services.sink_timescale.parts import LAYOUTS
from services.sink_timescale.store import TimescaleStore
from shared.frames import NS
from shared.settings import load as settings_of
from tests.deploy.dashboards import FILES, GRAFANA, Query, load, promql, queries, sql, variables_of
from tests.deploy.known_metrics import known_metrics, metrics_of
from tests.postgres import PostgresServer
from tests.services.sink_sqlite.tape import gap, pressure, said, signal, usage
from tests.services.sink_timescale.tables import batch, fetch

DASHBOARDS = {path.stem: load(path) for path in FILES}
EACH = pytest.mark.parametrize("name", DASHBOARDS)
ALL = [query for dashboard in DASHBOARDS.values() for query in queries(dashboard)]
PROMETHEUS = [query for query in ALL if query.datasource["type"] == "prometheus"]
SQL = [query for query in ALL if query.datasource["type"] != "prometheus"]
TAPE = datetime(2024, 5, 9, 14, 30, tzinfo=UTC)  # of generate()
START, END = TAPE - timedelta(minutes=1), TAPE + timedelta(minutes=9)
STEP_MS = 1000
WINDOW = 60
# Of no candle of this tape: it has no books beyond the best, and is too short for the rest.
EMPTY = {"book_imbalance_5", "macd", "macd_signal", "macd_hist", "vpin"}
TIMES = {
    **{table: layout.time for table, layout in LAYOUTS.items()},
    "v_candles": "time", "v_pressure": "time", "v_signals": "time", "late_trades": "ts_event", "usage_log": "at",
}  # fmt: skip


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARDS[name]["panels"] if panel["type"] != "row"]


def provisioned() -> dict[str, dict[str, Any]]:
    """Data sources by uid."""
    [path] = (GRAFANA / "provisioning" / "datasources").glob("*.yml")
    made = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {source["uid"]: source for source in made["datasources"]}


# -- the files


def test_there_are_the_four_dashboards() -> None:
    assert set(DASHBOARDS) == {"pipeline", "candles", "pressure", "costs"}
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dashboard_is_tidy(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
    made = json.loads(text)
    assert re.fullmatch(r"[a-z0-9-]{1,40}", made["uid"])
    assert made["schemaVersion"] == 41  # Grafana 11.6 and 12; newer ones migrate it
    assert made["description"]
    assert "tapeline" in made["tags"]
    [link] = made["links"]
    assert (link["type"], link["tags"]) == ("dashboards", ["tapeline"])
    assert "id" not in made


@EACH
def test_panels_have_their_place(name: str) -> None:
    made = DASHBOARDS[name]["panels"]
    assert [panel["id"] for panel in made] == list(range(1, len(made) + 1))
    for panel in made:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["w"] > 0
        assert place["h"] > 0
        assert place["x"] + place["w"] <= 24, panel["title"]
    for one, other in combinations(made, 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (one["title"], other["title"])


@EACH
def test_panels_say_what_they_show(name: str) -> None:
    for panel in panels(name):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert defaults.get("unit") or panel["type"] in ("table", "heatmap", "state-timeline"), panel["title"]
        steps = [step["value"] for step in defaults["thresholds"]["steps"][1:]]
        assert steps == sorted(steps)


@EACH
def test_variables_are_defined(name: str) -> None:
    made = DASHBOARDS[name]
    defined = [variable["name"] for variable in made["templating"]["list"]]
    used = set[str]()
    for at, query in enumerate(queries(made)):
        named = variables_of(query.text) - {"1"}
        used |= named
        # A variable may ask for those before it.
        assert named <= set(defined[:at] if query.form == "variable" else defined), query.where
    for panel in made["panels"]:
        used |= variables_of(panel["title"])
    assert used == set(defined)


def test_data_sources_are_provisioned() -> None:
    sources = provisioned()
    for query in ALL:
        assert sources[query.datasource["uid"]]["type"] == query.datasource["type"], query.where
        if query.panel is not None:
            assert query.panel["datasource"] == query.datasource
    assert [source["uid"] for source in sources.values() if source.get("isDefault")] == ["tapeline-prometheus"]
    assert {source["uid"] for source in sources.values()} == {query.datasource["uid"] for query in ALL}


def test_no_password_stands_in_a_file() -> None:
    secret = provisioned()["tapeline-store"]["secureJsonData"]
    assert secret == {"password": "$__file{/run/secrets/grafana_db_password}"}
    assert "`cat /run/secrets/grafana_db_password`" in (GRAFANA / "reader.sql").read_text(encoding="utf-8")


def test_what_compose_gives_is_what_is_read() -> None:
    services = yaml.safe_load((GRAFANA.parent / "compose.yml").read_text(encoding="utf-8"))["services"]
    [path] = (GRAFANA / "provisioning" / "dashboards").glob("*.yml")
    [provider] = yaml.safe_load(path.read_text(encoding="utf-8"))["providers"]
    mounts = services["grafana"]["volumes"]
    assert "./grafana/provisioning:/etc/grafana/provisioning:ro" in mounts
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    assert "grafana_db_password" in services["grafana"]["secrets"]
    assert "grafana_db_password" in services["timescaledb"]["secrets"]
    scripts = [
        mount.split(":")[1] for mount in services["timescaledb"]["volumes"] if mount.startswith("./grafana/reader.sql:")
    ]
    assert scripts
    assert all(re.fullmatch(r"/docker-entrypoint-initdb\.d/\w+\.sql", script) for script in scripts)
    store, metrics = provisioned()["tapeline-store"], provisioned()["tapeline-prometheus"]
    assert store["url"] == "timescaledb:5432"
    assert store["jsonData"]["database"] == services["timescaledb"]["environment"]["POSTGRES_DB"]
    assert metrics["url"] == "http://prometheus:9090"
    prometheus = yaml.safe_load((GRAFANA.parent / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert metrics["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


# -- metrics


def test_every_metric_that_is_asked_for_exists() -> None:
    known = known_metrics()
    for query in PROMETHEUS:
        text = query.text
        if query.form == "variable":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", text)
            assert found, query.where
            used = [(found[1], frozenset({found[2]}))]
        else:
            used = metrics_of(promql(text))
        assert used, query.where
        for metric, labels in used:
            assert metric in known, f"{query.where}: there is no {metric}"
            assert labels <= known[metric], f"{query.where}: {metric} has no {labels - known[metric]}"


def test_counters_are_read_as_rates_and_legends_name_labels() -> None:
    for query in PROMETHEUS:
        for counter in re.findall(r"\w+_(?:total|bucket|count|sum)\b", query.text):
            read = re.findall(rf"(?:rate|increase)\({counter}(?:{{[^}}]*}})?\[", query.text)
            assert len(read) == query.text.count(counter), (query.where, counter)
        if query.panel is None:
            continue
        [target] = (t for t in query.panel["targets"] if t.get("expr") == query.text)
        kept = {label for by in re.findall(r"by \(([^)]*)\)", query.text) for label in by.split(", ")}
        for label in re.findall(r"{{(\w+)}}", target.get("legendFormat", "")):
            assert label in kept or "by (" not in query.text, (query.where, label)


def test_what_asks_for_labels_that_are_not_there_is_found() -> None:
    up = "tapeline_bus_worker_up"
    assert metrics_of(f"sum by (nothing) ({up})") == [(up, {"nothing"})]
    assert metrics_of(f'label_replace({up}, "kind", "$1", "service", "(.*)")') == [(up, {"service"})]
    assert metrics_of(f"{up} * on (worker) group_left (version) tapeline_build_info") == [
        (up, {"worker"}), ("tapeline_build_info", {"worker", "version"})
    ]  # fmt: skip
    assert metrics_of(f"sum by (service) ({up} and on (worker) x)") == [(up, {"service", "worker"}), ("x", {"worker"})]
    for nonsense in ("sum(", '{__name__="up"}', "rate(up)"):
        with pytest.raises(ValueError, match=r"name|expected|unclosed"):
            metrics_of(nonsense)


# -- the store


class Held(NamedTuple):
    """A store, asked as Grafana's user."""

    url: str
    reader: str
    user: str
    has_password: bool

    def ask(self, query: Query, values: dict[str, list[str]], **span: Any) -> list[dict[str, Any]]:
        made = {"start": START, "end": END, "interval_ms": STEP_MS} | span
        return fetch(self.reader, sql(query.text, values, **made))


@pytest.fixture(scope="module")
def held(postgres_servers: dict[str, PostgresServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """Three minutes of futures and options; a gap, signals and usage in the same minutes."""
    from services.ingest.dbn_file import DbnFiles
    from services.ingest.synthetic import generate
    from shared import backfill

    server = postgres_servers.setdefault("16", PostgresServer("16")).start()
    name = f"t{uuid.uuid4().hex[:10]}"
    folder = tmp_path_factory.mktemp("grafana")
    (folder / "secret").write_text("it's a secret\n", encoding="utf-8")
    script = (GRAFANA / "reader.sql").read_text(encoding="utf-8")
    for mine, there in (
        ("/run/secrets/grafana_db_password", folder / "secret"),
        ("tapeline_reader", f"{name}_reader"),
        ("ROLE grafana ", f"ROLE {name} "),
    ):
        assert mine in script
        script = script.replace(str(mine), str(there))
    server.sql(f"CREATE DATABASE {name}")
    done = subprocess.run(
        [server.bin / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", server.url(name)],
        input=script, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    has_password = server.sql(f"SELECT rolpassword IS NOT NULL FROM pg_authid WHERE rolname = '{name}'") == "t"

    tape = folder / "tape.dbn"
    generate(tape, trades=4000, rate=8.0, options=True, late_fraction=0.02, late_seconds=8)
    settings = settings_of(environ={
        "TAPELINE_STORE": server.url(name), "TAPELINE_TIMESCALE_READER_ROLE": f"{name}_reader",
        "TAPELINE_AGGREGATE_MAX_LATENESS_SECONDS": "2", "TAPELINE_PRESSURE_WINDOW_SECONDS": str(WINDOW),
    })  # fmt: skip
    files = DbnFiles([tape, folder / "tape.definitions.dbn"], settings.tapeline.partitions)
    backfill.run([files], settings, lambda _: None, threading.Event())
    at = int(TAPE.timestamp()) * NS
    store = TimescaleStore(server.url(name), settings.timescale)
    store.open()
    store.write(batch(
        said(*(signal(n, underlying="CL", time_window_ns=at + n * WINDOW * NS) for n in range(3))),
        said(*(usage(n, day="2024-05-09", at_ns=at + n * WINDOW * NS) for n in range(3))),
        said(*(pressure(n, underlying="YM") for n in (0, 1, 2, 12))), gap(at + 30 * NS, ("ESM4",)),
    ))  # fmt: skip
    store.close()
    # As if a gap had touched them.
    server.sql("UPDATE candles SET complete = false WHERE timestamp_in = '2024-05-09T14:30:30Z'", name)
    yield Held(server.url(name), server.url(name, user=name), name, has_password)
    server.sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.sql(f"DROP ROLE {name}; DROP ROLE {name}_reader")


@pytest.fixture(scope="module")
def chosen(held: Held) -> dict[str, dict[str, list[str]]]:
    """By dashboard: the values of its variables, as Grafana chooses them when the page is opened."""
    out = {}
    for name, dashboard in DASHBOARDS.items():
        values = out[name] = dict[str, list[str]]()
        asked = {query.where: query for query in queries(dashboard)}
        for variable in dashboard["templating"]["list"]:
            current = variable["current"].get("value", [])
            current = [current] if isinstance(current, str) else current
            if variable["type"] == "custom":
                values[variable["name"]] = current
            elif variable["datasource"]["type"] != "prometheus":
                rows = held.ask(asked[f"{dashboard['title']}: variable {variable['name']}"], values)
                offered = [value for row in rows for value in row.values()]
                assert offered, variable["name"]
                assert all(isinstance(value, str) for value in offered)
                assert len(set(offered)) == len(offered)
                first = offered if current == ["$__all"] else offered[:1]
                values[variable["name"]] = [v for v in current if v in offered] or first
    out["candles"]["timeframe"] = ["15s"]  # more candles than of a minute
    return out


def query_of(name: str, title: str) -> Query:
    [found] = (query for query in queries(DASHBOARDS[name]) if query.panel and query.panel["title"] == title)
    return found


def test_the_variables_offer_what_the_store_holds(held: Held, chosen: dict[str, dict[str, list[str]]]) -> None:
    assert chosen["candles"]["exchange"] == ["SYNTH"]
    assert chosen["candles"]["symbol"] == ["CL"]  # a ticker, before contracts and options
    asked = {query.where.partition(": variable ")[2]: query for query in SQL if query.form == "variable"}
    one, [underlying] = "exchange = 'SYNTH' AND symbol = 'CL'", chosen["pressure"]["underlying"]
    for variable, statement in {
        "exchange": "SELECT DISTINCT exchange FROM candles",
        "symbol": "SELECT DISTINCT symbol FROM candles WHERE exchange = 'SYNTH'",
        "timeframe": f"SELECT DISTINCT timeframe FROM candles WHERE {one}",
        "ticker": "SELECT DISTINCT ticker FROM candles_1m",
        "underlying": "SELECT DISTINCT underlying FROM pressure_rollups",
        "expiry": "SELECT DISTINCT to_char(expiration AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') "
        f"FROM pressure_metrics WHERE underlying = '{underlying}'",
    }.items():
        rows = held.ask(asked[variable], chosen["candles"] | chosen["pressure"])
        told = [value for row in rows for value in row.values()]
        assert sorted(told) == sorted(value for row in fetch(held.url, statement) for value in row.values()), variable
    assert [row["name"] for row in held.ask(asked["timeframe"], chosen["candles"])] == ["15s", "1m", "5m"]


@pytest.mark.parametrize("query", [q for q in SQL if q.form != "variable"], ids=lambda query: query.where)
def test_every_statement_gives_what_its_panel_wants(
    query: Query, held: Held, chosen: dict[str, dict[str, list[str]]]
) -> None:
    [name] = (n for n, dashboard in DASHBOARDS.items() if query.where.startswith(f"{dashboard['title']}: "))
    rows = held.ask(query, chosen[name])
    assert rows, query.where
    columns = list(rows[0])
    if query.form == "annotation":
        assert {"time", "text", "tags"} <= set(columns)
        assert isinstance(rows[0]["time"], datetime)
        return
    assert query.panel is not None
    if query.form == "time_series" or "time" in columns:
        assert all(isinstance(row["time"], datetime) for row in rows)
    if query.form == "time_series":
        series = "metric" in columns
        places = [(row["time"], row.get("metric")) for row in rows]
        assert [time for time, _ in places] == sorted(time for time, _ in places)
        assert len(set(places)) == len(places)
        numbers = [column for column in columns if column not in ("time", "metric")]
        assert numbers == ["value"] if series else len(numbers) >= 1
        for column in numbers:
            told = {type(row[column]) for row in rows}
            assert told <= {float, int, Decimal, type(None)}, column
    for column in set(columns) - EMPTY:
        assert any(row[column] is not None for row in rows), f"{query.where}: {column} is always NULL"
    if query.panel["type"] == "candlestick":
        fields = query.panel["options"]["fields"]
        assert {"open", "high", "low", "close"} <= set(fields)
        for row in rows:
            low, high = row[fields["low"]], row[fields["high"]]
            assert low is None or low <= min(row[fields["open"]], row[fields["close"]])
            assert high is None or high >= max(row[fields["open"]], row[fields["close"]])
    if query.panel["type"] == "heatmap":
        assert columns == ["time", "metric", "value"]
    if query.panel["type"] not in ("table", "stat") or "metric" in columns:
        columns = [row["metric"] for row in rows] if "metric" in columns else columns
    for override in query.panel["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in columns, f"{query.where}: no column {override['matcher']['options']}"


def test_incomplete_candles_are_marked(held: Held, chosen: dict[str, dict[str, list[str]]]) -> None:
    query = query_of("candles", "${exchange} ${symbol} ${timeframe}")
    for symbol in ("CL", "ESM4"):
        rows = held.ask(query, chosen["candles"] | {"symbol": [symbol]})
        stored = fetch(
            held.url,
            "SELECT timestamp_in, low, complete FROM candles WHERE symbol = $1 AND timeframe = '15s' ORDER BY 1",
            symbol,
        )
        assert [row["time"] for row in rows] == [row["timestamp_in"] for row in stored]
        assert {row["complete"] for row in stored} == {True, False}
        assert [row["incomplete"] for row in rows] == [None if row["complete"] else row["low"] for row in stored]


@pytest.mark.parametrize("measure", ["net", "C", "P"])
def test_the_heat_map_adds_up_the_windows_of_a_cell(
    measure: str, held: Held, chosen: dict[str, dict[str, list[str]]]
) -> None:
    query = next(query for query in SQL if query.panel and query.panel["type"] == "heatmap")
    values = chosen["pressure"] | {"measure": [measure]}
    [underlying] = values["underlying"]
    stored = fetch(held.url, "SELECT * FROM pressure_metrics WHERE underlying = $1", underlying)
    for interval_ms, width in ((1000, 60), (61_000, 120)):
        sums: dict[tuple[datetime, float], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in stored:
            if measure not in ("net", row["option_type"]):
                continue
            begin = row["time_window"] - timedelta(seconds=row["time_window"].timestamp() % width)
            cell = sums[begin + timedelta(seconds=width), row["strike"]]
            turned = measure == "net" and row["option_type"] == "P"
            cell[turned] += row["ask_volume"]
            cell[not turned] += row["bid_volume"]
        told = {
            (row["time"], float(row["metric"])): row["value"]
            for row in held.ask(query, values, interval_ms=interval_ms)
        }
        expected = {place: math.log((up + 0.5) / (down + 0.5)) for place, (up, down) in sums.items()}
        assert {place: value for place, value in told.items() if value is not None} == pytest.approx(expected)


def test_the_heat_map_has_cells_where_nothing_traded(held: Held) -> None:
    query = next(query for query in SQL if query.panel and query.panel["type"] == "heatmap")
    rows = fetch(held.url, "SELECT * FROM pressure_metrics WHERE underlying = $1 ORDER BY time_window", "YM")
    first, last = rows[0], rows[-1]
    length = timedelta(seconds=first["window_seconds"])
    assert last["time_window"] - first["time_window"] == 3 * length
    values = {
        "underlying": [first["underlying"]], "measure": ["net"],
        "expiry": sorted({f"{row['expiration']:%Y-%m-%dT%H:%M:%SZ}" for row in rows}),
    }  # fmt: skip
    # What tells the length of a window is the roll-up; there is none of these rows.
    text = query.text.replace("FROM pressure_rollups", "FROM pressure_metrics")
    told = held.ask(query._replace(text=text), values, start=first["time_window"], end=last["time_window"])
    assert sorted({row["time"] for row in told}) == [first["time_window"] + length * n for n in (1, 2, 3, 4)]
    assert {row["time"]: row["value"] for row in told}[first["time_window"] + 2 * length] is None


def test_the_reader_may_only_read(held: Held) -> None:
    assert held.has_password
    for statement in ("DELETE FROM candles", "CREATE TABLE mine (n integer)", "SELECT rolpassword FROM pg_authid"):
        with pytest.raises(asyncpg.PostgresError, match=r"read-only|permission denied"):
            fetch(held.reader, statement)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            fetch(f"{held.reader}?default_transaction_read_only=off", statement)


def test_hypertables_are_asked_for_a_time_range() -> None:
    """Without one, every chunk would be read; only names are looked up everywhere, one by one in the key's index."""
    for query in SQL:
        tables = [table for table in re.findall(r"(?:FROM|JOIN)\s+(\w+)", query.text) if table in TIMES]
        if query.form == "variable":
            looks = re.findall(r"ORDER BY \w+ LIMIT 1\)", query.text)
            assert tables, query.where
            assert len(looks) == len(tables), query.where
            assert "DISTINCT" not in query.text
            assert "EXISTS" not in query.text
        else:
            told = Counter(re.findall(r"\$__timeFilter\((\w+)\)", query.text))
            assert told == Counter(TIMES[table] for table in tables), query.where
