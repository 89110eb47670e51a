"""What the index is sent: the request as Qdrant's own models read it, and what a real endpoint makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from trainer.contract import COVISIT, DENSE, HNSW_EF
from trainer.covisit import SparseVectors
from trainer.index import Index, Points, _upsert_body, joined_vectors, longest_vector, new_client

pytestmark = pytest.mark.index


def some_points() -> Points:
    random = np.random.default_rng(0)
    return Points(
        item_hash=np.array([1, 2**63 + 5, 2**64 - 1], np.uint64),
        vectors=random.normal(size=(3, 4)).astype(np.float32),
        item_ids=["a", 'q"uote', "ü"],
        payloads=[
            b'{"title": "A\\u0000", "price": 1.5}',
            b'{"item_id": "not mine", "step": -1}',
            b'{"n": [1, {"m": null}]}',
        ],
        covisit=SparseVectors(
            indices=np.array([7, 2**32 - 1, 3], np.uint32),
            values=np.array([0.1, 1e-8, 3.0], np.float32),
            offsets=np.array([0, 2, 2, 3]),
        ),
    )  # fmt: skip


@pytest.fixture
def client(qdrant_url: str) -> Iterator[QdrantClient]:
    client = new_client(qdrant_url, None, 10)
    yield client
    client.close()


def test_the_request_is_what_the_clients_own_models_read_as_these_points() -> None:
    points = some_points()
    request = models.PointsBatch.model_validate_json(_upsert_body(points, 9), strict=True)
    assert request.batch.ids == points.item_hash.tolist()
    assert request.update_filter == models.Filter(must=[models.FieldCondition(key="step", range=models.Range(lt=9))])
    assert request.update_mode == models.UpdateMode.UPSERT
    known = models.PointsBatch.model_validate_json(_upsert_body(points, 9, only_known=True), strict=True)
    assert known.update_mode == models.UpdateMode.UPDATE_ONLY and known.batch == request.batch
    assert isinstance(request.batch.vectors, dict)
    dense, sparse = np.array(request.batch.vectors[DENSE], np.float32), request.batch.vectors[COVISIT]
    assert np.array_equal(dense, points.vectors)
    assert [vector.indices for vector in sparse] == [[7, 2**32 - 1], [], [3]]  # type: ignore[union-attr]
    assert [np.float32(vector.values).tolist() for vector in sparse] == [  # type: ignore[union-attr]
        np.float32(values).tolist() for values in ([0.1, 1e-8], [], [3.0])
    ]
    assert request.batch.payloads == [
        {"title": "A\0", "price": 1.5, "item_id": "a", "step": 9},
        {"item_id": 'q"uote', "step": 9},
        {"n": [1, {"m": None}], "item_id": "ü", "step": 9},
    ]


def test_integers_beyond_64_bits_are_passed_on_as_they_came() -> None:
    points = Points(
        np.ones(1, np.uint64), np.zeros((1, 1), np.float32), ["a"], [b'{"n": 123456789012345678901234567890}']
    )
    assert b'"n":123456789012345678901234567890,' in _upsert_body(points, 1)


def test_the_endpoint_holds_the_points_as_they_were_sent(client: QdrantClient, alias: str) -> None:
    points, index = some_points(), Index(client, alias)
    index.create(1, 4, hnsw=False, covisit=True)
    index.upsert(1, points, 9)
    found = client.retrieve(f"{alias}__v1", points.item_hash.tolist(), with_vectors=True)
    by_id = {record.id: record for record in found}
    for n, key in enumerate(points.item_hash.tolist()):
        record = by_id[key]
        assert isinstance(record.vector, dict) and isinstance(record.payload, dict)
        assert np.float32(record.vector[DENSE]).tolist() == points.vectors[n].tolist()
        assert record.payload["item_id"] == points.item_ids[n] and record.payload["step"] == 9
    sparse = by_id[1].vector[COVISIT]  # type: ignore[index,call-overload]
    assert dict(zip(sparse.indices, np.float32(sparse.values).tolist(), strict=True)) == {
        7: np.float32(0.1), 2**32 - 1: np.float32(1e-8),
    }  # fmt: skip


def test_joined_vectors_lack_no_length_but_those_that_are_longer_already() -> None:
    embedding = np.array([[0.6, 0.8], [1.0, 0.0]], np.float32)
    log_counts, landmark = np.array([[4.0], [-10.0]]), np.array([2.0])
    plain = joined_vectors(embedding, log_counts, landmark, 4.0)
    np.testing.assert_allclose(plain, [[0.6, 0.8, 0.5], [1.0, 0.0, -3.0]], rtol=1e-6)
    assert longest_vector(log_counts, landmark, 4.0) == pytest.approx(np.sqrt(10))
    assert longest_vector(log_counts[:0], landmark, 4.0) == 1.0
    even = joined_vectors(embedding, log_counts, landmark, 4.0, length=2.0)
    np.testing.assert_allclose(even, [[0.6, 0.8, 0.5, np.sqrt(2.75)], [1.0, 0.0, -3.0, 0.0]], rtol=1e-6)


# faiss' own bindings.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_a_graph_finds_the_best_items_because_all_are_equally_long() -> None:
    """With the parameters of the index's own graph; no engine that can be embedded here builds graphs, so by faiss."""
    faiss = pytest.importorskip("faiss")
    random, num_items, scale = np.random.default_rng(0), 5_000, 20.0
    tastes = random.normal(size=(50, 32))
    embedding = tastes[random.integers(50, size=num_items)] + 0.7 * random.normal(size=(num_items, 32))
    embedding = (embedding / np.linalg.norm(embedding, axis=1, keepdims=True)).astype(np.float32)
    log_counts = np.log(1 / np.arange(1.0, num_items + 1))[:, None] + random.normal(size=(num_items, 3))
    landmark = np.log([[20.0, 10.0, 5.0]])[0]
    towards = tastes[random.integers(50, size=30)] + 0.7 * random.normal(size=(30, 32))
    towards *= 8 / np.linalg.norm(towards, axis=1, keepdims=True)
    queries = np.hstack([towards, np.tile(0.33 * scale, (30, 3))]).astype(np.float32)
    plain = joined_vectors(embedding, log_counts, landmark, scale)
    even = joined_vectors(embedding, log_counts, landmark, scale, longest_vector(log_counts, landmark, scale))
    exact = np.argsort(-(queries @ plain.T), axis=1)[:, :100]

    def recall(vectors: np.ndarray) -> float:
        index = faiss.IndexHNSWFlat(vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, HNSW_EF
        index.add(vectors)
        asked = np.hstack([queries, np.zeros((30, vectors.shape[1] - queries.shape[1]), np.float32)])
        found = index.search(asked, 100)[1]
        return float(np.mean([len(np.intersect1d(f, e)) / 100 for f, e in zip(found, exact, strict=True)]))

    assert recall(plain) < 0.8
    assert recall(even) > 0.98
