"""When a feed may be connected: pure, by instants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.gate import BUDGET, CLOSED, GRACE_NS, NEVER, Gate, gate_of
from shared.calendar import sessions
from shared.errors import EX_CONFIG, ConfigError
from shared.frames import NS, ns_of
from shared.settings import Settings, UsageSettings

DAY = 86_400 * NS
CME = "CME Globex Equity"
BUDGETED = UsageSettings(daily_usd=25.0, stop_at=0.8)


def at(text: str) -> int:
    return ns_of(text)


def test_the_budget_shuts_until_midnight() -> None:
    gate, noon = Gate(BUDGETED), at("2026-08-03T12:00:00Z")
    assert gate.until(noon, 19.999) is None
    shut = gate.until(noon, 20.0)
    assert shut is not None
    assert (shut.state, shut.until_ns) == (BUDGET, at("2026-08-04T00:00:00Z"))
    assert shut.detail == "$20.00 spent of $25.00 a day, stops at 80%: goes on at 2026-08-04T00:00:00Z"
    assert gate.until(noon, 20.0, running=True) == shut
    assert gate.until(at("2026-08-04T00:00:00Z"), 0.0) is None
    last = gate.until(at("2026-08-03T23:59:59.999999999Z"), 500.0)
    assert last is not None
    assert last.until_ns == at("2026-08-04T00:00:00Z")


def test_without_a_budget_or_a_price_it_never_shuts() -> None:
    assert Gate(UsageSettings(daily_usd=0.0)).until(0, 1e9) is None
    assert Gate(None).until(0, 1e9) is None
    assert gate_of(Settings(), "synthetic", "", "").until(0, 1e9) is None
    assert gate_of(Settings(), "databento", "", "").until(0, 1e9) is not None


def test_market_hours() -> None:
    gate = Gate(None, CME, "databento.hours")
    friday, sunday = at("2026-08-07T21:00:00Z"), at("2026-08-09T22:00:00Z")
    assert gate.until(friday - 1, 0.0) is None
    shut = gate.until(friday, 0.0)
    assert shut is not None
    assert (shut.state, shut.until_ns, shut.ended_ns) == (CLOSED, sunday, friday)
    assert shut.detail == f"{CME} is closed: opens at 2026-08-09T22:00:00Z"
    assert gate.until(friday, 0.0, running=True) is None, "the last trades are on their way"
    assert gate.until(friday + GRACE_NS, 0.0, running=True) == shut
    assert gate.until(sunday - 1, 0.0, running=True) == shut
    assert gate.until(sunday, 0.0) is None
    assert gate.opens_ns(friday) == sunday
    assert gate.opens_ns(friday - 1) == sunday


def test_the_budget_is_said_first() -> None:
    shut = Gate(BUDGETED, CME, "databento.hours").until(at("2026-08-08T12:00:00Z"), 20.0)
    assert shut is not None
    assert shut.state == BUDGET


def test_a_market_that_never_closes_and_the_ends_of_a_calendar() -> None:
    gate = Gate(None, "24/7", "tardis.hours")
    assert gate.until(at("2026-08-08T00:00:00Z"), 0.0) is None
    assert gate.until(at("2026-08-08T00:00:00Z") - 1, 0.0) is None
    before, after = gate.until(at("2004-12-31T00:00:00Z"), 0.0), gate.until(at("2050-01-01T00:00:00Z"), 0.0)
    assert before is not None
    assert after is not None
    assert (before.until_ns, before.ended_ns) == (at("2005-01-01T00:00:00Z"), 0)
    assert after.until_ns == NEVER
    assert Gate(None).opens_ns(5) is None


@pytest.mark.parametrize("setting", ["databento.hours", "tardis.hours"])
def test_an_unknown_calendar_is_refused_by_its_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown market calendar 'NYSEE' in {setting}") as error:
        Gate(None, "NYSEE", setting)
    assert error.value.exit_code == EX_CONFIG


@given(second=st.integers(at("2026-01-01T00:00:00Z") // NS, at("2026-12-31T00:00:00Z") // NS), running=st.booleans())
def test_it_is_open_exactly_in_the_sessions(second: int, running: bool) -> None:
    """Against a plain look through all of them; and what it promises is true."""
    table, now = sessions(CME), second * NS
    shut = Gate(None, CME, "x").until(now, 0.0, running=running)
    grace = GRACE_NS if running else 0
    inside = bool(((table[:, 0] <= now) & (now < table[:, 1] + grace)).any())
    assert (shut is None) == inside
    if shut is not None:
        assert shut.until_ns == int(table[:, 0][table[:, 0] > now].min())
        assert shut.ended_ns == int(table[:, 1][table[:, 0] <= now].max())
        assert Gate(None, CME, "x").until(shut.until_ns, 0.0) is None
        assert np.isin(shut.until_ns, table[:, 0])
