"""Whether a filled version finds what it holds: canary queries, as it would be searched, against exact search.

Station: in the rollout, between a collection that is whole and the alias that is switched to it. It searches nothing
itself and decides nothing. The same invented users tell later how stale the version has become (`staleness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streams.contract import Float32Array, Int64Array, UInt64Array
from trainer.contract import Manifest, query_vector
from trainer.towers import QueryInputs, TowerConfig, query_inputs

LIMIT = 100
"""Best items that are compared."""
HISTORY_ITEMS = 5
_TIE = 1e-5
"""Relative difference of scores below which two items are as good as each other."""

Hits = Sequence[tuple[int, float]]
"""Point ids and scores, best first."""


@dataclass(frozen=True)
class Users:
    """u users that nobody is: each has clicked a few of the items."""

    inputs: QueryInputs
    lengths: Int64Array
    """[u] of their histories."""

    def queries(self, manifest: Manifest, embedding: Float32Array) -> Float32Array:
        """Their dense queries at popularity 1: float32 [u, dense_dims].

        Args:
            manifest: has the weights.
            embedding: float32 [u, D] or, with leanings, [u, D + H]: of the query tower.
        """
        pairs = zip(embedding.tolist(), self.lengths.tolist(), strict=True)
        return np.array([query_vector(manifest, row, 1.0, length) for row, length in pairs], np.float32)


def invent_users(config: TowerConfig, item_hash: UInt64Array, num_users: int, seed: int) -> Users:
    """Users whose histories are 1 … 5 of these items, drawn at random.

    Args:
        config: of the towers.
        item_hash: uint64 [n], n ≥ 1.
        num_users: u ≥ 1.
        seed: the same one gives the same users.
    """
    lengths = 1 + np.arange(num_users) % HISTORY_ITEMS
    histories = np.random.default_rng(seed).choice(item_hash, int(lengths.sum()))
    return Users(query_inputs(config, None, histories, np.concatenate(([0], np.cumsum(lengths)))), lengths)


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
