"""What is provisioned for Prometheus: it loads, its alerts fire when they shall, and it names only what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from shared import registry
from shared.settings import Settings, Web
from tests.deploy.known_metrics import known_metrics, metrics_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "rules" / "tapeline.yml"
CONFIGS = ("prometheus.yml", "local.yml")
# What the scrape configurations put on each target.
TARGET = {"job", "instance", "service", "worker"}
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in loaded(RULES)["groups"] for rule in group["rules"]]


EACH = pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])


def run(*args: str) -> None:
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_accepts_the_configurations_and_their_rules() -> None:
    run("check", "config", *(str(FOLDER / name) for name in CONFIGS))


@promtool
def test_alerts_fire_when_they_shall_and_only_then() -> None:
    run("test", "rules", str(Path(__file__).parent / "rules_test.yml"))


def test_every_alert_is_tested() -> None:
    text = (Path(__file__).parent / "rules_test.yml").read_text()
    assert [a["alert"] for a in alerts() if f'ALERTS{{alertname="{a["alert"]}"' not in text] == []


@EACH
def test_an_alert_reads_only_what_there_is(alert: dict[str, Any]) -> None:
    known = known_metrics()
    read = metrics_of(alert["expr"])
    assert read
    for metric, labels in read:
        assert metric in known, metric
        assert labels <= known[metric] | TARGET, (metric, labels)


def test_states_and_results_that_alerts_select_exist() -> None:
    """A label's value that no worker ever sets would make an alert that never fires."""
    code = "\n".join(p.read_text() for folder in ("shared", "services") for p in (ROOT / folder).rglob("*.py"))
    for alert in alerts():
        for name, value in re.findall(r'\b(\w+)=~?"([^"$]+)"', alert["expr"]):
            if name != "job":
                assert [v for v in value.split("|") if f'"{v}"' not in code] == [], (alert["alert"], name)


@EACH
def test_an_alert_says_what_to_do_and_where_that_is_written(alert: dict[str, Any]) -> None:
    assert re.fullmatch(r"Tapeline[A-Z]\w+", alert["alert"])
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    told = alert["annotations"]
    assert set(told) == {"summary", "description", "runbook"}
    assert told["runbook"] == f"docs/runbook.md#{alert['alert'].lower()}"
    assert not told["summary"].endswith(".")
    assert told["description"].endswith(".")
    assert "\n" not in told["description"]


@EACH
def test_the_texts_name_only_labels_that_the_alert_has(alert: dict[str, Any]) -> None:
    named = set(re.findall(r"\$labels\.(\w+)", str(alert["annotations"])))
    known = known_metrics()
    has = TARGET.union(*(known[metric] for metric, _ in metrics_of(alert["expr"])))
    has |= set(re.findall(r'"(\w+)", "\$1"', alert["expr"]))  # made by label_replace
    kept = set(kept_labels(promql.parse(alert["expr"])))
    assert named <= has & kept if kept else named <= has


def kept_labels(node: Any) -> list[str]:
    """Labels that an expression's aggregations keep; none when it has no aggregation."""
    if isinstance(node, promql.AggregateExpr):
        return list(node.modifier.labels) if node.modifier else []
    if isinstance(node, promql.BinaryExpr):
        right = [] if str(node.op) in ("and", "unless", "/", "-") else kept_labels(node.rhs)
        return kept_labels(node.lhs) + right
    if isinstance(node, promql.Call):
        return [label for arg in node.args for label in kept_labels(arg)]
    if isinstance(node, promql.ParenExpr):
        return kept_labels(node.expr)
    return []


def test_names_are_given_once() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_keeps_the_labels_of_the_metrics(name: str) -> None:
    config = loaded(FOLDER / name)
    assert config["rule_files"] == ["rules/*.yml"]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "tapeline"
    assert job["honor_labels"] is True, "else the workers that the web worker tells of would all be called web"


def test_prometheus_without_containers_asks_the_page() -> None:
    (found,) = loaded(FOLDER / "local.yml")["scrape_configs"][0]["http_sd_configs"]
    assert found["url"] == f"http://{Web().host}:{Web().port}/api/v1/metrics/targets"


def test_prometheus_in_containers_looks_for_every_worker_of_the_compose_file() -> None:
    (found,) = loaded(FOLDER / "prometheus.yml")["scrape_configs"][0]["dns_sd_configs"]
    assert (found["type"], found["port"]) == ("A", Settings().metrics.port)
    services = loaded(ROOT / "deploy" / "compose.yml")["services"]
    workers = {name for name, service in services.items() if str(found["port"]) in service.get("expose", ())}
    assert set(found["names"]) == workers
    assert workers <= registry.SERVICES.keys()


def test_the_runbook_has_an_entry_for_each_alert() -> None:
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert [alert["alert"] for alert in alerts() if alert["alert"] not in headings] == []
