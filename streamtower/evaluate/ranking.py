"""Ranks and best items from scores, for the baselines; the trainer's own model is ranked by `trainer.evaluate`.

Station: between a baseline's scores and the measures. The rules are the trainer's: items of the history are no
candidates, equal scores count by their expected rank, an item that is no candidate has rank inf. Where a baseline has
no opinion, popularity decides: it orders items of equal score.

Shapes: B clicks, N known items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streams.contract import Float32Array, Float64Array, Int64Array
from streams.kernel import kernel
from streamtower.evaluate.replay import Block, BoolArray

NUM_BEST = 10
"""Best items kept of each ranking, for coverage and the long tail's share."""


@dataclass(frozen=True)
class Seen:
    """What a contestant foresaw of B clicks."""

    rank: Float64Array
    """[B] of the clicked item, from 1; inf: it was no candidate."""
    best: Int64Array
    """[B, NUM_BEST] codes of the best candidates, best first; −1 where there were fewer."""

    @classmethod
    def nothing(cls, num_clicks: int) -> Seen:
        """Of clicks for which there was no candidate."""
        return cls(np.full(num_clicks, np.inf), np.full((num_clicks, NUM_BEST), -1, np.int64))


def ranked(block: Block, scores: Float32Array, popularity: Float64Array) -> Seen:
    """Ranks the block's clicks by scores, and by popularity where these are equal.

    Args:
        block: whose first `num_known` items are the candidates.
        scores: float32 [B, N].
        popularity: float64 [N].
    """
    seen = Seen.nothing(len(block))
    _rank_rows(scores, popularity, block.target, block.history_values, block.history_offsets, seen.rank, seen.best)
    return seen


@kernel
def _rank_rows(
    scores: Float32Array,
    popularity: Float64Array,
    target: Int64Array,
    history_values: Int64Array,
    history_offsets: Int64Array,
    rank: Float64Array,
    best: Int64Array,
) -> None:
    excluded = np.zeros(scores.shape[1], np.bool_)
    for row in range(len(target)):
        history = history_values[history_offsets[row] : history_offsets[row + 1]]
        for item in history:
            if item < len(excluded):
                excluded[item] = True
        rank[row] = rank_row(scores[row], popularity, target[row], excluded, best[row])
        for item in history:
            if item < len(excluded):
                excluded[item] = False


@kernel
def rank_row(
    score: Float32Array, popularity: Float64Array, target: int, excluded: BoolArray, best: Int64Array
) -> float:
    """The expected rank of `target` among the items that are not excluded; fills `best` (−1 before the call)."""
    is_candidate = target < len(score) and not excluded[target]
    better, equal, num_best = 0, 0, 0
    for item in range(len(score)):
        if excluded[item]:
            continue
        if is_candidate:
            if score[item] > score[target]:
                better += 1
            elif score[item] == score[target]:
                if popularity[item] > popularity[target]:
                    better += 1
                elif popularity[item] == popularity[target]:
                    equal += 1
        place = num_best
        while place > 0:
            other = best[place - 1]
            if score[item] < score[other] or (score[item] == score[other] and popularity[item] <= popularity[other]):
                break
            if place < len(best):
                best[place] = other
            place -= 1
        if place < len(best):
            best[place] = item
            num_best = min(num_best + 1, len(best))
    return better + 0.5 * (equal + 1) if is_candidate else np.inf
