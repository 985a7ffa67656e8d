"""Plug-ins from a real installed package: what they see, what is published of what they say, what their faults do."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace as with_
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from services.signals import plugins
from services.signals.worker import SignalStage
from shared.errors import ConfigError
from shared.messages import PressureRollup, Signal
from shared.plugins import GROUP
from shared.settings import Settings, load
from tests.services.signals.tape import START, WINDOW, Message, Stage, days, rollup, row, window

CODE = '''
import math
from shared.messages import Signal

calls = []

def of(rollup, **more):
    base = dict(underlying=rollup.underlying, time_window_ns=rollup.time_window_ns, window_sec=rollup.window_sec,
                signal_type="many", direction="BUY", score=0.75, grade="")
    return Signal(**{**base, **more})

class Busy:
    """Says how much traded where that is a lot, and echoes the stage's own signals."""
    def on_pressure_metrics(self, rows, rollup):
        calls.append((len(rows), rollup.revision))
        total = sum(r.ask_volume for r in rows)
        if total > 100:
            yield of(rollup, volume=total)
    def on_signal(self, signal):
        return [of(signal, signal_type="echo", strike=signal.strike, direction=signal.direction, reason=signal.status)]

class Bad:
    def on_pressure_metrics(self, rows, rollup):
        if rollup.revision:
            raise RuntimeError("late\\ntrouble")
        yield of(rollup, strike=1.0)
        yield of(rollup, score=math.nan)
        yield of(rollup, strike=2.0)

class Fussy:
    def __init__(self, needed): ...

class Mute: ...

class Loud:
    def on_signal(self, signal):
        raise SystemExit(3)

import numpy as np
class Numbers:
    def on_pressure_metrics(self, rows, rollup):
        return [of(rollup, score=np.float64(0.5), volume=np.int64(7))]

def on_signal(signal):
    return None
