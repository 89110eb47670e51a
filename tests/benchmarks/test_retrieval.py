"""What the index is held against: whole scores by numpy and faiss, against the definition, item by item."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.retrieval import CLUSTER, HISTORY, cluster_items, history_of
from benchmarks.whole_score import Exact, faiss_searchers, recall_of, top
from retriever.encode import Query
from trainer.covisit import SparseVectors

N, DIM = 500, 12


@pytest.fixture(scope="module")
def sparse() -> SparseVectors:
    random = np.random.default_rng(3)
    lengths = random.integers(0, 6, N)
    indices = np.concatenate([random.choice(40, length, replace=False) for length in lengths]).astype(np.uint32)
    values = random.random(len(indices)).astype(np.float32) * 9
    return SparseVectors(indices, values, np.concatenate(([0], np.cumsum(lengths))))


@pytest.fixture(scope="module")
def exact(sparse: SparseVectors) -> Exact:
    return Exact(np.random.default_rng(5).normal(size=(N, DIM)).astype(np.float32), sparse)


def queries() -> list[Query]:
    random = np.random.default_rng(4)
    return [
        Query(
            dense=random.normal(size=DIM).tolist(),
            indices=[int(index) for index in random.choice(60, 5, replace=False)],
            values=random.random(5).tolist(),
            covisit_weight=0.7,
        )
        for _ in range(10)
    ]


def test_exact_scores_are_those_of_the_definition(exact: Exact, sparse: SparseVectors) -> None:
    for query in queries():
        weights = dict(zip(query.indices, query.values, strict=True))
        expected = []
        for row in range(N):
            part = slice(sparse.offsets[row], sparse.offsets[row + 1])
            common = sum(
                weights.get(int(index), 0.0) * value
                for index, value in zip(sparse.indices[part], sparse.values[part], strict=True)
            )
            expected.append(float(exact.dense[row] @ np.array(query.dense)) + 0.7 * np.log1p(common))
        np.testing.assert_allclose(exact.scores(query), expected, rtol=1e-4, atol=1e-4)
        assert exact.best(query, 7).tolist() == np.argsort(expected)[::-1][:7].tolist()


def test_recall_counts_what_is_as_good_and_nothing_twice() -> None:
    scores = np.array([5, 4, 3, 3, 1], np.float32)
    assert recall_of(np.array([0, 1, 2]), scores, 3) == 1
    assert recall_of(np.array([0, 1, 3]), scores, 3) == 1
    assert recall_of(np.array([0, 0, 4]), scores, 3) == pytest.approx(1 / 3)
    assert recall_of(np.arange(5), scores, 10) == 1
    assert top(scores, 2).tolist() == [0, 1]


def test_faiss_finds_the_exact_best_where_it_looks_at_all(exact: Exact) -> None:
    pytest.importorskip("faiss")
    for name, build in faiss_searchers(exact):
        best = build()
        recalls = [recall_of(best(query, 20), exact.scores(query), 20) for query in queries()]
        assert np.mean(recalls) > 0.9, name


def test_sessions_are_of_distinct_items_of_one_cluster() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        items = cluster_items(random, 1_000, 10)
        assert len(set(items.tolist())) == 10 and len(set((items // CLUSTER).tolist())) == 1
        assert len(history_of(random, 1_000)) == HISTORY
