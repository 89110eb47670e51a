"""One query from its request to its answer: history → query tower → Qdrant, all of one version.

Station: between `service` (HTTP) and `encode`, `search`, `histories`, `versions`. It knows no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

import numpy as np

from retriever.contract import CandidatesAnswer, CandidatesRequest, HistoryAnswer, VersionAnswer
from retriever.encode import ServedVersion, UInt64Array
from retriever.histories import HistoryTable
from retriever.metrics import Metrics
from retriever.search import CollectionGone, Index, IndexUnavailable
from retriever.versions import Versions
from streams.contract import hash_id, hash_ids

ResultT = TypeVar("ResultT")
_NO_ITEMS = np.zeros(0, np.uint64)


class NotReady(Exception):
    """No version is served: the message says why."""


class Retriever:
    """Answers queries from the version that is served, with the histories followed so far."""

    def __init__(self, versions: Versions, index: Index, histories: HistoryTable, metrics: Metrics) -> None:
        self._versions = versions
        self._index = index
        self._histories = histories
        self._metrics = metrics

    async def candidates(self, request: CandidatesRequest) -> CandidatesAnswer:
        """The best items for the request.

        Raises:
            NotReady: no version is served.
            SearchError: Qdrant gave none.
        """
        user_hash = None if request.user_id is None else hash_id(request.user_id)
        followed = None if user_hash is None else self._histories.get(user_hash)
        history, source = self._history_of(request, followed)

        async def answer(served: ServedVersion) -> CandidatesAnswer:
            started = time.perf_counter()
            query = served.encode(user_hash, history, request.context, request.popularity)
            encoded = time.perf_counter()
            candidates = await self._index.search(
                served.collection,
                query,
                k=request.k,
                seen=history if request.exclude_seen else _NO_ITEMS,
                filter=request.filter,
                with_payload=request.with_payload,
            )
            self._metrics.request_seconds.labels("encode").observe(encoded - started)
            self._metrics.request_seconds.labels("search").observe(time.perf_counter() - encoded)
            return CandidatesAnswer.model_construct(
                candidates=candidates,
                model_version=served.manifest.model_version,
                user_known=None if user_hash is None else followed is not None,
                history_source=source,
                history_length=len(history),
            )

        result = await self._with_version(answer)
        self._metrics.queries.labels(source).inc()
        self._metrics.candidates.inc(len(result.candidates))
        if len(result.candidates) < request.k:
            self._metrics.short_answers.inc()
        return result

    def _history_of(
        self, request: CandidatesRequest, followed: UInt64Array | None
    ) -> tuple[UInt64Array, Literal["request", "followed", "none"]]:
        if request.history is not None:
            return hash_ids(request.history), "request" if request.history else "none"
        return (_NO_ITEMS, "none") if followed is None else (followed, "followed")

    async def history(self, user_id: str) -> HistoryAnswer:
        """What is known of the user. Raises as `candidates` does."""
        followed = self._histories.get(hash_id(user_id))
        hashes = _NO_ITEMS if followed is None else followed
        items = await self._with_version(lambda served: self._index.item_ids(served.collection, hashes))
        return HistoryAnswer(user_id=user_id, known=followed is not None, items=items)

    def version(self) -> VersionAnswer:
        """The version that is served. Raises NotReady without one."""
        served = self._served()
        manifest = served.manifest
        return VersionAnswer(
            model_version=manifest.model_version,
            collection=served.collection,
            created_at=manifest.created_at,
            step=manifest.step,
            num_items=manifest.num_items,
            embedding_dim=manifest.embedding_dim,
            context=[feature.name for feature in served.config.context],
        )

    def _served(self) -> ServedVersion:
        if self._versions.served is None:
            raise NotReady(self._versions.problem or "no version published yet")
        return self._versions.served

    async def _with_version(self, work: Callable[[ServedVersion], Awaitable[ResultT]]) -> ResultT:
        """Work on the served version; anew where its collection was removed for a newer one's sake meanwhile."""
        served = self._served()
        while True:
            try:
                return await work(served)
            except CollectionGone as error:
                await self._versions.refresh(stale=served)
                newer = self._served()
                if newer is served:
                    raise IndexUnavailable(f"{served.collection!r} is gone: {self._versions.problem}") from error
                served = newer
