"""Which items the live version does not hold as they are now, and which of them go first.

Station: between the catalogue, which knows when each item was touched and published last, and the publisher, which
takes deltas. It writes nothing anywhere but in the catalogue's column `published`.

A delta holds no more points than were measured to fit one interval. New items go first, always; of the others those
with the most traffic × staleness: the item's share of the recent clicks, times the steps since the copy that is served
was taken. What is left over keeps its place: its staleness goes on growing, so that every item's turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streams.contract import Int64Array, UInt64Array
from trainer.catalogue import Catalogue

SMOOTHING = 0.3
"""Weight of the newest delta in the measured rate."""


@dataclass(frozen=True)
class Turn:
    """Rows that go into a delta, and those that have to wait for the next one."""

    rows: Int64Array
    """[n] in the order of their turn."""
    item_hash: UInt64Array
    """[n]"""
    published_before: Int64Array
    """[n] `Catalogue.published` of them before this delta."""
    num_new: int
    """The first so many are not in the live version at all."""
    left: UInt64Array
    """Hashes of the items left over."""


class PublishRate:
    """Points a second that the index was seen to take, and how many fit an interval with it."""

    def __init__(self, interval_seconds: float, least_points: int) -> None:
        """
        Args:
            interval_seconds: > 0.
            least_points: of one upsert, ≥ 1: what a delta may always hold, and what makes it long enough to measure.
        """
        self._interval_seconds, self._least_points = interval_seconds, least_points
        self.points_per_second = 0.0
        """0 before the first measurement."""

    @property
    def limit(self) -> int:
        """Most points of the next delta."""
        return max(self._least_points, int(self.points_per_second * self._interval_seconds))

    def observe(self, num_points: int, seconds: float) -> None:
        """A publish of so many points took so long. Small ones are mostly waiting, and only ever raise the rate."""
        if not num_points or seconds <= 0:
            return
        rate = num_points / seconds
        if num_points < self._least_points or not self.points_per_second:
            self.points_per_second = max(self.points_per_second, rate)
        else:
            self.points_per_second += SMOOTHING * (rate - self.points_per_second)


def take_turn(catalogue: Catalogue, step: int, limit: int) -> Turn:
    """Picks the items of a delta at this step, and marks them as published with it; `give_back` undoes that.

    Args:
        catalogue: its `published` is changed.
        step: of the copy that is taken now.
        limit: most items, ≥ 1.
    """
    published = catalogue.published
    waiting = np.flatnonzero((catalogue.touched > published) & ~catalogue.deleted)
    since = np.maximum(catalogue.added[waiting], published[waiting])
    is_known = catalogue.added[waiting] <= published[waiting]
    priority = catalogue.log_q(waiting) + np.log(step - since + 1)
    order = np.lexsort((-priority, is_known))
    rows, left = waiting[order[:limit]], waiting[order[limit:]]
    num_new = int(np.count_nonzero(~is_known[order[:limit]]))
    turn = Turn(rows, catalogue.item_hash[rows], published[rows], num_new, catalogue.item_hash[left])
    published[rows] = step
    return turn


def give_back(catalogue: Catalogue, turn: Turn) -> None:
    """The delta of this turn was not acknowledged: its items wait again, where they were."""
    rows = catalogue.find(turn.item_hash)
    there = rows >= 0
    rows = rows[there]
    # An item that was dropped and is new again is at −1, and stays there.
    catalogue.published[rows] = np.minimum(catalogue.published[rows], turn.published_before[there])
