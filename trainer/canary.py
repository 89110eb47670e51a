"""Whether a filled version finds what it holds: canary queries, as it would be searched, against exact search.

Station: in the rollout, between a collection that is whole and the alias that is switched to it. It searches nothing
itself and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streams.contract import Float32Array, UInt64Array
from trainer.contract import Manifest, query_vector
from trainer.towers import QueryTower, query_inputs

LIMIT = 100
"""Best items that are compared."""
HISTORY_ITEMS = 5
_TIE = 1e-5
"""Relative difference of scores below which two items are as good as each other."""

Hits = Sequence[tuple[int, float]]
"""Point ids and scores, best first."""


def canary_queries(
    manifest: Manifest, query_tower: QueryTower, item_hash: UInt64Array, num_queries: int
) -> Float32Array:
    """Dense queries of invented users, whose histories are 1 … 5 of these items: float32 [num_queries, D + H].

    The same version gives the same ones.

    Args:
        manifest: the version's.
        query_tower: the version's.
        item_hash: uint64 [n], n ≥ 1.
        num_queries: ≥ 1.
    """
    random = np.random.default_rng(manifest.model_version)
    lengths = 1 + np.arange(num_queries) % HISTORY_ITEMS
    histories = random.choice(item_hash, int(lengths.sum()))
    inputs = query_inputs(query_tower.config, None, histories, np.concatenate(([0], np.cumsum(lengths))))
    with torch.inference_mode():
        embedding = query_tower(inputs).tolist()
    queries = [query_vector(manifest, row, 1.0, n) for row, n in zip(embedding, lengths.tolist(), strict=True)]
    return np.array(queries, np.float32)


def recall_of(found: Sequence[Hits], exact: Sequence[Hits]) -> float:
    """Mean share of the exact best items of each query that were found, or others that are as good: 0 … 1.

    A query that has no exact answer counts as found.
    """
    recalls = []
    for hits, best in zip(found, exact, strict=True):
        if not best:
            recalls.append(1.0)
            continue
        worst = best[-1][1]
        as_good = sum(score >= worst - _TIE * max(1.0, abs(worst)) for _, score in hits)
        recalls.append(min(1.0, as_good / len(best)))
    return float(np.mean(recalls))
