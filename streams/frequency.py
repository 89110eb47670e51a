"""How often each item is clicked, from hashed arrays of fixed size: the paper's gap estimator (Algorithms 2 and 3).

Station: between history and batcher; gives the micro-batch its sampling probabilities. It does not know ids (only their
hashes), batches' cuts or Kafka, and never forgets a bucket by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from streams.contract import Float32Array, Float64Array, UInt64Array
from streams.kernel import kernel

EstimatorMode = Literal["click", "batch"]

# One record of 16 bytes a bucket, so that one cache line answers for all three.
BUCKET = np.dtype([("last_seen_step", np.int64), ("mean_gap", np.float32), ("num_gaps", np.uint32)])
Buckets = npt.NDArray[Any]

_SALTS = np.array([0x9E3779B97F4A7C15 * (i + 1) & (2**64 - 1) for i in range(16)], np.uint64)
MAX_HASHES = len(_SALTS)
MAX_BUCKETS = 2**30


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of n items; float64, [n], or [n, number of half-lives] where there are several."""

    share: Float64Array
    """Estimated share of clicks, 0 … 1."""
    effective_count: Float64Array
    """How many clicks the share rests on: its standard deviation is about share / √effective_count, collisions apart.

    0 where no bucket of the item was ever hit.
    """


