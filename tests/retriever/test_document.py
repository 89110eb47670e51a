"""What the service says about itself: its OpenAPI document and its metrics."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from retriever.contract import (
    PROBLEM_JSON,
    BatchAnswer,
    BatchRequest,
    Candidate,
    CandidatesAnswer,
    CandidatesRequest,
    Explanation,
    Problem,
    QueryAnswer,
    QueryRequest,
    SimilarAnswer,
    SimilarRequest,
)
from retriever.metrics import CODES, ROUTES, Metrics
from retriever.settings import RetrieverSettings
from tests.retriever.running import Running, running

# The Qdrant client looks for the server's version in a thread of its own, and says so when nobody answers.
pytestmark = pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A retriever with nothing to serve."""
    settings = RetrieverSettings(
        qdrant="http://127.0.0.1:9", model_dir=tmp_path_factory.mktemp("models"), search_timeout_seconds=0.1
    )
    with running(settings) as made:
        yield made


@pytest.fixture(scope="module")
def document(alone: Running) -> dict[str, Any]:
    answer = alone.http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    return answer.json()  # type: ignore[no-any-return]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_document_is_openapi_and_whole(document: dict[str, Any]) -> None:
    OpenAPI.model_validate(document)
    assert document["openapi"].startswith("3.1")
    for reference in references(document):
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_the_document_describes_every_route(alone: Running, document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, entry in document["paths"].items() for method in entry}
    assert described == {
        ("POST", "/v1/candidates"),
        ("POST", "/v1/candidates:batch"),
        ("POST", "/v1/query"),
        ("POST", "/v1/similar"),
        ("GET", "/v1/version"),
        ("GET", "/v1/users/{user_id}/history"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    }
    assert len(alone.service.app.routes) == len(described)
    for path, entry in document["paths"].items():
        for operation in entry.values():
            assert operation["description"], path


def test_every_error_is_described_as_a_problem(document: dict[str, Any]) -> None:
    operations = [operation for entry in document["paths"].values() for operation in entry.values()]
    errors = [
        answer
        for operation in operations
        for status, answer in operation["responses"].items()
        if status.startswith(("4", "5"))
    ]
    assert len(errors) >= 9
    for answer in errors:
        assert answer["content"] == {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    assert set(document["paths"]["/v1/candidates"]["post"]["responses"]) == {
        "200", "400", "401", "408", "413", "422", "429", "503",
    }  # fmt: skip
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize(
    "model",
    [
        BatchAnswer,
        BatchRequest,
        Candidate,
        CandidatesAnswer,
        CandidatesRequest,
        Explanation,
        Problem,
        QueryAnswer,
        QueryRequest,
        SimilarAnswer,
        SimilarRequest,
    ],
)
def test_every_field_is_explained(document: dict[str, Any], model: type[Any]) -> None:
    properties = document["components"]["schemas"][model.__name__]["properties"]
    assert set(properties) == set(model.model_fields)
    plain = {"item_id", "candidates", "title", "status"}
    for name, schema in properties.items():
        assert name in plain or schema.get("description"), name


def test_limits_are_in_the_document(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["CandidatesRequest"]["properties"]
    assert (properties["k"]["minimum"], properties["k"]["maximum"], properties["k"]["default"]) == (1, 1000, 10)
    assert (properties["popularity"]["minimum"], properties["popularity"]["maximum"]) == (-1, 2)
    assert document["components"]["schemas"]["CandidatesRequest"]["additionalProperties"] is False


def test_metrics_are_there_from_the_start_with_a_formula_each(alone: Running) -> None:
    answer = alone.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.name.startswith("streamtower_retriever_") for family in families)
    assert all(family.documentation.endswith(".") for family in families)
    assert not any(sample.name.endswith("_created") for family in families for sample in family.samples)
    requests = next(family for family in families if family.name == "streamtower_retriever_requests")
    assert {(s.labels["route"], s.labels["code"]) for s in requests.samples} == {(r, c) for r in ROUTES for c in CODES}


def test_two_services_in_one_process_do_not_meet() -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    one, _ = (Metrics(registry) for registry in registries)
    one.clicks.inc()
    assert [r.get_sample_value("streamtower_retriever_clicks_total") for r in registries] == [1, 0]


def test_prometheus_own_linter_has_nothing_to_say(alone: Running) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    text = alone.http.get("/metrics").text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_requests_are_counted_by_route_and_class(alone: Running) -> None:
    def counted(route: str, code: str) -> float:
        return alone.value("requests_total", route=route, code=code)

    before = {
        key: counted(*key) for key in [("ready", "5xx"), ("other", "4xx"), ("alive", "2xx"), ("candidates", "4xx")]
    }
    alone.http.get("/readyz")
    alone.http.get("/nothing/here")
    alone.http.get("/healthz")
    alone.http.post("/v1/candidates", json={"k": 0})
    alone.http.get("/metrics")
    assert {key: counted(*key) - value for key, value in before.items()} == dict.fromkeys(before, 1)
