"""What a wrong request gets: RFC 9457 problem details that say where and what, by value."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from retriever.contract import CandidatesRequest, Problem
from retriever.problems import KINDS
from retriever.settings import RetrieverSettings
from tests.retriever.published import Published
from tests.retriever.running import Running, running, wait_until

# The Qdrant client looks for the server's version in a thread of its own, and says so when nobody answers.
pytestmark = pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")

DEAD = "http://127.0.0.1:9"
"""Nothing listens there: these requests must be refused before Qdrant is asked."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A retriever with small limits and no Qdrant."""
    settings = RetrieverSettings(
        qdrant=DEAD,
        model_dir=tmp_path_factory.mktemp("models"),
        max_body_bytes=1024,
        body_timeout_seconds=0.3,
        search_timeout_seconds=0.1,
    )
    with running(settings) as made:
        yield made


def told(small: Running, **request: Any) -> tuple[int, str, list[tuple[str, str]]]:
    """Status, slug and the errors of a request to /v1/candidates; checks that it is a proper problem."""
    answer = small.http.post("/v1/candidates", **request)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = Problem.model_validate_json(answer.content)
    slug = problem.type.removeprefix("urn:streamtower:problem:")
    assert (problem.status, problem.title) == KINDS[slug]
    assert answer.status_code == problem.status
    return answer.status_code, slug, [(error.location, error.message) for error in problem.errors]


