"""Trades in any order within the allowed lateness, sent again after reconnects, in any batches: the same candles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from services.aggregate.core import PartitionState
from services.ingest.tardis_decode import Decoder
from services.ingest.tardis_route import Router
from shared.frames import FIXED, NS, Rows, iso
from tests.services.aggregate.market import START, ToFrames, config

LATENESS = 119.0
# Inside one second the path of CVD follows the order of arrival, so its extremes may differ.
ORDERLESS = [c for c in FIXED.names or () if c not in ("cvd_high", "cvd_low", "revision", "timestamp_out_ns")]
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


def line(kind: str, at: float, **fields: Any) -> bytes:
    time = iso(START * NS + round(at * 1000) * 1_000_000)[:23] + "Z"
    message = {
        "type": kind,
        "symbol": "BTCUSDT",
        "exchange": "binance-futures",
        "timestamp": time,
        "localTimestamp": time,
    }
    return json.dumps(message | fields).encode()


def quote(at: float) -> bytes:
    return line("quote", at, bids=[{"price": 99.0, "amount": 1}], asks=[{"price": 101.0, "amount": 1}], depth=1)


def candles(lines: Sequence[bytes], cuts: Sequence[int], restart: bool = False) -> dict[Any, Rows]:
    """Final candles of these messages, read in pieces, with a restart of the stage after each when asked for."""
    router, out = Router("test", 1, NS // 2), ToFrames()
    decoder = Decoder(router.symbol)
    state = PartitionState(config())
    saved: dict[str, bytes] = {}
    kept: dict[Any, Rows] = {}
    bounds = sorted({0, len(lines), *(c % len(lines) for c in cuts)})
    for a, b in itertools.pairwise(bounds):
        router.take(decoder(list(lines[a:b]), a), out, b"")
        result = state.step(out.frames)
        out.frames = []
        for row in (r for chunk in result.fixed for r in chunk):
            key = (int(row["timeframe_sec"]), int(row["time_ns"]))
            assert key not in kept or kept[key]["revision"] < row["revision"], "revisions only grow"
            kept[key] = row.copy()
        saved.update(state.changes())
        if restart:
            state = PartitionState.restore(config(), saved)
    return kept


trades = st.lists(
    st.tuples(
        st.integers(0, 400_000),  # ms
        st.integers(-8, 8),
        st.integers(1, 64),
        st.sampled_from(["buy", "sell"]),
        st.floats(0, LATENESS),  # how much later it arrives
        st.booleans(),  # and again after a reconnect
    ),
    min_size=1,
    max_size=60,
    unique_by=lambda t: t[0],
)


@SETTINGS
@example(  # a candle made by a late trade, then one before it
    tape=[(0, 0, 1, "buy", 31.0, False), (22_501, 0, 1, "buy", 8.0, False), (30_500, 0, 1, "buy", 0.0, False)],
    cuts=[],
    restart=False,
)
@given(trades, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_lateness_batching_and_duplicates_change_no_candle(tape: list[Any], cuts: list[int], restart: bool) -> None:
    def message(t: Any) -> bytes:
        return line("trade", t[0] / 1000, id=str(1 + t[0]), price=100 + t[1] / 4, amount=t[2] / 8, side=t[3])

    ordered = [message(t) for t in sorted(tape)]
    arrivals = [(t[0] / 1000 + t[4], message(t)) for t in tape] + [
        (t[0] / 1000 + t[4] + (LATENESS - t[4]) / 2, message(t)) for t in tape if t[5]
    ]
    late = [m for _, m in sorted(arrivals)]
    begin, end = quote(0), quote(1000)
    want = candles([begin, *ordered, end], [])
    got = candles([begin, *late, end], cuts, restart)
    assert set(got) == set(want)
    for key, row in want.items():
        for column in ORDERLESS:
            np.testing.assert_array_equal(got[key][column], row[column], err_msg=f"{key} {column}")
