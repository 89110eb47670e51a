"""A data set's clicks → micro-batches, through the very code of `streams`, without Kafka.

Station: the first of an evaluation; a broker would give the trainer the same micro-batches. One partition holds all
clicks, in time order, and cuts lie at multiples of the batch size, as they do where clicks come faster than
batches age. All of it is kept in memory, some 250 bytes a click, because several contestants go over it.

Shapes: n clicks of the stream, B of a block, h history items of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from streams.batcher import Batcher, Cut, micro_batch
from streams.contract import Float64Array, Int64Array, MicroBatch, UInt64Array, encode_event
from streams.drift import frequency_drift
from streams.settings import StreamsSettings
from streams.state import Learnt, PartitionState, StateConfig
from streams.validate import Clicks, validate
from streamtower.datasets.clicks import Dataset, DatasetError

BoolArray = npt.NDArray[np.bool_]
PARTITION = 0
REFRESH_CLICKS = 64


@dataclass(frozen=True)
class Block:
    """Clicks of a micro-batch that are foreseen from one state, and their items as codes 0, 1, … in the order of their
    first click in the stream."""

    batch: MicroBatch
    """These clicks alone."""
    target: Int64Array
    """[B] the clicked items."""
    history_values: Int64Array
    """[h] the items of all histories, as `batch.history_values`."""
    num_known: int
    """Items clicked before this block: the codes 0 … num_known − 1. Only they are candidates."""

    def __len__(self) -> int:
        return len(self.target)

    @property
    def history_offsets(self) -> Int64Array:
        """[B + 1], as `batch.history_offsets`."""
        return self.batch.history_offsets

    @property
    def is_candidate(self) -> BoolArray:
        """[B] whether the clicked item can be hit: clicked before this block, and not in the click's history."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.history_offsets))
        is_own = self.history_values == self.target[rows]
        fits: BoolArray = (self.target < self.num_known) & (np.bincount(rows[is_own], minlength=len(self)) == 0)
        return fits


@dataclass(frozen=True)
class Stream:
    """Micro-batches in the order in which the trainer would learn them."""

    batches: Sequence[MicroBatch]
    drift: Float64Array
    """[number of batches] `FrequencyDrift.corrected` after each."""
    refresh_clicks: int = REFRESH_CLICKS
    """Clicks of a block, at most: the trainer renews its counts so often within a micro-batch, and so do baselines."""

    @cached_property
    def item_hash(self) -> UInt64Array:
        """uint64 [N] the clicked items in the order of their first click: code → hash."""
        return self._codes[0]

    @cached_property
    def target(self) -> Int64Array:
        """int64 [n] codes of the clicked items."""
        return self._codes[1]

    @cached_property
    def _codes(self) -> tuple[UInt64Array, Int64Array]:
        clicked = np.concatenate([batch.item_hash for batch in self.batches])
        distinct, first, inverse = np.unique(clicked, return_index=True, return_inverse=True)
        by_first_click = np.argsort(first)
        code = np.empty(len(distinct), np.int64)
        code[by_first_click] = np.arange(len(distinct))
        return distinct[by_first_click], code[inverse]

    @cached_property
    def blocks(self) -> list[Block]:
        """The clicks with their codes, each micro-batch cut into blocks as the trainer's model goes through it."""
        code_of = {key: code for code, key in enumerate(self.item_hash.tolist())}
        blocks, start, known = [], 0, 0
        for batch in self.batches:
            history = np.fromiter(map(code_of.__getitem__, batch.history_values.tolist()), np.int64)
            for low in range(0, len(batch), self.refresh_clicks):
                high = min(low + self.refresh_clicks, len(batch))
                target = self.target[start + low : start + high]
                ends = batch.history_offsets[[low, high]]
                blocks.append(Block(batch.rows(low, high), target, history[ends[0] : ends[1]], known))
                known = max(known, int(target.max()) + 1)
            start += len(batch)
        return blocks

    @cached_property
    def is_candidate(self) -> BoolArray:
        """[n] whether the clicked item can be hit: the ceiling of every recall is the mean of it."""
        return np.concatenate([block.is_candidate for block in self.blocks])

    @cached_property
    def earlier_clicks(self) -> Int64Array:
        """int64 [n] clicks on the clicked item before the block."""
        counts, parts = np.zeros(len(self.item_hash), np.int64), []
        for block in self.blocks:
            parts.append(counts[block.target])
            counts += np.bincount(block.target, minlength=len(counts))
        return np.concatenate(parts)

    @property
    def num_clicks(self) -> int:
        """n."""
        return len(self.target)


def read_clicks(dataset: Dataset, settings: StreamsSettings) -> tuple[list[Cut], Counter[str]]:
    """The data set's clicks as `streams` accepts and cuts them, and how many it rejects, by reason.

    Raises:
        DatasetError: no click is accepted.
    """
    batcher = Batcher(0, settings.batch_size, settings.batch_age_seconds, clock=lambda: 0.0)
    cuts: list[Cut] = []
    rejected: Counter[str] = Counter()
    first = 0
    for piece in dataset.clicks():
        offsets = np.arange(first, first + len(piece))
        values = [encode_event(event) for event in piece.events()]
        clicks, rejections = validate(values, offsets, piece.event_time, settings.max_click_bytes)
        rejected.update(rejection.reason.value for rejection in rejections)
        first += len(piece)
        cuts += batcher.add(clicks, offsets, first)
    cuts += [cut for cut in [batcher.close()] if cut]
    if not any(len(cut.clicks) for cut in cuts):
        raise DatasetError(f"{dataset.name} has no click that streams accepts: {dict(rejected)}")
    return cuts, rejected


