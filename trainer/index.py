"""Qdrant, as publishing needs it: collections of model versions, points in and out, the alias.

Station: between `publish` and Qdrant. It decides nothing about when and what; it knows no towers. Every call is
repeated a bounded number of times, with a growing pause, when what failed may pass.

Writers that come late (a call that timed out here and is carried out there afterwards) are fenced by the payload's
`step`: an upsert changes only points of a smaller step, a delete takes only points up to its own. An upsert of points
that are known to be there makes none, so that it cannot bring back what was deleted meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import msgspec
import numpy as np
import orjson
import structlog
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from streams.contract import CANARY_HASH, CANARY_ID, Float32Array, Float64Array, UInt64Array
from trainer.aliases import Named, named_by, switch, versions_in
from trainer.contract import COVISIT, DENSE, EVENT_TIME, HNSW_EF, ITEM_ID, STEP, collection_name
from trainer.covisit import SparseVectors

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
"""That is kept where Qdrant asks for a longer one (Retry-After)."""
DELETE_POINTS = 10_000
"""Points named by one delete."""

ResultT = TypeVar("ResultT")
log = structlog.get_logger()


class IndexAwayError(Exception):
    """Qdrant did not answer, or not as it should, in all attempts: publish again later."""


class CollectionGoneError(Exception):
    """The collection or the alias that should be there is not: a new version has to be published."""


class CanaryError(IndexAwayError):
    """A version was filled, and searches in it find too little of what it holds."""

    def __init__(self, version: int, recall: float, least: float) -> None:
        super().__init__(f"version {version} finds {recall:.4f} of the exact best items, and should find {least:g}")
        self.recall = recall


class PinnedError(Exception):
    """An operator holds a version live, and nothing else may be published."""

    def __init__(self, named: Named) -> None:
        super().__init__(f"version {named.pinned} is pinned")
        self.named = named


class PublishStoppedError(Exception):
    """The process is about to end."""


@dataclass(frozen=True)
class Points:
    """n items as the index takes them."""

    item_hash: UInt64Array
    """[n] point ids, distinct."""
    vectors: Float32Array
    """[n, D + H] or [n, D + H + 1]: see `joined_vectors`."""
    item_ids: list[str]
    payloads: list[bytes]
    """JSON objects."""
    covisit: SparseVectors | None = None
    """n sparse vectors; None where the version has none."""

    def __len__(self) -> int:
        return len(self.item_hash)

    def part(self, part: slice) -> Points:
        """Some of these points; `part` has both ends and no step."""
        covisit = self.covisit and self.covisit.part(part)
        return Points(self.item_hash[part], self.vectors[part], self.item_ids[part], self.payloads[part], covisit)

    def batches(self, size: int) -> Iterator[Points]:
        """These points, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


