"""From scored points to what is told of them: the parts of a score, and an order that is diverse.

Station: between `search` and the answer. Whole arrays, no Qdrant and no HTTP.

Shapes: N candidates, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from retriever.contract import Explanation
from retriever.encode import Query

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

POOL = 4
"""Candidates that diversity chooses from, for each one that is wanted."""
MAX_POOL = 2_000


def pool_size(k: int, diversity: float) -> int:
    """How many of the best are searched for, so that k can be chosen from them."""
    return max(k, min(POOL * k, MAX_POOL)) if diversity else k


def explain(
    query: Query, embedding_dim: int, score: float, dense: Sequence[float], covisit: Mapping[int, float]
) -> Explanation:
    """The parts of an item's score. What the item shares with the history may not have counted (see SPARSE_PREFETCH);
    then it is no part of it.

    Args:
        query: that the score answers.
        score: that is explained.
        embedding_dim: dimensions of the deep embedding, the first of `dense`.
        dense: the item's vector [dense_dims].
        covisit: the item's sparse vector, index → value.
    """
    item, asked = np.asarray(dense, np.float64), np.asarray(query.dense, np.float64)
    products = item * asked
    common = math.fsum(
        value * covisit.get(index, 0.0) for index, value in zip(query.indices, query.values, strict=True)
    )
    affinity, popularity = float(products[:embedding_dim].sum()), float(products[embedding_dim:].sum())
    covisitation = query.covisit_weight * math.log1p(common)
    without = score - affinity - popularity
    counted = abs(without - covisitation) <= abs(without)
    return Explanation(affinity=affinity, popularity=popularity, covisitation=covisitation if counted else 0.0)


def diverse(scores: Float32Array, embeddings: Float32Array, k: int, diversity: float) -> Int64Array:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): places of the chosen, in the order chosen.

    Each next one is that of the largest (1 − λ) · relevance − λ · largest cosine with one chosen before, where
    relevance is the score scaled to 0 … 1 over all N. The first is the one of the highest score; ties go to the first.

    Args:
        scores: [N], any range.
        embeddings: [N, D]; of any length, 0 counts as unlike everything.
        k: how many, at most N are chosen.
        diversity: λ, 0 … 1.
    """
    num_chosen = min(k, len(scores))
    if not num_chosen:
        return np.zeros(0, np.int64)
    spread = float(scores.max() - scores.min())
    relevance = (scores - scores.min()) / spread if spread else np.zeros(len(scores), np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    gain = (1 - diversity) * relevance
    nearest = np.full(len(scores), -np.inf, np.float32)
    chosen = np.empty(num_chosen, np.int64)
    chosen[0] = best = int(scores.argmax())
    left = np.ones(len(scores), np.bool_)
    for place in range(1, num_chosen):
        left[best] = False
        np.maximum(nearest, unit @ unit[best], out=nearest)
        best = int(np.where(left, gain - diversity * nearest, -np.inf).argmax())
        chosen[place] = best
    return chosen
