"""How long commands tell how far they are: moving on a terminal, a plain line now and then elsewhere, else nothing."""

from __future__ import annotations

import threading

import pytest

from shared import cli_common
from shared.cli_common import bar, busy, progress
from tests.wait import until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_common, "TELL_SECONDS", 0.0)
    monkeypatch.setattr(cli_common, "BUSY_SECONDS", 0.01)


def test_off_a_terminal_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(False, "letters", 2000) as tell:
        tell(1000)
    with progress(False, lambda n: f"{n} rows") as tell:
        tell(7)
    assert capsys.readouterr() == ("letters: 1,000 of 2,000\n7 rows\n", "")


def test_for_programs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(True, "letters", 2) as tell, progress(True, str) as say, busy(True, "drawing"):
        tell(1)
        say(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("data", [False, True])
def test_what_takes_long_says_how_long(capsys: pytest.CaptureFixture[str], data: bool) -> None:
    """On stderr where stdout carries data; its thread ends with it, also when it fails."""
    said = ["", ""]

    def heard() -> str:
        for number, text in enumerate(capsys.readouterr()):
            said[number] += text
        return said[data]

    def draw() -> None:
        with busy(False, "drawing", data=data):
            until(heard)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        draw()
    assert said[data].startswith("drawing: 0 s\n")
    assert said[not data] == ""
    assert not [t for t in threading.enumerate() if t.name == "busy"]


def test_on_a_terminal_it_moves_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with bar(False, "letters", 2) as tell:
        tell(2)
    with busy(False, "drawing"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "letters" in err
    assert "drawing" in err
