"""Which clicks have come before, by their event ids: a window over the last distinct ones of a partition.

Station: the first thing that a partition's state does with accepted clicks, if it is switched on. A click without an
event id is never a duplicate. It remembers 64-bit hashes: with a million events in the window, one in 2·10¹³ new clicks
is taken for an old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.contract import Int64Array, UInt64Array
from streams.hash_table import EMPTY, Int32Array, find, index, new_table, remove
from streams.kernel import kernel

NO_EVENT = 0
"""Stands for a click without an event id."""


class EventWindow:
    """The last `size` distinct event ids; the one that came first goes first, however often it comes again.

    Args:
        size: 0 (nothing is ever a duplicate) … 2^26; 16 to 24 bytes each.

    Raises:
        ValueError: a size outside its range.
    """

    def __init__(self, size: int) -> None:
        if not 0 <= size <= 2**26:
            raise ValueError(f"size must be in 0 … 2^26, not {size}")
        self.size = size
        self._events: UInt64Array = np.zeros(size, np.uint64)
        self._count: Int64Array = np.zeros(1, np.int64)
        self._table = new_table(max(1, size))

    def first_seen(self, event_hash: UInt64Array) -> npt.NDArray[np.bool_]:
        """bool [n]: False for clicks whose event id, of uint64 [n], is in the window; takes the others in."""
        is_first = np.ones(len(event_hash), np.bool_)
        if self.size:
            _take(event_hash, self._events, self._count, self._table, is_first)
        return is_first

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything remembered, as a copy."""
        return {"events": self._events[: self._count[0]].copy(), "count": self._count.copy()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of a window of the same size.

        Raises:
            ValueError: the state is of another size.
        """
        events = state["events"]
        if len(events) != min(int(state["count"][0]), self.size):
            raise ValueError(f"a window of {self.size} cannot hold {len(events)} events after {state['count'][0]}")
        self._events[: len(events)] = events
        self._count[:] = state["count"]
        self._table[:] = EMPTY
        index(self._events, len(events), self._table)


@kernel
def _take(
    event_hash: UInt64Array,
    events: UInt64Array,
    count: Int64Array,
    table: Int32Array,
    is_first: npt.NDArray[np.bool_],
) -> None:
    for i in range(len(event_hash)):
        event = event_hash[i]
        if event == NO_EVENT:
            continue
        place = find(event, events, table)
        if table[place] != EMPTY:
            is_first[i] = False
            continue
        slot = count[0] % len(events)
        if count[0] >= len(events):
            remove(find(events[slot], events, table), events, table)
            place = find(event, events, table)
        events[slot] = event
        table[place] = slot
        count[0] += 1
