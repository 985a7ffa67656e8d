"""Black-76 through vollib, and None wherever there is nothing to say."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from prometheus_client import REGISTRY

from services.pressure import greeks, worker
from services.pressure.greeks import black_76
from tests.services.pressure.market import DAY, EXPIRY, begin, clock, frame, future, ns, only, option, play, trade

N = NormalDist().cdf


def priced(kind: str, forward: float, strike: float, days: float, rate: float, iv: float) -> tuple[float, float]:
    """(price, delta) by the formula."""
    years = days / 365
    spread = iv * math.sqrt(years)
    d1 = math.log(forward / strike) / spread + spread / 2
    discount, sign = math.exp(-rate * years), 1 if kind == "C" else -1
    price = discount * sign * (forward * N(sign * d1) - strike * N(sign * (d1 - spread)))
    return price, discount * sign * N(sign * d1)


@pytest.mark.parametrize("kind", ["C", "P"])
@pytest.mark.parametrize(
    ("strike", "days", "rate", "iv"), [(20_000, 18, 0.0, 0.2), (21_000, 0.3, 0.05, 0.9), (15_000, 400, 0.03, 0.35)]
)
def test_volatility_and_delta_are_found_again(kind: str, strike: float, days: float, rate: float, iv: float) -> None:
    price, delta = priced(kind, 20_500.0, strike, days, rate, iv)
    got_iv, got_delta = black_76(kind, price, 20_500.0, strike, days, rate)
    assert got_iv == pytest.approx(iv, rel=1e-6)
    assert got_delta == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "price", "forward", "strike", "days"),
    [
        ("C", 500.0, 20_500.0, 20_000.0, 10.0),  # the intrinsic value
        ("C", 499.0, 20_500.0, 20_000.0, 10.0),  # and below
        ("P", 500.0, 19_500.0, 20_000.0, 10.0),
        ("C", 20_500.0, 20_500.0, 20_000.0, 10.0),  # no call is worth more than the forward
        ("P", 20_000.0, 20_500.0, 20_000.0, 10.0),  # no put more than the strike
        ("C", 600.0, 20_500.0, 20_000.0, 0.0),
        ("C", 600.0, 20_500.0, 20_000.0, -1.0),
        ("C", 600.0, -37.0, 20_000.0, 1.0),
        ("C", 600.0, 20_500.0, 0.0, 1.0),
        ("C", 0.0, 20_500.0, 20_000.0, 1.0),
        ("C", math.nan, 20_500.0, 20_000.0, 1.0),
        ("C", 600.0, math.inf, 20_000.0, 1.0),
        ("C", 600.0, math.nan, 20_000.0, 1.0),
    ],
)
def test_none_where_there_is_none(kind: str, price: float, forward: float, strike: float, days: float) -> None:
    assert black_76(kind, price, forward, strike, days, 0.0) == (None, None)


def test_never_raises_and_never_gives_what_is_no_number() -> None:
    numbers = [1e-300, 1e-9, 0.01, 1.0, 19_999.99, 20_000.0, 1e9, 1e14]
    for kind in "CP":
        for price in numbers:
            for forward in numbers:
                for days in (1e-9, 0.01, 30.0, 1e5):
                    for one in black_76(kind, price, forward, 20_000.0, days, 0.02):
                        assert one is None or math.isfinite(one)


def test_what_the_package_fails_at_is_counted_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> float:
        raise TypeError("of another version")

    def counted() -> float:
        return REGISTRY.get_sample_value("tapeline_faults_total", {"where": "pressure.greeks"}) or 0.0

    before = counted()
    monkeypatch.setattr(greeks, "on_fault", worker.fault)
    monkeypatch.setattr(worker, "_told", set())
    assert black_76("C", 20_499.999999, 20_500.0, 1e-9, 1e-9, 0.0) == (None, None), "at the bounds, as it should"
    assert counted() == before
    monkeypatch.setattr(greeks, "_vollib", lambda: (broken, broken))
    for _ in range(3):
        assert black_76("C", 600.0, 20_500.0, 20_000.0, 10.0, 0.0) == (None, None)
    assert counted() == before + 3
    assert [r.getMessage() for r in caplog.records] == [
        "iv and delta of an option cannot be computed (TypeError('of another version')); further such faults are only "
        "counted"
    ]


def test_of_the_windows_close_and_the_future() -> None:
    trades = [trade(1, 999.0), trade(2, 21_000.0, who=future()), trade(200, 1500.0)]
    days = (EXPIRY - ns(300)) / 1e9 / DAY
    row = only(play([*begin(option(), future()), frame(*trades), clock(300)], greeks=True, rate=0.03))
    assert (row.iv, row.delta) == black_76("C", 1500.0, 21_000.0, 20_000.0, days, 0.03)
    assert row.iv is not None
    price, delta = priced("C", 21_000.0, 20_000.0, days, 0.03, row.iv)
    assert (price, delta) == (pytest.approx(1500.0), pytest.approx(row.delta))


def test_a_zero_day_option_stamped_midnight_has_greeks_that_day() -> None:
    today = option(expiration_ns=ns(0))
    tape = [*begin(today, future()), frame(trade(1, 21_000.0, who=future()), trade(2, 1100.0, who=today)), clock(300)]
    row = only(play(tape, greeks=True))
    assert row.days_to_expiry == pytest.approx(1 - 300 / DAY)
    assert row.iv is not None


def test_without_the_package_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeks, "find_spec", lambda name: None)
    greeks.available.cache_clear()
    try:
        assert black_76("C", 600.0, 20_500.0, 20_000.0, 10.0, 0.0) == (None, None)
    finally:
        monkeypatch.undo()
        greeks.available.cache_clear()
    assert black_76("C", 600.0, 20_500.0, 20_000.0, 10.0, 0.0) != (None, None)
