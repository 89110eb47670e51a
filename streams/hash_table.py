"""PUBLIC: where a 64-bit key lies among others: open addressing with linear probing, over keys of somebody else's.

Station: under `history` and `duplicates`, and under the trainer's catalogue. `keys` are uint64 [n], one in each slot;
`table` is int32, a power of two of places, at most half full: a slot's number or EMPTY. It counts nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from streams.contract import Int64Array, UInt64Array
from streams.kernel import kernel

Int32Array = npt.NDArray[np.int32]

EMPTY = -1


def new_table(max_keys: int) -> Int32Array:
    """An empty table for so many keys."""
    return np.full(1 << (2 * max_keys - 1).bit_length(), EMPTY, np.int32)


@kernel
def home(key: np.uint64, table: Int32Array) -> int:
    """The place where a search for the key begins."""
    mixed = (key ^ (key >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> np.uint64(20)) & np.uint64(len(table) - 1))  # type: ignore[return-value]


@kernel
def find(key: np.uint64, keys: UInt64Array, table: Int32Array) -> int:
    """The place where the key is, or the empty place where it would be."""
    place = home(key, table)
    while table[place] != EMPTY and keys[table[place]] != key:
        place = (place + 1) & (len(table) - 1)
    return place


@kernel
def index(keys: UInt64Array, num_keys: int, table: Int32Array, start: int = 0) -> None:
    """Enters the first `num_keys` keys into a table that has the first `start` of them."""
    for slot in range(start, num_keys):
        table[find(keys[slot], keys, table)] = slot


@kernel
def find_slots(wanted: UInt64Array, keys: UInt64Array, table: Int32Array, slots: Int64Array) -> None:
    """The slots of many keys, EMPTY where there is none."""
    for i in range(len(wanted)):
        slots[i] = table[find(wanted[i], keys, table)]


@kernel
def remove(hole: int, keys: UInt64Array, table: Int32Array) -> None:
    """Empties a place and moves later entries of its run back, so that no search ends too early."""
    mask = len(table) - 1
    table[hole] = EMPTY
    place = (hole + 1) & mask
    while table[place] != EMPTY:
        begin = home(keys[table[place]], table)
        if ((place - begin) & mask) >= ((place - hole) & mask):
            table[hole] = table[place]
            table[place] = EMPTY
            hole = place
        place = (place + 1) & mask


class SlotIndex:
    """Finds slots of keys that are added at the end."""

    def __init__(self) -> None:
        self._table = new_table(512)
        self._num_keys = 0

    def add(self, keys: UInt64Array, num_keys: int) -> None:
        """Enters what has been added: `keys` has `num_keys` distinct ones now, those that were there in their slots."""
        if 2 * num_keys > len(self._table):
            self._table, self._num_keys = new_table(2 * num_keys), 0
        index(keys, num_keys, self._table, self._num_keys)
        self._num_keys = num_keys

    def find(self, wanted: UInt64Array, keys: UInt64Array) -> Int64Array:
        """int64 [n] slots of the wanted keys, −1 where there is none."""
        slots = np.empty(len(wanted), np.int64)
        # A copy: an array that cannot be written to, as Arrow gives them, is another type to the compiler.
        find_slots(np.array(wanted, np.uint64), keys, self._table, slots)
        return slots
