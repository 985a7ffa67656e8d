"""Random tapes: the core says what a slow second implementation says, in any cutting, after any restart, mirrored."""

from __future__ import annotations

import math
from dataclasses import replace as with_
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from services.signals.baseline import key_of
from services.signals.core import WITHDRAWN
from services.signals.verdict import Limits
from shared.messages import Pressure, PressureRollup, Signal
from tests.services.signals.oracle import Rows, verdicts
from tests.services.signals.tape import (
    CONFIG,
    DAY,
    EXPIRY,
    START,
    WINDOW,
    Message,
    Stage,
    frames,
    mirrored,
    rollup,
    row,
    signals_of,
)

SMALL = with_(CONFIG, count=3, limits=Limits(min_samples=3, cluster_width=2, emit_from=0.3))
KEYS = [
    (EXPIRY, 100.0, "C"),
    (EXPIRY, 100.0, "P"),
    (EXPIRY, 105.0, "C"),
    (EXPIRY, 110.0, "C"),
    (EXPIRY + DAY, 100.0, "C"),
]
volumes = st.integers(0, 40) | st.sampled_from([0, 200])


@st.composite
def rows(draw: st.DrawFn, at: int) -> list[Pressure]:
    out = []
    for expiration, strike, kind in draw(st.lists(st.sampled_from(KEYS), min_size=1, unique=True)):
        ask, bid = draw(volumes), draw(volumes)
        unknown = draw(st.sampled_from([0, 3])) or int(ask + bid == 0)
        out.append(row(
            ask, bid, at, strike, kind, expiration=expiration, unknown=unknown,
            trades=draw(st.sampled_from([1, 10, 30])), mean_sec=draw(st.integers(0, 299)),
            moneyness=draw(st.sampled_from([None, 1.0, 1.0, 1.04])),
        ))  # fmt: skip
    return out


@st.composite
def tapes(draw: st.DrawFn) -> list[Message]:
    """Windows of some days, most at the same times of day; some are revised before the next one ends."""
    out: list[Message] = []
    start = draw(st.sampled_from([START, START // DAY * DAY + DAY - 2 * WINDOW]))  # or over midnight
    for day in range(draw(st.integers(3, 6))):
        for place in sorted(draw(st.sets(st.sampled_from([0, 1, 2, 3, 9]), min_size=1))):
            at = start + day * DAY + place * WINDOW
            held = {key_of(r): r for r in draw(rows(at))}
            out += [*held.values(), rollup(at, held.values())]
            for revision in range(1, draw(st.integers(0, 3)) if draw(st.booleans()) else 1):
                changed = draw(rows(at))[0]
                held[key_of(changed)] = changed
                out += [replace(changed, revision=revision), rollup(at, held.values(), revision)]
    return out


def content(signals: list[Signal]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(s) for s in signals]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(tapes())
def test_as_the_oracle_says(tape: list[Message]) -> None:
    stage, seen = Stage(SMALL), Rows()
    now: dict[Any, Signal] = {}
    for message in tape:
        for signal in stage.take([message]):
            which = (signal.time_window_ns, signal.expiration_ns, signal.strike, signal.option_type)
            assert signal.revision == (now[which].revision + 1 if which in now else 0)
            now[which] = signal
        if isinstance(message, Pressure):
            seen.setdefault(message.time_window_ns, {})[key_of(message)] = message
        elif isinstance(message, PressureRollup):
            at = message.time_window_ns
            wanted = verdicts(seen, at, 3, 3, 2, 0.3)
            standing = {w[1:]: s for w, s in now.items() if w[0] == at and s.status != WITHDRAWN}
            assert standing.keys() == wanted.keys()
            for key, signal in standing.items():
                agree(signal, wanted[key])


def agree(signal: Signal, wanted: dict[str, Any]) -> None:
    parts = signal.components
    assert parts is not None
    said = {
        "status": signal.status, "direction": signal.direction, "baseline": signal.baseline,
        "size": signal.baseline_size, "cluster": parts.cluster_size,
    }  # fmt: skip
    assert said == {name: wanted[name] for name in said}
    assert signal.score == pytest.approx(wanted["score"])
    assert parts.market_maker == pytest.approx(wanted["maker"])
    for name in ("raw", "base", "z", "z_volume", "percentile"):
        assert getattr(parts, name) == pytest.approx(wanted[name])


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(tape=tapes(), data=st.data())
def test_any_cutting_and_restarts_give_the_same_signals(tape: list[Message], data: st.DataObject) -> None:
    whole = Stage(SMALL)
    once = whole.take(tape)
    cut = frames(tape, iter(lambda: data.draw(st.integers(1, 3)), None))
    stage, out = Stage(SMALL), []
    while cut:
        n = data.draw(st.integers(1, 12))
        out += stage.step(cut[:n])
        cut = cut[n:]
        if data.draw(st.booleans()):
            stage.restart()
    assert content(out) == content(once)
    assert stage.fields == whole.fields


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(tapes())
def test_mirrored_tapes_give_mirrored_signals(tape: list[Message]) -> None:
    straight, other = signals_of(tape, SMALL), signals_of(map(mirrored, tape), SMALL)
    assert len(straight) == len(other)
    for a, b in zip(straight, other, strict=True):
        assert {a.direction, b.direction} == {"BUY", "SELL"}
        assert (a.score, a.types, a.status, a.reason, a.revision) == (b.score, b.types, b.status, b.reason, b.revision)
        assert (a.log_ratio or 0) == -(b.log_ratio or 0)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(tapes())
def test_every_number_is_finite_and_scores_are_within_0_and_1(tape: list[Message]) -> None:
    for signal in signals_of(tape, SMALL):
        assert 0 <= signal.score <= 1
        assert signal.types
        assert signal.signal_type == signal.types[0]
        for value in (*msgspec.structs.astuple(signal), *msgspec.structs.astuple(signal.components)):
            assert not isinstance(value, float) or math.isfinite(value)
