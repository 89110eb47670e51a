"""Cuts the stream of accepted clicks into micro-batches, by size or age, and puts their columns together.

Station: behind validate; what it closes goes through the partition's state and then to the topic `micro-batches`. It
sends nothing and knows no click's meaning.

Cuts lie at offsets that are multiples of the batch size, not at every so many rows. So clicks that are delivered again
are cut in the same places as the first time, wherever the second delivery starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import pyarrow as pa

from streams.contract import Int64Array, MicroBatch, Scalar
from streams.state import Learnt
from streams.validate import Clicks

_MAX_EXACT_INTEGER = 2**53


class CloseReason(StrEnum):
    """What closed a micro-batch; a metric's label."""

    SIZE = "size"
    AGE = "age"


@dataclass(frozen=True, slots=True)
class Cut:
    """The accepted clicks among the offsets first_offset … next_offset − 1; perhaps none."""

    first_offset: int
    next_offset: int
    clicks: Clicks
    reason: CloseReason


class Batcher:
    """Collects one partition's clicks and closes a micro-batch

    - by size, as soon as it reaches a multiple of `batch_size` offsets, rejected ones counted too;
    - by age, when its oldest offset has been here for `batch_age_seconds`: the caller asks `due_in` and calls `close`.

    Offsets that hold no record (compacted, transaction markers) belong to the micro-batch before them where they lie
    below its cut, and a stretch without any record makes no micro-batches of its own beyond one.

    Args:
        next_offset: where the first micro-batch starts.
        batch_size: at least 1, in offsets.
        batch_age_seconds: at least 0.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, next_offset: int, batch_size: int, batch_age_seconds: float, clock: Callable[[], float]) -> None:
        self.first_offset = next_offset
        """Where the open micro-batch starts."""
        self.next_offset = next_offset
        """The next offset to take in."""
        self._batch_size, self._batch_age_seconds, self._clock = batch_size, batch_age_seconds, clock
        self._pending: list[Clicks] = []
        self._opened_at = 0.0

    def add(self, clicks: Clicks, offsets: Int64Array, next_offset: int) -> list[Cut]:
        """Takes in the records `offsets`, of which `clicks` were accepted, and all else below `next_offset`.

        Returns:
            The micro-batches closed by it, in order.

        Raises:
            ValueError: records that do not follow upon what was taken in before.
        """
        if next_offset < self.next_offset or (len(offsets) and offsets[0] < self.next_offset):
            raise ValueError(f"records {offsets[:1]} … {next_offset} do not follow upon {self.next_offset}")
        if self.first_offset == self.next_offset:
            self._opened_at = self._clock()
        cuts = []
        bounds = np.unique(np.append(offsets, next_offset) // self._batch_size) * self._batch_size
        start = 0
        for bound in bounds[bounds > self.first_offset].tolist():
            stop = int(np.searchsorted(clicks.offset, bound))
            self._pending.append(clicks.rows(start, stop))
            start, self.next_offset = stop, bound
            cuts.append(self._close(CloseReason.SIZE))
            self._opened_at = self._clock()
        if self.next_offset < next_offset:
            self._pending.append(clicks.rows(start, len(clicks)))
            self.next_offset = next_offset
        return cuts

    def due_in(self) -> float | None:
        """Seconds until the open micro-batch must be closed by age, 0 if it is due; None if nothing is open."""
        if self.first_offset == self.next_offset:
            return None
        return max(0.0, self._opened_at + self._batch_age_seconds - self._clock())

    def close(self) -> Cut | None:
        """Closes the open micro-batch for its age; None if nothing is open."""
        return None if self.first_offset == self.next_offset else self._close(CloseReason.AGE)

    def _close(self, reason: CloseReason) -> Cut:
        cut = Cut(self.first_offset, self.next_offset, Clicks.concatenated(self._pending), reason)
        self._pending, self.first_offset = [], self.next_offset
        return cut


def micro_batch(partition: int, cut: Cut, learnt: Learnt) -> MicroBatch:
    """The cut as what is sent: its clicks with what the partition's state knows about them."""
    clicks = cut.clicks
    return MicroBatch(
        partition=partition,
        first_offset=cut.first_offset,
        next_offset=cut.next_offset,
        offset=clicks.offset,
        user_id=pa.array(clicks.user_id, pa.string()),
        item_id=pa.array(clicks.item_id, pa.string()),
        user_hash=clicks.user_hash,
        item_hash=clicks.item_hash,
        history_values=learnt.history_values,
        history_offsets=learnt.history_offsets,
        reward=clicks.reward,
        event_time=clicks.event_time,
        ingest_time=clicks.ingest_time,
        sampling_probability=learnt.sampling_probability,
        context=context_columns(clicks.context),
    )


def context_columns(context: Sequence[Mapping[str, Scalar]]) -> dict[str, pa.Array]:
    """One column [n] for each feature that any of n clicks has, by name, null where a click lacks it.

    A feature with numbers only is a double column. Any string or boolean among them, or an integer that a double cannot
    hold, makes it a string column: integers in decimal, booleans as "true" and "false".
    """
    columns = {}
    for name in sorted(set().union(*context)):
        values = [features.get(name) for features in context]
        kinds = set(map(type, values)) - {type(None)}
        if kinds:
            columns[name] = _column(values, kinds)
    return columns


def _column(values: Sequence[Scalar], kinds: set[type]) -> pa.Array:
    if kinds == {str}:
        return pa.array(values, pa.string())
    if kinds <= {int, float}:
        try:
            return pa.array(values, pa.float64())
        except (pa.ArrowInvalid, OverflowError):
            pass  # an integer that a double cannot hold
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT_INTEGER:
        return str(int(value))
    return str(value)


def encode_within(batch: MicroBatch, max_bytes: int) -> list[bytes]:
    """The micro-batch in one record or, where that would be longer than `max_bytes`, halved until each part fits.

    A single row that is too long stays as it is: only a far too small `max_bytes` can make one.
    """
    encoded = batch.encode()
    if len(encoded) <= max_bytes or len(batch) < 2:
        return [encoded]
    middle = len(batch) // 2
    halves = batch.rows(0, middle), batch.rows(middle, len(batch))
    return [part for half in halves for part in encode_within(_without_empty_columns(half), max_bytes)]


def _without_empty_columns(batch: MicroBatch) -> MicroBatch:
    context = {name: column for name, column in batch.context.items() if column.null_count < len(column)}
    return replace(batch, context=context)
