"""How far the item distribution has moved lately: three distances between a fast and a slow memory of the clicks.

Station: beside the batcher, fed with the same clicks; read by the metrics. It corrects nothing and raises no alarm, and
knows buckets, not items: for those see `movers` and `newcomers`.
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
NUM_DECILES = 10
LEAST_SHARE = 1e-4
"""A decile's share counts as no less in the stability index, which would be infinite at 0."""
_RESCALE_AT = 1e100


@dataclass(frozen=True)
class FrequencyDrift:
    """`distance`: 0 … 1. `noise`: what sampling alone makes of it when nothing has moved."""

    distance: float
    noise: float

    @property
    def corrected(self) -> float:
        """√(distance² − noise²), at least 0: near 0 while nothing moves, the distance itself far above the noise.

        A bucket's move and its noise add up like the sides of a right angle; subtracting the noise plainly would halve
        a moderate drift.
        """
        return math.sqrt(max(0.0, self.distance**2 - self.noise**2))


@dataclass(frozen=True)
class PopulationStability:
    """`index`: PSI, ≥ 0; usually 0.1 is called moderate and 0.25 significant. `noise`: its mean when nothing moves."""

    index: float
    noise: float

    @property
    def corrected(self) -> float:
        """index − noise, at least 0: the index is a sum of squares already."""
        return max(0.0, self.index - self.noise)


class DriftTracker:
    """Two decayed counts of the same clicks, in hashed buckets: a click that is k clicks old weighs exp(−k / window).

    Each click belongs to one of two halves, taken in turns, so that one half can sort the buckets by popularity and the
    other be counted in that order: sorted by its own counts, a bucket that is high by chance would seem to fall.

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
        # [half, memory, bucket]
        self._counts: Float64Array = np.zeros((2, 2, num_buckets))
        # New clicks grow in weight instead of old ones shrinking: a click costs two additions, whatever the size.
        self._weights: Float64Array = np.ones(2)
        self._shift = np.uint64(64 - num_buckets.bit_length() + 1)

    def update(self, item_hash: UInt64Array) -> None:
        """Counts clicks: uint64 [n], in the order of the stream."""
        _count(self._counts, self._weights, np.exp(1 / self.windows), item_hash, self.num_clicks, self._shift)
        self.num_clicks += len(item_hash)

    def shares(self) -> Float64Array:
        """float64 [2, num_buckets]: each bucket's share of the fast and of the slow memory; zeros before any click."""
        return _normalised(self._counts.sum(axis=0))

    def half_shares(self) -> Float64Array:
        """float64 [2, 2, num_buckets]: the same of each half of the clicks alone."""
        return _normalised(self._counts)

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
    """Total variation of several partitions' clicks taken together, each partition that has clicks weighing the same.

    With f and s the fast and the slow memory, each divided by its sum, the distance is ½·Σ_b |f_b − s_b|: the share of
    clicks that would have to go to another bucket.

    Noise: f_b − s_b = Σ_k (a_k − c_k)·[click k fell into b], where a and c are the normalised weights. When nothing
    moves, its mean is 0 and its variance q_b·(1 − q_b)·Σ_k (a_k − c_k)². So E|f_b − s_b| is about √(2/π · variance) for
    a frequent bucket, and q_b·Σ_k |a_k − c_k| for one so rare that its clicks seldom meet. The noise is half the sum of
    the smaller of both, with s for q.
    """
    active = [tracker for tracker in trackers if tracker.num_clicks]
    if not active:
        return FrequencyDrift(0.0, 0.0)
    fast, slow = np.mean([tracker.shares() for tracker in active], axis=0)
    absolute, squares = _spread(active)
    noise = np.minimum(np.sqrt(2 / np.pi * slow * (1 - slow) * squares), slow * absolute)
    return FrequencyDrift(float(np.abs(fast - slow).sum() / 2), float(noise.sum() / 2))


def jensen_shannon(trackers: Sequence[DriftTracker]) -> FrequencyDrift:
    """Jensen-Shannon distance, 0 … 1: √(½·Σ f·log2(f/m) + ½·Σ s·log2(s/m)) with m = (f + s) / 2; as above otherwise.

    Against total variation, buckets that have come or gone altogether weigh more than frequent ones that sway.

    Noise: with j(f, s) = ½·f·log2(f/m) + ½·s·log2(s/m), a frequent bucket has j ≈ (f − s)² / (8·q·ln 2), so in the mean
    (1 − q)·Σ_k (a_k − c_k)² / (8·ln 2); a rare one holds one click at a time, so q·Σ_k j(a_k, c_k).
    """
    active = [tracker for tracker in trackers if tracker.num_clicks]
    if not active:
        return FrequencyDrift(0.0, 0.0)
    fast, slow = np.mean([tracker.shares() for tracker in active], axis=0)
    _, squares = _spread(active)
    rare = np.mean([_mean_divergence(tracker.num_clicks, *tracker.windows) for tracker in active])
    noise = np.minimum((1 - slow) * (slow > 0) * squares / (8 * math.log(2)), slow * rare)
    return FrequencyDrift(math.sqrt(_divergence(fast, slow)), math.sqrt(noise.sum()))


