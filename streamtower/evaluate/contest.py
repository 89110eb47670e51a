"""The contest: the model and the baselines over one stream, each click foreseen before it is learnt.

Station: between the replay and the measures. The model is the trainer's own, made from the trainer's settings; what is
known of an item (features) it is told after the micro-batch of the item's first click, so that, as in the baselines,
only items that were clicked before are candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from streams.contract import Int64Array, MicroBatch, UInt64Array, encode_event, hash_id
from streamtower.datasets.clicks import Dataset
from streamtower.evaluate.ranking import NUM_BEST, Seen
from streamtower.evaluate.replay import Stream
from trainer.evaluate import Prequential, Ranks
from trainer.item_events import ItemChange, decode_item_change
from trainer.model import Model, new_model
from trainer.settings import TrainerSettings


class Clicks(Protocol):
    """A block, or a micro-batch."""

    def __len__(self) -> int: ...


ClicksT = TypeVar("ClicksT", bound=Clicks, contravariant=True)


class Contestant(Protocol[ClicksT]):
    """Who foresees clicks and then learns them: the model micro-batches, baselines blocks."""

    def observe(self, clicks: ClicksT, /) -> Seen:
        """What was foreseen of the clicks with the state from before them; they are learnt then."""


@dataclass(frozen=True)
class Run:
    """One contestant's way through a stream."""

    seen: Seen
    """Of all clicks of the stream."""
    seconds: float
    """Processor time."""


def run(
    contestant: Contestant[ClicksT], stream: Sequence[ClicksT], progress: Callable[[int], object] = lambda clicks: None
) -> Run:
    """Shows a contestant the stream, piece by piece; `progress` is told how many clicks of each are done."""
    started, parts = time.process_time(), []
    for clicks in stream:
        parts.append(contestant.observe(clicks))
        progress(len(clicks))
    seen = Seen(np.concatenate([part.rank for part in parts]), np.concatenate([part.best for part in parts]))
    return Run(seen, time.process_time() - started)


def item_changes(dataset: Dataset) -> dict[int, ItemChange]:
    """What is known of the data set's items, as the trainer reads it: hash of the id → change."""
    return {
        hash_id(item.item_id): decode_item_change(item.item_id.encode(), encode_event(item)) for item in dataset.items()
    }


def evaluated_model(settings: TrainerSettings) -> Model:
    """A new model by these settings that is tested on every click and tells its best candidates.

    Raises:
        ValueError: what the towers or the training refuse, one a line.
    """
    model = new_model(settings)
    model.evaluation, model.tested_rows = Prequential(num_best=NUM_BEST), None  # all clicks
    return model


class Feed:
    """Feeds a model micro-batches and what is known of their items, as the trainer does, loop and publishing.

    Args:
        model: that has learnt nothing.
        items: what is known of items, by hash.
    """

    def __init__(self, model: Model, items: Mapping[int, ItemChange]) -> None:
        self.model = model
        self._items_left = dict(items)
        self._num_batches = 0

    def learn(self, batch: MicroBatch) -> Ranks | None:
        """Has the model learn the micro-batch, and gives back what it foresaw of it."""
        step = 2 * self._num_batches
        ranks = self.model.learn(batch, step + 1).ranks
        clicked = dict.fromkeys(batch.item_hash.tolist())
        changes = [self._items_left.pop(key) for key in clicked if key in self._items_left]
        if changes:
            self.model.take(changes, step + 2)
        self._num_batches += 1
        return ranks


class TowersContestant:
    """The trainer's model, fed as the trainer's loop feeds it.

    Args:
        stream: whose micro-batches will come.
        settings: of the trainer.
        items: what is known of items, by hash.
    """

    def __init__(self, stream: Stream, settings: TrainerSettings, items: Mapping[int, ItemChange]) -> None:
        self.model = evaluated_model(settings)
        self._feed = Feed(self.model, items)
        self._codes = Codes(stream.item_hash)

    def observe(self, batch: MicroBatch) -> Seen:
        """What the model foresaw of the micro-batch, which it has learnt then."""
        ranks = self._feed.learn(batch)
        return self._codes.seen(ranks, self.model.catalogue.item_hash, len(batch))


class Codes:
    """Turns a model's numbers of items into the stream's codes."""

    def __init__(self, item_hash: UInt64Array) -> None:
        """`item_hash`: uint64 [N] code → hash."""
        self._order = np.argsort(item_hash)
        self._sorted = item_hash[self._order]

    def seen(self, ranks: Ranks | None, item_hash: UInt64Array, num_clicks: int) -> Seen:
        """What a model foresaw whose catalogue's rows have these hashes; None: nothing."""
        if ranks is None:
            return Seen.nothing(num_clicks)
        best: Int64Array = np.full((num_clicks, NUM_BEST), -1, np.int64)
        there = ranks.best >= 0
        best[there] = self._order[np.searchsorted(self._sorted, item_hash[ranks.best[there]])]
        return Seen(ranks.rank, best)


def best_of(runs: Iterable[tuple[str, Run]], score: Callable[[Run], float]) -> tuple[str, Run]:
    """The named run of the highest score: of equal ones, the first."""
    return max(runs, key=lambda named: score(named[1]))
