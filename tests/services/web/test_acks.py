"""Alerts and acknowledgements: over the API, shared with the command, kept on the bus, bounded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.alerts.rules import subject
from shared import acks
from shared.acks import SignalKey, ack_signal, alerts_of, find_alert, signal_acks, signal_key
from shared.alerts import Alert
from shared.bus import Bus
from shared.errors import ConfigError, TapelineError
from shared.instants import instant_ns
from shared.messages import Signal
from tests.services.web.conftest import Answer, Served

WINDOW, EXPIRES = "2026-11-21T14:30:00Z", "2026-12-18T21:30:00Z"
KEY: dict[str, Any] = {
    "underlying": "ES", "expiration": EXPIRES, "strike": 5300.0, "option_type": "C", "time_window": WINDOW,
    "source": "tapeline",
}  # fmt: skip
SIGNAL = Signal(
    "ES", instant_ns(WINDOW), 300, "sweep", "BUY", 0.9, "EXTREME", instant_ns(EXPIRES), 5300.0, "C"
)  # fmt: skip


def hold(bus: Bus, name: str, **fields: Any) -> Alert:
    """An alert as the worker commits it."""
    made = Alert(
        name, f"{subject(SIGNAL)} BUY", "sweep", "CRITICAL", "title", "text", 1, len(alerts_of(bus)), 1,
        **{"subject": subject(SIGNAL), "windows": (SIGNAL.time_window_ns,), **fields},
    )  # fmt: skip
    bus.call("hset", bus.keys.alerts("open"), name, msgspec.json.encode(made))
    return made


def post(served: Served, path: str, body: Any) -> Answer:
    return served.ask(f"/api/v1/{path}", "POST", body, X_Tapeline="1")


def test_alerts_are_listed_and_acknowledged(served: Served, bus: Bus) -> None:
    hold(bus, "a1")
    hold(bus, "a2", acked_by="bob")
    (told,) = served.get("/api/v1/alerts")["alerts"]
    assert (told["id"], told["severity"], told["subject"]) == ("a1", "CRITICAL", subject(SIGNAL))
    assert [a["id"] for a in served.get("/api/v1/alerts?all=true")["alerts"]] == ["a1", "a2"]
    answer = post(served, "alerts/a1/ack", {"by": " ann "})
    assert (answer.status, answer.json) == (200, {"acknowledged": True, "by": "ann"})
    assert bus.call("hgetall", bus.keys.alerts("acks")) == {b"a1": b"ann"}, "what the alerts worker takes"
    assert served.get("/api/v1/alerts")["alerts"] == []
    assert post(served, "alerts/a1/ack", {"by": "cy"}).json["by"] == "ann", "the first stays"
    assert post(served, "alerts/a2/ack", {"by": "cy"}).json["by"] == "bob"
    assert post(served, "alerts/a/ack", {"by": "cy"}).status == 404, "an id is not shortened here"


def test_a_signal_is_acknowledged_with_the_alert_that_covers_it(served: Served, bus: Bus) -> None:
    hold(bus, "same")
    hold(bus, "other-window", windows=(SIGNAL.time_window_ns + 1,))
    hold(bus, "other-strike", subject="ES 2026-12-18 C 5305")
    hold(bus, "seen", acked_by="bob")
    assert post(served, "signals/ack", {**KEY, "by": "ann"}).json == {"acknowledged": True}
    (told,) = served.get("/api/v1/signals/acks")["acks"]
    assert {name: told[name] for name in KEY} == KEY
    assert told["by"] == "ann"
    assert instant_ns(told["at"]) > SIGNAL.time_window_ns or told["at"] > "2024"
    assert {a.id: a.acked_by for a in alerts_of(bus)} == {
        "same": "ann", "other-window": "", "other-strike": "", "seen": "bob",
    }  # fmt: skip
    post(served, "signals/ack", {**KEY, "by": "cy"})
    assert [ack["by"] for ack in served.get("/api/v1/signals/acks")["acks"]] == ["cy"], "one entry a signal"


def test_a_key_without_an_option_is_that_of_the_row() -> None:
    key = signal_key("BTC-USDT", None, None, None, WINDOW, "plug")
    assert key == signal_key("BTC-USDT", "1970-01-01T00:00:00Z", 0.0, "", "2026-11-21 14:30:00+00:00", "plug")
    assert key.subject == "BTC-USDT (plug)"
    with pytest.raises(ConfigError, match="'noon' is no instant"):
        signal_key("ES", None, None, None, "noon", "tapeline")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("signals/ack", {}),
        ("signals/ack", {**KEY}),
        ("signals/ack", {**KEY, "by": "   "}),
        ("signals/ack", {**KEY, "by": "x" * 101}),
        ("signals/ack", {**KEY, "by": "ann", "more": 1}),
        ("signals/ack", {**KEY, "by": "ann", "time_window": "noon"}),
        ("signals/ack", {**KEY, "by": "ann", "time_window": "9999-99-99"}),
        ("signals/ack", {**KEY, "by": "ann", "strike": "much"}),
        ("signals/ack", b'{"strike": NaN}'),
        ("signals/ack", b"not JSON"),
        ("signals/ack", b"\xff\xfe"),
        ("signals/ack", []),
        ("alerts/a/ack", {"by": 1}),
        ("alerts/a/ack", {}),
    ],
)
def test_what_cannot_be_meant_is_refused(served: Served, path: str, body: Any) -> None:
    answer = post(served, path, body)
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
    assert "\n" not in answer.json["error"]["message"]


def test_what_a_form_can_send_writes_nothing(served: Served, bus: Bus) -> None:
    body = {**KEY, "by": "ann"}
    assert served.ask("/api/v1/signals/ack", "POST", body).status == 400
    assert served.ask("/api/v1/signals/ack", "POST", body, X_Tapeline="2").status == 400
    text = msgspec.json.encode(body)
    assert served.ask("/api/v1/signals/ack", "POST", text, X_Tapeline="1", Content_Type="text/plain").status == 400
    assert signal_acks(bus) == []


def test_the_oldest_acknowledgements_go(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acks, "MOST_KEPT", 10)
    monkeypatch.setattr(acks, "_GO", 3)
    ticking = iter(range(2_000_000_000, 2_000_000_100))
    monkeypatch.setattr(acks.time, "time_ns", lambda: next(ticking) * 10**9)
    for strike in range(12):
        ack_signal(bus, SignalKey("ES", 0, float(strike), "C", 10**18, "tapeline"), "ann")
    assert [ack.strike for ack in signal_acks(bus)] == [float(n) for n in range(4, 12)]


def test_the_command_finds_an_alert_by_how_its_id_begins(bus: Bus) -> None:
    hold(bus, "abc1")
    hold(bus, "abd2")
    assert find_alert(bus, "abc").id == "abc1"
    for start in ("ab", "", "x"):
        with pytest.raises(TapelineError, match="begin"):
            find_alert(bus, start)


def test_without_redis_it_is_told(serving: Any) -> None:
    served = serving(redis_url="redis://127.0.0.1:1/0")
    for answer in (served.ask("/api/v1/alerts"), post(served, "signals/ack", {**KEY, "by": "ann"})):
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
