"""Share of the clicks that go to items younger than some minutes: how much of the stream is about what is new.

Station: beside the batcher, fed with the same clicks; read by the metrics. It judges age by the clicks alone, not by
the items topic: an item is born with its first click.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.contract import Float64Array, UInt64Array
from streams.drift import FAST, SLOW, FrequencyDrift, weight_spread
from streams.frequency import bucket_of, check_size
from streams.kernel import kernel


@dataclass(frozen=True)
class YoungClicks:
    """Share of clicks on young items: lately, usually, and how far apart both may be by chance."""

    share: float
    """0 … 1, in the fast memory."""
    usual: float
    """0 … 1, in the slow memory."""
    noise: float
    """Standard deviation of share − usual while nothing moves, clicks taken as independent."""

    @property
    def drift(self) -> FrequencyDrift:
        """|share − usual| with its noise."""
        return FrequencyDrift(abs(self.share - self.usual), self.noise)


class NewcomerTracker:
    """The time of the first click in each bucket, and decayed shares of clicks on items whose buckets are young.

    An item is as old as the youngest of its buckets: sharing one can only make it look older, so that of the newborn
    items, those are missed whose every bucket was hit before (`frequency.collision_ratio`). Times are event times. In
    the first `young_minutes` of the stream everything is young, so these clicks do not count.

    Memory: 8 bytes a bucket, per hash.

    Args:
        young_minutes: below this age an item is young, > 0.
        fast_clicks: the fast memory's window, in clicks: a click that is k clicks old weighs exp(−k / window).
        slow_clicks: the slow one's; longer.
        num_buckets, num_hashes: as of the frequency estimators.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        young_minutes: float = 60.0,
        fast_clicks: float = 5_000,
        slow_clicks: float = 50_000,
        num_buckets: int = 2**18,
        num_hashes: int = 2,
    ) -> None:
        check_size(num_buckets, num_hashes)
        if not 0 < young_minutes < np.inf:
            raise ValueError(f"young_minutes must be above 0 and finite, not {young_minutes}")
        if not 1 <= fast_clicks < slow_clicks < np.inf:
            raise ValueError(f"windows must be 1 ≤ fast < slow, not {fast_clicks} and {slow_clicks}")
        self.young_seconds = 60 * young_minutes
        self.windows = np.array([fast_clicks, slow_clicks], np.float64)
        self.num_clicks = 0
        """Clicks that count."""
        self._started_at = math.nan
        self._born_at: Float64Array = np.full((num_hashes, num_buckets), np.inf)
        # [young and all clicks that count, memory], decayed
        self._sums: Float64Array = np.zeros((2, 2))

    def update(self, item_hash: UInt64Array, event_time: Float64Array) -> None:
        """Counts clicks: uint64 [n], and their times in seconds, float64 [n], in the order of the stream."""
        if not len(item_hash):
            return
        if math.isnan(self._started_at):
            self._started_at = float(event_time[0])
        decay = np.exp(-1 / self.windows)
        self.num_clicks += _count(
            self._born_at, self._sums, decay, item_hash, event_time, self._started_at, self.young_seconds
        )

    def shares(self) -> Float64Array:
        """float64 [2]: share of clicks on young items in the fast and in the slow memory; zeros before any counts."""
        young, every = self._sums
        shares: Float64Array = np.divide(young, every, where=every > 0, out=np.zeros(2))
        return shares

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything counted, as a copy; `restore` makes a tracker of the same settings go on from it bit for bit."""
        return {
            "num_clicks": np.array(self.num_clicks, np.int64),
            "started_at": np.array(self._started_at),
            "born_at": self._born_at.copy(),
            "sums": self._sums.copy(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        if state["born_at"].shape != self._born_at.shape:
            raise ValueError(f"born_at must have the shape {self._born_at.shape}, not {state['born_at'].shape}")
        self.num_clicks, self._started_at = int(state["num_clicks"]), float(state["started_at"])
        self._born_at[:] = state["born_at"]
        self._sums[:] = state["sums"]


def young_clicks(trackers: Sequence[NewcomerTracker]) -> YoungClicks:
    """The shares of several partitions together, each partition that has clicks that count weighing the same."""
    active = [tracker for tracker in trackers if tracker.num_clicks]
    if not active:
        return YoungClicks(0.0, 0.0, 0.0)
    shares = np.mean([tracker.shares() for tracker in active], axis=0)
    squares = sum(weight_spread(tracker.num_clicks, *tracker.windows)[1] for tracker in active) / len(active) ** 2
    usual = float(shares[SLOW])
    return YoungClicks(float(shares[FAST]), usual, math.sqrt(max(0.0, usual * (1 - usual)) * squares))


@kernel
def _count(
    born_at: Float64Array,
    sums: Float64Array,
    decay: Float64Array,
    item_hash: UInt64Array,
    event_time: Float64Array,
    started_at: float,
    young_seconds: float,
) -> int:
    counted = 0
    for i in range(len(item_hash)):
        now, born = event_time[i], -np.inf
        for k in range(len(born_at)):
            bucket = bucket_of(item_hash[i], k, born_at.shape[1])
            if born_at[k, bucket] == np.inf:
                born_at[k, bucket] = now
            born = max(born, born_at[k, bucket])
        if now - started_at >= young_seconds:
            counted += 1
            is_young = 1.0 if now - born < young_seconds else 0.0
            for memory in range(2):
                sums[0, memory] = sums[0, memory] * decay[memory] + is_young
                sums[1, memory] = sums[1, memory] * decay[memory] + 1.0
    return counted
