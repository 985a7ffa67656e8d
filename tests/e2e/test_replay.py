"""`tapeline replay`, whole: files in, rows stored, one line for what cannot be; nothing left behind."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import databento
import pytest

from tests.e2e.test_up import environ
from tests.fakes.datasets import Datasets
from tests.services.ingest.csvs import market, text, write, write_ndjson
from tests.shared.test_cli import tapeline
from tests.shared.test_supervise import below
from tests.wait import until

pytestmark = pytest.mark.heavy
TRADES = 30_000


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic market in a file, with some late trades."""
    out = tmp_path_factory.mktemp("tape") / "market.dbn.zst"
    args = ("--trades", str(TRADES), "--late-fraction", "0.01", "--late-seconds", "5", "--definitions")
    done = tapeline("generate", str(out), *args, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return out


def rows(db: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Tables without what may differ between runs."""
    with closing(sqlite3.connect(db)) as connection:

        def table(name: str, order: str) -> list[tuple[Any, ...]]:
            cursor = connection.execute(f"SELECT * FROM {name} ORDER BY {order}")
            keep = [i for i, c in enumerate(cursor.description)
                    if c[0] not in ("timestamp_out", "latency_ms", "bus", "bus_seq", "row", "id", "at")]  # fmt: skip
            return [tuple(row[i] for i in keep) for row in cursor]

        return {
            "candles_1m": table("candles_1m", "ticker, time"),
            "candles_1s": table("candles_1s", "symbol, time"),
            "late_trades": sorted(table("late_trades", "ts_event_ns"), key=str),
        }


def replay(cwd: Path, tape: Path, name: str, *args: str) -> dict[str, Any]:
    done = tapeline("replay", str(tape), "--store", f"sqlite:///{name}", "--json", *args, cwd=cwd, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    nothing_left(cwd)
    return json.loads(done.stdout)


def nothing_left(cwd: Path) -> None:
    assert below(cwd) == []
    assert list(cwd.glob("tapeline-*")) == []


@pytest.fixture(scope="module")
def calm(tape: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What an undisturbed replay says, and its store."""
    folder = tmp_path_factory.mktemp("calm")
    return replay(folder, tape, "calm.db"), folder / "calm.db"


def test_every_trade_is_accounted_for_and_batching_changes_nothing(
    tape: Path, calm: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    first = calm[0]
    shutil.copy(calm[1], tmp_path / "a.db")
    assert first["trades"] + sum(first["skipped"].values()) == TRADES
    assert first["candles_1m"] > 0
    assert first["dead_letters"] == 0
    second = replay(tmp_path, tape, "b.db", "--aggregators", "2", "--frame-records", "37")
    assert {k: second[k] for k in ("trades", "skipped", "late")} == {k: first[k] for k in ("trades", "skipped", "late")}
    held = rows(tmp_path / "a.db")
    assert len(held["candles_1m"]) > 0
    assert held == rows(tmp_path / "b.db")
    # Repeating it into the same store is harmless.
    replay(tmp_path, tape, "a.db")
    again = rows(tmp_path / "a.db")
    assert {t: again[t] for t in ("candles_1m", "candles_1s")} == {t: held[t] for t in ("candles_1m", "candles_1s")}


def test_the_summary_for_people(tape: Path, tmp_path: Path) -> None:
    done = tapeline("replay", str(tape), "--store", "sqlite:///p.db", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\d,\d{3} trades in [\d.]+ s .*; skipped: \d+ spread", done.stdout)
    assert done.stderr == ""
    assert "stored in sqlite:///p.db" in done.stdout


def test_on_another_redis_it_leaves_no_key(tape: Path, tmp_path: Path, redis_server: Any, bus: Any) -> None:
    before = set(bus.client.keys("*"))
    replay(tmp_path, tape, "r.db", "--redis", redis_server.url)
    assert set(bus.client.keys("*")) == before


def start(cwd: Path, tape: Path, *args: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-P", "-m", "shared.cli", "replay", str(tape), "--store", "sqlite:///k.db", *args]
    return subprocess.Popen(
        line, cwd=cwd, env=environ(cwd, TMPDIR=str(cwd)) , text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def stored(db: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM candles_1s").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def more_rows(db: Path, seen: int) -> int:
    until(lambda: stored(db) > seen + 20, 60, "rows in the midst")
    return stored(db)


def test_kills_in_the_midst_change_no_row(tape: Path, calm: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    process = start(tmp_path, tape, "--speed", "30", "--json")
    seen = 0
    for victim in ("redis-server", "ingest-files", "aggregate", "sink-sqlite"):
        seen = more_rows(tmp_path / "k.db", seen)
        target = next(p for p in below(tmp_path) if victim in " ".join(p.cmdline()) and "replay" not in p.cmdline())
        target.kill()
    assert process.poll() is None, "all of it happened in the midst"
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["trades"] == calm[0]["trades"]
    assert rows(tmp_path / "k.db") == rows(calm[1])
    nothing_left(tmp_path)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing(tape: Path, tmp_path: Path, signum: int, code: int) -> None:
    process = start(tmp_path, tape, "--speed", "1")
    until(lambda: any("redis-server" in p.name() for p in below(tmp_path)), 30, "the replay to run")
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "Traceback" not in err
    nothing_left(tmp_path)


def test_killed_it_leaves_nothing(tape: Path, tmp_path: Path) -> None:
    process = start(tmp_path, tape, "--speed", "1")
    until(lambda: any("redis-server" in p.name() for p in below(tmp_path)), 30, "the replay to run")
    process.kill()
    process.communicate(timeout=20)
    until(lambda: below(tmp_path) == [] and list(tmp_path.glob("tapeline-*")) == [], 15, "everything to go")


def test_a_truncated_file_is_one_line(tape: Path, tmp_path: Path) -> None:
    plain = tmp_path / "whole.dbn"
    assert tapeline("generate", str(plain), "--trades", "2000", cwd=tmp_path).returncode == 0
    short = tmp_path / "short.dbn"
    short.write_bytes(plain.read_bytes()[:-17])
    done = tapeline("replay", str(short), "--store", "sqlite:///t.db", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("tapeline: ")
    assert "short.dbn" in done.stderr
    nothing_left(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no tape at all, only text"])
def test_garbage_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.dbn").write_bytes(content)
    done = tapeline("replay", "odd.dbn", "--store", "sqlite:///t.db", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "odd.dbn" in done.stderr
    nothing_left(tmp_path)


def scan(file: Path) -> dict[str, tuple[float, ...]]:
    """{minute's end: (open, high, low, close, volume, trades)} by a plain walk over a DBN file's records."""
    minutes: dict[str, list[tuple[float, float]]] = {}
    for record in databento.DBNStore.from_bytes(file.read_bytes()):
        end = datetime.fromtimestamp((record.ts_event // 60_000_000_000 + 1) * 60, UTC)
        minutes.setdefault(f"{end:%Y-%m-%dT%H:%M:%SZ}", []).append((record.price / 1e9, record.size))
    return {
        end: (
            trades[0][0], max(p for p, _ in trades), min(p for p, _ in trades), trades[-1][0],
            sum(s for _, s in trades), len(trades),
        )
        for end, trades in minutes.items()
    }  # fmt: skip


def test_real_trades_minute_by_minute(shared_data: Path, tmp_path: Path) -> None:
    """Every calendar minute of a real hour is what a plain scan of the file gives; every row adds up."""
    file = shared_data / "databento" / "ESH4_tbbo_2023-12-25.dbn"
    found = replay(tmp_path, file, "es.db")
    assert found["trades"] == 2973
    with closing(sqlite3.connect(tmp_path / "es.db")) as connection:
        minutes = connection.execute(
            "SELECT time, open, high, low, close, volume, trades FROM candles_1m WHERE time LIKE '%:00Z'"
        ).fetchall()
        (odd,) = connection.execute(
            "SELECT count(*) FROM candles_1m WHERE vd != cvd_close - cvd_open OR complete != 1 OR revision != 0"
            " OR ask_volume + bid_volume + unknown_volume != volume"
        ).fetchone()
        (trades,) = connection.execute("SELECT sum(trades) FROM candles_1s").fetchone()
    assert {row[0]: row[1:] for row in minutes} == scan(file)
    assert len(minutes) == 60
    assert odd == 0
    assert trades == 2973


KINDS = {
    "trade": "trades", "book_snapshot": "books", "book_ticker": "books", "derivative_ticker": "tickers",
    "liquidation": "liquidations", "option_summary": "option_summaries",
}  # fmt: skip


def sources(cwd: Path, name: str, *tapes: str) -> dict[str, Any]:
    done = tapeline("replay", *tapes, "--store", f"sqlite:///{name}", "--json", cwd=cwd, TMPDIR=str(cwd))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    nothing_left(cwd)
    return json.loads(done.stdout)


def test_feeds_of_several_kinds_in_one_replay(tape: Path, tmp_path: Path) -> None:
    """DBN and normalized crypto together; each candle is what each tape alone gives."""
    messages = market(4000, step_us=80_000)
    write_ndjson(tmp_path / "crypto.ndjson", messages)
    found = sources(tmp_path, "both.db", "crypto.ndjson", str(tape))
    alone = replay(tmp_path, tape, "dbn.db")
    counts = Counter(KINDS[m["type"]] for m in messages)
    counts["trades"] += alone["trades"]
    assert {name: found[name] for name in counts} == dict(counts)
    assert (found["gaps"], found["dead_letters"]) == (0, 0)
    crypto = sources(tmp_path, "crypto.db", "crypto.ndjson")
    held, parts = rows(tmp_path / "both.db"), [rows(tmp_path / name) for name in ("dbn.db", "crypto.db")]
    assert crypto["candles_1m"] > 0
    for name in ("candles_1m", "candles_1s"):
        assert sorted(held[name], key=str) == sorted(parts[0][name] + parts[1][name], key=str)
    # Repeating it into the same store is harmless.
    assert sources(tmp_path, "both.db", str(tape), "crypto.ndjson")["trades"] == found["trades"]
    again = rows(tmp_path / "both.db")
    assert {t: again[t] for t in ("candles_1m", "candles_1s")} == {t: held[t] for t in ("candles_1m", "candles_1s")}


def test_csv_gives_the_rows_of_the_messages(tmp_path: Path) -> None:
    messages = market(4000, step_us=80_000)
    write_ndjson(tmp_path / "crypto.ndjson", messages)
    # Not named by the vendor: such a file ends with its last record, as the messages do.
    named = [path.rename(tmp_path / f"{n}-{path.name}") for n, path in enumerate(write(tmp_path, messages))]
    found = sources(tmp_path, "csv.db", *(path.name for path in named))
    wanted = sources(tmp_path, "ndjson.db", "crypto.ndjson")
    apart = ("seconds", "trades_per_second")
    assert {k: v for k, v in found.items() if k not in apart} == {k: v for k, v in wanted.items() if k not in apart}
    assert rows(tmp_path / "csv.db") == rows(tmp_path / "ndjson.db")
    assert len(rows(tmp_path / "csv.db")["candles_1m"]) > 0


def test_a_download_is_replayed_and_kept(tmp_path: Path) -> None:
    trades = [m for m in market(4000, step_us=80_000) if m["type"] == "trade" and m["exchange"] == "deribit"]
    archive = {("deribit", "trades", "2024-06-01", "BTC-PERPETUAL"): gzip.compress(text("trades", trades))}
    url = "tardis://deribit?symbols=BTC-USD&from=2024-06-01&to=2024-06-02"
    with Datasets(archive) as server:
        line = ("replay", url, "--store", "sqlite:///d.db", "--json")
        env = {"TAPELINE_TARDIS_DATASETS_URL": server.url, "TMPDIR": str(tmp_path)}
        for _ in range(2):
            done = tapeline(*line, cwd=tmp_path, **env)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["trades"] == len(trades)
        assert len(server.asked) == 1
        paid = tapeline(*(part.replace("06-02", "06-03") for part in line), cwd=tmp_path, **env)
    assert paid.returncode == 78
    assert re.fullmatch(r"tapeline: deribit trades of .* on 2024-06-02 needs a Tardis API key .*\n", paid.stderr)
    assert [p.name for p in tmp_path.glob(".tapeline/tardis/*")] == ["deribit_trades_2024-06-01_BTC-PERPETUAL.csv.gz"]
    nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("databento://GLBX.MDP3?symbols=ES.FUT&from=2024-01-02&to=2024-01-03", 78, "set DATABENTO_API_KEY"),
        ("tardis://deribit?symbol=BTC", 2, "unknown key 'symbol'"),
        ("odd.csv", 1, "is no Tardis CSV file"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(tmp_path: Path, source: str, code: int, said: str) -> None:
    (tmp_path / "odd.csv").write_text("time,price\n1,2\n")
    done = tapeline("replay", source, "--store", "sqlite:///t.db", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    nothing_left(tmp_path)
