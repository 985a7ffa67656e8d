"""Plots: what is drawn is what the store has; the PNG is a picture, the HTML one file that holds exactly the rows."""

from __future__ import annotations

import json
import math
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from services.web.plots.axis import BREAK, axis_of
from services.web.plots.data import Ask, PlotData, load
from services.web.plots.html import document, embedded, page
from services.web.plots.plot import plot
from services.web.plots.png import MOST_DRAWN, WIDTH, png
from services.web.plots.thin import MOST_TICKS, thinned, ticks
from shared.errors import ConfigError, TapelineError
from shared.frames import NS, iso, ns_of
from shared.stores import read_rows
from tests.services.web.plots import MINUTE, START, WINDOW, Market, settings_of, until

CALLS = [("C", 6000.0, 9.0, 1.0), ("C", 6050.0, 2.0, 5.0), ("P", 5950.0, 4.0, 4.0)]


@pytest.fixture
def market(store_url: str) -> Market:
    return Market(store_url)


def loaded(url: str, symbol: str = "ES", timeframe: str = "1m", **ask: object) -> PlotData:
    return load(settings_of(url), Ask(symbol, timeframe, **ask))  # type: ignore[arg-type]


# -- bars --------------------------------------------------------------------------------------


def test_bars_are_the_stores_rows(market: Market, store_url: str) -> None:
    market.candles(list(range(20)))
    market.candles([20], complete=0, ask_volume=None, bid_volume=None, unknown_volume=None, cvd_close=None)
    data = loaded(store_url, since=until(5))
    rows = read_rows(store_url, "candles", {"symbol": "ES"}, since=until(5))
    assert [iso(ns)[:19] + "Z" for ns in data.bars.time_ns.tolist()] == [row["timestamp_in"] for row in rows]
    for name in ("open", "high", "low", "close"):
        assert getattr(data.bars, name).tolist() == [row[name] for row in rows]
    assert (data.bars.buy + data.bars.sell + data.bars.unknown).tolist() == [row["volume"] for row in rows]
    assert data.bars.unknown.tolist() == [1.0] * 15 + [6.0]  # of unknown sides where the row has none
    assert math.isnan(data.bars.cvd[-1])
    assert data.bars.cvd[:-1].tolist() == [row["cvd_close"] for row in rows[:-1]]
    assert np.flatnonzero(~data.bars.complete).tolist() == [15]
    assert (data.name, data.title) == ("GLBX.MDP3:ES", "ES")
    assert data.range == "2025-03-03 14:35:00 to 14:51:00 UTC"


