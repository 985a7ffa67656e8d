"""The webhook: what counts as delivered, what is tried again and when, what is refused."""

from __future__ import annotations

from email.utils import formatdate
from typing import Any

import pytest

from services.alerts.channels import RETRY_AFTER_MAX_SECONDS, Webhook, message_of
from shared.alerts import PENDING, REFUSED, SENT, Alert
from shared.log import Masker
from tests.services.alerts.receiver import Receiver

ALERT = Alert("a1", "k", "gap", "INFO", "t", "x", 1_000, 2_000, 3_000, count=7)


def send(url: str, number: int = 0, timeout: float = 5.0) -> Any:
    return Webhook(url, Masker(), timeout).send(message_of(ALERT, number))


@pytest.mark.parametrize(
    ("code", "state"),
    [(200, SENT), (202, SENT), (204, SENT), (301, REFUSED), (307, REFUSED), (400, REFUSED), (401, REFUSED),
     (404, REFUSED), (410, REFUSED), (408, PENDING), (425, PENDING), (429, PENDING), (500, PENDING), (503, PENDING)],
)  # fmt: skip
def test_what_an_answer_means(receiver: Receiver, code: int, state: str) -> None:
    receiver.answer = lambda path, before: (code, {"Location": receiver.url("elsewhere")})
    answer = send(receiver.url("x"))
    assert answer.state == state
    assert (str(code) in answer.reason) == (state != SENT)
    assert len(receiver.got) == 1


def test_what_is_sent_is_the_same_each_time(receiver: Receiver) -> None:
    for number in (0, 0, 2):
        send(receiver.url("x"), number)
    assert [g.key for g in receiver.got] == ["a1", "a1", "a1:2"]
    assert receiver.got[0].body == receiver.got[1].body
    assert receiver.got[0].body["raised_at"] == "1970-01-01T00:00:02Z"
    assert "count" not in receiver.got[0].body, "which grows between attempts"


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("7", 7, 7), ("999999", RETRY_AFTER_MAX_SECONDS, RETRY_AFTER_MAX_SECONDS), ("soon", 0, 0), ("-3", 0, 0),
     (formatdate(usegmt=True), 0, 0), (formatdate(4e9, usegmt=True), RETRY_AFTER_MAX_SECONDS, RETRY_AFTER_MAX_SECONDS)],
)  # fmt: skip
def test_retry_after_is_honoured(receiver: Receiver, header: str, low: float, high: float) -> None:
    receiver.answer = lambda path, before: (429, {"Retry-After": header})
    assert low <= send(receiver.url("x")).after <= high


def test_a_user_in_the_url_is_a_header(receiver: Receiver) -> None:
    send(f"http://ann:p%40ss@127.0.0.1:{receiver.port}/x?y=1")
    assert receiver.got[0].headers["authorization"] == "Basic YW5uOnBAc3M="
    assert receiver.got[0].path == "/x?y=1"


def test_silence_and_refused_connections_are_tried_again(receiver: Receiver) -> None:
    assert send(receiver.url("hang"), timeout=0.05).state == PENDING
    receiver.close()
    answer = send(receiver.url("x"))
    assert answer.state == PENDING
    assert answer.reason.startswith("cannot be reached")


def test_what_is_no_http_is_tried_again(receiver: Receiver) -> None:
    assert send(receiver.url("x", "https")).state == PENDING
