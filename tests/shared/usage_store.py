"""A store with the days of some feeds, as a sink would have written them."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from shared.frames import iso
from shared.messages import Usage
from shared.stores import parse


def keep_daily(url: str, *messages: Usage) -> None:
    """Put these days into `usage_daily`."""
    with closing(sqlite3.connect(parse(url).path)) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS usage_daily (feed TEXT, day TEXT, at TEXT, events INTEGER, bytes INTEGER, "
            "connected_seconds REAL, cost_usd REAL, state TEXT, budget_usd REAL, PRIMARY KEY (feed, day))"
        )
        connection.executemany(
            "INSERT OR REPLACE INTO usage_daily VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (m.feed, m.day, iso(m.at_ns), m.day_events, m.day_bytes, m.day_connected_seconds, m.day_cost_usd,
                 m.state, m.budget_usd)
                for m in messages
            ],
        )  # fmt: skip
