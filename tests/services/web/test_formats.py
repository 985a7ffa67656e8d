"""Files of history: CSV and Parquet hold what JSON holds, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import urllib.error
from http.client import IncompleteRead
from typing import Any

import pyarrow.parquet as pq
import pytest
from starlette.requests import Request

from services.web import history
from services.web.formats import columns_of, file_name, format_of
from services.web.problems import Problem
from shared.bus import Bus
from shared.errors import StoreUnavailable
from shared.settings import Settings
from shared.store_pages import Page, PageAsk, Pages
from shared.stores import parse
from tests.services.sink_sqlite.tape import Stage, bars, fixed, gap, sinking, stored_seq
from tests.serving import Answer, Served, Serving
from tests.wait import until

EVERY = (
    "candles?symbol=ES&timeframe=15s", "candles?symbol=ES&timeframe=rolling", "features?symbol=ES&timeframe=15s",
    "pressure?underlying=NQ", "rollups?underlying=NQ", "signals?underlying=ES",
)  # fmt: skip
_ACCEPTS = [
    (None, "", "json"),
    (None, "*/*", "json"),
    (None, "text/html,application/xml;q=0.9,*/*;q=0.8", "json"),
    (None, "text/csv", "csv"),
    (None, "application/json;q=0.2, text/csv;q=0.7", "csv"),
    (None, "application/vnd.apache.parquet, text/csv;q=0.9", "parquet"),
    (None, "text/csv;q=nonsense, application/json", "json"),
    ("parquet", "text/csv", "parquet"),
]


def read_csv(answer: Answer) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))


def read_parquet(answer: Answer) -> Any:
    return pq.ParquetFile(io.BytesIO(answer.body))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


def test_files_hold_what_json_holds(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    for path in EVERY:
        told = served.get(f"/api/v1/{path}&limit=40")
        answer = served.ask(f"/api/v1/{path}&limit=40&format=csv")
        assert answer.headers["content-type"].startswith("text/csv")
        assert read_csv(answer) == [{name: _text(value) for name, value in row.items()} for row in told["rows"]], path
        same = served.ask(f"/api/v1/{path}&limit=40", Accept="text/csv")
        assert same.body == answer.body
        file = served.ask(f"/api/v1/{path}&limit=40&format=parquet")
        assert file.headers["content-type"] == "application/vnd.apache.parquet"
        table = read_parquet(file).read()
        sorts = columns_of("candles" if path.startswith("features") else told["table"])
        for field in table.schema:
            wanted = [row[field.name] for row in told["rows"]]
            made = table.column(field.name).to_pylist()
            if sorts[field.name].name == "instant":
                assert str(field.type) == "timestamp[us, tz=UTC]"
                made = [at.isoformat(timespec="microseconds")[:26] for at in made]
                wanted = [f"{text[:19]}.{text[20:-1]:0<6}"[:26] for text in wanted]
            elif sorts[field.name].name == "json":
                made = [json.loads(text) for text in made]
            assert made == wanted, (path, field.name)
        # The next file begins where this one ends.
        for headers in (answer.headers, file.headers):
            assert headers.get("x-next-cursor") == told["next"]
    assert served.ask("/api/v1/candles?symbol=ES&timeframe=15s&format=csv").headers["content-disposition"] == (
        'attachment; filename="candles_ES_15s.csv"'
    )


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE_ROWS", 7)


@pytest.mark.usefixtures("small_pages")
def test_a_file_of_many_pages_is_one_file(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    for every in (
        "pressure?underlying=ES&columns=time_window,strike",
        "candles?symbol=ES&timeframe=rolling&columns=time",
    ):
        whole = served.get(f"/api/v1/{every}&limit=120")["rows"]
        since = min(row[name] for row in whole for name in ("time", "time_window") if name in row)
        query = f"{every}&since={since}"
        whole = served.get(f"/api/v1/{query}&limit=10000")["rows"]
        assert len(whole) >= 120
        for order in ("newest", "oldest"):
            for limit, files in ((50, 2), (49, 2), (10_000, 1)):
                cursor, parts = "", []
                for _ in range(files):
                    path = f"/api/v1/{query}&limit={limit}&order={order}{cursor}"
                    answer = served.ask(f"{path}&format=csv")
                    told = served.get(path)
                    rows = read_csv(answer)
                    assert rows == [{name: _text(value) for name, value in row.items()} for row in told["rows"]]
                    assert answer.headers.get("x-next-cursor") == told["next"]
                    parquet = served.ask(f"{path}&format=parquet")
                    assert read_parquet(parquet).metadata.num_row_groups == -(-len(rows) // 7)
                    assert read_parquet(parquet).read(told["rows"][0].keys()).num_rows == len(rows)
                    parts.append(told["rows"])
                    cursor = f"&cursor={told['next']}"
                joined = [row for part in (parts if order == "oldest" else reversed(parts)) for row in part]
                span = whole[: len(joined)] if order == "oldest" else whole[-len(joined) :]
                assert joined == span


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_half_a_file_is_no_file(serving: Serving, market: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(tapeline_store=market)
    page, asked = Pages.page, []

    async def failing(self: Pages, ask: PageAsk) -> Page:
        asked.append(ask)
        if ask.upto is not None and len([a for a in asked if a.upto is not None]) > 3:
            raise StoreUnavailable("the disk is gone")
        return await page(self, ask)

    monkeypatch.setattr(Pages, "page", failing)
    path = f"/api/v1/candles?symbol=ES&timeframe=rolling&limit=70&format={form}"
    with pytest.raises((IncompleteRead, ConnectionError, urllib.error.URLError)):
        served.ask(path, Accept_Encoding="identity")
    monkeypatch.setattr(Pages, "page", page)
    assert served.ask(path).status == 200


@pytest.mark.usefixtures("small_pages")
def test_what_comes_late_into_a_file_is_in_it(served: Served, bus: Bus, web_settings: Settings) -> None:
    """Rows that are written while a file is read: none of those that were there is left out."""
    path = parse(web_settings.tapeline.store).path
    stage, page = Stage(bus), Pages.page
    with sinking(bus, path):
        stage.put(bars(fixed(60)), gap())
        until(lambda: stored_seq(path) == 2)
        before = served.get("/api/v1/candles?symbol=BTCUSDT&limit=25")["rows"]
        late = fixed(60)
        late["time_ns"] += 30_000_000_000
        done: list[int] = []

        async def meanwhile(self: Pages, ask: PageAsk) -> Page:
            if ask.upto is not None and not done:
                done.append(stage.put(bars(late)))
                until(lambda: stored_seq(path) == done[0])
            return await page(self, ask)

        Pages.page = meanwhile  # type: ignore[method-assign]
        try:
            rows = read_csv(served.ask("/api/v1/candles?symbol=BTCUSDT&limit=25&format=csv"))
        finally:
            Pages.page = page  # type: ignore[method-assign]
    times = [row["timestamp_in"] for row in rows]
    assert times == sorted(times)
    assert {row["timestamp_in"] for row in before} < set(times)


def test_a_file_begins_with_its_header_and_ends_its_lines(serving: Serving, market: str) -> None:
    served = serving(tapeline_store=market)
    answer = served.ask("/api/v1/candles?symbol=ES&timeframe=1m&columns=bid_price&format=csv&limit=2")
    assert answer.body == b'bid_price\r\n""\r\n""\r\n'
    empty = served.ask("/api/v1/candles?symbol=none&columns=close,complete&format=parquet")
    assert read_parquet(empty).schema_arrow.names == ["close", "complete"]
    assert read_parquet(empty).read().num_rows == 0
    assert served.ask("/api/v1/candles?symbol=none&columns=close,open&format=csv").body == b"close,open\r\n"


@pytest.mark.parametrize(("asked", "accept", "wanted"), _ACCEPTS)
def test_the_format_is_what_is_asked_for(asked: str | None, accept: str, wanted: str) -> None:
    request = Request({"type": "http", "headers": [(b"accept", accept.encode())]})
    assert format_of(request, asked) == wanted


def test_a_format_that_is_not_there() -> None:
    request = Request({"type": "http", "headers": [(b"accept", b"image/png, text/csv;q=0")]})
    with pytest.raises(Problem, match=r"there is application/json, text/csv, application/vnd.apache.parquet"):
        format_of(request, None)


def test_file_names_are_safe() -> None:
    assert file_name(["candles", "a/../b: ü", "1m"], "csv") == "candles_a-..-b_1m.csv"
    assert len(file_name(["x" * 500], "parquet")) <= 128
