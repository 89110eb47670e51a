"""CORE: prequential evaluation — how well each click was foreseen by the state from before it was learnt.

Station: in the loop, before `step`. It ranks the clicked item among all known items by the served score, and by the
live popularity alone, which is the baseline to beat. It scores nothing and keeps no items: the caller gives the
scores that a query would get, so what is measured is what is served.

Shapes: B clicks, N known items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from trainer.features import Float32Array, Int64Array

Float64Array = npt.NDArray[np.float64]


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

    The window is its state; the counts are of this process.
    """

    def __init__(
        self,
        ks: tuple[int, ...] = (10, 100),
        window: int = 10_000,
        num_best: int = 0,
    ) -> None:
        """An evaluation that has seen nothing.

        Args:
            ks: the K of recall@K, each at least 1.
            window: newest evaluated clicks that `window` covers, at least 1.
            num_best: best candidates that are told of each click.
        """
        if not ks or min(ks) < 1 or window < 1:
            raise ValueError(f"ks {ks} and window {window} must be at least 1")
        self.num_best = num_best
        self.num_evaluated = 0
        self.num_candidates_hit = 0
        """Evaluated clicks whose item was a candidate."""
        self._hits = {k: np.zeros(2, dtype=np.int64) for k in ks}
        self._window = np.full((window, 2), np.inf)
        self._num_noted = 0
        """Clicks of which the window was told, over restarts or since a shorter window."""

    def observe(
        self, scores: Float32Array, popularity: Float32Array, target: Int64Array, excluded: Int64Array
    ) -> Ranks:
        """Ranks clicks, all with the state from before them.

        Args:
            scores: float32 [B, N] as the index serves them, or would; −inf for an item that is no candidate.
            popularity: float32 [N] live log q; −inf for an item that is no candidate (it is gone).
            target: int64 [B] numbers of the clicked items, −1 for an item that is not known.
            excluded: int64 [e, 2] distinct pairs (row, item) that are no candidates; `scores` has −inf there.
        """
        best = np.full((len(target), self.num_best), -1, dtype=np.int64)
        result = Ranks(
            rank=expected_ranks(scores, target, best),
            popularity_rank=popularity_ranks(popularity, target, excluded),
            best=best,
        )
        pair = np.stack([result.rank, result.popularity_rank], axis=1)
        for k, hits in self._hits.items():
            hits += (pair <= k).sum(0)
        self._note(pair)
        self.num_evaluated += len(pair)
        self.num_candidates_hit += int(np.isfinite(result.rank).sum())
        return result

    def window(self) -> Ranks:
        """The ranks of the newest evaluated clicks, in no particular order."""
        newest = self._window[: self._num_noted]
        return Ranks(rank=newest[:, 0], popularity_rank=newest[:, 1])

    def state_dict(self) -> dict[str, Float64Array]:
        """The window from which `load_state_dict` makes the same: float64 [n, 2], newest last."""
        first = self._num_noted % len(self._window) if self._num_noted > len(self._window) else 0
        return {"window": np.roll(self._window[: self._num_noted], -first, axis=0)}

    def load_state_dict(self, state: Mapping[str, Float64Array]) -> None:
        """Takes over what `state_dict` gave, into an evaluation that has seen nothing; of more clicks the newest."""
        self._note(state["window"])

    def _note(self, pair: Float64Array) -> None:
        places = (self._num_noted + np.arange(len(pair))) % len(self._window)
        self._window[places[-len(self._window) :]] = pair[-len(self._window) :]
        self._num_noted += len(pair)

    def recall(self, k: int) -> float:
        """recall@k over all evaluated clicks; NaN before the first."""
        return float(self._hits[k][0]) / self.num_evaluated if self.num_evaluated else np.nan

    def popularity_recall(self, k: int) -> float:
        """recall@k of live popularity over all evaluated clicks; NaN before the first."""
        return float(self._hits[k][1]) / self.num_evaluated if self.num_evaluated else np.nan

    def ceiling(self) -> float:
        """Share of all evaluated clicks that could be hit; NaN before the first."""
        return self.num_candidates_hit / self.num_evaluated if self.num_evaluated else np.nan


def expected_ranks(scores: Float32Array, target: Int64Array, best: Int64Array | None = None) -> Float64Array:
    """Rank of each target among the items by score: [B], from 1.

    1 + the number of better candidates + half the number of other equal ones: with a strict comparison alone, a model
    that gives every item the same score would look perfect.

    Args:
        scores: float32 [B, N], −inf for an item that is no candidate. A target that is none has rank inf.
        target: int64 [B], −1 for an item that is not among the N.
        best: int64 [B, k] full of −1: is given the numbers of each row's k best candidates, best first.
    """
    if scores.shape[1] == 0:
        return np.full(len(target), np.inf)
    row = np.arange(len(scores))
    score = scores[row, target]
    better = np.array([np.count_nonzero(scores[i] > score[i]) for i in row])
    not_worse = np.array([np.count_nonzero(scores[i] >= score[i]) for i in row])
    if best is not None and best.shape[1]:
        value, number = torch.from_numpy(scores).topk(min(best.shape[1], scores.shape[1]))
        best[:, : value.shape[1]] = np.where(value > -torch.inf, number, -1)
    return np.where((target >= 0) & (score > -np.inf), 0.5 * (better + not_worse + 1), np.inf)


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


def excluded_pairs(history_values: Int64Array, history_offsets: Int64Array) -> Int64Array:
    """Distinct pairs (row, item) of known history items: int64 [e, 2].

    Args:
        history_values: int64 [h] numbers of the items of all histories, −1 for one that is not known.
        history_offsets: int64 [B + 1] click i's are history_values[history_offsets[i]:history_offsets[i + 1]].
    """
    row = np.repeat(np.arange(len(history_offsets) - 1), np.diff(history_offsets))
    known = history_values >= 0
    return np.unique(np.stack([row[known], history_values[known]], axis=1), axis=0)
