"""The newest embedding that was made of each item, one row each, and whose turn it is to be made anew.

Station: inside the catalogue, which numbers the rows. It makes no embeddings.

The item tower moves with every click, so an embedding grows old. Those of clicked items are made anew at once, those
of the others in turn, so many with each micro-batch. So what a click is scored with, and what the weights of the score
learn from it, follow from the clicks before it alone, not from when something was published or started again. That is
why embeddings are in the state: the towers could make them too, but newer ones.

Shapes: N rows, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streams.contract import Float32Array, Int64Array
from trainer.columns import Changes, Column


class Embeddings:
    """float32 [N, D], zeros where none was set yet."""

    def __init__(self, embedding_dim: int) -> None:
        """`embedding_dim`: D."""
        self._array = np.zeros((0, embedding_dim), np.float32)
        self._size = 0
        self._next = 0
        """The row whose turn it is."""
        self._changed = Changes("embeddings")

    def __len__(self) -> int:
        return self._size

    @property
    def array(self) -> Float32Array:
        """float32 [N, D]"""
        return self._array[: self._size]

    def extend(self, num_rows: int) -> None:
        """Makes it this many rows."""
        if num_rows > len(self._array):
            grown = np.zeros((max(num_rows, 2 * len(self._array), 1024), self._array.shape[1]), np.float32)
            grown[: self._size] = self.array
            self._array = grown
        self._size = num_rows

    def keep(self, rows: Int64Array) -> None:
        """Keeps only these rows, renumbered in this order."""
        self._array = self._array[rows]
        self._size = len(rows)
        self._changed.mark_all()

    def set(self, rows: Int64Array, embedding: Float32Array) -> None:
        """Takes float32 [n, D] as the newest of these rows."""
        self._array[rows] = embedding
        self._changed.mark(rows)

    def take_turn(self, num_rows: int) -> Int64Array:
        """int64 [at most `num_rows`] the rows whose turn it is; the next ones have it after them."""
        num_rows = min(num_rows, self._size)
        rows = (self._next + np.arange(num_rows)) % max(self._size, 1)
        self._next = (self._next + num_rows) % max(self._size, 1)
        return rows

    @property
    def changes(self) -> dict[str, Changes]:
        """Name in the state → which rows have changed."""
        return {"array": self._changed}

    def state_dict(self) -> dict[str, Column]:
        """Its own columns, to be copied before the next change."""
        return {"array": self.array, "next": np.array(self._next)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: it is of another size.
        """
        if state["array"].shape[1] != self._array.shape[1]:
            raise ValueError(f"embeddings have {state['array'].shape[1]} dimensions, not {self._array.shape[1]}")
        self._array = np.array(state["array"], np.float32)
        self._size, self._next = len(self._array), int(state["next"])
        self._changed.take(self._size)
