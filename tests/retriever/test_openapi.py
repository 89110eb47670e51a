"""The OpenAPI document against the service's behaviour: schemathesis draws requests from it and judges the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from qdrant_client import QdrantClient
from schemathesis.core.errors import UnsupportedSchema
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode
from schemathesis.generation.case import Case
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from retriever.settings import RetrieverSettings
from tests.fixtures.qdrant import names_of_its_own
from tests.retriever.published import Publisher
from tests.retriever.running import Running, running
from tests.retriever.test_candidates import click

pytestmark = pytest.mark.index

OPERATIONS = [
    ("/v1/candidates", "POST"),
    ("/v1/candidates:batch", "POST"),
    ("/v1/query", "POST"),
    ("/v1/similar", "POST"),
    ("/v1/users/{user_id}/history", "GET"),
    ("/v1/version", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/metrics", "GET"),
    ("/openapi.json", "GET"),
]
SEEDS = range(10)
"""Of one run; the next is tried where schemathesis draws what it cannot go on with. What a seed draws depends on every
constant in the source, by Hypothesis' own choice, so a seed that is good today may not be tomorrow."""
BODIES = [("/v1/candidates", "POST"), ("/v1/candidates:batch", "POST"), ("/v1/similar", "POST")]
"""/v1/query takes what /v1/candidates takes, less two fields; schemathesis cannot spoil its body reliably."""


@pytest.fixture(scope="module")
def served(qdrant_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A retriever with a version and a user."""
    with names_of_its_own(qdrant_url) as alias:
        client = QdrantClient(url=qdrant_url, headers={"accept-encoding": "identity"})
        publisher = Publisher(client, alias, tmp_path_factory.mktemp("models"))
        publisher.publish(1)
        with running(
            RetrieverSettings(qdrant=qdrant_url, alias=alias, model_dir=Path(publisher.model_dir), max_body_bytes=2**24)
        ) as retriever:
            retriever.wait_for_version(1)
            retriever.table.apply(click("u", "item-5", ["item-3", "item-4"], offset=0))
            yield retriever
        client.close()


@pytest.fixture(scope="module")
def schema(served: Running) -> Any:
    return schemathesis.openapi.from_dict(served.http.get("/openapi.json").json())


def test_every_operation_of_the_document_is_tried(schema: Any) -> None:
    described = {(found.ok().path, found.ok().method.upper()) for found in schema.get_all_operations()}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(*operation, GenerationMode.NEGATIVE) for operation in BODIES],
)
def test_answers_are_those_of_the_document(
    served: Running, schema: Any, path: str, method: str, mode: GenerationMode
) -> None:
    """Any status is one of the operation's, of its media type and schema; what the document forbids is refused."""
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=mode)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=strategy)
    def check(case: Case) -> None:
        response: Response = case.call(base_url=str(served.http.base_url))
        excluded = []
        if '"filter": {' in json.dumps(case.body if method == "POST" else None, default=str):
            # Qdrant's own models read true as 1 in a filter; and what it must be beyond its form only Qdrant knows.
            excluded.append(negative_data_rejection)
            if response.status_code == 422 and response.json()["type"].endswith(":filter-refused"):
                excluded.append(positive_data_acceptance)
        case.validate_response(response, excluded_checks=excluded)

    for number in SEEDS:
        try:
            seed(number)(check)()
        except UnsupportedSchema:  # one of the ways in which it spoils a body leads schemathesis to what it cannot draw
            continue
        return
    pytest.fail(f"schemathesis could draw no whole run with any of the seeds {SEEDS}")