class Index:
    """One alias and the collections of its versions."""

    def __init__(
        self,
        client: QdrantClient,
        alias: str,
        *,
        attempts: int = 4,
        payload_indexes: Mapping[str, str] | None = None,
        on_retry: Callable[[], None] = lambda: None,
        stopping: threading.Event | None = None,
    ) -> None:
        """
        Args:
            client: made with the header accept-encoding: identity, without which every answer waits 40 ms.
            alias: names the live collection.
            attempts: for each call, ≥ 1.
            payload_indexes: payload field → kind of index, for the callers' filters.
            on_retry: called before each repeated attempt.
            stopping: once set, calls raise `PublishStoppedError`.
        """
        self._client = client
        self.alias = alias
        self._attempts = attempts
        self._payload_indexes: dict[str, models.PayloadSchemaType | models.IntegerIndexParams] = {
            **{field: models.PayloadSchemaType(kind) for field, kind in (payload_indexes or {}).items()},
            ITEM_ID: models.PayloadSchemaType.KEYWORD,
            # Changes with every write of a point, and nobody asks for one value of it.
            STEP: models.IntegerIndexParams(type=models.IntegerIndexType.INTEGER, lookup=False, range=True),
        }
        self._on_retry = on_retry
        self._stopping = stopping or threading.Event()

    def named(self) -> Named:
        """Which version is live, and which one an operator holds live."""
        return self._call(lambda: named_by(self._client, self.alias))

    def versions(self) -> list[int]:
        """Versions that have a collection, whole or not, rising."""
        return self._call(lambda: versions_in(self._client, self.alias))

    def create(self, version: int, size: int, *, hnsw: bool, covisit: bool = False) -> None:
        """Makes a version's collection with its payload indexes.

        Args:
            version: its number.
            size: of the dense vectors.
            hnsw: with a graph; else searches are exact.
            covisit: with sparse vectors.
        """
        name = collection_name(self.alias, version)
        # m=0: no graph. Searches are exact, fast enough up to some 100,000 points, and points are indexed at once.
        graph = models.HnswConfigDiff(m=16, ef_construct=100) if hnsw else models.HnswConfigDiff(m=0)
        vectors = {DENSE: models.VectorParams(size=size, distance=models.Distance.DOT)}
        sparse = {COVISIT: models.SparseVectorParams()} if covisit else None
        attempts = 0

        def create() -> None:
            nonlocal attempts
            attempts += 1
            try:
                self._client.create_collection(
                    name, vectors_config=vectors, sparse_vectors_config=sparse, hnsw_config=graph
                )
            except UnexpectedResponse as error:
                # An earlier attempt was carried out, and only its answer did not come.
                if not (attempts > 1 and error.status_code in (400, 409) and b"already exists" in error.content):
                    raise

        self._call(create)
        for field, schema in self._payload_indexes.items():
            self._call(lambda f=field, s=schema: self._client.create_payload_index(name, f, s))  # type: ignore[misc]

    def upsert(self, version: int, points: Points, step: int, *, only_known: bool = False) -> None:
        """Writes a batch of points at this step, where there is none or one of a smaller step; returns when applied.

        `only_known`: only where there is one, so that a write that is carried out late brings no deleted item back.

        It waits for each batch, because what goes wrong after an answer that did not wait is told to nobody.
        """
        body = _upsert_body(points, step, only_known)
        name = collection_name(self.alias, version)
        # The client passes bytes on as they are; its own models would take ten times as long to build and write.
        upsert: Callable[..., Any] = self._client.http.points_api.upsert_points
        self._call(lambda: upsert(collection_name=name, wait=True, point_insert_operations=body))

    def tell_canary(self, version: int, event_time: float, step: int) -> None:
        """Writes the canary's point: it has no vectors, so that no search by vectors ever finds it."""
        payload = {ITEM_ID: CANARY_ID, STEP: step, EVENT_TIME: event_time}
        point = models.PointStruct(id=CANARY_HASH, vector={}, payload=payload)
        # By step and not by the canary's own time: one that is ahead of the clock would keep out all after it.
        older = models.Filter(must=[models.FieldCondition(key=STEP, range=models.Range(lt=step))])
        name = collection_name(self.alias, version)
        self._call(lambda: self._client.upsert(name, [point], wait=True, update_filter=older))

    def delete(self, version: int, item_hash: UInt64Array, step: int | None) -> None:
        """Deletes those of the points that are of this step or before; None: whatever their step."""
        name = collection_name(self.alias, version)
        for start in range(0, len(item_hash), DELETE_POINTS):
            ids = item_hash[start : start + DELETE_POINTS].tolist()
            must: list[models.Condition] = [models.HasIdCondition(has_id=ids)]
            if step is not None:
                must.append(models.FieldCondition(key=STEP, range=models.Range(lte=step)))
            selector = models.FilterSelector(filter=models.Filter(must=must))
            self._call(lambda s=selector: self._client.delete(name, s, wait=True))  # type: ignore[misc]

    def wait_until_green(self, version: int, seconds: float) -> None:
        """Waits until Qdrant has indexed all points of a version.

        Raises:
            IndexAwayError: it has not within `seconds`.
        """
        deadline, pause = time.monotonic() + seconds, 0.02
        while True:
            status = self._call(lambda: self._client.get_collection(collection_name(self.alias, version))).status
            if status == models.CollectionStatus.GREEN:
                return
            if time.monotonic() > deadline:
                raise IndexAwayError(f"version {version} is {status} and not green after {seconds:g} s")
            self._pause(pause)
            pause = min(2 * pause, 0.5)

    def count(self, version: int) -> int:
        """Exact number of points of a version."""
        name = collection_name(self.alias, version)
        return int(self._call(lambda: self._client.count(name, exact=True)).count)

    def best(self, version: int, queries: Float32Array, limit: int, *, exact: bool) -> list[list[tuple[int, float]]]:
        """Point ids and scores of the best by `dense` for each of [n, D + H] queries, best first.

        Args:
            version: whose collection is searched.
            queries: a few; all go into one call.
            limit: most hits of each.
            exact: past every approximation, or as the retriever searches.
        """
        params = models.SearchParams(exact=True) if exact else models.SearchParams(hnsw_ef=HNSW_EF)
        requests = [
            models.QueryRequest(query=query, using=DENSE, limit=limit, params=params) for query in queries.tolist()
        ]
        name = collection_name(self.alias, version)
        answers = self._call(lambda: self._client.query_batch_points(name, requests))
        return [[(int(point.id), point.score) for point in answer.points] for answer in answers]

    def vectors(self, version: int, item_hash: UInt64Array) -> dict[int, Float32Array]:
        """Point id → `dense` [D + H] of those of these points that a version has."""
        name, ids = collection_name(self.alias, version), item_hash.tolist()
        records = self._call(lambda: self._client.retrieve(name, ids, with_payload=False, with_vectors=[DENSE]))
        return {
            int(record.id): np.array(record.vector[DENSE], np.float32)
            for record in records
            if isinstance(record.vector, dict) and DENSE in record.vector
        }

    def switch(self, version: int) -> None:
        """Makes the alias name this version, unless an operator holds another one.

        Raises:
            PinnedError: one is held; it is, or is again, the live one.
        """
        self._raise_if_pinned(version)
        self._call(lambda: switch(self._client, self.alias, version))
        # Looked at once more: whoever pins a version names it by both aliases, and may have done so in between.
        try:
            self._raise_if_pinned(version)
        except PinnedError as error:
            pinned = error.named.pinned
            assert pinned is not None
            self._call(lambda: switch(self._client, self.alias, pinned))
            raise

    def _raise_if_pinned(self, version: int) -> None:
        if (named := self.named()).pinned not in (None, version):
            raise PinnedError(named)

    def drop(self, version: int) -> None:
        """Removes a version's collection; harmless where there is none."""
        self._call(lambda: self._client.delete_collection(collection_name(self.alias, version)))

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise PublishStoppedError

    def _call(self, call: Callable[[], ResultT]) -> ResultT:
        for attempt in range(1, self._attempts + 1):
            if self._stopping.is_set():
                raise PublishStoppedError
            try:
                return call()
            except (ResponseHandlingException, UnexpectedResponse, ResourceExhaustedResponse) as error:
                code = getattr(error, "status_code", None)
                if code == 404:
                    raise CollectionGoneError(str(error)) from error
                passing = code is None or code >= 500 or code in (408, 429)
                if not passing or attempt == self._attempts:
                    raise IndexAwayError(f"attempt {attempt} of {self._attempts}: {error}") from error
                self._on_retry()
                asked = min(getattr(error, "retry_after_s", 0), LONGEST_PAUSE_SECONDS)
                self._pause(max(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), asked))
        raise AssertionError("unreachable")


