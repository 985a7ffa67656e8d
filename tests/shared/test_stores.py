"""Store URLs and what is read from a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.sink_sqlite.store import SqliteStore
from shared.batches import Item, Source, batch_of
from shared.errors import ConfigError
from shared.frames import NS, Frame
from shared.stores import newest_cvd, parse, read_rows, redact
from tests.services.sink_sqlite.tape import T0, candles, rows


def test_parse() -> None:
    assert parse("sqlite:///tape.db").path == Path("tape.db")
    assert parse("sqlite:////var/lib/tape.db").path == Path("/var/lib/tape.db")
    assert parse("postgresql://u:p@h/db").scheme == parse("postgres://u:p@h/db").scheme == "postgresql"
    assert parse("bigquery://project/dataset").scheme == "bigquery"


@pytest.mark.parametrize(
    "url",
    ["", "tape.db", "mysql://h/db", "sqlite://tape.db", "sqlite:///", "sqlite:///:memory:", "sqlite:///folder/",
     "sqlite:///a.db?mode=ro", "postgresql://", "bigquery:///"],
)  # fmt: skip
def test_urls_that_name_no_store(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///|postgresql://|bigquery://") as error:
        parse(url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["postgresql://bob:s3cret@h:5432/db", "postgresql://bob:a/s3cret@b@h/db", "mysql://bob:s3cret@h/db",
     "postgresql://h/db?user=bob&password=s3cret&x=1", "bob:s3cret@h"],
)  # fmt: skip
def test_credentials_are_never_shown(url: str) -> None:
    assert "s3cret" not in redact(url)
    if url.startswith("postgresql"):
        assert "s3cret" not in repr(parse(url))
    else:
        with pytest.raises(ConfigError, match="store URL") as error:
            parse(url)
        assert "s3cret" not in str(error.value)


def test_paths_are_shown_whole() -> None:
    assert redact("sqlite:////data/a@b.db") == "sqlite:////data/a@b.db"
    assert redact("postgresql://bob:s3cret@h:5432/db") == "postgresql://bob:***@h:5432/db"


def test_nothing_is_read_from_a_store_that_is_not_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    assert newest_cvd(url, "ES", T0) is None
    assert read_rows(url, "candles_1m") == []
    assert not (tmp_path / "s.db").exists()
    (tmp_path / "s.db").touch()
    assert newest_cvd(url, "ES", T0) is None
    (tmp_path / "s.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(ConfigError, match="cannot be read"):
        newest_cvd(url, "ES", T0)


def _write(path: Path, *frames: Frame) -> str:
    store = SqliteStore(path)
    store.open()
    store.write(batch_of([Item(Source("a", "candles", 0, i + 1, f"{i + 1}-0"), f) for i, f in enumerate(frames)]))
    store.close()
    return f"sqlite:///{path}"


def test_newest_cvd(tmp_path: Path) -> None:
    minute, second = rows(8), rows(8)
    minute["cvd_close"] = np.arange(8)
    minute["cvd_close"][6] = np.nan
    second["cvd_close"] = 100 + np.arange(8)
    url = _write(tmp_path / "s.db", candles(minute), candles(second, "candle_1s", [("NQ", "NQH4"), ("CL", "CLG4")]))
    assert newest_cvd(url, "ES", T0 - 1) is None
    assert newest_cvd(url, "ES", T0) == 0
    assert newest_cvd(url, "ES", T0 + 2 * NS - 1) == 2
    assert newest_cvd(url, "ES", T0 + 2 * NS) == 4
    # The row of T0 + 3 s has no CVD.
    assert newest_cvd(url, "ES", T0 + 900 * NS) == 4
    # Only one-second rows: the second that starts at T0 has ended at T0 + 1 s.
    assert newest_cvd(url, "NQ", T0 + NS - 1) is None
    assert newest_cvd(url, "NQ", T0 + NS) == 100
    assert newest_cvd(url, "GC", T0 + NS) is None


def test_read_rows(tmp_path: Path) -> None:
    url = _write(tmp_path / "s.db", candles(rows(20)))
    got = read_rows(url, "candles_1m")
    assert [(r["ticker"], r["time"]) for r in got] == sorted((r["ticker"], r["time"]) for r in got)
    assert len(got) == 20
    es = read_rows(url, "candles_1m", {"ticker": "ES"}, since="2023-12-25T23:01:02Z", until="2023-12-25T23:01:05Z")
    assert [r["time"][-3:-1] for r in es] == ["02", "03", "04"]
    assert [r["time"][-3:-1] for r in read_rows(url, "candles_1m", {"ticker": "ES"}, last=2)] == ["08", "09"]
    assert read_rows(url, "late_counts") == []
    with pytest.raises(ConfigError, match="no table or column"):
        read_rows(url, "x; drop table gaps")
    for where, columns in (({"colour": 1}, None), (None, ["colour"])):
        with pytest.raises(ConfigError, match="candles_1m has no column 'colour'; it has: time, ticker, symbol"):
            read_rows(url, "candles_1m", where, columns=columns)


def test_bounds_are_instants_not_texts(tmp_path: Path) -> None:
    url = _write(tmp_path / "s.db", candles(rows(20)))

    def seconds(since: str, until: str) -> list[str]:
        got = read_rows(url, "candles_1m", {"ticker": "ES"}, since=since, until=until, columns=["time"])
        return [row["time"][-3:-1] for row in got]

    # As texts 23:01:00Z would be behind 23:01:00.5Z, and 23:01:03Z behind 23:01:03.000000001Z.
    assert seconds("2023-12-25T23:01:00.5Z", "2023-12-25T23:01:03.000000001Z") == ["01", "02", "03"]
    assert seconds("2023-12-25T23:01:08", "2023-12-26") == ["08", "09"]
    with pytest.raises(ConfigError, match="'yesterday' is no instant"):
        seconds("yesterday", "2023-12-26")


def test_of_the_rows_of_one_instant_the_key_decides_which_are_newest(tmp_path: Path) -> None:
    url = _write(tmp_path / "s.db", candles(rows(2)), candles(rows(4, 1)))
    assert [(r["ticker"], r["time"][-3:-1]) for r in read_rows(url, "candles_1m", last=3)] == [
        ("6E", "02"), ("ES", "01"), ("ES", "02")
    ]  # fmt: skip
