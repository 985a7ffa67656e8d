"""Option tapes: real DBN, read back as it was meant; quiet but for what was planted; mirrored exactly."""

from __future__ import annotations

import gc
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import databento
import numpy as np
import pytest

from services.ingest.dbn_file import DbnFiles
from services.ingest.source import Resume
from services.ingest.synthetic_chain import Option
from services.ingest.synthetic_options import EVENTS, OptionTape, TapeOptions, build
from shared.calendar import EQUITY_INDEX
from shared.calendar import sessions as market_hours
from shared.errors import ConfigError
from shared.frames import NS
from shared.instruments import instrument_id, partition_of
from shared.messages import Instrument
from tests.services.ingest.dbn import Memory

DAY = 86_400 * NS
WINDOW = 300 * NS
BUY, SELL = 1, -1
Key = tuple[str, int, float, str]


@pytest.fixture(scope="module")
def tape() -> OptionTape:
    return build()


@pytest.fixture(scope="module")
def mirrored() -> OptionTape:
    return build(TapeOptions(mirror=True))


@pytest.fixture(scope="module")
def small() -> OptionTape:
    return build(TapeOptions(sessions=2, seed=3))


def options_of(tape: OptionTape) -> dict[int, Option]:
    return {o.native: o for o in tape.listings if isinstance(o, Option)}


def signed(records: np.ndarray) -> np.ndarray:
    return np.where(records["side"] == ord("B"), 1, -1)


def volumes(tape: OptionTape) -> dict[Key, dict[int, np.ndarray]]:
    """Of each key and window: bought, sold, trades."""
    options = options_of(tape)
    found: dict[Key, dict[int, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(3)))
    for record, side in zip(tape.records, signed(tape.records).tolist(), strict=True):
        o = options.get(int(record["instrument_id"]))
        if o is not None:
            window = int(record["ts_event"]) // WINDOW * WINDOW
            size = int(record["size"])
            found[o.root, o.expiry_ns, o.strike, o.kind][window] += (size * (side > 0), size * (side < 0), 1)
    return found


def play(*paths: Path, partitions: int = 8) -> Memory:
    out = Memory()
    DbnFiles(paths, partitions).run(out, Resume(), threading.Event())
    return out


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [True, False])
def test_read_back_it_is_what_was_written(small: OptionTape, tmp_path: Path, compressed: bool) -> None:
    definitions, tbbo = small.write(tmp_path, compressed=compressed)
    assert {definitions.name, tbbo.name} == {f"{n}.dbn{'.zst' * compressed}" for n in ("definitions", "tbbo")}
    out = play(tbbo, definitions)
    listed = {instrument_id("GLBX.MDP3", c.symbol): c for c in small.listings}
    said = {i.id: i for i in out.log if isinstance(i, Instrument) and i.kind in "CP"}
    assert {o.symbol for o in listed.values() if isinstance(o, Option)} == {i.symbol for i in said.values()}
    for number, i in said.items():
        o = listed[number]
        assert isinstance(o, Option)
        assert (i.root, i.kind, i.strike, i.expiration_ns) == (o.root, o.kind, o.strike, o.expiry_ns)
        assert (i.underlying, i.multiplier) == (f"{o.root}M4", {"NQ": 20.0, "ES": 50.0}[o.root])
        assert (i.tick_size, i.estimated, i.feed) == (o.tick, False, "files")
    trades = out.trades()
    spreads = [c.native for c in small.listings if "-" in c.symbol or c.symbol.startswith("UD:")]
    skipped = np.isin(small.records["instrument_id"], spreads)
    assert out.counts == {"spread": int(skipped.sum())}
    assert skipped.sum() >= 12
    kept = small.records[~skipped]
    order = np.lexsort((trades["sequence"], trades["ts_event_ns"]))
    trades = trades[order]
    symbols = {c.native: instrument_id("GLBX.MDP3", c.symbol) for c in small.listings}
    assert trades["instrument"].tolist() == [symbols[n] for n in kept["instrument_id"].tolist()]
    assert trades["ts_event_ns"].tolist() == kept["ts_event"].tolist()
    assert trades["price"].tolist() == (kept["price"] / 1e9).tolist()
    assert trades["size"].tolist() == kept["size"].tolist()
    assert trades["side"].tolist() == signed(kept).tolist()
    for p, rows in out.joined().items():
        roots = {listed[n].root for n in set(rows["instrument"].tolist()) & listed.keys()}
        assert {partition_of(root, 8) for root in roots} <= {p}, "options are where their future is"
    assert (out.clocks[0].watched_from_ns, out.clocks[-1].watermark_ns) == (small.start_ns, small.end_ns)
    assert out.clocks[-1].final


