"""A source for the loop that is a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from streams.contract import MicroBatch
from trainer.item_events import ItemChange
from trainer.progress import Positions
from trainer.source import Delivery, Poll

ITEMS = -1


class ListSource:
    """A source that gives out what it was made with, one entry a poll."""

    def __init__(self, entries: Iterable[MicroBatch | list[ItemChange]]) -> None:
        self._entries = list(entries)
        self._left: list[tuple[MicroBatch | list[ItemChange], int]] = []
        self.shown: dict[int, int] = {}

    def start(self, positions: Positions) -> None:
        """Resumes behind the entries that were taken: micro-batches by partition, item changes as partition 0."""
        places: Counter[int] = Counter()
        for entry in self._entries:
            partition = ITEMS if isinstance(entry, list) else entry.partition
            places[partition] += 1
            done = positions.items.get(0, 0) if partition == ITEMS else positions.micro_batches.get(partition, 0)
            if places[partition] > done:
                self._left.append((entry, places[partition]))

    def poll(self, timeout_seconds: float) -> Poll:
        """The next entry."""
        if not self._left:
            return Poll(ended=True)
        entry, place = self._left.pop(0)
        if isinstance(entry, list):
            return Poll(items=entry, item_positions={0: place})
        return Poll(deliveries=[Delivery(entry, place)])

    def lag(self) -> int:
        """Entries left."""
        return len(self._left)

    def show_positions(self, positions: dict[int, int]) -> None:
        """Keeps them for a look."""
        self.shown = dict(positions)

    def close(self) -> None:
        """Nothing to end."""
