"""The Python client against a real retriever; its errors; what it loads; the examples of docs/retrieval.md."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr, ValidationError
from qdrant_client import QdrantClient

from retriever.contract import CandidatesRequest
from retriever.settings import RetrieverSettings
from streamtower.client import (
    AsyncStreamtowerClient,
    ServiceAway,
    ServiceNotReady,
    ServiceProblem,
    StreamtowerClient,
    StreamtowerError,
)
from tests.retriever.published import Published, Publisher
from tests.retriever.running import Running, running
from tests.retriever.test_candidates import click

ROOT = Path(__file__).parent.parent.parent
KEY = "a-key-of-the-service"


@pytest.fixture
def publisher(qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Publisher]:
    client = QdrantClient(url=qdrant_url, headers={"accept-encoding": "identity"})
    yield Publisher(client, alias, tmp_path / "models")
    client.close()


@pytest.fixture
def published(publisher: Publisher) -> Published:
    return publisher.publish(1)


@pytest.fixture
def retriever(qdrant_url: str, publisher: Publisher, published: Published) -> Iterator[Running]:
    """A retriever that serves version 1 to those who have a key."""
    settings = RetrieverSettings(
        qdrant=qdrant_url, alias=publisher.alias, model_dir=publisher.model_dir, api_keys=(SecretStr(KEY),)
    )
    with running(settings) as made:
        made.wait_for_version(1)
        made.table.apply(click("a/b ü", "item-5", ["item-3"], offset=0))
        yield made


def url_of(retriever: Running) -> str:
    return str(retriever.http.base_url)


@pytest.mark.index
def test_every_answer_is_the_services_own(retriever: Running, published: Published) -> None:
    with StreamtowerClient(url_of(retriever) + "/", api_key=KEY) as client:
        answer = client.candidates("a/b ü", k=3, explain=True, context={"device": "phone"}, with_payload=True)
        clicked = ["item-3", "item-5"]
        best = published.best(3, user_id="a/b ü", history=clicked, without=clicked, context={"device": "phone"})
        assert [one.item_id for one in answer.candidates] == [item for item, _ in best]
        assert [one.score for one in answer.candidates] == pytest.approx([score for _, score in best], rel=1e-4)
        first = answer.candidates[0]
        assert first.payload == {"parity": "odd" if int(first.item_id[5:]) % 2 else "even", "n": int(first.item_id[5:])}
        assert first.explanation is not None
        assert sum(first.explanation.model_dump().values()) == pytest.approx(first.score, rel=1e-4)
        odd = {"must": [{"key": "parity", "match": {"value": "odd"}}]}
        one, two = client.batch([{"history": ["item-1"], "filter": odd}, CandidatesRequest(history=[], k=2)])
        assert {int(c.item_id[5:]) % 2 for c in one.candidates} == {1} and len(two.candidates) == 2
        alone = client.candidates(history=["item-1"], filter=odd)
        assert [c.item_id for c in alone.candidates] == [c.item_id for c in one.candidates]
        # Several queries are embedded at once: the last digits may differ.
        assert [c.score for c in alone.candidates] == pytest.approx([c.score for c in one.candidates], rel=1e-5)
        assert len(client.similar(["item-4"], k=5, by="embedding").candidates) == 5
        assert client.query("u", k=7).query["limit"] == 7
        assert client.history("a/b ü").items == clicked
        assert client.version().model_version == 1


@pytest.mark.index
def test_the_asynchronous_client_gives_the_same(retriever: Running) -> None:
    async def ask() -> None:
        async with AsyncStreamtowerClient(url_of(retriever), api_key=KEY) as client:
            answers = await asyncio.gather(
                client.candidates("a/b ü", k=3), client.batch([{"user_id": "a/b ü", "k": 3}]),
                client.similar(["item-4"]), client.query("u"), client.history("a/b ü"), client.version(),
            )  # fmt: skip
            with StreamtowerClient(url_of(retriever), api_key=KEY) as other:
                assert answers == [
                    other.candidates("a/b ü", k=3), other.batch([{"user_id": "a/b ü", "k": 3}]),
                    other.similar(["item-4"]), other.query("u"), other.history("a/b ü"), other.version(),
                ]  # fmt: skip
            with pytest.raises(ServiceProblem, match="nowhere"):
                await client.similar(["nowhere"])
            with pytest.raises(ValidationError):
                await client.candidates("u", k=0)

    asyncio.run(ask())


@pytest.mark.index
def test_problems_come_as_exceptions_with_the_whole_document(retriever: Running) -> None:
    with StreamtowerClient(url_of(retriever)) as stranger:
        with pytest.raises(ServiceProblem, match="No valid API key") as raised:
            stranger.version()
        assert (raised.value.kind, raised.value.status, raised.value.retry_after_seconds) == ("unauthorized", 401, None)
    with StreamtowerClient(url_of(retriever), api_key=KEY) as client:
        with pytest.raises(ServiceProblem) as raised:
            client.similar(["item-1", "nowhere"])
        assert (raised.value.kind, raised.value.status) == ("unknown-items", 404)
        assert [error.location for error in raised.value.problem.errors] == ["body.item_ids.1"]
        with pytest.raises(ServiceProblem, match="At least one field condition") as raised:
            client.candidates("u", filter={"must": [{"key": "n"}]})
        assert raised.value.kind == "filter-refused"


def test_a_wrong_request_is_not_even_sent() -> None:
    with StreamtowerClient("http://127.0.0.1:9") as client:
        for wrong in ({"k": 0}, {"kk": 3}, {"popularity": 5}, {"filter": {"mst": []}}):
            with pytest.raises(ValidationError):
                client.candidates("u", **wrong)
        with pytest.raises(ValidationError, match="give user_id, history or both"):
            client.candidates()


def answering(status: int, body: str, **headers: str) -> StreamtowerClient:
    return StreamtowerClient(
        transport=httpx.MockTransport(lambda request: httpx.Response(status, text=body, headers=headers))
    )


def test_a_service_that_cannot_answer_now_says_when_to_come_again() -> None:
    problem = '{"type": "urn:streamtower:problem:not-ready", "title": "T", "status": 503, "detail": "D", "new": 1}'
    with answering(503, problem, **{"retry-after": "7"}) as client, pytest.raises(ServiceNotReady) as raised:
        client.version()
    assert (raised.value.retry_after_seconds, str(raised.value)) == (7.0, "T: D")
    assert isinstance(raised.value, StreamtowerError)


@pytest.mark.parametrize("status", [200, 404, 502])
def test_whoever_answers_otherwise_is_no_streamtower(status: int) -> None:
    with answering(status, "<html>") as client, pytest.raises(ServiceAway, match=f"{status} and no Streamtower"):
        client.version()


def test_fields_that_a_newer_service_adds_do_no_harm() -> None:
    body = (
        '{"model_version": 1, "collection": "c", "created_at": 1, "step": 2, "num_items": 3, "embedding_dim": 4,'
        ' "context": [], "something_new": {}}'
    )
    with answering(200, body) as client:
        assert client.version().num_items == 3


def test_nobody_at_the_url_is_told() -> None:
    with StreamtowerClient("http://127.0.0.1:9") as client, pytest.raises(ServiceAway, match="no retriever answers"):
        client.candidates("u")


def test_it_loads_neither_torch_nor_numba() -> None:
    code = "import sys, streamtower.client; print(*({'torch', 'numba', 'faust', 'confluent_kafka'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "retrieval.md").read_text(), flags=re.DOTALL)


@pytest.mark.index
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_docs_run_as_they_stand(
    qdrant_url: str, publisher: Publisher, published: Published, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = RetrieverSettings(qdrant=qdrant_url, alias=publisher.alias, model_dir=publisher.model_dir)
    with running(settings) as made:
        made.wait_for_version(1)
        code = (
            EXAMPLES[number].replace("http://127.0.0.1:8080", url_of(made)).replace("http://127.0.0.1:6333", qdrant_url)
        )
        exec(compile(code, f"docs/retrieval.md, example {number}", "exec"), {})
    assert "item-" in capsys.readouterr().out
