"""How long a click takes until candidates show it: from its ingest time to the acknowledged publish.

Station: between the loop, which learns clicks, and the publisher, which hears Qdrant's acknowledgements. It publishes
nothing itself.
"""

from __future__ import annotations

import numpy as np

from streams.contract import Float64Array
from trainer.metrics import SecondsHistogram

MANY = 4_096
"""Micro-batches that wait before they are put together."""


class Freshness:
    """Ingest times of the learnt clicks that are not servable yet."""

    def __init__(self, click_to_servable: SecondsHistogram) -> None:
        self._histogram = click_to_servable
        self._waiting: list[tuple[int, Float64Array, Float64Array]] = []
        """Step, ingest times [n], number of clicks at each of them [n]."""

    def note(self, step: int, ingest_time: Float64Array) -> None:
        """Clicks with these ingest times, seconds since the epoch, were learnt at this step."""
        self._waiting.append((step, ingest_time, np.ones(len(ingest_time))))
        if len(self._waiting) > MANY:
            # Qdrant is away for long: to a tenth of a second, so that memory grows with time and not with clicks.
            times = np.concatenate([waiting[1] for waiting in self._waiting]).round(1)
            counts = np.concatenate([waiting[2] for waiting in self._waiting])
            distinct, inverse = np.unique(times, return_inverse=True)
            self._waiting = [(step, distinct, np.bincount(inverse, counts).astype(np.float64))]

    def acknowledge(self, step: int, acknowledged_at: float) -> None:
        """All clicks learnt up to this step are servable since this moment, seconds since the epoch."""
        for learnt_at, ingest_time, counts in self._waiting:
            if learnt_at <= step:
                self._histogram.observe(np.maximum(acknowledged_at - ingest_time, 0.0), counts)
        self._waiting = [waiting for waiting in self._waiting if waiting[0] > step]