def _upsert_body(points: Points, step: int, only_known: bool = False) -> bytes:
    """The request's JSON. Numbers are written from the arrays themselves, float32 in their shortest form."""
    vectors: dict[str, Any] = {DENSE: np.ascontiguousarray(points.vectors)}
    if (sparse := points.covisit) is not None:
        vectors[COVISIT] = [
            {"indices": sparse.indices[start:stop], "values": sparse.values[start:stop]}
            for start, stop in pairwise(sparse.offsets.tolist())
        ]
    payloads = [
        orjson.Fragment(msgspec.json.encode({**msgspec.json.decode(payload), ITEM_ID: item_id, STEP: step}))
        for item_id, payload in zip(points.item_ids, points.payloads, strict=True)
    ]
    body = {
        "batch": {"ids": points.item_hash, "vectors": vectors, "payloads": payloads},
        "update_filter": {"must": [{"key": STEP, "range": {"lt": step}}]},
        "update_mode": "update_only" if only_known else "upsert",
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def new_client(url: str, api_key: str | None, timeout_seconds: int) -> QdrantClient:
    """A client of Qdrant's REST interface. It asks for uncompressed answers: compressed ones cost 44 ms each."""
    return QdrantClient(url=url, api_key=api_key, timeout=timeout_seconds, headers={"accept-encoding": "identity"})


def joined_vectors(
    embedding: Float32Array, log_counts: Float64Array, landmark: Float64Array, scale: float, length: float = 0.0
) -> Float32Array:
    """What the index holds of n items x: float32 [n, D + H] = [embedding ‖ (log counts − landmark) / scale] or, with a
    length, [n, D + H + 1]: [x ‖ √(length² − |x|²)].

    Args:
        embedding: float32 [n, D].
        log_counts: float64 [n, H] of `Catalogue.log_counts`.
        landmark: float64 [H] that the version's log counts are relative to.
        scale: > 0.
        length: of all vectors, but for those that are longer already; 0: as they are.
    """
    vectors = np.concatenate([embedding, ((log_counts - landmark) / scale).astype(np.float32)], axis=1)
    if not length:
        return vectors
    lacking = np.sqrt(np.maximum(length**2 - (vectors**2).sum(axis=1, keepdims=True), 0.0))
    return np.concatenate([vectors, lacking.astype(np.float32)], axis=1)


def longest_vector(log_counts: Float64Array, landmark: Float64Array, scale: float) -> float:
    """Length of the longest of the vectors that `joined_vectors` makes of these, embeddings being of length 1."""
    squares = ((log_counts - landmark) ** 2).sum(axis=1) / scale**2
    return float(np.sqrt(1.0 + squares.max(initial=0.0)))
