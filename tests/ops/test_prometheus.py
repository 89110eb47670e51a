"""Prometheus' configuration and rules: checked by promtool, and held to the code, the Compose file and the runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ops.expressions import label_names, parse, problems, selectors, series_types
from tests.ops.test_compose import Compose, seconds, settings_of

FOLDER = Path(__file__).parent.parent.parent / "ops" / "prometheus"
CONFIG: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
OBJECTIVES = {
    # what is bad: (share of events that may be, edge of the histogram in seconds)
    "streamtower:click_to_servable_late": (0.05, "10.0"),
    "streamtower:requests_failed": (0.001, None),
    "streamtower:requests_slow": (0.05, "0.025"),
}
SPEEDS = [("1h", "14.4"), ("5m", "14.4"), ("6h", "6"), ("30m", "6")]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_accepts_the_configuration(promtool: str) -> None:
    run(promtool, "check", "config", "prometheus.yml")


def test_promtool_accepts_the_rules(promtool: str) -> None:
    assert f"{len(RULES)} rules found" in run(promtool, "check", "rules", "rules.yml")


def test_every_alert_comes_and_stays_away_as_its_unit_tests_say(promtool: str) -> None:
    run(promtool, "test", "rules", "rules_test.yml")


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_has_a_unit_test_in_which_it_fires_and_one_in_which_it_does_not(alert: str) -> None:
    came, stayed_away = False, False
    for test in yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]:
        for case in test.get("alert_rule_test", ()):
            if case["alertname"] == alert:
                came |= bool(case["exp_alerts"])
                stayed_away |= not case["exp_alerts"]
        for case in test.get("promql_expr_test", ()):
            if f'alertname="{alert}"' in case["expr"]:
                came |= bool(case["exp_samples"])
                stayed_away |= not case["exp_samples"]
    assert came and stayed_away


def test_targets_are_services_at_the_ports_that_they_listen_on(
    compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {
        name: entry["port"]
        for job in CONFIG["scrape_configs"]
        for entry in job.get("dns_sd_configs", ())
        for name in entry["names"]
    }
    listening = {
        "streams": settings_of(compose, "streams", monkeypatch).metrics_port,
        "trainer": settings_of(compose, "trainer", monkeypatch).metrics_port,
        "retriever": settings_of(compose, "retriever", monkeypatch).port,
        "qdrant": compose["services"]["qdrant"]["ports"][0]["target"],
    }
    assert targets == listening
    assert all(
        job["job_name"] in entry["names"] for job in CONFIG["scrape_configs"] for entry in job.get("dns_sd_configs", ())
    )


def test_it_reads_the_rules_that_lie_beside_it_where_compose_mounts_them(compose: Compose) -> None:
    assert CONFIG["rule_files"] == ["rules.yml"]
    prometheus = compose["services"]["prometheus"]
    mount = next(mount for mount in prometheus["volumes"] if mount["type"] == "bind")
    assert Path(mount["source"]) == FOLDER
    assert f"--config.file={mount['target']}/prometheus.yml" in prometheus["command"]


def test_grafanas_intervals_are_those_of_the_scrapes() -> None:
    source = yaml.safe_load((FOLDER.parent / "grafana/provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
    assert seconds(CONFIG["global"]["scrape_timeout"]) < seconds(CONFIG["global"]["scrape_interval"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_expression_asks_for_what_the_code_exposes(rule: dict[str, Any], registries: dict[str, Any]) -> None:
    types, labels = {"up": "gauge"}, {"up": {}}  # type: dict[str, str], dict[str, dict[str, set[str]]]
    for registry in registries.values():
        types |= series_types(registry)
        labels |= label_names(registry)
    for name in RECORDED:
        types[name], labels[name] = "gauge", {}
    assert problems(rule["expr"], types, labels) == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_wrong_and_the_runbook_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, anchor = rule["annotations"]["runbook"].split("#")
    assert anchor == rule["alert"].lower()
    runbook = (FOLDER.parent.parent / page).read_text()
    assert f"\n### {rule['alert']}\n" in runbook


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    runbook = (FOLDER.parent.parent / "docs" / "runbook.md").read_text()
    assert re.findall(r"^### (\w+)$", runbook, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("window", ["5m", "30m", "1h", "6h"])
def test_an_objective_is_the_same_over_every_window(objective: str, window: str) -> None:
    rules = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
    expression = rules[f"{objective}:ratio_rate{window}"]
    assert expression == rules[f"{objective}:ratio_rate5m"].replace("[5m]", f"[{window}]")
    edge = OBJECTIVES[objective][1]
    assert edge is None or f'le="{edge}"' in expression


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_page_comes_when_the_budget_burns_by_the_two_usual_speeds(objective: str) -> None:
    share = OBJECTIVES[objective][0]
    expression = next(
        rule["expr"] for rule in ALERTS
        if objective in {str(selector.name).rsplit(":", 1)[0] for selector in selectors(parse(rule["expr"]))}
    )  # fmt: skip
    bounds = re.findall(r":ratio_rate(\w+) > ([\d.]+) \* ([\d.]+)", expression)
    assert bounds == [(window, speed, f"{share:g}") for window, speed in SPEEDS]