def population_stability(trackers: Sequence[DriftTracker]) -> PopulationStability:
    """PSI, Σ_d (f_d − s_d)·ln(f_d / s_d) over the slow memory's deciles of popularity; several partitions as above.

    A decile is a tenth of the slow memory's clicks, not of its buckets: the first holds the most popular buckets, the
    last the many rarest. A bucket of more than a tenth fills one by itself. Each half of the clicks is counted in the
    deciles of the other, and the mean of both is the index.

    Noise: Σ_k (a_k − c_k)² of one half's clicks, twice that of all, times Σ_d (1 − s_d).
    """
    active = [tracker for tracker in trackers if tracker.num_clicks > 1]
    if not active:
        return PopulationStability(0.0, 0.0)
    halves = np.mean([tracker.half_shares() for tracker in active], axis=0)
    _, squares = _spread(active)
    indices, noises = [], []
    for sorting, counted in ((0, 1), (1, 0)):
        order = np.argsort(-halves[sorting, SLOW], kind="stable")
        sorted_share = halves[sorting, SLOW][order]
        decile = ((np.cumsum(sorted_share) - sorted_share / 2) * NUM_DECILES).astype(int).clip(0, NUM_DECILES - 1)
        fast, slow = (np.bincount(decile, share[order], NUM_DECILES) for share in halves[counted])
        filled = fast + slow > 0
        fast, slow = np.maximum(fast[filled], LEAST_SHARE), np.maximum(slow[filled], LEAST_SHARE)
        indices.append(((fast - slow) * np.log(fast / slow)).sum())
        noises.append(2 * squares * (1 - slow).sum())
    return PopulationStability(float(np.mean(indices)), float(np.mean(noises)))


def weight_spread(num_clicks: int, fast_clicks: float, slow_clicks: float) -> tuple[float, float]:
    """Σ_k |a_k − c_k| and Σ_k (a_k − c_k)² of the normalised weights of `num_clicks` ≥ 1 clicks, in closed form."""

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


def _spread(active: Sequence[DriftTracker]) -> tuple[float, float]:
    """`weight_spread` of clicks of which each partition's weigh 1 / their number."""
    spreads = np.array([weight_spread(tracker.num_clicks, *tracker.windows) for tracker in active])
    return float(spreads[:, 0].mean()), float(spreads[:, 1].sum() / len(active) ** 2)


def _mean_divergence(num_clicks: int, fast_clicks: float, slow_clicks: float) -> float:
    """Σ_k j(a_k, c_k), over groups of clicks whose ages differ by a few percent, which takes off next to nothing."""
    ages = np.unique(np.concatenate([[0.0], np.geomspace(1, num_clicks, 1_000)]))
    fast, slow = (
        np.diff(np.expm1(-ages / window) / np.expm1(-num_clicks / window)) for window in (fast_clicks, slow_clicks)
    )
    return _divergence(fast, slow)


def _divergence(fast: Float64Array, slow: Float64Array) -> float:
    middle = (fast + slow) / 2
    parts = [part[part > 0] * np.log2(part[part > 0] / middle[part > 0]) for part in (fast, slow)]
    return max(0.0, float(parts[FAST].sum() + parts[SLOW].sum()) / 2)


def _normalised(counts: Float64Array) -> Float64Array:
    totals: Float64Array = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, totals, where=totals > 0, out=np.zeros_like(counts))


@kernel
def _count(
    counts: Float64Array,
    weights: Float64Array,
    growth: Float64Array,
    item_hash: UInt64Array,
    num_clicks: int,
    shift: np.uint64,
) -> None:
    golden = np.uint64(0x9E3779B97F4A7C15)
    for i in range(len(item_hash)):
        # Hashed already; the multiplication lets every bit have a say in the top ones.
        bucket = (item_hash[i] * golden) >> shift
        # Turns without a period that the stream could have, too.
        half = np.int64((np.uint64(num_clicks + i) * golden) >> np.uint64(63))
        for memory in range(2):
            counts[half, memory, bucket] += weights[memory]
            weights[memory] *= growth[memory]
            if weights[memory] > _RESCALE_AT:
                counts[:, memory] /= weights[memory]
                weights[memory] = 1.0
