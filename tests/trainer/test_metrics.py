"""Metrics: the freshness histogram against Prometheus' own, and all children there from the start."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from streams.contract import hash_ids
from tests.trainer.small_trainer import CONFIG
from trainer.catalogue import Catalogue
from trainer.evaluate import Prequential
from trainer.freshness import MANY, Freshness
from trainer.metrics import CUTOFFS, SERVABLE_SECONDS, SERVABLE_STAGES, STAGES, Metrics, SecondsHistogram
from trainer.progress import Progress
from trainer.towers import ItemFeatures


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
    for label in (
        [f'k="{k}"' for k in CUTOFFS] + [f'stage="{stage}"' for stage in STAGES] + ['kind="full"', 'stage="queue"']
    ):
        assert label in text
    assert 'streamtower_trainer_click_to_servable_seconds_bucket{le="10.0"} 0.0' in text
    assert "_created" not in text


def test_tested_clicks_are_counted_on_when_a_rollback_begins_with_another_evaluation() -> None:
    metrics, catalogue = Metrics(), Catalogue(ItemFeatures(CONFIG), embedding_dim=CONFIG.embedding_dim)
    for num_clicks, counted in ((0, 0), (5, 5), (3, 8)):
        evaluation = Prequential()
        for _ in range(num_clicks):
            evaluation.observe(
                np.zeros((1, 1), np.float32), np.zeros(1, np.float32), np.array([0]), np.zeros((0, 2), np.int64)
            )
        metrics.report(catalogue, Progress(), evaluation, 0)
        assert metrics.registry.get_sample_value("streamtower_trainer_clicks_evaluated_total") == counted


ITEMS = hash_ids(["a", "b"])


def freshness_at(*moments: float) -> tuple[Freshness, Callable[..., float]]:
    """A freshness whose clock says these moments, one after the other and then the last; its histograms' samples."""
    metrics, times = Metrics(), list(moments)
    freshness = Freshness(metrics, lambda: times.pop(0) if len(times) > 1 else times[0])

    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(f"streamtower_trainer_{name}", labels)
        assert found is not None
        return found

    return freshness, value


def test_clicks_that_wait_long_are_put_together_and_none_is_lost() -> None:
    freshness, value = freshness_at(1_050.0)
    for step in range(MANY + 10):
        freshness.note(step, ITEMS, np.array([1_000.0, 1_000.01 + step // 100]))
    assert len(freshness._waiting) < 20
    assert freshness.oldest == 1_000.0
    freshness.acknowledge(MANY + 9, 1_100.0)
    count = 2 * (MANY + 10)
    assert value("click_to_servable_seconds_count") == count
    assert value("click_to_servable_seconds_bucket", le="+Inf") == count
    exact = (MANY + 10) * 100.0 + sum(99.99 - step // 100 for step in range(MANY + 10))
    assert value("click_to_servable_seconds_sum") == pytest.approx(exact, rel=1e-3)
    assert value("servable_stage_seconds_sum", stage="publish") == pytest.approx(count * 50.0)
    assert freshness.oldest == 0.0


def test_clicks_learnt_after_the_copy_go_on_waiting() -> None:
    freshness, value = freshness_at(11.0)
    freshness.note(1, ITEMS[:1], np.array([10.0]))
    freshness.note(2, ITEMS[:1], np.array([11.0]))
    freshness.acknowledge(1, 12.0)
    freshness.acknowledge(1, 13.0)
    assert value("click_to_servable_seconds_sum") == 2.0
    freshness.acknowledge(2, 14.0)
    assert value("click_to_servable_seconds_sum") == 5.0


def test_the_stages_of_a_click_add_up_to_its_time_until_it_is_servable() -> None:
    freshness, value = freshness_at(0.0, 103.0, 103.5, 103.75)  # made, taken, learnt, learnt
    freshness.taken()
    freshness.note(1, ITEMS, np.array([100.0, 102.0]))
    freshness.note(2, ITEMS[:1], np.array([101.0]))
    freshness.acknowledge(2, 106.0)
    sums = {stage: value("servable_stage_seconds_sum", stage=stage) for stage in SERVABLE_STAGES}
    assert sums == {"queue": 3.0 + 1.0 + 2.0, "learn": 0.5 + 0.5 + 0.75, "publish": 2.5 + 2.5 + 2.25}
    assert sum(sums.values()) == value("click_to_servable_seconds_sum") == 6.0 + 4.0 + 5.0
    assert {value("servable_stage_seconds_count", stage=stage) for stage in SERVABLE_STAGES} == {3.0}


def test_clicks_on_items_that_are_left_over_wait_for_a_later_delta() -> None:
    freshness, value = freshness_at(100.0)
    freshness.note(1, ITEMS, np.array([90.0, 95.0]))
    freshness.acknowledge(1, 100.0, left=ITEMS[:1])
    assert value("click_to_servable_seconds_sum") == 5.0 and freshness.oldest == 90.0
    freshness.acknowledge(2, 101.0)
    assert value("click_to_servable_seconds_sum") == 16.0 and freshness.oldest == 0.0


def test_clicks_that_were_put_together_wait_until_nothing_is_left_over() -> None:
    freshness, value = freshness_at(100.0)
    for step in range(MANY + 1):
        freshness.note(step, ITEMS, np.array([90.0, 95.0]))
    freshness.acknowledge(MANY, 100.0, left=ITEMS[:1])
    assert value("click_to_servable_seconds_count") == 0
    freshness.acknowledge(MANY, 101.0)
    assert value("click_to_servable_seconds_count") == 2 * (MANY + 1)
