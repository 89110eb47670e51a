"""Clicks and items as columns, and what a data set is: the form in which every source hands them on.

Station: before the producer. It reads no file and knows no Kafka.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streams.contract import ClickEvent, ItemEvent, Scalar

PIECE_ROWS = 8192
"""Rows of one piece of a data set's clicks."""


class DatasetError(ValueError):
    """A data set that cannot be read: says which file or column, and what there is instead."""


@dataclass(frozen=True)
class Clicks:
    """n clicks in time order, columnar."""

    user_id: pa.StringArray
    """[n] no nulls."""
    item_id: pa.StringArray
    """[n] no nulls."""
    event_time: npt.NDArray[np.float64]
    """[n] seconds since the epoch, not falling."""
    reward: npt.NDArray[np.float64] | None = None
    """[n] ≥ 0; None: all 1."""
    context: Mapping[str, pa.Array] = field(default_factory=dict)
    """Query features by name: string or double arrays [n], null where a click has none."""

    def __len__(self) -> int:
        return len(self.event_time)

    def rows(self, start: int, stop: int) -> Clicks:
        """Rows start … stop − 1, without copying."""
        return Clicks(
            self.user_id[start:stop],
            self.item_id[start:stop],
            self.event_time[start:stop],
            None if self.reward is None else self.reward[start:stop],
            {name: column[start:stop] for name, column in self.context.items()},
        )

    def pieces(self) -> Iterator[Clicks]:
        """The same clicks, PIECE_ROWS at a time."""
        for start in range(0, len(self), PIECE_ROWS):
            yield self.rows(start, min(start + PIECE_ROWS, len(self)))

    def events(self) -> Iterator[ClickEvent]:
        """The clicks one by one, as the producer takes them. For pieces: it makes Python objects of all rows."""
        names = list(self.context)
        contexts: list[dict[str, Scalar]] = [{} for _ in range(len(self))]
        for name in names:
            for context, value in zip(contexts, self.context[name].to_pylist(), strict=True):
                if value is not None:
                    context[name] = value
        rewards = [1.0] * len(self) if self.reward is None else self.reward.tolist()
        for user_id, item_id, event_time, reward, context in zip(
            self.user_id.to_pylist(),
            self.item_id.to_pylist(),
            self.event_time.tolist(),
            rewards,
            contexts,
            strict=True,
        ):
            yield ClickEvent(user_id, item_id, event_time, reward=reward, context=context)


@dataclass(frozen=True)
class Dataset:
    """Clicks in time order, what is known of their items, and which of it the towers may learn from."""

    name: str
    num_clicks: int
    clicks: Callable[[], Iterator[Clicks]]
    """From the first click, piece by piece."""
    items: Callable[[], Iterator[ItemEvent]]
    context_features: Mapping[str, str] = field(default_factory=dict)
    """Name of a context column → its kind: categorical, multi, text, number or item."""
    item_features: Mapping[str, str] = field(default_factory=dict)
    """Name of an item's feature → its kind."""
    trainer: Mapping[str, str] = field(default_factory=dict)
    """Settings of the trainer that suit these data, as its environment variables take them, without their prefix."""
    item_name: str | None = None
    """Field of the items' payload that names an item to people."""
    num_items: int = 0
    """How many `items` yields."""
    num_skipped: int = 0
    """Rows of the source without user, item or time."""

    def first(self, num_clicks: int) -> Dataset:
        """The same data set with its first clicks alone."""

        def clicks() -> Iterator[Clicks]:
            left = num_clicks
            for piece in self.clicks():
                if left > 0:
                    yield piece.rows(0, min(left, len(piece)))
                left -= len(piece)

        return replace(self, num_clicks=min(num_clicks, self.num_clicks), clicks=clicks)


def time_order(
    user_id: pa.StringArray, event_time: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """The order [n] that sorts rows by time, with the clicks of one user at one moment together and shuffled.

    Between users the file's order stays: in a log whose times are coarse it is the true one. But one user's rows of one
    moment are often in no order of clicking (a basket sorted by product, a list in alphabetical order); a model that
    sees the last item would learn that order and look better than it is.
    """
    users = user_id.dictionary_encode().indices.to_numpy()
    together = np.lexsort((users, event_time))
    begins = np.ones(len(users), bool)
    begins[1:] = (np.diff(users[together]) != 0) | (np.diff(event_time[together]) != 0)
    first_row = np.empty(len(users), np.int64)
    first_row[together] = together[np.maximum.accumulate(np.where(begins, np.arange(len(users)), 0))]
    return np.lexsort((rng.random(len(users)), first_row, event_time))
