"""The whole score over arrays: exactly by numpy, and with faiss for its dense part. What the index is held against.

Shapes: n items, D + H dimensions of the dense vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from retriever.encode import Query
from retriever.fusion import DENSE_PREFETCH, SPARSE_PREFETCH
from trainer.covisit import SparseVectors

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Best = Callable[[Query, int], Int64Array]
TIE = 1e-4
"""Difference of scores below which two items are as good as each other: the index computes in 32 bits."""
HNSW_LINKS = 32
HNSW_EF = 512
PROBES = 32


class Exact:
    """Every item's score of a query, in numpy."""

    def __init__(self, dense: Float32Array, sparse: SparseVectors) -> None:
        """
        Args:
            dense: [n, D + H]
            sparse: n co-visitation vectors.
        """
        self.dense = np.ascontiguousarray(dense)
        order = np.argsort(sparse.indices, kind="stable")
        self._index, starts = np.unique(sparse.indices[order], return_index=True)
        self._starts = np.append(starts, len(order))
        self._row = np.repeat(np.arange(len(dense)), np.diff(sparse.offsets))[order]
        self._value = sparse.values[order]

    def covisits(self, query: Query) -> Float32Array:
        """[n] co-visitation with the query's items."""
        total = np.zeros(len(self.dense), np.float32)
        for index, weight in zip(query.indices, query.values, strict=True):
            place = np.searchsorted(self._index, index)
            if place < len(self._index) and self._index[place] == index:
                part = slice(self._starts[place], self._starts[place + 1])
                total[self._row[part]] += np.float32(weight) * self._value[part]  # an item is there once
        return total

    def scores(self, query: Query) -> Float32Array:
        """[n] whole scores."""
        dense: Float32Array = self.dense @ np.array(query.dense, np.float32)
        return dense + np.float32(query.covisit_weight) * np.log1p(self.covisits(query))

    def best(self, query: Query, k: int) -> Int64Array:
        """The k best items, best first."""
        return top(self.scores(query), k)


def top(scores: Float32Array, k: int) -> Int64Array:
    """Places of the k largest, largest first."""
    if k >= len(scores):
        return np.argsort(-scores)
    part = np.argpartition(scores, len(scores) - k)[len(scores) - k :]
    return part[np.argsort(-scores[part])]


def recall_of(found: Int64Array, scores: Float32Array, k: int) -> float:
    """Share of the k best that were found; others count that are as good as the last of them."""
    worst = np.sort(scores)[-k] if k < len(scores) else scores.min()
    as_good = np.count_nonzero(scores[np.unique(found)] >= worst - TIE * max(1.0, abs(worst)))
    return float(min(1.0, as_good / min(k, len(scores))))


def faiss_searchers(exact: Exact) -> Iterator[tuple[str, Callable[[], Best]]]:
    """Name and builder of each way of searching with faiss; none where it is not installed."""
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(1)
    # One more dimension makes all of the same length, and so the nearest ones those of the largest product (Bachrach et
    # al., RecSys 2014): by inner product alone, graphs and lists find few of the best items of unequal lengths.
    squares = (exact.dense**2).sum(1, keepdims=True)
    vectors = np.hstack([exact.dense, np.sqrt(squares.max() - squares)]).astype(np.float32)
    size = exact.dense.shape[1]

    def hnsw() -> Best:
        index = faiss.IndexHNSWFlat(size + 1, HNSW_LINKS)
        index.hnsw.efConstruction = 100
        index.hnsw.efSearch = HNSW_EF
        index.add(vectors)
        return _with_covisits(exact, index)

    def ivf() -> Best:
        num_lists = round(len(vectors) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(size + 1), size + 1, num_lists)
        index.train(vectors[:: max(1, len(vectors) // (64 * num_lists))])
        index.add(vectors)
        index.nprobe = PROBES
        return _with_covisits(exact, index)

    yield "faiss_hnsw", hnsw
    yield "faiss_ivf", ivf


def _with_covisits(exact: Exact, index: Any) -> Best:
    """As the query to Qdrant: the best by each vector, and the whole score of the union."""

    def best(query: Query, k: int) -> Int64Array:
        vector = np.array(query.dense, np.float32)
        _, found = index.search(np.append(vector, np.float32(0))[None], DENSE_PREFETCH * k)
        covisits = exact.covisits(query)
        shared = np.flatnonzero(covisits)
        union = np.union1d(found[0][found[0] >= 0], shared[top(covisits[shared], SPARSE_PREFETCH)])
        scores = exact.dense[union] @ vector + np.float32(query.covisit_weight) * np.log1p(covisits[union])
        return union[top(scores, k)]

    return best
