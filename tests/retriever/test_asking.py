"""What else can be asked: parts of scores, diverse candidates, batches, similar items, a query to send oneself."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from retriever import fusion
from retriever.contract import MAX_BATCH, MAX_K, MAX_SIMILAR
from retriever.encode import Query
from retriever.ranking import diverse, explain
from streams.contract import CANARY_HASH, CANARY_ID, hash_id
from tests.retriever.published import CONFIG, POPULARITY_SCALE, WEIGHTS, Published, Publisher
from tests.retriever.running import Running, Wire
from tests.retriever.test_candidates import answered, assert_ranked, click
from trainer.contract import EVENT_TIME

pytestmark = pytest.mark.index
ODD = {"must": [{"key": "parity", "match": {"value": "odd"}}]}


def post(retriever: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    return retriever.http.post(path, json=body)


def test_popularity_below_zero_pushes_popular_items_down(retriever: Running, published: Published) -> None:
    """With affinity and co-visitation out of the way, −1 is the order of 1 backwards."""
    log_frequency = dict(zip(published.item_ids, published.vectors[:, -1] * POPULARITY_SCALE, strict=True))
    means = []
    for popularity in (-1.0, 0.0, 1.0, 2.0):
        answer = retriever.ask(history=["item-1"], popularity=popularity, k=10)
        assert_ranked(answer, published.best(10, history=["item-1"], without=["item-1"], popularity=popularity))
        means.append(np.mean([log_frequency[item] for item, _ in answered(answer)]))
    assert all(one < next for one, next in itertools.pairwise(means)), means


@pytest.mark.parametrize("popularity", [-1.0, 0.5])
def test_the_parts_of_each_score_are_told_and_sum_to_it(
    retriever: Running, published: Published, popularity: float
) -> None:
    history = ["item-3", "item-9"]
    answer = retriever.ask(history=history, exclude_seen=False, k=60, popularity=popularity, explain=True)
    without = published.scores(history=history, popularity=0.0)
    whole = published.scores(history=history, popularity=popularity)
    bare = published.scores(history=history, popularity=0.0, covisit_weighed=False)
    for candidate in answer["candidates"]:
        item, parts = candidate["item_id"], candidate["explanation"]
        assert sum(parts.values()) == pytest.approx(candidate["score"], rel=1e-4, abs=1e-4)
        assert parts["affinity"] == pytest.approx(bare[item], rel=1e-4, abs=1e-4)
        assert parts["covisitation"] == pytest.approx(without[item] - bare[item], rel=1e-4, abs=1e-4)
        assert parts["popularity"] == pytest.approx(whole[item] - without[item], rel=1e-4, abs=1e-4)
    assert any(candidate["explanation"]["covisitation"] > 0.1 for candidate in answer["candidates"])
    assert "explanation" not in retriever.ask(history=history)["candidates"][0]


def test_co_visitation_counts_for_the_items_that_share_most(
    retriever: Running, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four items for each candidate that is wanted, where that is more than SPARSE_PREFETCH."""
    monkeypatch.setattr(fusion, "SPARSE_PREFETCH", 0)
    history = ["item-3", "item-9", "item-20"]
    bare = published.scores(history=history, covisit_weighed=False)
    gain = {item: score - bare[item] for item, score in published.scores(history=history).items()}
    counted = sorted(gain, key=gain.__getitem__)[-8:]
    expected = {item: score + (gain[item] if item in counted else 0.0) for item, score in bare.items()}
    best = sorted(expected.items(), key=lambda pair: -pair[1])[:2]
    answer = retriever.ask(history=history, exclude_seen=False, k=2, explain=True)
    assert_ranked(answer, best)
    assert sum(value > 1e-3 for value in gain.values()) > 20
    for candidate in answer["candidates"]:
        assert sum(candidate["explanation"].values()) == pytest.approx(candidate["score"], abs=1e-4)


def test_a_part_that_did_not_count_is_not_told() -> None:
    query = Query(dense=[1.0, 2.0], indices=[7], values=[0.5], covisit_weight=2.0)
    told = [explain(query, 1, score, [3.0, -1.0], {7: 4.0}).covisitation for score in (1.0, 1.0 + 2 * np.log(3))]
    assert told == pytest.approx([0.0, 2 * np.log(3)])


def test_without_a_history_nothing_comes_of_co_visitation(retriever: Running, published: Published) -> None:
    answer = retriever.ask(history=[], explain=True)
    assert_ranked(answer, published.best(10))
    assert {candidate["explanation"]["covisitation"] for candidate in answer["candidates"]} == {0.0}


