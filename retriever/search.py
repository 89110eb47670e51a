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
from typing import TypeVar, cast

import httpx
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from retriever.fusion import Body, Search, overfetching_request, ready_request
from retriever.metrics import Metrics
from retriever.transport import KEPT_SECONDS, MAX_CONNECTIONS, Point, Transport
from trainer.contract import COVISIT, DENSE, ITEM_ID, STEP

UInt64Array = npt.NDArray[np.uint64]
AnswerT = TypeVar("AnswerT")

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


class Index:
    """The calls to Qdrant. Every one ends within `timeout_seconds`, retries included."""

    def __init__(
        self, url: str, api_key: str | None, metrics: Metrics, *, hnsw_ef: int, timeout_seconds: float
    ) -> None:
        """
        Args:
            url: of Qdrant's REST interface.
            api_key: sent with every request; None: nothing.
            metrics: see there.
            hnsw_ef: candidates that an HNSW search looks at.
            timeout_seconds: see above, > 0.
        """
        self._client = AsyncQdrantClient(
            url=url,
            api_key=api_key,
            timeout=max(1, round(timeout_seconds)),
            headers={"accept-encoding": "identity"},  # compressed answers cost 44 ms more each
            check_compatibility=False,  # the trainer's client does
            limits=httpx.Limits(
                max_connections=MAX_CONNECTIONS,
                max_keepalive_connections=MAX_CONNECTIONS,
                keepalive_expiry=KEPT_SECONDS,
            ),
        )
        self._transport = Transport(self._client.http.client.host, api_key)
        self._metrics = metrics
        self._hnsw_ef = hnsw_ef
        self._timeout_seconds = timeout_seconds

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.close()
        await self._transport.close()

    async def collection_of(self, alias: str) -> str | None:
        """The collection that the alias points at, or None where there is no such alias."""
        return (await self._call(self._transport.aliases)).get(alias)

    async def vector_size(self, collection: str) -> int | None:
        """Dimensions of the collection's vector `dense`, or None where it has none."""
        answer = await self._call(lambda: self._client.get_collection(collection))
        vectors = answer.config.params.vectors
        return vectors[DENSE].size if isinstance(vectors, dict) and DENSE in vectors else None

    async def search(self, collection: str, searches: Sequence[Search]) -> list[list[Point]]:
        """For each search its items of the highest score, best first; all in one call.

        Args:
            collection: physical collection, of the version whose tower made the queries.
            searches: at least one.

        Raises:
            SearchError: see the module's tree.
        """
        requests = [overfetching_request(search, self._hnsw_ef) for search in searches]
        try:
            answers = await self._call(lambda: self._transport.search(collection, requests))
        except QueryRefused as error:
            if all(search.filter is None for search in searches):
                raise
            raise FilterRefused(str(error)) from error
        return [self._kept(points, search) for points, search in zip(answers, searches, strict=True)]

    def ready_request(self, search: Search) -> Body:
        """What `search` would send for a caller who sends it themselves; seen items are left out by Qdrant."""
        return ready_request(search, self._hnsw_ef)

    def _kept(self, points: Sequence[Point], search: Search) -> list[Point]:
        """Without seen ones, k at most, and of those the ones that are items of ours."""
        excluded = search.excluded
        kept: list[Point] = []
        for point in points:
            if len(kept) == search.k:
                break
            if point.id in excluded:
                continue
            if isinstance((point.payload or {}).get(ITEM_ID), str):
                kept.append(point)
            else:
                self._metrics.foreign_points.inc()
        return kept

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

    async def newest_step(self, collection: str) -> int | None:
        """The trainer's largest step in a collection; None where it is empty.

        Raises:
            SearchError: see the module's tree; QueryRefused where STEP has no index.
        """
        points, _ = await self._call(
            lambda: self._client.scroll(
                collection,
                limit=1,
                order_by=models.OrderBy(key=STEP, direction=models.Direction.DESC),
                with_payload=[STEP],
            )
        )
        return int((points[0].payload or {})[STEP]) if points else None

    async def dense_vectors(self, collection: str, ids: Sequence[int]) -> dict[int, list[float]]:
        """The vector `dense` of each of the points that are there and have one (a canary's has none), by id.

        Raises:
            SearchError: see the module's tree.
        """
        wanted: list[models.ExtendedPointId] = list(ids)
        points = await self._call(
            lambda: self._client.retrieve(collection, ids=wanted, with_payload=False, with_vectors=[DENSE])
        )
        vectors = {int(point.id): cast(dict[str, list[float]], point.vector or {}) for point in points}
        return {point_id: named[DENSE] for point_id, named in vectors.items() if DENSE in named}

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


def vectors_of(point: Point) -> tuple[list[float], dict[int, float]]:
    """A point's dense vector, and its co-visitation by index; empty where it has none, or none was asked for."""
    vectors = point.vector or {}
    sparse = vectors.get(COVISIT)
    covisit = {} if sparse is None else dict(zip(sparse["indices"], sparse["values"], strict=True))
    return vectors.get(DENSE, []), covisit


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
