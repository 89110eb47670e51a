"""Live item-kNN, the baseline that is hardest to beat: items clicked by the same users, counted click by click.

Station: a contestant of an evaluation. Counts are exact and unbounded: for measuring, not for serving.

For a click on j by a user whose previous distinct items are h_1 (newest) … h_w: C[h_k, j] and C[j, h_k] + 1 each, and
n[j] + 1. Item j's score for a user with the distinct history h_1 … is

    Σ_k decay^(k − 1) · C[h_k, j] / (√(n[h_k] · n[j]) + shrink).

C is a list of chunks of partners for each item, which scoring walks, and a hash table that finds a pair's place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from streams.contract import Float32Array, Float64Array, Int64Array, UInt64Array
from streams.kernel import kernel
from streamtower.evaluate.baselines import FILL_HALF_LIFE, ClickCounts
from streamtower.evaluate.ranking import Seen, rank_row
from streamtower.evaluate.replay import Block, Stream

Int32Array = npt.NDArray[np.int32]
CHUNK = 16
_EMPTY = -1


class ItemKNN:
    """See the module's docstring.

    Args:
        stream: whose blocks will come.
        window: previous distinct items that a click is counted with, at least 1; at most the history's length are.
        decay: in (0, 1].
        shrink: ≥ 0; makes items of few clicks count less.
    """

    def __init__(self, stream: Stream, *, window: int = 10, decay: float = 0.9, shrink: float = 10.0) -> None:
        num_items = len(stream.item_hash)
        self._window, self._decay, self._shrink = window, decay, shrink
        self._fill = ClickCounts(num_items, FILL_HALF_LIFE)
        self._num_clicks: Float64Array = np.zeros(num_items)
        self._head: Int64Array = np.full(num_items, _EMPTY, np.int64)
        self._last_length: Int64Array = np.full(num_items, CHUNK, np.int64)
        self._next: Int64Array = np.zeros(1024, np.int64)
        self._partner: Int32Array = np.zeros(1024 * CHUNK, np.int32)
        self._count: Float32Array = np.zeros(1024 * CHUNK, np.float32)
        self._key: UInt64Array = np.zeros(1 << 14, np.uint64)
        self._place: Int64Array = np.full(1 << 14, _EMPTY, np.int64)
        self._used = np.zeros(2, np.int64)  # chunks, pairs

    def observe(self, block: Block) -> Seen:
        """What was foreseen of the block, which is then learnt."""
        seen = Seen.nothing(len(block))
        clicks = (block.target, block.history_values, block.history_offsets)
        _rank_block(
            *clicks, self._fill.known(block), self._num_clicks, self._head, self._last_length, self._next,
            self._partner, self._count, self._decay, self._shrink, seen.rank, seen.best,
        )  # fmt: skip
        self._make_room(2 * len(block.history_values))
        _count_block(
            *clicks, self._window, self._num_clicks, self._head, self._last_length, self._next, self._partner,
            self._count, self._key, self._place, self._used,
        )  # fmt: skip
        self._fill.add(block)
        return seen

    def counted(self, item: int, other: int) -> float:
        """C[item, other]."""
        place = self._place[_slot(_pair(item, other), self._key, self._place)]
        return float(self._count[place]) if place != _EMPTY else 0.0

    def _make_room(self, num_pairs: int) -> None:
        """For so many new pairs, each of which may need a chunk of its own."""
        while self._used[0] + num_pairs > len(self._next):
            self._next, self._partner, self._count = (
                np.concatenate([column, np.zeros_like(column)]) for column in (self._next, self._partner, self._count)
            )
        while 2 * (self._used[1] + num_pairs) > len(self._key):
            key, place = np.zeros(2 * len(self._key), np.uint64), np.full(2 * len(self._key), _EMPTY, np.int64)
            _rehash(self._key, self._place, key, place)
            self._key, self._place = key, place


@kernel
def _pair(item: int, other: int) -> np.uint64:
    return (np.uint64(item) << np.uint64(32)) | np.uint64(other)


@kernel
def _slot(pair: np.uint64, key: UInt64Array, place: Int64Array) -> int:
    """Where the pair is in the table, or the empty place where it would be."""
    mixed = (pair ^ (pair >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
    slot = np.int64((mixed >> np.uint64(20)) & np.uint64(len(key) - 1))
    while place[slot] != _EMPTY and key[slot] != pair:
        slot = (slot + 1) & (len(key) - 1)
    return slot  # type: ignore[return-value]


@kernel
def _rehash(old_key: UInt64Array, old_place: Int64Array, key: UInt64Array, place: Int64Array) -> None:
    for old in range(len(old_key)):
        if old_place[old] != _EMPTY:
            slot = _slot(old_key[old], key, place)
            key[slot] = old_key[old]
            place[slot] = old_place[old]


@kernel
def _newest_distinct(history: Int64Array, distinct: Int64Array, most: int) -> int:
    """Writes a history's distinct items, newest first, and says how many."""
    n = 0
    for k in range(len(history) - 1, -1, -1):
        is_new = True
        for other in range(n):
            if distinct[other] == history[k]:
                is_new = False
        if is_new and n < most:
            distinct[n] = history[k]
            n += 1
    return n


