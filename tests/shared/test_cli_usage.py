"""`tapeline usage`: the bus, the store and what commands bought, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from shared.bus import Bus
from shared.cli import App
from shared.cli_usage import usage
from shared.frames import NS
from shared.messages import Usage
from shared.settings import load
from shared.usage import DAY_NS, MIB, Totals, day_of, now_ns
from tests.shared.usage_store import keep_daily


def show(folder: Path, *args: str, **environ: str) -> Result:
    app = App(None)
    given = {"DATABASE_URL": f"sqlite:///{folder / 'rows.db'}", "TAPELINE_STATE_DIR": str(folder / "state")}
    app.__dict__["settings"] = load(environ=given | environ)
    return CliRunner().invoke(usage, args, obj=app)


def row(feed: str, days_ago: int, at_ns: int = 0, **more: Any) -> Usage:
    at = now_ns() - days_ago * DAY_NS
    totals = {"day_events": 10, "day_bytes": 3 * MIB, "day_connected_seconds": 5400.0, "day_cost_usd": 1.25} | more
    return Usage(feed, day_of(at), at_ns or at, 0, 0, 0.0, 0.0, **({"budget_usd": 25.0} | totals))


def test_nothing_at_all_is_a_plain_line(tmp_path: Path) -> None:
    shown = show(tmp_path)
    assert (shown.exit_code, shown.output) == (0, "nothing was used in the last 7 days\n")
    assert show(tmp_path, "--days", "1").output == "nothing was used today\n"
    assert json.loads(show(tmp_path, "--json").output) == []


def test_the_largest_account_of_a_day_is_right(bus: Bus, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    keep_daily(
        url, row("databento", 0, day_events=7), row("databento", 2, day_events=9, state="stopped"),
        row("databento", 9), row("synthetic", 1, budget_usd=0.0, day_cost_usd=0.0),
    )  # fmt: skip
    bus.call("hset", bus.keys.feeds, "databento", "{}")
    today = row("databento", 0, now_ns() + NS, day_events=1_234_567, day_cost_usd=20.0, state="stopped")
    bus.call("hset", bus.keys.usage("databento"), today.day, msgspec.json.encode(today))
    spent = tmp_path / "state" / "databento" / "spent.json"
    spent.parent.mkdir(parents=True)
    spent.write_bytes(msgspec.json.encode({today.day: Totals(5, 80, 0.0, 0.5)}))
    live = {"REDIS_URL": bus.url, "TAPELINE_NAMESPACE": bus.keys.namespace}
    shown = show(tmp_path, **live)
    assert shown.exit_code == 0
    head, *lines = shown.output.splitlines()
    assert head.split() == ["day", "feed", "events", "MiB", "hours", "cost", "budget", "share", "state"]
    yesterday, before = (day_of(now_ns() - n * DAY_NS) for n in (1, 2))
    assert [line.split() for line in lines] == [
        [today.day, "databento", "1,234,567", "3.0", "1.50", "$20.0000", "$25.00", "80%", "stopped"],
        [today.day, "databento:history", "5", "0.0", "0.00", "$0.5000", "$25.00", "2%", "running"],
        [yesterday, "synthetic", "10", "3.0", "1.50", "$0.0000", "-", "-", "running"],
        [before, "databento", "9", "3.0", "1.50", "$1.2500", "$25.00", "5%", "stopped"],
    ]
    records = json.loads(show(tmp_path, "--json", "--days", "30", **live).output)
    assert len(records) == 5
    assert records[0] == {
        "day": today.day, "feed": "databento", "events": 1_234_567, "bytes": 3 * MIB, "mib": 3.0,
        "connected_seconds": 5400.0, "hours": 1.5, "cost_usd": 20.0, "budget_usd": 25.0, "share": 0.8,
        "state": "stopped", "at": records[0]["at"],
    }  # fmt: skip
    # Without the bus, the store knows the most.
    alone = json.loads(show(tmp_path, "--json").output)
    assert [r["events"] for r in alone if r["feed"] == "databento"] == [7, 9]


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0"])
def test_what_does_not_answer_is_said(tmp_path: Path, url: str) -> None:
    keep_daily(f"sqlite:///{tmp_path / 'rows.db'}", row("databento", 0))
    shown = show(tmp_path, REDIS_URL=url)
    assert shown.exit_code == 0
    assert "not all is known: Redis at 127.0.0.1:1/0 does not answer" in shown.stderr
    assert "databento" in shown.stdout
