"""Metrics: the freshness histogram against Prometheus' own, and all children there from the start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from trainer.freshness import MANY, Freshness
from trainer.metrics import CUTOFFS, SERVABLE_SECONDS, STAGES, Metrics, SecondsHistogram


@given(st.lists(st.floats(0, 1000) | st.sampled_from(SERVABLE_SECONDS), max_size=50))
def test_an_array_is_observed_as_its_values_one_by_one(values: list[float]) -> None:
    registry, other = CollectorRegistry(), CollectorRegistry()
    mine = SecondsHistogram("seconds", "text", SERVABLE_SECONDS, registry)
    theirs = Histogram("seconds", "text", buckets=SERVABLE_SECONDS, registry=other)
    mine.observe(np.array(values[:20]))
    mine.observe(np.array(values[20:]))
    for value in values:
        theirs.observe(value)
    (one,), (two,) = list(registry.collect()), list(other.collect())
    wanted = {(s.name, s.labels.get("le")): s.value for s in two.samples if not s.name.endswith("_created")}
    found = {(s.name, s.labels.get("le")): s.value for s in one.samples}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key


def test_the_objectives_are_edges_and_steps_are_a_quarter_at_most() -> None:
    assert {5.0, 10.0} <= set(SERVABLE_SECONDS)
    assert SERVABLE_SECONDS[0] == 0.01 and 300 < SERVABLE_SECONDS[-1] < 400
    assert all(high / low < 1.251 for low, high in itertools.pairwise(SERVABLE_SECONDS))


def test_every_child_is_there_before_anything_happens() -> None:
    metrics = Metrics()
    text = generate_latest(metrics.registry).decode()
    for label in [f'k="{k}"' for k in CUTOFFS] + [f'stage="{stage}"' for stage in STAGES] + ['kind="full"']:
        assert label in text
    assert 'streamtower_trainer_click_to_servable_seconds_bucket{le="10.0"} 0.0' in text
    assert "_created" not in text


def test_clicks_that_wait_long_are_put_together_and_none_is_lost() -> None:
    metrics = Metrics()
    freshness = Freshness(metrics.click_to_servable)
    for step in range(MANY + 10):
        freshness.note(step, np.array([1_000.0, 1_000.01 + step // 100]))
    assert len(freshness._waiting) < 20
    freshness.acknowledge(MANY + 9, 1_100.0)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"streamtower_trainer_click_to_servable_seconds_{name}", labels)

    count = 2 * (MANY + 10)
    assert value("count") == count and value("bucket", le="+Inf") == count
    exact = (MANY + 10) * 100.0 + sum(99.99 - step // 100 for step in range(MANY + 10))
    assert value("sum") == pytest.approx(exact, rel=1e-3)


def test_clicks_learnt_after_the_copy_go_on_waiting() -> None:
    metrics = Metrics()
    freshness = Freshness(metrics.click_to_servable)
    freshness.note(1, np.array([10.0]))
    freshness.note(2, np.array([11.0]))
    freshness.acknowledge(1, 12.0)
    freshness.acknowledge(1, 13.0)
    assert metrics.registry.get_sample_value("streamtower_trainer_click_to_servable_seconds_sum") == 2.0
    freshness.acknowledge(2, 14.0)
    assert metrics.registry.get_sample_value("streamtower_trainer_click_to_servable_seconds_sum") == 5.0
