"""Both stages that read ticks take the same trades for late, too late and outside market hours."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from services.aggregate.core import PartitionState as Candles
from services.aggregate.state import Config as CandlesConfig
from services.pressure.core import PartitionState
from shared.frames import NS, Frame, Rows
from tests.services.pressure.market import (
    begin,
    clock,
    config,
    define,
    frame,
    future,
    ns,
    option,
    tick,
    trade,
    watch,
)

SESSIONS = np.array([[ns(-1000), ns(400)], [ns(460), ns(5000)]], np.int64)


def sessions(venue: str, root: str) -> Rows:
    return SESSIONS


def tape(seed: int, grace_ns: int) -> tuple[list[Frame], set[int]]:
    """Options and a future, up to five minutes late; a root and a connection that come in between."""
    rng = np.random.default_rng(seed)
    chain = [option(float(k), t) for k in (1, 2, 3) for t in "CP"]
    other = option(9.0, symbol="ESM6 C9", root="ES")
    frames = begin(*chain, future(), at=30.5, grace_ns=grace_ns)
    now = 31.0
    for n in range(150):
        now += float(rng.exponential(8))
        if n == 60:
            frames.append(define(other))
        if n == 100:
            now += 45
            frames.append(watch(now, grace_ns=grace_ns))
        who = [*chain, future(), *([other] if n >= 60 else [])]
        frames.append(
            frame(
                tick(now - 1),
                *(
                    trade(max(now - float(late), 0), who=who[int(rng.integers(len(who)))])
                    for late in np.where(rng.random(12) < 0.5, 0, rng.integers(0, 300_000, 12) / 1000)
                ),
            )
        )
    return [*frames, clock(now + 600)], {i.id for i in (*chain, other)}


@pytest.mark.parametrize("grace_ns", [0, NS // 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_same_trades_are_taken(seed: int, grace_ns: int) -> None:
    frames, options = tape(seed, grace_ns)
    pressure = PartitionState(config(sessions=sessions))
    candles = Candles(CandlesConfig(sessions=sessions, timeframes=(60,)))
    pressure.step(frames)
    out = candles.step(frames)
    counted = msgspec.json.decode(pressure.changes()["counters"])
    ledger = [int(row["tick"]["instrument"]) for rows in out.late for row in rows]
    late = sum(1 for instrument in ledger if instrument in options)
    assert counted["too_late"] == late > 50
    finals: dict[tuple[int, int], int] = {}
    for rows in out.fixed:
        for row in rows:
            finals[int(row["name"]), int(row["time_ns"])] = int(row["trades"])
    kept = {name: symbol for name, (_, symbol) in enumerate(out.fixed_names) if " " in symbol}
    assert counted["trades"] == sum(n for (name, _), n in finals.items() if name in kept) > 300
    assert counted["outside_hours"] > 0
