"""The metrics that there are, as Prometheus scrapes them, and those that a PromQL expression reads.

What is provisioned for Prometheus and Grafana is compared with shared/metrics.py by these.
"""

from __future__ import annotations

from collections.abc import Set

import promql_parser as promql
from prometheus_client import PROCESS_COLLECTOR
from prometheus_client.metrics import MetricWrapperBase

from shared import metrics

# What Prometheus puts on every series; `service` by deploy/prometheus/, where the metric has none of its own.
TARGET = frozenset({"job", "instance", "service"})
BUILT_IN = {  # of Prometheus itself, for every target
    "up": TARGET,
    "scrape_duration_seconds": TARGET,
    "scrape_samples_scraped": TARGET,
    "ALERTS": TARGET | {"alertname", "alertstate", "severity"},
}
_ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_FILTERS = {"and", "unless"}  # the right side only says which series of the left stay


def known_metrics() -> dict[str, frozenset[str]]:
    """Every metric by its name as scraped, and the labels it has; `le` of a histogram's buckets among them."""
    known = dict(BUILT_IN)
    for family in PROCESS_COLLECTOR.collect():
        for sample in family.samples:
            known[sample.name] = TARGET
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            labels = TARGET | set(metric._labelnames)
            [described] = list(metric.describe())
            _add(known, described.name, described.type, labels)
    for name, told in metrics.BUS.items():
        _add(known, name.removesuffix("_total"), told.kind, TARGET | set(told.labels))
    return known


def _add(known: dict[str, frozenset[str]], name: str, kind: str, labels: frozenset[str]) -> None:
    for ending in _ENDINGS[kind]:
        known[name + ending] = labels | {"le"} if ending == "_bucket" else labels


def metrics_of(expr: str) -> list[tuple[str, frozenset[str]]]:
    """Each selector of a PromQL expression: the metric, and the labels that the expression needs of it.

    Needed are the labels that are matched, and those that an aggregation or a join around it names.
    Raises ValueError when the expression does not parse, or selects without a metric's name.
    """
    return _walk(promql.parse(expr), frozenset())


def _walk(node: object, needed: Set[str]) -> list[tuple[str, frozenset[str]]]:
    """Selectors under a node of which the nodes above need these labels."""
    if isinstance(node, promql.MatrixSelector):
        return _walk(node.vector_selector, needed)
    if isinstance(node, promql.VectorSelector):
        matched = [m.name for m in node.matchers.matchers]
        if not node.name or "__name__" in matched or node.matchers.or_matchers:
            raise ValueError(f"no plain metric name in {node.prettify()}")
        return [(node.name, frozenset(needed | set(matched)))]
    if isinstance(node, promql.AggregateExpr):
        named = set(node.modifier.labels) if node.modifier else set()
        return _walk(node.expr, needed | named) + _walk(node.param, frozenset())
    if isinstance(node, promql.Call):
        return _call(node, needed)
    if isinstance(node, promql.BinaryExpr):
        return _binary(node, needed)
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        return _walk(node.expr, needed)
    return []  # a number, a text, nothing


def _call(node: promql.Call, needed: Set[str]) -> list[tuple[str, frozenset[str]]]:
    """Selectors among a function's arguments; label_replace and label_join make a label of others."""
    texts = [arg.val for arg in node.args if isinstance(arg, promql.StringLiteral)]
    if node.func.name == "label_replace":
        needed = (needed - {texts[0]}) | {texts[2]}
    elif node.func.name == "label_join":
        needed = (needed - {texts[0]}) | set(texts[2:])
    return [found for arg in node.args for found in _walk(arg, needed)]


def _binary(node: promql.BinaryExpr, needed: Set[str]) -> list[tuple[str, frozenset[str]]]:
    """Selectors of both sides; with group_left the left side lacks the labels that the right side brings."""
    modifier = node.modifier
    on = set(modifier.matching.labels) if modifier is not None and modifier.matching is not None else set()
    brought = set(modifier.group_labels or ()) if modifier is not None else set()
    left, right = needed | on, needed | on
    if str(node.op) in _FILTERS:
        right = on
    elif modifier is not None and modifier.card == promql.VectorMatchCardinality.ManyToOne:
        left, right = (needed - brought) | on, on | brought
    elif modifier is not None and modifier.card == promql.VectorMatchCardinality.OneToMany:
        left, right = on | brought, (needed - brought) | on
    return _walk(node.lhs, left) + _walk(node.rhs, right)
