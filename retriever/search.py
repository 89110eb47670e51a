"""Qdrant, as the retriever uses it: from a query to candidates, with bounded retries and its errors named.

Station: between `encode` and the answer. It searches the physical collection that it is told, never an alias, so that
the items are of the version whose tower made the query.

    SearchError
    ├── CollectionGone     the collection was removed: look the alias up again
    ├── QueryRefused       Qdrant understands the query and refuses it
    │   └── FilterRefused  … because of the caller's filter
    └── IndexUnavailable   Qdrant does not answer, or not in time
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from retriever.contract import Candidate
from retriever.encode import Query
from retriever.metrics import Metrics
from trainer.contract import COVISIT, DENSE, ITEM_ID, STEP

UInt64Array = npt.NDArray[np.uint64]
AnswerT = TypeVar("AnswerT")

MAX_OVERFETCH = 2_000
"""Up to so many seen items are searched for and dropped; more are excluded by Qdrant, which costs it more."""
MIN_PREFETCH = 500
"""Least candidates from each vector, where both are searched."""
NO_SCORE = -1e6
"""Of a point that the outer dense search lost: none, unless its approximation does."""
_FIRST_PAUSE_SECONDS = 0.05


class SearchError(Exception):
    """Qdrant gave no answer that can be used."""


class CollectionGone(SearchError):
    """The collection does not exist (any more)."""


class QueryRefused(SearchError):
    """Qdrant understood the request and refuses it; the message is Qdrant's own."""


class FilterRefused(QueryRefused):
    """Qdrant refuses a query that has a filter of the caller's."""


class IndexUnavailable(SearchError):
    """Qdrant did not answer within the deadline, or lets nobody in."""


def make_client(url: str, api_key: str | None, timeout_seconds: float) -> AsyncQdrantClient:
    """A client that keeps connections and asks for plain answers: compressed ones cost 44 ms each."""
    return AsyncQdrantClient(
        url=url,
        api_key=api_key,
        timeout=max(1, round(timeout_seconds)),
        headers={"accept-encoding": "identity"},
        limits=httpx.Limits(max_connections=64, max_keepalive_connections=64, keepalive_expiry=30.0),
    )


