"""`feeds = ["tardis"]`: a process for each exchange."""

from __future__ import annotations

import pytest

from shared.errors import ConfigError
from shared.settings import Settings, Tapeline, Tardis
from shared.supervise import programs, render


def configured(*symbols: str) -> Settings:
    return Settings(tapeline=Tapeline(feeds=("tardis",)), tardis=Tardis(symbols=symbols))


def test_one_process_for_each_exchange() -> None:
    chosen = programs(configured("binance:BTCUSDT", "okex-swap:BTC-USDT", "binance:ETHUSDT"))
    ingest = [(p.name, p.args) for p in chosen if p.name.startswith("ingest")]
    assert ingest == [
        ("ingest-tardis-binance", ("ingest-tardis", "binance")),
        ("ingest-tardis-okex-swap", ("ingest-tardis", "okex-swap")),
    ]
    text = render(chosen, "/s", "/s/sock", ("tapeline",))
    assert "[program:ingest-tardis-okex-swap]\ncommand=tapeline run ingest-tardis okex-swap\n" in text


@pytest.mark.parametrize("entry", ["BTCUSDT", "binance:", ":BTCUSDT", "Binance Futures:BTCUSDT"])
def test_an_entry_that_is_none_is_named_before_anything_starts(entry: str) -> None:
    with pytest.raises(ConfigError, match=f"'{entry}' in tardis"):
        programs(configured("binance:ETHUSDT", entry))


def test_no_symbols_at_all() -> None:
    with pytest.raises(ConfigError, match="name exchange:symbol"):
        programs(configured())


@pytest.mark.parametrize("feed", ["tardis-csv", "tardis-files", "tardis-replay", "files"])
def test_what_plays_a_tape_is_no_feed(feed: str) -> None:
    with pytest.raises(ConfigError, match=f"no feed '{feed}'.*tardis"):
        programs(Settings(tapeline=Tapeline(feeds=(feed,))))
