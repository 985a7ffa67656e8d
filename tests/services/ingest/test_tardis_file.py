"""Files of normalized Tardis messages: what comes out, in any cut, from any number of files, after any death."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ingest.publisher import PublisherOutput
from services.ingest.source import Resume
from services.ingest.tardis_file import TardisFiles
from services.ingest.worker import run_tardis_files
from shared.bus import Bus
from shared.errors import ConfigError, SourceError
from shared.frames import BOOK, CLOCK, LIQUIDATION, NS, OPTION, ROW_KINDS, TICK_FRAMES, TICKER, TRADE
from shared.instruments import partition_of
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.redis_server import EmbeddedRedis
from shared.settings import Ingest, RedisSettings, Settings, Tapeline
from tests.services.ingest.ndjson import MS, T0, Tapes, book, disconnect, expected, random_tape, trade, write
from tests.services.ingest.test_publisher import Killed, MortalBus

GRACE = 500 * MS


def play(*paths: Path, partitions: int = 4, stop: threading.Event | None = None, **more: Any) -> Tapes:
    out = more.pop("out", None) or Tapes()
    TardisFiles(paths, partitions, grace_ns=GRACE, **more).run(out, Resume(), stop or threading.Event())
    return out


def refused(*paths: Path) -> str:
    with pytest.raises(SourceError) as error:
        play(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def agree(out: Tapes, tape: list[Any], partitions: int) -> None:
    """Rows, clocks, disconnects and gaps are those of the oracle."""
    rows, said = expected(tape, partitions, GRACE)
    got = {
        p: [(ROW_KINDS[r["kind"]], int(r["instrument"]), int(r["ts_event_ns"]), int(r["part"])) for r in found]
        for p, found in out.joined().items()
    }
    assert got == rows
    messages = [m for m in out.log if isinstance(m, Gap | Disconnect)]
    assert [
        ("gap", m.feed, m.start_ns, m.end_ns, m.symbols) if isinstance(m, Gap)
        else ("disconnect", m.feed, m.since_ns, None, m.symbols)
        for m in messages
    ] == said  # fmt: skip


def recorded(path: Path) -> tuple[Tapes, list[Any]]:
    """A recorded file played, and its messages."""
    with zstandard.open(path, "rb") as file:
        return play(path, partitions=8, producer="p"), [json.loads(line) for line in file.read().splitlines()]


def merged(tapes: list[list[Any]]) -> list[Any]:
    """Messages by local time (the newest of their file so far), then file."""
    keyed = []
    for number, tape in enumerate(tapes):
        newest = ""
        for place, m in enumerate(tape):
            if isinstance(m, dict) and m["type"] != "book_change":
                newest = max(newest, m["localTimestamp"].rstrip("Z").ljust(26, "0"))
                keyed.append((newest, number, place, m))
    return [m for *_, m in sorted(keyed, key=lambda item: item[:3])]


# -- what comes out ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from([1, 3, 50, 2000]))
def test_rows_clocks_and_gaps_are_as_the_rules_read(tmp_path: Path, seed: int, count: int, block: int) -> None:
    tape = [trade("binance", "BTCUSDT", 0, 10**9), *random_tape(seed, count)]
    out = play(write(tmp_path / "a.ndjson", tape), producer="p", block=block)
    agree(out, tape, 4)
    assert out.counts.get("disconnect", 0) == sum(isinstance(m, dict) and m["type"] == "disconnect" for m in tape)
    assert out.states == ["connected", "ended"]


def test_a_gap_stands_before_the_row_that_ends_it(tmp_path: Path) -> None:
    tape = [trade("bitmex", "XBTUSD", 0), trade("bitmex", "ETHUSD", 1), disconnect("bitmex", 20, "xbtusd", "ethusd"),
            trade("bitmex", "XBTUSD", 900), trade("bitmex", "ETHUSD", 2000)]  # fmt: skip
    out = play(write(tmp_path / "a.ndjson", tape))
    order = [type(m).__name__ + str(m.symbols) for m in out.log if isinstance(m, Gap | Disconnect)]
    assert order == ["Disconnect('XBTUSD',)", "Disconnect('ETHUSD',)", "Gap('XBTUSD',)", "Gap('ETHUSD',)"]
    rows_before = {}  # how many trades were out when the gap was told
    trades = 0
    pieces = iter(out.chunks)
    for m in out.log:
        if isinstance(m, int):
            trades += next(pieces)
        elif isinstance(m, Gap):
            rows_before[m.symbols] = trades
    assert rows_before == {("XBTUSD",): 2, ("ETHUSD",): 3}


def test_every_exchange_is_watched_from_its_first_record_to_its_newest(tmp_path: Path) -> None:
    tape = [trade("binance", "BTCUSDT", 0), trade("deribit", "BTC-PERPETUAL", 100), trade("binance", "BTCUSDT", 3000)]
    out = play(write(tmp_path / "a.ndjson", tape))
    clocks = out.messages(Clock)
    watch = {c.feed: (c.watched_from_ns, c.grace_ns) for c in clocks if c.watched_from_ns}
    assert watch == {"tardis-files:binance": (T0, GRACE), "tardis-files:deribit": (T0 + 100 * MS, GRACE)}
    final = {c.feed: c.watermark_ns for c in clocks if c.final}
    assert final == {"tardis-files:binance": T0 + 3 * NS, "tardis-files:deribit": T0 + 100 * MS}


def test_instruments_stand_before_their_rows(tmp_path: Path) -> None:
    out = play(write(tmp_path / "a.ndjson", random_tape(3, 300)), block=5)
    assert {m.id for m in out.messages(Instrument)} == {
        i for rows in out.joined().values() for i in rows["instrument"][rows["kind"] != CLOCK].tolist()
    }
    chunk, told = 0, set()
    for m in out.log:
        if isinstance(m, Instrument):
            told.add(m.id)
        elif isinstance(m, int):
            used = [rows["instrument"][rows["kind"] != CLOCK] for c, _, rows in out.pieces if c == chunk]
            assert told.issuperset(np.concatenate(used).tolist())
            chunk += 1


# -- cuts, files, speed, deaths ----------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60))
def test_any_cut_of_any_files_gives_the_same_streams(tmp_path: Path, seed: int, files: int, block: int) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    suffix = [".ndjson", ".ndjson.zst", ".ndjson.gz"]
    tapes = [[trade("binance", "BTCUSDT", n, f"first{n}"), *random_tape(seed + n, 80)] for n in range(files)]
    paths = [write(folder / f"{n}{suffix[n % 3]}", tape) for n, tape in enumerate(tapes)]
    whole, cut = play(*paths, producer="p"), play(*reversed(paths), producer="p", block=block)
    agree(whole, merged(tapes), 4)
    assert cut.streams() == whole.streams()
    gaps = [m for m in whole.log if isinstance(m, Gap | Disconnect)]
    assert [m for m in cut.log if isinstance(m, Gap | Disconnect)] == gaps


def test_files_are_merged_by_receipt(tmp_path: Path) -> None:
    one = [trade("binance", "BTCUSDT", at, at + 1) for at in range(0, 3000, 3)]
    two = [book("binance", "BTCUSDT", at) for at in range(0, 3000, 2)]
    out = play(write(tmp_path / "1.ndjson", one), write(tmp_path / "2.ndjson.gz", two), block=7)
    (rows,) = out.joined().values()
    heads = rows[rows["part"] == 0]
    assert len(heads) == len(one) + len(two)
    assert (np.diff(heads["ts_recv_ns"]) >= 0).all()
    same = heads["ts_recv_ns"][1:] == heads["ts_recv_ns"][:-1]
    assert (heads["kind"][:-1][same] == TRADE).all()  # the earlier file first


def test_any_speed_gives_the_same_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", random_tape(1, 200))
    whole, paced = play(path), play(path, speed=300)
    assert paced.streams() == whole.streams()
    assert len(paced.cursors) > len(whole.cursors)


def test_stopped_a_tape_has_no_end(tmp_path: Path) -> None:
    stop = threading.Event()
    out = play(write(tmp_path / "a.ndjson", random_tape(1, 200)), stop=stop, out=_Stopping(stop), block=5)
    assert not any(c.final for c in out.messages(Clock))
    assert out.states == ["connected"]


class _Stopping(Tapes):
    def __init__(self, stop: threading.Event) -> None:
        super().__init__()
        self._halt = stop

    def ticks(self, grouped: Any, cursor: bytes) -> None:
        super().ticks(grouped, cursor)
        self._halt.set()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.lists(st.integers(0, 25), max_size=4), st.sampled_from([1, 16, 1000]))
def test_killed_while_playing_the_bus_holds_each_row_once(
    redis_server: EmbeddedRedis, tmp_path: Path, seed: int, deaths: list[int], frame: int
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    paths = [write(folder / f"{n}.ndjson", [trade("binance", "BTCUSDT", n, f"first{n}"), *random_tape(seed + n, 60)])
             for n in range(2)]  # fmt: skip
    whole = play(*paths)
    bus = MortalBus(redis_server.url, f"t{uuid.uuid4().hex[:10]}")
    for life in range(len(deaths) + 1):
        bus.fates = iter([""] * deaths[life] + ["after" if life % 2 else "before"]) if life < len(deaths) else iter(())
        source = TardisFiles(paths, 4, grace_ns=GRACE, block=11 + life)
        out = PublisherOutput(
            bus, source.feed, f"o{life}", 4, Ingest(0, frame), threading.Event(), live=False, tape=source.tape
        )
        try:
            source.run(out, out.attach(), threading.Event())
            break
        except Killed:
            out._closed.set()
    for p, rows in whole.joined().items():
        frames = [f for f in bus.read(p, "ticks", "0-0", 10_000) if f.kind in TICK_FRAMES]
        assert b"".join(f.body for f in frames) == rows.tobytes()
    bus.close()


# -- faults ------------------------------------------------------------------------------------


def test_what_is_no_tape(tmp_path: Path) -> None:
    tape = random_tape(1, 20)
    assert "cannot read" in refused(tmp_path / "absent.ndjson")
    assert "0 bytes" in refused(write(tmp_path / "empty.ndjson", []))
    assert "no record" in refused(write(tmp_path / "empty.ndjson.zst", []))
    assert "no record in its first 2 lines" in refused(write(tmp_path / "text.ndjson", [b"a,b", b"1,2"]))
    path = write(tmp_path / "a.ndjson", tape)
    assert "twice" in refused(path, path)
    assert "no file" in refused()


@pytest.mark.parametrize("suffix", [".ndjson.zst", ".ndjson.gz"])
def test_a_cut_off_file_gives_what_is_there(tmp_path: Path, suffix: str) -> None:
    tape = [trade("binance", "BTCUSDT", at, at + 1) for at in range(20_000)]
    whole = write(tmp_path / f"whole{suffix}", tape)
    path = tmp_path / f"cut{suffix}"
    packed = whole.read_bytes()
    path.write_bytes(packed[: len(packed) * 3 // 4])
    out = Tapes()
    with pytest.raises(SourceError, match="cut off"):
        play(path, out=out)
    got = out.trades()["sequence"].tolist()
    assert 1000 < len(got) < 20_000
    assert got == list(range(1, len(got) + 1))
    assert not any(c.final for c in out.messages(Clock))
    assert "flush" in out.log
    path.write_bytes(packed[: len(packed) // 2] + b"garbage" * 20_000)
    assert any(word in refused(path) for word in ("broken", "cut off"))  # deflate may take garbage for data


def test_the_last_line_needs_no_line_feed_and_others_may_be_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", [trade("binance", "BTCUSDT", at, at + 1) for at in range(3)])
    path.write_bytes(b"\n\n" + path.read_bytes().replace(b"\n", b"\r\n\r\n").rstrip())
    assert play(path).trades()["sequence"].tolist() == [1, 2, 3]
    path.write_bytes(path.read_bytes()[:-4])
    out = play(path)
    assert out.trades()["sequence"].tolist() == [1, 2]
    assert out.counts == {"garbage": 1}


def test_the_tape_has_a_name_of_its_own(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{n}.ndjson", random_tape(n, 20)) for n in (1, 2))
    assert TardisFiles([one, two], 4).tape == TardisFiles([two, one], 4).tape
    others = {TardisFiles([one, two], 4).tape, TardisFiles([one], 4).tape, TardisFiles([one], 4, grace_ns=1).tape}
    assert len(others) == 3


# -- the service -------------------------------------------------------------------------------


def test_the_service_plays_files_onto_the_bus(bus: Bus, tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson.zst", random_tape(5, 300))
    chosen = Settings(tapeline=Tapeline(partitions=4, namespace=bus.keys.namespace), redis=RedisSettings(url=bus.url))
    run_tardis_files(chosen, threading.Event(), ("--speed", "max", str(path)))
    for p, rows in play(path).joined().items():
        frames = [f for f in bus.read(p, "ticks", "0-0", 10_000) if f.kind in TICK_FRAMES]
        assert b"".join(f.body for f in frames) == rows.tobytes()
        assert {f.source for f in frames} == {"tardis-files"}
    with pytest.raises(ConfigError, match="NDJSON"):
        run_tardis_files(chosen, threading.Event(), ())


# -- recorded data -----------------------------------------------------------------------------


def test_recorded_binance_futures(shared_data: Path) -> None:
    out, tape = recorded(shared_data / "tardis" / "binance-futures_2024-08-08.ndjson.zst")
    agree(out, tape, 8)
    rows = np.concatenate(list(out.joined().values()))
    heads = rows[rows["part"] == 0]
    assert {k: int((heads["kind"] == k).sum()) for k in (TRADE, BOOK, TICKER, LIQUIDATION)} == {
        TRADE: 35_389, BOOK: 6_662, TICKER: 1_060, LIQUIDATION: 34,
    }  # fmt: skip
    assert int((rows["kind"] == BOOK).sum()) == 5 * 6_662
    assert out.counts == {"trade_bar": 11}
    assert {m.ticker for m in out.messages(Instrument)} == {"binance-futures:BTCUSDT", "binance-futures:ETHUSDT"}


def test_recorded_deribit_options(shared_data: Path) -> None:
    out, tape = recorded(shared_data / "tardis" / "deribit_2024-06-01.ndjson.zst")
    agree(out, tape, 8)
    assert set(out.rows) == {partition_of("deribit:BTC", 8)}
    rows = out.joined()[partition_of("deribit:BTC", 8)]
    heads = rows[rows["part"] == 0]
    assert {k: int((heads["kind"] == k).sum()) for k in (TRADE, BOOK, TICKER, LIQUIDATION, OPTION)} == {
        TRADE: 4_955, BOOK: 996 + 2_454, TICKER: 1_009, LIQUIDATION: 94, OPTION: 1_445,
    }  # fmt: skip
    options = {m.symbol: m for m in out.messages(Instrument) if m.kind in "CP"}
    assert {s: (m.kind, m.strike, m.expiration_ns) for s, m in options.items()} == {
        "BTC-28JUN24-70000-C": ("C", 70_000, 1_719_561_600 * NS),
        "BTC-28JUN24-60000-P": ("P", 60_000, 1_719_561_600 * NS),
        "BTC-7JUN24-68000-C": ("C", 68_000, 1_717_747_200 * NS),
    }
    assert {m.root for m in out.messages(Instrument)} == {"deribit:BTC"}
    (told,), (gap,) = out.messages(Disconnect), out.messages(Gap)
    assert (told.symbols, told.since_ns) == ((), gap.start_ns)


def test_recorded_stream_with_disconnect_and_error(shared_data: Path) -> None:
    out, tape = recorded(shared_data / "tardis" / "stream_with_disconnect_and_error.ndjson.zst")
    agree(out, tape, 8)
    assert out.counts == {"book_change": 121, "trade_bar": 13, "disconnect": 2, "error": 1}
    assert [(m.feed, *m.symbols) for m in out.messages(Disconnect)] == [
        ("p:bitmex", "XBTUSD"), ("p:deribit", "BTC-PERPETUAL"), ("p:deribit", "BTC-28JUN24-70000-C"),
    ]  # fmt: skip
    assert len(out.messages(Gap)) == 3


def test_zstd_frames_are_one_tape(tmp_path: Path) -> None:
    tape = [trade("binance", "BTCUSDT", at, at + 1) for at in range(100)]
    path = write(tmp_path / "a.ndjson.zst", tape)
    assert zstandard.frame_content_size(path.read_bytes()) < sum(len(str(m)) for m in tape)  # several frames
    assert len(play(path).trades()) == 100
