"""Candles from elsewhere: what is read, rejected and mended, and what the store keeps."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import databento_dbn as dbn
import numpy as np
import polars
import pytest
import zstandard
from click.testing import CliRunner

from shared.batches import Item, Source, batch_of
from shared.cli import cli, fail
from shared.errors import SourceError
from shared.frames import NS, Rows, iso
from shared.import_files import Given
from shared.importing import Plan, Summary, run
from shared.settings import Settings, Sink, Tapeline
from shared.sink import store_of
from shared.stores import read_rows
from tests.fakes.gateway import KEY
from tests.fakes.history import History
from tests.fakes.tape import START, generate
from tests.services.ingest.dbn import header, write
from tests.services.sink_sqlite.tape import T0, bars, fixed

HEAD = "time,open,high,low,close,volume\n"
GIVEN = Given("glbx", "ESH4", 60)
# Of the tables' columns: what is told of a candle's own, and what an import knows nothing of.
OWN = ("exchange", "symbol", "timeframe", "timestamp_in", "open", "high", "low", "close", "volume", "trades")
FLOW = ("vwap", "ask_volume", "bid_volume", "unknown_volume", "vd", "cvd_open", "cvd_close", "quoted_spread")


@pytest.fixture
def settings(store_url: str) -> Settings:
    return Settings(tapeline=Tapeline(store=store_url), sink=Sink(batch_rows=7))


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request: pytest.FixtureRequest) -> Settings:
    """A store of each kind."""
    url = request.getfixturevalue("store_url" if request.param == "sqlite" else "pg_url")
    return Settings(tapeline=Tapeline(store=url), sink=Sink(batch_rows=7))


def file(folder: Path, text: str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def minutes(*prices: str, start: int = 0, head: str = HEAD) -> str:
    """A CSV of candles from T0 on, each `open,high,low,close,volume`."""
    return head + "".join(f"{T0 // NS + 60 * i},{price}\n" for i, price in enumerate(prices, start))


def load(settings: Settings, *paths: Path, given: Given = GIVEN, **more: Any) -> Summary:
    summary = run(Plan(paths, given, **more), settings, lambda _: None)
    done = sum((summary.stored, summary.replaced, summary.kept, summary.unchanged, summary.duplicates, summary.refused))
    assert summary.read == done + summary.rejected.total()
    return summary


def stored(settings: Settings, *columns: str) -> list[tuple[Any, ...]]:
    rows = read_rows(settings.tapeline.store, "candles")
    return [tuple(row[name] for name in columns or OWN) for row in rows]


def keep(settings: Settings, made: Rows, names: Sequence[tuple[str, str]] = (("glbx", "ESH4"),)) -> None:
    """What the pipeline made."""
    made["name"] = 0
    frame = bars(made)
    frame.names = list(names)
    store = store_of(settings, threading.Event())
    store.open()
    assert store.write(batch_of([Item(Source("a", "candles", 0, 1, "1-0"), frame)])) == 0
    store.close()


def made(count: int = 1, **values: Any) -> Rows:
    rows = fixed(2 * count)[::2].copy()
    for name, value in values.items():
        rows[name] = value
    return rows


# -- what becomes of a row -----------------------------------------------------------------------


def test_a_candle_has_prices_and_volume_and_nothing_of_the_flow(either: Settings, tmp_path: Path) -> None:
    path = file(tmp_path, minutes("1.5,2,1,1.75,10", "1,3,-1,2,0"))
    summary = load(either, path)
    assert (summary.read, summary.stored) == (2, 2)
    assert stored(either) == [
        ("glbx", "ESH4", "1m", "2023-12-25T23:01:00Z", 1.5, 2, 1, 1.75, 10, 0),
        ("glbx", "ESH4", "1m", "2023-12-25T23:02:00Z", 1, 3, -1, 2, 0, 0),
    ]
    assert stored(either, *FLOW) == [(None,) * len(FLOW)] * 2
    (row, _) = read_rows(either.tapeline.store, "candles")
    assert (row["complete"], row["revision"], row["sma_5"], row["bid_price"]) == (1, 0, None, None)
    out_ns = int(np.datetime64(row["timestamp_out"].rstrip("Z"), "ns").astype(np.int64))
    assert row["latency_ms"] == pytest.approx((out_ns - T0 - 60 * NS) / 1e6, abs=0.01)
    assert not read_rows(either.tapeline.store, "dead_letters")
    assert {r["contract_id"] for r in read_rows(either.tapeline.store, "ohlc_bars")} == {"glbx:ESH4"}


def test_again_changes_nothing(either: Settings, tmp_path: Path) -> None:
    text = minutes(*(f"{i},{i + 2},{i - 2},{i + 1},{i}" for i in range(40)))
    path = file(tmp_path, text + text.removeprefix(HEAD))
    first = load(either, path)
    assert (first.stored, first.duplicates) == (40, 40)
    before = read_rows(either.tapeline.store, "candles")
    again = load(either, path)
    assert (again.unchanged, again.duplicates, again.stored, again.replaced) == (40, 40, 0, 0)
    assert read_rows(either.tapeline.store, "candles") == before


def test_rejects_and_repairs(settings: Settings, tmp_path: Path) -> None:
    now = int(np.datetime64("now", "s").astype(int)) // 60 * 60
    text = minutes(
        "1,2,0.5,1.5,10", ",2,0.5,1.5,10", "1,null,0.5,1.5,10", "1,2,NaN,1.5,10", "1,2,0.5,,10",
        "1,2,0.5,inf,10", "1,2,0.5,1.5,Infinity", "1,x,0.5,1.5,10", "1,2,0.5,1.5", "1,1.2,1.1,1.5,-3",
        "1.5,2,0.5,1,", "-37.63,-30,-40,-35,7", "1,0.1,9,2,1_000",
    )  # fmt: skip
    text += f",1,2,0.5,1.5,10\nyesterday,1,2,0.5,1.5,10\n{T0 // NS + 1},1,2,0.5,1.5,10\n"
    text += f"2023-12-25T23:30:00.000000001Z,1,2,0.5,1.5,10\n{now},1,2,0.5,1.5,10\n"
    rejects = tmp_path / "rejects.ndjson"
    with rejects.open("w") as told:
        summary = run(Plan([file(tmp_path, text)], GIVEN), settings, lambda _: None, told)
    assert summary.rejected == {
        "null open": 1, "null high": 1, "null low": 1, "null close": 1, "infinite close": 1, "infinite volume": 1,
        "high that is no number": 1, "another number of cells than the header": 1, "volume that is no number": 1,
        "null time": 1, "a time that is none": 1, "a time that is not aligned to the timeframe": 2,
        "an end in the future": 1,
    }  # fmt: skip
    assert summary.repaired == {
        "high raised to the higher of open and close": 1, "low lowered to the lower of open and close": 1,
        "negative volume set to 0": 1, "null volume set to 0": 1,
    }  # fmt: skip
    assert stored(settings, "open", "high", "low", "close", "volume") == [
        (1, 2, 0.5, 1.5, 10), (1, 1.5, 1, 1.5, 0), (1.5, 2, 0.5, 1, 0), (-37.63, -30, -40, -35, 7),
    ]  # fmt: skip
    assert len(summary.told) == 5
    assert summary.told[0] == f"{tmp_path / 'a.csv'}:3: null open"
    rows = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert len(rows) == 14
    found = next(r for r in rows if r["reason"] == "infinite close")
    assert (found["line"], found["row"]["close"], found["row"]["volume"]) == (7, "inf", "10")


def test_of_duplicates_the_later_counts_over_files_and_batches(settings: Settings, tmp_path: Path) -> None:
    many = [f"{i},{i + 1},{i - 1},{i},1" for i in range(30)]
    paths = [file(tmp_path, minutes(*many), "a.csv"), file(tmp_path, minutes("5,6,4,5,9", "7,8,6,7,9"), "b.csv")]
    summary = load(settings, *paths)
    assert (summary.stored, summary.duplicates) == (30, 2)
    assert [row[:2] for row in stored(settings, "open", "volume")][:3] == [(5, 9), (7, 9), (2, 1)]


def test_what_was_made_from_ticks_stays(either: Settings, tmp_path: Path) -> None:
    keep(either, made(2))
    before = read_rows(either.tapeline.store, "candles")
    path = file(tmp_path, minutes("1,2,0.5,1.5,10", "1,2,0.5,1.5,11", "1,2,0.5,1.5,12"))
    summary = load(either, path)
    assert (summary.kept, summary.stored) == (2, 1)
    assert read_rows(either.tapeline.store, "candles")[:2] == before
    replaced = load(either, path, replace=True)
    assert (replaced.replaced, replaced.unchanged) == (2, 1)
    after = read_rows(either.tapeline.store, "candles")
    changed = {"open", "high", "low", "close", "volume", "revision", "timestamp_out", "latency_ms"}
    for old, new, volume in zip(before, after, (10, 11), strict=False):
        assert {name for name in old if old[name] != new[name]} == changed
        assert (new["revision"], new["volume"]) == (1, volume)
    again = load(either, path, replace=True)
    assert (again.kept, again.unchanged, again.replaced) == (2, 1, 0)
    assert read_rows(either.tapeline.store, "candles") == after


def test_an_incomplete_row_is_replaced(settings: Settings, tmp_path: Path) -> None:
    keep(settings, made(1, complete=0, revision=3))
    path = file(tmp_path, minutes("1,2,0.5,1.5,10"))
    assert load(settings, path).replaced == 1
    assert stored(settings, "close", "complete", "revision", "ask_volume", "trades") == [(1.5, 1, 4, None, 0)]
    assert load(settings, path).unchanged == 1


def test_an_imported_row_is_replaced_by_another_import_and_by_ticks(settings: Settings, tmp_path: Path) -> None:
    counted = file(tmp_path, minutes("1,2,0.5,1.5,10,7", head=HEAD.replace("\n", ",trades\n")), "counted.csv")
    assert load(settings, counted).stored == 1
    other = file(tmp_path, minutes("1,2,0.5,1.75,10"), "other.csv")
    assert load(settings, other).replaced == 1
    assert stored(settings, "close", "trades", "revision") == [(1.75, 7, 1)], "what it does not say stays"
    keep(settings, made(1, revision=1))
    assert stored(settings, "revision", "ask_volume")[0][1] is not None
    assert load(settings, other).kept == 1


def test_dry_run_says_what_it_would_and_writes_nothing(settings: Settings, tmp_path: Path) -> None:
    path = file(tmp_path, minutes("1,2,0.5,1.5,10"))
    assert load(settings, path, dry_run=True).stored == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_rows_that_the_store_refuses_are_dead_letters(settings: Settings, tmp_path: Path) -> None:
    store = store_of(settings, threading.Event())
    store.open()
    store.connection().execute("CREATE TRIGGER no BEFORE INSERT ON candles WHEN new.open = 3 "  # type: ignore[attr-defined]
                               "BEGIN SELECT RAISE(ABORT, 'three is refused'); END")  # fmt: skip
    store.close()
    summary = load(settings, file(tmp_path, minutes(*(f"{i},9,0,1,1" for i in range(9)))))
    assert (summary.stored, summary.refused) == (8, 1)
    (letter,) = read_rows(settings.tapeline.store, "dead_letters")
    assert (letter["bus"], letter["table_name"], letter["row_number"]) == ("import", "candles", 3)
    assert "three is refused" in letter["reason"]


# -- names, times and lengths --------------------------------------------------------------------


def test_columns_by_many_names(settings: Settings, tmp_path: Path) -> None:
    """As exchanges, vendors and this program's own tables call them."""
    binance = "open_time,open,high,low,close,volume,close_time,quote_volume,count\n1703545260000,1,2,1,2,5,1,9,3\n"
    mine = "contract_id;Timestamp;O;H;L;C;V;timeframe\nglbx:NQH4;2023-12-25 23:00:00;1;2;1;2;5;1 hour\n"
    vendor = "\ufeffdate,<TICKER>,venue,interval,o,h,l,c\n20231225,CLG4,nymex,1day,1,2,1,2\n"
    native = (
        "ts_event,rtype,publisher_id,instrument_id,open,high,low,close,volume,symbol\n"
        "1703545260000000000,33,1,5,4800250000000,4801000000000,4800000000000,4800500000000,5,ESM4\n"
    )
    load(settings, file(tmp_path, binance), given=Given("binance", "BTCUSDT", 60))
    load(settings, file(tmp_path, mine), given=Given())
    summary = load(settings, file(tmp_path, vendor), given=Given())
    load(settings, file(tmp_path, native), given=Given("GLBX.MDP3"))
    assert sorted(stored(settings)) == [
        ("GLBX.MDP3", "ESM4", "1m", "2023-12-25T23:01:00Z", 4800.25, 4801, 4800, 4800.5, 5, 0),
        ("binance", "BTCUSDT", "1m", "2023-12-25T23:01:00Z", 1, 2, 1, 2, 5, 3),
        ("glbx", "NQH4", "1h", "2023-12-25T23:00:00Z", 1, 2, 1, 2, 5, 0),
        ("nymex", "CLG4", "1d", "2023-12-25T00:00:00Z", 1, 2, 1, 2, 0, 0),
    ]
    assert summary.repaired == {"null volume set to 0": 1}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1min", 60), ("5 minutes", 300), ("15s", 15), ("4H", 14400), ("1D", 86400), ("1w", 604800), ("1M", 0),
     ("60", 0), ("100ms", 0), ("2w", 0), ("0m", 0), ("tick", 0)],
)  # fmt: skip
def test_timeframes_as_others_write_them(settings: Settings, tmp_path: Path, text: str, seconds: int) -> None:
    """`1M` is a month to most, `60` minutes to some and seconds to others."""
    path = file(tmp_path, f"time,timeframe,open,high,low,close\n2023-12-25,{text},1,1,1,1\n")
    if not seconds:
        with pytest.raises(SourceError, match=r"none of 1 rows of .* is a candle: 1 have a timeframe that is none"):
            load(settings, path)
        return
    load(settings, path)
    (length,) = [r["timeframe"] for r in read_rows(settings.tapeline.store, "candles")]
    assert {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[length[-1]] * int(length[:-1]) == seconds


@pytest.mark.parametrize(
    "text",
    ["1703545260", "1703545260.0", "1703545260000", "1703545260000000", "1703545260000000000", "2023-12-25T23:01:00Z",
     "2023-12-25 23:01", "2023-12-25T23:01:00.000000000Z", "2023-12-26T04:31:00+05:30", "2023-12-25 23:01:00 UTC"],
)  # fmt: skip
def test_times_as_others_write_them(settings: Settings, tmp_path: Path, text: str) -> None:
    load(settings, file(tmp_path, f"{HEAD}{text},1,1,1,1,1\n"))
    assert stored(settings, "timestamp_in") == [("2023-12-25T23:01:00Z",)]


def test_weeks_begin_on_mondays(settings: Settings, tmp_path: Path) -> None:
    summary = load(settings, file(tmp_path, f"{HEAD}2023-12-25,1,1,1,1,1\n2023-12-28,1,1,1,1,1\n"),
                   given=Given("x", "y", 604_800))  # fmt: skip
    assert (summary.stored, summary.rejected.total()) == (1, 1)
    assert stored(settings, "timeframe", "timestamp_in") == [("1w", "2023-12-25T00:00:00Z")]


def test_mapped_columns(settings: Settings, tmp_path: Path) -> None:
    path = file(tmp_path, "When,First,open,high,low,close,volume\n2023-12-25,1.25,9,2,1,2,5\n")
    load(settings, path, given=Given("x", "y", 86400, {"when": "time", "first": "open"}))
    assert stored(settings, "open", "high") == [(1.25, 2)]
    with pytest.raises(SourceError, match=r"has no column where \(--map\)"):
        load(settings, path, given=Given("x", "y", 86400, {"where": "time"}))


def test_one_name_for_several_symbols_is_refused(settings: Settings, tmp_path: Path) -> None:
    path = file(tmp_path, f"symbol,{HEAD}A,2023-12-25,1,1,1,1,1\nB,2023-12-25,1,1,1,1,1\n")
    with pytest.raises(SourceError, match=r"of several symbols \(A, B\): --symbol would make them one"):
        load(settings, path)
    assert load(settings, path, given=Given("x", "", 86400)).stored == 2


# -- kinds of files ------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(settings: Settings, tmp_path: Path) -> None:
    text = minutes(*(f"{i},{i + 2},{i - 2},{i + 1},{i}" for i in range(20)))
    rows = [line.split(",") for line in text.splitlines()[1:]]
    objects = [dict(zip(HEAD.strip().split(","), [int(t), *map(float, v)], strict=True)) for t, *v in rows]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text[:300].encode()) + gzip.compress(text[300:].encode()))
    (tmp_path / "a.csv.zst").write_bytes(
        zstandard.compress(text[:300].encode()) + zstandard.compress(text[300:].encode())
    )
    lines = "".join(json.dumps(o) + "\n" for o in objects)
    (tmp_path / "a.ndjson.zst").write_bytes(zstandard.compress(lines.encode()))
    frame = polars.DataFrame(objects)
    frame.write_parquet(tmp_path / "ints.parquet")
    at = polars.from_epoch("time", "s")
    frame.with_columns(at.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")).write_parquet(
        tmp_path / "zoned.parquet"
    )
    frame.with_columns(at.dt.cast_time_unit("ns"), polars.col("open").cast(polars.Decimal(12, 4))).write_parquet(
        tmp_path / "ns.parquet"
    )
    load(settings, file(tmp_path, text))
    want = stored(settings)
    assert len(want) == 20
    for path in sorted(tmp_path.glob("*.*")):
        if path.suffix in (".gz", ".zst", ".parquet"):
            summary = load(settings, path)
            assert (summary.unchanged, summary.read) == (20, 20), path
    (tmp_path / "odd.ndjson").write_text(lines.replace('"open": 3.0', '"open": true') + '{"a": 1}\n[1]\n{"time"\n')
    odd = load(settings, tmp_path / "odd.ndjson")
    assert odd.rejected == {"open that is no number": 1, "null time": 1, "a line that is no JSON object": 2}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "is empty (0 bytes)"),
        ("a.csv", HEAD.encode(), "has a header, but no rows"),
        ("a.csv", b"\x00\xff\xfe garbage" * 50, "is no UTF-8 text"),
        ("a.csv", b"1703545260,1,2,3,4,5\n", "has no column for time, open, high, low, close"),
        ("a.csv", b"time,open,high,low\n1,2,3,4\n", "has no column for close"),
        ("a.csv", (HEAD + '1703545260,"1,2,3\n').encode(), "is no CSV file"),
        ("a.csv.gz", gzip.compress(minutes(*["1,2,1,2,3"] * 999).encode())[:-20], "is cut off"),
        ("a.csv.gz", b"no gzip at all", "is damaged"),
        ("a.csv.zst", zstandard.compress(np.random.default_rng(1).bytes(9000))[:-20], "UTF-8|is cut off"),
        ("a.csv.zst", zstandard.compress(minutes("1,2,1,2,3").encode())[:-3], "is cut off"),
        ("a.csv.zst", b"no zstd at all", "is damaged"),
        ("a.ndjson", b"hello\n", "is no NDJSON: its first line is no JSON object"),
        ("a.ndjson", b"\xff\xfe\n", "is no UTF-8 text"),
        ("a.parquet", b"PAR1 not really", "is no Parquet file"),
        ("a.dbn", b"nothing of that kind", "is not a DBN file; accepted are .* of ohlcv-1s, ohlcv-1m"),
        ("a.xlsx", b"PK", "is no file of candles by its name"),
        ("a.csv", (HEAD + "x,1,2,1,2,3\n" * 3).encode(), "none of 3 rows of .* is a candle: 3 have a time"),
    ],
)  # fmt: skip
def test_garbage_is_one_line_and_changes_nothing(
    settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    """Whatever stands before it in the input."""
    good, bad = file(tmp_path, minutes("1,2,1,2,3"), "good.csv"), tmp_path / name
    bad.write_bytes(content)
    with pytest.raises(SourceError, match=says.replace("(0 bytes)", r"\(0 bytes\)")) as raised:
        load(settings, *([] if "none of" in says else [good]), bad)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store.db").exists()


def test_places_that_are_no_files(settings: Settings, tmp_path: Path) -> None:
    for path, says in ((tmp_path, "is a directory: give the files in it"), (tmp_path / "x.csv", "does not exist")):
        with pytest.raises(SourceError, match=says):
            load(settings, path)
    for given, says in ((Given("x", "y"), "give --timeframe"), (Given("x", "", 60), "give --symbol"),
                        (Given("", "y", 60), "give --exchange")):  # fmt: skip
        with pytest.raises(SourceError, match=says):
            load(settings, file(tmp_path, minutes("1,2,1,2,3")), given=given)


def ohlcv(*rows: tuple[int, int, float]) -> bytes:
    """Records of (minute from T0, native id, close)."""
    return b"".join(
        bytes(
            dbn.OHLCVMsg(33, 1, native, T0 + minute * 60 * NS, int(1.5e9), int(9e9), int(0.5e9), round(close * 1e9), 7)
        )
        for minute, native, close in rows
    )


def test_dbn_names_are_those_of_live_candles(settings: Settings, tmp_path: Path) -> None:
    first = T0 // 86_400 // NS * 86_400 * NS
    day = (first, first + 86_400 * NS)
    before = (first - 86_400 * NS, first)
    rows = [("ESH4", 1, *day), ("NQH4", 2, *before), ("ESH4-ESM4", 3, *day), ("NQM4", 2, *day)]
    head = header(*day, rows, "ohlcv-1m")
    path = write(tmp_path / "a.dbn.zst", head, ohlcv((0, 1, 2.0), (0, 2, 0.1), (1, 3, 1.0), (2, 9, 1.0)), frames=3)
    summary = load(settings, path, given=Given())
    assert stored(settings, "exchange", "symbol", "timeframe", "timestamp_in", "close", "volume") == [
        ("GLBX.MDP3", "ESH4", "1m", "2023-12-25T23:01:00Z", 2.0, 7),
        ("GLBX.MDP3", "NQM4", "1m", "2023-12-25T23:01:00Z", 0.1, 7),
    ]
    assert summary.rejected == {
        "a spread or user-defined instrument, which has no candles": 1,
        "an instrument id that the file does not name": 1,
    }
    rolled = [("ES.v.0", 1, *day), ("ES.c.1", 2, *day)]
    front = header(*day, rolled, "ohlcv-1m", stype_in=dbn.SType.CONTINUOUS)
    load(settings, write(tmp_path / "b.dbn", front, ohlcv((0, 1, 2.0), (0, 2, 3.0))), given=Given())
    assert [row[0] for row in stored(settings, "symbol")] == ["ES", "ES.c.1", "ESH4", "NQM4"]
    with pytest.raises(SourceError, match="--timeframe says another length"):
        load(settings, path, given=Given("", "", 3600))
    with pytest.raises(SourceError, match="--symbol would make them one"):
        load(settings, path, given=Given("", "X"))
    torn = write(tmp_path / "c.dbn", head, ohlcv((0, 1, 2.0), (1, 1, 2.0))[:-9])
    with pytest.raises(SourceError, match="is cut off"):
        load(settings, torn, given=Given())
    with pytest.raises(SourceError, match="a header, but no records"):
        load(settings, write(tmp_path / "d.dbn", head), given=Given())
    with pytest.raises(SourceError, match="holds schema tbbo; accepted are ohlcv-1s"):
        load(settings, write(tmp_path / "e.dbn", header(*day, rows)), given=Given())


# -- the command ---------------------------------------------------------------------------------


def command(*args: str) -> tuple[int, str, str]:
    """(exit code, what it printed, the error's line)."""
    done = CliRunner().invoke(cli, ["import", *args], standalone_mode=False)
    if done.exception is None:
        return int(done.return_value or 0), done.stdout, done.stderr
    import click

    error = done.exception
    said = CliRunner().invoke(click.command()(lambda: click.get_current_context().exit(fail(error))))
    return said.exit_code, done.stdout, said.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_url: str) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAPELINE_STORE", store_url)
    monkeypatch.setenv("TAPELINE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path


def test_the_summary_for_people_and_for_programs(folder: Path, store_url: str) -> None:
    file(folder, minutes("1,2,1,2,3", "1,1.5,1,2,3", ",2,1,2,3"))
    names = ("--exchange", "glbx", "--symbol", "ESH4", "--timeframe", "1m")
    code, out, _ = command("a.csv", *names, "--rejects", "no.ndjson")
    assert code == 0
    assert out.splitlines() == [
        "rejected a.csv:4: null open",
        "repaired: high raised to the higher of open and close (1)",
        "rejected: null open (1)",
        "all rejected rows are in no.ndjson",
        "3 rows read: 2 stored, 0 replaced, 0 kept (made from ticks), 0 there already, 0 duplicates, 1 rejected",
        f"stored in {store_url}",
    ]
    assert json.loads((folder / "no.ndjson").read_text())["line"] == 4
    found = json.loads(command("a.csv", *names, "--json", "--dry-run")[1])
    assert (found["unchanged"], found["dry_run"], found["rejected"]) == (2, True, {"null open": 1})


def test_wrong_usage(folder: Path) -> None:
    file(folder, minutes("1,2,1,2,3"))
    for args, code, says in (
        ((), 2, "give FILEs, or --from-databento"),
        (("a.csv", "--from-databento", "ohlcv-1m"), 2, "give FILEs, or --from-databento"),
        (("a.csv", "--start", "2023-01-01"), 2, "go with --from-databento"),
        (("a.csv", "--timeframe", "1M"), 2, "no timeframe such as 1m"),
        (("a.csv", "--map", "x=price"), 2, "ours are: time, open"),
        (("--from-databento", "ohlcv-1m"), 2, "wants --symbols, --start and --end"),
        (("--from-databento", "ohlcv-1m", "--symbols", "A", "--start", "2023", "--end", "x"), 2, "is no time such as"),
        (("--from-databento", "ohlcv-1m", "--symbols", "ES.FUT,ESH4", "--start", "2023-01-01", "--end", "2023-01-02"),
         2, "one at a time"),
        (("--from-databento", "ohlcv-1m", "--dry-run"), 2, "cannot look at what is not bought yet"),
        (("a.csv",), 1, "give --symbol"),
        (("b.csv",), 1, "b.csv does not exist"),
        (("a.csv", "--rejects", "no/folder/x"), 1, "cannot write no/folder/x"),
        (("a.csv", "--store", "oracle://h/db"), 78, "is not a store URL"),
    ):  # fmt: skip
        got, _, line = command(*args)
        assert (got, says in line, line.count("\n")) == (code, True, 1), (args, line)


def test_bought_at_databento_and_imported(folder: Path, monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    """The price first, as for tapes; what was bought is imported under the names of live candles, and bought once."""
    tape = generate(seconds=150, per_second=20)
    with History(tape, cost=0.5) as history:
        for name, value in {"DATABENTO_API_KEY": KEY, "TAPELINE_DATABENTO_HISTORY_GATEWAY": history.url,
                            "NO_PROXY": "127.0.0.1"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        args = (
            "--from-databento",
            "ohlcv-1m",
            "--symbols",
            "ES.FUT",
            "--start",
            iso(START)[:19] + "Z",
            "--end",
            "2023-12-26",
        )
        code, out, err = command(*args)
        assert code == 0, err
        lines = out.splitlines()
        assert lines[0].startswith(
            "GLBX.MDP3 ohlcv-1m of ES.FUT, 2023-12-25T23:00:00Z to 2023-12-26T00:00:00Z: $0.5000"
        )
        assert "buying it for $0.5000" in lines[1]
        assert lines[-2].startswith("12 rows read: 6 stored")
        history.cost = 99.0
        more = (*args[:3], "NQ.FUT", *args[4:])
        code, _, err = command(*more)
        assert (code, "more than the $19.50 that is left of today's budget" in err) == (1, True)
        assert command(*more, "--yes")[0] == 0
        assert len(history.of("timeseries.get_range")) == 2
        assert "6 there already" in command(*args)[1]
        assert len(history.of("metadata.get_cost")) == 3
        assert not history.complaints
    rows = read_rows(store_url, "candles", {"symbol": "ESH4"})
    mine = tape.records[tape.records["instrument_id"] == 17077]
    mine = mine[np.argsort(mine["ts_recv"], kind="stable")]
    for i, row in enumerate(rows):
        inside = mine[mine["ts_event"] // (60 * NS) == START // (60 * NS) + i]
        assert (row["exchange"], row["timeframe"], row["open"], row["close"], row["high"], row["volume"]) == (
            "GLBX.MDP3", "1m", inside["price"][0] / 1e9, inside["price"][-1] / 1e9, inside["price"].max() / 1e9,
            inside["size"].sum(),
        )  # fmt: skip
    assert len(rows) == 3
    assert {r["symbol"] for r in read_rows(store_url, "candles")} == {"ESH4", "ESM4", "NQH4"}
