"""The measures of a contestant, from the ranks of all clicks and the best items of each.

Station: behind the contestants, before the report. All measures are over the same clicks, by default those of the
second half of the stream; a click whose item was no candidate is a miss in each of them.

Shapes: n clicks of the stream.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np

from streams.contract import Float64Array, Int64Array
from streamtower.evaluate.ranking import NUM_BEST, Seen
from streamtower.evaluate.replay import BoolArray, Stream

COLD_CLICKS = 5
"""An item is cold while it had fewer clicks than this before the block."""
HEAD_RATIO = 0.2
"""The most clicked items that are not the long tail, as a share of all items of the stream."""


@dataclass(frozen=True)
class Measures:
    """How good a contestant was over the clicks that are evaluated; all within 0 … 1."""

    recall_at_10: float
    """Share of the clicks whose item was among the 10 best candidates."""
    recall_at_50: float
    recall_at_100: float
    ndcg_at_10: float
    """Mean of 1 / log2(1 + rank), 0 beyond rank 10."""
    mrr: float
    """Mean of 1 / rank."""
    coverage_at_10: float
    """Share of the stream's items that were among the 10 best of any click."""
    tail_ratio_at_10: float
    """Share of the long tail's items among the 10 best: of those outside the most clicked fifth of all items."""
    cold_recall_at_10: float
    """recall_at_10 over the clicks on cold items: with fewer than 5 clicks before the block."""
    cold_recall_at_100: float
    ceiling: float
    """Share of the clicks whose item was a candidate."""

    def to_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


NAMES = tuple(field.name for field in fields(Measures))


def measures(stream: Stream, seen: Seen, evaluated: BoolArray) -> Measures:
    """The measures over the clicks that are marked: bool [n].

    Raises:
        ValueError: no click is marked.
    """
    if not evaluated.any():
        raise ValueError("there is no click to evaluate")
    rank, best = seen.rank[evaluated], seen.best[evaluated]
    cold = rank[stream.earlier_clicks[evaluated] < COLD_CLICKS]
    named = best[best >= 0]
    return Measures(
        recall_at_10=recall(rank, 10),
        recall_at_50=recall(rank, 50),
        recall_at_100=recall(rank, 100),
        ndcg_at_10=float(np.mean(np.where(rank <= NUM_BEST, 1 / np.log2(1 + rank), 0.0))),
        mrr=float(np.mean(1 / rank)),
        coverage_at_10=len(np.unique(named)) / len(stream.item_hash),
        tail_ratio_at_10=float(np.mean(is_tail(stream)[named])) if len(named) else 0.0,
        cold_recall_at_10=recall(cold, 10),
        cold_recall_at_100=recall(cold, 100),
        ceiling=float(np.mean(np.isfinite(rank))),
    )


def recall(rank: Float64Array, k: int) -> float:
    """Share of the ranks that are at most k; 0 of none."""
    return float(np.mean(rank <= k)) if len(rank) else 0.0


def is_tail(stream: Stream) -> BoolArray:
    """bool [number of items] whether the item belongs to the long tail: not among the HEAD_RATIO most clicked."""
    counts = np.bincount(stream.target, minlength=len(stream.item_hash))
    tail = np.ones(len(counts), bool)
    tail[np.argsort(-counts, kind="stable")[: round(HEAD_RATIO * len(counts))]] = False
    return tail


def over_time(values: Float64Array | BoolArray, num_parts: int) -> Float64Array:
    """Means of [n] over `num_parts` stretches of equal size, in order; n of them if there are fewer clicks."""
    return np.array([part.mean() for part in np.array_split(values, min(num_parts, len(values)))])


def second_half(num_clicks: int) -> BoolArray:
    """bool [n] the clicks that are evaluated by default."""
    return np.arange(num_clicks) >= num_clicks // 2


def mean_and_std(values: list[float]) -> dict[str, float]:
    """Over seeds; the standard deviation of a sample (n − 1), 0 of a single one."""
    array: Int64Array | Float64Array = np.array(values)
    return {"mean": float(array.mean()), "std": float(array.std(ddof=1)) if len(array) > 1 else 0.0}
