"""The whole score as one Qdrant query: dense and co-visitation, fused by Qdrant itself.

Station: between `encode`, which makes the query's vectors, and whoever sends it: `search`, or a caller of /v1/query
with a Qdrant client of their own. It sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from qdrant_client import models

from retriever.encode import Query
from trainer.contract import COVISIT, DENSE, ITEM_ID

UInt64Array = npt.NDArray[np.uint64]

MAX_OVERFETCH = 2_000
"""Up to so many seen items are searched for and dropped; more are excluded by Qdrant, which costs it more."""
DENSE_PREFETCH = 2
"""Candidates from the dense vector for each one that is wanted, where both are searched."""
SPARSE_PREFETCH = 2_000
"""Least candidates from the sparse vector, where both are searched; four for each one that is wanted, if that is more.
Where no more items than that share something with the history, the answer is exact: any item outside scores by its
dense vector alone, and is below the best of those."""
NO_SCORE = -1e6
"""Of a point that the outer dense search lost: none, unless its approximation does."""


@dataclass(frozen=True)
class Search:
    """What is wanted of one version's collection."""

    query: Query
    k: int
    """How many items, ≥ 1."""
    seen: UInt64Array
    """[s] hashes of items to leave out."""
    filter: models.Filter | None = None
    with_payload: bool = False
    """The whole payload; else the item id alone."""
    with_vectors: bool = False
    """The vectors that the score is made of."""

    @property
    def excluded(self) -> frozenset[int]:
        """Ids of the points to leave out."""
        return frozenset(self.seen.tolist())


def ready_request(search: Search, hnsw_ef: int) -> models.QueryRequest:
    """Qdrant's request for exactly the k items: seen ones are left out by Qdrant."""
    return _request(search, search.k, _without(search.filter, search.excluded), hnsw_ef)


def overfetching_request(search: Search, hnsw_ef: int) -> models.QueryRequest:
    """Qdrant's request for the k items and those of the seen ones that are among them; cheaper than leaving them out.

    Beyond MAX_OVERFETCH seen items it is `ready_request`.
    """
    excluded = search.excluded
    if len(excluded) > MAX_OVERFETCH:
        return ready_request(search, hnsw_ef)
    return _request(search, search.k + len(excluded), search.filter, hnsw_ef)


def _without(filter: models.Filter | None, excluded: frozenset[int]) -> models.Filter | None:
    if not excluded:
        return filter
    ids: list[models.ExtendedPointId] = sorted(excluded)
    return models.Filter(must=filter and [filter], must_not=[models.HasIdCondition(has_id=ids)])


def _request(search: Search, limit: int, narrowed: models.Filter | None, hnsw_ef: int) -> models.QueryRequest:
    query = search.query
    vectors = [*([DENSE] if query.dense else []), *([COVISIT] if query.indices else [])]
    return models.QueryRequest(
        **_parts(query, limit, narrowed, models.SearchParams(hnsw_ef=hnsw_ef)),
        limit=limit,
        with_payload=True if search.with_payload else [ITEM_ID],
        with_vector=vectors if search.with_vectors else None,
    )


def _parts(query: Query, limit: int, narrowed: models.Filter | None, params: models.SearchParams) -> dict[str, Any]:
    """What to search by: the dense vector alone, co-visitation alone, or both by the formula of the score.

    With both, the candidates are the best by each vector. Two prefetches would give wrong scores, for a point that
    one of them finds lacks the other's; so both are nested in both, and each side scores the union. The union has
    more candidates than are wanted, because neither order is that of the score.
    """
    if not query.indices or query.covisit_weight == 0:
        return {"query": query.dense, "using": DENSE, "params": params, "filter": narrowed}
    sparse = models.SparseVector(indices=query.indices, values=query.values)
    if not query.dense:
        alone = models.Prefetch(query=sparse, using=COVISIT, filter=narrowed, limit=limit)
        return {"prefetch": [alone], "query": models.FormulaQuery(formula=_covisitation(query, "$score[0]"))}
    num_dense, num_sparse = DENSE_PREFETCH * limit, max(SPARSE_PREFETCH, 4 * limit)
    best = [
        models.Prefetch(query=query.dense, filter=narrowed, limit=num_dense, using=DENSE, params=params),
        models.Prefetch(query=sparse, using=COVISIT, filter=narrowed, limit=num_sparse),
    ]
    union = num_dense + num_sparse
    return {
        "prefetch": [
            models.Prefetch(prefetch=best, query=query.dense, limit=union, using=DENSE, params=params),
            models.Prefetch(prefetch=best, query=sparse, using=COVISIT, limit=union),
        ],
        "query": models.FormulaQuery(
            formula=models.SumExpression(sum=["$score[0]", _covisitation(query, "$score[1]")]),
            defaults={"$score[0]": NO_SCORE, "$score[1]": 0.0},
        ),
    }


def _covisitation(query: Query, score: str) -> models.MultExpression:
    """weight · ln(1 + score)"""
    logarithm = models.LnExpression(ln=models.SumExpression(sum=[1.0, score]))
    return models.MultExpression(mult=[query.covisit_weight, logarithm])
