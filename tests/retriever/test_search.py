"""Index against a Qdrant that misbehaves: what is tried again, what is not, and how each error is named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pytest
from qdrant_client import models

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


@dataclass(frozen=True)
class Answer:
    """What a server sends; `status` 0: it closes the connection instead, −1: it never answers."""

    status: int
    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Scripted:
    """A server that answers one request after the other from a list; the last one for ever."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        """Bodies."""
        self.connections: list[asyncio.Task[None]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.append(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                answer = self._next(body)
                if answer.status == -1:
                    await reader.read()
                if answer.status <= 0:
                    break
                told = {"content-length": str(len(answer.content)), **answer.headers}
                lines = [f"HTTP/1.1 {answer.status} Told", *(f"{name}: {value}" for name, value in told.items())]
                writer.write("\r\n".join([*lines, "\r\n"]).encode() + answer.content)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def _next(self, body: bytes) -> Answer:
        self.requests.append(body)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def error(status: int, message: str, **headers: str) -> Answer:
    """An error as Qdrant tells it."""
    return Answer(status, json.dumps({"status": {"error": message}, "time": 0.0}).encode(), headers)


def found(*points: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps({"result": {"points": points}, "status": "ok", "time": 0.0}).encode())


def point(number: int, **payload: object) -> dict[str, Any]:
    return {"id": number, "version": 1, "score": float(number), "payload": payload}


CLOSE = Answer(0, b"")
HANG = Answer(-1, b"")


def on_index(
    work: Callable[[Index], Coroutine[Any, Any, T]], qdrant: Scripted, timeout_seconds: float = 0.5
) -> tuple[T, Metrics]:
    """What `work` gives on an index whose server is scripted."""
    metrics = Metrics()

    async def run() -> T:
        server = await asyncio.start_server(qdrant.serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        index = Index(url, None, metrics, hnsw_ef=64, timeout_seconds=timeout_seconds)
        try:
            return await work(index)
        finally:
            await index.close()
            server.close()
            await asyncio.gather(*qdrant.connections)

    return asyncio.run(run()), metrics


async def search(index: Index, filter: models.Filter | None = None, k: int = 2, seen: Any = NO_ITEMS) -> Any:
    (points,) = await index.search("items__v1", [Search(Query([0.5, 1.0], [], [], 0.0), k, seen, filter)])
    return points


def item_ids(points: Any) -> list[str]:
    return [point.payload["item_id"] for point in points]


def retries(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("streamtower_retriever_qdrant_retries_total") or 0.0


@pytest.mark.parametrize("passing", [CLOSE, error(500, "x"), error(503, "x"), error(429, "slow down"), error(408, "x")])
def test_an_error_that_may_pass_is_tried_again(passing: Answer) -> None:
    candidates, metrics = on_index(search, Scripted(passing, passing, found(point(1, item_id="a"))), 5)
    assert (item_ids(candidates), candidates[0].score) == (["a"], 1.0)
    assert retries(metrics) == 2


def test_an_overloaded_qdrant_that_says_when_to_come_back_is_tried_again() -> None:
    qdrant = Scripted(error(429, "slow down", **{"Retry-After": "1"}), found(point(1, item_id="a")))
    assert len(on_index(search, qdrant)[0]) == 1


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        (CLOSE, "ServerDisconnectedError: Server disconnected"),
        (error(500, "out of memory"), "500: out of memory"),
        (Answer(502, b"<html>bad gateway"), "502: <html>bad gateway"),
        (HANG, "no answer"),
    ],
)
def test_the_deadline_bounds_every_try(failing: Answer, reason: str) -> None:
    with pytest.raises(IndexUnavailable, match=r"Qdrant did not answer within 0.2 s \(.*\)") as raised:
        on_index(search, Scripted(failing), timeout_seconds=0.2)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("failing", "kind"),
    [
        (error(404, "Not found: Collection `items__v1` doesn't exist!"), CollectionGone),
        (error(400, "Wrong input: Vector dimension error: expected dim: 4, got 2"), QueryRefused),
        (Answer(401, b"Must provide an API key"), IndexUnavailable),
        (error(403, "Forbidden"), IndexUnavailable),
    ],
)
def test_an_error_that_stays_is_told_at_once(failing: Answer, kind: type[SearchError]) -> None:
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
    qdrant = Scripted(Answer(200, answer.encode()))
    with pytest.raises(IndexUnavailable, match="what answers is not Qdrant"):
        on_index(search, qdrant)
    assert len(qdrant.requests) == 1


def test_seen_items_are_overfetched_and_dropped_in_order() -> None:
    qdrant = Scripted(found(*(point(number, item_id=str(number)) for number in (9, 8, 7, 6))))
    candidates, _ = on_index(lambda index: search(index, seen=np.array([8, 8, 5], np.uint64)), qdrant)
    assert item_ids(candidates) == ["9", "7"]
    assert b'"limit":4' in qdrant.requests[0]


def test_ids_over_63_bits_are_recognised() -> None:
    large = 2**64 - 1
    qdrant = Scripted(found(point(large, item_id="large"), point(1, item_id="a")))
    candidates, _ = on_index(lambda index: search(index, seen=np.array([large], np.uint64)), qdrant)
    assert item_ids(candidates) == ["a"]
