"""CSV files of the vendor: the rows of the same normalized messages, in one order whatever the blocks."""

from __future__ import annotations

import gzip
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard

from services.ingest import tardis_csv
from services.ingest.publisher import PublisherOutput
from services.ingest.source import Grouped, Resume
from services.ingest.tardis_csv import TardisCsv
from services.ingest.tardis_decode import Decoder
from services.ingest.tardis_route import Router
from shared.bus import Bus, sound
from shared.errors import ConfigError, SourceError
from shared.frames import BOOK, CLOCK, LIQUIDATION, OPTION, TICK, TICK_FRAMES, TICKER, TRADE, Rows, iso
from shared.messages import Clock, Disconnect, Gap, Instrument
from shared.settings import Ingest, Settings, Tapeline
from tests.services.ingest.collect import Collect
from tests.services.ingest.csvs import BEGIN_US, HEADS, market, text, type_of, write

ONE = Settings(tapeline=Tapeline(partitions=1))


class Told(Collect):
    """Keeps the ordinals too."""

    def __init__(self) -> None:
        super().__init__()
        self.ordinals: list[Any] = []

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        self.ordinals.append(grouped.ordinals.copy())
        for g, p in enumerate(grouped.partitions):
            self.put(p, grouped.rows[grouped.starts[g] : grouped.starts[g + 1]].copy(), cursor)

    def rows(self) -> Rows:
        """Of the one partition, without clocks."""
        rows = self.store.all_rows(0)
        return rows[rows["kind"] != CLOCK]


def played(paths: list[Path], settings: Settings = ONE) -> Told:
    out = Told()
    TardisCsv(paths, settings).run(out, Resume(), threading.Event())
    return out


def decoded(messages: list[dict[str, Any]]) -> Told:
    """The same through the decoder of normalized JSON."""
    out = Told()
    router = Router("tardis-csv", 1, ONE.tardis.grace_ms * 1_000_000)
    router.take(Decoder(router.symbol)([msgspec.json.encode(m) for m in messages], 0), out, b"")
    router.finish(out)
    return out


def assert_same(found: Rows, wanted: Rows) -> None:
    assert len(found) == len(wanted)
    for name in TICK.names or ():
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.fixture(scope="module")
def messages() -> list[dict[str, Any]]:
    return market(3000)


