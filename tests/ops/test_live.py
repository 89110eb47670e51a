"""A real Prometheus scrapes the three services at work, and answers every query of dashboard and rules.

The services are processes of their own, as in any deployment; clicks, good ones and bad ones, run through them, and
somebody asks for candidates.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from confluent_kafka import Producer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ops import dashboard
from streams.contract import Topics
from tests.fixtures.kafka import topics_on
from tests.fixtures.prometheus import Prometheus
from tests.fixtures.qdrant import names_of_its_own
from tests.ops.expressions import RATE_INTERVAL, parse, selectors

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.index, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_CLICKS = 6_000
BAD_CLICKS = {b"": None, b"null": b"null", b"no json": b"{", b"no id": b'{"user_id": "u"}'}
WAIT_SECONDS = 90.0
WINDOW = "5m"
"""Longer than all of this takes, so that every count since the first scrape is in it."""
QUIET = {
    "Things that should not happen",
    "Consumer lag",
    "Items: unpublished",
    "Items: deleted",
    "Frequency drift: drift {{instance}}",
    "Drift by other measures: Jensen-Shannon {{instance}}",
    "Drift by other measures: stability index {{instance}}",
    "Clicks on young items",
    "Freshness by stage: oldest waiting",
    "Staleness of what is served: recall lost",
}
"""Panels or queries of them that are zero while all is well: nothing missing, waiting, deleted, drifting
or stale."""
AT_ONCE = {
    "DependencyAway",
    "OffsetsMissing",
    "ContractBroken",
    "LossNotFinite",
    "LossAbsent",
    "PublishesGivenUp",
    "RetrieverBehind",
    "VersionNotLoaded",
}
"""Alerts for which a minute is long enough to see something wrong."""
RULES = yaml.safe_load((Path(__file__).parents[2] / "ops" / "prometheus" / "rules.yml").read_text())
SELECTORS = sorted(
    {
        selector.prettify()
        for group in RULES["groups"]
        for rule in group["rules"]
        for selector in selectors(parse(rule["expr"]))
        if str(selector.name).startswith("streamtower_")
    }
)


@dataclass(frozen=True)
class Live:
    prometheus: Prometheus
    urls: dict[str, str]
    """Service → URL of its metrics."""


@pytest.fixture(scope="module")
def live(
    kafka: str, qdrant_url: str, prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    from streamtower.datasets.synthetic import synthetic_dataset
    from streamtower.stack import Servers, Stack

    dataset = synthetic_dataset(NUM_CLICKS, num_users=200, num_items=400)
    with pytest.MonkeyPatch.context() as patch, topics_on(kafka) as topics, names_of_its_own(qdrant_url) as alias:
        patch.setenv("STREAMTOWER_TRAINER_CHECKPOINT_INTERVAL_SECONDS", "2")
        patch.setenv("STREAMTOWER_TRAINER_PUBLISH_INTERVAL_SECONDS", "0.5")
        patch.setenv("STREAMTOWER_TRAINER_FIRST_PUBLISH_INTERVAL_SECONDS", "3")
        servers = Servers(kafka=kafka, qdrant=qdrant_url, topic_prefix=topics.prefix, alias=alias)
        with Stack(servers, tmp_path_factory.mktemp("live"), dataset, print) as stack:
            urls = stack.metrics_urls()
            stack.wait_ready("streams")
            stack.wait_ready("trainer")
            prometheus.scrape({job: httpx.URL(url).netloc.decode() for job, url in urls.items()})
            _send(kafka, topics, dataset, prometheus)
            prometheus.wait(
                f"streamtower_trainer_clicks_learnt_total >= {NUM_CLICKS}"
                " and on () streamtower_retriever_model_version > 1",
                timeout_seconds=WAIT_SECONDS,
            )
            _ask(stack.retriever, prometheus)
            prometheus.wait(
                'streamtower_retriever_requests_total{route="candidates",code="4xx"} >= 5'
                " and on () streamtower_trainer_checkpoint_seconds_count > 0"
                ' and on () streamtower_trainer_publish_seconds_count{kind="delta"} > 0'
                f" and on () streamtower_streams_dead_letters_total{{reason='null_value'}} > 0"
                f" and on () streamtower_retriever_clicks_total >= {NUM_CLICKS}",
                timeout_seconds=WAIT_SECONDS,
            )
            stack.check()
            yield Live(prometheus, urls)


def _send(kafka: str, topics: Topics, dataset: Any, prometheus: Prometheus) -> None:
    """Everything, a part at a time, each after the one before was seen, so that rates have something to rise over."""
    from streamtower.producer import ClickProducer

    with ClickProducer({"bootstrap.servers": kafka}, topics) as producer:
        for item in dataset.items():
            producer.produce_item(item)
        for number, event in enumerate(event for piece in dataset.clicks() for event in piece.events()):
            producer.produce(event)
            if number % 1_000 == 999:
                producer.flush()
                prometheus.wait(f"streamtower_streams_clicks_total > {number}")
    raw = Producer({"bootstrap.servers": kafka})
    for key, value in BAD_CLICKS.items():
        raw.produce(topics.clicks, value, key)
    assert raw.flush(30) == 0


def _ask(retriever: str, prometheus: Prometheus) -> None:
    """Requests of every kind, several rounds, each after the one before was seen."""
    for number in range(5):
        for body in ({"user_id": f"user-{number}", "k": 10}, {"history": ["item-1"], "k": 10}, {"user_id": "nobody"}):
            assert httpx.post(f"{retriever}/v1/candidates", json=body, timeout=30).status_code == 200
        assert 400 <= httpx.post(f"{retriever}/v1/candidates", json={"k": -1}, timeout=30).status_code < 500
        prometheus.wait(f'sum(streamtower_retriever_requests_total{{route="candidates"}}) > {4 * number + 3}')


QUERIES = [
    pytest.param(legend, expression, id=f"{panel.title}: {legend}")
    for panels in dashboard.ROWS.values()
    for panel in panels
    for legend, expression in panel.queries.items()
]


@pytest.mark.parametrize(("legend", "expression"), QUERIES)
def test_every_query_of_the_dashboard_has_an_answer(live: Live, legend: str, expression: str) -> None:
    found = live.prometheus.wait(expression.replace(RATE_INTERVAL, WINDOW))
    values = [float(series["value"][1]) for series in found]
    assert all(math.isfinite(value) for value in values), found
    for label in [part.split("}}")[0] for part in legend.split("{{")[1:]]:
        assert all(series["metric"].get(label) for series in found), label


@pytest.mark.parametrize(
    ("legend", "expression"),
    [query for query in QUERIES if not QUIET & {str(query.id), str(query.id).split(": ")[0]}],
)
def test_every_query_moves_when_clicks_run_through(live: Live, legend: str, expression: str) -> None:
    found = live.prometheus.wait(expression.replace(RATE_INTERVAL, WINDOW))
    assert any(float(series["value"][1]) > 0 for series in found), found


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_series_that_a_rule_asks_for_is_there(live: Live, selector: str) -> None:
    assert live.prometheus.wait(selector)


@pytest.mark.parametrize(
    "rule",
    [rule for group in RULES["groups"] for rule in group["rules"] if rule.get("alert") in AT_ONCE],
    ids=lambda rule: rule["alert"],
)
def test_no_alert_fires_while_all_is_well(live: Live, rule: dict[str, Any]) -> None:
    live.prometheus.wait(rule["expr"], lambda found: found == [])


def test_all_dead_letters_are_counted_by_their_reason(live: Live) -> None:
    found = live.prometheus.wait("streamtower_streams_dead_letters_total > 0")
    assert sum(float(series["value"][1]) for series in found) == len(BAD_CLICKS)
    assert {series["metric"]["reason"] for series in found} >= {"null_value", "not_json"}


@pytest.mark.parametrize("service", ["streams", "trainer", "retriever"])
def test_a_service_at_work_exposes_no_series_that_was_not_there_at_the_start(
    live: Live, service: str, registries: dict[str, CollectorRegistry]
) -> None:
    def series(families: Any) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}

    text = httpx.get(live.urls[service], timeout=30).text
    assert series(text_string_to_metric_families(text)) == series(registries[service].collect())


@pytest.mark.parametrize("service", ["streams", "trainer", "retriever"])
def test_promtool_finds_no_fault_with_what_a_service_at_work_exposes(live: Live, service: str, promtool: str) -> None:
    text = httpx.get(live.urls[service], timeout=30).content
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
