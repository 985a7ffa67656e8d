"""Log lines: machine-readable off a terminal, complete, and without secrets."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from shared import log
from shared.settings import load

FIELDS = {"time", "level", "service", "worker", "partition", "message"}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def setup(**environ: str) -> io.StringIO:
    out = io.StringIO()
    log.setup(load(environ=environ), "aggregate", "aggregate-1", out)
    return out


def test_json_lines_off_a_terminal() -> None:
    out = setup()
    logging.getLogger("x").warning("late by %d s", 3, extra={"partition": 5})
    line = json.loads(out.getvalue())
    assert set(line) == FIELDS
    assert (line["level"], line["service"], line["worker"], line["partition"]) == (
        "WARNING",
        "aggregate",
        "aggregate-1",
        5,
    )
    assert line["message"] == "late by 3 s"
    assert line["time"].endswith("Z")


def test_a_partition_thread_says_which() -> None:
    out = setup()
    thread = threading.Thread(target=lambda: logging.getLogger("x").info("here"), name="aggregate-7")
    thread.start()
    thread.join()
    assert json.loads(out.getvalue())["partition"] == 7


def test_plain_lines_when_asked() -> None:
    out = setup(TAPELINE_LOG_FORMAT="plain")
    logging.getLogger("x").info("hello", extra={"partition": 2})
    assert out.getvalue().endswith("INFO aggregate-1 p2: hello\n")


@pytest.mark.parametrize("style", ["json", "plain"])
def test_secrets_are_masked_everywhere(style: str) -> None:
    out = setup(TAPELINE_LOG_FORMAT=style, DATABENTO_API_KEY="db-SECRET-key", REDIS_URL="redis://u:hunter22@h:1/0")
    try:
        raise RuntimeError("refused db-SECRET-key at rediss://who:else-pass@elsewhere:1/0")
    except RuntimeError:
        logging.getLogger("x").exception("with %s and %s", "db-SECRET-key", "hunter22")
    for secret in ("SECRET", "hunter22", "else-pass"):
        assert secret not in out.getvalue()


def test_the_level_is_the_setting() -> None:
    out = setup(TAPELINE_LOG_LEVEL="ERROR")
    logging.getLogger("x").warning("quiet")
    assert out.getvalue() == ""
    logging.getLogger("databento.live").info("never")
