"""Option tapes as real DBN through the whole pipeline: exactly what was planted comes out, whoever is killed."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from contextlib import closing
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from services.ingest.synthetic_chain import Option
from services.ingest.synthetic_dbn import metadata, write_file
from services.ingest.synthetic_options import OptionTape, TapeOptions, build
from shared.calendar import GLOBEX
from shared.frames import NS, iso
from tests.chaos.test_same_table import Tables, begin, disturbed, same, tables, workers
from tests.e2e.test_replay import nothing_left
from tests.shared.test_cli import OPTIONS, tapeline
from tests.wait import until

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

Files = tuple[Path, Path]
LEAN = {**OPTIONS, "TAPELINE_AGGREGATE_TIMEFRAMES": "1m", "TAPELINE_AGGREGATE_CANDLES_1S": "false"}


def made(folder: Path, **options: Any) -> tuple[OptionTape, Files]:
    tape = build(TapeOptions(**options))
    return tape, tape.write(folder)


@pytest.fixture(scope="module")
def tape(tmp_path_factory: pytest.TempPathFactory) -> tuple[OptionTape, Files]:
    return made(tmp_path_factory.mktemp("options"))


def bring(verb: str, files: Files, db: Path, *args: str) -> dict[str, Any]:
    line = (verb, *map(str, files), "--store", f"sqlite:///{db.name}", "--json", *args)
    done = tapeline(*line, cwd=db.parent, TMPDIR=str(db.parent), **LEAN)
    assert done.returncode == 0, done.stderr
    nothing_left(db.parent)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def calm(tape: tuple[OptionTape, Files], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed replay; the definitions are named last."""
    db = tmp_path_factory.mktemp("calm") / "calm.db"
    summary = bring("replay", (tape[1][1], tape[1][0]), db)
    assert summary["skipped"].keys() == {"spread"}
    assert summary["pressure"] > 5000
    assert summary["dead_letters"] == 0
    return db


def rows(db: Path, query: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(db)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]


def verdicts(db: Path) -> Counter[tuple[Any, ...]]:
    found = rows(db, "SELECT * FROM signals")
    return Counter(
        (s["underlying"], s["expiration"], s["strike"], s["option_type"], s["time_window"], s["direction"], s["status"])
        for s in found
    )


def planted(tape: OptionTape) -> Counter[tuple[Any, ...]]:
    return Counter(
        (p.underlying, iso(p.expiration_ns)[:19] + "Z", p.strike, p.option_type, iso(window)[:19] + "Z", p.direction,
         "rejected" if p.event == "straddle" else "emitted")
        for p in tape.planted
        for window in p.windows
    )  # fmt: skip


def test_exactly_the_planted_signals_come_out(tape: tuple[OptionTape, Files], calm: Path) -> None:
    assert verdicts(calm) == planted(tape[0])
    found = rows(calm, "SELECT * FROM signals")
    assert max(s["score"] for s in found) >= 0.95
    assert {s["baseline"] for s in found} == {"key_time"}
    of = {(s["expiration"], s["strike"], s["option_type"], s["time_window"]): s for s in found}
    for p in tape[0].planted:
        s = of[iso(p.expiration_ns)[:19] + "Z", p.strike, p.option_type, iso(p.windows[-1])[:19] + "Z"]
        if p.event in ("sweep", "block"):
            assert s["type"] == p.event
        if p.event == "cluster":
            assert s["cluster_size"] == 3
        if p.event == "straddle":
            assert s["status"] == "rejected"
            assert s["reason"].startswith("market maker: straddle score 0.9")
    assert {s["status"] for s in found} == {"emitted", "rejected"}


def test_pressure_covers_every_expiry_and_joins_weeklies(tape: tuple[OptionTape, Files], calm: Path) -> None:
    found = rows(calm, "SELECT * FROM pressure_metrics")
    assert {r["underlying"] for r in found} == {"ES", "NQ"}
    expirations = {r["expiration"] for r in found}
    assert len(expirations) > 15, "0DTE of every session, weeklies, quarterlies"
    assert sum(r["total_trades"] for r in found) == _option_trades(tape[0])
    only_buys = [r for r in found if r["bid_volume"] == 0]
    assert only_buys
    assert all(r["pressure_ratio"] is None and math.isfinite(r["log_ratio"]) for r in only_buys)
    assert all(
        value is None or not isinstance(value, float) or math.isfinite(value)
        for name in ("pressure_metrics", "pressure_rollups", "signals")
        for r in rows(calm, f"SELECT * FROM {name}")
        for value in r.values()
    )
    assert sum(r["delta"] is not None for r in found) > len(found) // 2, "the forward is on the bus"
    together = rows(calm, "SELECT underlying, time_window, sum(premium) AS premium, count(*) AS strikes, "
                          "sum(total_trades) AS trades FROM pressure_metrics GROUP BY 1, 2")  # fmt: skip
    rolled = {(r["underlying"], r["time_window"]): r for r in rows(calm, "SELECT * FROM pressure_rollups")}
    assert len(rolled) == len(together) > 200
    for r in together:
        rollup = rolled[r["underlying"], r["time_window"]]
        assert (rollup["strikes"], rollup["total_trades"]) == (r["strikes"], r["trades"])
        assert rollup["premium"] == pytest.approx(r["premium"], rel=1e-12)


