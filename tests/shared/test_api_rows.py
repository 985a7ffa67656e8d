"""Rows of frames are those that the stores tell once a sink has written the same frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.sink_sqlite.store import SqliteStore
from services.sink_timescale.store import TimescaleStore
from shared.api_rows import Told, candles_of_frame, columns_of, key_of, messages_of_frame, rows_of_store
from shared.batches import Item, Source, batch_of
from shared.frames import Frame, unreadable
from shared.reader_bars import Series, series_of
from shared.stores import read_rows
from tests.services.sink_sqlite.tape import (
    T0,
    bars,
    candles,
    fixed,
    gap,
    pressure,
    rollup,
    rows,
    said,
    signal,
)

SERIES = [
    series_of("ES", "rolling"), series_of("6E", "seconds"), series_of("binance-futures:BTCUSDT", "1m"),
    series_of("BTC-PERPETUAL", "1m"), series_of("BTC-PERPETUAL", "1h"),
]  # fmt: skip


def wanted(*some: Series) -> dict[str, list[Series]]:
    made: dict[str, list[Series]] = {}
    for series in some:
        made.setdefault(series.name if series.of_ticker else series.symbol, []).append(series)
    return made


def rows_in(told: Told) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads(f"[{told.joined}]")
    return made


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_rows_of_frames_are_those_of_the_stores(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("pg_url") if kind == "postgresql" else f"sqlite:///{tmp_path / 's.db'}"
    other = signal(2, components=None, source="plug-in", expiration_ns=0, option_type="", types=(), log_ratio=None)
    frames = [
        candles(rows(40)), candles(rows(40), "candle_1s"), bars(fixed(20)), gap(), gap(T0 + 5, ("ES", "NQ")),
        said(*(pressure(n) for n in range(9))), said(rollup(0), rollup(1, top_strikes=())), said(signal(0), other),
    ]  # fmt: skip
    store: Any = SqliteStore(tmp_path / "s.db") if kind == "sqlite" else TimescaleStore(url)
    store.open()
    for seq, frame in enumerate(frames):
        assert not store.write(batch_of([Item(Source("bus", "any", 0, seq + 1, f"{seq + 1}-0"), frame)]))
    store.close()

    def same(table: str, where: dict[str, Any], made: list[dict[str, Any]]) -> None:
        held = rows_of_store(table, read_rows(url, table, where, columns=columns_of(table)))
        # As texts: 1 and True are equal, 5 and 5.0 are.
        texts = [sorted(json.dumps(row, sort_keys=True) for row in some) for some in (made, held)]
        assert made
        assert texts[0] == texts[1]

    for series in SERIES[:-1]:
        of = [candles_of_frame(f, wanted(*SERIES)) for f in frames if f.kind == series.kind]
        same(series.table.name, dict(series.where), rows_in(of[0][series]))
        assert of[0][series].keys == [tuple(row[c] for c in series.table.key) for row in rows_in(of[0][series])]
        assert SERIES[-1] not in of[0]
    found = [messages_of_frame(frame) for frame in frames[3:]]
    for table, underlying in (("pressure_metrics", "NQ"), ("pressure_rollups", "NQ"), ("signals", "NQ"), ("gaps", "")):
        made = [row for some in found for row in rows_in(some.get(table, {}).get(underlying, Told([], [])))]
        same(table, {}, made)
        assert all(row[column] is not None for row in made for column in key_of(table))


def test_what_is_no_row_is_none_here() -> None:
    short = candles(rows(4))
    wrong = Frame("candle_1m", 4, 0, 0, "", short.body[:-1], names=short.names)
    assert candles_of_frame(wrong, wanted(*SERIES)) == {}
    odd = rows(4)
    odd["name"][0] = 7
    assert len(candles_of_frame(candles(odd), wanted(*SERIES))[SERIES[0]]) == 1
    assert candles_of_frame(candles(rows(4)), wanted(series_of("NQ", "rolling"))) == {}
    assert candles_of_frame(bars(fixed(2)), wanted(series_of("deribit:BTCUSDT", "1m"))) == {}
    assert messages_of_frame(unreadable("not ours", b"x")) == {}
    assert messages_of_frame(said(pressure(), body=b"[{]")) == {}
    # A neighbour that can be no row takes no other along.
    body = said(pressure(0), pressure(1)).body.replace(b'"strike":17000.5', b'"strike":null', 1)
    assert len(messages_of_frame(said(pressure(), body=body))["pressure_metrics"][""]) == 1