@kernel
def _count_block(
    target: Int64Array,
    history_values: Int64Array,
    history_offsets: Int64Array,
    window: int,
    num_clicks: Float64Array,
    head: Int64Array,
    last_length: Int64Array,
    next_chunk: Int64Array,
    partner: Int32Array,
    count: Float32Array,
    key: UInt64Array,
    place: Int64Array,
    used: Int64Array,
) -> None:
    distinct = np.empty(1024, np.int64)
    for row in range(len(target)):
        num_clicks[target[row]] += 1
        history = history_values[history_offsets[row] : history_offsets[row + 1]]
        for k in range(_newest_distinct(history, distinct, min(window, len(distinct)))):
            if distinct[k] == target[row]:
                continue
            for item, other in ((distinct[k], target[row]), (target[row], distinct[k])):
                pair = _pair(item, other)
                slot = _slot(pair, key, place)
                if place[slot] == _EMPTY:
                    if last_length[item] == CHUNK:
                        next_chunk[used[0]] = head[item]
                        head[item] = used[0]
                        used[0] += 1
                        last_length[item] = 0
                    key[slot] = pair
                    place[slot] = head[item] * CHUNK + last_length[item]
                    partner[place[slot]] = other
                    last_length[item] += 1
                    used[1] += 1
                count[place[slot]] += 1


@kernel
def _rank_block(
    target: Int64Array,
    history_values: Int64Array,
    history_offsets: Int64Array,
    popularity: Float64Array,
    num_clicks: Float64Array,
    head: Int64Array,
    last_length: Int64Array,
    next_chunk: Int64Array,
    partner: Int32Array,
    count: Float32Array,
    decay: float,
    shrink: float,
    rank: Float64Array,
    best: Int64Array,
) -> None:
    num_known = len(popularity)
    root = np.sqrt(num_clicks[:num_known])
    score = np.zeros(num_known, np.float32)
    excluded = np.zeros(num_known, np.bool_)
    distinct = np.empty(1024, np.int64)
    for row in range(len(target)):
        history = history_values[history_offsets[row] : history_offsets[row + 1]]
        score[:] = 0
        weight = 1.0
        for k in range(_newest_distinct(history, distinct, len(distinct))):
            item = distinct[k]
            if item < num_known:
                excluded[item] = True
                chunk, length = head[item], last_length[item]
                while chunk != _EMPTY:
                    for at in range(chunk * CHUNK, chunk * CHUNK + length):
                        score[partner[at]] += weight * count[at] / (root[item] * root[partner[at]] + shrink)
                    chunk, length = next_chunk[chunk], CHUNK
            weight *= decay
        rank[row] = rank_row(score, popularity, target[row], excluded, best[row])
        for k in range(len(history)):
            if history[k] < num_known:
                excluded[history[k]] = False
