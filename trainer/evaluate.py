"""CORE: prequential evaluation — how well each click was foreseen by the state from before it was learnt.

Station: in the loop, before `step`. It ranks the clicked item among all known items by the served score, and by the
live popularity alone, which is the baseline to beat. It embeds nothing and keeps no items: the caller gives the
embeddings that the index serves, so what is measured is what is served.

Shapes: B clicks, N known items, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from trainer.features import Float32Array, Int64Array, ranges

Float64Array = npt.NDArray[np.float64]

_SCORES_AT_ONCE = 2**22
"""Scores held in memory at a time: 16 MiB."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of n clicked items, from 1; ties count by their expected rank; inf = the item was no candidate."""

    rank: Float64Array
    """[n] by the served score."""
    popularity_rank: Float64Array
    """[n] by the live popularity."""
    best: Int64Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    """[n, num_best] the numbers of the best candidates by the served score, best first; −1 where there were fewer."""

    def recall(self, k: int) -> float:
        """Share of the clicks whose item was among the k best; NaN without clicks."""
        return float(np.mean(self.rank <= k)) if len(self.rank) else np.nan

    def popularity_recall(self, k: int) -> float:
        """The same for live popularity."""
        return float(np.mean(self.popularity_rank <= k)) if len(self.rank) else np.nan

    def ceiling(self) -> float:
        """Share of the clicks that any ranking could hit: their item was a candidate."""
        return float(np.mean(np.isfinite(self.rank))) if len(self.rank) else np.nan


class Prequential:
    """Runs the evaluation along the stream: `window` holds the ranks of the newest clicks, counts cover all.

    Not part of a checkpoint: after a restart it starts anew.
    """

    def __init__(
        self,
        temperature: float,
        popularity_weight: float = 1.0,
        ks: tuple[int, ...] = (10, 100),
        window: int = 10_000,
        exclude_history: bool = True,
        rows_per_batch: int | None = None,
        seed: int = 0,
        num_best: int = 0,
    ) -> None:
        """An evaluation that has seen nothing.

        Args:
            temperature: of the towers, > 0.
            popularity_weight: served score = cosine / temperature + popularity_weight · log q.
            ks: the K of recall@K, each at least 1.
            window: newest evaluated clicks that `window` covers, at least 1.
            exclude_history: whether items of the history that is known at the click are no candidates. A click on one
                of them is then a miss.
            rows_per_batch: most clicks of a batch that are evaluated, drawn at random; None = all. One costs about
                128 · N floating-point operations.
            seed: of the draw.
            num_best: best candidates that are told of each click.
        """
        if not ks or min(ks) < 1 or window < 1 or (rows_per_batch is not None and rows_per_batch < 1):
            raise ValueError(f"ks {ks}, window {window} and rows_per_batch {rows_per_batch} must be at least 1")
        self.temperature = temperature
        self.popularity_weight = popularity_weight
        self.exclude_history = exclude_history
        self.rows_per_batch = rows_per_batch
        self.num_best = num_best
        self.num_evaluated = 0
        self.num_candidates_hit = 0
        """Evaluated clicks whose item was a candidate."""
        self._hits = {k: np.zeros(2, dtype=np.int64) for k in ks}
        self._window = np.full((window, 2), np.inf)
        self._random = np.random.default_rng(seed)

    def observe(
        self,
        query_embedding: Float32Array,
        item_embedding: Float32Array,
        popularity: Float32Array,
        target: Int64Array,
        history_values: Int64Array,
        history_offsets: Int64Array,
    ) -> Ranks:
        """Ranks the clicks of one batch, all with the state from before it.

        Args:
            query_embedding: float32 [B, D].
            item_embedding: float32 [N, D] as the index serves them, or would.
            popularity: float32 [N] live log q; −inf for an item that is no candidate (it is gone).
            target: int64 [B] numbers of the clicked items, −1 for an item that is not known.
            history_values: int64 [h] numbers of the items of all histories, −1 for one that is not known.
            history_offsets: int64 [B + 1] click i's are history_values[history_offsets[i]:history_offsets[i + 1]].

        Returns:
            The ranks of the clicks that were evaluated, in their order.
        """
        rows = np.arange(len(target))
        if self.rows_per_batch is not None and self.rows_per_batch < len(rows):
            rows = np.sort(self._random.choice(rows, self.rows_per_batch, replace=False))
            lengths = np.diff(history_offsets)[rows]
            history_values = history_values[ranges(history_offsets[:-1][rows], lengths)]
            history_offsets = np.concatenate(([0], np.cumsum(lengths)))
            query_embedding, target = query_embedding[rows], target[rows]
        excluded = (
            _excluded(history_values, history_offsets) if self.exclude_history else np.zeros((0, 2), dtype=np.int64)
        )
        bias = popularity.astype(np.float32)
        bias[bias > -np.inf] *= self.popularity_weight  # also 0 · −inf is −inf: no candidate
        queries = (query_embedding / self.temperature).astype(np.float32)
        best = np.full((len(target), self.num_best), -1, dtype=np.int64)
        result = Ranks(
            rank=expected_ranks(queries, item_embedding, bias, target, excluded, best),
            popularity_rank=popularity_ranks(popularity, target, excluded),
            best=best,
        )
        pair = np.stack([result.rank, result.popularity_rank], axis=1)
        for k, hits in self._hits.items():
            hits += (pair <= k).sum(0)
        places = (self.num_evaluated + np.arange(len(pair))) % len(self._window)
        self._window[places[-len(self._window) :]] = pair[-len(self._window) :]
        self.num_evaluated += len(pair)
        self.num_candidates_hit += int(np.isfinite(result.rank).sum())
        return result

    def window(self) -> Ranks:
        """The ranks of the newest evaluated clicks, in no particular order."""
        newest = self._window[: min(self.num_evaluated, len(self._window))]
        return Ranks(rank=newest[:, 0], popularity_rank=newest[:, 1])

    def recall(self, k: int) -> float:
        """recall@k over all evaluated clicks; NaN before the first."""
        return float(self._hits[k][0]) / self.num_evaluated if self.num_evaluated else np.nan

    def popularity_recall(self, k: int) -> float:
        """recall@k of live popularity over all evaluated clicks; NaN before the first."""
        return float(self._hits[k][1]) / self.num_evaluated if self.num_evaluated else np.nan

    def ceiling(self) -> float:
        """Share of all evaluated clicks that could be hit; NaN before the first."""
        return self.num_candidates_hit / self.num_evaluated if self.num_evaluated else np.nan