class GapEstimator:
    """Mean gap, in steps, between two hits of an item's buckets; its sampling probability is 1 / gap.

    For every hit at step t (paper, Algorithm 2): `B ← (1 − rate)·B + rate·(t − A)`, then `A ← t`, where A is
    `last_seen_step` and B is `mean_gap`. With several hashes (Algorithm 3) the longest gap answers, because a collision
    can only make a gap too short.

    mode "click" (default): one update per click, and a step is a click. 1 / gap is the item's *share of clicks* q.
    mode "batch" (the paper's): one update per distinct item of a batch, and a step is a batch. 1 / gap is the *presence
    probability* 1 − (1 − q)^B, which saturates for popular items.

    Departures from the paper, all undone by `initial_gap`:
    - the first hit of a bucket only sets A: the time before an item's birth is no gap of it;
    - the k-th gap is averaged in at the rate max(alpha, 1/k), so that B starts as the plain mean of its gaps, unbiased;
    - a bucket that is hit no more answers with t − A as soon as that is longer than B.

    In mode "batch" all items of a batch count at once: two that share a bucket hit it once, for a gap of 0 steps would
    be no gap of either. (Taken one after the other, as the paper's loop is written, they would.)

    An item of buckets that were hit once answers 1 / t: once in all the steps so far; one never hit, 1 / (t + 1).

    Args:
        num_buckets: H, 2 … 2^30; several times the number of live items. 16 bytes each, per hash.
        num_hashes: m, 1 … 16.
        alpha: 0 < alpha ≤ 1; a bucket remembers its last 1 / alpha or so gaps.
        initial_gap: paper-exact start: A = 0 and B = this everywhere, constant rate alpha, 1 / B as the answer. The
            paper's simulation has 100. None: the rules above.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        num_buckets: int = 2**18,
        num_hashes: int = 4,
        alpha: float = 0.01,
        mode: EstimatorMode = "click",
        *,
        initial_gap: float | None = None,
    ) -> None:
        check_size(num_buckets, num_hashes)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {alpha}")
        if mode not in ("click", "batch"):
            raise ValueError(f"mode must be 'click' or 'batch', not {mode!r}")
        if initial_gap is not None and not 1 <= initial_gap < np.inf:
            raise ValueError(f"initial_gap must be at least 1 and finite, not {initial_gap}")
        self.num_buckets, self.num_hashes, self.alpha, self.mode = num_buckets, num_hashes, alpha, mode
        self.initial_gap, self.paper_exact = initial_gap, initial_gap is not None
        self.step = 0
        """Steps so far: clicks or batches, as `mode` says."""
        self.num_occupied = 0
        """Buckets that were ever hit, over all hashes."""
        self._buckets: Buckets = np.zeros((num_hashes, num_buckets), BUCKET)
        if initial_gap is not None:
            self._buckets["mean_gap"] = initial_gap

    def update(self, item_hash: UInt64Array) -> None:
        """Counts clicks: uint64 [n], in the order of the stream; in mode "batch" all items of one batch."""
        if not len(item_hash):
            return
        if self.mode == "batch":
            item_hash = np.unique(item_hash)
            self.step += 1
        hits = _update(self._buckets, item_hash, self.step, self.mode == "click", self.alpha, not self.paper_exact)
        self.num_occupied += int(hits)
        if self.mode == "click":
            self.step += len(item_hash)

    def sampling_probability(self, item_hash: UInt64Array, *, in_batch: bool = False) -> Float32Array:
        """Estimated share of clicks (mode "click") or presence in a batch, of items uint64 [n]: float32 [n] in (0, 1].

        in_batch: these are items of the batch that was counted last. Then t − A is only where in the batch they stood:
        taken for silence, it would lengthen the gap of an item of 1 / gap = q by a factor of up to 1 + 1/e.
        """
        share, _ = self._answers(item_hash, in_batch)
        return share.astype(np.float32)

    def estimate(self, item_hash: UInt64Array, *, in_batch: bool = False) -> Estimate:
        """The same answers with their uncertainty.

        The effective count is that of the gaps averaged: 1 / Σ weight². It grows with each gap up to (2 − alpha) /
        alpha and is 1 where only one hit or only the silence since the last one speaks.
        """
        share, num_gaps = self._answers(item_hash, in_batch)
        if self.paper_exact:
            return Estimate(share, np.minimum(num_gaps, (2 - self.alpha) / self.alpha))
        settled = self.alpha / (2 - self.alpha)
        later_gaps = np.maximum(num_gaps - 1 / self.alpha, 0)
        squares = settled + (self.alpha - settled) * (1 - self.alpha) ** (2 * later_gaps)
        return Estimate(share, np.where(num_gaps * self.alpha <= 1, num_gaps, 1 / squares))

    def _answers(self, item_hash: UInt64Array, in_batch: bool) -> tuple[Float64Array, Float64Array]:
        first_hits = not self.paper_exact
        return _probability(self._buckets, item_hash, self.step, first_hits, first_hits and not in_batch)

    @property
    def num_bytes(self) -> int:
        """Memory of the buckets: 16 · num_buckets · num_hashes."""
        return self._buckets.nbytes

    @property
    def occupied_ratio(self) -> float:
        """Share of buckets that were ever hit, 0 … 1. Far above a half, collisions are common: raise num_buckets."""
        return self.num_occupied / (self.num_hashes * self.num_buckets)

    @property
    def collision_ratio(self) -> float:
        """See `collision_ratio`, the function."""
        return collision_ratio(self.occupied_ratio, self.num_buckets, self.num_hashes)

    @classmethod
    def merged(cls, estimators: Sequence[GapEstimator]) -> GapEstimator:
        """One estimator that goes on for the joint stream of several partitions, bucket by bucket.

        In the joint stream a bucket's hits come at the sum of the partitions' rates, so
        `1 / B = Σ_p w_p / B_p`, where w_p is the partition's share of all steps so far; the silence is the shortest of
        (t_p − A_p) / w_p; the gaps are as many as the hits of all partitions but one. An item keyed to one partition is
        answered as there, times w_p. `estimate_together` reads without merging and suffers fewer collisions.

        Raises:
            ValueError: none, or estimators of different settings.
        """
        check_alike([(e.num_buckets, e.num_hashes, e.alpha, e.mode, e.initial_gap) for e in estimators])
        first = estimators[0]
        one = cls(first.num_buckets, first.num_hashes, first.alpha, first.mode, initial_gap=first.initial_gap)
        one.step = sum(e.step for e in estimators)
        rate, silence = np.zeros(one._buckets.shape), np.full(one._buckets.shape, np.inf)
        hits = np.zeros(one._buckets.shape, np.int64)
        for each in filter(lambda e: e.step, estimators):
            weight, part = each.step / one.step, each._buckets
            was_hit = part["last_seen_step"] > 0
            gap = np.where(part["num_gaps"] > 0, part["mean_gap"], each.step).astype(np.float64)
            if one.paper_exact:
                gap = part["mean_gap"].astype(np.float64)
            rate += weight * np.where(was_hit | one.paper_exact, 1 / gap, 0)
            silence = np.where(was_hit, np.minimum(silence, (each.step - part["last_seen_step"]) / weight), silence)
            hits += np.where(was_hit, part["num_gaps"].astype(np.int64) + (not one.paper_exact), 0)
        ever = np.isfinite(silence)
        one._buckets["last_seen_step"][ever] = np.clip(one.step - np.rint(silence[ever]), 1, None).astype(np.int64)
        one._buckets["num_gaps"] = np.clip(hits - (not one.paper_exact), 0, 1 << 30)
        known = rate > 0 if one.paper_exact else hits > 1
        one._buckets["mean_gap"][known] = 1 / rate[known]
        one.num_occupied = int(ever.sum())
        return one

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything learnt, as a copy; `restore` makes an estimator of the same shape go on from it bit for bit."""
        counters = np.array([self.step, self.num_occupied], np.int64)
        return {"counters": counters, **{name: self._buckets[name].copy() for name in BUCKET.names or ()}}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of an estimator with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        for name in BUCKET.names or ():
            if state[name].shape != self._buckets.shape:
                raise ValueError(f"{name} must have the shape {self._buckets.shape}, not {state[name].shape}")
            self._buckets[name] = state[name]
        self.step, self.num_occupied = (int(value) for value in state["counters"])


class FrequencyEstimator(Protocol):
    """What both estimators answer."""

    step: int

    def estimate(self, item_hash: UInt64Array) -> Estimate:
        """Shares of clicks of items uint64 [n], with their uncertainty."""
        ...


