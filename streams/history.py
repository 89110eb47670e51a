"""The last items of each user, before this click: what the query tower calls the user's history.

Station: between validate and batcher. It keeps hashes only, knows no ids, and forgets the users who have been away the
longest when there are too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.contract import Int64Array, UInt64Array
from streams.hash_table import EMPTY, Int32Array, find, index, new_table, remove
from streams.kernel import kernel

# Places in the vector of counters and ends that the kernel shares with the object.
_NUM_USERS, _NEWEST, _OLDEST = 0, 1, 2


class UserHistories:
    """Ring buffers of item hashes for a bounded number of users; the user whose last click is the oldest goes first.

    A history holds clicks as they came: an item clicked twice in a row stands in it twice, so that a reader can follow
    it by "the row's history and then its item".

    Args:
        max_users: users remembered at once, 1 … 2^26; 8·length + 28 bytes each, taken from memory as users come.
        length: L, items remembered of each, 1 … 255.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, max_users: int = 2**18, length: int = 20) -> None:
        if not 1 <= max_users <= 2**26:
            raise ValueError(f"max_users must be in 1 … 2^26, not {max_users}")
        if not 1 <= length <= 255:
            raise ValueError(f"length must be in 1 … 255, not {length}")
        self.max_users, self.length = max_users, length
        self._user: UInt64Array = np.zeros(max_users, np.uint64)
        self._items: UInt64Array = np.zeros((max_users, length), np.uint64)
        self._num_clicks: Int64Array = np.zeros(max_users, np.int64)
        self._newer: Int32Array = np.zeros(max_users, np.int32)
        self._older: Int32Array = np.zeros(max_users, np.int32)
        self._ends: Int64Array = np.array([0, EMPTY, EMPTY], np.int64)
        # User hash → place in the arrays above.
        self._table = new_table(max_users)

    def __len__(self) -> int:
        return int(self._ends[_NUM_USERS])

    def join(self, user_hash: UInt64Array, item_hash: UInt64Array) -> tuple[UInt64Array, Int64Array]:
        """The history before each click, and then the click into it. uint64 [n] each, in the order of the stream.

        Returns:
            values uint64 [h] and offsets int64 [n + 1]: click i's history is values[offsets[i]:offsets[i + 1]], newest
            last, with the user's earlier clicks of the same call in it.
        """
        values = np.empty(len(user_hash) * self.length, np.uint64)
        offsets = np.empty(len(user_hash) + 1, np.int64)
        _join(
            user_hash, item_hash, values, offsets,
            self._user, self._items, self._num_clicks, self._newer, self._older, self._ends, self._table,
        )  # fmt: skip
        return values[: offsets[-1]].copy(), offsets

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything remembered, as a copy; `restore` makes histories of the same shape go on from it bit for bit."""
        used = slice(0, len(self))
        return {
            "user": self._user[used].copy(),
            "items": self._items[used].copy(),
            "num_clicks": self._num_clicks[used].copy(),
            "newer": self._newer[used].copy(),
            "older": self._older[used].copy(),
            "ends": self._ends.copy(),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of histories with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        num_users = len(state["user"])
        if num_users > self.max_users or state["items"].shape != (num_users, self.length):
            raise ValueError(
                f"items must have the shape [up to {self.max_users}, {self.length}], not {state['items'].shape}"
            )
        for name in ("user", "items", "num_clicks", "newer", "older"):
            getattr(self, f"_{name}")[:num_users] = state[name]
        self._ends[:] = state["ends"]
        self._table[:] = EMPTY
        index(self._user, num_users, self._table)


@kernel
def _join(
    user_hash: UInt64Array,
    item_hash: UInt64Array,
    values: UInt64Array,
    offsets: Int64Array,
    user: UInt64Array,
    items: UInt64Array,
    num_clicks: Int64Array,
    newer: Int32Array,
    older: Int32Array,
    ends: Int64Array,
    table: Int32Array,
) -> None:
    length = items.shape[1]
    end = 0
    offsets[0] = 0
    for i in range(len(user_hash)):
        place = find(user_hash[i], user, table)
        slot = np.int64(table[place])
        if slot == EMPTY:
            if ends[_NUM_USERS] < len(user):
                slot = ends[_NUM_USERS]
                ends[_NUM_USERS] += 1
            else:
                slot = ends[_OLDEST]
                remove(find(user[slot], user, table), user, table)
                place = find(user_hash[i], user, table)
                ends[_OLDEST] = newer[slot]
                if ends[_OLDEST] == EMPTY:
                    ends[_NEWEST] = EMPTY
                else:
                    older[ends[_OLDEST]] = EMPTY
            table[place] = slot
            user[slot] = user_hash[i]
            num_clicks[slot] = 0
        elif slot == ends[_NEWEST]:
            pass
        else:  # out of the line of users; never the newest, so there is a newer one
            if older[slot] == EMPTY:
                ends[_OLDEST] = newer[slot]
            else:
                newer[older[slot]] = newer[slot]
            older[newer[slot]] = older[slot]
        if slot != ends[_NEWEST]:  # to its head
            older[slot] = ends[_NEWEST]
            newer[slot] = EMPTY
            if ends[_NEWEST] == EMPTY:
                ends[_OLDEST] = slot
            else:
                newer[ends[_NEWEST]] = slot
            ends[_NEWEST] = slot
        for k in range(max(0, num_clicks[slot] - length), num_clicks[slot]):
            values[end] = items[slot, k % length]
            end += 1
        offsets[i + 1] = end
        items[slot, num_clicks[slot] % length] = item_hash[i]
        num_clicks[slot] += 1
