"""Who is let in: the token, host names, origins, how often; and that nothing of it gets into the log."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from services.web.guard import ADDRESSES, COOKIE, Buckets, host_name, our_name
from shared.live import CLOSE_UNAUTHORIZED
from shared.settings import Web
from tests.services.web.conftest import Answer, Served, Serving

TOKEN = "correct-horse/battery=1"


def error(answer: Answer) -> tuple[int, str]:
    """The status, and the code of the error; its message is one line."""
    told = answer.json["error"]
    assert set(told) == {"code", "message"}
    assert told["message"]
    assert "\n" not in told["message"]
    return answer.status, told["code"]


@pytest.fixture
def locked(serving: Serving) -> Served:
    return serving(web_token=TOKEN)


def test_without_the_token_only_the_shell_of_the_page_and_health_are_given(locked: Served) -> None:
    for path in ("/api/v1/meta", "/api/v1/pipeline", "/openapi.json", "/no/such/path"):
        answer = locked.ask(path)
        assert error(answer) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert error(locked.ask("/api/v1/signals/ack", "POST", {}, X_Tapeline="1")) == (401, "unauthorized")
    for path in ("/", "/health", "/vendor/lightweight-charts.js", "/static/app.js"):
        assert locked.ask(path).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer " + TOKEN[:-1]},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic " + TOKEN},
        {"Authorization": "Bearer caf\xe9caf\xe9"},
        {"Cookie": f"{COOKIE}="},
        {"Cookie": f"{COOKIE}={TOKEN}x"},
        {"Cookie": f"other={TOKEN}"},
    ],
)
def test_a_wrong_token_is_none(locked: Served, headers: dict[str, str]) -> None:
    assert error(locked.ask("/api/v1/meta", **headers)) == (401, "unauthorized")


def test_the_token_is_taken_as_bearer_or_cookie(locked: Served) -> None:
    assert locked.ask("/api/v1/meta", Authorization=f"bearer {TOKEN}").status == 200
    assert locked.ask("/api/v1/meta", Cookie=f"a=b; {COOKIE}={TOKEN}").status == 200


def test_the_address_with_the_token_gives_a_cookie_and_leads_away_from_it(locked: Served) -> None:
    answer = locked.ask("/?token=correct-horse%2Fbattery%3D1")
    assert (answer.status, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
    assert locked.ask("/api/v1/meta", Cookie=cookie.partition(";")[0]).status == 200
    wrong = locked.ask("/?token=wrong")
    assert wrong.status == 401
    assert "set-cookie" not in wrong.headers
    assert wrong.headers["content-type"].startswith("text/html"), "the page asks for it"


def test_without_a_token_in_the_settings_none_is_asked_for(served: Served) -> None:
    assert served.ask("/api/v1/meta").status == 200
    answer = served.ask("/?token=some")
    assert (answer.status, answer.headers.get("set-cookie")) == (303, None)


def test_the_token_gets_into_no_log(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn.error", "websockets"):
        caplog.set_level(logging.INFO, name)
    locked = serving(web_token=TOKEN)
    locked.ask(f"/?token={TOKEN}")
    locked.ask("/api/v1/meta", Authorization=f"Bearer {TOKEN}")
    with pytest.raises(ConnectionClosed), connect(f"{locked.ws}?token={TOKEN}") as ws:
        ws.recv()
    locked.end()
    assert "correct-horse" not in caplog.text


def test_a_websocket_without_the_token_is_told_by_its_close_code(locked: Served) -> None:
    with connect(locked.ws) as ws, pytest.raises(ConnectionClosed) as closed:
        ws.recv(10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == CLOSE_UNAUTHORIZED
    assert "token" in closed.value.rcvd.reason
    for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Cookie": f"{COOKIE}={TOKEN}"}):
        with connect(locked.ws, additional_headers=headers) as ws:
            ws.send('{"op":"ping","t":1}')
            assert '"pong"' in str(ws.recv(10))


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("127.0.0.1", True), ("localhost:1", True), ("LOCALHOST", True), ("[::1]:80", True), ("127.9.9.9", True),
        ("desk.example.com", True), ("Desk.Example.com.", True), ("evil.example", False), ("", False),
        ("localhost.evil.example", False), ("192.168.1.7", False), ("a@localhost:b", False), ("[", False),
    ],
)  # fmt: skip
def test_only_our_own_names_are_answered(host: str, fine: bool, serving: Serving) -> None:
    assert our_name(host_name(host), Web(hosts=("desk.example.com",))) is fine


def test_a_server_on_all_addresses_answers_to_addresses_and_not_to_names() -> None:
    for host in ("0.0.0.0", "::"):
        assert our_name(host_name("192.168.1.7:8000"), Web(host=host))
        assert our_name(host_name("[fd00::7]"), Web(host=host))
        assert not our_name(host_name("evil.example"), Web(host=host))
    assert our_name("192.168.1.7", Web(host="192.168.1.7"))
    assert not our_name("192.168.1.8", Web(host="192.168.1.7"))


def test_another_name_is_refused_before_anything_else(locked: Served) -> None:
    for path in ("/", "/health", "/api/v1/meta"):
        assert error(locked.ask(path, Host="evil.example")) == (421, "misdirected")
    there = socket.create_connection(("127.0.0.1", locked.port))
    with pytest.raises(InvalidStatus) as refused, connect("ws://evil.example/api/v1/ws", sock=there):
        pass
    assert refused.value.response.status_code == 421


def test_a_page_of_another_site_neither_writes_nor_opens_a_websocket(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"underlying": "ES", "time_window": "2026-11-21T14:30:00Z", "by": "ann"}
    for origin in ("https://evil.example", "null", f"{served.base}0", "http://127.0.0.1"):
        refused = served.ask("/api/v1/signals/ack", "POST", body, X_Tapeline="1", Origin=origin)
        assert error(refused) == (403, "forbidden")
        with pytest.raises(InvalidStatus) as ws, connect(served.ws, origin=origin):  # type: ignore[arg-type]
            pass
        assert ws.value.response.status_code == 403
    assert not caplog.records, "whoever is refused cannot fill the log"
    assert served.ask("/api/v1/signals/ack", "POST", body, X_Tapeline="1", Origin=served.base).status == 200
    with connect(served.ws, origin=served.base):  # type: ignore[arg-type]
        pass
    read = served.ask("/api/v1/meta", Origin="https://evil.example")
    assert read.status == 200
    assert not [name for name in read.headers if name.startswith("access-control")], "a browser keeps it from the page"


def test_pages_of_cors_origins_may_read_and_write(serving: Serving) -> None:
    desk = "https://desk.example.com"
    served = serving(web_cors_origins=(desk,), web_token=TOKEN)
    asked = {"Origin": desk, "Access_Control_Request_Method": "POST",
             "Access_Control_Request_Headers": "authorization,x-tapeline"}  # fmt: skip
    before = served.ask("/api/v1/signals/ack", "OPTIONS", **asked)
    assert (before.status, before.headers["access-control-allow-origin"]) == (200, desk)
    assert "Authorization" in before.headers["access-control-allow-headers"]
    refused = served.ask("/api/v1/signals/ack", "OPTIONS", **{**asked, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    read = served.ask("/api/v1/meta", Origin=desk, Authorization=f"Bearer {TOKEN}")
    assert (read.status, read.headers["access-control-allow-origin"]) == (200, desk)
    assert "access-control-allow-credentials" not in read.headers
    with connect(served.ws, origin=desk, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as ws:  # type: ignore[arg-type]
        ws.send('{"op":"ping"}')
        assert '"pong"' in str(ws.recv(10))


def test_a_client_that_asks_too_often_has_to_wait(serving: Serving) -> None:
    served = serving(web_requests_per_second=0.5)
    assert served.ask("/openapi.json").status == 200
    answer = served.ask("/openapi.json")
    assert error(answer) == (429, "too_many")
    assert 1 <= int(answer.headers["retry-after"]) <= 2
    assert error(served.ask("/?token=guess")) == (429, "too_many")
    with pytest.raises(InvalidStatus) as refused, connect(served.ws):
        pass
    assert refused.value.response.status_code == 429
    assert served.ask("/health").status == 200
    assert served.ask("/static/app.js").status == 200


def clock() -> tuple[list[float], Callable[[], float]]:
    now = [0.0]
    return now, lambda: now[0]


def test_a_bucket_gives_a_burst_and_then_the_rate() -> None:
    now, at = clock()
    buckets = Buckets(2.0, 4.0, at)
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert buckets.take("b") == 0, "one client is not charged for another"
    now[0] = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now[0] = 100.0
    assert [buckets.take("a") for _ in range(5)] == [0, 0, 0, 0, 0.5], "what was not used does not pile up"


def test_so_many_addresses_are_remembered_and_no_more() -> None:
    _, at = clock()
    buckets = Buckets(1.0, 1.0, at)
    for address in range(2 * ADDRESSES):
        buckets.take(str(address))
    assert len(buckets._held) == ADDRESSES
    assert buckets.take(str(2 * ADDRESSES - 1)) > 0


def test_every_answer_has_the_headers_that_shield_a_page(served: Served) -> None:
    for path in ("/", "/health", "/no/such/path", "/static/app.js", "/openapi.json"):
        headers = served.ask(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "script-src" not in policy, "scripts come from here only, and none stands in the page"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_a_body_is_small_and_says_how_small(served: Served) -> None:
    big = b'{"by": "' + b"x" * 70_000 + b'"}'
    assert error(served.ask("/api/v1/signals/ack", "POST", big, X_Tapeline="1")) == (413, "too_large")
