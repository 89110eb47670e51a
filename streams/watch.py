"""Looks at the partitions from outside: measures lag and drift, and notices when the chain stands still.

Station: beside the agent. Faust's consumer can go silent without an error; so the end of the topic is asked from the
broker over another connection, and if clicks wait there and none is passed on, the process ends and is started anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import structlog

from streams.broker import ClicksOnBroker, DependencyError
from streams.drift import frequency_drift, jensen_shannon, population_stability
from streams.metrics import Metrics
from streams.movers import MAX_MOVERS, MoversReport, top_movers
from streams.newcomers import young_clicks
from streams.state import PartitionState

MEASURE_SECONDS = 1.0
LOOK_EVERY = 5
"""The broker is asked, and movers are found, at each so many measurements."""
LOG_DRIFT_EVERY = 60
"""So are the drift and the items that move most logged."""
NUM_LOGGED_MOVERS = 10

log = structlog.get_logger("streams")


class Watched(Protocol):
    """One partition, as far as it is looked at."""

    state: PartitionState | None
    is_replaying: bool

    @property
    def position(self) -> int | None: ...


class WatchedPartitions(Protocol):
    """All of them. `owned` are this process's; a worker exists from the first chunk on."""

    owned: set[int]
    is_assigned: bool
    """False at first, and while the group shares the partitions out again."""

    @property
    def workers(self) -> Mapping[int, Watched]: ...


class Watcher:
    """Keeps the gauges fresh; fails when the broker or the way of the clicks is dead for the length of the deadline."""

    def __init__(
        self,
        partitions: WatchedPartitions,
        clicks_on_broker: ClicksOnBroker,
        metrics: Metrics,
        deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._partitions, self._clicks_on_broker, self._metrics = partitions, clicks_on_broker, metrics
        self._deadline_seconds, self._clock = deadline_seconds, clock
        self._answered_at = clock()
        self._assigned_at = clock()
        self._moved_at: dict[int, float] = {}
        self._positions: dict[int, int] = {}
        self.movers = MoversReport()
        """The latest; another one each time, so that it can be read from any thread."""

    async def run(self) -> None:
        """Looks until cancelled.

        Raises:
            DependencyError: Kafka did not answer, the group did not share out its partitions, or clicks waited and
                none was passed on, for the deadline.
        """
        turn = 0
        while True:
            self.measure()
            if turn % LOOK_EVERY == 0:
                await self.look()
                self.find_movers(time.time())
            if turn % LOG_DRIFT_EVERY == LOG_DRIFT_EVERY - 1:
                self.log_drift()
            turn += 1
            await asyncio.sleep(MEASURE_SECONDS)

    def measure(self) -> None:
        """Sets the gauges that need no broker."""
        workers = list(self._partitions.workers.values())
        states = [worker.state for worker in workers if worker.state]
        trackers = [state.drift for state in states]
        variation, divergence = frequency_drift(trackers), jensen_shannon(trackers)
        self._metrics.frequency_drift.set(variation.corrected)
        self._metrics.frequency_drift_noise.set(variation.noise)
        self._metrics.js_drift.set(divergence.corrected)
        self._metrics.js_drift_noise.set(divergence.noise)
        stability = population_stability(trackers)
        self._metrics.stability_index.set(stability.corrected)
        self._metrics.stability_noise.set(stability.noise)
        young = young_clicks([state.newcomers for state in states])
        self._metrics.young_clicks.set(young.share)
        self._metrics.young_clicks_usual.set(young.usual)
        self._metrics.young_clicks_noise.set(young.noise)
        self._metrics.estimator_occupied.set(max((state.estimator.occupied_ratio for state in states), default=0.0))
        self._metrics.estimator_collisions.set(max((state.estimator.collision_ratio for state in states), default=0.0))
        self._metrics.history_users.set(sum(len(state.histories) for state in states))
        self._metrics.replaying.set(sum(worker.is_replaying for worker in workers))

    def find_movers(self, now: float) -> None:
        """Renews `movers`; `now` is told with them, in seconds since the epoch."""
        states = {n: worker.state for n, worker in self._partitions.workers.items() if worker.state}
        movers = top_movers([state.movers for state in states.values()], MAX_MOVERS)
        self.movers = MoversReport(now, tuple(sorted(states)), tuple(movers))

    def log_drift(self) -> None:
        """Logs how far the items' shares have moved, and which items' had most when movers were found last."""
        states = [worker.state for worker in self._partitions.workers.values() if worker.state]
        variation = frequency_drift([state.drift for state in states])
        log.info(
            "drift",
            total_variation=round(variation.corrected, 4),
            noise=round(variation.noise, 4),
            log_ratios={mover.item_id: round(mover.log_ratio, 2) for mover in self.movers.movers[:NUM_LOGGED_MOVERS]},
        )

    async def look(self) -> None:
        """Asks the broker how far the topic goes, and compares."""
        owned = sorted(self._partitions.owned)
        try:
            bounds = await asyncio.to_thread(self._clicks_on_broker.bounds, owned)
        except DependencyError:
            self._metrics.kafka_up.set(0)
            if self._clock() - self._answered_at > self._deadline_seconds:
                raise
            return
        now = self._answered_at = self._clock()
        self._metrics.kafka_up.set(1)
        if self._partitions.is_assigned:
            self._assigned_at = now
        elif now - self._assigned_at > self._deadline_seconds:
            raise DependencyError(
                f"the consumer group has not shared out its partitions for {self._deadline_seconds:g} s"
            )
        positions, total, stuck = {}, 0, {}
        for partition, (first, end, committed) in bounds.items():
            worker = self._partitions.workers.get(partition)
            position = worker.position if worker else None
            if position is None:
                position = first if committed is None else committed
            positions[partition] = position
            lag = max(0, end - max(position, first))
            total += lag
            if lag == 0 or (worker and worker.is_replaying) or self._positions.get(partition) != position:
                self._moved_at[partition] = now
            elif now - self._moved_at[partition] > self._deadline_seconds:
                stuck[partition] = position
        self._metrics.consumer_lag.set(total)
        if positions != self._positions:
            log.info("progress", lag=total, positions=positions)
            self._positions = positions
        if stuck:
            raise DependencyError(
                f"{total} clicks wait in Kafka at {positions}, and none was passed on from {stuck} for "
                f"{self._deadline_seconds:g} s"
            )
