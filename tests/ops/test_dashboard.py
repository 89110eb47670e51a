"""Grafana's dashboard: made by its script, every query held to the metrics of the code, every panel explained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client import CollectorRegistry

from ops import dashboard
from tests.ops.expressions import RATE_INTERVAL, label_names, parse, problems, selectors, series_types

Compose = dict[str, Any]
GRAFANA = Path(__file__).parent.parent.parent / "ops" / "grafana"
COMMITTED: dict[str, Any] = json.loads(dashboard.FILE.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in COMMITTED["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']}: {target['legendFormat']}")
    for panel in PANELS
    for target in panel["targets"]
]
panels = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
queries = pytest.mark.parametrize(("expression", "legend"), QUERIES)


def test_the_committed_file_is_what_the_script_makes() -> None:
    assert dashboard.FILE.read_text() == dashboard.render(), "run python -m ops.dashboard"


def test_drift_comes_first_and_then_the_loss() -> None:
    assert [panel["title"] for panel in PANELS[:2]] == ["Frequency drift", "Loss"]


@panels
def test_every_panel_has_a_title_a_description_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in ("percentunit", "s", "cps", "short", "none")
    assert panel["datasource"] == {"type": "prometheus", "uid": dashboard.DATASOURCE_UID}


@panels
def test_every_query_of_a_panel_has_a_legend_and_a_letter_of_its_own(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for key in ("legendFormat", "refId", "expr"):
        found = [target[key] for target in panel["targets"]]
        assert all(found) and len(set(found)) == len(found)


def test_panels_do_not_overlap_and_their_ids_are_their_own() -> None:
    assert len({panel["id"] for panel in COMMITTED["panels"]}) == len(COMMITTED["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in COMMITTED["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@queries
def test_every_query_asks_for_what_the_code_exposes(
    expression: str, legend: str, registries: dict[str, CollectorRegistry]
) -> None:
    types, labels = {"up": "gauge"}, {"up": {}}  # type: dict[str, str], dict[str, dict[str, set[str]]]
    for registry in registries.values():
        types |= series_types(registry)
        labels |= label_names(registry)
    assert problems(expression, types, labels) == []


@queries
def test_rates_are_taken_over_the_interval_that_grafana_works_out(expression: str, legend: str) -> None:
    assert re.findall(r"\[([^\]]*)\]", expression) == [RATE_INTERVAL] * expression.count("[")


@queries
def test_a_legend_names_only_labels_that_the_answer_has(
    expression: str, legend: str, registries: dict[str, CollectorRegistry]
) -> None:
    wanted = set(re.findall(r"{{(\w+)}}", legend))
    parsed = parse(expression)
    if isinstance(parsed, promql.AggregateExpr):
        kept = set(parsed.modifier.labels) if parsed.modifier else set()
    elif isinstance(parsed, promql.Call):  # histogram_quantile over a sum by le
        kept = set()
    else:
        labels = {name: found for registry in registries.values() for name, found in label_names(registry).items()}
        kept = {"job", "instance"}.union(*(labels.get(str(selector.name), {}) for selector in selectors(parsed)))
    assert wanted <= kept


def test_the_checks_above_find_what_is_wrong() -> None:
    registry = CollectorRegistry()
    from prometheus_client import Counter, Gauge

    Counter("clicks_total", "Clicks.", ["kind"], registry=registry).labels("full")
    Gauge("loss", "Loss.", registry=registry)
    types, labels = series_types(registry), label_names(registry)
    assert problems("rate(clicks_total[1m]) + loss", types, labels) == []
    assert problems("clicks_total", types, labels) == ["clicks_total is a counter: rate it"]
    assert problems("rate(loss[1m])", types, labels) == ["loss is a gauge: do not rate it"]
    assert problems("lost", types, labels) == ["nothing exposes lost"]
    assert problems('rate(clicks_total{kind="none"}[1m])', types, labels) == ["kind of clicks_total is never 'none'"]
    assert problems('loss{of="all"}', types, labels) == ["loss has no label of"]


def test_grafana_finds_its_data_source_and_its_dashboards(compose: Compose) -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    prometheus = compose["services"]["prometheus"]
    assert [source["uid"] for source in sources] == [dashboard.DATASOURCE_UID]
    assert sources[0]["url"] == f"http://prometheus:{prometheus['ports'][0]['target']}"

    grafana = compose["services"]["grafana"]
    mounts = {mount["target"]: Path(mount["source"]) for mount in grafana["volumes"] if mount["type"] == "bind"}
    assert mounts["/etc/grafana/provisioning"] == GRAFANA / "provisioning"
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/streamtower.yml").read_text())["providers"]
    assert mounts[provider["options"]["path"]] == dashboard.FILE.parent
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{dashboard.FILE.name}"
