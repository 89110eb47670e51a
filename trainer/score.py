"""CORE: the served score — how towers, live popularity and co-visitation are weighed, learnt on the clicks themselves.

Station: in the model, after its parts have said what they think of the candidates of a click, and before the click is
learnt. The weights go into the Manifest, and from there into the queries.

Score of item j for user u:

    s(u, j) = a·(⟨f(u), g(j)⟩ / τ + v(u)·φ(j)) + w·φ(j) + b·ln(1 + c·x(u, j))

φ: log shares of the clicks at several half-lives (`Catalogue.popularity_features`); v: how the user leans to them, as
the query tower says (`QueryTower`); the parenthesis is what is called the logits here.
x: how much more often than by chance j was clicked near the items of u's history (`covisit`).
Each weight is v[0] + v[1] · (ln(1 + number of history items) − 1.5): users of whom much is known are served otherwise
than new ones.

The weights follow the clicks by online Newton steps on the log-likelihood of the clicked item among the `NUM_BEST`
candidates that the served score puts highest, for the clicks whose item is among them. Among the best alone, because
only their order is served: fitted to all items, the weights explain the many that nobody is shown. A click is scored
before it is learnt, with weights from before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from trainer.contract import log_history
from trainer.features import Float32Array, Int64Array

Float64Array = npt.NDArray[np.float64]

NUM_BEST = 300
FIRST_EMBEDDING_WEIGHT = 0.3
"""Embeddings are random at first: with weight 1 they would drown the popularity until the weights have learnt."""
PRIOR = 20.0
"""Strength of the first weights: as if so many clicks of unit variance had confirmed them."""


class ServedScore:
    """The weights [F, 2] of F = 2 + number of popularity features: embedding, popularity …, co-visitation."""

    def __init__(
        self,
        num_popularity: int,
        *,
        popularity_weight: float = 1.0,
        covisit_weight: float = 0.5,
        covisit_scale: float = 1.0,
        adapts: bool = True,
    ) -> None:
        """First weights: `FIRST_EMBEDDING_WEIGHT` for the embedding, 1 if it stays; `popularity_weight` for the first
        popularity feature.

        Args:
            num_popularity: popularity features, ≥ 1.
            popularity_weight: first weight of the first of them; the others begin at 0.
            covisit_weight: first weight of co-visitation; 0: there is none, and it stays 0.
            covisit_scale: c of the formula, > 0.
            adapts: whether the weights follow the clicks.
        """
        self.covisit_scale = covisit_scale
        self.adapts = adapts
        self.weights: Float64Array = np.zeros((2 + num_popularity, 2))
        self.weights[:2, 0] = FIRST_EMBEDDING_WEIGHT if adapts else 1.0, popularity_weight
        self.weights[-1, 0] = covisit_weight
        self._learnt = np.repeat([[True] * (1 + num_popularity) + [covisit_weight != 0]], 2, axis=0).T.ravel()
        self._information: Float64Array = np.eye(self.weights.size) * PRIOR

    def effective(self, history_length: Int64Array) -> Float32Array:
        """float32 [B, F] weights for users with so many history items."""
        basis = np.stack([np.ones(len(history_length)), log_histories(history_length)])
        return (self.weights @ basis).T.astype(np.float32)

    def combine(
        self,
        logits: Float32Array,
        popularity: Float32Array,
        covisit: Float32Array | None,
        history_length: Int64Array,
    ) -> Float32Array:
        """The served score: float32 [B, N].

        Args:
            logits: float32 [B, N] what the towers say: cosine / τ, and the user's leaning.
            popularity: float32 [N, P] popularity features.
            covisit: float32 [B, N] x ≥ 0; None: without.
            history_length: int64 [B].
        """
        scores = np.empty_like(logits)
        none = np.zeros((0, 0), np.float32)
        columns = np.ascontiguousarray(popularity.T)
        _combine(
            self.effective(history_length), logits, columns, none if covisit is None else covisit,
            np.float32(self.covisit_scale), scores,
        )  # fmt: skip
        return scores

    def learn(
        self,
        logits: Float32Array,
        popularity: Float32Array,
        covisit: Float32Array | None,
        history_length: Int64Array,
        scores: Float32Array,
        target: Int64Array,
    ) -> None:
        """One Newton step on clicks that were scored.

        Args:
            logits: as all four, what `combine` was given.
            popularity: [N, P].
            covisit: [B, N] or None.
            history_length: [B].
            scores: float32 [B, N] what it gave, −inf where an item is no candidate.
            target: int64 [B] rows of the clicked items, −1 where unknown.
        """
        if not self.adapts:
            return
        gradient = np.zeros(self.weights.size)
        basis = log_histories(history_length)
        for i in np.flatnonzero(target >= 0):
            score = scores[i, target[i]]
            if score == -np.inf or np.count_nonzero(scores[i] > score) >= NUM_BEST:
                continue
            best = torch.from_numpy(scores[i]).topk(min(NUM_BEST, scores.shape[1]), sorted=False).indices.numpy()
            best = best[scores[i, best] > -np.inf]
            place = np.flatnonzero(best == target[i])
            if len(place) == 0 or len(best) < 2:
                continue
            features = np.empty((len(best), len(self.weights)))
            features[:, 0], features[:, 1:-1] = logits[i, best], popularity[best]
            features[:, -1] = 0 if covisit is None else np.log1p(self.covisit_scale * covisit[i, best])
            chance = np.exp(scores[i, best].astype(np.float64) - scores[i, best].max())
            chance /= chance.sum()
            mean = chance @ features
            spread = features - mean
            covariance = (spread * chance[:, None]).T @ spread
            history = np.array([1.0, basis[i]])
            gradient += np.outer(features[place[0]] - mean, history).ravel()
            self._information += np.kron(covariance, np.outer(history, history))
        learnt = self._learnt
        move = np.linalg.solve(self._information[np.ix_(learnt, learnt)], gradient[learnt])
        self.weights.ravel()[learnt] += move

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays from which `load_state_dict` makes the same score; copies."""
        return {"weights": self.weights.copy(), "information": self._information.copy()}

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: the weights are of other features.
        """
        if state["weights"].shape != self.weights.shape:
            raise ValueError(f"the weights are {state['weights'].shape} and should be {self.weights.shape}")
        self.weights, self._information = np.array(state["weights"]), np.array(state["information"])


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "contract"})
def _combine(weights, logits, popularity, covisit, scale, scores):  # type: ignore[no-untyped-def]
    # Row by row, so that a row of scores stays in the cache until it is done.
    num_popularity = len(popularity)
    for i in range(len(logits)):
        row = scores[i]
        for j in range(len(row)):
            row[j] = weights[i, 0] * logits[i, j]
        for p in range(num_popularity):
            for j in range(len(row)):
                row[j] += weights[i, 1 + p] * popularity[p, j]
        if len(covisit):
            for j in range(len(row)):
                if covisit[i, j] > 0:
                    row[j] += weights[i, 1 + num_popularity] * np.log1p(scale * covisit[i, j])


def log_histories(history_length: Int64Array) -> Float64Array:
    """`trainer.contract.log_history` of each: float64 [B]."""
    return np.array([log_history(length) for length in history_length.tolist()])
