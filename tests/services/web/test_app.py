"""The server as a whole: errors in one form, the description of the API, the page's files."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.requests import Request

from services.web import assets
from services.web.app import create
from services.web.context import web_of
from shared.errors import AuthError, ConfigError, StoreUnavailable
from shared.settings import Settings
from tests.services.web.conftest import Served, Serving
from tests.serving import start


def test_errors_of_any_kind_come_in_one_form(served: Served) -> None:
    for path, method, status, code in (
        ("/no/such/path", "GET", 404, "not_found"),
        ("/api/v1/no/such/path", "GET", 404, "not_found"),
        ("/static/none.js", "GET", 404, "not_found"),
        ("/api/v1/meta", "POST", 405, "method_not_allowed"),
        ("/api/v1/meta", "DELETE", 405, "method_not_allowed"),
    ):
        answer = served.ask(path, method)
        assert (answer.status, answer.json["error"]["code"]) == (status, code), path
        assert answer.headers["content-type"] == "application/json"
        assert "\n" not in answer.json["error"]["message"]


def failing(app: FastAPI) -> None:
    """Routes that fail in each way."""

    @app.get("/api/v1/fails")
    async def fails(how: str) -> None:
        raise {
            "store": StoreUnavailable("SQLite market.db\n cannot be read now"),
            "asked": ConfigError("candles has no column 'x'"),
            "auth": AuthError("the password is hush-hush"),
            "fault": ZeroDivisionError("secret detail"),
        }[how]


def test_what_fails_behind_a_request_is_told_in_one_line(
    web_settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[FastAPI] = []

    def creating(settings: Settings) -> FastAPI:
        made.append(create(settings))
        failing(made[-1])
        return made[-1]

    monkeypatch.setattr("services.web.app.create", creating)
    served = start(web_settings)
    faults = {"where": "web.request"}
    before = REGISTRY.get_sample_value("tapeline_faults_total", faults) or 0.0
    try:
        store = served.ask("/api/v1/fails?how=store")
        assert store.status == 503
        assert store.json == {"error": {"code": "unavailable", "message": "SQLite market.db cannot be read now"}}
        assert int(store.headers["retry-after"]) >= 1
        assert served.ask("/api/v1/fails?how=asked").status == 400
        assert served.ask("/api/v1/fails?how=auth").status == 503
        assert served.ask("/api/v1/fails").json["error"]["message"].startswith("how: ")
        fault = served.ask("/api/v1/fails?how=fault")
        assert (fault.status, fault.json["error"]["code"]) == (500, "failed")
        assert b"secret" not in fault.body
        assert fault.headers["x-content-type-options"] == "nosniff"
    finally:
        served.end()
    logged = [record for record in caplog.records if record.exc_info]
    assert [str(record.exc_info[1]) for record in logged if record.exc_info] == ["secret detail"]
    assert REGISTRY.get_sample_value("tapeline_faults_total", faults) == before + 1


def test_the_description_says_what_there_is_and_what_refusals_look_like(served: Served) -> None:
    told = served.get("/openapi.json")
    assert told["info"]["title"] == "Tapeline"
    paths = {
        "/health", "/api/v1/meta", "/api/v1/instruments", "/api/v1/candles", "/api/v1/features", "/api/v1/big-trades",
        "/api/v1/pressure", "/api/v1/rollups", "/api/v1/signals", "/api/v1/gaps", "/api/v1/pipeline", "/api/v1/alerts",
        "/api/v1/alerts/{id}/ack", "/api/v1/signals/ack", "/api/v1/signals/acks", "/api/v1/stream",
    }  # fmt: skip
    assert paths <= set(told["paths"])
    for path, operations in told["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (path, method)
            assert operation["description"], (path, method)
            assert {"4XX", "401", "429", "503"} <= set(operation["responses"]), (path, method)
            assert "422" not in operation["responses"], "what is not as described is 400"
    assert "security" not in told
    for path in ("/docs", "/redoc"):
        assert served.ask(path).status == 404, "they would load scripts of others"


def test_the_description_of_a_locked_server_names_its_token(serving: Serving) -> None:
    told = serving(web_token="long enough".replace(" ", "-")).get("/openapi.json", Authorization="Bearer long-enough")
    assert [set(lock) for lock in told["security"]] == [{"bearer"}, {"cookie"}]
    assert set(told["components"]["securitySchemes"]) == {"bearer", "cookie"}


def test_a_handler_finds_the_parts_of_the_server(served: Served) -> None:
    assert web_of(Request({"type": "http", "app": served.app})).settings is served.settings


# -- the page --------------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_and_nothing_beside(served: Served) -> None:
    page = served.ask("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.body == (assets.FOLDER / "index.html").read_bytes()
    types = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    for file in sorted(assets.FOLDER.iterdir()):
        answer = served.ask(f"/static/{file.name}")
        assert (answer.status, answer.body) == (200, file.read_bytes())
        assert answer.headers["content-type"] == types.get(file.suffix, "text/html; charset=utf-8")
    for path in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "%2fetc%2fpasswd", "", ".", "a%00b", "%c3%28"):
        assert served.ask(f"/static/{path}").status == 404, path


def test_the_chart_library_is_that_of_the_package_and_its_package_is_not_imported(served: Served) -> None:
    answer = served.ask("/vendor/lightweight-charts.js", Accept_Encoding="gzip")
    assert answer.headers["content-encoding"] == "gzip"
    assert "max-age=" in answer.headers["cache-control"]
    script = gzip.decompress(answer.body)
    assert script == assets.chart_path().read_bytes()
    assert b"Lightweight Charts" in script[:200]
    assert len(answer.body) < len(script) / 3
    assert "lightweight_charts" not in sys.modules


def test_what_a_browser_has_is_not_sent_again(served: Served) -> None:
    for path in ("/", "/static/app.js", "/vendor/lightweight-charts.js"):
        first = served.ask(path)
        again = served.ask(path, If_None_Match=first.headers["etag"])
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert served.ask(path, If_None_Match='"other"').status == 200
        head = served.ask(path, "HEAD")
        assert (head.status, head.body, head.headers["etag"]) == (200, b"", first.headers["etag"])


def test_a_file_that_changes_is_served_as_it_is_now(
    serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "FOLDER", tmp_path)
    page = tmp_path / "index.html"
    page.write_text("one")
    served = serving()
    first = served.ask("/")
    page.write_text("another")
    second = served.ask("/", If_None_Match=first.headers["etag"])
    assert (first.body, second.body) == (b"one", b"another")
    page.unlink()
    assert served.ask("/").status == 404


def test_without_the_chart_package_one_line_says_what_to_install(
    web_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "CHART_MODULE", "no_such_package_at_all")
    with pytest.raises(ConfigError, match="lightweight-charts-v5, which is not installed"):
        create(web_settings)


def test_text_is_zipped_for_who_takes_it(served: Served) -> None:
    plain, zipped = served.ask("/openapi.json"), served.ask("/openapi.json", Accept_Encoding="gzip")
    assert "content-encoding" not in plain.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert gzip.decompress(zipped.body) == plain.body
