"""Tests of the dashboard and the alerts: a live server has their metrics and labels, and Prometheus can read them."""

import asyncio
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import server.errors
from server.errors import ServerError
from tests.support.http_harness import make_client, make_link

DEPLOY = Path(__file__).parents[2] / "deploy"
BY_PROMETHEUS = {"up": {"job", "instance"}}  # the labels of a metric that Prometheus makes itself
TARGET_LABELS = {"job", "instance"}  # the labels that Prometheus adds to every metric
OPERATORS = {"and", "or", "unless", "on", "by"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: make promtool, as root on Debian")


@pytest.fixture(scope="module")
def exposition() -> str:
    """Return the text of /metrics after one request of each kind."""

    async def ask() -> str:
        async with make_client(make_link()) as client:
            generate = {"inputs": "hi", "parameters": {"max_new_tokens": 3}}
            assert (await client.post("/generate", json=generate)).status_code == 200
            assert (await client.post("/score", json={"inputs": "hello"})).status_code == 200
            assert (await client.post("/generate", json={"inputs": 1.5})).status_code == 422
            return (await client.get("/metrics")).text

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def labels(exposition) -> dict[str, set[str]]:
    """Return the labels of each metric that the server or Prometheus gives."""
    found = defaultdict(set, BY_PROMETHEUS)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            found[sample.name] |= sample.labels.keys() | TARGET_LABELS
    return dict(found)


def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana/dashboard.json").read_text())


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield the title and the PromQL expression of each alert, panel and variable."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert found, variable
            yield variable["name"], f"count by ({found[2]}) ({found[1]})"


def names_in(expression: str) -> set[str]:
    """Return the metrics of a PromQL expression: words that are no label, function, operator, duration or number."""
    rest = re.sub(r'"[^"]*"', "", expression)
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on)\s*\([^)]*\)", " ", rest)
    return {name for name in re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", rest) if name not in OPERATORS}


def labels_in(expression: str) -> set[str]:
    asked = set(re.findall(r"(\w+)\s*[=!]~?\s*\"", expression))
    for grouping in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        asked |= set(re.findall(r"\w+", grouping))
    return asked


def complaints(expression: str, labels: dict[str, set[str]]) -> list[str]:
    names = names_in(expression)
    unknown = [f"no metric {name}" for name in sorted(names - labels.keys())]
    known = set().union(*(labels[name] for name in names & labels.keys()))
    return unknown + [f"no label {label}" for label in sorted(labels_in(expression) - known)]


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_a_server_gives_what_an_expression_asks_for(title, expression, labels):
    assert names_in(expression), title
    assert complaints(expression, labels) == []


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(allattn_tokens_total[5m]) > 1", "no metric allattn_tokens_total"),
        ('rate(allattn_batch_size_bucket{phase="decode"}[5m])', "no label phase"),
        ("sum by (le, finish_reason) (allattn_batch_size_bucket)", "no label finish_reason"),
        ("allattn_rows_used / allattn_lanes", "no metric allattn_lanes"),
    ],
)
def test_an_expression_that_asks_for_more_is_noticed(expression, complaint, labels):
    assert complaints(expression, labels) == [complaint]


def test_reasons_are_codes_of_errors():
    kinds = [kind for kind in vars(server.errors).values() if isinstance(kind, type) and issubclass(kind, ServerError)]
    codes = {getattr(kind, "code", None) for kind in kinds}
    asked = {reason for _, text in expressions() for reason in re.findall(r'\breason="(\w+)"', text)}
    assert asked == {"queue_full"}
    assert asked <= codes


def test_what_an_operator_wants_to_see_is_on_the_dashboard():
    shown = set().union(*(names_in(target["expr"]) for panel in dashboard()["panels"] for target in panel["targets"]))
    shown = {re.sub(r"_(bucket|sum|count)$", "", name).removeprefix("allattn_") for name in shown}
    assert shown >= {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "e2e_request_latency_seconds",
        "rows_used",
        "num_requests_waiting",
        "generation_tokens_total",
        "prompt_tokens_total",
        "scored_tokens_total",
        "requests_finished_total",
        "requests_rejected_total",
        "step_duration_seconds",
        "engine_restarts",
        "engine_ready",
    }


def test_panels_have_places_and_ids_of_their_own():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24


def test_each_alert_is_shown_to_fire_and_to_keep_quiet():
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    cases = [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules()}
    assert {name for name, fires in cases if fires} == alerts
    assert {name for name, fires in cases if not fires} == alerts


def promtool(*words: str, stdin: str = "") -> str:
    """Run promtool and return its output; fail if promtool fails."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], input=stdin, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_nothing_wrong(exposition):
    assert "SUCCESS" in promtool("check", "config", "prometheus/prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", "prometheus/alerts_test.yml")
    assert promtool("check", "metrics", stdin=exposition) == ""


@needs_promtool
def test_promtool_reads_the_dashboards_expressions(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__(rate_interval|range)", "5m", expression)}
        for number, (_, expression) in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", str(file))
