"""Brings a partition's state up to an offset by replaying the clicks before it, into the state only.

Station: beside the partition, when it is assigned or comes back. Nothing that is replayed is sent, counted as a click
or written as a dead letter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from streams.batcher import Batcher
from streams.broker import ClicksOnBroker
from streams.state import PartitionState
from streams.validate import validate


def replay(
    state: PartitionState,
    clicks_on_broker: ClicksOnBroker,
    partition: int,
    stop: int,
    *,
    batch_size: int,
    max_click_bytes: int,
    cancelled: Callable[[], bool],
) -> int:
    """Takes the accepted clicks of state.next_offset … stop − 1 into the state; blocks, so: in a thread.

    The clicks are cut at multiples of the batch size, which the estimator's mode "batch" counts by. What retention has
    deleted is missing from the state from then on.

    Returns:
        How many records were read. If it was cancelled, state.next_offset says how far it came.

    Raises:
        DependencyError: Kafka did not give them.
    """
    num_records = 0
    batcher = Batcher(state.next_offset, batch_size, math.inf, time.monotonic)
    for values, offsets in clicks_on_broker.read(partition, state.next_offset, stop, cancelled):
        num_records += len(values)
        clicks, _ = validate(values, offsets, np.zeros(len(values)), max_click_bytes, state.reads_event_ids)
        for cut in batcher.add(clicks, offsets, int(offsets[-1]) + 1):
            state.learn(state.without_duplicates(cut.clicks), cut.next_offset)
    if rest := batcher.close():
        state.learn(state.without_duplicates(rest.clicks), rest.next_offset)
    if not cancelled() and state.next_offset < stop:
        state.next_offset = stop  # no record lies between
    return num_records