def _option_trades(tape: OptionTape) -> int:
    """Trades of options, counted from the tape's own listings."""
    options = {listing.native for listing in tape.listings if isinstance(listing, Option)}
    return sum(int(number) in options for number in tape.records["instrument_id"])


def test_backfill_gives_the_same_rows(tape: tuple[OptionTape, Files], calm: Path, tmp_path: Path) -> None:
    bring("backfill", tape[1], tmp_path / "b.db")
    same(tmp_path / "b.db", tables(calm))
    before = tables(tmp_path / "b.db", but=frozenset())
    bring("backfill", tape[1], tmp_path / "b.db")
    assert tables(tmp_path / "b.db", but=frozenset()) == before, "a repeat changes nothing"


def test_a_mirrored_tape_has_mirrored_signals(calm: Path, tmp_path: Path) -> None:
    mirrored, files = made(tmp_path, mirror=True)
    bring("backfill", files, tmp_path / "m.db")
    assert verdicts(tmp_path / "m.db") == planted(mirrored)
    other = {"BUY": "SELL", "SELL": "BUY"}
    turned = {
        (s["underlying"], s["expiration"], s["strike"], s["option_type"], s["time_window"]):
        (other[s["direction"]], s["score"], s["grade"], s["types"], s["status"])
        for s in rows(calm, "SELECT * FROM signals")
    }  # fmt: skip
    assert turned == {
        (s["underlying"], s["expiration"], s["strike"], s["option_type"], s["time_window"]):
        (s["direction"], s["score"], s["grade"], s["types"], s["status"])
        for s in rows(tmp_path / "m.db", "SELECT * FROM signals")
    }  # fmt: skip


def test_quiet_days_stay_quiet(tmp_path: Path) -> None:
    _, files = made(tmp_path, events=())
    assert bring("backfill", files, tmp_path / "q.db")["signals"] == 0


def test_kills_change_no_row(tape: tuple[OptionTape, Files], calm: Path, tmp_path: Path) -> None:
    """kill -9 of each in turn, each after another tenth of the windows is stored."""
    wanted: Tables = tables(calm)
    every = len(wanted["pressure_rollups"]) // 10

    def windows() -> int:
        try:
            return int(rows(tmp_path / "x.db", "SELECT count(*) AS n FROM pressure_rollups")[0]["n"])
        except sqlite3.OperationalError:
            return 0

    def kill() -> None:
        victims = cycle(("pressure", "signals", "redis", "sink-sqlite"))
        for number, victim in zip(range(1, 9), victims, strict=False):
            until(lambda: windows() >= number * every, 60, "more windows")  # noqa: B023
            until(lambda: workers(tmp_path, victim), 20, f"a living {victim}")[0].kill()  # noqa: B023

    process = begin(tmp_path, tape[1], "max", 1, **LEAN)
    disturbed(process, tmp_path, kill)
    same(tmp_path / "x.db", wanted)


def write_part(tape: OptionTape, path: Path, start_ns: int, end_ns: int) -> None:
    """The trades of [start_ns, end_ns) as a file of their own."""
    times = tape.records["ts_event"]
    part = tape.records[(times >= start_ns) & (times < end_ns)]
    head = metadata(GLOBEX, "tbbo", start_ns, end_ns, tape.listings, tape.lives)
    write_file(path, head, BytesIO(part.tobytes()))


def test_signals_go_on_from_a_store_that_has_their_history(tape: tuple[OptionTape, Files], tmp_path: Path) -> None:
    """The last session alone knows no baseline; behind the other sessions' store it gives the same signals."""
    whole = tape[0]
    last_day = whole.planted[0].windows[0] // (86_400 * NS) * 86_400 * NS
    first, last = (tmp_path / name for name in ("first.dbn", "last.dbn"))
    write_part(whole, first, whole.start_ns, last_day)
    write_part(whole, last, last_day, whole.end_ns)
    bring("backfill", (tape[1][0], last), tmp_path / "alone.db")
    assert all(s["baseline"] != "key_time" for s in rows(tmp_path / "alone.db", "SELECT baseline FROM signals"))
    bring("backfill", (tape[1][0], first), tmp_path / "two.db")
    bring("replay", (tape[1][0], last), tmp_path / "two.db")
    assert verdicts(tmp_path / "two.db") == planted(whole)