def estimate_together(estimators: Sequence[FrequencyEstimator], item_hash: UInt64Array) -> Estimate:
    """Shares of the clicks of several partitions together: each partition weighs as many clicks as it has counted.

    Raises:
        ValueError: no partition has counted a click.
    """
    num_steps = sum(estimator.step for estimator in estimators)
    if not num_steps:
        raise ValueError("estimators that have counted nothing know no shares")
    active = [(each.step / num_steps, each.estimate(item_hash)) for each in estimators if each.step]
    parts = [weight * np.where(one.effective_count > 0, one.share, 0.0) for weight, one in active]
    share = np.sum(parts, axis=0)
    variance = np.sum(
        [part**2 / np.maximum(one.effective_count, 1e-300) for part, (_, one) in zip(parts, active, strict=True)],
        axis=0,
    )
    was_hit = variance > 0
    effective_count = np.divide(share**2, variance, where=was_hit, out=np.zeros_like(share))
    return Estimate(np.where(was_hit, share, 1 / (num_steps + 1)), effective_count)


def collision_ratio(occupied_ratio: float, num_buckets: int, num_hashes: int) -> float:
    """Estimated share of items that share *each* of their buckets with another item: their answers are too high.

    Linear counting: n items leave (1 − 1/H)^n of a hash's buckets free, which gives n; an item meets one of the n − 1
    others in a bucket with the probability 1 − (1 − 1/H)^(n − 1), and in all m of them with the m-th power of that.
    """
    if occupied_ratio >= 1:
        return 1.0
    free_after_one = 1 - 1 / num_buckets
    num_items = math.log1p(-occupied_ratio) / math.log(free_after_one)
    return float((1 - free_after_one ** max(num_items - 1, 0)) ** num_hashes)


def check_alike(settings: Sequence[object]) -> None:
    """Raises ValueError where estimators of these settings cannot become one."""
    if not settings or any(each != settings[0] for each in settings):
        raise ValueError(f"only estimators of the same settings can be merged, at least one: not {list(settings)}")


def check_size(num_buckets: int, num_hashes: int) -> None:
    """Raises ValueError where an estimator cannot be of this size."""
    if not 2 <= num_buckets <= MAX_BUCKETS:
        raise ValueError(f"num_buckets must be in 2 … 2^30, not {num_buckets}")
    if not 1 <= num_hashes <= MAX_HASHES:
        raise ValueError(f"num_hashes must be in 1 … {MAX_HASHES}, not {num_hashes}")


@kernel
def bucket_of(item_hash: np.uint64, hash_number: int, num_buckets: int) -> np.uint64:
    """The item's bucket under one of the hashes: the finaliser of splitmix64 over the salted id, scaled to the size."""
    mixed = item_hash ^ _SALTS[hash_number]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    top_half = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
    return np.uint64((top_half * np.uint64(num_buckets)) >> np.uint64(32))


@kernel
def _update(buckets: Buckets, item_hash: UInt64Array, step: int, by_click: bool, alpha: float, warm: bool) -> int:
    newly_occupied = 0
    for i in range(len(item_hash)):
        if by_click:
            step += 1
        for k in range(len(buckets)):
            bucket = buckets[k, bucket_of(item_hash[i], k, buckets.shape[1])]
            if bucket.last_seen_step == 0:
                newly_occupied += 1
            if bucket.last_seen_step > 0 or not warm:
                gap = step - bucket.last_seen_step
                if gap == 0:
                    continue
                bucket.num_gaps = min(bucket.num_gaps + 1, 1 << 30)
                rate = max(alpha, 1.0 / bucket.num_gaps) if warm else alpha
                bucket.mean_gap = (1.0 - rate) * bucket.mean_gap + rate * gap
            bucket.last_seen_step = step
    return newly_occupied


@kernel
def _probability(
    buckets: Buckets, item_hash: UInt64Array, step: int, first_hits: bool, stale_aware: bool
) -> tuple[Float64Array, Float64Array]:
    """1 / gap, and how many gaps it rests on."""
    probability, support = np.empty(len(item_hash)), np.empty(len(item_hash))
    for i in range(len(item_hash)):
        longest, num_gaps = np.float64(0), np.float64(0)
        for k in range(len(buckets)):
            bucket = buckets[k, bucket_of(item_hash[i], k, buckets.shape[1])]
            gap, count = np.float64(bucket.mean_gap), np.float64(bucket.num_gaps)
            if first_hits and bucket.num_gaps == 0:  # hit once or never: its gap is at least about this
                was_hit = bucket.last_seen_step > 0
                gap, count = np.float64(step + (not was_hit)), np.float64(was_hit)
            silence = np.float64(step - bucket.last_seen_step)
            if stale_aware and silence > gap:
                gap, count = silence, min(count, np.float64(1))
            if gap > longest:
                longest, num_gaps = gap, count
        probability[i], support[i] = 1.0 / max(longest, np.float64(1)), num_gaps
    return probability, support