def stream(cuts: Iterable[Cut], config: StateConfig, refresh_clicks: int = REFRESH_CLICKS) -> Stream:
    """Runs cuts through the state of a new partition; `refresh_clicks` is the trainer's setting."""
    state = PartitionState(config)
    batches, drift = [], []
    for cut in cuts:
        learnt = state.learn(cut.clicks, cut.next_offset)
        if len(cut.clicks):
            batches.append(micro_batch(PARTITION, cut, learnt))
            drift.append(frequency_drift([state.drift]).corrected)
    return Stream(batches, np.array(drift), refresh_clicks)


def has_ties(stream: Stream) -> bool:
    """Whether any user has two clicks of one moment: only then do strict histories differ."""
    user, time = _column(stream, "user_hash"), _column(stream, "event_time")
    order = np.lexsort((time, user))
    same = (np.diff(user[order]) == 0) & (np.diff(time[order]) == 0)
    return bool(same.any())


def with_strict_histories(stream: Stream, length: int) -> Stream:
    """The same clicks with histories of clicks at earlier moments only.

    Where a file's times are coarse, clicks of one moment know nothing of each other in this variant, however they are
    shuffled; so what is measured owes nothing to their order.
    """
    user, item, time = (_column(stream, name) for name in ("user_hash", "item_hash", "event_time"))
    values, offsets = histories_before(user, item, length, moment=time)
    batches, start = [], 0
    for batch in stream.batches:
        here = offsets[start : start + len(batch) + 1]
        batches.append(replace(batch, history_values=values[here[0] : here[-1]], history_offsets=here - here[0]))
        start += len(batch)
    return replace(stream, batches=batches)


def histories_before(
    user: UInt64Array,
    item: UInt64Array,
    length: int,
    *,
    moment: Float64Array | None = None,
    is_known: BoolArray | None = None,
) -> tuple[UInt64Array, Int64Array]:
    """For each click, the last `length` items that its user clicked before it, over a whole stream at once.

    Without the optional arguments this is what `streams.history` gives where no user is forgotten.

    Args:
        user: uint64 [n], in the order of the stream.
        item: uint64 [n].
        length: most items of a history.
        moment: float64 [n] not falling for a user; if given, only clicks of earlier moments count as before.
        is_known: bool [n] clicks that enter histories; None: all.

    Returns:
        values uint64 [h], newest last, and offsets int64 [n + 1].
    """
    n = len(user)
    _, code = np.unique(user, return_inverse=True)
    order = np.argsort(code, kind="stable")
    position = np.arange(n)
    begins_user = np.concatenate([[True], np.diff(code[order]) != 0]) if n else np.zeros(0, bool)
    user_start = np.maximum.accumulate(np.where(begins_user, position, 0))
    if moment is None:
        end = position
    else:
        begins_moment = begins_user | np.concatenate([[True], np.diff(moment[order]) != 0])
        end = np.maximum.accumulate(np.where(begins_moment, position, 0))
    known = np.ones(n, bool) if is_known is None else is_known[order]
    known_before = np.concatenate([[0], np.cumsum(known)])
    listed = item[order][known]
    stop = known_before[end]
    start = np.maximum(known_before[user_start], stop - length)
    starts, lengths = np.empty(n, np.int64), np.empty(n, np.int64)
    starts[order], lengths[order] = start, stop - start
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    picked = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return listed[picked], offsets


def hold_out(
    cuts: Sequence[Cut], is_held_out: BoolArray, config: StateConfig
) -> list[tuple[MicroBatch | None, MicroBatch | None]]:
    """For each cut, the micro-batch of the clicks to learn and that of the clicks to be tested only.

    Clicks that are held out are in no history, count or frequency; their own histories are of the others' clicks before
    them.

    Args:
        cuts: of `read_clicks`.
        is_held_out: bool [n] of all accepted clicks, in their order.
        config: of the partition's state.
    """
    clicks = Clicks.concatenated([cut.clicks for cut in cuts])
    values, offsets = histories_before(clicks.user_hash, clicks.item_hash, config.history_length, is_known=~is_held_out)
    state = PartitionState(config)
    pairs, start = [], 0
    for cut in cuts:
        rows = np.arange(start, start + len(cut.clicks))
        learnt_rows, held_out_rows = rows[~is_held_out[rows]], rows[is_held_out[rows]]
        chosen = clicks.take(learnt_rows)
        learnt = state.learn(chosen, cut.next_offset)
        train = micro_batch(PARTITION, replace(cut, clicks=chosen), learnt) if len(chosen) else None
        test = None
        if len(held_out_rows):
            lengths = np.diff(offsets)[held_out_rows]
            ends = np.concatenate([[0], np.cumsum(lengths)])
            picked = np.repeat(offsets[held_out_rows] - ends[:-1], lengths) + np.arange(ends[-1])
            chosen = clicks.take(held_out_rows)
            share = state.estimator.sampling_probability(chosen.item_hash)
            test = micro_batch(PARTITION, replace(cut, clicks=chosen), Learnt(values[picked], ends, share))
        pairs.append((train, test))
        start += len(cut.clicks)
    return pairs


def _column(stream: Stream, name: str) -> npt.NDArray[Any]:
    return np.concatenate([getattr(batch, name) for batch in stream.batches])
