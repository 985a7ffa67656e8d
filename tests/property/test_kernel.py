"""Any trades, cut into any batches, with any restart between them: the kernel's rows are the oracle's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from services.aggregate.core import PartitionState
from services.aggregate.state import Config
from shared import messages
from shared.frames import CANDLE, CLOCK, FIXED, NS, TICK, Frame
from shared.instruments import feed_id, instrument_id
from shared.timeframes import FEATURED
from tests import oracle, oracle_fixed

START = 1_780_000_000  # a Thursday, on no minute boundary
FEED, VENUE = "feed", "TEST"
CONTRACTS = {"ESM6": ("ES", 10), "ESU6": ("ES", 20), "ESH6": ("ES", 5), "NQM6": ("NQ", 10)}
INSTRUMENTS = {
    symbol: messages.Instrument(
        id=instrument_id(VENUE, symbol), venue=VENUE, symbol=symbol, root=root, feed=FEED, expiration_ns=expiry
    )
    for symbol, (root, expiry) in CONTRACTS.items()
}
OPEN = [((START - 86_400) * NS, (START + 86_400) * NS)]
WITH_BREAK = [((START - 3_600) * NS, (START + 200) * NS), ((START + 230) * NS, (START + 86_400) * NS)]

# No shrinking: a small failing tape would take longer to find than the suite may last; set it for a hunt.
SETTINGS = settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def tapes(draw: st.DrawFn) -> list[Any]:
    """A tape: trades that mostly go forward, late ones, clocks, quiet stretches, gaps."""
    now = START * NS + draw(st.sampled_from([0, 1, 500_000_000]))
    events: list[Any] = [oracle.Clock(now, watched_from=now)] if draw(st.booleans()) else []
    steps = st.sampled_from([0, 0, 1, 1000, 200_000_000, NS, 3 * NS, 20 * NS, 61 * NS, 130 * NS])
    long = st.sampled_from([0] * 12 + [310 * NS, 700 * NS])
    for _ in range(draw(st.integers(1, 40))):
        now += draw(steps) * draw(st.sampled_from([1, 1, 0])) + draw(long)
        kind = draw(st.sampled_from(["trade"] * 8 + ["late", "late", "clock", "gap"]))
        if kind == "clock":
            events.append(oracle.Clock(now))
            continue
        if kind == "gap":
            start = now - draw(st.sampled_from([0, 1, 30 * NS, 100 * NS]))
            end = start + draw(st.sampled_from([1, 5 * NS, 90 * NS]))
            symbols = draw(st.sampled_from([(), (), ("ESM6",), ("ESU6", "NQM6")]))
            events.append(oracle.Gap(start, end, symbols))
            continue
        behind = draw(st.sampled_from([1, NS, 2 * NS, 59 * NS, 61 * NS, 119 * NS, 120 * NS, 121 * NS, 400 * NS]))
        mid = 100 + draw(st.integers(-3, 3)) * 0.25
        books = [(mid - 0.25, mid + 0.25), (mid, mid), (mid + 0.5, mid - 0.5), (math.nan, mid)]
        bid, ask = draw(st.sampled_from(books))
        events.append(
            oracle.Trade(
                contract=draw(st.sampled_from(["ESM6", "ESM6", "ESM6", "ESU6", "ESU6", "ESH6", "NQM6"])),
                ts=now - (behind if kind == "late" else 0),
                price=100 + draw(st.integers(-4, 4)) * 0.25,
                size=float(draw(st.sampled_from([1, 2, 3, 24, 25, 80]))),
                side=draw(st.sampled_from([1, -1, 0])),
                bid=bid, ask=ask, bid_sz=float(draw(st.integers(0, 5))), ask_sz=float(draw(st.integers(0, 5))),
            )
        )  # fmt: skip
    events.append(oracle.Clock(now + draw(st.sampled_from([0, NS, 70 * NS]))))
    return events


def frames(events: list[Any], in_band: bool) -> list[Frame]:
    """One frame an event; clocks in-band as rows or as messages."""
    out = [Frame("instrument", 4, 0, 0, FEED, messages.encode(list(INSTRUMENTS.values())))]
    for e in events:
        if isinstance(e, oracle.Trade):
            row = np.zeros(1, TICK)
            quotes = (e.bid, e.ask, e.bid_sz, e.ask_sz)
            row[0] = (e.ts, e.ts, INSTRUMENTS[e.contract].id, e.price, e.size, *quotes, 0, 0, e.side, 0, 0)
            out.append(Frame("trade", 1, 0, 0, FEED, row.tobytes()))
        elif isinstance(e, oracle.Gap):
            gap = messages.Gap(FEED, e.start, e.end, "test", e.symbols)
            out.append(Frame("gap", 1, 0, 0, FEED, messages.encode([gap])))
        elif in_band and e.watched_from is None:
            row = np.zeros(1, TICK)
            row["ts_event_ns"], row["instrument"], row["kind"] = e.ts, feed_id(FEED), CLOCK
            out.append(Frame("trade", 0, 0, 0, FEED, row.tobytes()))
        else:
            clock = messages.Clock(FEED, e.ts, watched_from_ns=e.watched_from)
            out.append(Frame("clock", 1, 0, 0, FEED, messages.encode([clock])))
    return out


def run(tape: list[Frame], cuts: list[int], restarts: set[int], config: Config) -> tuple[Any, ...]:
    """Final rows after stepping through the tape in these pieces, restored from committed state at some."""
    state, saved = PartitionState(config), {}
    final_1m: dict[Any, Any] = {}
    final_1s: dict[Any, Any] = {}
    fixed: dict[Any, Any] = {}
    late = 0
    for n, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(tape)], strict=True)):
        if a == b:
            continue
        merged: list[Frame] = []
        for frame in tape[a:b]:  # neighbours become one frame, as ingest packs them
            if merged and frame.kind == merged[-1].kind == "trade" and n % 2:
                merged[-1] = Frame("trade", 0, 0, 0, FEED, merged[-1].body + frame.body)
            else:
                merged.append(frame)
        out = state.step(merged)
        late += sum(len(rows) for rows in out.late)
        for chunks, final, key in ((out.candles_1m, final_1m, 0), (out.candles_1s, final_1s, 1)):
            for row in (r for chunk in chunks for r in chunk):
                name = (out.names[int(row["name"])][key], int(row["time_ns"]) // NS)
                assert name not in final or final[name]["revision"] < row["revision"], "revisions only grow"
                final[name] = {c: row[c] for c in CANDLE.names} | {"symbol": out.names[int(row["name"])][1]}
        for row in (r for chunk in out.fixed for r in chunk):
            key = (out.fixed_names[int(row["name"])][1], int(row["timeframe_sec"]), int(row["time_ns"]) // NS)
            assert key not in fixed or fixed[key]["revision"] < row["revision"], "revisions only grow"
            fixed[key] = {c: row[c] for c in FIXED.names}
        saved.update(state.changes())
        if n in restarts:
            state = PartitionState.restore(config, saved)
    return final_1m, final_1s, fixed, late, state


def same(mine: dict[str, Any], theirs: dict[str, Any], where: object) -> None:
    for column, value in theirs.items():
        got = mine[column]
        equal = got == value or (isinstance(value, float) and math.isnan(value) and math.isnan(got))
        if not equal:
            raise AssertionError(f"{where} {column}: kernel {got}, oracle {value}")


def same_fixed(mine: dict[Any, Any], theirs: dict[Any, Any], seconds: int) -> None:
    """Candles equal, and so do their features, taken from all of them anew."""
    assert set(mine) == set(theirs)
    for key, row in theirs.items():
        same(mine[key], row, (seconds, *key))
    for name in {name for name, _ in theirs}:
        starts = sorted(start for n, start in theirs if n == name)
        features = oracle_fixed.features_of([theirs[name, start] for start in starts], seconds)
        for start, row in zip(starts, features, strict=True):
            for column, value in row.items():
                got = mine[name, start][column]
                if seconds not in FEATURED:
                    assert math.isnan(got)
                elif not (math.isnan(got) and math.isnan(value)):
                    assert got == pytest.approx(value, rel=1e-9, abs=1e-9), (seconds, name, start, column)


Hours = list[tuple[int, int]]


def check(events: list[Any], cuts: list[int], restarts: set[int], sessions: Hours, in_band: bool) -> None:
    table = np.array(sessions, np.int64)
    config = Config(sessions=lambda venue, root: table, big_trade={})
    tape = frames(events, in_band)
    cuts = sorted(min(c, len(tape)) for c in cuts)
    final_1m, final_1s, fixed, late, state = run(tape, cuts, restarts, config)
    truth = oracle.Oracle(CONTRACTS, sessions)
    for event in events:
        truth.take(event)
    for mine, theirs in ((final_1m, truth.candles_1m()), (final_1s, truth.candles_1s())):
        assert set(mine) == set(theirs)
        for key, row in theirs.items():
            same(mine[key], row, key)
            assert mine[key]["vd"] == row["vd"]
    for tf in (int(t["seconds"]) for t in state.timeframes if t["emit"]):
        same_fixed({(n, s): row for (n, t, s), row in fixed.items() if t == tf}, oracle_fixed.bars_of(truth, tf), tf)
    assert late == len(truth.late)
    assert int(state.counters[5]) == truth.outside


@SETTINGS
@given(tapes(), st.lists(st.integers(0, 45), max_size=6), st.sets(st.integers(0, 6)), st.booleans())
def test_rows_equal_the_oracle(events: list[Any], cuts: list[int], restarts: set[int], in_band: bool) -> None:
    check(events, cuts, restarts, OPEN, in_band)


@SETTINGS
@given(tapes(), st.lists(st.integers(0, 45), max_size=6), st.sets(st.integers(0, 6)))
def test_rows_equal_the_oracle_around_a_market_break(events: list[Any], cuts: list[int], restarts: set[int]) -> None:
    check(events, cuts, restarts, WITH_BREAK, in_band=False)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_busy_hour_in_any_frames_gives_the_same_bytes(cut: int) -> None:
    rng = np.random.default_rng(5)
    n = 20_000
    ticks = np.zeros(n, TICK)
    ticks["ts_event_ns"] = START * NS + np.sort(rng.integers(0, 900 * NS, n))
    late = rng.random(n) < 0.01
    ticks["ts_event_ns"][late] -= rng.integers(0, 130 * NS, int(late.sum()))
    ticks["instrument"] = rng.choice([i.id for i in INSTRUMENTS.values()], n, p=[0.5, 0.3, 0.1, 0.1])
    ticks["price"] = 100 + rng.integers(-8, 8, n) / 4
    ticks["size"] = rng.integers(1, 60, n)
    ticks["side"] = rng.choice([1, -1, 0], n)
    ticks["bid_px"], ticks["ask_px"] = ticks["price"] - 0.25, ticks["price"] + 0.5
    table = np.array(OPEN, np.int64)
    config = Config(sessions=lambda venue, root: table)
    first = Frame("instrument", 4, 0, 0, FEED, messages.encode(list(INSTRUMENTS.values())))
    clock = messages.Clock(FEED, START * NS, watched_from_ns=START * NS)
    watch = Frame("clock", 1, 0, 0, FEED, messages.encode([clock]))

    def final(size: int) -> tuple[dict[Any, bytes], dict[Any, bytes]]:
        state = PartitionState(config)
        state.step([first, watch])
        kept: tuple[dict[Any, bytes], dict[Any, bytes]] = ({}, {})
        for i in range(0, n, size):
            out = state.step([Frame("trade", 1, 0, 0, FEED, ticks[i : i + size].tobytes())])
            for key, (chunks, into) in enumerate(zip((out.candles_1m, out.candles_1s), kept, strict=True)):
                for row in (r for chunk in chunks for r in chunk):
                    into[out.names[int(row["name"])][key], int(row["time_ns"])] = row.tobytes()
        return kept

    assert final(cut) == final(n)
