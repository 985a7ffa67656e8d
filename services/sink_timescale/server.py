"""What a PostgreSQL server offers to the store: TimescaleDB or not, which build of it, and what that lacks."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# What each feature's absence means, for people.
MEANING = {
    "hypertables": "plain tables",
    "columnstore": "no compression",
    "retention": "no retention",
    "continuous aggregates": "roll-ups are plain views",
}


class Server(NamedTuple):
    """What there is. `schema` (the store's) and `functions` (TimescaleDB's) are quoted.

    `version` of the installed TimescaleDB, () for none; `offered`: it could be installed; `preloaded`: the server
    was started with it; `apache`: without what only the Community licence allows.
    """

    schema: str
    version: tuple[int, ...] = ()
    functions: str = ""
    offered: bool = False
    preloaded: bool = False
    apache: bool = False

    @property
    def told(self) -> str:
        """The version as text."""
        return ".".join(map(str, self.version))

    @property
    def lacks(self) -> dict[str, str]:
        """Feature -> why it cannot be on."""
        if not self.version:
            why = "TimescaleDB is not installed"
            if self.offered and not self.preloaded:
                why += " (add timescaledb to shared_preload_libraries and restart the server)"
            return dict.fromkeys(MEANING, why)
        told = f"TimescaleDB {self.told}"
        if self.version < (2, 13):
            return dict.fromkeys(MEANING, f"{told} is older than 2.13")
        if self.apache:
            why = "the Apache build of TimescaleDB is without the columnstore, retention and continuous aggregates"
            return {feature: why for feature in MEANING if feature != "hypertables"}
        return {"columnstore": f"{told} is older than 2.18"} if self.version < (2, 18) else {}


async def look(connection: Any) -> Server:
    """What this server and database have."""
    row = await connection.fetchrow(
        """
        SELECT quote_ident(current_schema()) AS schema, extversion AS version, quote_ident(nspname) AS functions,
            EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb') AS offered,
            current_setting('timescaledb.max_background_workers', true) IS NOT NULL AS preloaded,
            current_setting('timescaledb.license', true) = 'apache' AS apache
        FROM (SELECT) AS one
        LEFT JOIN pg_extension ON extname = 'timescaledb' LEFT JOIN pg_namespace n ON n.oid = extnamespace
        """
    )
    version = tuple(map(int, re.findall(r"\d+", (row["version"] or "").partition("-")[0])))
    offered, preloaded = bool(row["offered"]), bool(row["preloaded"])
    return Server(row["schema"], version, row["functions"] or "", offered, preloaded, bool(row["apache"]))
