"""Queries from their requests to their answers: history → query tower → Qdrant, all of one version.

Station: between `service` (HTTP) and `encode`, `search`, `ranking`, `histories`, `versions`. It knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from retriever.arms import Arm, Arms
from retriever.contract import (
    Candidate,
    CandidatesAnswer,
    CandidatesRequest,
    Explanation,
    HistoryAnswer,
    QueryAnswer,
    QueryRequest,
    SimilarAnswer,
    SimilarRequest,
    VersionAnswer,
)
from retriever.encode import Asked, Query, ServedVersion, UInt64Array
from retriever.fusion import Search
from retriever.histories import HistoryTable
from retriever.metrics import Metrics
from retriever.popular import Popular
from retriever.ranking import diverse, explain, pool_size
from retriever.search import CollectionGone, Index, IndexUnavailable, SearchError, vectors_of
from retriever.transport import Point
from retriever.versions import Versions
from streams.contract import hash_id, hash_ids
from trainer.contract import ITEM_ID, STEP

ResultT = TypeVar("ResultT")
Source = Literal["request", "followed", "none"]
MAX_SHADOWS = 8
"""Queries in the shadow that may be under way at once."""
_NO_ITEMS = np.zeros(0, np.uint64)


class NotReady(Exception):
    """No version is served: the message says why."""


class ItemsUnknown(Exception):
    """Items that the served version does not hold."""

    def __init__(self, item_ids: Sequence[str], places: Sequence[int]) -> None:
        super().__init__(f"not in the live index: {', '.join(map(repr, item_ids[:3]))}")
        self.places = list(places)
        """Where they stood in the request."""


@dataclass(frozen=True)
class _Query:
    """A request, with what is known of its user."""

    request: QueryRequest
    asked: Asked
    known: bool | None
    source: Source

    @property
    def seen(self) -> UInt64Array:
        """[s] hashes of the items that are no candidates."""
        return self.asked.history if self.request.exclude_seen else _NO_ITEMS

    def answer(
        self, candidates: list[Candidate], served: ServedVersion, fallback: Literal["popularity"] | None = None
    ) -> CandidatesAnswer:
        """The answer with these candidates."""
        return CandidatesAnswer.model_construct(
            candidates=candidates,
            model_version=served.manifest.model_version,
            user_known=self.known,
            history_source=self.source,
            history_length=len(self.asked.history),
            fallback=fallback,
        )


@dataclass(frozen=True)
class _Asked:
    """A request for candidates."""

    request: CandidatesRequest
    query: _Query


class Retriever:
    """Answers queries from the version that is served, with the histories followed so far."""

    def __init__(
        self,
        versions: Versions,
        index: Index,
        histories: HistoryTable,
        metrics: Metrics,
        popular: Popular | None = None,
        arms: Arms | None = None,
    ) -> None:
        """
        Args:
            versions: says what is served.
            index: where the items are.
            histories: what the users clicked last.
            metrics: see there.
            popular: what is answered with while Qdrant is away; None: such requests fail.
            arms: which users the second version answers, where there is one; None: nobody.
        """
        self._versions = versions
        self._index = index
        self._histories = histories
        self._metrics = metrics
        self._popular = popular
        self._arms = arms or Arms()
        self._shadows: set[asyncio.Task[None]] = set()

    async def candidates(self, request: CandidatesRequest) -> CandidatesAnswer:
        """The best items for the request.

        Raises:
            NotReady: no version is served.
            SearchError: Qdrant gave none.
        """
        (answer,) = await self._candidates([request], is_measured=True)
        return answer

    async def batch(self, requests: Sequence[CandidatesRequest]) -> list[CandidatesAnswer]:
        """The best items for each request, by one query to Qdrant. Raises as `candidates` does, for all together."""
        return await self._candidates(requests, is_measured=False)

    async def _candidates(self, requests: Sequence[CandidatesRequest], *, is_measured: bool) -> list[CandidatesAnswer]:
        asked = [_Asked(request, self._query(request)) for request in requests]
        answers = self._fallback(asked) if self._versions.qdrant_is_away else None
        if answers is None:
            try:
                answers = await self._answers_by_arm(asked, is_measured=is_measured)
            except IndexUnavailable:
                answers = self._fallback(asked)
                if answers is None:
                    raise
        for request, one in zip(requests, answers, strict=True):
            self._metrics.queries.labels(one.history_source).inc()
            self._metrics.candidates.inc(len(one.candidates))
            if len(one.candidates) < request.k:
                self._metrics.short_answers.inc()
        return answers

    async def _answers_by_arm(self, asked: Sequence[_Asked], *, is_measured: bool) -> list[CandidatesAnswer]:
        """Each answered by its user's arm; one query to Qdrant for each arm that somebody is of."""
        of_arm: dict[Arm, list[int]] = {}
        for place, one in enumerate(asked):
            arm = "live" if self._versions.second is None else self._arms.arm_of(one.query.asked.user_hash)
            of_arm.setdefault(arm, []).append(place)
        answers: dict[int, CandidatesAnswer] = {}
        for arm, places in of_arm.items():
            some = [asked[place] for place in places]

            preferred = self._versions.second if arm == "second" else None

            async def work(
                served: ServedVersion, some: Sequence[_Asked] = some, preferred: ServedVersion | None = preferred
            ) -> list[CandidatesAnswer]:
                by: Arm = "live" if preferred is None or served is not preferred else "second"
                return await self._answer(served, some, by, is_measured=is_measured)

            found = await self._with_version(work, preferred)
            answers |= dict(zip(places, found, strict=True))
            if arm == "live" and (second := self._versions.second) is not None:
                self._shadow(second, [(one, answer) for one, answer in zip(some, found, strict=True)])
        return [answers[place] for place in range(len(asked))]

    async def _answer(
        self, served: ServedVersion, asked: Sequence[_Asked], arm: Arm, *, is_measured: bool
    ) -> list[CandidatesAnswer]:
        """The answers of one version."""
        started = time.perf_counter()
        encoded = served.encode([one.query.asked for one in asked])
        searching = time.perf_counter()
        searches = [_search_of(*pair) for pair in zip(asked, encoded, strict=True)]
        found = await self._index.search(served.collection, searches)
        ended = time.perf_counter()
        if is_measured:
            self._metrics.request_seconds.labels("encode").observe(searching - started)
            self._metrics.request_seconds.labels("search").observe(ended - searching)
        self._metrics.arm_queries.labels(arm).inc(len(asked))
        self._metrics.arm_seconds.labels(arm).observe(ended - started)
        return [
            one.query.answer(_told(served, one.request, search, points), served)
            for one, search, points in zip(asked, searches, found, strict=True)
        ]

    def _shadow(self, second: ServedVersion, answered: list[tuple[_Asked, CandidatesAnswer]]) -> None:
        """Has the second version answer too, for those users of whom that is wanted; nobody waits for it."""
        some = [pair for pair in answered if self._arms.is_shadowed(pair[0].query.asked.user_hash)]
        if not some:
            return
        if len(self._shadows) >= MAX_SHADOWS:
            self._metrics.shadows.labels("skipped").inc(len(some))
            return
        task = asyncio.create_task(self._compare(second, some))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _compare(self, second: ServedVersion, answered: list[tuple[_Asked, CandidatesAnswer]]) -> None:
        started = time.perf_counter()
        try:
            encoded = second.encode([one.query.asked for one, _ in answered])
            searches = [_search_of(*pair) for pair in zip([one for one, _ in answered], encoded, strict=True)]
            found = await self._index.search(second.collection, searches)
        except SearchError:
            self._metrics.shadows.labels("failed").inc(len(answered))
            return
        self._metrics.arm_seconds.labels("second").observe(time.perf_counter() - started)
        for (one, answer), search, points in zip(answered, searches, found, strict=True):
            theirs = {candidate.item_id for candidate in _told(second, one.request, search, points)}
            shared = sum(candidate.item_id in theirs for candidate in answer.candidates)
            self._metrics.shadow_candidates.inc(len(answer.candidates))
            self._metrics.shadow_shared.inc(shared)
            self._metrics.shadows.labels("compared").inc()

    def _fallback(self, asked: Sequence[_Asked]) -> list[CandidatesAnswer] | None:
        """Popular items for all; None where that is not wanted, nothing is known, or a filter cannot be applied."""
        kept, served = self._popular and self._popular.kept, self._versions.served
        if not kept or served is None or any(one.request.filter is not None for one in asked):
            return None
        self._metrics.fallbacks.inc(len(asked))
        answers = []
        for request, query in ((one.request, one.query) for one in asked):
            search = Search(served.popularity_query(), request.k, query.seen, with_payload=request.with_payload)
            points = [point for point in kept if point.id not in search.excluded][: request.k]
            plain = request.model_copy(update={"diversity": 0.0})
            answers.append(query.answer(_told(served, plain, search, points), served, fallback="popularity"))
        return answers

    async def ready_query(self, request: QueryRequest) -> QueryAnswer:
        """Qdrant's request, ready to be sent. Raises NotReady without a version."""
        query, served = self._query(request), self._known(await self._versions.current())
        (encoded,) = served.encode([query.asked])
        search = Search(encoded, request.k, query.seen, request.filter, request.with_payload)
        return QueryAnswer(
            collection=served.collection,
            query=self._index.ready_request(search),
            model_version=served.manifest.model_version,
            user_known=query.known,
            history_source=query.source,
            history_length=len(query.asked.history),
        )

    async def similar(self, request: SimilarRequest) -> SimilarAnswer:
        """Items like those of the request.

        Raises:
            ItemsUnknown: the live index does not hold all of them.
            NotReady, SearchError: as `candidates`.
        """
        hashes = hash_ids(list(dict.fromkeys(request.item_ids)))

        async def answer(served: ServedVersion) -> SimilarAnswer:
            vectors = await self._index.dense_vectors(served.collection, hashes.tolist())
            unknown = [place for place, item in enumerate(request.item_ids) if hash_id(item) not in vectors]
            if unknown:
                raise ItemsUnknown([request.item_ids[place] for place in unknown], unknown)
            dense = np.array([vectors[item_hash] for item_hash in hashes.tolist()], np.float32)
            by_embedding, by_covisitation = request.by != "covisitation", request.by != "embedding"
            query = served.similar(hashes.tolist(), dense, embedding=by_embedding, covisitation=by_covisitation)
            candidates: list[Candidate] = []
            if query.dense or query.indices:  # neither: the version knows no co-visitation
                search = Search(query, request.k, hashes, request.filter, request.with_payload)
                (points,) = await self._index.search(served.collection, [search])
                candidates = [_candidate(point, with_payload=request.with_payload) for point in points]
            return SimilarAnswer.model_construct(candidates=candidates, model_version=served.manifest.model_version)

        return await self._with_version(answer)

    def _query(self, request: QueryRequest) -> _Query:
        user_hash = None if request.user_id is None else hash_id(request.user_id)
        followed = None if user_hash is None else self._histories.get(user_hash)
        known = None if user_hash is None else followed is not None
        history, source = _history_of(request, followed)
        return _Query(request, Asked(user_hash, history, request.context, request.popularity), known, source)

    async def history(self, user_id: str) -> HistoryAnswer:
        """What is known of the user. Raises as `candidates` does."""
        followed = self._histories.get(hash_id(user_id))
        hashes = _NO_ITEMS if followed is None else followed
        items = await self._with_version(lambda served: self._index.item_ids(served.collection, hashes))
        return HistoryAnswer(user_id=user_id, known=followed is not None, items=items)

    def version(self) -> VersionAnswer:
        """The version that is served. Raises NotReady without one."""
        served = self._known(self._versions.served)
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

    def _known(self, served: ServedVersion | None) -> ServedVersion:
        if served is None:
            raise NotReady(self._versions.problem or "no version published yet")
        return served

    async def _with_version(
        self, work: Callable[[ServedVersion], Awaitable[ResultT]], preferred: ServedVersion | None = None
    ) -> ResultT:
        """Work on the preferred version, else the served one; anew where its collection was removed meanwhile."""
        served = preferred or self._known(await self._versions.current())
        while True:
            try:
                return await work(served)
            except CollectionGone as error:
                await self._versions.refresh(stale=served)
                newer = self._known(self._versions.served)
                if newer is served:
                    raise IndexUnavailable(f"{served.collection!r} is gone: {self._versions.problem}") from error
                served = newer


