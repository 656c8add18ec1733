"""The dashboard and the alerts use only metrics that exist."""

import datetime as dt
import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from nightpress.api.metrics import ApiMetrics, _QueueFigures
from nightpress.core.service.jobs.records import JobStatistics
from nightpress.core.service.jobs.roster import Fleet
from nightpress.worker.metrics import REGISTRY

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"


def exported() -> dict[str, set[str]]:
    """Metric name, as Prometheus sees it → its labels."""
    queue = CollectorRegistry()
    found: Collector = _QueueFigures(
        JobStatistics(jobs={}, oldest_queued_s={}, failures={"internal": 1}), [], Fleet((), dt.datetime.now(dt.UTC))
    )
    queue.register(found)
    names: dict[str, set[str]] = {}
    for registry in (REGISTRY, ApiMetrics().registry, queue):
        for metric in registry.collect():
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
            collector = registry._names_to_collectors.get(metric.name)
            labels = set(getattr(collector, "_labelnames", ())) | {
                key for sample in metric.samples for key in sample.labels
            }
            names |= {metric.name + suffix: labels | ({"le"} if suffix == "_bucket" else set()) for suffix in suffixes}
    return names


def expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("expression", expressions())
def test_every_expression_asks_for_what_is_there(expression: str):
    there = exported()
    asked = re.findall(r"nightpress_\w+", expression)
    assert asked
    for name in asked:
        assert name in there, f"no process exports {name}"
    labels = {label for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    labels |= set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
    assert labels <= set().union(*(there[name] for name in asked))
    assert expression.count("(") == expression.count(")")


def test_every_alert_says_what_to_do():
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert {"summary", "action"} <= set(rule["annotations"]), rule["alert"]
            assert rule["labels"]["severity"] in {"page", "ticket"}


def test_everything_that_is_counted_is_shown_or_watched():
    asked = {name for expression in expressions() for name in re.findall(r"nightpress_\w+", expression)}
    for metric in REGISTRY.collect():
        assert any(name.startswith(metric.name) for name in asked), f"nobody looks at {metric.name}"