def test_diverse_candidates_are_those_of_the_definition_over_the_best(retriever: Running, published: Published) -> None:
    pool = published.best(40, history=["item-3"], without=["item-3"])
    rows = [published.item_ids.index(item) for item, _ in pool]
    scores = np.array([score for _, score in pool], np.float32)
    chosen = diverse(scores, published.vectors[rows, : CONFIG.embedding_dim], 10, 0.6)
    expected = [pool[place] for place in chosen]
    answer = retriever.ask(history=["item-3"], k=10, diversity=0.6)
    assert_ranked(answer, expected)
    assert expected != pool[:10]
    assert set(answer["candidates"][0]) == {"item_id", "score"}


def test_a_batch_is_answered_as_its_requests_one_by_one(retriever: Running, published: Published, wire: Wire) -> None:
    retriever.table.apply(click("u", "item-5", ["item-3", "item-4"], offset=0))
    requests: list[dict[str, Any]] = [
        {"user_id": "u", "k": 3},
        {"user_id": "nobody has seen me", "with_payload": True},
        {"history": ["item-7"], "context": {"device": "phone", "hour": 3}, "popularity": -0.5},
        {"history": [], "context": {"watching": "item-2"}, "filter": ODD, "explain": True},
        {"history": ["item-1", "item-2"], "diversity": 0.5, "k": 5},
    ]
    one_by_one = [retriever.ask(**request) for request in requests]
    heads = wire.heads
    answer = post(retriever, "/v1/candidates:batch", {"requests": requests})
    assert wire.heads - heads < len(requests), "one query to Qdrant, beside what the watch asks"
    answers = answer.json()["answers"]
    assert len(answers) == len(requests)
    for one, other in zip(answers, one_by_one, strict=True):
        assert_ranked(one, answered(other))
        assert one.keys() == other.keys() and one["candidates"][0].keys() == other["candidates"][0].keys()
        assert {k: v for k, v in one.items() if k != "candidates"} == {
            k: v for k, v in other.items() if k != "candidates"
        }
    assert retriever.value("queries_total", history="followed") == 2


@pytest.mark.parametrize(
    ("requests", "location"),
    [
        ([], "body.requests"),
        ([{"user_id": "u"}] * (MAX_BATCH + 1), "body.requests"),
        ([{"user_id": "u"}, {"user_id": "u", "k": 0}], "body.requests.1.k"),
        ([{"user_id": "u"}, {}], "body.requests.1"),
    ],
)
def test_a_batch_with_something_wrong_is_refused_whole(
    retriever: Running, published: Published, requests: list[Any], location: str
) -> None:
    answer = post(retriever, "/v1/candidates:batch", {"requests": requests})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:streamtower:problem:invalid-request")
    assert [error["location"] for error in answer.json()["errors"]] == [location]


def test_a_batch_with_a_filter_that_qdrant_refuses_is_refused_whole(retriever: Running, published: Published) -> None:
    requests = [{"user_id": "u"}, {"user_id": "u", "filter": {"must": [{"key": "n"}]}}]
    answer = post(retriever, "/v1/candidates:batch", {"requests": requests})
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:streamtower:problem:filter-refused")


def similar_scores(published: Published, items: list[str], *, embedding: bool, covisit: bool) -> dict[str, float]:
    """Item → score, from the formula's parts."""
    rows = [published.item_ids.index(item) for item in items]
    embeddings = published.vectors[:, : CONFIG.embedding_dim].astype(np.float64)
    mean = embeddings[rows].mean(0)
    cosine = embeddings @ (mean / np.linalg.norm(mean))
    common = WEIGHTS["covisit_scale"] * published.covisits[:, rows].mean(1)
    scores = np.zeros(len(embeddings))
    if embedding:
        scores += WEIGHTS["embedding_weight"] * cosine / CONFIG.temperature
    if covisit:
        scores += WEIGHTS["covisit_weight"] * np.log1p(common)
    found = np.ones(len(scores), bool) if embedding else common > 0
    return {item: scores[row] for row, item in enumerate(published.item_ids) if found[row] and item not in items}