def test_without_definitions_nothing_is_made_up(small: OptionTape, tmp_path: Path) -> None:
    out = play(small.write(tmp_path)[1])
    said = [i for i in out.log if isinstance(i, Instrument) and " " in i.symbol and i.kind != "S"]
    assert {(i.kind, i.strike, i.expiration_ns) for i in said} == {("?", None, None)}
    assert {i.root for i in said} == {"NQ", "ES"}, "by the setting, also of weeklies"


@pytest.mark.filterwarnings("ignore")  # the vendor's client leaves files open and upsets pandas
def test_the_vendors_client_reads_it(small: OptionTape, tmp_path: Path) -> None:
    definitions, tbbo = small.write(tmp_path)
    store = databento.DBNStore.from_file(tbbo)
    frame = store.to_df()
    defined = databento.DBNStore.from_file(definitions).to_df()
    del store
    gc.collect()
    assert len(frame) == len(small.records)
    assert frame["symbol"].notna().all()
    options = defined[defined["instrument_class"].isin(["C", "P"])]
    assert set(options["asset"]) >= {"NQ", "ES", "Q2A", "Q2B", "E2A", "E2B"}, "weeklies have roots of their own"
    assert set(options["underlying"]) == {"NQM4", "ESM4"}
    assert set(defined["instrument_class"]) == {"C", "P", "F", "S", "T"}
    assert (options["strike_price"] > 0).all()
    assert set(defined["user_defined_instrument"]) == {"N", "Y"}


def test_the_same_options_give_the_same_bytes(small: OptionTape, mirrored: OptionTape, tmp_path: Path) -> None:
    def written(name: str, made: OptionTape) -> list[bytes]:
        (tmp_path / name).mkdir()
        return [path.read_bytes() for path in made.write(tmp_path / name)]

    first = written("a", small)
    assert first == written("b", build(TapeOptions(sessions=2, seed=3)))
    assert first[1] != written("c", build(TapeOptions(sessions=2, seed=4)))[1]
    assert first[1] != written("d", build(TapeOptions(sessions=2, seed=3, events=())))[1]


def test_wrong_options_are_refused() -> None:
    for wrong in ({"events": ("earthquake",)}, {"sessions": 0}, {"windows": 2}, {"first_day": "soon"}):
        with pytest.raises(ConfigError):
            build(TapeOptions(**wrong))


# -- what is on it ---------------------------------------------------------------------------------


def test_a_small_tape_of_many_sessions(tape: OptionTape) -> None:
    assert len(tape.records) < 100_000
    assert len(tape.sessions) == 23
    hours = market_hours(EQUITY_INDEX)
    for start, end in tape.sessions:
        row = np.searchsorted(hours[:, 0], start, side="right") - 1
        assert end <= hours[row, 1]
        assert start % WINDOW == 0
        assert end - start == 6 * WINDOW
    assert len({start % DAY for start, _ in tape.sessions}) == 1
    times, records = tape.records["ts_event"], tape.records
    assert (np.diff(times) >= 0).all()
    session = np.searchsorted([s for s, _ in tape.sessions], times, side="right") - 1
    assert (times < np.array([e for _, e in tape.sessions])[session]).all()
    assert ((records["bid_px"] > 0) & (records["bid_px"] < records["ask_px"])).all()
    assert (records["price"] == np.where(signed(records) > 0, records["ask_px"], records["bid_px"])).all()


