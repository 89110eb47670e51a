"""CORE: the features of every known item, columnar, gathered for the item tower an array at a time.

Station: inside the item catalogue, which owns the numbering of items and their ids. It encodes nothing (`features`
does) and learns nothing. Other packages import it through `trainer.towers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.columns import Column, Ragged
from trainer.features import (
    EncodedItem,
    Int64Array,
    ItemInputs,
    TowerConfig,
    UInt64Array,
    bag_offsets,
    mean_bags,
    ranges,
    rows_of,
)


class ItemFeatures:
    """Columnar store of the encoded features of the items 0 … n − 1; the catalogue owns the numbering.

    Values lie one after the other in an arena; a replaced item's old values stay as a hole until half of it is holes.
    """

    def __init__(self, config: TowerConfig) -> None:
        self.config = config
        kinds = [feature.kind for feature in config.item]
        self._num_references = kinds.count("item")
        self._num_numbers = kinds.count("number")
        self._num_slots = len(kinds) - self._num_numbers
        self._size = 0
        self._lengths = np.zeros((0, self._num_slots), dtype=np.int64)
        self._starts = np.zeros(0, dtype=np.int64)
        self._numbers = np.zeros((0, self._num_numbers), dtype=np.float32)
        self._arena = np.zeros(0, dtype=np.int64)
        self._used = 0

    def __len__(self) -> int:
        return self._size

    def append(self, num_items: int = 1) -> None:
        """Adds items without features at the end."""
        self._size += num_items
        if self._size > len(self._starts):
            capacity = max(self._size, 2 * len(self._starts))
            self._lengths = _grown(self._lengths, capacity, 0)
            self._starts = _grown(self._starts, capacity, 0)
            self._numbers = _grown(self._numbers, capacity, np.nan)

    def replace(self, index: int, item: EncodedItem) -> None:
        """Gives item `index` these features in place of those it had."""
        if not 0 <= index < self._size:
            raise IndexError(f"item {index} of {self._size}")
        slots = [*item.references, *item.tokens]
        values = [row for slot in slots for row in slot]
        if self._used + len(values) > len(self._arena):
            self._compact()
            self._arena = _grown(self._arena, max(self._used + len(values), 2 * self._used), 0)
        self._starts[index] = self._used
        self._lengths[index] = [len(slot) for slot in slots]
        self._numbers[index] = item.numbers
        self._arena[self._used : self._used + len(values)] = values
        self._used += len(values)

    def keep(self, indices: Int64Array) -> None:
        """Keeps only these items, renumbered in this order: the catalogue has dropped the others."""
        self._lengths = self._lengths[indices]
        self._starts = self._starts[indices]
        self._numbers = self._numbers[indices]
        self._size = len(indices)
        self._compact()

    def gather(self, item_hash: UInt64Array, indices: Int64Array) -> ItemInputs:
        """Inputs of the item tower for these items, in this order.

        Args:
            item_hash: uint64 [n] hashes of the items' ids.
            indices: int64 [n] their numbers here; −1 for an item that is not here: it has its id alone.
        """
        num_items = len(item_hash)
        known = indices >= 0
        if self._size == 0:
            lengths = np.zeros((num_items, self._num_slots), dtype=np.int64)
            values = np.zeros(0, dtype=np.int64)
            numbers = np.full((num_items, self._num_numbers), np.nan, dtype=np.float32)
        else:
            lengths = np.where(known[:, None], self._lengths[indices], 0)
            values = self._arena[ranges(self._starts[indices], lengths.sum(1))]
            numbers = np.where(known[:, None], self._numbers[indices], np.float32(np.nan))
        own = np.ones((num_items, 1), dtype=np.int64)
        own_rows = rows_of(item_hash, self.config.item_rows)
        references = self._num_references
        if references == 0:
            items, features = (np.hstack([own, lengths[:, :0]]), own_rows), (lengths, values)
        else:
            is_reference = np.repeat(np.tile(np.arange(self._num_slots) < references, num_items), lengths.ravel())
            item_lengths = np.hstack([own, lengths[:, :references]])
            ends = bag_offsets(item_lengths[:, 1:].sum(1))
            items = item_lengths, np.insert(values[is_reference], ends[:-1], own_rows)
            features = lengths[:, references:], values[~is_reference]
        return ItemInputs(mean_bags(*items), mean_bags(*features), torch.from_numpy(numbers))

    def state_dict(self) -> dict[str, Column]:
        """Columns from which `load_state_dict` makes the same store; its own, to be copied before the next change."""
        n = self._size
        return {"values": Ragged(self._starts[:n], self._lengths[:n], self._arena), "numbers": self._numbers[:n]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; the configuration must be the same."""
        values = state["values"]
        if values.lengths.shape[1] != self._num_slots or state["numbers"].shape[1] != self._num_numbers:
            raise ValueError("the stored item features are of another configuration")
        self._starts, self._lengths, self._arena = values.starts.copy(), values.lengths.copy(), values.values.copy()
        self._numbers = state["numbers"].copy()
        self._size, self._used = len(self._lengths), len(self._arena)

    def _compact(self) -> None:
        lengths = self._lengths[: self._size].sum(1)
        self._arena = self._arena[ranges(self._starts[: self._size], lengths)]
        self._starts[: self._size] = bag_offsets(lengths)[:-1]
        self._used = len(self._arena)


def _grown(array: npt.NDArray[Any], capacity: int, fill: float) -> npt.NDArray[Any]:
    grown = np.full((capacity, *array.shape[1:]), fill, dtype=array.dtype)
    grown[: len(array)] = array[: min(len(array), capacity)]
    return grown
