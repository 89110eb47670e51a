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
Body = dict[str, Any]
"""JSON of Qdrant's REST interface: `models.QueryRequest`, or a part of it. Plain, because building the client's models
takes longer than to write them."""

MAX_OVERFETCH = 2_000
"""Up to so many seen items are searched for and dropped; more are excluded by Qdrant, which costs it more."""
DENSE_PREFETCH = 2
"""Candidates from the dense vector for each one that is wanted, where both are searched."""
SPARSE_PREFETCH = 5_000
"""Least items that the sparse vector gives, where both are searched; four for each one that is wanted, if that is more.
All other items count as sharing nothing with the history, and few histories have so many that do."""
NO_SCORE = -1e6
"""Of a point that the rescoring by the dense vector lost: none, unless its approximation does."""


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


def ready_request(search: Search, hnsw_ef: int) -> Body:
    """Qdrant's request for exactly the k items: seen ones are left out by Qdrant."""
    return _request(search, search.k, search.excluded, hnsw_ef)


def overfetching_request(search: Search, hnsw_ef: int) -> Body:
    """Qdrant's request for the k items and those of the seen ones that are among them; cheaper than leaving them out.

    Beyond MAX_OVERFETCH seen items it is `ready_request`.
    """
    excluded = search.excluded
    if len(excluded) > MAX_OVERFETCH:
        return ready_request(search, hnsw_ef)
    return _request(search, search.k + len(excluded), frozenset(), hnsw_ef)


def _request(search: Search, limit: int, without: frozenset[int], hnsw_ef: int) -> Body:
    query = search.query
    request = _parts(query, limit, _filter(search.filter, without), {"hnsw_ef": hnsw_ef})
    request |= {"limit": limit, "with_payload": True if search.with_payload else [ITEM_ID]}
    if search.with_vectors:
        request["with_vector"] = [*([DENSE] if query.dense else []), *([COVISIT] if query.indices else [])]
    return request


def _filter(wanted: models.Filter | None, without: frozenset[int]) -> Body:
    """`filter` as a part of a search; nothing where all items will do."""
    own = None if wanted is None else wanted.model_dump(mode="json", by_alias=True, exclude_none=True)
    if not without:
        return {} if own is None else {"filter": own}
    others = {"must_not": [{"has_id": sorted(without)}]}
    return {"filter": others if own is None else {"must": [own]} | others}


def _parts(query: Query, limit: int, narrowed: Body, params: Body) -> Body:
    """What to search by: the dense vector alone, co-visitation alone, or both by the formula of the score.

    With both, the candidates are the best by each vector: any other item has no co-visitation and scores below the best
    by the dense vector, so that for a weight of 0 or more an exact search gives the exact answer. The formula adds the
    scores of two prefetches, and a point that one of them does not find lacks that score. So the first one scores all
    candidates by the dense vector. The second one may be the sparse search itself: whom it does not find has no
    co-visitation.
    """
    if not query.indices or query.covisit_weight == 0:
        return {"query": query.dense, "using": DENSE, "params": params} | narrowed
    sparse = {"query": {"indices": query.indices, "values": query.values}, "using": COVISIT} | narrowed
    if not query.dense:
        return {"prefetch": [sparse | {"limit": limit}], "query": {"formula": _covisitation(query, "$score[0]")}}
    num_dense, num_sparse = DENSE_PREFETCH * limit, max(SPARSE_PREFETCH, 4 * limit)
    dense = {"query": query.dense, "using": DENSE, "params": params}
    by_covisit = sparse | {"limit": num_sparse}
    candidates = [dense | narrowed | {"limit": num_dense}, by_covisit]
    return {
        "prefetch": [dense | {"prefetch": candidates, "limit": num_dense + num_sparse}, by_covisit],
        "query": {
            "formula": {"sum": ["$score[0]", _covisitation(query, "$score[1]")]},
            "defaults": {"$score[0]": NO_SCORE, "$score[1]": 0.0},
        },
    }


def _covisitation(query: Query, score: str) -> Body:
    """weight · ln(1 + score)"""
    return {"mult": [query.covisit_weight, {"ln": {"sum": [1.0, score]}}]}
