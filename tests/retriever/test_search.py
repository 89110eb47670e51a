"""Index against a Qdrant that misbehaves: what is tried again, what is not, and how each error is named."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, models

from retriever.encode import Query
from retriever.fusion import Search
from retriever.metrics import Metrics
from retriever.search import (
    CollectionGone,
    FilterRefused,
    Index,
    IndexUnavailable,
    QueryRefused,
    SearchError,
)

T = TypeVar("T")
NO_ITEMS = np.zeros(0, np.uint64)


class Scripted:
    """Answers one request after the other from a list; the last one for ever."""

    def __init__(self, *answers: Callable[[], httpx.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        made = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer = made()
        return await answer if asyncio.iscoroutine(answer) else answer


def error(status: int, message: str, **headers: str) -> Callable[[], httpx.Response]:
    """An error as Qdrant tells it."""
    return lambda: httpx.Response(status, json={"status": {"error": message}, "time": 0.0}, headers=headers)


def found(*points: dict[str, Any]) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, json={"result": {"points": list(points)}, "status": "ok", "time": 0.0})


def point(number: int, **payload: object) -> dict[str, Any]:
    return {"id": number, "version": 1, "score": float(number), "payload": payload}


def refuse() -> httpx.Response:
    raise httpx.ConnectError("connection refused")


def hang() -> Any:
    async def forever() -> httpx.Response:
        await asyncio.sleep(3_600)
        raise AssertionError

    return forever()


def on_index(
    work: Callable[[Index], Coroutine[Any, Any, T]], qdrant: Scripted, timeout_seconds: float = 0.5
) -> tuple[T, Metrics]:
    """What `work` gives on an index whose server is scripted."""
    metrics = Metrics()

    async def run() -> T:
        client = AsyncQdrantClient(
            url="http://qdrant:6333", transport=httpx.MockTransport(qdrant), check_compatibility=False
        )
        try:
            return await work(Index(client, metrics, hnsw_ef=64, timeout_seconds=timeout_seconds))
        finally:
            await client.close()

    return asyncio.run(run()), metrics


async def search(index: Index, filter: models.Filter | None = None, k: int = 2, seen: Any = NO_ITEMS) -> Any:
    (points,) = await index.search("items__v1", [Search(Query([0.5, 1.0], [], [], 0.0), k, seen, filter)])
    return points


def item_ids(points: Any) -> list[str]:
    return [point.payload["item_id"] for point in points]


def retries(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("streamtower_retriever_qdrant_retries_total") or 0.0


@pytest.mark.parametrize(
    "passing", [refuse, error(500, "x"), error(503, "x"), error(429, "slow down"), error(408, "x")]
)
def test_an_error_that_may_pass_is_tried_again(passing: Callable[[], httpx.Response]) -> None:
    candidates, metrics = on_index(search, Scripted(passing, passing, found(point(1, item_id="a"))), 5)
    assert (item_ids(candidates), candidates[0].score) == (["a"], 1.0)
    assert retries(metrics) == 2


def test_an_overloaded_qdrant_that_says_when_to_come_back_is_tried_again() -> None:
    qdrant = Scripted(error(429, "slow down", **{"Retry-After": "1"}), found(point(1, item_id="a")))
    assert len(on_index(search, qdrant)[0]) == 1


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (refuse, "ConnectError: connection refused"),
        (error(500, "out of memory"), "500: out of memory"),
        (lambda: httpx.Response(502, text="<html>bad gateway"), "502: <html>bad gateway"),
        (hang, "no answer"),
    ],
)
def test_the_deadline_bounds_every_try(failing: Callable[[], httpx.Response], reason: str) -> None:
    with pytest.raises(IndexUnavailable, match=r"Qdrant did not answer within 0.2 s \(.*\)") as raised:
        on_index(search, Scripted(failing), timeout_seconds=0.2)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("failing", "kind"),
    [
        (error(404, "Not found: Collection `items__v1` doesn't exist!"), CollectionGone),
        (error(400, "Wrong input: Vector dimension error: expected dim: 4, got 2"), QueryRefused),
        (lambda: httpx.Response(401, text="Must provide an API key"), IndexUnavailable),
        (error(403, "Forbidden"), IndexUnavailable),
    ],
)
def test_an_error_that_stays_is_told_at_once(failing: Callable[[], httpx.Response], kind: type[SearchError]) -> None:
    qdrant = Scripted(failing)
    with pytest.raises(SearchError) as raised:
        on_index(search, qdrant)
    assert type(raised.value) is kind
    assert len(qdrant.requests) == 1


def test_a_refusal_is_the_filters_where_there_is_one() -> None:
    only = models.Filter(must=[models.FieldCondition(key="a", match=models.MatchValue(value=1))])
    with pytest.raises(FilterRefused, match="bad filter"):
        on_index(lambda index: search(index, filter=only), Scripted(error(422, "bad filter")))


@pytest.mark.parametrize("answer", ["<html>hello", '{"result": 3}', '{"result": {"points": [{"id": 1.5}]}}', "[]"])
def test_an_answer_that_is_not_qdrants_is_told_at_once(answer: str) -> None:
    qdrant = Scripted(lambda: httpx.Response(200, text=answer))
    with pytest.raises(IndexUnavailable, match="what answers is not Qdrant"):
        on_index(search, qdrant)
    assert len(qdrant.requests) == 1


def test_seen_items_are_overfetched_and_dropped_in_order() -> None:
    qdrant = Scripted(found(*(point(number, item_id=str(number)) for number in (9, 8, 7, 6))))
    candidates, _ = on_index(lambda index: search(index, seen=np.array([8, 8, 5], np.uint64)), qdrant)
    assert item_ids(candidates) == ["9", "7"]
    assert b'"limit":4' in qdrant.requests[0].content


def test_ids_over_63_bits_are_recognised() -> None:
    large = 2**64 - 1
    qdrant = Scripted(found(point(large, item_id="large"), point(1, item_id="a")))
    candidates, _ = on_index(lambda index: search(index, seen=np.array([large], np.uint64)), qdrant)
    assert item_ids(candidates) == ["a"]
