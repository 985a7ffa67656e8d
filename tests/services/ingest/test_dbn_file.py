"""DBN files: every layout, every fault, any set of files, resumed anywhere."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import databento_dbn as dbn
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ingest import dbn_tape
from services.ingest.dbn_file import DbnFiles
from services.ingest.pacing import Pacer
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Resume
from shared.errors import SourceError
from shared.frames import CLOCK, NS, TRADE
from shared.instruments import instrument_id, partition_of
from shared.messages import Instrument
from shared.redis_server import EmbeddedRedis
from shared.settings import Ingest
from tests.services.ingest.dbn import (
    DAY,
    T0,
    VENUE,
    Memory,
    as_trades,
    day_of,
    definition,
    header,
    records,
    simple,
    write,
)
from tests.services.ingest.test_publisher import Killed, MortalBus

TIMES = T0 + np.arange(1, 501) * (NS // 10)


def play(*paths: Any, partitions: int = 4, resume: Resume | None = None, **more: Any) -> Memory:
    out = Memory(**more)
    DbnFiles(paths, partitions).run(out, resume or Resume(), out._stop or threading.Event())
    return out


def refused(*paths: Any) -> str:
    with pytest.raises(SourceError) as error:
        play(*paths)
    text = str(error.value)
    assert "\n" not in text
    return text


# -- layouts -----------------------------------------------------------------------------------


def test_a_day_of_trades(tmp_path: Path) -> None:
    out = play(simple(tmp_path / "a.dbn", TIMES))
    trades = out.trades()
    assert trades["ts_event_ns"].tolist() == (TIMES - 100_000).tolist()
    assert (trades["price"] == 100).all()
    assert (trades["bid_px"] == 99).all()
    assert set(trades["instrument"].tolist()) == {instrument_id(VENUE, "ESZ3")}
    assert set(out.joined()) == {partition_of("ES", 4)}
    assert out.symbols == ["ESZ3"]
    assert [(c.watermark_ns, c.watched_from_ns, c.final) for c in out.clocks] == [
        (T0, T0, False), (T0, T0, False), (T0 + DAY, None, True),
    ]  # fmt: skip
    assert isinstance(out.log[-2], str)  # flushed before the last clock
    assert out.states == ["connected", "ended"]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".dbn", ".dbn.zst"])
@pytest.mark.parametrize("ts_out", [False, True])
@pytest.mark.parametrize("schema", ["tbbo", "trades"])
def test_every_layout_gives_the_same_trades(
    tmp_path: Path, version: int, suffix: str, ts_out: bool, schema: str
) -> None:
    expected = play(simple(tmp_path / "plain.dbn", TIMES)).trades()
    rows = records(TIMES)
    body = as_trades(rows) if schema == "trades" else rows
    if ts_out:
        body["length"] += 2
        wide = np.zeros((len(body), body.itemsize + 8), np.uint8)
        wide[:, : body.itemsize] = np.frombuffer(body.tobytes(), np.uint8).reshape(len(body), -1)
        body = wide
    head = header(T0, T0 + DAY, [("ESZ3", 1, T0, T0 + DAY)], schema, ts_out, version=version)
    assert head[3] == version
    got = play(write(tmp_path / f"a{suffix}", head, body, frames=3)).trades()
    if schema == "trades":
        assert np.isnan(got["bid_px"]).all()
        assert np.isnan(got["ask_px"]).all()
        names = ["ts_event_ns", "ts_recv_ns", "instrument", "price", "size", "sequence", "side"]
        got, expected = got[names], expected[names]
    assert got.tolist() == expected.tolist()


def test_real_trades(shared_data: Path) -> None:
    path = shared_data / "databento" / "ESH4_tbbo_2023-12-25.dbn"
    out = play(path, partitions=8)
    raw = dbn.MBP1Msg._dtypes
    wanted = np.frombuffer(path.read_bytes()[-2973 * 80 :], np.dtype(raw))
    trades = out.trades()
    assert len(trades) == 2973
    assert trades["ts_event_ns"].tolist() == wanted["ts_event"].tolist()
    assert trades["size"].sum() == wanted["size"].sum()
    assert (out.clocks[0].watched_from_ns, out.clocks[-1].watermark_ns) == (
        1_703_545_200 * NS, 1_703_548_800 * NS,
    )  # fmt: skip
    undefined = play(shared_data / "databento" / "IFEU_tbbo_undefined_bbo.dbn.zst").trades()
    assert len(undefined) == 4
    assert np.isnan(undefined["bid_px"]).all()


def test_real_files_of_other_schemas_are_refused(shared_data: Path) -> None:
    folder = shared_data / "databento"
    assert "schema mbp-1" in refused(folder / "ESM4_options_mbp-1_2024-05-09.dbn.zst")
    assert "mixed" in refused(folder / "live_mixed_records.dbn.zst")
    assert "definition" in refused(folder / "definition-glbx-es-opt.dbn.zst")


def test_an_interval_without_trades_was_watched(tmp_path: Path) -> None:
    out = play(simple(tmp_path / "a.dbn", []))
    assert out.symbols == ["ESZ3"]
    assert [(c.watched_from_ns, c.watermark_ns) for c in out.clocks[1:]] == [(T0, T0), (None, T0 + DAY)]


# -- faults ------------------------------------------------------------------------------------


def test_no_tape_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.dbn").touch()
    (tmp_path / "text.dbn").write_text("ts_event,price\n1,2\n")
    (tmp_path / "short.dbn").write_bytes(b"DB")
    (tmp_path / "garbage.dbn").write_bytes(b"DBN\x03" + b"\xff" * 400)
    (tmp_path / "newer.dbn").write_bytes(b"DBN\x09" + b"\x00" * 400)
    (tmp_path / "noise.dbn").write_bytes(b"DBN\x03\x00\x01\x00\x00" + b"\xa7" * 400)
    (tmp_path / "noise.dbn.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xa7" * 400)
    assert "is empty" in refused(tmp_path / "empty.dbn")
    assert "not a DBN file" in refused(tmp_path / "text.dbn")
    assert "header" in refused(tmp_path / "short.dbn")
    assert "header" in refused(tmp_path / "garbage.dbn")
    assert "version 9" in refused(tmp_path / "newer.dbn")
    assert "header" in refused(tmp_path / "noise.dbn")
    assert "zstd" in refused(tmp_path / "noise.dbn.zst")
    assert "cannot read" in refused(tmp_path / "missing.dbn")
    assert "cannot read" in refused(tmp_path)
    whole = simple(tmp_path / "whole.dbn", TIMES)
    (tmp_path / "cut.dbn").write_bytes(whole.read_bytes()[:100])
    assert "cut off in its header at byte 100" in refused(tmp_path / "cut.dbn")
    assert "given twice" in refused(whole, tmp_path / "." / "whole.dbn")
    other = write(tmp_path / "o.dbn", header(T0, T0 + DAY, [], dataset="IFEU.IMPACT"))
    assert "IFEU.IMPACT" in refused(whole, other)
    assert "schema ohlcv-1s" in refused(write(tmp_path / "c.dbn", header(T0, T0 + DAY, [], "ohlcv-1s")))


@pytest.mark.parametrize("suffix", [".dbn", ".dbn.zst"])
def test_cut_off_after_whole_records(tmp_path: Path, suffix: str) -> None:
    head = header(T0, T0 + DAY, [("ESZ3", 1, T0, T0 + DAY)])
    body = records(TIMES).tobytes()[: 300 * 80 + 33]
    out = Memory()
    with pytest.raises(SourceError, match=r"33 of 80 bytes of record 300 at byte \d+"):
        DbnFiles([write(tmp_path / f"a{suffix}", head, body)], 4).run(out, Resume(), threading.Event())
    assert len(out.trades()) == 300
    assert not any(c.final for c in out.clocks)
    assert out.log[-1] == "flush"


def test_cut_off_inside_the_compression(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = records(T0 + np.arange(50_000) * NS // 1000, price=rng.integers(1, 10**6, 50_000))
    rows["size"] = rng.integers(1, 2**31, len(rows))
    path = write(tmp_path / "a.dbn.zst", header(T0, T0 + DAY, [("ESZ3", 1, T0, T0 + DAY)]), rows)
    path.write_bytes(path.read_bytes()[:-5000])
    out = Memory()
    with pytest.raises(SourceError, match=r"zstd frame does not end at byte \d+; \d+ whole records before it"):
        DbnFiles([path], 4).run(out, Resume(), threading.Event())
    got = out.trades()
    assert 0 < len(got) < 50_000
    assert got["ts_recv_ns"].tolist() == rows["ts_recv"][: len(got)].tolist()


def test_a_strange_record_ends_the_tape_there(tmp_path: Path) -> None:
    rows = records(TIMES)
    rows["rtype"][123] = 23
    out = Memory()
    path = write(tmp_path / "a.dbn", header(T0, T0 + DAY, [("ESZ3", 1, T0, T0 + DAY)]), rows)
    with pytest.raises(SourceError, match=r"record 123 at byte \d+ is no tbbo record \(type 23, 80 bytes\)"):
        DbnFiles([path], 4).run(out, Resume(), threading.Event())
    assert len(out.trades()) == 123


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_one_clear_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = simple(tmp_path / data.draw(st.sampled_from(["a.dbn", "a.dbn.zst"])), TIMES)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole[: data.draw(st.integers(at, len(whole)))])
    try:
        play(path)
    except SourceError as error:
        assert str(path) in str(error)  # noqa: PT017


# -- symbols and days --------------------------------------------------------------------------


def test_ids_are_reused_across_days(tmp_path: Path) -> None:
    mappings = [("ESZ3", 7, T0, T0 + DAY), ("NQZ3", 7, T0 + DAY, T0 + 2 * DAY), ("ESZ3", 8, T0 + DAY, T0 + 2 * DAY)]
    times = np.array([T0 + 1 * NS, T0 + DAY - NS, T0 + DAY, T0 + DAY + NS, T0 + 2 * DAY - 1])
    rows = records(times, native=[7, 7, 7, 8, 9])
    out = play(write(tmp_path / "a.dbn", header(T0, T0 + 2 * DAY, mappings), rows))
    es, nq = instrument_id(VENUE, "ESZ3"), instrument_id(VENUE, "NQZ3")
    assert out.trades()["instrument"].tolist() == [es, es, nq, es]
    assert out.counts == {"unknown_instrument": 1}
    assert len([m for m in out.log if isinstance(m, int)]) == 2  # a chunk a day


def test_the_ids_may_stand_first(tmp_path: Path) -> None:
    interval = SimpleNamespace(start_date=day_of(T0), end_date=day_of(T0 + DAY), symbol="ESZ3")
    mapping = SimpleNamespace(raw_symbol="17", intervals=[interval])
    turned = dbn.Metadata(
        VENUE, T0, dbn.SType.INSTRUMENT_ID, dbn.SType.RAW_SYMBOL, dbn.Schema.TBBO, ["17"], [], [], [mapping], T0 + DAY
    )
    out = play(write(tmp_path / "a.dbn", bytes(turned.encode()), records(TIMES, 17)))
    assert out.symbols == ["ESZ3"]
    assert len(out.trades()) == len(TIMES)


def test_spreads_are_counted_and_skipped(tmp_path: Path) -> None:
    mappings = [("ESZ3", 1, T0, T0 + DAY), ("ESZ3-ESH4", 2, T0, T0 + DAY)]
    rows = records(TIMES, native=1 + np.arange(len(TIMES)) % 2)
    out = play(write(tmp_path / "a.dbn", header(T0, T0 + DAY, mappings), rows))
    assert len(out.trades()) == 250
    assert out.counts == {"spread": 250}


@pytest.mark.parametrize("suffix", [".dbn", ".dbn.zst"])
@pytest.mark.parametrize("mapped", [True, False])
def test_definitions_win_over_names(tmp_path: Path, suffix: str, mapped: bool) -> None:
    mappings = [("ESZ3", 1, T0, T0 + DAY)] if mapped else []
    trades = write(tmp_path / "a.dbn", header(T0, T0 + DAY, mappings), records(TIMES))
    defined = write(
        tmp_path / f"d{suffix}",
        header(T0, T0 + DAY, [], "definition"),
        bytes(definition("ESZ3", 1, T0, asset="MINI")),
    )
    out = play(trades, defined)
    (instrument,) = [m for m in out.log if getattr(m, "symbol", "")]
    assert (instrument.root, instrument.expiration_ns, instrument.estimated) == ("MINI", T0 + 30 * DAY, False)
    assert instrument.tick_size == 0.25
    assert len(out.trades()) == len(TIMES)
    assert set(out.joined()) == {partition_of("MINI", 4)}


def option(symbol: str, native: int, at: int, strike: float, **more: Any) -> bytes:
    fields = {
        "asset": "Q3C", "underlying": "NQZ3", "strike_price": round(strike * NS), "unit_of_measure_qty": 20 * NS,
        "expiration": T0 + 20 * DAY,
    }  # fmt: skip
    return bytes(definition(symbol, native, at, instrument_class=dbn.InstrumentClass.CALL, **(fields | more)))


@pytest.mark.parametrize("last", [False, True])
def test_definitions_hold_from_their_day_on(tmp_path: Path, last: bool) -> None:
    """One mapping over three days, definitions in two files: said again on the second, something else on the third."""
    name, end = "Q3CX3 C16000", T0 + 3 * DAY
    times = np.concatenate([TIMES[:10] + k * DAY for k in range(3)])
    trades = write(tmp_path / "a.dbn", header(T0, end, [(name, 1, T0, end)]), records(times))
    days = [(0, NS // 4), (1, NS // 4), (2, NS // 2)]
    bodies = [option(name, 1, T0 + k * DAY, 16_000, min_price_increment=tick) for k, tick in days]
    early = write(tmp_path / "d1.dbn", header(T0, T0 + DAY, [], "definition"), bodies[0])
    late = write(tmp_path / "d2.dbn.zst", header(T0 + DAY, end, [], "definition"), bodies[2], bodies[1])
    out = play(*((trades, late, early) if last else (late, early, trades)))
    said = [(out.log.index(m), m) for m in out.log if isinstance(m, Instrument)]
    assert [(m.tick_size, m.defined_ns) for _, m in said] == [(0.25, T0), (0.5, T0 + 2 * DAY)]
    assert {(m.root, m.kind, m.strike, m.underlying) for _, m in said} == {("NQ", "C", 16_000.0, "NQZ3")}
    ticks = [i for i, m in enumerate(out.log) if isinstance(m, int) and m]
    assert said[0][0] < ticks[0], "published before use"
    assert sum(i < said[1][0] for i in ticks) == 2, "and the new one before the trades of its day"
    assert set(out.joined(TRADE)) == {partition_of("NQ", 4)}
    assert len(out.trades()) == 30


def test_an_id_of_two_options_and_an_option_nobody_defined(tmp_path: Path) -> None:
    one, two, other = "Q3CX3 C16000", "Q4CX3 P15000", "E3CX3 P4000"
    mappings = [(one, 1, T0, T0 + DAY), (two, 1, T0 + DAY, T0 + 2 * DAY), (other, 2, T0, T0 + 2 * DAY)]
    rows = records(np.concatenate([TIMES[:8], TIMES[:8] + DAY]), native=1 + np.arange(16) % 2)
    trades = write(tmp_path / "a.dbn", header(T0, T0 + 2 * DAY, mappings), rows)
    body = option(one, 1, T0, 16_000) + option(two, 1, T0 + DAY, 15_000)
    defined = write(tmp_path / "d.dbn", header(T0, T0 + 2 * DAY, [], "definition"), body)
    out = play(trades, defined)
    by_symbol = {m.symbol: m for m in out.log if isinstance(m, Instrument)}
    assert {s: m.strike for s, m in by_symbol.items()} == {one: 16_000.0, two: 15_000.0, other: None}
    assert (by_symbol[other].root, by_symbol[other].kind) == ("ES", "?")
    got = out.trades()
    for symbol, day, count in ((one, 0, 4), (two, 1, 4), (other, 0, 4), (other, 1, 4)):
        of_day = (got["ts_recv_ns"] - T0) // DAY == day
        assert (got["instrument"][of_day] == instrument_id(VENUE, symbol)).sum() == count
    settings = Memory()
    DbnFiles([trades], 4, option_roots={"E3C": "MES"}).run(settings, Resume(), threading.Event())
    assert {m.root for m in settings.log if isinstance(m, Instrument)} == {"Q3C", "Q4C", "MES"}


def test_cut_off_definitions(tmp_path: Path) -> None:
    body = bytes(definition("ESZ3", 1, T0)) * 2
    path = write(tmp_path / "d.dbn", header(T0, T0 + DAY, [], "definition"), body[:-10])
    assert "cut off in definition 1" in refused(simple(tmp_path / "a.dbn", TIMES), path)


def test_real_definition(shared_data: Path, tmp_path: Path) -> None:
    at = 1_609_113_600 * NS
    defined = shared_data / "databento" / "definition-glbx-future.dbn.zst"
    out = play(simple(tmp_path / "a.dbn", at + np.arange(1, 10) * NS, 5482, "ESH1"), defined)
    (instrument,) = [m for m in out.log if getattr(m, "symbol", "")]
    assert (instrument.root, instrument.expiration_ns) == ("ES", 1_616_160_600 * NS)


# -- several files -----------------------------------------------------------------------------


def test_touching_files_are_one_watch_and_a_hole_begins_another(tmp_path: Path) -> None:
    first = simple(tmp_path / "1.dbn", TIMES)
    second = simple(tmp_path / "2.dbn.zst", TIMES + DAY)
    third = simple(tmp_path / "3.dbn", TIMES + 3 * DAY)
    out = play(third, first, second)
    assert [(c.watched_from_ns, c.watermark_ns) for c in out.clocks if c.watched_from_ns is None] == [
        (None, T0 + 2 * DAY), (None, T0 + 4 * DAY),
    ]  # fmt: skip
    assert sorted({c.watched_from_ns for c in out.clocks if c.watched_from_ns}) == [T0, T0 + 3 * DAY]
    times = out.trades()["ts_recv_ns"].tolist()
    assert times == [*TIMES, *(TIMES + DAY), *(TIMES + 3 * DAY)]


def test_a_limited_file_is_watched_to_its_last_record(tmp_path: Path) -> None:
    head = header(T0, T0 + DAY, [("ESZ3", 1, T0, T0 + DAY)], limit=500)
    out = play(write(tmp_path / "a.dbn", head, records(TIMES)))
    assert out.clocks[-1].watermark_ns == int(TIMES[-1]) - 100_000
    nothing_known = header(0, None, [("ESZ3", 1, T0, T0 + DAY)])
    out = play(write(tmp_path / "b.dbn", nothing_known, records(TIMES)))
    assert out.clocks[0].watched_from_ns == int(TIMES[0]) - 100_000
    assert out.clocks[-1].watermark_ns == int(TIMES[-1]) - 100_000


def many(folder: Path, rng: np.random.Generator, files: int, size: int) -> tuple[list[Path], np.ndarray]:
    """Files that overlap in every way, with equal times and times that run backwards; the right merge of them."""
    paths, keys, rows = [], [], []
    for i in range(files):
        start = T0 + int(rng.integers(0, 3)) * DAY
        # Times on a coarse grid, so that files have many in common.
        times = start + np.sort(rng.integers(1, 2 * 86_400 // 7200, size)) * 7200 * NS
        back = rng.random(size) < 0.05
        times[back] -= np.minimum(1800 * NS, times[back] - start)
        known = rng.random() < 0.7
        head = header(
            start if known else 0, start + 2 * DAY if rng.random() < 0.7 else None,
            [(f"R{i}Z3", i, T0, T0 + 9 * DAY)],
        )  # fmt: skip
        made = records(times, i, sequence=np.arange(size) + 1000 * i)
        paths.append(write(folder / f"{i}.dbn{'.zst' if rng.random() < 0.3 else ''}", head, made))
        keys.append(np.maximum.accumulate(np.maximum(times, start if known else 0)))
        rows.append((0 if not known else start, paths[-1].name, keys[-1], made))
    rows.sort(key=lambda r: r[:2])
    order = np.argsort(np.concatenate([r[2] for r in rows]), kind="stable")
    return paths, np.concatenate([r[3] for r in rows])[order]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60), st.sampled_from([1, 5, 64]))
def test_merged_in_order_and_resumed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, files: int, size: int, batch: int
) -> None:
    monkeypatch.setattr(dbn_tape, "BATCH", batch)
    rng = np.random.default_rng(seed)
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    paths, expected = many(folder, rng, files, size)
    whole = play(*paths)
    got = np.concatenate([np.concatenate(whole.rows[p]) for p in whole.rows])
    got = got[got["kind"] == TRADE]
    assert sorted(got["sequence"].tolist()) == sorted(expected["sequence"].tolist())
    for p in whole.rows:  # within a partition, the tape's order
        mine = whole.joined(TRADE)[p]["sequence"].tolist()
        assert mine == [s for s in expected["sequence"].tolist() if partition_of(f"R{s // 1000}Z3"[:2], 4) == p]
    # From any chunk on, the rest of the rows comes, clock rows included.
    k = int(rng.integers(0, len(whole.cursors)))
    rest = play(*paths, resume=Resume({0: whole.cursors[k], 1: whole.cursors[-1]}))
    for p, rows in rest.joined().items():
        assert whole.joined()[p].tobytes().endswith(rows.tobytes())
    assert sum(map(len, rest.joined().values())) == sum(m for m in _after(whole, k))
    assert rest.clocks[-1] == whole.clocks[-1]
    assert rest.clocks[-1].final


def _after(memory: Memory, k: int) -> list[int]:
    return [m for m in memory.log if isinstance(m, int)][k:]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.lists(st.integers(0, 12), max_size=4), st.sampled_from([1, 16, 1000]))
def test_killed_while_playing_the_bus_holds_each_row_once(
    redis_server: EmbeddedRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    deaths: list[int],
    frame: int,
) -> None:
    monkeypatch.setattr(dbn_tape, "BATCH", 16)
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    paths, _ = many(folder, np.random.default_rng(seed), 3, 40)
    whole = play(*paths)
    bus = MortalBus(redis_server.url, f"t{uuid.uuid4().hex[:10]}")
    for life in range(len(deaths) + 1):
        bus.fates = iter([""] * deaths[life] + ["after" if life % 2 else "before"]) if life < len(deaths) else iter(())
        source = DbnFiles(paths, 4)
        out = PublisherOutput(
            bus, "files", f"o{life}", 4, Ingest(0, frame), threading.Event(), live=False, tape=source.tape
        )
        try:
            source.run(out, out.attach(), threading.Event())
            break
        except Killed:
            out._closed.set()
    for p, rows in whole.joined().items():
        frames = [f for f in bus.read(p, "ticks", "0-0", 10_000) if f.kind == "trade"]
        assert b"".join(f.body for f in frames) == rows.tobytes()
    bus.close()


def test_the_tape_has_a_name_of_its_own(tmp_path: Path) -> None:
    one, two = simple(tmp_path / "1.dbn", TIMES), simple(tmp_path / "2.dbn", TIMES + DAY)
    assert DbnFiles([one, two], 4).tape == DbnFiles([two, one], 8).tape != DbnFiles([one], 4).tape


# -- time --------------------------------------------------------------------------------------


def test_any_speed_gives_the_same_rows(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    fast = play(path)
    out = Memory()
    DbnFiles([path], 4, speed=200).run(out, Resume(), threading.Event())  # 50 s of tape
    assert len(out.cursors) > 10
    assert {p: r.tobytes() for p, r in out.joined().items()} == {p: r.tobytes() for p, r in fast.joined().items()}


def test_stopped_and_resumed(tmp_path: Path) -> None:
    path = simple(tmp_path / "a.dbn", TIMES)
    stop = threading.Event()
    source = DbnFiles([path], 4, speed=200)
    first = Memory(3, stop)
    source.run(first, Resume(), stop)
    assert len(first.cursors) == 3
    assert not any(c.final for c in first.clocks)
    ordinal = msgspec.json.decode(first.cursors[-1])["ordinal"]
    rest = play(path, resume=Resume({0: first.cursors[-1]}))
    assert rest.trades()["sequence"][0] == ordinal
    assert sum(map(len, rest.joined(CLOCK).values())) == 0


def test_pacer_keeps_event_time() -> None:
    now = [100.0]
    pacer = Pacer(10, clock=lambda: now[0])
    stop = threading.Event()
    stop.set()
    assert pacer.due(T0, stop) == T0
    now[0] += 2
    assert pacer.due(T0 + 5 * NS, stop) == T0 + 20 * NS
    assert pacer.due(T0 + 100 * NS, stop) == T0 + 20 * NS
