"""Downloads: the vendor's client against a local datasets API; whole files or one clear line."""

from __future__ import annotations

import gzip
import logging
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.ingest import tardis_download
from services.ingest.source import Resume
from services.ingest.tardis_csv import TardisCsv
from services.ingest.tardis_download import local_files
from shared.errors import AuthError, ConfigError, SourceError, TapelineError, Unavailable
from shared.settings import Settings, Tapeline, Tardis
from shared.sources import parse
from tests.fakes.datasets import KEY, Datasets
from tests.services.ingest.csvs import market, text
from tests.services.ingest.test_tardis_csv import Told
from tests.wait import until

DAYS = ("2024-06-01", "2024-06-02", "2024-06-03", "2024-06-04")
FIRST = "tardis://deribit?symbols=BTC-PERPETUAL&from=2024-06-01&to=2024-06-02"
ALL = "tardis://deribit?symbols=BTC-PERPETUAL&from=2024-06-01&to=2024-06-05"


def archives() -> dict[tuple[str, str, str, str], bytes]:
    out = {}
    for n, day in enumerate(DAYS):
        made = market(300, seed=n, begin_us=1_717_200_000_000_000 + n * 86_400_000_000)
        some = [m for m in made if m["type"] == "trade" and m["exchange"] == "deribit"]
        out["deribit", "trades", day, "BTC-PERPETUAL"] = gzip.compress(text("trades", some))
    return out


@pytest.fixture
def server() -> Iterator[Datasets]:
    with Datasets(archives()) as made:
        yield made


@pytest.fixture
def settings(server: Datasets, tmp_path: Path) -> Settings:
    return Settings(
        tapeline=Tapeline(state_dir=str(tmp_path / "state"), partitions=1), tardis=Tardis(datasets_url=server.url)
    )


def tardis(settings: Settings, **changed: Any) -> Settings:
    return Settings(tapeline=settings.tapeline, tardis=msgspec.structs.replace(settings.tardis, **changed))


def kept(settings: Settings) -> list[Path]:
    return sorted((Path(settings.tapeline.state_dir) / "tardis").iterdir())


def test_files_are_fetched_once_and_played(server: Datasets, settings: Settings, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    paid = tardis(settings, api_key=KEY)
    paths = local_files([ALL], paid)
    assert [p.name for p in paths] == [f"deribit_trades_{day}_BTC-PERPETUAL.csv.gz" for day in DAYS]
    assert kept(settings) == paths
    assert [p.read_bytes() for p in paths] == list(server.archives.values())
    out = Told()
    TardisCsv(paths, paid).run(out, Resume(), threading.Event())
    assert len(out.rows()) > 100
    server.asked.clear()
    paths[1].unlink()
    assert local_files([FIRST, str(paths[0]), ALL], paid) == [paths[0], paths[0], *paths]
    assert server.asked == [("deribit", "trades", "2024-06-02", "BTC-PERPETUAL")]
    assert KEY not in caplog.text


def test_the_first_day_of_a_month_needs_no_key(settings: Settings) -> None:
    assert len(local_files([FIRST], settings)) == 1


def test_other_days_do(settings: Settings) -> None:
    with pytest.raises(AuthError, match=r"2024-06-02 needs a Tardis API key .*set TARDIS_API_KEY"):
        local_files([FIRST.replace("06-01", "06-02", 1).replace("to=2024-06-02", "to=2024-06-03")], settings)
    assert kept(settings) == []


def test_a_refused_key_is_not_shown(settings: Settings) -> None:
    wrong = tardis(settings, api_key="TD.wrong")
    with pytest.raises(AuthError, match=r"refused the API key .*check TARDIS_API_KEY") as error:
        local_files([FIRST], wrong)
    assert "TD.wrong" not in str(error.value)


def test_no_data_says_where_to_look(settings: Settings) -> None:
    with pytest.raises(SourceError, match=r"has no deribit trades of DOGE-PERPETUAL on 2024-06-01 .*exchanges/deribit"):
        local_files([FIRST.replace("BTC", "DOGE")], settings)


def test_names_that_people_write_are_mapped(settings: Settings) -> None:
    (path,) = local_files([FIRST.replace("BTC-PERPETUAL", "btc-usd")], settings)
    assert path.name == "deribit_trades_2024-06-01_BTC-PERPETUAL.csv.gz"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut", r"arrived truncated .*try again"),
        ("damaged", r"arrived damaged .*try again"),
        ("none", r"arrived damaged .*try again"),
        ("busy", r"does not send .*503 .*try again later"),
    ],
)
def test_what_arrives_broken_is_not_kept(server: Datasets, settings: Settings, fault: str, said: str) -> None:
    server.faults["BTC-PERPETUAL"] = fault
    with pytest.raises(Unavailable, match=said):
        tardis_download.download(parse(FIRST), settings, attempts=1)
    assert kept(settings) == []
    server.faults.clear()
    assert len(local_files([FIRST], settings)) == 1


def test_a_passing_fault_is_tried_again(server: Datasets, settings: Settings) -> None:
    server.faults["BTC-PERPETUAL"] = "cut once"
    local_files([FIRST], settings)
    assert len(server.asked) == 2
    assert len(kept(settings)) == 1


def _error(call: Any) -> Any:
    try:
        call()
    except BaseException as error:
        return error
    return None


def test_no_network(settings: Settings, server: Datasets) -> None:
    nowhere = Datasets({})
    nowhere._server.server_close()
    with pytest.raises(Unavailable, match=r"cannot be reached for deribit trades .*check the network"):
        tardis_download.download(parse(FIRST), tardis(settings, datasets_url=nowhere.url), attempts=1)


def test_a_full_disk(settings: Settings) -> None:
    """The kernel refuses the write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(TapelineError, match=r"cannot write .*tardis: .*set tardis\.download_dir"):
            local_files([FIRST], settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(settings) == []


def test_a_folder_that_cannot_be(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file/here: .*set tardis\.download_dir"):
        local_files([FIRST], tardis(settings, download_dir=str(tmp_path / "file" / "here")))


def test_stopped_in_the_midst(server: Datasets, settings: Settings) -> None:
    server.faults["BTC-PERPETUAL"] = "silent"
    stop = threading.Event()
    failed: list[Any] = []
    fetch = threading.Thread(target=lambda: failed.append(_error(lambda: local_files([FIRST], settings, stop))))
    fetch.start()
    until(lambda: server.asked, 10, "the request")
    stop.set()
    fetch.join(10)
    assert not fetch.is_alive()
    assert isinstance(failed[0], Unavailable)
    assert kept(settings) == []


@pytest.mark.parametrize("url", ["ftp://host", "nothing", "http://", "http://[bad"])
def test_an_address_that_is_none(settings: Settings, url: str) -> None:
    with pytest.raises(ConfigError, match=r"tardis\.datasets_url .* is no address"):
        local_files([FIRST], tardis(settings, datasets_url=url))


def test_a_key_is_not_sent_in_the_clear(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="would show the API key"):
        local_files([FIRST], tardis(settings, datasets_url="http://example.com", api_key=KEY))


def test_without_the_client_it_says_what_to_install(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tardis_dev", None)
    with pytest.raises(ConfigError, match=r"pip install 'tapeline\[history\]'"):
        local_files([FIRST], settings)


def test_only_csv_sources(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "x.dbn").touch()
    with pytest.raises(ConfigError, match="is no CSV source"):
        local_files([str(tmp_path / "x.dbn")], settings)
