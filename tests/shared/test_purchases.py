"""`databento://` sources: the price is told before anything is bought, and what is bought is bought once."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from services.ingest.dbn_file import DbnFiles
from services.ingest.source import Resume
from shared.bus import Bus
from shared.errors import AuthError, ConfigError, TapelineError, Unavailable
from shared.instruments import partition_of
from shared.messages import Instrument, Usage, decode
from shared.purchases import local
from shared.settings import load
from shared.sources import parse
from shared.usage import HISTORY, Totals, day_of, now_ns
from shared.usage_book import row_of
from tests.fakes.gateway import KEY
from tests.fakes.history import History
from tests.fakes.tape import LISTINGS, NS, START, Listing, Tape, generate
from tests.services.ingest.dbn import Memory
from tests.shared.test_cli import tapeline
from tests.shared.usage_store import keep_daily

COST, SIZE, RANGE = "metadata.get_cost", "metadata.get_billable_size", "timeseries.get_range"
SOURCE = "databento://GLBX.MDP3?schema=tbbo&symbols=ES.FUT,NQ.FUT&start=2023-12-25T23:00:00Z&end=2023-12-26"
MORE = SOURCE.replace("ES.FUT,NQ.FUT", "CL.FUT")
OTHERS = ("NO_PROXY", "TMPDIR")
OPTIONS = "databento://GLBX.MDP3?symbols=ES.OPT&start=2023-12-25T23:00:00Z&end=2023-12-26"


@pytest.fixture(scope="module")
def tape() -> Tape:
    options = tuple(
        Listing(51000 + n, f"ESH4 {kind}{strike}", "ES", kind=kind, price=20.0, strike=float(strike))
        for n, (kind, strike) in enumerate([("C", 4800), ("P", 4700)])
    )
    return generate(seconds=120, per_second=20, listings=(*LISTINGS, *options))


@pytest.fixture
def history(tape: Tape) -> Iterator[History]:
    with History(tape, cost=0.5) as made:
        yield made
        assert not made.complaints


def given(folder: Path, history: History, **environ: str) -> dict[str, str]:
    return {
        "DATABENTO_API_KEY": KEY, "TAPELINE_DATABENTO_HISTORY_GATEWAY": history.url, "NO_PROXY": "127.0.0.1",
        "TAPELINE_STATE_DIR": str(folder / "state"), "DATABASE_URL": f"sqlite:///{folder / 'rows.db'}",
        "TMPDIR": str(folder),
    } | environ  # fmt: skip


def run(folder: Path, history: History, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as users run it."""
    done = tapeline(*args, cwd=folder, **given(folder, history, **environ))
    assert KEY not in done.stdout + done.stderr
    return done


def buy(folder: Path, history: History, *sources: str, yes: bool = False, quiet: bool = False, **environ: str) -> Any:
    """What the commands do before they play."""
    settings = load(environ={k: v for k, v in given(folder, history, **environ).items() if k not in OTHERS})
    return local([parse(source) for source in sources or (SOURCE,)], settings, yes=yes, quiet=quiet)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def bought(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state" / "databento").glob("*.dbn.zst"))


def spent(folder: Path) -> Totals:
    days = msgspec.json.decode((folder / "state" / "databento" / "spent.json").read_bytes(), type=dict[str, Totals])
    return days[day_of(now_ns())]


def trades(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "rows.db")) as connection:
        return int(connection.execute("SELECT sum(trades) FROM candles_1s").fetchone()[0] or 0)


def outright(tape: Tape, *roots: str) -> int:
    natives = [i.native for i in tape.listings if i.root in roots and i.kind == "F"]
    return sum(int((tape.records["instrument_id"] == native).sum()) for native in natives)


def test_bought_once_and_played_as_files(tape: Tape, history: History, tmp_path: Path) -> None:
    done = run(tmp_path, history, "backfill", SOURCE)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(
        "GLBX.MDP3 tbbo of ES.FUT,NQ.FUT, 2023-12-25T23:00:00Z to 2023-12-26T00:00:00Z: $0.5000, 0.1 MiB"
    )
    assert second == "buying it for $0.5000 at Databento Historical; $20.00 of today's budget was left"
    assert "fetching GLBX.MDP3 tbbo of ES.FUT,NQ.FUT" in done.stdout
    assert bought(tmp_path) == ["GLBX.MDP3_tbbo_parent_ES.FUT+NQ.FUT_20231225T230000_20231226T000000.dbn.zst"]
    assert f"{outright(tape, 'ES', 'NQ'):,} trades in" in done.stdout
    (asked,) = history.of(RANGE)
    assert (asked["symbols"], asked["stype_in"], asked["schema"]) == ("ES.FUT,NQ.FUT", "parent", "tbbo")
    assert (int(asked["start"]), int(asked["end"])) == (START, START + 3600 * NS)
    used = spent(tmp_path)
    assert used.cost_usd == 0.5
    assert used.bytes == 80 * used.events > 80 * outright(tape, "ES", "NQ")
    assert trades(tmp_path) > 0
    (spec,) = buy(tmp_path, history, SOURCE.replace("ES.FUT,NQ.FUT", "NQ.FUT,ES.FUT"))
    assert spec.path.name == bought(tmp_path)[0]
    assert len(history.of(COST)) == len(history.of(RANGE)) == 1
    assert spent(tmp_path) == used


