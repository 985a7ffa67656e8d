"""A real Prometheus beside `tapeline up`: it finds and scrapes every worker, and what they tell fits together."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shared.metrics import BUS
from tests.e2e.test_up import START_SECONDS, Up, running
from tests.serving import ask
from tests.wait import until

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH"),
]


# What Prometheus counts of what it could not take.
REFUSED = (
    "prometheus_rule_evaluation_failures_total", "prometheus_target_scrapes_sample_duplicate_timestamp_total",
    "prometheus_target_scrapes_sample_out_of_order_total", "prometheus_notifications_dropped_total",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Prometheus:
    """A server with the committed configuration of `local.yml`, of another page and in more of a hurry."""

    def __init__(self, folder: Path, page: str) -> None:
        folder.mkdir()
        config = yaml.safe_load((FOLDER / "local.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / "rules" / "*.yml")]
        (found,) = config["scrape_configs"][0]["http_sd_configs"]
        found |= {"url": found["url"].replace("http://127.0.0.1:8000", page), "refresh_interval": "500ms"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.base, self.log = f"http://127.0.0.1:{port}", folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                 f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"],
                cwd=folder, stdout=log, stderr=log,
            )  # fmt: skip

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Instant vector: samples with `metric` and `value`; none while the server starts."""
        try:
            answer = ask(f"{self.base}/api/v1/query?{urlencode({'query': expr})}")
        except OSError:
            return []
        return list(answer.json["data"]["result"]) if answer.status == 200 else []

    def value(self, expr: str) -> float:
        """Of a vector of one; 0 for none."""
        return sum(float(found["value"][1]) for found in self.query(expr))

    def own(self, name: str) -> float:
        """The sum of a metric of the server itself."""
        families = text_string_to_metric_families(ask(f"{self.base}/metrics").body.decode())
        found = [sample.value for family in families for sample in family.samples if sample.name == name]
        assert found, f"Prometheus has no {name}"
        return sum(found)

    def workers(self, expr: str) -> set[str]:
        """The workers of a vector, as their supervisor calls them."""
        return {found["metric"]["worker"].partition("@")[0] for found in self.query(expr)}


@contextmanager
def scraping(folder: Path, page: str) -> Iterator[Prometheus]:
    made = Prometheus(folder, page)
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait(20)


def reaches(value: Callable[[], float], wanted: float, what: str) -> None:
    until(lambda: value() >= wanted, START_SECONDS, what)


def pid_of(up: Up, name: str) -> int:
    """Of a living worker, as its supervisor calls it."""
    return next((w["pid"] for w in up.status().get("workers", ()) if w["name"] == name and w["alive"]), 0)


def test_prometheus_finds_every_worker_and_what_they_tell_fits(tmp_path: Path) -> None:
    web = free_port()
    settings = {
        "TAPELINE_WEB_PORT": str(web), "TAPELINE_METRICS_PORT": str(free_port()), "TAPELINE_AGGREGATE_WORKERS": "2",
        "TAPELINE_REDIS_LEASE_SECONDS": "5",
    }  # fmt: skip
    page = f"http://127.0.0.1:{web}"
    with running(tmp_path, **settings) as up, scraping(tmp_path / "prometheus", page) as prometheus:
        up.grows()
        supervised = {line.split(": log ")[0] for line in up.out.read_text().splitlines() if ": log " in line}
        expected = supervised - {"redis"}
        assert expected == {"ingest-synthetic", "aggregate-1", "aggregate-2", "web", "sink-sqlite"}
        until(lambda: prometheus.workers("up == 1") == expected, START_SECONDS, f"all of {expected} to be scraped")
        fits(prometheus)
        until(lambda: told(prometheus) == BUS.keys(), START_SECONDS, "all of bus and store to be told")
        until(lambda: prometheus.workers("tapeline_bus_worker_up == 1") == expected, START_SECONDS, "all to be alive")
        assert prometheus.query('ALERTS{alertstate="firing"}') == []
        replaced(up, prometheus)
        until(lambda: prometheus.workers("up == 1") == expected, START_SECONDS, "all to be scraped again")
        until(lambda: prometheus.query("up == 0") == [], START_SECONDS, "no target to be down")
        assert {name: prometheus.own(name) for name in REFUSED} == dict.fromkeys(REFUSED, 0.0)


def told(prometheus: Prometheus) -> set[str]:
    """Names of what the web worker tells of bus and store."""
    found = prometheus.query('{__name__=~"tapeline_(bus|store)_.+"}')
    return {one["metric"]["__name__"].removesuffix("_total") for one in found}


def fits(prometheus: Prometheus) -> None:
    """What was published, committed, and counted on the bus is the same: each catches up with the others."""

    def published() -> float:
        return prometheus.value("sum(tapeline_ingest_published_records_total)")

    def committed() -> float:
        return prometheus.value('sum(tapeline_stage_records_total{stage="aggregate"})')

    def on_the_bus() -> float:
        return prometheus.value('sum(tapeline_bus_stream_records_total{topic="ticks"})')

    until(committed, START_SECONDS, "something to be committed")
    reaches(published, committed(), "nothing to be committed that was not published")
    reaches(committed, published(), "what was published to be committed")
    reaches(published, on_the_bus(), "nothing to be on the bus that was not published")
    reaches(on_the_bus, published(), "what was published to be on the bus")
    lags = until(lambda: prometheus.query('tapeline_bus_lag_seconds{topic="ticks"}'), START_SECONDS, "lags")
    assert {lag["metric"]["consumer"] for lag in lags} == {"aggregate"}
    assert all(0 <= float(lag["value"][1]) < START_SECONDS for lag in lags)


def replaced(up: Up, prometheus: Prometheus) -> None:
    """A killed worker is started again, and its successor scraped."""
    began = 'process_start_time_seconds{worker=~"aggregate-1@.*"}'
    before = until(lambda: prometheus.value(began), START_SECONDS, "when aggregate-1 began")
    os.kill(until(lambda: pid_of(up, "aggregate-1"), START_SECONDS, "a living aggregate-1"), signal.SIGKILL)
    until(lambda: prometheus.query(f"{began} > {before}"), START_SECONDS, "its successor to be scraped")