@pytest.fixture(scope="module")
def files(messages: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write(tmp_path_factory.mktemp("csv"), messages)


def test_rows_instruments_and_clocks_are_those_of_the_messages(
    messages: list[dict[str, Any]], files: list[Path]
) -> None:
    found, wanted = played(files), decoded(messages)
    assert_same(found.store.all_rows(0), wanted.store.all_rows(0))
    assert {TRADE, BOOK, TICKER, LIQUIDATION, OPTION, CLOCK} >= set(found.rows()["kind"].tolist())
    assert set(found.rows()["kind"].tolist()) == {TRADE, BOOK, TICKER, LIQUIDATION, OPTION}
    newest = {i.id: i for i in found.store.of(Instrument)}
    assert newest == {i.id: i for i in wanted.store.of(Instrument)}
    assert {i.symbol for i in newest.values()} >= {"BTC-PERPETUAL", "BTCUSDT", "BTC-28JUN24-70000-C"}
    assert found.store.states[-1] == ("ended", f"{len(messages)} records")


def test_recorded_market(shared_data: Path, tmp_path: Path) -> None:
    """Real trades and books: each kind's rows, in their order, are those of the recorded messages."""
    for name in ("binance-futures_2024-08-08", "deribit_2024-06-01"):
        whole = b"".join(tardis_csv.blocks(shared_data / "tardis" / f"{name}.ndjson.zst", 1 << 20))
        told = [m for m in map(msgspec.json.decode, whole.splitlines()) if m["type"] != "disconnect" and type_of(m)]
        (tmp_path / name).mkdir()
        found, wanted = played(write(tmp_path / name, told)).rows(), decoded(told).rows()
        # Of one time of receipt a file has its own order; between files it is the files' order.
        for kind in (TRADE, BOOK, TICKER, LIQUIDATION, OPTION):
            for quote in (False, True):
                assert_same(*(_of_kind(rows, kind, quote) for rows in (found, wanted)))


def _of_kind(rows: Rows, kind: int, quote: bool) -> Rows:
    """By symbol."""
    records = np.cumsum(rows["part"] == 0) - 1
    quotes = (rows[rows["part"] == 0]["size"] == 1)[records] & (rows["kind"] == BOOK)
    rows = rows[(rows["kind"] == kind) & (quotes == quote)]
    return rows[np.argsort(rows["instrument"], kind="stable")]


@pytest.mark.parametrize("size", [300, 5000, 100_000])
def test_blocks_change_nothing(files: list[Path], monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = played(files)
    monkeypatch.setattr(tardis_csv, "BLOCK_BYTES", size)
    monkeypatch.setattr(tardis_csv, "READ_BYTES", max(64, size // 3))
    monkeypatch.setattr(tardis_csv, "PUSH_ROWS", 100)
    cut = played(list(reversed(files)))
    assert_same(cut.store.all_rows(0), whole.store.all_rows(0))
    np.testing.assert_array_equal(np.concatenate(cut.ordinals), np.concatenate(whole.ordinals))
    assert TardisCsv(reversed(files), ONE).tape == TardisCsv(files, ONE).tape
    assert TardisCsv(files[:-1], ONE).tape != TardisCsv(files, ONE).tape


def trade(n: int, receipt_us: int, exchange: str = "bitmex", symbol: str = "XBTUSD") -> str:
    return f"{exchange},{symbol},{receipt_us},{receipt_us},{n},buy,100,{n}"


def trades_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join((f"exchange,symbol,timestamp,local_timestamp,{HEADS['trades']}", *lines, "")))
    return path


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_ties_follow_the_files_then_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Many records of one time, over block edges; a file out of order keeps its own order."""
    monkeypatch.setattr(tardis_csv, "BLOCK_BYTES", size)
    a = trades_file(tmp_path / "a.csv", *(trade(n, BEGIN_US + n // 20) for n in range(1, 100)))
    b = trades_file(tmp_path / "b.csv", *(trade(1000 + n, BEGIN_US + n // 20) for n in range(1, 100)))
    c = trades_file(tmp_path / "c.csv", trade(5001, BEGIN_US + 3), trade(5002, BEGIN_US + 1), trade(5003, BEGIN_US + 4))
    wanted = sorted(
        [(n // 20, 0, n, n) for n in range(1, 100)]
        + [(n // 20, 1, n, 1000 + n) for n in range(1, 100)]
        + [(3, 2, 0, 5001), (3, 2, 1, 5002), (4, 2, 2, 5003)]
    )
    assert played([c, b, a]).rows()["sequence"].tolist() == [n for *_, n in wanted]


def test_every_packing_reads_alike(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    plain = text("trades", [m for m in messages if m["type"] == "trade"])
    half = plain.index(b"\n", len(plain) // 2) + 1
    zstd = zstandard.ZstdCompressor()
    contents = {
        "a.csv": plain,
        "b.csv.gz": gzip.compress(plain),
        "c.csv.zst": zstd.compress(plain),
        "d.csv.zst": zstd.compress(plain[:half]) + zstd.compress(plain[half:]),
        "e.csv.gz": gzip.compress(plain[:half]) + gzip.compress(plain[half:]),
        "f.csv": plain.rstrip(b"\n"),
        "g.csv": plain.replace(b"\n", b"\r\n"),
    }
    rows = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        rows.append(played([tmp_path / name]).rows())
    for other in rows[1:]:
        assert_same(other, rows[0])


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_truncated_is_one_line_after_what_lies_before(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = text("trades", [m for m in market(20_000, step_us=1000) if m["type"] == "trade"])
    whole = gzip.compress(lines) if packing == "gz" else zstandard.ZstdCompressor().compress(lines)
    short = tmp_path / f"short.csv.{packing}"
    short.write_bytes(whole[: len(whole) * 9 // 10])
    out = Told()
    monkeypatch.setattr(tardis_csv, "BLOCK_BYTES", 50_000)
    with pytest.raises(SourceError, match=r"short\.csv.* is truncated: fetch the file again"):
        TardisCsv([short], ONE).run(out, Resume(), threading.Event())
    assert len(out.rows()) > 1000


def test_damaged_bytes_are_one_line(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(text("trades", [m for m in market(20_000) if m["type"] == "trade"])))
    whole[len(whole) // 2 : len(whole) // 2 + 50] = b"\xff" * 50
    (tmp_path / "odd.csv.gz").write_bytes(whole)
    with pytest.raises(SourceError, match=r"odd\.csv\.gz is damaged .*fetch the file again"):
        played([tmp_path / "odd.csv.gz"])


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    good = [trade(n, BEGIN_US + n) for n in range(1, 6)]
    bad = [
        "", "bitmex", "bitmex,XBTUSD,x,1717200000000000,1,buy,1,1", "bitmex,XBTUSD,1,,1,buy,1,1",
        f"bitmex,,{BEGIN_US},{BEGIN_US},1,buy,1,1", f"bitmex,XBTUSD,{BEGIN_US},{BEGIN_US},1,buy,,1",
        f"bitmex,XBTUSD,{BEGIN_US},{BEGIN_US},1,buy,nan,1", f"bitmex,XBTUSD,{BEGIN_US},{BEGIN_US},1,buy,1,dear",
        f"bitmex,XBTUSD,{10**19},{BEGIN_US},1,buy,1,1", '"bitmex,"XBTUSD,1,2,3', "\x00\x00\x00", "ÿ,ÿ,ÿ,ÿ,ÿ,ÿ,ÿ,ÿ,ÿ,ÿ",
    ]  # fmt: skip
    lines = [line for pair in zip(good * 3, bad, strict=False) for line in pair]
    out = played([trades_file(tmp_path / "t.csv", *lines)])
    assert out.store.counts["garbage"] == len(bad)
    assert len(out.rows()) == len(good)  # the repeated ones are duplicates
    assert out.store.counts["duplicate"] == len(bad) - len(good)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"time,price\n1,2\n", "is no Tardis CSV file by its first line"),
        (b"\xff\xfe\x00garbage", "is no Tardis CSV file by its first line"),
        (b"exchange,symbol,timestamp,local_timestamp,is_snapshot,side,price,amount\n", "holds incremental_book_L2"),
        (b"exchange,symbol,timestamp,id,side,price,amount\n", "lacks local_timestamp"),
        (b"exchange,symbol,timestamp,local_timestamp,asks[0].price,bids[0].price\n", r"lacks asks\[0\].amount"),
        (b"", "nothing to play"),
        (b"\x00" * (17 << 20), "has a line of over 16 MiB: it is no CSV file"),
    ],
)
def test_what_cannot_be_played_is_refused_at_once(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "odd.csv").write_bytes(content)
    with pytest.raises(SourceError, match=said) as error:
        TardisCsv([tmp_path / "odd.csv"], ONE)
    assert "odd.csv" in str(error.value)


def test_given_twice_is_refused(files: list[Path]) -> None:
    with pytest.raises(SourceError, match="is given twice"):
        TardisCsv([files[0], files[0].parent / "." / files[0].name], ONE)


def test_an_empty_day_plays_beside_others(files: list[Path], tmp_path: Path) -> None:
    """The vendor sends an empty archive where it has no data."""
    (tmp_path / "deribit_trades_2024-06-02_ETH.csv.gz").write_bytes(gzip.compress(b""))
    assert_same(played([*files, tmp_path / "deribit_trades_2024-06-02_ETH.csv.gz"]).rows(), played(files).rows())


def test_liquidations_are_known_by_their_name(tmp_path: Path) -> None:
    folder = tmp_path / "liquidations"
    folder.mkdir()
    named = trades_file(tmp_path / "bitmex_liquidations_2024-06-01_XBTUSD.csv", trade(1, BEGIN_US))
    below = trades_file(folder / "XBTUSD.csv", trade(1, BEGIN_US))
    other = trades_file(tmp_path / "XBTUSD.csv", trade(1, BEGIN_US))
    assert [played([path]).rows()["kind"][0] for path in (named, below, other)] == [LIQUIDATION, LIQUIDATION, TRADE]


def test_days_named_by_the_vendor_are_watched_whole_and_days_between_them_are_gaps(tmp_path: Path) -> None:
    day = 86_400_000_000
    paths = [
        trades_file(tmp_path / f"bitmex_trades_2024-06-0{n}_XBTUSD.csv", trade(n, BEGIN_US + (n - 1) * day + 5_000_000))
        for n in (1, 2, 5)
    ]
    store = played(paths).store
    (gap,) = store.of(Gap)
    assert (iso(gap.start_ns)[:19], iso(gap.end_ns)[:19]) == ("2024-06-02T00:00:05", "2024-06-05T00:00:05")
    assert gap.reason == "days without files"
    assert len(store.of(Disconnect)) == 1
    assert store.of(Clock)[-1].final
    assert iso(store.of(Clock)[-1].watermark_ns)[:19] == "2024-06-06T00:00:00"


def test_without_polars_it_says_what_to_install(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ConfigError, match=r"pip install 'tapeline\[history\]'"):
        played(files)


def test_a_restart_publishes_nothing_twice(files: list[Path], bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the midst again and again, the bus holds what one whole run puts there."""
    settings = Settings(tapeline=Tapeline(partitions=3))
    wanted = played(files, settings)
    monkeypatch.setattr(tardis_csv, "PUSH_ROWS", 200)
    source = TardisCsv(files, settings)
    for life in (700, 3000, 1 << 60):
        stop = threading.Event()
        out = Mortal(bus, source, 3, stop, life)
        try:
            source.run(out, out.attach(), stop)
        finally:
            out.close()
        assert stop.is_set() == (life < 1 << 60)
    for p in range(3):
        assert_same(_on_bus(bus, p), wanted.store.all_rows(p))
    assert [len(wanted.store.all_rows(p)) > 1000 for p in range(3)] == [True, False, True]


class Mortal(PublisherOutput):
    """Sets `stop` after so many rows."""

    def __init__(self, bus: Bus, source: TardisCsv, partitions: int, stop: threading.Event, life: int) -> None:
        super().__init__(
            bus, source.feed, f"worker-{life}", partitions, Ingest(frame_records=50), stop, False, tape=source.tape
        )
        self._life, self._end = life, stop

    def ticks(self, grouped: Grouped, cursor: bytes) -> None:
        self._life -= len(grouped.rows)
        super().ticks(grouped, cursor)
        if self._life < 0:
            self._end.set()


def _on_bus(bus: Bus, partition: int) -> Rows:
    entries = bus.call("xrange", bus.keys.stream(partition, "ticks"))
    frames = [sound(entry_id, fields) for entry_id, fields in entries]
    return np.concatenate([np.empty(0, TICK), *(f.rows() for f in frames if f.kind in TICK_FRAMES)])


def test_paced_it_plays_the_same(tmp_path: Path) -> None:
    paths = write(tmp_path, market(200, step_us=4000))
    out = Told()
    TardisCsv(paths, ONE, speed=50.0).run(out, Resume(), threading.Event())
    assert_same(out.rows(), played(paths).rows())


def test_blocks_hold_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b"%d,%s\n" % (n, b"x" * (n % 50)) for n in range(500))
    (tmp_path / "f").write_bytes(content)
    monkeypatch.setattr(tardis_csv, "READ_BYTES", 64)
    pieces = list(tardis_csv.blocks(tmp_path / "f", 200))
    assert max(map(len, pieces)) < 400
    assert b"".join(pieces) == content
    assert all(piece.endswith(b"\n") for piece in pieces)