def test_expiries_weeklies_and_options_of_the_day(tape: OptionTape) -> None:
    options = options_of(tape)
    traded = {options[n] for n in set(tape.records["instrument_id"].tolist()) & options.keys()}
    for root in ("NQ", "ES"):
        expiries = {o.expiry_ns // DAY for o in traded if o.root == root}
        assert {start // DAY for start, _ in tape.sessions} <= expiries, "0DTE in every session"
        assert len(expiries) == 23 + 2
        assert len({o.asset for o in traded if o.root == root}) > 10
    last = {o.native: o.expiry_ns for o in options.values()}
    mine = tape.records[np.isin(tape.records["instrument_id"], list(last))]
    assert all(t < last[n] for t, n in zip(mine["ts_event"].tolist(), mine["instrument_id"].tolist(), strict=True))
    for native, (first_day, last_day) in tape.lives.items():
        when = tape.records["ts_event"][tape.records["instrument_id"] == native] // DAY
        assert ((first_day <= when) & (when <= last_day)).all()


def test_every_quiet_key_trades_both_ways_and_those_of_events_have_a_history(tape: OptionTape) -> None:
    found = volumes(tape)
    events = {(p.key, w): p for p in tape.planted for w in p.windows}
    for key, windows in found.items():
        for window, (bought, sold, trades) in windows.items():
            if (key, window) not in events:
                assert 0.4 < bought / (bought + sold) < 0.6
                assert trades == 6
    for p in tape.planted:
        for window in p.windows:
            before = [w for w in found[p.key] if w < window and (window - w) % DAY == 0]
            assert len(before) >= 22
    for key in {p.key for p in tape.planted if p.event != "straddle"}:
        other = (*key[:3], "P" if key[3] == "C" else "C")
        assert other not in found, "the other leg would make it look like a straddle"


def test_the_planted_events(tape: OptionTape) -> None:
    found, last = volumes(tape), tape.sessions[-1][0]
    assert [p.event for p in tape.planted] == ["heavy", "cluster", "cluster", "cluster", "straddle", "straddle",
                                               "sweep", "block"]  # fmt: skip
    assert {p.event for p in tape.planted} == set(EVENTS)
    by_event: dict[str, list[Any]] = defaultdict(list)
    for p in tape.planted:
        by_event[p.event].append(p)
        assert last <= min(p.windows) <= max(p.windows) < tape.sessions[-1][1]
        for window in p.windows:
            bought, sold, _ = found[p.key][window]
            share = (bought if p.direction == "BUY" else sold) / (bought + sold)
            assert share > 0.8
    for p in (*by_event["heavy"], *by_event["cluster"]):
        assert np.diff(p.windows).tolist() == [WINDOW, WINDOW]
        assert [found[p.key][w].tolist() for w in p.windows] == [[40, 0, 20], [130, 0, 26], [400, 0, 40]]
    assert np.diff(sorted(p.strike for p in by_event["cluster"])).tolist() == [50, 50]
    assert len({(p.expiration_ns, p.option_type) for p in by_event["cluster"]}) == 1
    call, put = by_event["straddle"]
    assert (call.strike, call.expiration_ns, call.windows) == (put.strike, put.expiration_ns, put.windows)
    assert {call.option_type, put.option_type} == {"C", "P"}
    means = [mean_time(tape, p) for p in (call, put)]
    assert abs(means[0] - means[1]) < 15 * NS, "near in time"
    sweep, at = one_of(tape, by_event["sweep"][0])
    run = sweep[sweep["ts_event"] == at]
    assert len(set(run["price"].tolist())) == 3
    assert set(run["side"].tolist()) == {ord("A")}
    assert (np.diff(run["price"]) <= 0).all(), "a seller goes down"
    block, _ = one_of(tape, by_event["block"][0])
    assert block["size"].max() == 300
    others = tape.records["size"][np.isin(tape.records["instrument_id"], list(options_of(tape)))]
    assert (others >= 100).sum() == 1
    assert by_event["sweep"][0].direction == "SELL"


def one_of(tape: OptionTape, p: Any) -> tuple[np.ndarray, int]:
    """Records of a planted key in its first window, and the time that most of them have."""
    native = next(c.native for c in tape.listings if c.symbol == p.symbol)
    mine = tape.records[tape.records["instrument_id"] == native]
    mine = mine[mine["ts_event"] // WINDOW * WINDOW == p.windows[0]]
    times, counts = np.unique(mine["ts_event"], return_counts=True)
    return mine, int(times[counts.argmax()])


def mean_time(tape: OptionTape, p: Any) -> float:
    mine, _ = one_of(tape, p)
    return float(np.average((mine["ts_event"] - p.windows[0]).astype(float), weights=mine["size"]))


def test_events_can_be_left_out(tape: OptionTape) -> None:
    quiet = build(TapeOptions(sessions=1, events=()))
    assert quiet.planted == ()
    assert all(0.4 < b / (b + s) < 0.6 for windows in volumes(quiet).values() for b, s, _ in windows.values())
    one = build(TapeOptions(sessions=1, events=("block",)))
    assert [p.event for p in one.planted] == ["block"]


def test_a_mirrored_tape_is_the_same_but_for_its_sides(tape: OptionTape, mirrored: OptionTape) -> None:
    mine, other = tape.records, mirrored.records
    order = [np.lexsort((r["size"], r["price"], r["instrument_id"], r["ts_event"])) for r in (mine, other)]
    mine, other = mine[order[0]], other[order[1]]
    for name in ("ts_event", "ts_recv", "instrument_id", "price", "size"):
        assert (mine[name] == other[name]).all()
    assert (signed(mine) == -signed(other)).all()
    assert (other["price"] == np.where(signed(other) > 0, other["ask_px"], other["bid_px"])).all()
    assert ((other["bid_px"] > 0) & (other["bid_px"] < other["ask_px"])).all()
    assert tape.definitions == mirrored.definitions
    flip = {"BUY": "SELL", "SELL": "BUY"}
    assert [(p.key, p.windows, flip[p.direction]) for p in tape.planted] == [
        (p.key, p.windows, p.direction) for p in mirrored.planted
    ]
    swept = next(p for p in mirrored.planted if p.event == "sweep")
    run, at = one_of(mirrored, swept)
    assert (np.diff(run["price"][run["ts_event"] == at]) >= 0).all(), "a buyer goes up"


# -- whether it is fit for signals -------------------------------------------------------------------


def scores(tape: OptionTape) -> dict[tuple[Key, int], float]:
    """A plain score of the last session's windows without the filter of market makers and clusters."""
    found, out = volumes(tape), {}
    for key, windows in found.items():
        ratio = {w: float(np.log((b + 0.5) / (s + 0.5))) for w, (b, s, _) in windows.items()}
        for window in [w for w in windows if w >= tape.sessions[-1][0]]:
            past = np.array([ratio[w] for w in ratio if w < window and (window - w) % DAY == 0][-20:])
            if len(past) < 20:
                continue
            bought, sold, trades = windows[window]
            share = bought / (bought + sold)
            middle = np.median(past)
            z = 0.6745 * (ratio[window] - middle) / np.median(abs(past - middle))
            tail = 2 * abs(np.mean(past < ratio[window]) - 0.5)
            recent = [ratio.get(window - k * WINDOW, 0.0) for k in (2, 1, 0)]
            side = 1 if ratio[window] > 0 else -1
            confidence = min(trades / 20, 1) * abs(share - 0.5) * 2
            significance = 0.5 * min(abs(ratio[window]) / np.log(10), 1) + 0.3 + 0.2 * confidence
            raw = (
                0.4 * significance + 0.3 * min(max(side * (recent[2] - recent[0]) / 2, 0), 1)
                + 0.2 * abs(share - 0.5) * 2 + 0.1 * float(np.mean([side * r > 0 for r in recent]))
            )  # fmt: skip
            out[key, window] = 0.5 * raw + 0.5 * (0.5 * min(abs(z) / 4, 1) + 0.5 * tail)
    return out


@pytest.mark.parametrize("seed", [1, 2])
def test_events_stand_out_and_the_rest_is_quiet(seed: int) -> None:
    tape = build(TapeOptions(seed=seed))
    found = scores(tape)
    events = {(p.key, w): p.event for p in tape.planted for w in p.windows}
    assert events.keys() <= found.keys()
    assert min(found[at] for at in events) > 0.75
    assert max(score for at, score in found.items() if at not in events) < 0.5, "also in a cluster (x 1.2)"
    strongest = [at for at, event in events.items() if event == "cluster" and at[1] == max(w for _, w in events)]
    assert all(found[at] * 1.2 >= 0.95 for at in strongest)
