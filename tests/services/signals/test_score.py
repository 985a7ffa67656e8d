"""Every formula with numbers worked out by hand, its bounds, and its symmetry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.signals import score
from services.signals.score import Spread
from tests.services.signals.tape import row

numbers = st.floats(-1e6, 1e6)
samples = st.lists(numbers, min_size=1, max_size=40).map(lambda x: np.array(x, float))
units = st.floats(0, 1)


def array(*values: float) -> np.ndarray:
    return np.array(values, float)


def test_spread_is_median_and_scaled_median_deviation() -> None:
    assert score.spread(array(1, 2, 3, 4, 100)) == Spread(3.0, 1.4826 * 1.0)  # deviations 2 1 0 1 97
    assert score.spread(array(4, 1, 3, 2)) == Spread(2.5, 1.4826 * 1.0)  # deviations 1.5 1.5 .5 .5


def test_spread_falls_back_to_the_mean_deviation() -> None:
    assert score.spread(array(5, 5, 5, 5, 9)) == Spread(5.0, 1.2533 * 0.8)
    assert score.spread(array(5, 5, 5)) == Spread(5.0, 0.0)


@given(held=samples, share=st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_quantiles_are_numpys(held: np.ndarray, share: float) -> None:
    assert score.quantile(held, share) == pytest.approx(np.percentile(held, 100 * share), abs=1e-9)


@pytest.mark.parametrize(
    ("x", "usual", "z"),
    [
        (4.4826, Spread(3.0, 1.4826), 1.0),
        (0.0, Spread(3.0, 1.5), -2.0),
        (1e9, Spread(3.0, 1.5), 10.0),
        (-1e9, Spread(3.0, 1.5), -10.0),
        (3.0, Spread(3.0, 0.0), 0.0),
        (3.1, Spread(3.0, 0.0), 10.0),
        (2.9, Spread(3.0, 0.0), -10.0),
        (3.0 + 1e-300, Spread(0.0, 5e-324), 10.0),
    ],
)
def test_robust_z(x: float, usual: Spread, z: float) -> None:
    assert score.robust_z(x, usual) == pytest.approx(z)


def test_percentile_counts_half_of_the_equal_ones() -> None:
    held = array(1, 2, 2, 3)
    assert [score.percentile(x, held) for x in (0, 1, 2, 3, 4)] == [0, 12.5, 50, 87.5, 100]


def test_tail_counts_in_the_direction_of_the_signal() -> None:
    held = array(-2, -1, 0, 1)
    assert score.tail(1.0, held, 1) == 0.875
    assert score.tail(-2.0, held, -1) == 0.875
    assert score.tail(-2.0, held, 1) == 0.125


def test_significance() -> None:
    assert score.significance(math.log(10), 100, 100, 1.0) == 1.0
    assert score.significance(-5 * math.log(10), 500, 100, 1.0) == 1.0
    assert score.significance(math.log(10) / 2, 50, 100, 0.5) == pytest.approx(0.25 + 0.15 + 0.1)
    assert score.significance(math.log(10), 100, None, 1.0) == 0.7


@pytest.mark.parametrize(
    ("last", "side", "trend"),
    [
        ([0.0, 0.2, 0.6], 1, 0.3),
        ([0.0, 0.2, 0.6], -1, -0.3),
        ([None, 0.2, 0.6], 1, 0.4),
        ([0.0, None, 0.6], 1, 0.0),  # what lies before a missing window is not consecutive
        ([None, None, 0.6], 1, 0.0),
        ([0.0, 2.0, 4.0], 1, 1.0),
        ([0.0, -2.0, -4.0], 1, -1.0),
        ([0.0, -2.0, -4.0], -1, 1.0),
    ],
)
def test_trend(last: list[float | None], side: int, trend: float) -> None:
    assert score.trend(last, side) == pytest.approx(trend)


def test_concentration() -> None:
    assert score.concentration(75, 25) == score.concentration(25, 75) == 0.5
    assert score.concentration(9, 0) == 1.0
    assert score.concentration(5, 5) == score.concentration(0, 0) == 0.0


def test_persistence_counts_a_missing_window_as_not_on_the_side() -> None:
    assert score.persistence([0.1, 2.0, 0.3], 1) == 1.0
    assert score.persistence([None, 2.0, 0.3], 1) == pytest.approx(2 / 3)
    assert score.persistence([0.0, -2.0, 0.3], 1) == pytest.approx(1 / 3)
    assert score.persistence([0.0, -2.0, -0.3], -1) == pytest.approx(2 / 3)


def test_raw_base_and_score() -> None:
    assert score.raw(0.5, 0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert score.raw(1, 0, 0, 0) == 0.4
    assert score.raw(0, 1, 0, 0) == 0.3
    assert score.raw(0, 0, 1, 0) == 0.2
    assert score.raw(0, 0, 0, 1) == 0.1
    assert score.raw(0, -1, 0, 0.1) == 0.0
    assert score.base(2.0, 0.9) == pytest.approx(0.25 + 0.45)
    assert score.base(-8.0, 1.0) == 1.0
    assert score.score(0.8, 0.6, 0.2, 1.1) == pytest.approx(0.7 * 0.9 * 1.1)
    assert score.score(1.0, 1.0, 0.0, 1.2) == 1.0
    assert score.score(1.0, 1.0, 0.0, 0.9) == 0.9


def test_straddle_and_what_follows_from_it() -> None:
    assert score.straddle(500, 500, 0) == 1.0
    assert score.straddle(500, 480, 2) == pytest.approx(0.7 * 960 / 980 + 0.3 * (1 - 2 / 300))
    assert score.straddle(100, 100, 300) == score.straddle(100, 100, 3000) == 0.7
    assert score.straddle(100, 0, 0) == 0.0
    assert [score.status(x) for x in (0, 0.21, 0.22, 0.3, 0.301, 1)] == [
        "emitted", "emitted", "monitor", "monitor", "rejected", "rejected",
    ]  # fmt: skip


def test_cluster_factor_and_grades() -> None:
    assert [score.cluster_factor(n) for n in (1, 2, 3, 9)] == [0.9, 1.1, 1.2, 1.2]
    assert [score.grade(x) for x in (1, 0.9, 0.89, 0.8, 0.7, 0.6, 0.59)] == [
        "EXTREME", "EXTREME", "VERY_HIGH", "VERY_HIGH", "HIGH", "MODERATE", "LOW",
    ]  # fmt: skip


def test_anomalies() -> None:
    assert score.anomalous(2.0, 50.0)
    assert score.anomalous(0.0, 95.0)
    assert not score.anomalous(1.9, 94.9)
    assert not score.anomalous(-3.0, 1.0)
    assert score.anomalous(-2.0, 50.0, -1)
    assert score.anomalous(0.0, 5.0, -1)
    assert not score.anomalous(3.0, 99.0, -1)
    assert not score.anomalous(None, None)


def test_types_in_order_of_precedence() -> None:
    bought = row(90, 10, sweep=(20, 0), block=(100, 0))
    assert score.types_of(bought, 1, True, True) == score.TYPES
    assert score.types_of(row(90, 10, sweep=(0, 20), block=(0, 100)), 1, False, False) == ("order_imbalance",)
    assert score.types_of(row(10, 90, sweep=(0, 20)), -1, True, False) == ("sweep", "pressure_spike", "order_imbalance")
    assert score.types_of(row(10, 90), -1, False, True) == ("volume_anomaly", "order_imbalance")
    assert score.types_of(row(55, 45), 1, False, False) == ("order_imbalance",), "at least one"
    assert score.types_of(row(55, 45), 1, True, False) == ("pressure_spike",)


@given(x=numbers, held=samples)
def test_mirrored_values_have_the_mirrored_place(x: float, held: np.ndarray) -> None:
    z, other = score.robust_z(x, score.spread(held)), score.robust_z(-x, score.spread(-held))
    assert z == -other
    assert abs(z) <= 10
    assert score.tail(x, held, 1) == score.tail(-x, -held, -1)
    assert score.percentile(x, held) == pytest.approx(100 - score.percentile(-x, -held))


@given(z=st.floats(-10, 10), tail=units, parts=st.tuples(units, st.floats(-1, 1), units, units), maker=units,
       size=st.integers(1, 9))  # fmt: skip
def test_scores_stay_within_0_and_1(
    z: float, tail: float, parts: tuple[float, float, float, float], maker: float, size: int
) -> None:
    raw, base = score.raw(*parts), score.base(z, tail)
    assert 0 <= raw <= 1
    assert 0 <= base <= 1
    assert 0 <= score.score(raw, base, maker, score.cluster_factor(size)) <= 1
