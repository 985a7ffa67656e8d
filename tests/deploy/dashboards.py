"""Grafana's dashboards as files, and what Grafana makes of their queries before it sends them.

The macros are those of Grafana's PostgreSQL data source; what is not known here fails, as it would there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
# Of Grafana: a macro's arguments end at the first bracket.
_MACRO = re.compile(r"\$([_a-zA-Z0-9]+)\(([^)]*)\)")
_VARIABLE = re.compile(r"\$\{(\w+)(?::(\w+))?\}|\$(\w+)")
BUILT_IN = {"__interval", "__interval_ms", "__rate_interval"}

Values = Mapping[str, Sequence[str]]


class Query(NamedTuple):
    """A query, where it stands, and the panel it fills (None: a variable or an annotation)."""

    where: str
    text: str
    datasource: dict[str, str]
    panel: dict[str, Any] | None
    form: str


def load(path: Path) -> dict[str, Any]:
    """A dashboard."""
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return made


def queries(dashboard: dict[str, Any]) -> Iterator[Query]:
    """All of a dashboard: of its variables, in their order, its annotations and its panels."""
    title = dashboard["title"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
            yield Query(f"{title}: variable {variable['name']}", text, variable["datasource"], None, "variable")
    for annotation in dashboard["annotations"]["list"]:
        if not annotation.get("builtIn"):
            text, source = annotation["target"]["rawSql"], annotation["datasource"]
            yield Query(f"{title}: annotation {annotation['name']}", text, source, None, "annotation")
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            text = target.get("expr") or target["rawSql"]
            where = f"{title}: {panel['title']}, {target['refId']}"
            yield Query(where, text, target["datasource"], panel, target.get("format", "time_series"))


def variables_of(text: str) -> set[str]:
    """Variables that a text names."""
    without_macros = _MACRO.sub("", text)
    return {a or b for a, _, b in _VARIABLE.findall(without_macros)} - BUILT_IN


def promql(text: str) -> str:
    """An expression with Grafana's variables put in."""
    return _VARIABLE.sub(lambda found: {"__rate_interval": "1m", "1": "$1"}.get(found[3], ".*"), text)


def sql(text: str, values: Values, start: datetime, end: datetime, interval_ms: int) -> str:
    """A statement with variables and macros put in. Raises KeyError for those that Grafana would not know."""

    def variable(found: re.Match[str]) -> str:
        if found[3] == "__interval_ms":
            return str(interval_ms)
        assert found[2] == "sqlstring", f"{found[0]} is not quoted: say ${{{found[1] or found[3]}:sqlstring}}"
        return ",".join("'" + value.replace("'", "''") + "'" for value in values[found[1]])

    def macro(found: re.Match[str]) -> str:
        first, last = (f"'{at:%Y-%m-%dT%H:%M:%S.%fZ}'" for at in (start, end))
        made = {"__timeFilter": f"{found[2]} BETWEEN {first} AND {last}", "__timeFrom": first, "__timeTo": last}
        return made[found[1]]

    return _MACRO.sub(macro, re.sub(r"\$\{(\w+)(?::(\w+))?\}|\$(\w+)(?!\w|\()", variable, text))
