"""CORE: which items went, when, and which deletes have still to be repeated.

Station: beside the catalogue, which says what went, and read by publishing, which deletes it. It knows no index.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import islice

import numpy as np

from trainer.features import UInt64Array

SWEEP_SECONDS = 60.0
"""For so long after items went, they are deleted again and again: a late upsert could bring back what was new."""


class Gone(dict[int, int]):
    """Hash → step of items that were deleted or dropped; steps rise."""

    def __init__(self, most: int) -> None:
        """`most`: more are not remembered; those that went last stay."""
        super().__init__()
        self._most = most

    def went(self, item_hash: UInt64Array, step: int) -> None:
        """These went at this step, which is none before the newest."""
        for key in item_hash.tolist():
            self.pop(key, None)
            self[key] = step
        for key in list(islice(self, max(0, len(self) - self._most))):
            del self[key]

    def came(self, item_hash: UInt64Array) -> None:
        """These are there, new or again."""
        for key in item_hash.tolist() if self else ():
            self.pop(key, None)

    @property
    def last(self) -> int:
        """Step of the newest; −1: there is none."""
        return next(reversed(self.values()), -1)

    def since(self, step: int) -> UInt64Array:
        """uint64 [n] those that went after this step."""
        return np.array([key for key, when in self.items() if when > step], np.uint64)

    def forget(self, step: int) -> None:
        """What went before or at this step is in no version any more."""
        keys: Iterable[int] = [key for key, when in self.items() if when <= step]
        for key in keys:
            del self[key]


class Sweeps:
    """How far deletes are done for good."""

    def __init__(self) -> None:
        self.step = -1
        """What went before or at this step was deleted for the last time."""
        self._acknowledged: deque[tuple[float, int]] = deque()
        """When deletes were acknowledged, within the last `SWEEP_SECONDS`, and up to which step they went."""

    def acknowledge(self, now: float, step: int) -> None:
        """All that went after `self.step` and up to this one was deleted."""
        self._acknowledged.append((now, step))
        while now - self._acknowledged[0][0] > SWEEP_SECONDS:
            self.step = self._acknowledged.popleft()[1]

    def begin_at(self, step: int) -> None:
        """What went after this step has to be deleted from now on."""
        self._acknowledged.clear()
        self.step = step