def _history_of(request: QueryRequest, followed: UInt64Array | None) -> tuple[UInt64Array, Source]:
    if request.history is not None:
        return hash_ids(request.history), "request" if request.history else "none"
    return (_NO_ITEMS, "none") if followed is None else (followed, "followed")


def _search_of(asked: _Asked, encoded: Query) -> Search:
    request = asked.request
    wanted = pool_size(request.k, request.diversity)
    with_vectors = request.explain or request.diversity > 0
    return Search(encoded, wanted, asked.query.seen, request.filter, request.with_payload, with_vectors)


def _told(
    served: ServedVersion, request: CandidatesRequest, search: Search, points: Sequence[Point]
) -> list[Candidate]:
    """What the caller is told of the points, best first."""
    dim = served.manifest.embedding_dim
    if request.diversity and points:
        scores = np.array([point.score for point in points], np.float32)
        embeddings = np.array([vectors_of(point)[0][:dim] for point in points], np.float32)
        points = [points[place] for place in diverse(scores, embeddings, request.k, request.diversity).tolist()]
    explanations = [
        explain(search.query, dim, point.score, *vectors_of(point)) if request.explain else None for point in points
    ]
    return [
        _candidate(point, explanation, with_payload=request.with_payload)
        for point, explanation in zip(points, explanations, strict=True)
    ]


def _candidate(point: Point, explanation: Explanation | None = None, *, with_payload: bool) -> Candidate:
    payload = point.payload or {}
    shown = {key: value for key, value in payload.items() if key not in (ITEM_ID, STEP)} if with_payload else None
    return Candidate.model_construct(
        item_id=payload[ITEM_ID], score=point.score, payload=shown, explanation=explanation
    )