class Index:
    """The calls to Qdrant. Every one ends within `timeout_seconds`, retries included."""

    def __init__(self, client: AsyncQdrantClient, metrics: Metrics, *, hnsw_ef: int, timeout_seconds: float) -> None:
        self._client = client
        self._metrics = metrics
        self._params = models.SearchParams(hnsw_ef=hnsw_ef)
        self._timeout_seconds = timeout_seconds

    async def collection_of(self, alias: str) -> str | None:
        """The collection that the alias points at, or None where there is no such alias."""
        answer = await self._call(self._client.get_aliases)
        return next((entry.collection_name for entry in answer.aliases if entry.alias_name == alias), None)

    async def vector_size(self, collection: str) -> int | None:
        """Dimensions of the collection's vector `dense`, or None where it has none."""
        answer = await self._call(lambda: self._client.get_collection(collection))
        vectors = answer.config.params.vectors
        return vectors[DENSE].size if isinstance(vectors, dict) and DENSE in vectors else None

    async def search(
        self,
        collection: str,
        query: Query,
        *,
        k: int,
        seen: UInt64Array,
        filter: models.Filter | None,
        with_payload: bool,
    ) -> list[Candidate]:
        """The k items of the highest score that pass the filter and are not `seen`, best first.

        Args:
            collection: physical collection.
            query: of the version whose items are in the collection.
            k: how many, ≥ 1.
            seen: uint64 [s] hashes of items to leave out.
            filter: Qdrant's filter on the payload.
            with_payload: whether to fetch the whole payload.

        Raises:
            SearchError: see the module's tree.
        """
        excluded = set(seen.tolist())
        narrowed, limit = filter, k + len(excluded)
        if len(excluded) > MAX_OVERFETCH:
            ids: list[models.ExtendedPointId] = list(excluded)
            narrowed = models.Filter(must=filter and [filter], must_not=[models.HasIdCondition(has_id=ids)])
            limit = k
        try:
            answer = await self._call(
                lambda: self._client.query_points(
                    collection,
                    **self._parts(query, limit, narrowed),
                    limit=limit,
                    with_payload=True if with_payload else [ITEM_ID],
                )
            )
        except QueryRefused as error:
            if filter is None:
                raise
            raise FilterRefused(str(error)) from error
        candidates: list[Candidate] = []
        for point in answer.points:
            if point.id in excluded:
                continue
            if len(candidates) == k:
                break
            payload = point.payload or {}
            if not isinstance(item_id := payload.get(ITEM_ID), str):
                self._metrics.foreign_points.inc()
                continue
            shown = {key: value for key, value in payload.items() if key not in (ITEM_ID, STEP)}
            candidates.append(
                Candidate.model_construct(item_id=item_id, score=point.score, payload=shown if with_payload else None)
            )
        return candidates

    def _parts(self, query: Query, limit: int, narrowed: models.Filter | None) -> dict[str, Any]:
        """What to search by: the dense vector alone, or both vectors by the formula of the score.

        With both, the candidates are the best by each vector. Two prefetches would give wrong scores, for a point that
        one of them finds lacks the other's; so both are nested in both, and each side scores the union. The union has
        more candidates than are wanted, because neither order is that of the score.
        """
        if not query.indices or query.covisit_weight == 0:
            return {"query": query.dense, "using": DENSE, "search_params": self._params, "query_filter": narrowed}
        sparse = models.SparseVector(indices=query.indices, values=query.values)
        each = max(MIN_PREFETCH, 2 * limit)
        best = [
            models.Prefetch(query=query.dense, filter=narrowed, limit=each, using=DENSE, params=self._params),
            models.Prefetch(query=sparse, using=COVISIT, filter=narrowed, limit=each),
        ]
        logarithm = models.LnExpression(ln=models.SumExpression(sum=[1.0, "$score[1]"]))
        weighed = models.MultExpression(mult=[query.covisit_weight, logarithm])
        return {
            "prefetch": [
                models.Prefetch(prefetch=best, query=query.dense, limit=2 * each, using=DENSE, params=self._params),
                models.Prefetch(prefetch=best, query=sparse, using=COVISIT, limit=2 * each),
            ],
            "query": models.FormulaQuery(
                formula=models.SumExpression(sum=["$score[0]", weighed]),
                defaults={"$score[0]": NO_SCORE, "$score[1]": 0.0},
            ),
        }

    async def item_ids(self, collection: str, hashes: UInt64Array) -> list[str | None]:
        """The caller's item id of each hash, None where the collection does not hold the item.

        Raises:
            SearchError: see the module's tree.
        """
        ids: Sequence[models.ExtendedPointId] = hashes.tolist()
        if not ids:
            return []
        points = await self._call(
            lambda: self._client.retrieve(collection, ids=list(dict.fromkeys(ids)), with_payload=[ITEM_ID])
        )
        found = {point.id: (point.payload or {}).get(ITEM_ID) for point in points}
        return [found.get(point_id) for point_id in ids]

    async def _call(self, call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
        """The call's answer, tried again while time is left and the error may pass."""
        pause = _FIRST_PAUSE_SECONDS
        reason = "no answer"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    try:
                        return await call()
                    except ResponseHandlingException as error:
                        if isinstance(error.source, ValidationError):
                            raise IndexUnavailable("what answers is not Qdrant, or of another version") from error
                        reason = f"{type(error.source).__name__}: {error.source}".rstrip(": ")
                    except (UnexpectedResponse, ResourceExhaustedResponse) as error:
                        reason = _raise_unless_it_may_pass(error)
                    except ValueError as error:
                        raise IndexUnavailable("what answers is not Qdrant: its answer is not JSON") from error
                    self._metrics.qdrant_retries.inc()
                    await asyncio.sleep(pause)
                    pause *= 2
        except TimeoutError:
            raise IndexUnavailable(f"Qdrant did not answer within {self._timeout_seconds:g} s ({reason})") from None


def _raise_unless_it_may_pass(error: UnexpectedResponse | ResourceExhaustedResponse) -> str:
    if isinstance(error, ResourceExhaustedResponse):
        return f"429: {error}"
    message = _message(error)
    if error.status_code == 404:
        raise CollectionGone(message) from error
    if error.status_code in (401, 403):
        raise IndexUnavailable(f"Qdrant refuses this service's key ({error.status_code}: {message})") from error
    if error.status_code is not None and 400 <= error.status_code < 500 and error.status_code not in (408, 429):
        raise QueryRefused(message) from error
    return f"{error.status_code}: {message}"


def _message(error: UnexpectedResponse) -> str:
    try:
        return str(error.structured()["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return error.content.decode(errors="replace")[:200]