def test_the_newest_bars_in_pages(market: Market, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.web.plots.data.PAGE_ROWS", 7)
    market.candles(list(range(30)))
    assert loaded(store_url).bars.open.tolist() == [100.0 + m for m in range(30)]
    assert loaded(store_url, last=9, until=until(20)).bars.open.tolist() == [100.0 + m for m in range(11, 20)]
    monkeypatch.setattr("services.web.plots.data.MOST_BARS", 20)
    with pytest.raises(TapelineError, match="more than 20 1m bars of ES in this range: narrow it"):
        loaded(store_url, since=until(0))


def test_a_rolling_bar_ends_at_its_time(market: Market, store_url: str) -> None:
    times = [START + 60 * NS, START + 61 * NS]
    market.insert("candles_1m", [
        {"time": iso(at)[:19] + "Z", "ticker": "ES", "symbol": "ESH5", "open": 1.0, "high": 1.0, "low": 1.0,
         "close": 1.0, "volume": 1.0, "complete": 1} for at in times
    ])  # fmt: skip
    data = loaded(store_url, timeframe="rolling")
    assert data.bars.time_ns.tolist() == times
    assert (data.start_ns, data.end_ns) == (START, START + 61 * NS)
    assert document(data)["stretches"] == [[times[0] // NS, 0, 2]]


def test_a_symbol_of_two_exchanges(market: Market, store_url: str) -> None:
    market.candles([0, 1], symbol="BTCUSDT", exchange="binance")
    market.candles([0, 1, 2], symbol="BTCUSDT", exchange="okex")
    with pytest.raises(ConfigError, match="BTCUSDT is on binance, okex: write exchange:BTCUSDT"):
        loaded(store_url, "BTCUSDT")
    data = loaded(store_url, "okex:BTCUSDT")
    assert (len(data.bars), data.title) == (3, "okex:BTCUSDT")


def test_no_bars_is_one_line(market: Market, store_url: str) -> None:
    with pytest.raises(TapelineError, match="no 1m bars of ES in sqlite:///"):
        loaded(store_url)
    market.candles([0])
    with pytest.raises(TapelineError, match=r"from 2026-01-01T00:00:00Z in .*; the newest is of 2025-03-03T14:30:00Z"):
        loaded(store_url, since="2026-01-01T00:00:00Z")


# -- the axis ----------------------------------------------------------------------------------


def test_short_gaps_keep_their_width_and_long_ones_are_cut() -> None:
    minutes = [0, 1, 2, 8, 9, 500, 501]
    axis = axis_of(START + np.array(minutes) * MINUTE, MINUTE)
    assert axis.slot.tolist() == [0, 1, 2, 8, 9, 10 + BREAK, 11 + BREAK]
    assert [(b.slot, b.start_ns, b.end_ns) for b in axis.breaks] == [(10.0, START + 10 * MINUTE, START + 500 * MINUTE)]
    at = axis.at(START + np.array([-5, 0, 4, 10, 500, 502, 900]) * MINUTE)
    assert at.tolist() == [0.0, 0.0, 4.0, 10.0, 10.0 + BREAK, 12.0 + BREAK, 12.0 + BREAK]


def test_a_bar_an_hour_does_not_make_an_empty_axis() -> None:
    axis = axis_of(START + np.arange(0, 40 * 25, 25) * MINUTE, MINUTE)
    assert axis.slots <= 6 * 40
    assert len(axis.breaks) == 39


def test_a_thinned_slot_does_not_reach_over_a_break() -> None:
    axis = axis_of(START + np.array([*range(7), *range(500, 505)]) * MINUTE, MINUTE)
    few = axis.thinned(5)
    assert few.slot.tolist() == [0] * 5 + [1] * 2 + [3] * 5
    assert (few.slots, [b.slot for b in few.breaks]) == (4, [2.0])
    assert few.at(START + np.array([0, 5, 500, 505]) * MINUTE).tolist() == pytest.approx([0.0, 1.0, 3.0, 4.0])


def test_labels_are_at_full_hours_and_say_the_day(market: Market, store_url: str) -> None:
    market.candles([*range(0, 55), *range(60 * 24, 60 * 24 + 40)])
    found = ticks(loaded(store_url))
    assert 4 <= len(found) <= MOST_TICKS
    assert found[0] == (0.0, "14:30\n2025-03-03")
    assert [label for _, label in found if "\n" in label] == ["14:30\n2025-03-03", "14:30\n2025-03-04"]


# -- marks and pressure -------------------------------------------------------------------------


def test_big_trades_are_at_their_bar(market: Market, store_url: str) -> None:
    market.candles([0, 1, 3])
    market.seconds([(5, 1, 30.0, -30.0), (50, 2, 80.0, 80.0), (61, 0, 5.0, 0.0), (125, 1, 40.0, 40.0)])
    market.seconds([(62, 1, 99.0, 1.0)], symbol="ESM5", cvd_close=None)  # not the contract in front
    (mark,) = loaded(store_url).big_trades  # 14:32 has no bar
    assert (mark.bar, mark.trades, mark.volume, mark.side, mark.price) == (0, 3, 110.0, 1, 100.5)


def test_signals_are_at_the_bar_in_which_they_were_known(market: Market, store_url: str) -> None:
    market.candles(list(range(12)))
    market.pressure(0, CALLS)
    market.signal(0, "C", 6000.0)
    market.signal(1, "P", 5950.0, direction="SELL", status="monitor", score=0.7)
    market.signal(1, "C", 6050.0, status="rejected")
    first, second = loaded(store_url).signals
    assert (first.bar, first.label, first.status) == (4, "C 6000 BUY", "emitted")
    assert (second.bar, second.label, second.status) == (9, "P 5950 SELL", "monitor")


def test_a_contract_shows_the_pressure_of_its_root(market: Market, store_url: str) -> None:
    market.candles(list(range(5)), symbol="ESH5")
    market.candles(list(range(5)), symbol="CLH5")
    market.pressure(0, CALLS)
    assert loaded(store_url, "ESH5").underlying == "ES"
    without = loaded(store_url, "CLH5")
    assert (without.underlying, without.heat) == ("", None)
    assert loaded(store_url, "CLH5", underlying="ES").heat is not None
    assert loaded(store_url, "CLH5", underlying="GC").notes == ["no option pressure of GC in this range"]


def test_the_heat_map_is_the_stores_pressure(market: Market, store_url: str) -> None:
    market.candles(list(range(2, 13)))
    for window in range(4):
        market.pressure(window, CALLS, complete=window != 1)
    heat = loaded(store_url).heat
    assert heat is not None
    # The window in which the bars begin is there; those behind the last bar are not.
    assert heat.start_ns.tolist() == [START + w * WINDOW for w in range(3)]
    assert (heat.left.tolist(), heat.right.tolist()) == ([0.0, 3.0, 8.0], [3.0, 8.0, 11.0])
    assert heat.strikes.tolist() == [5950.0, 6000.0, 6050.0]
    stored = read_rows(store_url, "pressure_metrics", {"time_window": "2025-03-03T14:30:00Z"})
    shown = {(k, s): r[i, 0] for k, r in heat.ratio.items() for i, s in enumerate(heat.strikes) if r[i, 0] == r[i, 0]}
    assert shown == {(row["option_type"], row["strike"]): pytest.approx(row["log_ratio"]) for row in stored}
    assert heat.net_premium.tolist() == [1000.0, 2000.0, 3000.0]
    assert heat.price.tolist() == [6000.0, 6001.0, 6002.0]
    assert heat.complete.tolist() == [True, False, True]


def test_windows_shorter_than_a_bar_are_added_up(market: Market, store_url: str) -> None:
    market.candles([0, 10], timeframe="10m")
    market.pressure(0, [("C", 6000.0, 9.0, 1.0)])
    market.pressure(1, [("C", 6000.0, 1.0, 4.0)])
    data = loaded(store_url, timeframe="10m")
    assert data.heat is not None
    assert data.heat.ratio["C"].tolist() == [[pytest.approx(math.log(10.5 / 5.5))]]
    assert data.heat.net_premium.tolist() == [3000.0]
    assert data.notes == ["pressure by 10m, 2 windows of 5m together"]


# -- pictures -----------------------------------------------------------------------------------


def size(body: bytes) -> tuple[int, int]:
    assert body[:8] == b"\x89PNG\r\n\x1a\n"
    assert body[-8:-4] == b"IEND"
    found: tuple[int, int] = struct.unpack(">II", body[16:24])
    return found


@pytest.fixture
def everything(market: Market, store_url: str) -> PlotData:
    """A market with all that can be shown: a gap, a break, incomplete bars, marks, pressure."""
    market.candles([*range(8), *range(12, 20), *range(600, 606)])
    market.candles([20], complete=0, liquidated_long_volume=5.0)
    market.seconds([(5, 1, 30.0, -30.0)])
    for window in range(4):
        market.pressure(window, CALLS, complete=window != 2)
    market.signal(1, "C", 6000.0)
    market.signal(1, "P", 5950.0, direction="SELL")
    return loaded(store_url)


def test_the_png_is_a_picture_in_both_themes(everything: PlotData) -> None:
    light, dark = png(everything, "light"), png(everything, "dark")
    assert size(light) == size(dark)
    assert size(light)[0] == WIDTH * 120
    assert light != dark


def test_a_bar_alone(market: Market, store_url: str) -> None:
    market.candles([0], open=5.0, high=5.0, low=5.0, close=5.0, cvd_close=None)
    made = plot(settings_of(store_url), "png", None, symbol="ES")
    assert size(made.body)[0] == WIDTH * 120
    assert made.summary["rows"] == 1
    assert made.summary["bytes"] == len(made.body)


def test_many_bars_are_drawn_together(everything: PlotData, store_url: str) -> None:
    n = 5000
    rng = np.random.default_rng(1)
    bars = everything.bars
    times = START + np.arange(n) * MINUTE
    for name in bars.__slots__:
        setattr(bars, name, rng.random(n))
    bars.time_ns = bars.start_ns = times
    bars.high, bars.low = bars.open + 2, bars.open - 2
    bars.complete = np.ones(n, np.bool_)
    bars.complete[777] = False
    everything.axis = axis_of(times, MINUTE)
    everything.heat = None
    few = thinned(everything, 5)
    assert few.range == everything.range
    assert len(few.bars) == 1000 <= MOST_DRAWN
    assert few.bars.open[3] == bars.open[15]
    assert few.bars.close[3] == bars.close[19]
    assert few.bars.high[3] == bars.high[15:20].max()
    assert few.bars.buy.sum() == pytest.approx(bars.buy.sum())
    assert np.flatnonzero(~few.bars.complete).tolist() == [155]
    assert few.notes[0] == "5,000 bars, each candle is 5 of them"


# -- the page -----------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._script: dict[str, str | None] | None = None
        self.feed(body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._script = None


def test_the_page_holds_exactly_the_rows(everything: PlotData, store_url: str) -> None:
    found = Page(page(everything))
    ((kind, told), *code) = found.scripts
    assert kind == {"type": "application/json", "id": "data"}
    held = json.loads(told)["bars"]
    rows = read_rows(store_url, "candles", {"symbol": "ES"})
    assert held["time"] == [ns_of(row["timestamp_in"]) // NS for row in rows]
    names = {"open": "open", "close": "close", "buy": "ask_volume", "sell": "bid_volume", "cvd": "cvd_close"}
    for ours, theirs in names.items():
        assert held[ours] == [row[theirs] for row in rows]
    assert held["complete"] == [bool(row["complete"]) for row in rows]
    assert len(code) == 2
    # Nothing is loaded from anywhere.
    assert not [tag for tag, attrs in found.tags if tag == "link" or attrs.keys() & {"src", "href"}]
    chart = next(attrs for _, attrs in found.tags if attrs.get("id") == "chart")
    assert "ES 1m, 2025-03-03" in str(chart["aria-label"])


def test_the_theme_of_the_page(everything: PlotData) -> None:
    assert Page(page(everything)).tags[0] == ("html", {"lang": "en"})
    assert Page(page(everything, "dark")).tags[0] == ("html", {"lang": "en", "data-theme": "dark"})


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--<script>", "a&b\"'<b>", "x\u2028y"])
def test_no_name_breaks_out_of_the_page(everything: PlotData, name: str) -> None:
    everything.name = everything.underlying = everything.store = name
    plain = Page(page(everything))
    assert len(plain.scripts) == 3
    assert json.loads(plain.scripts[0][1])["underlying"] == name
    assert name in plain.text
    text = embedded({"name": name})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"name": name}