'''
ENTRIES = """[tapeline.signals]
busy = {m}:Busy
bad = {m}:Bad
fussy = {m}:Fussy
mute = {m}:Mute
loud = {m}:Loud
numbers = {m}:Numbers
module = {m}
gone = {m}:Nothing
tapeline = {m}:Busy
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An installed package: its module, and the metadata that an installer leaves behind."""
    folder, name = tmp_path_factory.mktemp("site"), "tapeline_test_plugins"
    (folder / f"{name}.py").write_text(CODE)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRIES.format(m=name))
    sys.path.insert(0, str(folder))
    yield name
    sys.path.remove(str(folder))
    sys.modules.pop(name, None)


def stage(*names: str) -> Stage:
    return Stage(hooks=plugins.load(names))


def loud_day(*, revision: int = 0, ask: float = 400) -> list[Message]:
    return window(row(ask, 5, revision=revision), revision=revision)


PAST = days(20, row(10, 10), row(10, 9, strike=6005.0))


def test_what_a_plugin_says_is_published_behind_the_stages_own(package: str) -> None:
    signals = stage("busy").take([*PAST, *loud_day()])
    assert [(s.source, s.signal_type, s.strike) for s in signals] == [
        ("tapeline", "institutional_flow", 6000.0), ("busy", "many", 0.0), ("busy", "echo", 6000.0),
    ]  # fmt: skip
    many = signals[1]
    assert (many.volume, many.grade, many.types, many.revision, many.status) == (400, "HIGH", ("many",), 0, "emitted")
    assert sys.modules[package].calls[-1] == (1, 0)


def test_a_revision_publishes_the_difference(package: str) -> None:
    running = stage("busy")
    running.take([*PAST, *loud_day()])
    running.restart()
    assert running.take([rollup(START, revision=1)]) == [], "called again, nothing new"
    more = running.take(loud_day(revision=2, ask=500))
    assert [(s.source, s.signal_type, s.revision) for s in more] == [
        ("tapeline", "institutional_flow", 1), ("busy", "many", 1),
    ]  # fmt: skip
    less = running.take(loud_day(revision=3, ask=5))
    assert [(s.source, s.signal_type, s.revision, s.status) for s in less] == [
        ("tapeline", "institutional_flow", 2, "withdrawn"),
        ("busy", "many", 2, "withdrawn"),
        ("busy", "echo", 1, "withdrawn"),
    ]


def test_faults_are_counted_logged_once_and_stop_nothing(package: str, caplog: pytest.LogCaptureFixture) -> None:
    running = stage("bad", "loud", "busy")
    with caplog.at_level(logging.WARNING):
        first = running.take([*PAST, *loud_day()])
        assert [(s.source, s.strike) for s in first if s.time_window_ns == START] == [
            ("tapeline", 6000.0), ("bad", 1.0), ("bad", 2.0), ("busy", 0.0), ("busy", 6000.0),
        ]  # fmt: skip
        again = running.take([*loud_day(revision=1), *window(row(400, 5, START + WINDOW))])
    assert not [s for s in again if s.source == "bad" and s.time_window_ns == START], "what it said before stands"
    texts = [r.getMessage() for r in caplog.records]
    assert len(texts) == 3
    assert "plug-in 'bad': on_pressure_metrics returned what is no signal of this window" in texts[0]
    assert "plug-in 'loud': on_signal raised SystemExit(3)" in texts[1]
    assert "raised RuntimeError('late\\ntrouble')" in texts[2]
    assert all("\n" not in text for text in texts)
    # 20 + 2 windows with a bad number, a revision that raises, three calls with a signal.
    assert running.state._counters["plugin_errors"] == 22 + 1 + 3


def test_numpy_numbers_and_modules_will_do(package: str) -> None:
    signals = stage("numbers", "module").take(window(row(11, 10)))
    assert [(s.source, s.score, s.volume, s.grade) for s in signals] == [("numbers", 0.5, 7, "LOW")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "'absent', which no installed package has; there are: bad, busy,"),
        ("fussy", "'fussy' .*cannot be loaded: TypeError"),
        ("gone", "'gone' .*cannot be loaded: AttributeError"),
        ("mute", "neither on_pressure_metrics nor on_signal"),
        ("tapeline", "rename the plug-in"),
    ],
)
def test_a_plugin_that_cannot_be_had_is_a_wrong_setting(package: str, name: str, said: str) -> None:
    base = load(environ={})
    settings: Settings = with_(base, signals=msgspec.structs.replace(base.signals, plugins=(name,)))
    with pytest.raises(ConfigError, match=said) as caught:
        SignalStage(settings)
    assert caught.value.exit_code == 78


def test_one_name_of_two_packages_is_refused(package: str, tmp_path: Path) -> None:
    metadata = tmp_path / "other_plugins-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other_plugins\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nbusy = other:Busy\n")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="two installed packages have"):
            plugins.load(["busy"])
        assert plugins.load(["numbers"]) is not None
    finally:
        sys.path.remove(str(tmp_path))


def good(of: PressureRollup, **more: Any) -> Signal:
    return replace(Signal(of.underlying, of.time_window_ns, of.window_sec, "mine", "SELL", 0.9, ""), **more)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"score": 1.01}, "outside 0..1"),
        ({"score": math.nan}, "not finite"),
        ({"score": "high"}, "score"),
        ({"volume": math.inf}, "not finite"),
        ({"strike": -math.inf}, "not finite"),
        ({"underlying": "NQ"}, "another underlying"),
        ({"time_window_ns": START + 1}, "another underlying or window"),
        ({"expiration_ns": -1}, "expiration_ns"),
        ({"expiration_ns": 1 << 63}, "."),
        ({"expiration_ns": 10**400}, "."),
        ({"direction": "UP"}, "direction"),
        ({"status": "withdrawn"}, "status"),
        ({"option_type": "X"}, "option_type"),
        ({"signal_type": ""}, "signal_type"),
        ({"grade": "SUPER"}, "grade"),
        ({"baseline_size": -1}, "baseline_size"),
        ({"reason": "\ud800"}, "."),
        ({"reason": object()}, "object"),
    ],
)
def test_what_is_no_sound_signal(wrong: dict[str, Any], said: str) -> None:
    of = rollup(START)
    with pytest.raises(ValueError, match=said):
        plugins.checked(good(of, **wrong), "mine", of)


def test_what_the_stage_fills_in() -> None:
    of = rollup(START)
    signal = plugins.checked(good(of, source="other", revision=9, timestamp_out_ns=5), "mine", of)
    assert signal == good(of, source="mine", grade="EXTREME", types=("mine",))
    with pytest.raises(ValueError, match="a dict instead of a Signal"):
        plugins.checked({}, "mine", of)
