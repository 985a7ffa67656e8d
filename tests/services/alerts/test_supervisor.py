"""supervisord's event listener: what it tells, and that it tells it without Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.alerts.supervisor import OFTEN, OFTEN_SECONDS, Exits, Heard
from shared.settings import load
from shared.supervise import LISTENER, Program, layout
from shared.supervision import Supervision
from tests.services.alerts.receiver import Receiver
from tests.wait import until


def heard(name: str, **words: str) -> Heard:
    return Heard(f"PROCESS_STATE_{name}", "aggregate-1", words)


def test_what_is_worth_telling() -> None:
    exits = Exits()
    assert exits.of(heard("FATAL"), 0, "", 0.0) == "does not start and was given up"
    assert exits.of(heard("EXITED", expected="1"), 0, "", 0.0) == "", "it had nothing more to do"
    said = exits.of(heard("EXITED", expected="1"), 78, "wrong key", 0.0)
    assert said == "ended for good with exit code 78: wrong key"


def test_a_kill_now_and_then_is_told_to_nobody_but_a_loop_is() -> None:
    exits, killed = Exits(), heard("EXITED", expected="0")
    apart = OFTEN_SECONDS / (OFTEN - 1) + 1
    assert not any(exits.of(killed, -1, "", i * apart) for i in range(50))
    told = [exits.of(killed, -1, "why", 1e6 + i) for i in range(2 * OFTEN)]
    assert [i for i, said in enumerate(told) if said] == [OFTEN - 1, 2 * OFTEN - 1]
    assert "5 times within 10 minutes" in next(filter(None, told))


@pytest.mark.heavy
def test_a_worker_that_is_given_up_is_told_though_there_is_no_redis(tmp_path: Path, receiver: Receiver) -> None:
    hook = f"{receiver.url('/ops')}?token=s3cr3t-hook-token"
    environ = {
        "TAPELINE_STATE_DIR": str(tmp_path / "state"), "REDIS_URL": "redis://127.0.0.1:1/0",
        "TAPELINE_ALERTS_CHANNELS": f"ops={hook}", "TAPELINE_METRICS_PORT": "0",
    }  # fmt: skip
    settings = load(environ=environ)
    broken = Program("broken", ("ingest-files", str(tmp_path / "none.dbn")), final=(0, 1, 78))
    with Supervision(settings, [Program("alerts", ("alerts",)), broken], None):
        got = until(lambda: receiver.got, 30, "the alert")[0]
        assert got.body["type"] == "worker"
        assert got.body["title"].startswith("broken on ")
        assert "none.dbn" in got.body["text"]
        assert got.body["details"]["worker"] == "broken"
    at = layout(settings)
    assert "s3cr3t" not in at.conf.read_text() + at.log_of(LISTENER).read_text()
    assert len(receiver.got) == 1
