"""How far the item distribution has moved lately: total variation distance between a fast and a slow memory of clicks.

Station: beside the batcher, fed with the same clicks; read by the metrics. It corrects nothing and raises no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.contract import Float64Array, UInt64Array
from streams.kernel import kernel

FAST, SLOW = 0, 1
_RESCALE_AT = 1e100


@dataclass(frozen=True)
class FrequencyDrift:
    """`distance`: total variation distance, 0 … 1. `noise`: what sampling alone makes of it when nothing has moved."""

    distance: float
    noise: float

    @property
    def corrected(self) -> float:
        """√(distance² − noise²), at least 0: near 0 while nothing moves, the distance itself far above the noise.

        A bucket's move and its noise add up like the sides of a right angle; subtracting the noise plainly would halve
        a moderate drift.
        """
        return math.sqrt(max(0.0, self.distance**2 - self.noise**2))


class DriftTracker:
    """Two exponentially decayed counts of the same clicks, in hashed buckets.

    With f and s the fast and the slow memory, each divided by its sum, the distance is ½·Σ_b |f_b − s_b|: the share of
    clicks that would have to go to another bucket. A click that is k clicks old weighs exp(−k / window).

    Noise: f_b − s_b = Σ_k (a_k − c_k)·[click k fell into b], where a and c are the normalised weights. When nothing
    moves, its mean is 0 and its variance q_b·(1 − q_b)·Σ_k (a_k − c_k)². So E|f_b − s_b| is about √(2/π · variance) for
    a frequent bucket, and q_b·Σ_k |a_k − c_k| for one so rare that its clicks seldom meet. The noise is half the sum of
    the smaller of both, with s for q.

    Args:
        num_buckets: a power of two, 2 … 2^20. Items that share a bucket hide each other's moves.
        fast_clicks: the fast memory's window, in clicks.
        slow_clicks: the slow one's; longer.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, num_buckets: int = 4096, fast_clicks: float = 5_000, slow_clicks: float = 50_000) -> None:
        if num_buckets not in (1 << power for power in range(1, 21)):
            raise ValueError(f"num_buckets must be a power of two in 2 … 2^20, not {num_buckets}")
        if not 1 <= fast_clicks < slow_clicks < np.inf:
            raise ValueError(f"windows must be 1 ≤ fast < slow, not {fast_clicks} and {slow_clicks}")
        self.windows = np.array([fast_clicks, slow_clicks], np.float64)
        self.num_clicks = 0
        self._counts: Float64Array = np.zeros((2, num_buckets))
        # New clicks grow in weight instead of old ones shrinking: a click costs two additions, whatever the size.
        self._weights: Float64Array = np.ones(2)
        self._shift = np.uint64(64 - num_buckets.bit_length() + 1)

    def update(self, item_hash: UInt64Array) -> None:
        """Counts clicks: uint64 [n], in the order of the stream."""
        _count(self._counts, self._weights, np.exp(1 / self.windows), item_hash, self._shift)
        self.num_clicks += len(item_hash)

    def shares(self) -> Float64Array:
        """float64 [2, num_buckets]: each bucket's share of the fast and of the slow memory; zeros before any click."""
        totals: Float64Array = self._counts.sum(axis=1, keepdims=True)
        return np.divide(self._counts, totals, where=totals > 0, out=np.zeros_like(self._counts))

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything counted, as a copy; `restore` makes a tracker of the same shape go on from it bit for bit."""
        return {
            "num_clicks": np.array(self.num_clicks, np.int64),
            "counts": self._counts.copy(),
            "weights": self._weights.copy(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        if state["counts"].shape != self._counts.shape:
            raise ValueError(f"counts must have the shape {self._counts.shape}, not {state['counts'].shape}")
        self.num_clicks = int(state["num_clicks"])
        self._counts[:] = state["counts"]
        self._weights[:] = state["weights"]


def frequency_drift(trackers: Sequence[DriftTracker]) -> FrequencyDrift:
    """The drift of several partitions' clicks taken together, each partition that has clicks weighing the same."""
    active = [tracker for tracker in trackers if tracker.num_clicks]
    if not active:
        return FrequencyDrift(0.0, 0.0)
    fast, slow = np.mean([tracker.shares() for tracker in active], axis=0)
    spreads = np.array([_weight_spread(tracker.num_clicks, *tracker.windows) for tracker in active])
    squares = spreads[:, 1].sum() / len(active) ** 2
    noise = np.minimum(np.sqrt(2 / np.pi * slow * (1 - slow) * squares), slow * spreads[:, 0].mean())
    return FrequencyDrift(float(np.abs(fast - slow).sum() / 2), float(noise.sum() / 2))


def _weight_spread(num_clicks: int, fast_clicks: float, slow_clicks: float) -> tuple[float, float]:
    """Σ_k |a_k − c_k| and Σ_k (a_k − c_k)² of the normalised weights of `num_clicks` clicks, in closed form."""

    def geometric(rate: float, terms: float) -> float:
        return float(np.expm1(-rate * terms) / np.expm1(-rate))

    fast, slow = 1 / fast_clicks, 1 / slow_clicks
    sum_fast, sum_slow = geometric(fast, num_clicks), geometric(slow, num_clicks)
    squares = (
        geometric(2 * fast, num_clicks) / sum_fast**2
        - 2 * geometric(fast + slow, num_clicks) / (sum_fast * sum_slow)
        + geometric(2 * slow, num_clicks) / sum_slow**2
    )
    crossing = min(np.log(sum_slow / sum_fast) / (fast - slow) + 1, num_clicks)  # newer clicks weigh more in `fast`
    absolute = 2 * (geometric(fast, crossing) / sum_fast - geometric(slow, crossing) / sum_slow)
    return max(absolute, 0.0), max(squares, 0.0)


@kernel
def _count(
    counts: Float64Array, weights: Float64Array, growth: Float64Array, item_hash: UInt64Array, shift: np.uint64
) -> None:
    for i in range(len(item_hash)):
        # Hashed already; the multiplication lets every bit have a say in the top ones.
        bucket = (item_hash[i] * np.uint64(0x9E3779B97F4A7C15)) >> shift
        for memory in range(2):
            counts[memory, bucket] += weights[memory]
            weights[memory] *= growth[memory]
            if weights[memory] > _RESCALE_AT:
                counts[memory] /= weights[memory]
                weights[memory] = 1.0
