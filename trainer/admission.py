"""CORE: which unknown items have been clicked often enough to be admitted to the catalogue.

Station: beside the catalogue, which asks it about clicks on items without a row. It knows hashes alone.

Bound: of the items that wait, those clicked last are remembered, each with its exact count. One that is pushed out
begins at nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.features import UInt64Array


class Admission:
    """Counts the clicks of items that wait."""

    def __init__(self, clicks: int = 1, max_waiting: int = 100_000) -> None:
        """
        Args:
            clicks: with this one an item is admitted, ≥ 1; 1: nothing waits.
            max_waiting: most items that are remembered, ≥ 1.
        """
        self.clicks = clicks
        self._max_waiting = max_waiting
        self._waiting: dict[int, int] = {}
        """Hash → clicks, the item that was clicked last at the end."""

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def admitted(self, item_hash: UInt64Array) -> npt.NDArray[np.bool_]:
        """Counts clicks of unknown items; bool [n] whether the item has enough now. All clicks of one are alike.

        Args:
            item_hash: uint64 [n] in the order of the clicks.
        """
        if self.clicks <= 1:
            return np.ones(len(item_hash), np.bool_)
        enough = set()
        for key in item_hash.tolist():
            count = self._waiting.pop(key, 0) + 1
            if count >= self.clicks or key in enough:
                enough.add(key)
            else:
                self._waiting[key] = count
        for key in list(islice(self._waiting, max(0, len(self._waiting) - self._max_waiting))):
            del self._waiting[key]
        return np.fromiter((key in enough for key in item_hash.tolist()), np.bool_, len(item_hash))

    def forget(self, item_hash: UInt64Array) -> None:
        """These were admitted otherwise."""
        for key in item_hash.tolist() if self._waiting else ():
            self._waiting.pop(key, None)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays from which `load_state_dict` makes the same; copies."""
        n = len(self._waiting)
        return {
            "item_hash": np.fromiter(self._waiting.keys(), np.uint64, n),
            "clicks": np.fromiter(self._waiting.values(), np.int64, n),
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes over what `state_dict` gave."""
        self._waiting = dict(zip(state["item_hash"].tolist(), state["clicks"].tolist(), strict=True))
