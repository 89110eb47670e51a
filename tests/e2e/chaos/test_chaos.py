"""Kill -9 at random, then an independent verifier: nothing lost, nothing learnt twice, all of it as recomputed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streams.contract import Topics
from tests.e2e.chaos import scenario
from tests.e2e.chaos.chain import ApacheNode, cluster_of_three, wait_until
from tests.fixtures.kafka import create_topics

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.broker,
    pytest.mark.index,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

# Fifty kills in two to three minutes on two cores; where there is an Apache Kafka, 34 more with brokers among them.
LARGE = {"max.message.bytes": str(4 << 20)}


def make_topics(kafka: str, prefix: str, num_partitions: int, **configuration: str) -> Topics:
    topics = Topics(prefix)
    configs = {name: {**LARGE, **configuration} for name in (topics.clicks, topics.dead_letters, topics.micro_batches)}
    create_topics(kafka, {**configs, topics.items: {"cleanup.policy": "compact"}}, num_partitions)
    return topics


def assert_well(outcome: scenario.Outcome, num_kills: int) -> None:
    verdict = outcome.verdict
    assert verdict.problems == []
    assert (verdict.lost, verdict.learnt_twice) == (0, 0)
    assert verdict.num_clicks > 1_000 < 30 * verdict.num_rejected
    assert outcome.num_kills >= num_kills


def test_every_click_is_learnt_once_and_all_is_as_recomputed(kafka: str, tmp_path: Path) -> None:
    topics = make_topics(kafka, "chaos-two-", 2)
    outcome = scenario.run(
        kafka,
        topics,
        tmp_path / "chain",
        num_partitions=2,
        done=lambda kills, seconds: kills >= 35,
        mean_seconds=1.4,
        seed=1,
    )
    assert_well(outcome, 35)


def test_with_one_partition_model_and_index_are_those_of_an_undisturbed_run_bit_for_bit(
    kafka: str, tmp_path: Path
) -> None:
    topics, peaceful = make_topics(kafka, "chaos-one-", 1), make_topics(kafka, "chaos-peace-", 1)
    first, second = scenario.run_and_compare(
        kafka, topics, peaceful, tmp_path, done=lambda kills, seconds: kills >= 15, mean_seconds=1.6, seed=2
    )
    assert_well(first, 15)
    assert second == []


@pytest.fixture
def apache_home() -> Path:
    if not (home := os.environ.get("STREAMTOWER_KAFKA_HOME")):
        pytest.skip("STREAMTOWER_KAFKA_HOME is unset: no Apache Kafka to start here")
    return Path(home)


@contextmanager
def running(nodes: list[ApacheNode]) -> Iterator[str]:
    """Starts the brokers and ends them; gives their addresses."""
    try:
        for node in nodes:
            node.start()
        wait_until(lambda: all(node.is_ready for node in nodes), "Apache Kafka is ready")
        yield ",".join(node.bootstrap for node in nodes)
    finally:
        for node in nodes:
            node.kill()


def run_on(nodes: list[ApacheNode], directory: Path, num_kills: int, seed: int, compression: str) -> scenario.Outcome:
    """Runs a chain on these brokers, with all of them among what is killed."""
    with running(nodes) as kafka:
        return scenario.run(
            kafka,
            make_topics(kafka, "chaos-", 2, **{"compression.type": compression}),
            directory,
            num_partitions=2,
            done=lambda kills, seconds: kills >= num_kills,
            mean_seconds=1.5,
            seed=seed,
            static_members=True,
            brokers=nodes,
        )


def test_on_apache_kafka_the_broker_is_killed_too(apache_home: Path, tmp_path: Path) -> None:
    outcome = run_on([ApacheNode(apache_home, tmp_path / "broker")], tmp_path / "chain", 12, seed=3, compression="zstd")
    assert_well(outcome, 12)
    assert outcome.num_broker_kills


def test_on_apache_kafka_too_model_and_index_are_those_of_an_undisturbed_run_bit_for_bit(
    apache_home: Path, tmp_path: Path
) -> None:
    nodes = [ApacheNode(apache_home, tmp_path / "broker")]
    with running(nodes) as kafka:
        topics, peaceful = make_topics(kafka, "chaos-one-", 1), make_topics(kafka, "chaos-peace-", 1)
        first, second = scenario.run_and_compare(
            kafka,
            topics,
            peaceful,
            tmp_path,
            done=lambda kills, seconds: kills >= 10,
            mean_seconds=1.6,
            seed=5,
            brokers=nodes,
        )
    assert_well(first, 10)
    assert first.num_broker_kills
    assert second == []


def test_on_a_cluster_of_three_the_leaders_are_killed_under_load(apache_home: Path, tmp_path: Path) -> None:
    outcome = run_on(
        cluster_of_three(apache_home, tmp_path / "brokers"), tmp_path / "chain", 12, seed=4, compression="lz4"
    )
    assert_well(outcome, 12)
    assert outcome.num_broker_kills
