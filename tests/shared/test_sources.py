"""SOURCE arguments: what they mean, and one clear line for what they cannot."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import registry, sources
from shared.errors import ConfigError
from shared.settings import Settings, Tapeline
from shared.sources import SourceSpec, parse, programs
from tests.services.ingest.csvs import market, write, write_ndjson

BTC = "tardis://binance-futures?symbols=BTCUSDT&from=2024-08-01&to=2024-08-02"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.dbn", "dbn"), ("a.dbn.zst", "dbn"), ("A.DBN.ZST", "dbn"), ("noname", "dbn"), ("a.zst", "dbn"),
        ("a.ndjson", "ndjson"), ("a.ndjson.zst", "ndjson"), ("a.ndjson.gz", "ndjson"),
        ("a.csv", "csv"), ("a.csv.gz", "csv"), ("a.csv.zst", "csv"),
        ("binance_trades_2024-08-01_BTCUSDT.csv.gz", "csv"),
    ],
)  # fmt: skip
def test_files_by_their_name(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    spec = parse(name)
    assert (spec.kind, spec.text, spec.path) == (kind, str(tmp_path / name), Path(name))


def test_a_download() -> None:
    spec = parse(f"{BTC}&types=trades,book_snapshot_5,trade,option_summary")
    assert spec == SourceSpec(
        "tardis-csv", f"{BTC}&types=trades,book_snapshot_5,trade,option_summary", None, "binance-futures",
        ("BTCUSDT",), ("trades", "book_snapshot_5", "options_chain"),
        datetime(2024, 8, 1, tzinfo=UTC), datetime(2024, 8, 2, tzinfo=UTC),
    )  # fmt: skip
    assert parse(BTC).types == ("trades",)


def test_a_replay_through_the_server() -> None:
    spec = parse(
        "tardis://deribit?symbols=BTC-PERPETUAL, ETH-PERPETUAL,BTC-PERPETUAL&from=2024-06-01T12:00:00Z"
        "&to=2024-06-01T13:30:00Z&types=trades,book_snapshot_25,quote,book_snapshot_10_100ms&via=server"
    )
    assert (spec.kind, spec.symbols) == ("tardis-server", ("BTC-PERPETUAL", "ETH-PERPETUAL"))
    assert spec.types == ("trade", "book_snapshot_25_0ms", "quote", "book_snapshot_10_100ms")
    assert (spec.start, spec.end) == (datetime(2024, 6, 1, 12, tzinfo=UTC), datetime(2024, 6, 1, 13, 30, tzinfo=UTC))


def test_databento_is_bought_first() -> None:
    spec = parse("databento://GLBX.MDP3?schema=tbbo&symbols=ES.FUT&from=2024-01-02&to=2024-01-03")
    assert (spec.kind, spec.venue, spec.symbols, spec.types) == ("databento", "GLBX.MDP3", ("ES.FUT",), ("tbbo",))
    same = parse("databento://GLBX.MDP3?symbols=ES.FUT&start=2024-01-02&end=2024-01-03&stype=parent")
    assert replace(same, text=spec.text) == spec
    single = parse("databento://GLBX.MDP3?symbols=ESH4,ESM4&start=2024-01-02T14:30:00Z&end=2024-01-02T15:00:00Z")
    assert (single.stype, single.start) == ("raw_symbol", datetime(2024, 1, 2, 14, 30, tzinfo=UTC))
    with pytest.raises(ConfigError, match="give it to `tapeline replay` or `tapeline backfill`"):
        programs([spec])


def test_synthetic_must_be_generated() -> None:
    with pytest.raises(ConfigError, match="tapeline generate FILE"):
        programs([parse("synthetic://?seed=1")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("absent.dbn", r"'absent\.dbn' does not exist"),
        (".", "is a directory"),
        ("day.parquet", "is no tape by its name; give a .dbn"),
        ("day.dbn.gz", "is no tape by its name"),
        ("day.csv.bz2", "is no tape by its name"),
        ("http://host/x.csv.gz", "is no source; give a .dbn"),
        ("tardis://", "names no exchange"),
        ("tardis://Binance Futures?symbols=A&from=2024-08-01&to=2024-08-02", "names no exchange"),
        ("tardis://binance/x?symbols=A&from=2024-08-01&to=2024-08-02", "names no exchange"),
        ("tardis://binance", "says no symbols="),
        ("tardis://binance?symbols=A&from=2024-08-01", "says no to="),
        ("tardis://binance?symbols=,&from=2024-08-01&to=2024-08-02", "name at least one of symbols"),
        (f"{BTC}&types=", "name at least one of types"),
        (f"{BTC}&type=trades", "unknown key 'type'; known: symbols, from, to, types, via"),
        (f"{BTC}&from=2024-08-01", "'from' is given twice"),
        (f"{BTC}&types=incremental_book_L2", "no type 'incremental_book_L2'; there are: trades"),
        (f"{BTC}&types=book_snapshot_10_1s", "no type 'book_snapshot_10_1s'"),
        (f"{BTC}&via=pigeon", "via is csv .* or server"),
        ("tardis://binance?symbols=A&from=yesterday&to=2024-08-02", "from='yesterday' is no day"),
        ("tardis://binance?symbols=A&from=2024-08-02&to=2024-08-02", "must be later"),
        ("tardis://binance?symbols=A&from=2024-08-01T12:00:00&to=2024-08-02", "hold whole days"),
        ("databento://?schema=tbbo", "names no dataset"),
        (
            "databento://GLBX.MDP3?schema=mbp-10&symbols=ES.FUT&from=2024-01-02&to=2024-01-03",
            "schema is tbbo or trades",
        ),
        ("databento://GLBX.MDP3?symbols=ES.FUT&start=2024-01-02", "says no end="),
        ("databento://GLBX.MDP3?symbols=ES.FUT&from=2024-01-02&end=2024-01-03", "unknown key 'end'"),
        ("databento://GLBX.MDP3?symbols=ES.FUT&start=2024-01-02&end=2024-01-01", "`end` .exclusive. must be later"),
        ("databento://GLBX.MDP3?symbols=,&start=2024-01-02&end=2024-01-03", "name at least one of symbols"),
        ("databento://GLBX.MDP3?symbols=ES.FUT,ESH4&start=2024-01-02&end=2024-01-03", "in sources of their own"),
        ("databento://GLBX.MDP3?symbols=ES.c.0&start=2024-01-02&end=2024-01-03&stype=continuous", "not 'continuous'"),
    ],
)
def test_what_is_no_source_says_why(tmp_path: Path, text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("day.parquet", "day.dbn.gz", "day.csv.bz2"):
        Path(name).touch()
    with pytest.raises(ConfigError, match=said) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_each_kind_has_its_own_program(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b.dbn", "a.dbn", "a.ndjson", "a.csv.gz")]
    for path in paths:
        path.touch()
    server = f"{BTC}&via=server"
    found = programs([parse(t) for t in (*map(str, paths), BTC, server)], "60")
    assert found == [
        ("ingest-files", ("--speed", "60", str(paths[0]), str(paths[1]))),
        ("ingest-tardis-files", ("--speed", "60", str(paths[2]))),
        ("ingest-tardis-csv", ("--speed", "60", str(paths[3]), BTC)),
        ("ingest-tardis-replay", ("--speed", "60", server)),
    ]
    assert {service for service, _ in found} <= set(registry.SERVICES)
    assert set(sources.PLAYED_BY.values()) == set(registry.TAPES)


def test_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="is given twice"):
        programs([parse(BTC), parse(BTC)])


def test_sources_in_this_process_have_a_feed_and_a_tape(tmp_path: Path) -> None:
    made = market(50)
    paths = [write_ndjson(tmp_path / "m.ndjson", made), *write(tmp_path, made)]
    settings = Settings(tapeline=Tapeline(partitions=2))
    found = sources.make([parse(str(path)) for path in paths], settings)
    assert len({source.feed for source in found}) == len(found) == 2
    assert all(source.tape for source in found)
    again = sources.make([parse(str(path)) for path in reversed(paths)], settings)
    assert {source.tape for source in again} == {source.tape for source in found}
