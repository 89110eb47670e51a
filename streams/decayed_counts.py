"""How often each item is clicked, at several half-lives at once: exponentially decayed counts in hashed buckets.

Station: beside `frequency`, fed with the same clicks and hashes; read for drift and by benchmarks. Where the gap
estimator remembers an item's last gaps, however long ago, this one remembers the stream's last clicks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.contract import Float64Array, UInt64Array
from streams.frequency import Estimate, bucket_of, check_alike, check_size, collision_ratio
from streams.kernel import kernel

_TABLE_AGES = 1_024
"""Decays of younger buckets are looked up: most buckets that are hit are, and 2^x is the costliest part of a click."""


class DecayedCountEstimator:
    """Decayed counts C of each bucket, one per half-life h, brought up to date only when the bucket is hit or asked.

    For a click at step t, counted in clicks: `C ← C · 2^(−(t − A) / h) + 1`, then `A ← t`, A being shared by all
    half-lives. The item's share of clicks is `min over hashes of C · 2^(−(t − A) / h) / S`, where S is the same decayed
    sum over all clicks: unbiased from the first click on, without collisions. A collision can only add: the least count
    answers. With `conservative`, a click raises none of its buckets above what the least of them has counted plus one
    (Estan and Varghese, SIGCOMM 2002), which still never undercounts and suffers less from collisions.

    With W = S² / Σ weight² (about 2.9 · h), the estimate of a share q has the standard deviation √(q · (1 − q) / W), so
    an item's effective count is q · W.

    Memory: 8 · (1 + number of half-lives) bytes a bucket, in one cache line where they fit.

    Args:
        half_lives: in clicks, ≥ 1; infinity is a plain count.
        num_buckets: H for each hash, 2 … 2^30.
        num_hashes: m, 1 … 16.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        half_lives: Sequence[float] = (5_000.0,),
        num_buckets: int = 2**18,
        num_hashes: int = 4,
        *,
        conservative: bool = True,
    ) -> None:
        check_size(num_buckets, num_hashes)
        if not half_lives or not all(half_life >= 1 for half_life in half_lives):
            raise ValueError(f"half_lives must be one or more numbers of clicks ≥ 1, not {list(half_lives)}")
        self.half_lives = tuple(float(half_life) for half_life in half_lives)
        self.num_buckets, self.num_hashes, self.conservative = num_buckets, num_hashes, conservative
        self.step = 0
        """Clicks so far."""
        self.num_occupied = 0
        """Buckets that were ever hit, over all hashes."""
        self._rates: Float64Array = 1 / np.array(self.half_lives)
        self._decays: Float64Array = np.exp2(-np.arange(_TABLE_AGES)[:, None] * self._rates)
        # [hash, bucket, A and then C of each half-life]: A is a whole number below 2^53, exact in a float.
        self._buckets: Float64Array = np.zeros((num_hashes, num_buckets, 1 + len(self.half_lives)))
        # Σ weight and Σ weight² of all clicks, for each half-life.
        self._totals: Float64Array = np.zeros((2, len(self.half_lives)))

    def update(self, item_hash: UInt64Array) -> None:
        """Counts clicks: uint64 [n], in the order of the stream."""
        hits = _update(self._buckets, self._totals, item_hash, self.step, self._rates, self._decays, self.conservative)
        self.num_occupied += int(hits)
        self.step += len(item_hash)

    def estimate(self, item_hash: UInt64Array) -> Estimate:
        """Shares of clicks of items uint64 [n] and what they rest on, each [n, number of half-lives].

        An item of a bucket that was never hit has the share 0, and so has, in 64 bits, one that is silent for over a
        thousand half-lives; `log_q` tells them apart.
        """
        weight, squares = np.maximum(self._totals, 1e-300)
        share = _least_counts(self._buckets, item_hash, self.step, self._rates, self._decays, False) / weight
        return Estimate(share, share * weight**2 / squares)

    def log_q(self, item_hash: UInt64Array) -> Float64Array:
        """Natural logs of the shares, [n, number of half-lives], without smoothing; −inf for a bucket never hit.

        Of all items that are not clicked, log C falls at the same rate, ln 2 / half-life a click.
        """
        with np.errstate(divide="ignore"):
            log_weight = np.log(self._totals[0]) if self.step else np.zeros(len(self.half_lives))
        log2_counts = _least_counts(self._buckets, item_hash, self.step, self._rates, self._decays, True)
        return log2_counts * math.log(2) - log_weight

    @property
    def num_bytes(self) -> int:
        """Memory of the buckets: 8 · (1 + number of half-lives) · num_buckets · num_hashes."""
        return self._buckets.nbytes

    @property
    def occupied_ratio(self) -> float:
        """Share of buckets that were ever hit, 0 … 1."""
        return self.num_occupied / (self.num_hashes * self.num_buckets)

    @property
    def collision_ratio(self) -> float:
        """Estimated share of items whose every bucket is another item's, too; see `frequency.collision_ratio`."""
        return collision_ratio(self.occupied_ratio, self.num_buckets, self.num_hashes)

    @classmethod
    def merged(cls, estimators: Sequence[DecayedCountEstimator]) -> DecayedCountEstimator:
        """One estimator that goes on for the joint stream of several partitions.

        Its counts are the sums of theirs as of now, and so are the totals: without collisions its shares are exactly
        those of `frequency.estimate_together`, weighed by decayed clicks. From here on half-lives are clicks of the
        joint stream. Summed buckets collide more than summed answers do: to read, do not merge.

        Raises:
            ValueError: none, or estimators of different settings.
        """
        check_alike([(e.half_lives, e.num_buckets, e.num_hashes, e.conservative) for e in estimators])
        first = estimators[0]
        one = cls(first.half_lives, first.num_buckets, first.num_hashes, conservative=first.conservative)
        one.step = sum(each.step for each in estimators)
        for each in estimators:
            age = (each.step - each._buckets[:, :, :1]) * (each._buckets[:, :, :1] > 0)
            one._buckets[:, :, 1:] += each._buckets[:, :, 1:] * np.exp2(-age * each._rates)
            one._buckets[:, :, 0] += each._buckets[:, :, 0] > 0
            one._totals += each._totals
        ever = one._buckets[:, :, 0] > 0
        one._buckets[ever, 0] = one.step
        one.num_occupied = int(ever.sum())
        return one

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything counted, as a copy; `restore` makes an estimator of the same settings go on bit for bit."""
        counters = np.array([self.step, self.num_occupied], np.int64)
        return {"counters": counters, "buckets": self._buckets.copy(), "totals": self._totals.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of an estimator with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        if state["buckets"].shape != self._buckets.shape:
            raise ValueError(f"buckets must have the shape {self._buckets.shape}, not {state['buckets'].shape}")
        self._buckets[:] = state["buckets"]
        self._totals[:] = state["totals"]
        self.step, self.num_occupied = (int(value) for value in state["counters"])


@kernel
def _decay(age: float, j: int, rates: Float64Array, decays: Float64Array) -> float:
    """What half-life j leaves of a count after `age` clicks."""
    return float(decays[int(age), j] if age < len(decays) else np.exp2(-age * rates[j]))


@kernel
def _update(
    buckets: Float64Array,
    totals: Float64Array,
    item_hash: UInt64Array,
    step: int,
    rates: Float64Array,
    decays: Float64Array,
    conservative: bool,
) -> int:
    num_hashes, num_buckets = buckets.shape[0], buckets.shape[1]
    newly_occupied = 0
    least = np.empty(len(rates))
    own = np.empty(num_hashes, np.uint64)
    for i in range(len(item_hash)):
        step += 1
        for j in range(len(rates)):
            totals[0, j] = totals[0, j] * decays[1, j] + 1.0
            totals[1, j] = totals[1, j] * decays[1, j] * decays[1, j] + 1.0
            least[j] = np.inf
        for k in range(num_hashes):
            own[k] = bucket = bucket_of(item_hash[i], k, num_buckets)
            last_seen_step = buckets[k, bucket, 0]
            if last_seen_step == 0:
                newly_occupied += 1
            for j in range(len(rates)):
                count = buckets[k, bucket, 1 + j] * _decay(step - last_seen_step, j, rates, decays)
                buckets[k, bucket, 1 + j] = count
                least[j] = min(least[j], count)
            buckets[k, bucket, 0] = step
        for k in range(num_hashes):
            for j in range(len(rates)):
                count = buckets[k, own[k], 1 + j]
                buckets[k, own[k], 1 + j] = max(count, least[j] + 1.0) if conservative else count + 1.0
    return newly_occupied


@kernel
def _least_counts(
    buckets: Float64Array, item_hash: UInt64Array, step: int, rates: Float64Array, decays: Float64Array, in_log2: bool
) -> Float64Array:
    """The decayed count, or its log2, the least over the hashes: [n, number of half-lives]."""
    counts = np.full((len(item_hash), len(rates)), np.inf)
    for i in range(len(item_hash)):
        for k in range(buckets.shape[0]):
            bucket = bucket_of(item_hash[i], k, buckets.shape[1])
            age = step - buckets[k, bucket, 0]
            for j in range(len(rates)):
                count = buckets[k, bucket, 1 + j]
                count = np.log2(count) - age * rates[j] if in_log2 else count * _decay(age, j, rates, decays)
                counts[i, j] = min(counts[i, j], count)
    return counts
