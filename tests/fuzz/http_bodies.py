"""HTTP bodies: the whole application in this process, from ASGI to what is sent to Qdrant, with Qdrant left out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
from prometheus_client import CollectorRegistry
from qdrant_client import models

from retriever.contract import CandidatesRequest, Problem
from retriever.encode import ServedVersion
from retriever.fusion import Search, overfetching_request
from retriever.histories import HistoryTable
from retriever.metrics import Metrics
from retriever.ranking import pool_size
from retriever.retrieve import Retriever
from retriever.service import create_app
from retriever.settings import RetrieverSettings
from retriever.transport import Point
from tests.fuzz.mutator import JSON_WORDS
from tests.fuzz.strict_json import Refused, Undecided, id_of, is_number, read, typed
from trainer.contract import DENSE, Manifest
from trainer.towers import Feature, TowerConfig, build_towers

MAX_BODY_BYTES = 65_536
CONFIG = TowerConfig(
    embedding_dim=8, row_dim=8, item_rows=64, user_rows=64, feature_rows=64, use_user_id=True,
    context=(
        Feature("device", "categorical"), Feature("hour", "number"), Feature("watching", "item"), Feature("q", "text"),
    ),
)  # fmt: skip


def _json(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


CORPUS = (
    _json(user_id="ann"),
    _json(user_id=7, k=1000, popularity=0.5, exclude_seen=False, with_payload=True),
    _json(history=["shoe", 3, "hät"], context={"device": "phone", "hour": 7.5, "watching": "hat", "q": "two words"}),
    _json(user_id="u", history=[], context={"hour": 2**70, "device": None, "new": True}, k=1, popularity=-1),
    _json(history=["shoe"], explain=True, diversity=0.25),
    _json(user_id="u", filter={"must": [{"key": "parity", "match": {"value": "odd"}}]}),
    _json(user_id="u", filter={"must_not": [{"key": "n", "range": {"gte": 1, "lt": 20.5}}, {"has_id": [1, 2]}]}),
    _json(user_id="u", filter={"should": [{"key": "a", "match": {"any": ["x", "y"]}}, {"is_empty": {"key": "b"}}]}),
)
WORDS = (
    *JSON_WORDS, b'"user_id":', b'"history":', b'"context":', b'"k":', b'"filter":', b'"popularity":', b'"hour":',
    b'"must":', b'"range":', b'"gte":', b'"match":', b'"device":', b'"exclude_seen":',
)  # fmt: skip


class StandInIndex:
    """Writes down what it is asked, and that a Qdrant would understand it as it is meant."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] | None = None

    async def search(self, collection: str, searches: Sequence[Search]) -> list[list[Point]]:
        """One point."""
        (search,) = searches
        assert np.isfinite(search.query.dense).all()
        models.QueryRequest.model_validate_json(orjson.dumps(overfetching_request(search, hnsw_ef=64)))
        wire = search.filter and search.filter.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.asked = {
            "k": search.k, "seen": search.seen.tolist(), "filter": wire,
            "with_payload": search.with_payload,
        }  # fmt: skip
        vector = {DENSE: [0.0] * len(search.query.dense)}
        return [[Point(id=1, score=0.5, payload={"item_id": "i"}, vector=vector)]]


