"""Every key, window and measure against an aggregation by polars that shares no code with the stage."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from services.pressure.core import Output, PartitionState
from shared.frames import NS, TICK, Frame, Rows, tick_frame
from shared.instruments import instrument_id
from shared.messages import Instrument
from tests.services.pressure.market import (
    DAY,
    FEED,
    START,
    VENUE,
    WINDOW,
    begin,
    clock,
    config,
    final,
    future,
    ns,
    option,
)

LATENESS = 120
BLOCKS = {"NQ": 150.0}
MARKETS = {"NQ": (20_000.0, 20.0, "NQM6"), "ES": (6_000.0, 50.0, "ESM6")}


def chain() -> list[Instrument]:
    """Two underlyings, three expirations, 200 strikes, both types; some strikes have a weekly twin."""
    out = []
    for root, (middle, multiplier, under) in MARKETS.items():
        for e, days in enumerate((0, 4, 18)):
            for n, kind in itertools.product(range(-100, 100), "CP"):
                strike, common = middle + 25 * n, {"root": root, "underlying": under, "multiplier": multiplier}
                for head in ("A", "B") if n % 10 == 0 else ("A",):
                    symbol = f"{head}{e}{root} {kind}{strike:g}"
                    out.append(
                        option(strike, kind, symbol=symbol, expiration_ns=(START + days * DAY + 72_000) * NS, **common)
                    )
    return out


def random_tape(rng: np.random.Generator, n: int, options: list[Instrument]) -> Rows:
    """Trades of four windows by arrival; a tenth come up to three minutes late, many at one instant."""
    out = np.zeros(n, TICK)
    at = np.sort(rng.integers(0, 4 * WINDOW * 20, n)) * (NS // 20)
    late = np.where(rng.random(n) < 0.1, rng.integers(0, 180 * NS, n), 0)
    out["ts_event_ns"] = START * NS + np.maximum(at - late, 0)
    crowd = np.where(rng.random(n) < 0.5, rng.integers(0, 40, n), rng.integers(0, len(options), n))
    out["instrument"] = np.array([i.id for i in options], np.int64)[crowd]
    futures = rng.random(n) < 0.05
    ids = [instrument_id(VENUE, name) for _, _, name in MARKETS.values()]
    out["instrument"][futures] = np.array(ids, np.int64)[rng.integers(0, 2, n)[futures]]
    out["price"] = rng.integers(1, 200, n) / 4
    out["size"] = rng.integers(1, 40, n) * rng.choice([1, 1, 10], n)
    out["side"] = rng.choice([-1, 0, 1], n, p=[0.4, 0.2, 0.4])
    # Some records come in a burst: the same instrument, instant and mostly side as the one before.
    for i in np.flatnonzero(rng.random(n) < 0.3)[1:]:
        for name in ("ts_event_ns", "instrument", "side"):
            out[name][i] = out[name][i - 1]
    for name in ("bid_px", "ask_px", "bid_sz", "ask_sz"):
        out[name] = np.nan
    return out


def sides(rows: Rows, watermarks: Rows) -> list[int]:
    """The tick rule for trades without a side (there are no quotes), in order of arrival."""
    last: dict[int, list[float]] = {}
    out = []
    for row, watermark in zip(rows.tolist(), watermarks.tolist(), strict=True):
        ts, _, instrument, price, *_, side, _, _ = row
        prices = last.setdefault(instrument, [])
        different = [p for p in prices[-2:] if p != price]
        out.append(side or (int(np.sign(price - different[-1])) if different else 0))
        if ts // NS >= watermark // NS and (not prices or prices[-1] != price):
            prices.append(price)
    return out


def oracle(rows: Rows, options: list[Instrument], grace_ns: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Final rows and rollups."""
    ts = rows["ts_event_ns"]
    mark = np.maximum.accumulate(np.maximum(ts - grace_ns, START * NS))  # the trade's own time is in it
    taken = ~((ts // NS < mark // NS) & (mark - ts > LATENESS * NS))
    rows, ts, mark = rows[taken], ts[taken], mark[taken]
    facts = pl.DataFrame(
        [(i.id, i.root, i.expiration_ns, i.strike, i.kind, i.multiplier) for i in options],
        schema=["id", "root", "expiration", "strike", "kind", "multiplier"], orient="row",
    )  # fmt: skip
    table = pl.DataFrame(
        {"arrival": np.arange(len(rows)), "ts": ts, "mark": mark, "id": rows["instrument"], "price": rows["price"],
         "size": rows["size"], "side": sides(rows, mark)}
    )  # fmt: skip
    futures = table.filter(~pl.col("id").is_in(facts["id"].to_list()))
    window = WINDOW * NS
    table = table.join(facts, on="id", how="inner").sort("arrival")
    table = table.with_columns(
        start=pl.col("ts") // window * window,
        premium=pl.col("price") * pl.col("size") * pl.col("multiplier"),
        block=pl.col("size") >= pl.col("root").replace_strict(BLOCKS, default=100.0),
        run=pl.struct("ts", "side").rle_id().over("id"),
    ).with_columns(late=pl.col("mark") >= pl.col("start") + window)
    runs = table.group_by("id", "run").agg(swept=(pl.col("price").n_unique() > 1) & (pl.col("side").first() != 0))
    table = table.join(runs, on=["id", "run"]).sort("ts", "arrival")
    buy, sell = pl.col("side") == 1, pl.col("side") == -1
    size = pl.col("size")
    sums = {
        "ask": size.filter(buy).sum(), "bid": size.filter(sell).sum(), "unknown": size.filter(~buy & ~sell).sum(),
        "volume": size.sum(), "n": pl.len(), "premium": pl.col("premium").sum(),
        "ask_premium": pl.col("premium").filter(buy).sum(), "bid_premium": pl.col("premium").filter(sell).sum(),
        "late": pl.col("late").sum(), "changed": pl.col("arrival").filter(pl.col("late")).max(),
    }  # fmt: skip
    by = ["root", "expiration", "strike", "kind", "start"]
    keys = table.group_by(by).agg(
        **sums, biggest=size.max(), vwap=(pl.col("price") * size).sum() / size.sum(),
        open=pl.col("price").first(), close=pl.col("price").last(), first=pl.col("ts").first(),
        last=pl.col("ts").last(), mean=((pl.col("ts") - pl.col("start")) * size).sum() / size.sum(),
        sweeps=pl.struct("id", "run").filter(pl.col("swept")).n_unique(),
        sweep_ask=size.filter(buy & pl.col("swept")).sum(), sweep_bid=size.filter(sell & pl.col("swept")).sum(),
        blocks=pl.col("block").sum(), block_ask=size.filter(buy & pl.col("block")).sum(),
        block_bid=size.filter(sell & pl.col("block")).sum(),
    )  # fmt: skip
    strikes = facts.select("root", "expiration", "strike").unique()
    strikes = strikes.with_columns(
        rank=pl.col("strike").rank("dense").over("root", "expiration").cast(pl.Int64) - 1,
    )
    keys = keys.join(strikes, on=["root", "expiration", "strike"])
    keys = keys.with_columns(future=pl.Series(known_prices(keys, futures), dtype=pl.Float64))
    call, put = pl.col("kind") == "C", pl.col("kind") == "P"
    net = pl.col("premium") * pl.col("side")
    rollups = table.group_by("root", "start").agg(
        **sums, call_volume=size.filter(call).sum(), put_volume=size.filter(put).sum(),
        call_ask=size.filter(call & buy).sum(), call_bid=size.filter(call & sell).sum(),
        put_ask=size.filter(put & buy).sum(), put_bid=size.filter(put & sell).sum(),
        net_calls=net.filter(call).sum(), net_puts=net.filter(put).sum(),
        keys=pl.struct("expiration", "strike", "kind").n_unique(),
    )  # fmt: skip
    return keys, rollups


def known_prices(keys: pl.DataFrame, futures: pl.DataFrame) -> list[float | None]:
    """For each key the future's last price within its window, as known when the row left for the last time."""
    ids = {root: instrument_id(VENUE, name) for root, (_, _, name) in MARKETS.items()}
    trades: dict[tuple[int, int], list[Any]] = {}
    for row in futures.sort("ts", "arrival").iter_rows(named=True):
        trades.setdefault((row["id"], row["ts"] // (WINDOW * NS) * WINDOW * NS), []).append(row)
    out = []
    for key in keys.iter_rows(named=True):
        end, changed = key["start"] + WINDOW * NS, key["changed"]
        here = trades[ids[key["root"]], key["start"]]
        known = [t["price"] for t in here if t["mark"] < end or (changed is not None and t["arrival"] < changed)]
        out.append(known[-1] if known else None)
    return out


def run_stage(rows: Rows, options: list[Instrument], grace_ns: int) -> Output:
    state = PartitionState(config(block_size=BLOCKS))
    futures = [future(name, root=root) for root, (_, _, name) in MARKETS.items()]
    tape: list[Frame] = [*begin(*options, *futures, grace_ns=grace_ns)]
    tape += [tick_frame(rows[a : a + 4000], FEED) for a in range(0, len(rows), 4000)]
    return state.step([*tape, clock(4 * WINDOW + 1)])


def close(got: float | None, want: float | None) -> bool:
    return got is want if got is None or want is None else math.isclose(got, want, rel_tol=1e-12, abs_tol=1e-9)


def ratio(a: float, b: float) -> float:
    return math.log((a + 0.5) / (b + 0.5))


def check_key(got: Any, want: dict[str, Any]) -> None:
    ask, bid = want["ask"], want["bid"]
    share = ask / (ask + bid) if ask + bid else 0.5
    expected = {
        "ask_volume": ask, "bid_volume": bid, "unknown_volume": want["unknown"], "total_trades": want["n"],
        "avg_trade_size": want["volume"] / want["n"], "max_trade_size": want["biggest"], "vwap": want["vwap"],
        "premium": want["premium"], "ask_premium": want["ask_premium"], "bid_premium": want["bid_premium"],
        "open": want["open"], "close": want["close"], "first_ns": want["first"], "last_ns": want["last"],
        "sweeps": want["sweeps"], "sweep_ask_volume": want["sweep_ask"], "sweep_bid_volume": want["sweep_bid"],
        "blocks": want["blocks"], "block_ask_volume": want["block_ask"], "block_bid_volume": want["block_bid"],
        "pressure_ratio": ask / bid if bid else None, "log_ratio": ratio(ask, bid),
        "confidence": min(want["n"] / 20, 1) * abs(share - 0.5) * 2, "strike_rank": want["rank"],
        "underlying_price": want["future"], "moneyness": want["future"] / want["strike"] if want["future"] else None,
        "days_to_expiry": (want["expiration"] - want["start"] - WINDOW * NS) / NS / DAY,
        "revision": want["late"],
    }  # fmt: skip
    for name, value in expected.items():
        assert close(getattr(got, name), value), (name, got, want)
    assert abs(got.mean_ns - want["start"] - want["mean"]) <= 1
    assert got.dominant_side == ("BUY" if share > 0.6 else "SELL" if share < 0.4 else "NEUTRAL")
    assert got.complete


@pytest.mark.parametrize(("seed", "grace_ns"), [(1, 0), (2, NS // 2), (3, 40 * NS)])
def test_every_key_window_and_measure(seed: int, grace_ns: int) -> None:
    options = chain()
    rows = random_tape(np.random.default_rng(seed), 30_000, options)
    got, rolled = final(run_stage(rows, options, grace_ns))
    keys, rollups = oracle(rows, options, grace_ns)
    # The price at a window's end is the newest of all before it: here every window has one of its own.
    assert keys["future"].null_count() == 0
    assert len(got) == len(keys) > 5000
    for want in keys.iter_rows(named=True):
        window = want["start"] // NS - START
        check_key(got[want["root"], want["expiration"], want["strike"], want["kind"], window], want)
    assert len(rolled) == len(rollups) == 8
    for want in rollups.iter_rows(named=True):
        roll = rolled[want["root"], want["start"] // NS - START]
        expected = {
            "call_volume": want["call_volume"], "put_volume": want["put_volume"],
            "call_ask_volume": want["call_ask"], "call_bid_volume": want["call_bid"],
            "put_ask_volume": want["put_ask"], "put_bid_volume": want["put_bid"],
            "call_pressure": ratio(want["call_ask"], want["call_bid"]),
            "put_pressure": ratio(want["put_ask"], want["put_bid"]),
            "put_call_ratio": want["put_volume"] / want["call_volume"], "premium": want["premium"],
            "net_call_premium": want["net_calls"], "net_put_premium": want["net_puts"],
            "net_premium": want["net_calls"] - want["net_puts"], "strikes": want["keys"], "total_trades": want["n"],
            "revision": want["late"],
        }  # fmt: skip
        for name, value in expected.items():
            assert close(getattr(roll, name), value), (name, roll, want)
        of = keys.filter((pl.col("root") == want["root"]) & (pl.col("start") == want["start"]))
        best = sorted(
            of.iter_rows(named=True),
            key=lambda k: (-round(abs(ratio(k["ask"], k["bid"])), 9), -k["volume"], k["expiration"], k["strike"],
                           k["kind"]),
        )  # fmt: skip
        assert [(t.expiration_ns, t.strike, t.option_type) for t in roll.top_strikes] == [
            (k["expiration"], k["strike"], k["kind"]) for k in best[:10]
        ]


def test_the_tape_has_what_it_should_test() -> None:
    options = chain()
    keys, _ = oracle(random_tape(np.random.default_rng(1), 30_000, options), options, 0)
    assert keys.select("root", "expiration", "strike", "kind").n_unique() > 2000
    for name in ("late", "sweeps", "blocks", "unknown"):
        assert (keys[name] > 0).sum() > 20, name
    assert ns(0) in keys["start"].to_list()