@pytest.mark.parametrize("items", [["item-4"], ["item-4", "item-8", "item-15"]])
@pytest.mark.parametrize(("by", "embedding", "covisit"), [("both", 1, 1), ("embedding", 1, 0), ("covisitation", 0, 1)])
def test_similar_items_are_the_exact_best_of_the_score_between_items(
    retriever: Running, published: Published, items: list[str], by: str, embedding: bool, covisit: bool
) -> None:
    scores = similar_scores(published, items, embedding=embedding, covisit=covisit)
    expected = sorted(scores.items(), key=lambda pair: -pair[1])
    answer = post(retriever, "/v1/similar", {"item_ids": [*items, items[0]], "by": by, "k": 60})
    assert answer.status_code == 200, answer.text
    assert_ranked(answer.json(), expected)
    assert answer.json()["model_version"] == 1
    odd = [(item, score) for item, score in expected if int(item[5:]) % 2]
    filtered = post(
        retriever, "/v1/similar", {"item_ids": items, "by": by, "k": 3, "filter": ODD, "with_payload": True}
    )
    assert_ranked(filtered.json(), odd[:3])
    assert {candidate["payload"]["parity"] for candidate in filtered.json()["candidates"]} == {"odd"}


def test_items_that_nobody_knows_are_a_problem_that_names_them(retriever: Running, published: Published) -> None:
    answer = post(retriever, "/v1/similar", {"item_ids": ["item-1", "nowhere", "item-2", "nor there"]})
    assert answer.status_code == 404
    assert answer.json() == {
        "type": "urn:streamtower:problem:unknown-items",
        "title": "The live index does not hold these items",
        "status": 404,
        "detail": "not in the live index: 'nowhere', 'nor there'",
        "errors": [
            {"location": "body.item_ids.1", "message": "unknown"},
            {"location": "body.item_ids.3", "message": "unknown"},
        ],
    }
    too_many = post(retriever, "/v1/similar", {"item_ids": [str(number) for number in range(MAX_SIMILAR + 1)]})
    assert (too_many.status_code, too_many.json()["errors"][0]["location"]) == (422, "body.item_ids")


def test_a_point_without_a_vector_is_no_item_that_others_can_be_like(
    retriever: Running, published: Published, publisher: Publisher
) -> None:
    """The point that tells of canaries has none."""
    canary = models.PointStruct(id=CANARY_HASH, vector={}, payload={EVENT_TIME: 1.0})
    publisher.client.upsert(published.manifest.collection, [canary], wait=True)
    answer = post(retriever, "/v1/similar", {"item_ids": ["item-1", CANARY_ID]})
    assert answer.status_code == 404, answer.text
    assert answer.json()["errors"] == [{"location": "body.item_ids.1", "message": "unknown"}]


@pytest.mark.parametrize(
    "request_",
    [
        {"history": ["item-3", "item-9"], "k": 20, "exclude_seen": False},
        {"history": ["item-3", "item-9"], "k": 20, "popularity": -0.7, "context": {"device": "phone"}},
        {"history": [], "k": 5},
        {"user_id": "u", "k": MAX_K, "filter": ODD, "with_payload": True},
    ],
)
def test_the_query_that_is_told_gives_the_same_candidates_with_the_same_scores(
    retriever: Running, published: Published, publisher: Publisher, request_: dict[str, Any]
) -> None:
    retriever.table.apply(click("u", "item-5", ["item-3", "item-4"], offset=0))
    told = retriever.ask(**request_)
    answer = post(retriever, "/v1/query", request_)
    assert answer.status_code == 200, answer.text
    ready = answer.json()
    assert ready["collection"] == published.manifest.collection
    assert ready["model_version"] == told["model_version"]
    assert (ready["user_known"], ready["history_source"], ready["history_length"]) == (
        told["user_known"], told["history_source"], told["history_length"],
    )  # fmt: skip
    query = models.QueryRequest.model_validate(ready["query"])  # forbids what Qdrant does not know
    sent = publisher.client.query_batch_points(ready["collection"], [query])[0].points
    assert [point.payload["item_id"] for point in sent if point.payload] == [item for item, _ in answered(told)]
    np.testing.assert_allclose([point.score for point in sent], [score for _, score in answered(told)], rtol=1e-5)
    raw = httpx.post(
        f"{url_of(publisher.client)}/collections/{ready['collection']}/points/query", json=ready["query"], timeout=30
    )
    assert [point["id"] for point in raw.json()["result"]["points"]] == [hash_id(item) for item, _ in answered(told)]


def url_of(client: QdrantClient) -> str:
    """Where the client sends its requests."""
    return str(client._client.rest_uri)  # type: ignore[attr-defined]


def test_without_a_version_nothing_of_this_is_answered(retriever: Running) -> None:
    for path, body in (
        ("/v1/candidates:batch", {"requests": [{"user_id": "u"}]}),
        ("/v1/query", {"user_id": "u"}),
        ("/v1/similar", {"item_ids": ["i"]}),
    ):
        answer = post(retriever, path, body)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:streamtower:problem:not-ready"), path
        assert answer.headers["retry-after"] == "1"