def expected_ranks(
    queries: Float32Array,
    items: Float32Array,
    bias: Float32Array,
    target: Int64Array,
    excluded: Int64Array,
    best: Int64Array | None = None,
) -> Float64Array:
    """Rank of each target among the items by ⟨query, item⟩ + bias: [B], from 1.

    1 + the number of better candidates + half the number of other equal ones: with a strict comparison alone, a model
    that gives every item the same score would look perfect.

    Args:
        queries: float32 [B, D].
        items: float32 [N, D].
        bias: float32 [N], −inf for an item that is no candidate.
        target: int64 [B], −1 for an item that is not among the N.
        excluded: int64 [e, 2] distinct pairs (row, item) that are no candidates. A target that is none has rank inf.
        best: int64 [B, k] full of −1: is given the numbers of each row's k best candidates, best first.
    """
    ranks = np.full(len(target), np.inf)
    at_once = max(1, _SCORES_AT_ONCE // max(1, len(items)))
    # torch, not numpy: its thread count is the process's own.
    items_T = torch.from_numpy(items).T
    for start in range(0, len(target) if len(items) else 0, at_once):
        scores = (torch.from_numpy(queries[start : start + at_once]) @ items_T).numpy()
        scores += bias  # by itself: addmm with a bias for each column takes half as long again
        row = np.arange(len(scores))
        here = excluded[(excluded[:, 0] >= start) & (excluded[:, 0] < start + len(scores))]
        scores[here[:, 0] - start, here[:, 1]] = -np.inf
        wanted = target[start : start + len(scores)]
        score = scores[row, wanted]
        better = np.array([np.count_nonzero(scores[i] > score[i]) for i in row])
        not_worse = np.array([np.count_nonzero(scores[i] >= score[i]) for i in row])
        candidate = (wanted >= 0) & (score > -np.inf)
        ranks[start : start + len(scores)] = np.where(candidate, 0.5 * (better + not_worse + 1), np.inf)
        if best is not None and best.shape[1]:
            value, number = torch.from_numpy(scores).topk(min(best.shape[1], len(items)))
            best[start : start + len(scores), : value.shape[1]] = np.where(value > -torch.inf, number, -1)
    return ranks


def popularity_ranks(popularity: Float32Array, target: Int64Array, excluded: Int64Array) -> Float64Array:
    """Rank of each target by a score that is the same for all rows: [B]; arguments and rules as in `expected_ranks`."""
    if len(popularity) == 0:
        return np.full(len(target), np.inf)
    ascending = np.sort(popularity)
    score = popularity[target]
    better = (len(ascending) - np.searchsorted(ascending, score, side="right")).astype(np.float64)
    not_worse = (len(ascending) - np.searchsorted(ascending, score, side="left")).astype(np.float64)
    row, item = excluded.T
    np.subtract.at(better, row[popularity[item] > score[row]], 1)
    np.subtract.at(not_worse, row[popularity[item] >= score[row]], 1)
    candidate = (target >= 0) & (score > -np.inf)
    candidate[row[item == target[row]]] = False
    return np.where(candidate, 0.5 * (better + not_worse + 1), np.inf)


def _excluded(history_values: Int64Array, history_offsets: Int64Array) -> Int64Array:
    """Distinct pairs (row, item) of known history items: int64 [e, 2]."""
    row = np.repeat(np.arange(len(history_offsets) - 1), np.diff(history_offsets))
    known = history_values >= 0
    return np.unique(np.stack([row[known], history_values[known]], axis=1), axis=0)
