"""Pressure messages made by hand: rows, rollups, whole windows and their frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from services.signals.baseline import Samples
from services.signals.core import Config, Hooks, PartitionState
from services.signals.verdict import Limits
from shared.calendar import ALWAYS, Sessions, sessions
from shared.frames import NS, Frame, ns_of
from shared.messages import Pressure, PressureRollup, Signal, encode

DAY = 86_400 * NS
WINDOW_SEC = 300
WINDOW = WINDOW_SEC * NS
START = ns_of("2025-03-03T14:30:00Z")  # a Monday
EXPIRY = ns_of("2025-06-20T20:00:00Z")
Message = Pressure | PressureRollup


def row(
    ask: float, bid: float, at: int = START, strike: float = 6000.0, kind: str = "C", *, unknown: float = 0.0,
    trades: int = 20, rank: int | None = None, mean_sec: float = 150.0, expiration: int = EXPIRY,
    underlying: str = "ES", moneyness: float | None = None, complete: bool = True, revision: int = 0,
    sweep: tuple[float, float] = (0.0, 0.0), block: tuple[float, float] = (0.0, 0.0), window_sec: int = WINDOW_SEC,
) -> Pressure:  # fmt: skip
    """A row as the pressure stage makes it; `sweep` and `block` are (bought, sold); 20 trades are full confidence."""
    sided, volume = ask + bid, ask + bid + unknown
    share = ask / sided if sided else 0.5
    return Pressure(
        underlying=underlying, expiration_ns=expiration, strike=strike, option_type=kind, time_window_ns=at,
        window_sec=window_sec, bid_volume=bid, ask_volume=ask, unknown_volume=unknown,
        pressure_ratio=ask / bid if bid else None, log_ratio=math.log(ask + 0.5) - math.log(bid + 0.5),
        dominant_side="BUY" if share > 0.6 else "SELL" if 1 - share > 0.6 else "NEUTRAL",
        confidence=min(trades / 20, 1.0) * (abs(ask - bid) / sided if sided else 0.0), total_trades=trades,
        avg_trade_size=volume / trades, max_trade_size=volume, vwap=10.0, premium=volume * 500, ask_premium=ask * 500,
        bid_premium=bid * 500, open=10.0, close=10.0, first_ns=at, last_ns=at + 1,
        mean_ns=at + round(mean_sec * NS), strike_rank=round(strike / 5) if rank is None else rank,
        sweeps=int(sum(sweep) > 0), sweep_ask_volume=sweep[0], sweep_bid_volume=sweep[1], blocks=int(sum(block) > 0),
        block_ask_volume=block[0], block_bid_volume=block[1], moneyness=moneyness,
        underlying_price=None if moneyness is None else moneyness * strike, complete=complete, revision=revision,
    )  # fmt: skip


def mirrored(message: Message) -> Message:
    """Bought for sold."""
    if isinstance(message, PressureRollup):
        return message
    m = message
    other = {"BUY": "SELL", "SELL": "BUY", "NEUTRAL": "NEUTRAL"}
    return replace(
        m, ask_volume=m.bid_volume, bid_volume=m.ask_volume, log_ratio=-m.log_ratio,
        dominant_side=other[m.dominant_side], ask_premium=m.bid_premium, bid_premium=m.ask_premium,
        sweep_ask_volume=m.sweep_bid_volume, sweep_bid_volume=m.sweep_ask_volume,
        block_ask_volume=m.block_bid_volume, block_bid_volume=m.block_ask_volume,
    )  # fmt: skip


def rollup(at: int, rows: Iterable[Pressure] = (), revision: int = 0, underlying: str = "ES",
           window_sec: int = WINDOW_SEC) -> PressureRollup:  # fmt: skip
    """A rollup; what the signals stage reads of it is right."""
    held = list(rows)
    return PressureRollup(
        underlying, at, window_sec, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 0.0, 0.0, len(held),
        sum(r.total_trades for r in held), revision=revision,
    )  # fmt: skip


def window(*rows: Pressure, revision: int = 0) -> list[Message]:
    """A window's rows and the rollup that completes it."""
    first = rows[0]
    return [*rows, rollup(first.time_window_ns, rows, revision, first.underlying, first.window_sec)]


def days(count: int, *rows: Pressure, step: int = DAY) -> list[Message]:
    """These rows (of one window) on each of the `count` days before theirs, oldest first."""
    out: list[Message] = []
    for back in range(count, 0, -1):
        out += window(*(replace(r, time_window_ns=r.time_window_ns - back * step, mean_ns=r.mean_ns - back * step)
                        for r in rows))  # fmt: skip
    return out


def frames(messages: Iterable[Message], cuts: Iterator[int] | None = None) -> list[Frame]:
    """Frames as on the bus: rows of at most so many messages (`cuts`), a rollup alone."""
    out: list[Frame] = []
    rows: list[Message] = []
    room = next(cuts) if cuts else 500
    for message in messages:
        if isinstance(message, PressureRollup) or len(rows) == room:
            out += [Frame("pressure", len(rows), 0, 0, "pressure", encode(rows))] if rows else []
            rows = []
            room = next(cuts) if cuts else 500
        if isinstance(message, PressureRollup):
            out.append(Frame("pressure_rollup", 1, 0, 0, "pressure", encode([message])))
        else:
            rows.append(message)
    return out + ([Frame("pressure", len(rows), 0, 0, "pressure", encode(rows))] if rows else [])


def always(_: str) -> Sessions:
    return sessions(ALWAYS)


def no_store(*_: object) -> Mapping[int, Samples]:
    return {}


CONFIG = Config(always, 20, Limits())


@dataclass
class Stage:
    """The core with the fields that it committed, as a bus would hold them."""

    config: Config = CONFIG
    hooks: Hooks | None = None
    fields: dict[str, bytes] = field(default_factory=dict)
    seed: object = no_store

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.state = PartitionState.restore(self.config, self.fields, self.seed, self.hooks)  # type: ignore[arg-type]

    def step(self, some: list[Frame]) -> list[Signal]:
        signals = self.state.step(some)
        changes, deletes = self.state.changes()
        self.fields.update(changes)
        for name in deletes:
            self.fields.pop(name, None)
        return signals

    def take(self, messages: Iterable[Message]) -> list[Signal]:
        return self.step(frames(messages))

    def names(self, kind: str) -> list[str]:
        return sorted(name for name in self.fields if name.startswith(f"{kind}:"))


def signals_of(messages: Iterable[Message], config: Config = CONFIG) -> list[Signal]:
    """All signals of a tape."""
    return Stage(config).take(messages)
