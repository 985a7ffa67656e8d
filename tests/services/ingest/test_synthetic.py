"""The synthetic market: believable, the same for the same seed, and resumed exactly after kill -9."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import databento
import msgspec
import numpy as np
import pytest

from services.ingest.dbn_file import DbnFiles
from services.ingest.publisher import Held
from services.ingest.source import Grouped, Resume
from services.ingest.synthetic import CATCH_UP_SECONDS, VENUE, Cursor, SyntheticFeed, generate
from services.ingest.synthetic_market import MarketOptions, SyntheticMarket
from services.ingest.synthetic_products import PRODUCTS
from shared.bus import Bus
from shared.calendar import EQUITY_INDEX
from shared.calendar import sessions as market_hours
from shared.errors import ConfigError
from shared.frames import NS, TRADE
from shared.instruments import partition_of
from shared.messages import Clock, Instrument
from shared.redis_server import EmbeddedRedis
from shared.settings import Synthetic
from tests.services.ingest.dbn import Memory
from tests.wait import until

START = 1_715_265_000 * NS  # Thursday 2024-05-09 14:30 UTC


def market(minutes: int = 60, start: int = START, **options: Any) -> tuple[SyntheticMarket, np.ndarray]:
    made = SyntheticMarket(MarketOptions(**options))
    first = made.index(start)
    count = minutes * 60 * NS // made.block_ns
    return made, np.concatenate([made.block(i) for i in range(first, first + count)])


def test_the_book_and_the_trades_agree() -> None:
    made, rows = market(rate=100)
    assert (np.diff(rows["ts_recv"]) >= 0).all()
    assert (np.diff(rows["ts_event"]) >= 0).all()
    assert (rows["ts_recv"] > rows["ts_event"]).all()
    assert (rows["bid_px"] < rows["ask_px"]).all()
    assert ((rows["bid_px"] <= rows["price"]) & (rows["price"] <= rows["ask_px"])).all()
    assert (rows["price"] == rows["ask_px"])[rows["side"] == ord("B")].mean() > 0.9
    assert (rows["price"] == rows["bid_px"])[rows["side"] == ord("A")].mean() > 0.9
    assert {chr(s) for s in np.unique(rows["side"])} == {"A", "B", "N"}
    assert (rows["size"] >= 1).all()
    assert (rows["bid_sz"] >= 1).all()
    for contract in made.contracts(START):
        mine = rows[rows["instrument_id"] == contract.native]
        unit = round(contract.tick * NS)
        assert not (mine["price"] % unit).any()
        assert not (mine["bid_px"] % unit).any()
        if contract.far is None:
            level = PRODUCTS[contract.root].level
            assert np.median(abs(mine["price"] / NS - level)) < 0.1 * level
            # No leaps: a price moves by a small part of itself from trade to trade.
            assert abs(np.diff(mine["price"] / NS)).max() < 0.02 * level


def test_it_bursts_and_has_equal_records_and_big_trades() -> None:
    _, rows = market(rate=100)
    seconds = np.bincount((rows["ts_event"] - START) // NS)
    assert seconds.var() > 2 * seconds.mean()  # a Poisson process has 1
    assert 60 < seconds.mean() < 160
    assert (rows["size"] >= 25).mean() > 0.003
    assert rows["size"].max() > 100
    equal = (np.frombuffer(rows.tobytes(), "V80")[1:] == np.frombuffer(rows.tobytes(), "V80")[:-1]).sum()
    assert 0.001 < equal / len(rows) < 0.02
    assert (np.diff(rows["ts_event"]) == 0).mean() > 0.05  # sweeps


def test_a_thin_root_falls_silent_for_more_than_five_minutes() -> None:
    _, rows = market(240, roots=("NG",), rate=20)
    assert np.diff(rows["ts_event"]).max() > 300 * NS
    _, rows = market(240, roots=("ES",), rate=20)
    assert np.diff(rows["ts_event"]).max() < 60 * NS


def test_volume_rolls_to_the_next_contract() -> None:
    roll = START + 1800 * NS
    made, rows = market(60, roots=("ES",), rate=100, from_ns=START, roll_ns=roll)
    near, far, spread = made.contracts(START)
    assert (near.symbol, far.symbol, spread.symbol) == ("ESM4", "ESU4", "ESM4-ESU4")
    assert near.expiry_ns < far.expiry_ns
    before, after = rows[rows["ts_event"] < roll - 600 * NS], rows[rows["ts_event"] > roll + 600 * NS]
    assert (before["instrument_id"] == near.native).mean() > 0.9
    assert (after["instrument_id"] == far.native).mean() > 0.9
    assert 0.001 < (rows["instrument_id"] == spread.native).mean() < 0.05
    assert spread.instrument("V", "f").kind == "S"


def test_market_hours_are_kept() -> None:
    friday = START + 86_400 * NS
    _, rows = market(3 * 24 * 60, friday, rate=2, sessions=True)
    hours = market_hours(EQUITY_INDEX)
    row = np.searchsorted(hours[:, 0], rows["ts_event"], side="right") - 1
    assert (rows["ts_event"] < hours[row, 1]).all()
    assert np.diff(rows["ts_event"]).max() > 48 * 3600 * NS
    made, _ = market(1, sessions=True)
    assert made.open_seconds(friday, friday + 72 * 3600 * NS) < 24 * 3600


def test_any_block_alone_and_any_root_and_seed() -> None:
    made, rows = market(10, seed=7)
    again = SyntheticMarket(MarketOptions(seed=7))
    index = made.index(START) + 9
    assert rows.tobytes().endswith(again.block(index).tobytes())
    assert SyntheticMarket(MarketOptions(seed=8)).block(index).tobytes() != again.block(index).tobytes()
    assert len(market(5, roots=("XYZ",))[1])
    natives = [c.native for c in SyntheticMarket(MarketOptions(roots=tuple(PRODUCTS), contracts=4)).contracts(START)]
    assert len(set(natives)) == len(natives) == 12 * 7


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [START, START + 36 * 86_400 * NS])  # a Thursday; the day before futures expire
def test_a_tenth_of_the_trades_are_of_options_near_the_money(start: int) -> None:
    made, rows = market(30, start, rate=100, option_share=0.1)
    listed = {o.native: o for o in made.options_on(start)}
    assert len(listed) == len(made.options_on(start)) > 200
    assert not listed.keys() & {c.native for c in made.contracts(start)}
    mine = rows[np.isin(rows["instrument_id"], list(listed))]
    assert 0.06 < len(mine) / len(rows) < 0.15
    assert 60 < len(rows) / 1800 < 160, "the rate is that of all trades"
    assert ((mine["bid_px"] > 0) & (mine["bid_px"] < mine["ask_px"])).all()
    assert (mine["price"] == np.where(mine["side"] == ord("B"), mine["ask_px"], mine["bid_px"])).all()
    traded = [listed[n] for n in mine["instrument_id"].tolist()]
    assert {o.root for o in traded} == {"ES", "NQ", "CL"}
    assert len({(o.root, o.expiry_ns) for o in traded}) >= 8
    assert len({(o.expiry_ns, o.strike, o.kind) for o in traded if o.root == "NQ"}) > 30
    for o in listed.values():
        level = PRODUCTS[o.root].level
        assert abs(o.strike / level - 1) < 0.25
        assert o.expiry_ns >= start // (86_400 * NS) * 86_400 * NS
        assert o.future.expiry_ns >= o.expiry_ns
    bought = (mine["side"] == ord("B")).mean()
    assert 0.3 < bought < 0.7


def test_options_that_expired_today_trade_no_more_and_tomorrows_are_listed() -> None:
    for hour in (19, 20, 23):
        start = START // (86_400 * NS) * 86_400 * NS + hour * 3600 * NS
        made, rows = market(10, start, rate=100, option_share=0.2)
        listed = {o.native: o for o in made.options_on(start)}
        expiries = [listed[n].expiry_ns for n in rows["instrument_id"].tolist() if n in listed]
        assert (min(expiries) == start // (86_400 * NS) * 86_400 * NS + 20 * 3600 * NS) == (hour == 19)
        assert min(expiries) >= start
    natives: dict[int, str] = {}
    for day in range(200):  # an id is never another option's
        for o in made.options_on(START + day * 86_400 * NS):
            assert natives.setdefault(o.native, o.symbol) == o.symbol
    assert max(natives) < 1 << 32


def test_without_options_the_market_is_as_ever() -> None:
    made, rows = market(5, seed=7)
    assert made.options_on(START) == []
    assert rows["instrument_id"].max() < 1 << 31
    with_options, mixed = market(5, seed=7, option_share=0.1)
    index = with_options.index(START) + 4
    again = SyntheticMarket(MarketOptions(seed=7, option_share=0.1))
    assert mixed.tobytes().endswith(again.block(index).tobytes()), "any block alone"


@pytest.mark.parametrize("rate", [0.01, 5000, 50_000])
def test_any_rate(rate: float) -> None:
    made = SyntheticMarket(MarketOptions(rate=rate))
    first = made.index(START)
    assert sum(len(made.block(first + i)) for i in range(3)) >= (0 if rate < 1 else rate)


# -- files -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the vendor's client leaves files open and upsets pandas
@pytest.mark.parametrize("suffix", [".dbn", ".dbn.zst"])
def test_a_file_that_databento_and_we_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tape{suffix}"
    made: list[int] = []
    summary = generate(path, trades=20_000, seed=3, roots=("ES", "CL"), definitions=True, progress=made.append)
    assert made[-1] == 20_000 == summary["trades"]
    store = databento.DBNStore.from_file(path)
    theirs = store.to_ndarray()
    symbols = set(store.to_df()["symbol"])
    defined = databento.DBNStore.from_file(summary["definitions"]).to_df()
    del store
    gc.collect()
    assert len(theirs) == 20_000
    assert symbols == {"ESM4", "ESU4", "ESM4-ESU4", "CLK4", "CLM4", "CLK4-CLM4"}
    assert set(defined["raw_symbol"]) == symbols
    assert set(defined["asset"]) == {"ES", "CL"}
    out = Memory()
    DbnFiles([path, summary["definitions"]], 4).run(out, Resume(), threading.Event())
    instruments = [m for m in out.log if isinstance(m, Instrument)]
    assert {i.symbol: i.estimated for i in instruments if i.kind == "F"} == dict.fromkeys(
        ["ESM4", "ESU4", "CLK4", "CLM4"], False
    )
    assert {i.venue for i in instruments} == {VENUE}
    spreads = out.counts["spread"]
    assert spreads > 0
    assert len(out.trades()) + spreads == 20_000
    assert (out.clocks[0].watched_from_ns, out.clocks[-1].final) == (START, True)
    assert out.clocks[-1].watermark_ns > theirs["ts_recv"].astype(np.int64).max()
    assert not list(tmp_path.glob("*.part"))


def test_a_file_with_options_and_their_definitions(tmp_path: Path) -> None:
    path = tmp_path / "tape.dbn.zst"
    # Over midnight, so that options of two days are in it.
    summary = generate(path, trades=6000, start="2024-05-09T23:50:00Z", rate=8, roots=("ES", "NQ"), options=True)
    out = Memory()
    DbnFiles([path, summary["definitions"]], 4).run(out, Resume(), threading.Event())
    said = {i.id: i for i in out.log if isinstance(i, Instrument)}
    options = {n: i for n, i in said.items() if i.kind in ("C", "P")}
    assert len(options) == summary["options"] > 200
    assert summary["contracts"] == 4
    assert {i.root for i in options.values()} == {"ES", "NQ"}
    assert {i.underlying for i in options.values()} == {"ESM4", "NQM4"}
    assert all(i.strike and i.expiration_ns and i.multiplier in (20, 50) for i in options.values())
    assert {i.symbol.split()[0][:-2] for i in options.values()} >= {"E2D", "EW2", "ES", "Q2D", "QN2", "NQ", "E2A"}
    traded = np.isin(out.trades()["instrument"], list(options))
    assert 0.05 < traded.mean() < 0.15
    generate(tmp_path / "again.dbn.zst", trades=6000, start="2024-05-09T23:50:00Z", rate=8, roots=("ES", "NQ"),
             options=True)  # fmt: skip
    for name in ("{}.dbn.zst", "{}.definitions.dbn"):
        assert (tmp_path / name.format("again")).read_bytes() == (tmp_path / name.format("tape")).read_bytes()


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    def made(name: str, **more: Any) -> bytes:
        generate(tmp_path / name, **({"trades": 5000, "seed": 5} | more))
        return (tmp_path / name).read_bytes()

    assert made("a.dbn") == made("b.dbn", start=START)
    assert made("a.dbn.zst") == made("b.dbn.zst")
    assert made("c.dbn", seed=6) != made("a.dbn")


def test_late_trades_on_demand(tmp_path: Path) -> None:
    generate(tmp_path / "a.dbn", trades=20_000, late_fraction=0.02, late_seconds=90)
    out = Memory()
    DbnFiles([tmp_path / "a.dbn"], 4).run(out, Resume(), threading.Event())
    delay = out.trades()["ts_recv_ns"] - out.trades()["ts_event_ns"]
    assert 0.01 < (delay > NS).mean() < 0.03
    assert 60 * NS < delay.max() < 91 * NS


def test_within_sessions_the_venue_is_the_real_one(tmp_path: Path) -> None:
    # Friday 20:55 UTC: five minutes to the weekend.
    generate(tmp_path / "a.dbn", trades=30_000, start="2024-05-10T20:55:00Z", sessions=True)
    source = DbnFiles([tmp_path / "a.dbn"], 4)
    assert source.venue == "GLBX.MDP3"
    out = Memory()
    source.run(out, Resume(), threading.Event())
    assert np.diff(out.trades()["ts_event_ns"]).max() == pytest.approx(49 * 3600 * NS, rel=0.01)


def test_no_time_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ISO time"):
        generate(tmp_path / "a.dbn", trades=1, start="yesterday")
    with pytest.raises(OSError, match="No such file"):
        generate(tmp_path / "missing" / "a.dbn", trades=1)


# -- live --------------------------------------------------------------------------------------


class Until(Memory):
    """Stops when the tape has reached an instant."""

    def __init__(self, end_ns: int) -> None:
        super().__init__()
        self.end_ns, self.stop = end_ns, threading.Event()

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        super().ticks(grouped, cursor)
        if msgspec.json.decode(cursor, type=Cursor).at_ns >= self.end_ns:
            self.stop.set()


def play(end_ns: int, resume: Resume | None = None, now: int = START, **settings: Any) -> Until:
    out = Until(end_ns)
    feed = SyntheticFeed(Synthetic(**({"speed": 600.0} | settings)), 4, clock=lambda: now)
    feed.run(out, resume or Resume(), out.stop)
    return out


def test_history_at_once_then_the_present_and_resumed_anywhere() -> None:
    whole = play(START + 120 * NS)
    assert whole.clocks[0] == Clock("synthetic", START - 600 * NS, watched_from_ns=START - 600 * NS)
    trades = whole.trades()
    assert trades["ts_recv_ns"].min() >= START - 600 * NS
    first = msgspec.json.decode(whole.cursors[0], type=Cursor)
    assert first.at_ns < START - 590 * NS
    history = [c for c in whole.cursors if msgspec.json.decode(c, type=Cursor).at_ns < START - 70 * NS]
    assert len(history) <= 12  # a block at a time, not paced
    for k in (0, len(whole.cursors) // 2, len(whole.cursors) - 1):
        rest = play(START + 60 * NS if k == 0 else START + 120 * NS, Resume({0: whole.cursors[k]}))
        for p, rows in rest.joined().items():
            tail = b"".join(r.tobytes() for chunk, q, r in whole.pieces if chunk >= k and q == p)
            n = min(len(tail), rows.nbytes)
            assert tail[:n] == rows.tobytes()[:n]
        assert rest.clocks[0].watched_from_ns == START - 600 * NS
    assert "spread" in whole.counts


def test_the_live_feed_trades_options_and_defines_them_first() -> None:
    out = play(START)
    said = {i.id: i for i in out.log if isinstance(i, Instrument)}
    options = {n: i for n, i in said.items() if i.kind in ("C", "P")}
    assert {i.root for i in options.values()} == {"ES", "NQ", "CL"}
    assert {i.defined_ns for i in options.values()} == {START // (86_400 * NS) * 86_400 * NS}
    assert {i.venue for i in said.values()} == {VENUE}
    trades = out.trades()
    assert 0.05 < np.isin(trades["instrument"], list(options)).mean() < 0.15
    assert set(trades["instrument"].tolist()) <= said.keys()
    for p, rows in out.joined(TRADE).items():
        assert {partition_of(said[n].root, 4) for n in set(rows["instrument"].tolist())} == {p}


def test_away_for_long_it_watches_anew() -> None:
    cursor = play(START).cursors[0]
    soon = play(START + 60 * NS, Resume({0: cursor}), START + 60 * NS, speed=1.0)
    assert soon.clocks[0].watched_from_ns == START - 600 * NS
    late = START + (CATCH_UP_SECONDS + 60) * NS
    assert play(late - 30 * NS, Resume({0: cursor}), late, speed=1.0).clocks[0].watched_from_ns == late - 600 * NS


def test_a_quiet_market_still_tells_the_time() -> None:
    class Watch(Memory):
        mark = 0
        stop = threading.Event()

        def broadcast(self, message: Any) -> None:
            super().broadcast(message)
            assert message.watermark_ns >= self.mark
            self.mark = message.watermark_ns
            if len(self.clocks) > 12:
                self.stop.set()

        def ticks(self, grouped: Grouped, cursor: bytes) -> None:
            super().ticks(grouped, cursor)
            assert (grouped.rows["ts_event_ns"][grouped.rows["kind"] == TRADE] >= self.mark).all()

    out = Watch()
    SyntheticFeed(Synthetic(trades_per_second=0.1, speed=20.0), 4, clock=lambda: START).run(out, Resume(), out.stop)
    assert out.clocks[-1].watched_from_ns is None
    assert len(out.trades())


def test_another_market_is_another_tape() -> None:
    def tape(**more: Any) -> str:
        return SyntheticFeed(Synthetic(**more), 4).tape

    assert tape() == tape(speed=5.0) != tape(seed=2)
    with pytest.raises(ConfigError):
        tape(speed=0.0)
    with pytest.raises(ConfigError):
        tape(roots=())


RUN = """
import threading
from services.ingest.worker import run_synthetic
from shared.settings import load
run_synthetic(load(), threading.Event(), ())
"""


@pytest.mark.heavy
def test_killed_again_and_again_it_goes_on_exactly(redis_server: EmbeddedRedis) -> None:
    bus = Bus(redis_server.url, f"t{uuid.uuid4().hex[:10]}")
    env = {
        **os.environ, "REDIS_URL": redis_server.url, "TAPELINE_NAMESPACE": bus.keys.namespace,
        "TAPELINE_PARTITIONS": "2", "TAPELINE_SYNTHETIC_TRADES_PER_SECOND": "1500", "TAPELINE_SYNTHETIC_SEED": "4",
    }  # fmt: skip

    def records() -> int:
        return sum(int(bus.call("hget", bus.keys.info(p, "ticks"), "records") or 0) for p in range(2))

    held = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", RUN], env=env)
        held = until(lambda held=held: (n := records()) > held + 50_000 and n, timeout=60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    frames = {p: [f for f in bus.read(p, "ticks", "0-0", 10**6) if f.kind == "trade"] for p in range(2)}
    got = {p: b"".join(f.body for f in fs) for p, fs in frames.items()}
    cursor = msgspec.json.decode(bus.call("hget", bus.keys.producers(0), "synthetic:cursor"), type=Held)
    watch = msgspec.json.decode(cursor.resume, type=Cursor).watch_ns
    out = Until(watch + 3600 * NS)
    feed = SyntheticFeed(Synthetic(seed=4, trades_per_second=1500.0, speed=10_000.0), 2, clock=lambda: watch + 600 * NS)
    feed.run(out, Resume(), out.stop)
    for p, body in got.items():
        assert len(body) > 0
        assert out.joined()[p].tobytes().startswith(body)
    assert sum(f.count for fs in frames.values() for f in fs) > 150_000
    assert len(out.joined(TRADE)) == 2
    bus.close()
