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

FIELDS = {"time", "level", "service", "worker", "partition", "symbol", "module", "message"}


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
    logging.getLogger("x").warning("late by %d s", 3, extra={"partition": 5, "symbol": "ESZ6"})
    line = json.loads(out.getvalue())
    assert set(line) == FIELDS
    assert (line["level"], line["service"], line["worker"], line["partition"]) == (
        "WARNING",
        "aggregate",
        "aggregate-1",
        5,
    )
    assert (line["symbol"], line["module"]) == ("ESZ6", "x")
    assert line["message"] == "late by 3 s"
    assert line["time"].endswith("Z")


def test_a_line_about_nothing_in_particular_has_all_fields() -> None:
    out = setup()
    logging.getLogger("x").info("here")
    line = json.loads(out.getvalue())
    assert set(line) == FIELDS
    assert line["partition"] is None
    assert line["symbol"] is None


@pytest.mark.parametrize(
    ("thread", "partition"), [("aggregate-7", 7), ("sink-3", 3), ("Thread-5", None), ("x-7", None)]
)
def test_a_partition_thread_says_which(thread: str, partition: int | None) -> None:
    out = setup()
    worker = threading.Thread(target=lambda: logging.getLogger("x").info("here"), name=thread)
    worker.start()
    worker.join()
    assert json.loads(out.getvalue())["partition"] == partition


def test_a_line_of_a_partition_thread_may_be_about_none() -> None:
    out = setup()
    about = {"partition": None}
    worker = threading.Thread(target=lambda: logging.getLogger("x").info("all", extra=about), name="aggregate-7")
    worker.start()
    worker.join()
    assert json.loads(out.getvalue())["partition"] is None


def test_several_symbols_are_named_up_to_a_bound() -> None:
    assert log.names(()) is None
    assert log.names(("BTCUSDT", "ETHUSDT")) == "BTCUSDT,ETHUSDT"
    assert log.names([f"S{i}" for i in range(12)]) == "S0,S1,S2,S3,S4,S5,S6,S7,S8,S9 and 2 more"


def test_plain_lines_when_asked() -> None:
    out = setup(TAPELINE_LOG_FORMAT="plain")
    logging.getLogger("x").info("hello", extra={"partition": 2})
    logging.getLogger("x").info("hello", extra={"partition": 2, "symbol": "ESZ6"})
    first, second = out.getvalue().splitlines()
    assert first.endswith("INFO aggregate-1 p2: hello")
    assert second.endswith("INFO aggregate-1 p2 ESZ6: hello")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_lines_are_plain_and_the_level_has_a_colour(
    no_color: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    log.setup(load(environ={}), "aggregate", "aggregate-1", out)
    logging.getLogger("x").warning("careful")
    coloured = "\x1b[33mWARNING\x1b[0m aggregate-1: careful"
    assert ("WARNING aggregate-1: careful" if no_color else coloured) in out.getvalue()


@pytest.mark.parametrize("style", ["json", "plain"])
def test_secrets_are_masked_everywhere(style: str) -> None:
    out = setup(TAPELINE_LOG_FORMAT=style, DATABENTO_API_KEY="db-SECRET-key", REDIS_URL="redis://u:hunter22@h:1/0")
    try:
        raise RuntimeError("refused db-SECRET-key at rediss://who:else-pass@elsewhere:1/0")
    except RuntimeError:
        about = {"symbol": "db-SECRET-key"}
        logging.getLogger("x").exception("with %s and %s", "db-SECRET-key", "hunter22", extra=about)
    for secret in ("SECRET", "hunter22", "else-pass"):
        assert secret not in out.getvalue()


def test_the_level_is_the_setting() -> None:
    out = setup(TAPELINE_LOG_LEVEL="ERROR")
    logging.getLogger("x").warning("quiet")
    assert out.getvalue() == ""
    logging.getLogger("databento.live").info("never")


@pytest.fixture
def _levels() -> Iterator[None]:
    """Loggers that a test asks other levels of, as they were."""
    names = ("services.ingest", "databento", "someone.elses")
    before = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_levels")
def test_levels_by_module() -> None:
    levels = "services.ingest=DEBUG,databento=INFO,someone.elses=ERROR"
    out = setup(TAPELINE_LOG_LEVEL="WARNING", TAPELINE_LOG_LEVELS=levels)
    for name in ("services.ingest.publisher", "services.aggregate.worker", "databento.live", "someone.elses.part"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "said")
    said = [(line["module"], line["level"]) for line in map(json.loads, out.getvalue().splitlines())]
    assert said == [
        ("services.ingest.publisher", "DEBUG"), ("services.ingest.publisher", "INFO"),
        ("services.ingest.publisher", "WARNING"), ("services.aggregate.worker", "WARNING"),
        ("databento.live", "INFO"), ("databento.live", "WARNING"),
    ]  # fmt: skip
