"""`tapeline instruments` on a real bus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from shared.bus import Bus
from shared.instrument_days import DAY_NS, new_versions
from shared.instruments import instrument_id, partition_of
from shared.messages import Instrument
from tests.shared.test_cli import tapeline

D0 = 1_715_212_800 * 10**9  # 2024-05-09


def instrument(symbol: str, root: str, kind: str, venue: str = "GLBX.MDP3", **more: Any) -> Instrument:
    return Instrument(instrument_id(venue, symbol), venue, symbol, root, more.pop("feed", "files"), kind=kind, **more)


def call(strike: float, days: int, **more: Any) -> Instrument:
    fields = {"underlying": "NQM4", "multiplier": 20.0, "tick_size": 0.25, "defined_ns": D0}
    symbol = f"Q{days}AK4 C{strike:g}"
    return instrument(
        symbol, "NQ", "C", strike=strike, expiration_ns=D0 + days * DAY_NS + 72_000 * 10**9, **(fields | more)
    )


FOUND = [
    call(18_050, 4), call(18_000, 4), call(17_000.5, 1),
    instrument("NQM4", "NQ", "F", expiration_ns=D0 + 43 * DAY_NS, estimated=True),
    instrument("ESM4 P5230", "ES", "?"),
    instrument("BTC-28JUN24-70000-P", "deribit:BTC", "P", "deribit", strike=70_000.0, expiration_ns=D0 + 50 * DAY_NS,
               underlying="SYN.BTC-28JUN24", feed="tardis:deribit", defined_ns=D0 + DAY_NS, multiplier=1.0),
    instrument("BTC-PERPETUAL", "deribit:BTC", "F", "deribit", feed="tardis:deribit"),
]  # fmt: skip


def fill(bus: Bus, before: list[Instrument] | None = None) -> None:
    bus.deploy(4)
    for i in FOUND:
        p = partition_of(i.root, 4)
        bus.call("hset", bus.keys.instruments(p), i.id, msgspec.json.encode(i))
        mine = [b for b in before or [] if b.id == i.id]
        if fields := new_versions([*mine, i], {}):
            bus.call("hset", bus.keys.instrument_days(p), mapping=fields)


def run(bus: Bus, cwd: Path, *args: str) -> str:
    done = tapeline("instruments", *args, cwd=cwd, REDIS_URL=bus.url, TAPELINE_NAMESPACE=bus.keys.namespace)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def symbols(text: str) -> list[str]:
    return [json.loads(line)["symbol"] for line in text.splitlines()]


def test_a_table_by_root_and_expiration(bus: Bus, tmp_path: Path) -> None:
    assert run(bus, tmp_path) == "the bus knows no instrument yet\n"
    fill(bus)
    lines = run(bus, tmp_path).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "symbol", "ESM4 P5230", "NQM4", "Q1AK4 C17000.5", "Q4AK4 C18000", "Q4AK4 C18050", "BTC-PERPETUAL",
        "BTC-28JUN24-70000-P",
    ]  # fmt: skip
    assert lines[0].split() == [
        "symbol", "type", "strike", "expiration", "underlying", "root", "multiplier", "tick", "defined", "feed",
    ]  # fmt: skip
    cells = "Q1AK4 C17000.5 C 17000.5 2024-05-10 NQM4 NQ 20 0.25 2024-05-09 files"
    assert lines[3].split() == cells.split()
    assert "~2024-06-21" in lines[2], "an estimate"
    assert lines[1].split() == ["ESM4", "P5230", "?", "-", "-", "-", "ES", "-", "-", "-", "files"], "nothing made up"


def test_chosen(bus: Bus, tmp_path: Path) -> None:
    fill(bus)
    of_nq = ["NQM4", "Q1AK4 C17000.5", "Q4AK4 C18000", "Q4AK4 C18050"]
    for args, wanted in (
        (("--underlying", "nq"), of_nq),
        (("--underlying", "NQM4"), of_nq[1:]),
        (("--underlying", "BTC"), ["BTC-PERPETUAL", "BTC-28JUN24-70000-P"]),
        (("--underlying", "deribit:btc", "--kind", "P"), ["BTC-28JUN24-70000-P"]),
        (("--kind", "C", "--expiration", "2024-05-13"), of_nq[2:]),
        (("--kind", "?"), ["ESM4 P5230"]),
    ):
        assert symbols(run(bus, tmp_path, *args, "--json")) == wanted
    assert run(bus, tmp_path, "--kind", "K") == "no such instrument on the bus\n"
    assert run(bus, tmp_path, "--kind", "K", "--json") == ""
    row = json.loads(run(bus, tmp_path, "--expiration", "2024-05-10", "--json"))
    assert row == {
        "symbol": "Q1AK4 C17000.5", "type": "C", "strike": 17_000.5, "expiration": "2024-05-10", "underlying": "NQM4",
        "root": "NQ", "multiplier": 20.0, "tick": 0.25, "defined": "2024-05-09", "feed": "files",
        "venue": "GLBX.MDP3", "expiration_ns": FOUND[2].expiration_ns, "estimated": False, "defined_ns": D0,
        "id": FOUND[2].id,
    }  # fmt: skip


def test_as_of_a_day(bus: Bus, tmp_path: Path) -> None:
    fill(bus, [call(18_000, 4, tick_size=0.5, defined_ns=D0 - 5 * DAY_NS)])

    def ticks(day: str) -> dict[str, float]:
        rows = map(json.loads, run(bus, tmp_path, "--kind", "C", "--at", day, "--json").splitlines())
        return {row["symbol"]: row["tick"] for row in rows}

    assert ticks("2024-05-03") == {}
    assert ticks("2024-05-08") == {"Q4AK4 C18000": 0.5}
    assert ticks("2024-05-10") == {"Q1AK4 C17000.5": 0.25, "Q4AK4 C18000": 0.25, "Q4AK4 C18050": 0.25}
    assert ticks("2024-05-11") == {"Q4AK4 C18000": 0.25, "Q4AK4 C18050": 0.25}
    wrong = tapeline("instruments", "--at", "tomorrow", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "'tomorrow' is no day such as 2026-12-18" in wrong.stderr
