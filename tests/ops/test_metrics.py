"""The services' metrics before anything has happened: names, units, labels, and what promtool thinks of them."""

from __future__ import annotations

import re
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ops import metrics_doc

SERVICES = ("streams", "trainer", "retriever")

services = pytest.mark.parametrize("service", SERVICES)


@services
def test_promtool_finds_no_fault_with_the_exposition(
    service: str, registries: dict[str, CollectorRegistry], promtool: str
) -> None:
    done = subprocess.run(
        [promtool, "check", "metrics"], input=generate_latest(registries[service]), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@services
def test_every_name_says_whose_it_is(service: str, registries: dict[str, CollectorRegistry]) -> None:
    for family in registries[service].collect():
        assert re.fullmatch(rf"streamtower_{service}_[a-z][a-z0-9_]*", metrics_doc.exposed_name(family))


@services
def test_histograms_count_seconds_and_gauges_of_moments_say_so(
    service: str, registries: dict[str, CollectorRegistry]
) -> None:
    for family in registries[service].collect():
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.type != "histogram" or family.name.endswith("_seconds")
        assert not family.name.endswith("_age_seconds"), "a moment is exposed, not its age"
        assert not re.search(r"_(ms|milliseconds|percent|minutes|kb|mb|info)$", family.name)


@services
def test_labels_are_few_and_never_an_id_or_a_version(service: str, registries: dict[str, CollectorRegistry]) -> None:
    for family in registries[service].collect():
        values = metrics_doc.label_values(family)
        assert not values.keys() & {
            "user",
            "user_id",
            "item",
            "item_id",
            "version",
            "model_version",
            "partition",
            "error",
        }
        assert all(len(found) <= 12 for found in values.values()), family.name


@services
def test_no_series_tells_when_it_was_created(service: str, registries: dict[str, CollectorRegistry]) -> None:
    assert not [
        s.name for family in registries[service].collect() for s in family.samples if s.name.endswith("_created")
    ]


@pytest.mark.parametrize(
    ("service", "histogram", "edge"),
    [
        ("trainer", "streamtower_trainer_click_to_servable_seconds", "10.0"),
        ("retriever", "streamtower_retriever_request_seconds", "0.025"),
    ],
)
def test_a_histogram_has_an_edge_at_its_objective(
    service: str, histogram: str, edge: str, registries: dict[str, CollectorRegistry]
) -> None:
    [family] = [family for family in registries[service].collect() if family.name == histogram]
    assert edge in metrics_doc.buckets(family)
