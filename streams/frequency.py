"""How often each item is clicked, from hashed arrays of fixed size: the paper's gap estimator (Algorithms 2 and 3).

Station: between history and batcher; gives the micro-batch its sampling probabilities. It does not know ids (only their
hashes), batches' cuts or Kafka, and never forgets a bucket by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from streams.contract import Float32Array, UInt64Array
from streams.kernel import kernel

EstimatorMode = Literal["click", "batch"]

# One record of 16 bytes a bucket, so that one cache line answers for all three.
BUCKET = np.dtype([("last_seen_step", np.int64), ("mean_gap", np.float32), ("num_gaps", np.uint32)])
Buckets = npt.NDArray[Any]

_SALTS = np.array([0x9E3779B97F4A7C15 * (i + 1) & (2**64 - 1) for i in range(16)], np.uint64)
MAX_HASHES = len(_SALTS)


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
    - a bucket that is hit no more answers with t − A as soon as that is longer than B;
    - in mode "batch", two items of one batch that share a bucket count as one: their gap of 0 is no gap of either.

    An item of buckets that were hit once answers 1 / t: once in all the steps so far; one never hit, 1 / (t + 1).

    Args:
        num_buckets: H, a power of two, 2 … 2^30; several times the number of live items. 16 bytes each, per hash.
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
        if num_buckets not in (1 << power for power in range(1, 31)):
            raise ValueError(f"num_buckets must be a power of two in 2 … 2^30, not {num_buckets}")
        if not 1 <= num_hashes <= MAX_HASHES:
            raise ValueError(f"num_hashes must be in 1 … {MAX_HASHES}, not {num_hashes}")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], not {alpha}")
        if mode not in ("click", "batch"):
            raise ValueError(f"mode must be 'click' or 'batch', not {mode!r}")
        if initial_gap is not None and not 1 <= initial_gap < np.inf:
            raise ValueError(f"initial_gap must be at least 1 and finite, not {initial_gap}")
        self.num_buckets, self.num_hashes, self.alpha, self.mode = num_buckets, num_hashes, alpha, mode
        self.paper_exact = initial_gap is not None
        self.step = 0
        """Steps so far: clicks or batches, as `mode` says."""
        self.num_occupied = 0
        """Buckets that were ever hit, over all hashes."""
        self._shift = np.uint64(64 - num_buckets.bit_length() + 1)
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
        hits = _update(
            self._buckets, item_hash, self.step, self.mode == "click", self.alpha, not self.paper_exact, self._shift
        )
        self.num_occupied += int(hits)
        if self.mode == "click":
            self.step += len(item_hash)

    def sampling_probability(self, item_hash: UInt64Array, *, in_batch: bool = False) -> Float32Array:
        """Estimated share of clicks (mode "click") or presence in a batch, of items uint64 [n]: float32 [n] in (0, 1].

        in_batch: these are items of the batch that was counted last. Then t − A is only where in the batch they stood:
        taken for silence, it would lengthen the gap of an item of 1 / gap = q by a factor of up to 1 + 1/e.
        """
        first_hits = not self.paper_exact
        return _probability(self._buckets, item_hash, self.step, first_hits, first_hits and not in_batch, self._shift)

    @property
    def occupied_ratio(self) -> float:
        """Share of buckets that were ever hit, 0 … 1. Far above a half, collisions are common: raise num_buckets."""
        return self.num_occupied / (self.num_hashes * self.num_buckets)

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


@kernel
def _bucket(item_hash: np.uint64, salt: np.uint64, shift: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 over the salted hash; its top bits are the bucket."""
    mixed = item_hash ^ salt
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> shift


@kernel
def _update(
    buckets: Buckets, item_hash: UInt64Array, step: int, by_click: bool, alpha: float, warm: bool, shift: np.uint64
) -> int:
    newly_occupied = 0
    for i in range(len(item_hash)):
        if by_click:
            step += 1
        for k in range(len(buckets)):
            bucket = buckets[k, _bucket(item_hash[i], _SALTS[k], shift)]
            if bucket.last_seen_step == 0:
                newly_occupied += 1
            if bucket.last_seen_step > 0 or not warm:
                gap = step - bucket.last_seen_step
                if gap == 0 and warm:
                    continue
                bucket.num_gaps = min(bucket.num_gaps + 1, 1 << 30)
                rate = max(alpha, 1.0 / bucket.num_gaps) if warm else alpha
                bucket.mean_gap = (1.0 - rate) * bucket.mean_gap + rate * gap
            bucket.last_seen_step = step
    return newly_occupied


@kernel
def _probability(
    buckets: Buckets, item_hash: UInt64Array, step: int, first_hits: bool, stale_aware: bool, shift: np.uint64
) -> Float32Array:
    probability = np.empty(len(item_hash), np.float32)
    for i in range(len(item_hash)):
        longest = np.float64(1.0)
        for k in range(len(buckets)):
            bucket = buckets[k, _bucket(item_hash[i], _SALTS[k], shift)]
            gap = np.float64(bucket.mean_gap)
            if first_hits and bucket.num_gaps == 0:  # hit once or never: its gap is at least about this
                gap = np.float64(step if bucket.last_seen_step > 0 else step + 1)
            if stale_aware:
                gap = max(gap, np.float64(step - bucket.last_seen_step))
            longest = max(longest, gap)
        probability[i] = 1.0 / longest
    return probability
