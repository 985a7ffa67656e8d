"""However the tape is cut into frames and steps, and wherever the stage restarts: the same messages, in order."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.pressure.core import Emission, Output, PartitionState
from shared.frames import NS, Frame
from shared.messages import AnyMessage, Clock, Disconnect, Gap
from tests.services.pressure.market import (
    FEED,
    config,
    define,
    emissions,
    final,
    frame,
    future,
    messages,
    ns,
    option,
    tick,
    trade,
)

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
CONFIG = config(window_sec=60, max_lateness_sec=45, wait_sec=20, block_size={"ES": 3.0})
OPTIONS = [option(k, t) for k in (100.0, 101.0) for t in "CP"]
OPTIONS += [option(100.0, symbol="Q1AM6 C100"), option(6000.0, symbol="ESM6 C6000", root="ES", underlying="ESM6")]
UNKNOWN = [option(102.0, symbol="Q1BM6 C102"), option(103.0, "P", symbol="Q1BM6 P103")]
GUESSED = [msgspec.structs.replace(UNKNOWN[1], kind="?", strike=None, expiration_ns=None)]
TRADED = [*OPTIONS, *UNKNOWN, future()]
Event = dict[str, Any] | AnyMessage


def plain(output: Output) -> list[Any]:
    return [one if isinstance(one, Emission) else (one.reason, one.rows.tobytes()) for one in output]


def frames_of(events: list[Event], cuts: set[int]) -> list[Frame]:
    """Rows that follow each other share a frame but where it is cut."""
    out: list[Frame] = []
    held: list[dict[str, Any]] = []
    for n, event in enumerate(events):
        if held and (n in cuts or not isinstance(event, dict)):
            out.append(frame(*held))
            held = []
        if isinstance(event, dict):
            held.append(event)
        else:
            out.append(messages(type(event).__name__.lower(), event))
    return [*out, frame(*held)] if held else out


def played(frames: list[Frame], steps: set[int], restart: bool) -> list[Any]:
    state, saved, out = PartitionState(CONFIG), {}, []
    bounds = sorted({0, len(frames), *(s for s in steps if s < len(frames))})
    for a, b in itertools.pairwise(bounds):
        out += plain(state.step(frames[a:b]))
        if restart:
            saved.update(state.changes())
            state = PartitionState.restore(CONFIG, saved)
    return out


@st.composite
def tapes(draw: st.DrawFn) -> list[Event]:
    """Trades about their time, some late, and whatever else may come."""
    events: list[Event] = []
    now = 0.0
    for _ in range(draw(st.integers(1, 60))):
        now += draw(st.sampled_from([0, 0, 0.25, 1, 5, 30, 70]))
        kind = draw(st.sampled_from(["trade"] * 12 + ["clock", "tick", "gap", "lost", "define", "book", "watch"]))
        if kind == "trade":
            late = draw(st.sampled_from([0, 0, 0, 0.5, 20, 44, 50]))
            who = draw(st.sampled_from(TRADED))
            price, size = draw(st.integers(1, 8)) / 4, draw(st.sampled_from([1.0, 2.5, 40.0, 120.0]))
            events.append(trade(max(now - late, 0), price, size, draw(st.sampled_from([-1, 0, 1])), who))
        elif kind == "clock":
            events.append(Clock(FEED, ns(now)))
        elif kind == "tick":
            events.append(tick(now))
        elif kind == "gap":
            symbols = draw(st.sampled_from([(), ("NQM6 C100",), ("Q1AM6 C100", "ESM6 C6000")]))
            since = max(now - draw(st.sampled_from([1, 40, 200])), 0)
            events.append(Gap(FEED, ns(since), ns(now), "test", symbols))
        elif kind == "lost":
            events.append(Disconnect(FEED, ns(now), "test", ns(now)))
        elif kind == "define":
            events.append(draw(st.sampled_from([*UNKNOWN, *GUESSED])))
        elif kind == "book":
            events.append({"at": now, "kind": 2, "instrument": OPTIONS[0].id, "bid_px": 1.0, "ask_px": 1.5, "size": 1})
        else:
            events.append(Clock(FEED, ns(now), watched_from_ns=ns(now), grace_ns=draw(st.sampled_from([0, NS // 2]))))
    return [*events, Clock(FEED, ns(now + 120), final=draw(st.booleans()))]


@SETTINGS
@given(tapes(), st.booleans(), st.sets(st.integers(0, 60), max_size=20), st.sets(st.integers(1, 60), max_size=20),
       st.booleans())  # fmt: skip
def test_any_cut_and_any_restart(
    tape: list[Event], watched: bool, cuts: set[int], steps: set[int], restart: bool
) -> None:
    first: list[Frame] = [define(*OPTIONS, future(), *GUESSED)]
    if watched:
        first.append(messages("clock", Clock(FEED, ns(0), watched_from_ns=ns(0))))
    whole = [*first, *frames_of(tape, set())]
    want = played(whole, set(), False)
    assert played([*first, *frames_of(tape, cuts)], steps, restart) == want
    one_by_one = [*first, *frames_of(tape, set(range(len(tape))))]
    assert played(one_by_one, set(range(len(one_by_one))), True) == want
    final([one for one in want if isinstance(one, Emission)])  # revisions grow, numbers are finite


@SETTINGS
@given(tapes())
def test_nothing_vanishes(tape: list[Event]) -> None:
    state = PartitionState(CONFIG)
    output = state.step([define(*OPTIONS, future(), *GUESSED), *frames_of(tape, set())])
    counted = msgspec.json.decode(state.changes()["counters"])
    trades = sum(1 for e in tape if isinstance(e, dict) and e["kind"] == 0)
    waiting = int(state.queue[0])
    ended = ("trades", "not_options", "outside_hours", "too_late", "undefined", "spreads", "undefinable")
    assert trades == sum(counted[name] for name in ended) + waiting
    assert counted["undefinable"] == sum(len(one.rows) for one in output if not isinstance(one, Emission))
    assert counted["late"] == len([e for e in emissions(output) if e.rollup.revision and len(e.rows) == 1]) or any(
        isinstance(e, Gap | Disconnect) for e in tape
    )
    rows, rollups = final(output)
    assert sum(r.total_trades for r in rows.values()) == counted["trades"]
    assert sum(r.total_trades for r in rollups.values()) == counted["trades"]