def test_options_come_with_their_definitions(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All definitions of a day stand at its begin; what is free is not bought."""
    history.cost = 0
    found = buy(tmp_path, history, OPTIONS)
    out = capsys.readouterr().out
    assert "$0.0000" in out
    assert "buying" not in out
    definition, tbbo = history.of(RANGE)
    assert (definition["schema"], definition["symbols"]) == ("definition", "ES.OPT")
    assert int(definition["start"]) == START - 23 * 3600 * NS
    assert int(tbbo["start"]) == START
    assert [spec.path.name.split("_")[1] for spec in found] == ["definition", "tbbo"]
    assert [spec.kind for spec in found] == ["dbn", "dbn"]
    heard = Memory()
    DbnFiles([spec.path for spec in found], 3).run(heard, Resume(), threading.Event())
    known = {i.symbol: i for i in heard.log if isinstance(i, Instrument)}
    assert {(i.kind, i.strike) for i in known.values()} == {("C", 4800.0), ("P", 4700.0)}


@pytest.mark.parametrize("command", ["replay", "backfill"])
def test_too_dear_is_refused_in_one_line(history: History, tmp_path: Path, command: str) -> None:
    history.cost = 20.5
    done = run(tmp_path, history, command, SOURCE)
    assert done.returncode == 1
    assert ": $20.5000, " in done.stdout
    assert done.stderr == (
        "tapeline: this costs $20.5000 at Databento Historical, more than the $20.00 that is left of today's budget: "
        "ask for less, raise usage.daily_usd (now 25), or buy it with --yes\n"
    )
    assert not history.of(RANGE)
    assert not bought(tmp_path)
    assert not (tmp_path / "rows.db").exists()
    assert [path.name for path in tmp_path.iterdir()] in (["state"], [])


def test_yes_buys_it_and_then_nothing_is_left(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history.cost = 20.5
    buy(tmp_path, history, yes=True)
    history.cost = 0.01
    with pytest.raises(TapelineError, match=r"more than the \$0\.00 that is left"):
        buy(tmp_path, history, MORE)
    capsys.readouterr()
    buy(tmp_path, history, MORE, quiet=True, TAPELINE_USAGE_DAILY_USD="0")
    out, err = capsys.readouterr()
    assert not out, "stdout is for programs"
    assert "buying it for $0.0100 at Databento Historical\n" in err
    assert spent(tmp_path).cost_usd == pytest.approx(20.51)


def test_what_the_feed_used_today_is_not_left(history: History, tmp_path: Path) -> None:
    at = now_ns()
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    keep_daily(url, Usage("databento", day_of(at), at, 0, 0, 0.0, 0.0, 9, 9, 60.0, 19.25, 25.0))
    buy(tmp_path, history)
    with pytest.raises(TapelineError, match=r"more than the \$0\.25 that is left"):
        buy(tmp_path, history, MORE)


def test_sources_are_priced_together(history: History, tmp_path: Path) -> None:
    history.cost = 12.0
    with pytest.raises(TapelineError, match=r"this costs \$24\.0000"):
        buy(tmp_path, history, SOURCE, MORE)
    assert len(history.of(COST)) == 2
    with pytest.raises(ConfigError, match="is given twice"):
        buy(tmp_path, history, SOURCE, SOURCE)


@pytest.mark.filterwarnings("ignore:unclosed file .*dbn.zst:ResourceWarning")
@pytest.mark.parametrize(
    ("endpoint", "kind", "error", "says"),
    [
        (COST, "500", Unavailable, "Databento Historical does not tell the price: 500"),
        (COST, "401", AuthError, "Databento Historical refused the API key"),
        (RANGE, "torn", Unavailable, "Databento Historical does not send the stretch"),
        (RANGE, "damaged", Unavailable, "Databento Historical: what it sent is cut off"),
    ],
)
def test_a_failed_download_leaves_no_file(
    history: History, tmp_path: Path, endpoint: str, kind: str, error: type[TapelineError], says: str
) -> None:
    history.fault(endpoint, kind)
    with pytest.raises(error, match=says) as raised:
        buy(tmp_path, history)
    assert "\n" not in str(raised.value)
    assert not bought(tmp_path)
    assert not list((tmp_path / "state" / "databento").glob(".fetch-*"))
    if endpoint == RANGE:
        assert spent(tmp_path) == Totals(cost_usd=0.5), "it may be billed all the same"


def test_a_size_that_is_not_told_is_left_out(
    history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history.fault(SIZE, "500")
    buy(tmp_path, history)
    assert capsys.readouterr().out.splitlines()[0].endswith("2023-12-26T00:00:00Z: $0.5000")


def test_without_a_key_nothing_is_asked(history: History, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="set DATABENTO_API_KEY"):
        buy(tmp_path, history, DATABENTO_API_KEY="")
    assert not history.requests


def test_a_running_deployment_is_told(bus: Bus, history: History, tmp_path: Path) -> None:
    """Its feeds share the budget, and its sink keeps what was bought."""
    bus.deploy(3)
    running = {"REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace}
    for symbols in ("ES.FUT", "NQ.FUT"):
        buy(tmp_path, history, SOURCE.replace("ES.FUT,NQ.FUT", symbols), **running)
    body = bus.call("hget", bus.keys.usage(HISTORY), day_of(now_ns()))
    assert row_of(body).day_cost_usd == 1.0
    frames = bus.read(partition_of(HISTORY, 3), "usage", "0-0", 100)
    told: list[Any] = [m for f in frames for m in decode(f.body)]
    assert sum(m.cost_usd for m in told) == 1.0
    assert sum(m.events for m in told) == told[-1].day_events == spent(tmp_path).events
    bus.call("hset", bus.keys.feeds, "databento", "{}")
    row = Usage("databento", day_of(now_ns()), now_ns(), 0, 0, 0.0, 0.0, 9, 9, 60.0, 18.75, 25.0)
    bus.call("hset", bus.keys.usage("databento"), row.day, msgspec.json.encode(row))
    with pytest.raises(TapelineError, match=r"more than the \$0\.25 that is left of today's budget"):
        buy(tmp_path, history, MORE, **running)