class Application:
    """A retriever without sockets."""

    def __init__(self) -> None:
        self.index = StandInIndex()
        tower, _ = build_towers(CONFIG, seed=1)
        manifest = Manifest(
            model_version=1, collection="items__v1", embedding_dim=8, popularity_dims=1, popularity_scale=20.0,
            popularity_weights=[1.0], temperature=0.1, towers=CONFIG.to_dict(), num_items=1, step=1,
            source_offsets={0: 1}, settings_hash="by hand", created_at=1.0,
        )  # fmt: skip
        served = ServedVersion("items__v1", manifest, CONFIG, tower.eval().requires_grad_(False))
        metrics = Metrics(CollectorRegistry())

        async def current() -> ServedVersion:
            return served

        self.retriever = Retriever(
            SimpleNamespace(current=current, second=None, problem=None, qdrant_is_away=False),  # type: ignore[arg-type]
            self.index,  # type: ignore[arg-type]
            HistoryTable(10, 5),
            metrics,
        )
        self.requests: list[CandidatesRequest] = []
        answer = self.retriever.candidates

        async def candidates(request: CandidatesRequest) -> Any:
            self.requests.append(request)
            return await answer(request)

        self.retriever.candidates = candidates  # type: ignore[method-assign]
        settings = RetrieverSettings(model_dir=Path("unused"), max_body_bytes=MAX_BODY_BYTES)
        self._app = create_app(settings, self.retriever, metrics, lambda: None)
        self._loop = asyncio.new_event_loop()

    def close(self) -> None:
        """Ends the loop."""
        self._loop.close()

    def post(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request for candidates."""
        return self._loop.run_until_complete(self._post(body))

    async def _post(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        told: list[dict[str, Any]] = []
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/candidates", "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "client": ("127.0.0.1", 1), "raw_path": b"/v1/candidates", "root_path": "", "scheme": "http",
            "server": ("127.0.0.1", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            told.append(message)

        await self._app(scope, receive, send)  # type: ignore[arg-type]
        headers = {name.decode(): value.decode() for name, value in told[0]["headers"]}
        return told[0]["status"], headers, b"".join(message.get("body", b"") for message in told[1:])

    def check(self, data: bytes) -> bool:
        """Whether the body is answered with candidates.

        Raises:
            AssertionError: it is, and is no request or is taken for another one; or the service's own fault is told.
        """
        self.requests.clear()
        self.index.asked = None
        status, headers, body = self.post(data)
        if status != 200:
            assert status in (400, 413, 422), f"{status}: {body!r}"
            assert headers["content-type"] == "application/problem+json"
            assert Problem.model_validate_json(body).status == status
        try:
            expected = _reading(data)
        except Undecided:
            return status == 200
        except Refused as error:
            assert status != 200, f"accepted, but {error or error.__cause__!r}"
            return False
        if status != 200:
            assert expected["filter"] is not None or _is_beyond(data), f"refused: {body!r}"
            return False
        (request,), asked = self.requests, self.index.asked
        assert asked is not None
        came = request.model_dump(exclude={"filter"})
        assert typed(came) == typed({name: value for name, value in expected.items() if name != "filter"})
        wanted = pool_size(expected["k"], expected["diversity"])
        assert (asked["k"], asked["with_payload"]) == (wanted, expected["with_payload"])
        assert_same_filter(expected["filter"], asked["filter"])
        assert [one["item_id"] for one in json.loads(body)["candidates"]] == ["i"]
        return True


@contextmanager
def application() -> Iterator[Application]:
    """An application, closed afterwards."""
    made = Application()
    try:
        yield made
    finally:
        made.close()


def assert_same_filter(said: Any, sent: Any) -> None:
    """What goes to Qdrant is what the caller said, but for nulls, numbers' form and what stands for a default."""
    if isinstance(said, dict) and isinstance(sent, dict):
        said = {name: value for name, value in said.items() if value is not None}
        assert said.keys() == sent.keys(), (said, sent)
        for name, value in said.items():
            assert_same_filter(value, sent[name])
    elif isinstance(said, Sequence) and not isinstance(said, str):
        assert isinstance(sent, list) and len(said) == len(sent), (said, sent)
        for one, other in zip(said, sent, strict=True):
            assert_same_filter(one, other)
    else:
        wanted = float(said) if type(said) is int and type(sent) is float else said  # Qdrant's ranges are of doubles
        assert wanted == sent and isinstance(said, bool) == isinstance(sent, bool), (said, sent)


def _reading(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BODY_BYTES:
        raise Refused("too large")
    try:
        # In UTF-8, by the standard; that a body in another encoding, or with a mark, is read too harms nobody.
        body = read(data.decode(json.detect_encoding(data)).encode())
    except UnicodeDecodeError as error:
        raise Refused from error
    defaults = {
        "user_id": None, "history": None, "context": {}, "k": 10, "filter": None, "exclude_seen": True,
        "popularity": 1.0, "with_payload": False, "explain": False, "diversity": 0.0,
    }  # fmt: skip
    if not isinstance(body, dict) or body.keys() - defaults.keys():
        raise Refused("no object, or with unknown fields")
    said = defaults | body
    if said["user_id"] is not None:
        said["user_id"] = id_of(said["user_id"])
    if said["history"] is not None:
        if not isinstance(said["history"], list):
            raise Refused("no history")
        said["history"] = [id_of(item) for item in said["history"]]
    if said["user_id"] is None and said["history"] is None:
        raise Refused("for nobody")
    if type(said["k"]) is float and said["k"].is_integer():
        said["k"] = int(said["k"])
    if type(said["k"]) is not int or not 1 <= said["k"] <= 1000:
        raise Refused("no k")
    if any(type(said[name]) is not bool for name in ("exclude_seen", "with_payload", "explain")):
        raise Refused("no boolean")
    if not is_number(said["popularity"]) or not -1 <= said["popularity"] <= 2:
        raise Refused("no popularity")
    said["popularity"] = float(said["popularity"])
    if not is_number(said["diversity"]) or not 0 <= said["diversity"] <= 1:
        raise Refused("no diversity")
    said["diversity"] = float(said["diversity"])
    context = said["context"]
    if not isinstance(context, dict) or len(context) > 64:
        raise Refused("no context")
    for value in context.values():
        if not (value is None or isinstance(value, bool | str) or is_number(value)):
            raise Refused("context is flat")
        if isinstance(value, str) and len(value) > 4096:
            raise Refused("long context")
    if said["filter"] is not None and not isinstance(said["filter"], dict):
        raise Refused("no filter")
    return said


def _is_beyond(data: bytes) -> bool:
    """Integers of more than 4,300 digits, which Python does not read."""
    return len(data) > 4300
