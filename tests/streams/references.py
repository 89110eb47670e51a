"""What streams computes, computed slowly and obviously: one click after the other, in dictionaries, without hashing."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streams.contract import hash_id
from streams.validate import validate


class SlowGaps:
    """Algorithm 2 in a dictionary without collisions, one item after the other, with this house's rules."""

    def __init__(self, alpha: float, initial_gap: float | None = None) -> None:
        self.alpha, self.initial_gap, self.step = alpha, initial_gap, 0
        self.gaps: dict[int, list[float]] = {}
        self.last: dict[int, int] = {}
        self.mean: dict[int, float] = {}

    def hit(self, item: int) -> None:
        if self.initial_gap is not None:
            gap = self.step - self.last.get(item, 0)
            self.mean[item] = (1 - self.alpha) * self.mean.get(item, self.initial_gap) + self.alpha * gap
        elif item in self.last:
            gap = self.step - self.last[item]
            self.gaps.setdefault(item, []).append(gap)
            rate = max(self.alpha, 1 / len(self.gaps[item]))
            self.mean[item] = (1 - rate) * self.mean.get(item, 0.0) + rate * gap
        self.last[item] = self.step

    def probability(self, item: int, in_batch: bool) -> float:
        if self.initial_gap is not None:
            return 1 / max(1.0, self.mean.get(item, self.initial_gap))
        if item not in self.last:
            return 1 / (self.step + 1)
        gap = self.mean.get(item, float(self.step))
        return 1 / max(1.0, gap if in_batch else max(gap, self.step - self.last[item]))


class SlowCounts:
    """Decayed counts in dictionaries without collisions: every count fades at every click."""

    def __init__(self, half_life: float) -> None:
        self.decay = 0.5 ** (1 / half_life)
        self.counts: dict[int, float] = {}
        self.total = self.squares = 0.0

    def click(self, item: int) -> None:
        self.counts = {each: count * self.decay for each, count in self.counts.items()}
        self.counts[item] = self.counts.get(item, 0.0) + 1
        self.total = self.total * self.decay + 1
        self.squares = self.squares * self.decay**2 + 1


class SlowHistories:
    """The same, one click after the other."""

    def __init__(self, max_users: int, length: int) -> None:
        self.max_users, self.length = max_users, length
        self.items: OrderedDict[int, deque[int]] = OrderedDict()

    def click(self, user: int, item: int) -> list[int]:
        if user not in self.items:
            if len(self.items) == self.max_users:
                self.items.popitem(last=False)
            self.items[user] = deque(maxlen=self.length)
        self.items.move_to_end(user)
        before = list(self.items[user])
        self.items[user].append(item)
        return before


@dataclass(frozen=True)
class Row:
    """What one accepted click must look like in its micro-batch."""

    offset: int
    user_id: str
    item_id: str
    event_time: float
    history: list[int]
    sampling_probability: float


def expected_rows(values: Sequence[bytes | None], batch_size: int, alpha: float = 0.01, length: int = 20) -> list[Row]:
    """Every accepted click of a partition from offset 0 on, if micro-batches are cut by size alone."""
    gaps, histories = SlowGaps(alpha), SlowHistories(2**40, length)
    rows: list[Row] = []
    for low in range(0, len(values), batch_size):
        batch: list[tuple[int, str, str, float, list[int]]] = []
        for offset, value in enumerate(values[low : low + batch_size], low):
            clicks, _ = validate([value], np.array([offset]), np.zeros(1))
            if not len(clicks):
                continue
            user, item = clicks.user_id[0], clicks.item_id[0]
            history = histories.click(hash_id(user), hash_id(item))
            batch.append((offset, user, item, float(clicks.event_time[0]), history))
            gaps.step += 1
            gaps.hit(hash_id(item))
        rows += [Row(*row, gaps.probability(hash_id(row[2]), in_batch=True)) for row in batch]
    return rows
