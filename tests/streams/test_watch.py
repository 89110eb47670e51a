"""What the watcher measures, and when it says that the chain stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest
import structlog

from streams.broker import DependencyError
from streams.contract import hash_ids
from streams.metrics import Metrics
from streams.state import PartitionState, StateConfig
from streams.watch import Watcher
from tests.streams.stand_ins import Clock

Bounds = dict[int, tuple[int, int, int | None]]


@dataclass
class Worker:
    position: int | None = None
    state: PartitionState | None = None
    is_replaying: bool = False


@dataclass
class Partitions:
    owned: set[int] = field(default_factory=lambda: {0, 1})
    workers: dict[int, Worker] = field(default_factory=dict)
    is_assigned: bool = True


class Broker:
    """Tells the bounds that it is given; an error is raised."""

    def __init__(self) -> None:
        self.answer: Bounds | DependencyError = {0: (0, 0, None), 1: (0, 0, None)}

    def bounds(self, partitions: Collection[int]) -> Bounds:
        if isinstance(self.answer, DependencyError):
            raise self.answer
        return {partition: self.answer[partition] for partition in partitions}


class Bench:
    def __init__(self) -> None:
        self.partitions, self.broker, self.metrics, self.clock = Partitions(), Broker(), Metrics(), Clock()
        self.watcher = Watcher(self.partitions, self.broker, self.metrics, 60.0, self.clock)  # type: ignore[arg-type]

    def look(self, seconds_later: float = 0.0) -> None:
        self.clock.now += seconds_later
        asyncio.run(self.watcher.look())

    def gauge(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"streamtower_streams_{name}")
        assert value is not None
        return value


def test_the_lag_is_what_lies_behind_the_last_acknowledged_micro_batch() -> None:
    bench = Bench()
    bench.partitions.workers = {0: Worker(position=40)}
    bench.broker.answer = {0: (0, 100, 10), 1: (0, 7, None), 2: (0, 9, 9)}
    bench.look()
    assert bench.gauge("consumer_lag_messages") == 60 + 7
    bench.partitions.owned = {1, 2}
    bench.look()
    assert bench.gauge("consumer_lag_messages") == 7


def test_clicks_that_retention_has_deleted_are_no_lag() -> None:
    bench = Bench()
    bench.broker.answer = {0: (80, 100, 10), 1: (5, 5, None)}
    bench.look()
    assert bench.gauge("consumer_lag_messages") == 20


def test_when_clicks_wait_and_none_is_passed_on_for_the_deadline_it_fails() -> None:
    bench = Bench()
    bench.partitions.workers = {0: Worker(position=40)}
    bench.broker.answer = {0: (0, 100, 10), 1: (0, 0, None)}
    bench.look()
    bench.look(60)
    with pytest.raises(DependencyError, match=r"60 clicks wait .*\{0: 40, 1: 0\}.* from \{0: 40\} for 60 s"):
        bench.look(1)


def test_a_partition_that_stands_still_is_noticed_while_others_move() -> None:
    bench = Bench()
    bench.partitions.workers = {0: Worker(position=40), 1: (moving := Worker(position=0))}
    bench.broker.answer = {0: (0, 100, 10), 1: (0, 1_000, None)}
    bench.look()
    for _ in range(6):
        moving.position += 10
        bench.look(10)
    with pytest.raises(DependencyError, match=r"from \{0: 40\} for 60 s"):
        moving.position += 10
        bench.look(10)


def test_a_partition_that_comes_back_has_its_time_again() -> None:
    bench = Bench()
    bench.partitions.workers = {0: Worker(position=40)}
    bench.broker.answer = {0: (0, 100, 40), 1: (0, 0, None)}
    bench.look()
    bench.partitions.owned = {1}
    bench.look(100)
    bench.partitions.owned = {0, 1}
    bench.look(100)
    bench.look(60)
    with pytest.raises(DependencyError, match="60 clicks wait"):
        bench.look(1)


def test_progress_replays_and_empty_topics_are_no_standstill() -> None:
    bench = Bench()
    bench.partitions.workers = {0: (worker := Worker(position=40))}
    bench.broker.answer = {0: (0, 100, 10), 1: (0, 0, None)}
    bench.look()
    worker.position = 41
    bench.look(59)
    bench.look(59)
    worker.is_replaying = True
    bench.look(100)
    worker.is_replaying = False
    bench.look(59)
    bench.broker.answer = {0: (0, 41, 41), 1: (0, 0, None)}
    bench.look(100)
    bench.look(100)


def test_a_group_that_does_not_share_out_its_partitions_is_waited_for_until_the_deadline() -> None:
    bench = Bench()
    bench.partitions.is_assigned, bench.partitions.owned = False, set()
    bench.broker.answer = {}
    bench.look(60)
    bench.partitions.is_assigned = True
    bench.look(100)
    bench.partitions.is_assigned = False
    bench.look(60)
    with pytest.raises(DependencyError, match="has not shared out its partitions for 60 s"):
        bench.look(1)


def test_a_broker_that_does_not_answer_is_waited_for_until_the_deadline() -> None:
    bench = Bench()
    bench.look()
    assert bench.gauge("kafka_up") == 1
    bench.broker.answer = DependencyError("away")
    bench.look(30)
    assert bench.gauge("kafka_up") == 0
    bench.broker.answer = {0: (0, 0, None), 1: (0, 0, None)}
    bench.look(30)
    assert bench.gauge("kafka_up") == 1
    bench.broker.answer = DependencyError("away")
    bench.look(60)
    with pytest.raises(DependencyError, match="away"):
        bench.look(1)


def test_gauges_sum_up_the_partitions_states() -> None:
    bench = Bench()
    config = StateConfig(num_buckets=16, num_hashes=1, max_users=10, drift_fast_clicks=10, drift_slow_clicks=100)
    states = [PartitionState(config) for _ in range(2)]
    items = hash_ids(["a", "b"])
    for state, num_users in zip(states, (2, 3), strict=True):
        users = hash_ids([str(n) for n in range(num_users)])
        state.histories.join(users, users)
        state.estimator.update(items[:1])
        state.drift.update(np.repeat(items, [1_000, 20]))
        state.newcomers.update(np.repeat(items, [1_000, 10]), np.arange(1_010) * 60.0)
        state.movers.update(np.repeat(items, [1_000, 20]), np.repeat(["a", "b"], [1_000, 20]).tolist())
    bench.partitions.workers = {n: Worker(state=state) for n, state in enumerate(states)}
    bench.partitions.workers[2] = Worker(is_replaying=True)
    bench.watcher.measure()
    assert bench.gauge("history_users") == 5
    assert bench.gauge("estimator_occupied_ratio") == 1 / 16
    assert bench.gauge("estimator_collision_ratio") == pytest.approx(0.0)
    states[0].estimator.update(hash_ids([str(n) for n in range(6)]))
    bench.watcher.measure()
    assert bench.gauge("estimator_collision_ratio") == states[0].estimator.collision_ratio > 0.1
    assert bench.gauge("replaying_partitions") == 1
    assert bench.gauge("frequency_drift_ratio") == pytest.approx(np.exp(-0.2) - np.exp(-2), abs=0.03)
    assert 0 < bench.gauge("frequency_drift_noise_ratio") < 0.2
    assert bench.gauge("js_drift_ratio") > bench.gauge("js_drift_noise_ratio") > 0
    assert bench.gauge("popularity_stability_index") > bench.gauge("popularity_stability_noise_index") > 0
    assert bench.gauge("young_clicks_ratio") == pytest.approx(1 - np.exp(-1), abs=1e-3)
    assert bench.gauge("young_clicks_usual_ratio") == pytest.approx(1 - np.exp(-0.1), abs=1e-3)
    assert 0 < bench.gauge("young_clicks_noise_ratio") < 0.2
    with structlog.testing.capture_logs() as logs:
        bench.watcher.find_movers(12.5)
        bench.watcher.log_drift()
    [entry] = logs
    assert (entry["event"], set(entry["log_ratios"])) == ("drift", {"a", "b"})
    assert entry["total_variation"] == pytest.approx(bench.gauge("frequency_drift_ratio"), abs=1e-4)
    report = bench.watcher.movers
    assert (report.time, report.partitions) == (12.5, (0, 1))
    assert {mover.item_id: round(mover.log_ratio, 2) for mover in report.movers} == entry["log_ratios"]
    assert entry["log_ratios"]["b"] == pytest.approx(np.log((1 - np.exp(-2)) / (1 - np.exp(-0.2))), abs=0.01)
