"""The contest: the model and the baselines over one stream, each block foreseen before it is learnt.

Station: between the replay and the measures. The model is the trainer's own, made from the trainer's settings; what is
known of an item (features) it is told after the micro-batch of the item's first click, so that, as in the baselines,
only items that were clicked before are candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streams.contract import Int64Array, UInt64Array, encode_event, hash_id
from streamtower.datasets.clicks import Dataset
from streamtower.evaluate.ranking import NUM_BEST, Seen
from streamtower.evaluate.replay import Block, Stream
from trainer.evaluate import Ranks
from trainer.item_events import ItemChange, decode_item_change
from trainer.model import Model, new_model
from trainer.settings import TrainerSettings

ALL_ROWS = 100_000
"""Clicks of a micro-batch that are tested: the largest that the setting takes."""


class Contestant(Protocol):
    """Who foresees a block and then learns it."""

    def observe(self, block: Block) -> Seen:
        """What was foreseen of the block with the state from before it; the block is learnt then."""


@dataclass(frozen=True)
class Run:
    """One contestant's way through a stream."""

    seen: Seen
    """Of all clicks of the stream."""
    seconds: float
    """Processor time."""


def run(contestant: Contestant, stream: Stream, progress: Callable[[int], object] = lambda clicks: None) -> Run:
    """Shows a contestant the stream; `progress` is told how many clicks of each block are done."""
    started, parts = time.process_time(), []
    for block in stream.blocks:
        parts.append(contestant.observe(block))
        progress(len(block))
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
    model = new_model(settings.model_copy(update={"evaluation_rows": ALL_ROWS}))
    assert model.evaluation is not None
    model.evaluation.num_best = NUM_BEST
    return model


class FeatureTeller:
    """Tells a model of the items' features once they are clicked."""

    def __init__(self, items: Mapping[int, ItemChange]) -> None:
        self._left = dict(items)

    def tell(self, model: Model, item_hash: UInt64Array, step: int) -> None:
        """What is known of these items and was not told yet."""
        changes = [self._left.pop(key) for key in dict.fromkeys(item_hash.tolist()) if key in self._left]
        if changes:
            model.take(changes, step)


class TowersContestant:
    """The trainer's model, fed as the trainer's loop feeds it.

    Args:
        stream: whose blocks will come.
        settings: of the trainer.
        items: what is known of items, by hash.
    """

    def __init__(self, stream: Stream, settings: TrainerSettings, items: Mapping[int, ItemChange]) -> None:
        self.model = evaluated_model(settings)
        self._codes = Codes(stream.item_hash)
        self._teller = FeatureTeller(items)
        self._step = 0

    def observe(self, block: Block) -> Seen:
        """What the model foresaw of the block, which it then learns."""
        self._step += 2
        learnt = self.model.learn(block.batch, self._step)
        item_hash = self.model.catalogue.item_hash.copy()  # candidates may have been clicked first in this block
        self._teller.tell(self.model, block.batch.item_hash, self._step + 1)
        return self._codes.seen(learnt.ranks, item_hash, len(block))


class Codes:
    """Turns a model's numbers of items into the stream's codes."""

    def __init__(self, item_hash: UInt64Array) -> None:
        """`item_hash`: uint64 [N] code → hash."""
        self._order = np.argsort(item_hash)
        self._sorted = item_hash[self._order]

    def seen(self, ranks: Ranks | None, item_hash: UInt64Array, num_clicks: int) -> Seen:
        """What a model foresaw when its catalogue's rows had these hashes; None: nothing."""
        if ranks is None:
            return Seen.nothing(num_clicks)
        best: Int64Array = np.full((num_clicks, NUM_BEST), -1, np.int64)
        there = ranks.best >= 0
        best[there] = self._order[np.searchsorted(self._sorted, item_hash[ranks.best[there]])]
        return Seen(ranks.rank, best)


def best_of(runs: Iterable[tuple[str, Run]], score: Callable[[Run], float]) -> tuple[str, Run]:
    """The named run of the highest score: of equal ones, the first."""
    return max(runs, key=lambda named: score(named[1]))
