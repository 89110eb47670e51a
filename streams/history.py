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
from streams.kernel import kernel

Int32Array = npt.NDArray[np.int32]

_EMPTY = -1
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
        self._ends: Int64Array = np.array([0, _EMPTY, _EMPTY], np.int64)
        # Open addressing with linear probing, at most half full: user hash → place in the arrays above.
        self._table: Int32Array = np.full(1 << (2 * max_users - 1).bit_length(), _EMPTY, np.int32)

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
        self._table[:] = _EMPTY
        _index(self._user, num_users, self._table)


@kernel
def _home(user_hash: np.uint64, table: Int32Array) -> int:
    mixed = (user_hash ^ (user_hash >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(20)) & np.uint64(len(table) - 1))  # type: ignore[return-value]


@kernel
def _find(user_hash: np.uint64, user: UInt64Array, table: Int32Array) -> int:
    """Where in the table the user is, or the empty place where they would be."""
    place = _home(user_hash, table)
    while table[place] != _EMPTY and user[table[place]] != user_hash:
        place = (place + 1) & (len(table) - 1)
    return place


@kernel
def _index(user: UInt64Array, num_users: int, table: Int32Array) -> None:
    for slot in range(num_users):
        table[_find(user[slot], user, table)] = slot


@kernel
def _remove(hole: int, user: UInt64Array, table: Int32Array) -> None:
    """Empties a place and moves later entries of its run back, so that no search ends too early."""
    mask = len(table) - 1
    table[hole] = _EMPTY
    place = (hole + 1) & mask
    while table[place] != _EMPTY:
        home = _home(user[table[place]], table)
        if ((place - home) & mask) >= ((place - hole) & mask):
            table[hole] = table[place]
            table[place] = _EMPTY
            hole = place
        place = (place + 1) & mask


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
        place = _find(user_hash[i], user, table)
        slot = np.int64(table[place])
        if slot == _EMPTY:
            if ends[_NUM_USERS] < len(user):
                slot = ends[_NUM_USERS]
                ends[_NUM_USERS] += 1
            else:
                slot = ends[_OLDEST]
                _remove(_find(user[slot], user, table), user, table)
                place = _find(user_hash[i], user, table)
                ends[_OLDEST] = newer[slot]
                if ends[_OLDEST] == _EMPTY:
                    ends[_NEWEST] = _EMPTY
                else:
                    older[ends[_OLDEST]] = _EMPTY
            table[place] = slot
            user[slot] = user_hash[i]
            num_clicks[slot] = 0
        elif slot == ends[_NEWEST]:
            pass
        else:  # out of the line of users; never the newest, so there is a newer one
            if older[slot] == _EMPTY:
                ends[_OLDEST] = newer[slot]
            else:
                newer[older[slot]] = newer[slot]
            older[newer[slot]] = older[slot]
        if slot != ends[_NEWEST]:  # to its head
            older[slot] = ends[_NEWEST]
            newer[slot] = _EMPTY
            if ends[_NEWEST] == _EMPTY:
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
