"""History over HTTP: the rows of the store, page by page, where live ones go on, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from services.web.history import instant
from services.web.problems import Problem
from shared.bus import Bus
from shared.frames import FEATURE_COLUMNS
from shared.settings import Settings
from shared.stores import parse, read_rows
from shared.tables import FIXED_COLUMNS, GAP_COLUMNS, MESSAGE_TABLES
from shared.timeframes import FEATURED, name_of
from tests.services.sink_sqlite.tape import Stage, bars, candles, fixed, gap, sinking, stored_seq
from tests.serving import Served, Serving
from tests.wait import until

BITCOIN = "symbol=binance-futures:BTCUSDT"


def walk(served: Served, path: str) -> list[dict[str, Any]]:
    """The answers of all pages, as they follow each other."""
    answers = [served.get(path)]
    while answers[-1]["next"]:
        answers.append(served.get(f"{path}&cursor={answers[-1]['next']}"))
    return answers


def test_pages_of_a_market_are_its_rows(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    told = read_rows(market, "candles", {"symbol": "ES", "timeframe": "15s"})
    assert len(told) > 10
    for order in ("newest", "oldest"):
        answers = walk(served, f"/api/v1/candles?symbol=ES&timeframe=15s&limit=4&order={order}")
        assert {answer["table"] for answer in answers} == {"candles"}
        pages = [answer["rows"] for answer in answers]
        rows = list(itertools.chain.from_iterable(pages if order == "oldest" else reversed(pages)))
        assert rows == [row | {"complete": bool(row["complete"])} for row in told]
        assert tuple(rows[0]) == FIXED_COLUMNS
    some = served.get(f"/api/v1/candles?symbol=ES&timeframe=15s&since={told[2]['timestamp_in']}&until="
                      f"{told[5]['timestamp_in']}&columns=timestamp_in,complete")  # fmt: skip
    assert some["rows"] == [
        {"timestamp_in": row["timestamp_in"], "complete": bool(row["complete"])} for row in told[2:5]
    ]
    assert some["next"] is None


def test_every_table_has_its_rows(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    strike = read_rows(market, "pressure_metrics", {"underlying": "NQ"}, last=1)[0]
    option = urlencode({name: strike[name] for name in ("expiration", "strike", "option_type")})
    for path, table, where, above in (
        ("candles?symbol=ES&timeframe=rolling", "candles_1m", {"ticker": "ES"}, ""),
        ("candles?symbol=ES&timeframe=seconds", "candles_1s", {"ticker": "ES"}, ""),
        ("big-trades?symbol=NQ", "candles_1s", {"ticker": "NQ"}, "big_trades"),
        ("pressure?underlying=NQ", "pressure_metrics", {"underlying": "NQ"}, ""),
        (f"pressure?underlying=NQ&{option}", "pressure_metrics",
         {name: strike[name] for name in ("underlying", "expiration", "strike", "option_type")}, ""),
        ("pressure", "pressure_metrics", {}, ""),
        ("rollups?underlying=ES", "pressure_rollups", {"underlying": "ES"}, ""),
        ("signals", "signals", {}, ""),
        ("signals?underlying=NQ&status=rejected", "signals", {"underlying": "NQ", "status": "rejected"}, ""),
    ):  # fmt: skip
        told = read_rows(market, table, where)
        told = [row for row in told if not above or row[above] > 0]
        answer = served.get(f"/api/v1/{path}{'&' if '?' in path else '?'}limit=10000")
        assert answer["table"] == table
        assert len(answer["rows"]) == len(told) > 0, path
        made = [{name: _plain(value) for name, value in row.items()} for row in answer["rows"]]
        wanted = [{name: row[name] for name in made[0]} for row in told]
        assert sorted(made, key=json.dumps) == sorted(wanted, key=json.dumps), path
    names = {table.name: table.names for tables in MESSAGE_TABLES.values() for table in tables}
    for path, name in (("pressure?underlying=NQ", "pressure_metrics"), ("signals?", "signals")):
        assert tuple(served.get(f"/api/v1/{path}&limit=1")["rows"][0]) == names[name]
    features = served.get("/api/v1/features?symbol=ES&timeframe=15s&limit=3")
    assert features["table"] == "features"
    assert features["rows"] == read_rows(market, "features", {"symbol": "ES", "timeframe": "15s"}, last=3)
    assert tuple(features["rows"][0]) == ("exchange", "symbol", "timeframe", "timestamp_in", *FEATURE_COLUMNS)
    lists = served.get("/api/v1/rollups?underlying=NQ&limit=1")["rows"][0]["top_strikes"]
    assert {"strike", "option_type", "volume"} <= set(lists[0])
    assert isinstance(served.get("/api/v1/signals?limit=1")["rows"][0]["types"], list)


def _plain(value: Any) -> Any:
    """A value of the API as the stores tell it."""
    if isinstance(value, bool):
        return int(value)
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else value


def test_live_rows_go_on_where_a_page_ends(served: Served, bus: Bus, web_settings: Settings) -> None:
    path = parse(web_settings.tapeline.store).path
    stage = Stage(bus)
    bus.call("hset", bus.keys.deployment, mapping={"id": "somebus", "partitions": 1})
    assert served.get(f"/api/v1/candles?{BITCOIN}")["rows"] == []
    with sinking(bus, path):
        stage.put(bars(fixed(8)), gap())
        until(lambda: stored_seq(path) == 2)
    until(lambda: served.get("/api/v1/gaps")["id"])
    before = served.get(f"/api/v1/candles?{BITCOIN}&limit=3")
    older = served.get(f"/api/v1/candles?{BITCOIN}&limit=3&cursor={before['next']}")
    gaps = served.get("/api/v1/gaps")
    assert tuple(gaps["rows"][0]) == GAP_COLUMNS
    # A page of any rows tells how far the store had got.
    assert before["id"]
    assert before["id"] == older["id"] == gaps["id"]
    until(lambda: served.get("/api/v1/signals")["id"])
    with sinking(bus, path):
        stage.put(bars(fixed(2, 4)))
        until(lambda: stored_seq(path) == 3)
    assert served.get(f"/api/v1/candles?{BITCOIN}")["id"] != before["id"]
    bus.call("hset", bus.keys.deployment, "id", "another")
    until(lambda: served.get(f"/api/v1/candles?{BITCOIN}&limit=1")["id"] is None)


def test_a_store_that_is_not_there_yet_has_no_rows(served: Served) -> None:
    for path in ("candles?symbol=ES", "features?symbol=ES", "big-trades?symbol=ES", "pressure?underlying=ES",
                 "rollups?underlying=ES", "signals?", "gaps?"):  # fmt: skip
        answer = served.get(f"/api/v1/{path}")
        assert (answer["rows"], answer["next"]) == ([], None)
        assert served.ask(f"/api/v1/{path}&format=csv").body.count(b"\r\n") == 1


REFUSED = {
    "candles": "symbol",
    "candles?symbol=": "symbol",
    "candles?symbol=:": "':' is no symbol",
    "candles?symbol=ES&timeframe=7q": "'7q' is no timeframe; write rolling, seconds, or a length",
    "candles?symbol=ES&timeframe=99999999999999999999m": "is no timeframe",
    "candles?symbol=ES%00": "symbol",
    f"candles?symbol={'E' * 201}": "symbol",
    "candles?symbol=ES&symbol=NQ": "'symbol' is given more than once",
    "candles?symbol=ES&simbol=ES": "simbol",
    "candles?symbol=ES&limit=0": "limit",
    "candles?symbol=ES&limit=-1": "limit",
    "candles?symbol=ES&limit=x": "limit",
    f"candles?symbol=ES&limit={'9' * 5000}": "limit",
    "candles?symbol=ES&limit=10001": "limit: at most 10000 rows of json; ask for more page by page",
    "candles?symbol=ES&limit=1000001&format=csv": "limit: at most 1000000 rows of csv",
    "candles?symbol=ES&since=yesterday": "since",
    "candles?symbol=ES&since=2026-02-30": "since: '2026-02-30' is no instant; write 2026-11-21T14:31:00Z",
    "candles?symbol=ES&since=2026-11-21T24:61:00Z": "since",
    "candles?symbol=ES&since=2026-11-21&until=2026-11-20": "since is later than until",
    "candles?symbol=ES&order=up": "order",
    "candles?symbol=ES&cursor=": "cursor",
    "candles?symbol=ES&cursor=abcd": "'abcd' is no cursor",
    "candles?symbol=ES&cursor=W10": "'W10' is no cursor",
    "candles?symbol=ES&columns=": "columns",
    "candles?symbol=ES&columns=close,colour": "columns: there is no 'colour'; there are exchange, symbol, timeframe",
    "features?symbol=ES&columns=close": "columns: there is no 'close'",
    "features?symbol=ES&timeframe=5m": "timeframe",
    "candles?symbol=ES&format=xlsx": "format",
    "pressure?underlying=": "underlying",
    "pressure?underlying=ES&strike=nan": "strike",
    "pressure?underlying=ES&strike=1e999": "strike",
    "pressure?underlying=ES&expiration=2026": "expiration",
    "pressure?underlying=ES&option_type=X": "option_type",
    "signals?grade=": "grade",
    "gaps?feed=%01": "feed",
}


def test_a_store_that_cannot_be_read_is_not_the_callers_fault(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "bad.db").write_text("no database, but long enough to be taken for one")
    served = serving(tapeline_store=f"sqlite:///{tmp_path / 'bad.db'}")
    for path in ("candles?symbol=ES", "signals", "candles?symbol=ES&format=csv"):
        answer = served.ask(f"/api/v1/{path}")
        assert (answer.status, answer.json["error"]["code"]) == (503, "unavailable"), path
        assert "bad.db cannot be read" in answer.json["error"]["message"]
    health = served.ask("/health").json
    assert health["status"] == "degraded"


def test_what_cannot_be_asked_is_said_in_one_line(served: Served) -> None:
    for path, said in REFUSED.items():
        answer = served.ask(f"/api/v1/{path}")
        assert answer.status == 400, path
        error = answer.json["error"]
        assert error["code"] == "bad_request"
        assert said in error["message"], (path, error)
        assert "\n" not in error["message"]
    assert served.ask("/api/v1/candles?symbol=ES", Accept="text/html").json["error"]["code"] == "not_acceptable"


def test_a_symbol_of_several_exchanges_wants_its_exchange(served: Served, web_settings: Settings, bus: Bus) -> None:
    path = parse(web_settings.tapeline.store).path
    with sinking(bus, path):
        Stage(bus).put(
            *(candles(fixed(2), "candle", [(name, "BTCUSDT"), ("x", name)]) for name in ("binance", "bybit"))
        )
        until(lambda: stored_seq(path) == 2)
    answer = served.ask("/api/v1/candles?symbol=BTCUSDT")
    assert answer.status == 400
    assert answer.json["error"]["message"] == "BTCUSDT is on binance, bybit: write exchange:BTCUSDT"
    assert len(served.get("/api/v1/candles?symbol=bybit:BTCUSDT")["rows"]) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2026-11-21T14:31:00Z", "2026-11-21T14:31:00.000000000Z"),
        ("2026-11-21", "2026-11-21T00:00:00.000000000Z"),
        ("2026-11-21 14:31", "2026-11-21T14:31:00.000000000Z"),
        ("2026-11-21T14:31:00", "2026-11-21T14:31:00.000000000Z"),
        ("2026-11-21t14:31:00.123456789z", "2026-11-21T14:31:00.123456789Z"),
        ("2026-11-21T14:31:00.5+02:00", "2026-11-21T12:31:00.500000000Z"),
        ("2026-11-21T14:31:00 02:00", "2026-11-21T12:31:00.000000000Z"),
        ("2026-11-21T14:31:00-0530", "2026-11-21T20:01:00.000000000Z"),
        ("0001-01-01T00:00:00+14:00", "1700-01-01T00:00:00.000000000Z"),
        ("9999-12-31T23:59:59.999Z", "2260-01-01T00:00:00.000000000Z"),
    ],
)
def test_instants_are_written_in_many_ways(text: str, told: str) -> None:
    assert instant("since", text) == told


@pytest.mark.parametrize(
    "text", ["", "2026", "2026-13-01", "2026-11-21T25:00Z", "1732199460", "2026-11-21T14:31:00+99:00"]
)
def test_what_is_no_instant_is_said(text: str) -> None:
    with pytest.raises(Problem, match=r"since: '.*' is no instant; write 2026-11-21T14:31:00Z"):
        instant("since", text)


def test_the_description_names_every_column_and_length(served: Served) -> None:
    described = served.get("/openapi.json")["paths"]
    page = described["/api/v1/candles"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert list(page["properties"]["rows"]["items"]["anyOf"][-1]["properties"]) == list(FIXED_COLUMNS)
    features = described["/api/v1/features"]["get"]["parameters"]
    lengths = next(p["schema"] for p in features if p["name"] == "timeframe")
    assert lengths["enum"] == [name_of(seconds) for seconds in FEATURED]
    for path, methods in described.items():
        for told in methods.get("get", {}).get("parameters", ()):
            if path.startswith(("/api/v1/candles", "/api/v1/pressure", "/api/v1/instruments")):
                assert told.get("description") or told["schema"].get("examples"), (path, told["name"])


def test_a_name_may_hold_any_letters(served: Served) -> None:
    for name in ("ÄÖ", "a b", "a'b", 'a"b', "a;b--", "%", "日本"):
        assert served.get(f"/api/v1/candles?symbol={quote(name)}")["rows"] == []
        csv = served.ask(f"/api/v1/candles?symbol={quote(name)}&format=csv")
        assert csv.headers["content-disposition"].isascii()