@pytest.mark.parametrize(
    ("body", "location", "message"),
    [
        ({"user_id": "u", "k": 0}, "body.k", "Input should be greater than or equal to 1"),
        ({"user_id": "u", "k": 1001}, "body.k", "Input should be less than or equal to 1000"),
        ({"user_id": "u", "k": "10"}, "body.k", "Input should be a valid integer"),
        ({"user_id": "u", "k": 2.5}, "body.k", "Input should be a valid integer"),
        ({"user_id": "u", "popularity": 2.1}, "body.popularity", "Input should be less than or equal to 2"),
        ({"user_id": "u", "popularity": -1.1}, "body.popularity", "Input should be greater than or equal to -1"),
        ({"user_id": "u", "exclude_seen": 1}, "body.exclude_seen", "Input should be a valid boolean"),
        ({"user_id": "u", "with_paylod": True}, "body.with_paylod", "Extra inputs are not permitted"),
        ({"user_id": True}, "body.user_id", "Input should be a valid string"),
        ({"user_id": ""}, "body.user_id", "must be of 1 … 512 bytes in UTF-8, not 0"),
        ({"user_id": "ü" * 257}, "body.user_id", "must be of 1 … 512 bytes in UTF-8, not 514"),
        ({"user_id": "u", "history": "i"}, "body.history", "Input should be a valid list"),
        ({"user_id": "u", "history": ["i", None]}, "body.history.1", "Input should be a valid string"),
        ({"user_id": "u", "context": [1]}, "body.context", "Input should be a valid dictionary"),
        ({}, "body", "give user_id, history or both; an empty history asks for an unknown user"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(small: Running, body: object, location: str, message: str) -> None:
    status, slug, errors = told(small, json=body)
    assert (status, slug) == (422, "invalid-request")
    assert errors == [(location, message)]


def test_nested_context_is_refused(small: Running) -> None:
    status, _, errors = told(small, json={"user_id": "u", "context": {"device": {"os": "x"}}})
    assert status == 422
    assert errors == [("body.context.device", "must be text, a number, true, false or null: context is flat")]


def test_too_many_context_features_are_refused(small: Running) -> None:
    context = {f"f{number}": 1 for number in range(65)}
    status, _, errors = told(small, json={"user_id": "u", "context": context})
    assert (status, errors[0][0]) == (422, "body.context")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(small: Running, value: str) -> None:
    body = f'{{"user_id": "u", "popularity": {value}}}'
    status, _, errors = told(small, content=body, headers={"content-type": "application/json"})
    assert (status, errors) == (422, [("body.popularity", "Input should be a finite number")])


@pytest.mark.parametrize(
    ("filter", "location"),
    [
        ({"must": [{"key": "a", "mtch": {"value": 1}}]}, "body.filter.must.0.mtch"),
        ({"mst": []}, "body.filter.mst"),
        ({"must": [{"should": [{"key": "a", "range": {"gte": "x"}}]}]}, "body.filter.must.0.should.0.range.gte"),
        ({"must_not": {"has_id": [7, 1.5]}}, "body.filter.must_not.has_id.1"),
        ({"must": [{"key": "a"}, {"is_empty": {}}]}, "body.filter.must.1.is_empty.key"),
        ([], "body.filter"),
    ],
)
def test_a_typo_in_a_filter_is_told_where_it_is(small: Running, filter: object, location: str) -> None:
    status, slug, errors = told(small, json={"user_id": "u", "filter": filter})
    assert (status, slug) == (422, "invalid-request")
    assert [error[0] for error in errors] == [location]
    assert len(errors) == 1


def test_other_wrong_fields_are_told_beside_the_filters(small: Running) -> None:
    _, _, errors = told(small, json={"k": 0, "user_id": "u", "filter": {"must": [{"key": "a", "mtch": {"value": 1}}]}})
    assert [location for location, _ in errors] == ["body.k", "body.filter.must.0.mtch"]


@pytest.mark.parametrize(
    ("content", "status", "slug"),
    [
        (b'{"user_id": "u"', 400, "malformed-body"),
        (b"\xff\xfe{}", 400, "malformed-body"),
        (b"[" * 1000, 400, "malformed-body"),
        (b"", 422, "invalid-request"),
        (b"null", 422, "invalid-request"),
        (b"[]", 422, "invalid-request"),
    ],
)
def test_a_body_that_is_no_request_is_refused(small: Running, content: bytes, status: int, slug: str) -> None:
    assert told(small, content=content, headers={"content-type": "application/json"})[:2] == (status, slug)


def test_a_body_of_another_type_is_refused(small: Running) -> None:
    status, _, errors = told(small, content=b'{"user_id": "u"}', headers={"content-type": "text/plain"})
    assert (status, errors) == (
        422,
        [("body", "must be a JSON object, sent as content-type application/json")],
    )


@pytest.mark.parametrize("size", [1025, 5_000, 1_000_000])
def test_a_large_body_is_refused(small: Running, size: int) -> None:
    body = json.dumps({"user_id": "u", "history": ["x" * size]}).encode()
    assert told(small, content=body)[:2] == (413, "body-too-large")


def test_a_large_body_of_unknown_length_is_refused(small: Running) -> None:
    assert told(small, content=iter([b" " * 600] * 3))[:2] == (413, "body-too-large")


def test_a_body_of_the_largest_size_is_read(small: Running) -> None:
    body = b'{"user_id": "u", "k": 0}'.ljust(1024)
    assert told(small, content=body, headers={"content-type": "application/json"})[0] == 422


def test_a_body_that_never_comes_is_given_up(small: Running) -> None:
    port = small.http.base_url.port
    with socket.create_connection(("127.0.0.1", port or 0), timeout=10) as connection:
        connection.sendall(b"POST /v1/candidates HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:streamtower:problem:body-timeout" in answer


def test_more_requests_at_once_than_allowed_are_turned_away(tmp_path: Path) -> None:
    settings = RetrieverSettings(qdrant=DEAD, model_dir=tmp_path, max_in_flight=1, search_timeout_seconds=0.1)
    with running(settings) as busy:
        with socket.create_connection(("127.0.0.1", busy.http.base_url.port or 0), timeout=10) as connection:
            connection.sendall(b"POST /v1/candidates HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{")
            wait_until(lambda: busy.value("requests_in_flight") == 1, "one is under way")
            status, slug, _ = told(busy, json={"user_id": "u"})
            assert (status, slug) == (503, "overloaded")
            assert busy.http.get("/healthz").status_code == 200
        wait_until(lambda: busy.value("requests_in_flight") == 0, "its caller hung up")
        assert told(busy, json={"user_id": "u"})[:2] == (503, "not-ready")
        assert busy.value("requests_total", route="candidates", code="4xx") == 1  # the one that hung up


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/docs", 404, "not-found"),
        ("GET", "/v1/candidates", 405, "method-not-allowed"),
        ("GET", "/v1/users/" + "x" * 513 + "/history", 422, "invalid-request"),
    ],
)
def test_a_wrong_address_is_a_problem_too(small: Running, method: str, path: str, status: int, slug: str) -> None:
    answer = small.http.request(method, path)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:streamtower:problem:{slug}")
    assert status != 405 or answer.headers["allow"] == "POST"


def test_a_fault_of_the_service_is_a_500_that_tells_nothing(small: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(small.versions, "served", property(fail))  # an object without any of a version's parts
    answer = small.http.get("/v1/version")
    assert (answer.status_code, answer.json()["type"]) == (500, "urn:streamtower:problem:bug")
    assert "42" not in answer.text
    assert small.value("requests_total", route="version", code="5xx") >= 1


def test_only_one_of_the_keys_opens(tmp_path: Path) -> None:
    keys = ("first-key-of-the-service", "second-key-of-the-service")
    settings = RetrieverSettings(
        qdrant=DEAD, model_dir=tmp_path, api_keys=tuple(map(SecretStr, keys)), search_timeout_seconds=0.1
    )
    with running(settings) as guarded:
        for given in (None, "Bearer", "Bearer first-key-of-the-servic", f"Basic {keys[0]}", keys[0], "Bearer ü"):
            headers = {} if given is None else {"authorization": given.encode()}
            answer = guarded.http.get("/v1/version", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["type"] == "urn:streamtower:problem:unauthorized"
        for key in keys:
            answer = guarded.http.get("/v1/version", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 503  # let in: there is no version
        for path in ("/healthz", "/metrics", "/openapi.json"):
            assert guarded.http.get(path).status_code == 200
        document = guarded.http.get("/openapi.json").json()
        assert document["paths"]["/v1/version"]["get"]["security"] == [{"key": []}]
        assert "security" not in document["paths"]["/healthz"]["get"]


@pytest.mark.index
def test_a_filter_that_only_qdrant_can_judge_is_told_in_its_words(retriever: Running, published: Published) -> None:
    answer = retriever.http.post("/v1/candidates", json={"user_id": "u", "filter": {"must": [{"key": "n"}]}})
    assert answer.status_code == 422
    assert answer.json()["type"] == "urn:streamtower:problem:filter-refused"
    assert "At least one field condition must be specified" in answer.json()["detail"]


def test_a_request_needs_somebody() -> None:
    assert CandidatesRequest(history=[]).history == []
    with pytest.raises(ValidationError, match="give user_id, history or both"):
        CandidatesRequest(k=3)
