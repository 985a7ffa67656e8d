"""Market hours in event time: breaks, DST, holidays, early closes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared import calendar
from shared.calendar import ALWAYS, EQUITY_INDEX, calendar_of, sessions
from shared.errors import ConfigError


def is_open(name: str, when: str) -> bool:
    ts = np.datetime64(when, "ns").astype(np.int64)
    table = sessions(name)
    at = int(np.searchsorted(table[:, 0], ts, side="right")) - 1
    return bool(at >= 0 and ts < table[at, 1])


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2023-12-25T22:59:59.999999999", False),  # Christmas day, until 17:00 in Chicago
        ("2023-12-25T23:00:00", True),
        ("2024-05-09T20:59:59.999999999", True),  # the daily break, in summer time
        ("2024-05-09T21:00:00", False),
        ("2024-05-09T22:00:00", True),
        ("2024-01-10T21:59:59", True),  # and in winter
        ("2024-01-10T22:30:00", False),
        ("2024-05-11T12:00:00", False),  # Saturday
        ("2024-05-12T21:59:59", False),  # Sunday before the open
        ("2024-05-12T22:00:00", True),
        ("2024-03-10T22:00:00", True),  # the Sunday that summer time begins
        ("2024-11-28T17:59:59", True),  # Thanksgiving: closes at noon
        ("2024-11-28T18:00:00", False),
        ("2025-01-09T14:29:59", True),  # the day of mourning that the library does not know
        ("2025-01-09T14:30:00", False),
    ],
)
def test_equity_index_hours(when: str, expected: bool) -> None:
    assert is_open(EQUITY_INDEX, when) is expected


def test_a_market_that_never_closes_has_a_session_a_day() -> None:
    table = sessions(ALWAYS)
    assert (table[1:, 0] == table[:-1, 1]).all()
    assert is_open(ALWAYS, "2024-05-11T12:00:00")


def test_sessions_are_sorted_and_apart() -> None:
    for name in (EQUITY_INDEX, ALWAYS, "CME_Agriculture"):
        table = sessions(name)
        assert (table[:, 0] < table[:, 1]).all()
        assert (table[1:, 0] >= table[:-1, 1]).all()


def test_which_calendar() -> None:
    assert calendar_of("GLBX.MDP3", "ES", {}) == EQUITY_INDEX
    assert calendar_of("GLBX.MDP3", "CL", {}) == ALWAYS
    assert calendar_of("GLBX.MDP3", "CL", {"CL": "CMEGlobex_Energy"}) == "CMEGlobex_Energy"
    assert calendar_of("SYNTH", "ES", {}) == ALWAYS
    with pytest.raises(ConfigError, match="unknown market calendar 'Nowhere'"):
        sessions("Nowhere")


def test_a_computed_calendar_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calendar, "cache_base", lambda: tmp_path / "cache")
    fresh = calendar.sessions.__wrapped__("CME Globex Crypto")
    (kept,) = (tmp_path / "cache").iterdir()
    assert (np.load(kept) == fresh).all()
    monkeypatch.setattr(calendar, "_computed", lambda name: pytest.fail("computed again"))
    assert (calendar.sessions.__wrapped__("CME Globex Crypto") == fresh).all()
    monkeypatch.undo()
    monkeypatch.setattr(calendar, "cache_base", lambda: tmp_path / "cache")
    for damage in (b"", b"garbage", kept.read_bytes()[:200]):
        kept.write_bytes(damage)
        assert (calendar.sessions.__wrapped__("CME Globex Crypto") == fresh).all()
    monkeypatch.setattr(calendar, "cache_base", lambda: kept)  # a file where a folder should be
    assert (calendar.sessions.__wrapped__("CME Globex Crypto") == fresh).all()
