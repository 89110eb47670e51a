"""How long a click takes until candidates show it: from its ingest time to the acknowledged publish, and by stage.

Station: between the loop, which takes and learns clicks, and the publisher, which hears Qdrant's acknowledgements. It
publishes nothing itself.

queue: from ingest to the poll that gave the click's micro-batch to the trainer; learn: from there until it is learnt;
publish: from there to the acknowledgement. The three add up to click → servable. All by wall clocks, those of Kafka and
of this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from streams.contract import Float64Array, UInt64Array
from trainer.metrics import Metrics

MANY = 4_096
"""Micro-batches that wait before they are put together."""
_NOTHING = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class _Learnt:
    """Clicks that are not servable yet."""

    step: int
    ingest_time: Float64Array
    """[n] seconds since the epoch."""
    learnt_at: Float64Array
    """[n] seconds since the epoch."""
    counts: Float64Array
    """[n] clicks of each entry."""
    item_hash: UInt64Array | None
    """[n]; None where entries were put together: they are servable when nothing is left over."""

    def part(self, which: np.ndarray) -> _Learnt:
        items = None if self.item_hash is None else self.item_hash[which]
        return _Learnt(self.step, self.ingest_time[which], self.learnt_at[which], self.counts[which], items)


class Freshness:
    """The learnt clicks that are not servable yet."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch."""
        self._whole, self._stages, self._clock = metrics.click_to_servable, metrics.servable_stage, clock
        self._taken_at = clock()
        self._waiting: list[_Learnt] = []

    @property
    def oldest(self) -> float:
        """Smallest ingest time among the clicks that are not servable, in seconds since the epoch; 0: there is none."""
        return min((float(waiting.ingest_time.min()) for waiting in self._waiting), default=0.0)

    def taken(self) -> None:
        """What is learnt from now on was given to the trainer now."""
        self._taken_at = self._clock()

    def note(self, step: int, item_hash: UInt64Array, ingest_time: Float64Array) -> None:
        """Clicks were learnt at this step, just now.

        Args:
            step: the trainer's.
            item_hash: uint64 [n] items that may be served: a click on another one never becomes servable.
            ingest_time: float64 [n] seconds since the epoch.
        """
        if not len(item_hash):
            return
        now = self._clock()
        self._stages.observe(np.maximum(self._taken_at - ingest_time, 0.0), value="queue")
        self._stages.observe(np.full(len(ingest_time), max(now - self._taken_at, 0.0)), value="learn")
        learnt_at = np.full(len(ingest_time), now)
        self._waiting.append(_Learnt(step, ingest_time, learnt_at, np.ones(len(ingest_time)), item_hash))
        if len(self._waiting) > MANY:
            # Qdrant is away for long: to a tenth of a second, so that memory grows with time and not with clicks.
            times = np.concatenate([np.stack([w.ingest_time, w.learnt_at]) for w in self._waiting], axis=1).round(1)
            counts = np.concatenate([waiting.counts for waiting in self._waiting])
            (ingested, learnt), inverse = np.unique(times, axis=1, return_inverse=True)
            summed = np.bincount(inverse.ravel(), counts).astype(np.float64)
            self._waiting = [_Learnt(step, ingested, learnt, summed, None)]

    def acknowledge(self, step: int, acknowledged_at: float, left: UInt64Array = _NOTHING) -> None:
        """Clicks learnt up to this step are servable since this moment, but for those on items that are left over.

        Args:
            step: of the copy that was published.
            acknowledged_at: seconds since the epoch.
            left: uint64 [m] items that were touched up to this step and did not fit.
        """
        still: list[_Learnt] = []
        for waiting in self._waiting:
            if waiting.step > step or (waiting.item_hash is None and len(left)):
                still.append(waiting)
                continue
            servable = waiting
            if waiting.item_hash is not None and len(left):
                is_left = np.isin(waiting.item_hash, left)
                servable = waiting.part(~is_left)
                if is_left.any():
                    still.append(waiting.part(is_left))
            self._whole.observe(np.maximum(acknowledged_at - servable.ingest_time, 0.0), servable.counts)
            self._stages.observe(np.maximum(acknowledged_at - servable.learnt_at, 0.0), servable.counts, "publish")
        self._waiting = still
