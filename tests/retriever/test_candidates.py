"""POST /v1/candidates over real HTTP: answers are held to the formula of the score, by value."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retriever.contract import MAX_K
from retriever.fusion import MAX_OVERFETCH
from streams.contract import MicroBatch, hash_id, hash_ids
from tests.retriever.published import CONFIG, Published, Publisher
from tests.retriever.running import Running, Wire, wait_until

pytestmark = pytest.mark.index


def answered(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(candidate["item_id"], candidate["score"]) for candidate in answer["candidates"]]


def assert_ranked(answer: dict[str, Any], expected: list[tuple[str, float]]) -> None:
    assert [item for item, _ in answered(answer)] == [item for item, _ in expected]
    np.testing.assert_allclose([score for _, score in answered(answer)], [s for _, s in expected], rtol=1e-4, atol=1e-4)


def click(user_id: str, item_id: str, history: list[str], offset: int, partition: int = 0) -> MicroBatch:
    """A micro-batch of one click."""
    return MicroBatch(
        partition=partition,
        first_offset=offset,
        next_offset=offset + 1,
        offset=np.array([offset], np.int64),
        user_id=pa.array([user_id]),
        item_id=pa.array([item_id]),
        user_hash=hash_ids([user_id]),
        item_hash=hash_ids([item_id]),
        history_values=hash_ids(history),
        history_offsets=np.array([0, len(history)], np.int64),
        reward=np.ones(1, np.float32),
        event_time=np.array([time.time()]),
        ingest_time=np.array([time.time()]),
        sampling_probability=np.full(1, 0.01, np.float32),
    )


def test_candidates_are_the_exact_best_of_the_served_score(retriever: Running, published: Published) -> None:
    answer = retriever.ask(history=["item-3", "item-9"], exclude_seen=False, k=20)
    assert_ranked(answer, published.best(20, history=["item-3", "item-9"]))
    assert answer["model_version"] == 1
    assert (answer["user_known"], answer["history_source"], answer["history_length"]) == (None, "request", 2)


def test_a_version_whose_items_are_all_equally_long_gives_the_same_scores(
    retriever: Running, publisher: Publisher
) -> None:
    published = publisher.publish(1, length=3.0)
    retriever.wait_for_version(1)
    wanted = published.best(20, history=["item-3", "item-9"])
    answer = retriever.ask(history=["item-3", "item-9"], exclude_seen=False, k=20, explain=True)
    assert_ranked(answer, wanted)
    for candidate in answer["candidates"]:
        assert sum(candidate["explanation"].values()) == pytest.approx(candidate["score"], rel=1e-4, abs=1e-4)
    assert len(retriever.ask(history=["item-3"], k=20, diversity=0.5)["candidates"]) == 20
    similar = retriever.http.post("/v1/similar", json={"item_ids": ["item-3"], "k": 5})
    assert similar.status_code == 200 and len(similar.json()["candidates"]) == 5


def test_only_the_newest_items_that_the_tower_takes_count(retriever: Running, published: Published) -> None:
    history = [f"item-{number}" for number in range(30)]
    answer = retriever.ask(history=history, exclude_seen=False, k=5)
    assert_ranked(answer, published.best(5, history=history[-CONFIG.history_length :]))


def test_context_enters_the_query(retriever: Running, published: Published) -> None:
    context = {"device": "phone", "hour": 13, "watching": "item-7", "unheard_of": "x"}
    plain = published.best(10)
    assert_ranked(retriever.ask(history=[], context=context), published.best(10, context=context))
    assert plain != published.best(10, context=context)


@pytest.mark.parametrize("popularity", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_popularity_weighs_the_log_frequency(retriever: Running, published: Published, popularity: float) -> None:
    answer = retriever.ask(history=["item-1"], exclude_seen=False, popularity=popularity, k=60)
    assert_ranked(answer, published.best(60, history=["item-1"], popularity=popularity))


def test_popularity_changes_the_order(retriever: Running, published: Published) -> None:
    affinity, live = (
        [item for item, _ in answered(retriever.ask(history=["item-1"], popularity=popularity))]
        for popularity in (0, 1)
    )
    assert affinity == [item for item, _ in published.best(10, history=["item-1"], without=["item-1"], popularity=0)]
    assert affinity != live


def test_seen_items_are_left_out_and_k_is_still_full(retriever: Running, published: Published) -> None:
    history = [item for item, _ in published.best(10, history=[])]
    answer = retriever.ask(history=history, k=10)
    assert_ranked(answer, published.best(10, history=history[-CONFIG.history_length :], without=history))


def test_more_seen_items_than_are_overfetched_are_left_out_too(retriever: Running, published: Published) -> None:
    recent = [item for item, _ in published.best(10, history=[])]
    history = [str(number) for number in range(MAX_OVERFETCH)] + recent
    expected = published.best(10, history=history[-CONFIG.history_length :], without=history)
    assert_ranked(retriever.ask(history=history, k=10), expected)
    odd = [(item, score) for item, score in published.best(60, history=recent, without=recent) if int(item[5:]) % 2]
    only_odd = {"must": [{"key": "parity", "match": {"value": "odd"}}]}
    assert_ranked(retriever.ask(history=history, k=10, filter=only_odd), odd[:10])


def test_a_filter_is_qdrants_own(retriever: Running, published: Published) -> None:
    matching = {"must": [{"key": "parity", "match": {"value": "odd"}}, {"key": "n", "range": {"lt": 20}}]}
    answer = retriever.ask(history=[], filter=matching, k=15)
    odd = [(item, score) for item, score in published.best(60) if int(item[5:]) % 2 and int(item[5:]) < 20]
    assert_ranked(answer, odd)
    assert len(odd) == 10
    assert retriever.value("short_answers_total") == 1


def test_the_payload_comes_where_it_is_asked_for(retriever: Running, published: Published) -> None:
    bare = retriever.ask(history=[], k=3)["candidates"]
    full = retriever.ask(history=[], k=3, with_payload=True)["candidates"]
    assert all(set(candidate) == {"item_id", "score"} for candidate in bare)
    for candidate in full:
        number = int(candidate["item_id"].removeprefix("item-"))
        assert candidate["payload"] == {"parity": "odd" if number % 2 else "even", "n": number}


def test_qdrant_is_asked_over_kept_connections_for_plain_answers(
    retriever: Running, published: Published, wire: Wire
) -> None:
    heads, connections = wire.heads, wire.num_connections
    for _ in range(20):
        retriever.ask(history=[])
    assert wire.heads >= heads + 20
    assert wire.num_connections <= connections + 2


def test_a_cold_user_is_answered_by_popularity(retriever: Running, published: Published) -> None:
    answer = retriever.ask(user_id="nobody has seen me")
    assert_ranked(answer, published.best(10, user_id="nobody has seen me"))
    assert (answer["user_known"], answer["history_source"], answer["history_length"]) == (False, "none", 0)


def test_one_click_of_a_cold_user_moves_the_answer(retriever: Running, published: Published) -> None:
    context = {"device": "phone"}
    cold = retriever.ask(user_id="u", context=context)
    assert_ranked(cold, published.best(10, user_id="u", context=context))
    best = answered(cold)[0][0]
    retriever.table.apply(click("u", best, [], offset=0))
    moved = retriever.ask(user_id="u", context=context)
    assert_ranked(moved, published.best(10, user_id="u", context=context, history=[best], without=[best]))
    assert [item for item, _ in answered(moved)][:9] != [item for item, _ in answered(cold)][1:], (
        "not the seen one alone"
    )


def test_the_followed_history_counts_and_is_excluded(retriever: Running, published: Published) -> None:
    retriever.table.apply(click("u", "item-5", ["item-3", "item-4"], offset=0))
    answer = retriever.ask(user_id="u")
    clicked = ["item-3", "item-4", "item-5"]
    assert_ranked(answer, published.best(10, user_id="u", history=clicked, without=clicked))
    assert (answer["user_known"], answer["history_source"], answer["history_length"]) == (True, "followed", 3)


def test_the_requests_history_wins_over_the_followed_one(retriever: Running, published: Published) -> None:
    retriever.table.apply(click("u", "item-5", ["item-3", "item-4"], offset=0))
    answer = retriever.ask(user_id="u", history=["item-20"])
    assert_ranked(answer, published.best(10, user_id="u", history=["item-20"], without=["item-20"]))
    assert (answer["user_known"], answer["history_source"], answer["history_length"]) == (True, "request", 1)


def test_numbers_as_ids_are_taken_as_their_text(retriever: Running, published: Published) -> None:
    assert retriever.ask(user_id=17) == retriever.ask(user_id="17")
    assert retriever.ask(history=[4, 5]) == retriever.ask(history=["4", "5"])


def test_history_is_told_with_item_ids(retriever: Running, published: Published) -> None:
    retriever.table.apply(click("a/b\nü", "item-5", ["item-3", "not in the index"], offset=0))
    answer = retriever.http.get("/v1/users/a%2Fb%0A%C3%BC/history")
    assert answer.json() == {"user_id": "a/b\nü", "known": True, "items": ["item-3", None, "item-5"]}
    unknown = retriever.http.get("/v1/users/someone/history")
    assert unknown.json() == {"user_id": "someone", "known": False, "items": []}


def test_the_version_is_told(retriever: Running, published: Published) -> None:
    manifest = published.manifest
    assert retriever.http.get("/v1/version").json() == {
        "model_version": 1,
        "collection": manifest.collection,
        "created_at": manifest.created_at,
        "step": 100,
        "num_items": 60,
        "embedding_dim": 8,
        "context": ["device", "hour", "watching"],
    }


def test_the_largest_k_gives_every_item(retriever: Running, published: Published) -> None:
    assert_ranked(retriever.ask(history=[], k=MAX_K), published.best(60))


def test_points_without_an_item_id_are_left_out_and_counted(
    retriever: Running, published: Published, publisher: Publisher
) -> None:
    best, runner_up = (item for item, _ in published.best(2))
    publisher.client.overwrite_payload(
        published.manifest.collection, payload={"foreign": True}, points=[hash_id(best)], wait=True
    )
    assert retriever.ask(history=[], k=1)["candidates"] == []
    assert answered(retriever.ask(history=[], k=2))[0][0] == runner_up
    assert retriever.value("foreign_points_total") == 2


def test_every_stage_of_an_answer_is_measured(retriever: Running, published: Published) -> None:
    retriever.ask(history=["item-1"])
    retriever.ask(user_id="x")
    retriever.http.post("/v1/candidates", json={})
    for stage in ("encode", "search", "whole"):
        assert retriever.value("request_seconds_count", stage=stage) == 2
    assert retriever.value("request_seconds_bucket", stage="whole", le="0.025") <= 2
    assert retriever.value("queries_total", history="request") == 1
    assert retriever.value("queries_total", history="none") == 1
    assert retriever.value("candidates_total") == 20
    wait_until(lambda: retriever.value("requests_total", route="candidates", code="2xx") == 2, "both are counted")
    assert retriever.value("requests_total", route="candidates", code="4xx") == 1


def test_without_a_version_the_answer_says_so(retriever: Running) -> None:
    for method, path in (("POST", "/v1/candidates"), ("GET", "/v1/version"), ("GET", "/readyz")):
        answer = retriever.http.request(method, path, json={"user_id": "u"})
        assert answer.status_code == 503
        assert "no version published yet" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "1"
    assert retriever.http.get("/healthz").json() == {"status": "alive"}


def test_a_dead_qdrant_is_a_503_and_then_forgotten(retriever: Running, published: Published, wire: Wire) -> None:
    assert retriever.http.get("/readyz").json() == {"status": "ready"}
    before = retriever.ask(history=["item-1"])
    wire.cut()
    answer = retriever.http.post("/v1/candidates", json={"history": ["item-1"]})
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:streamtower:problem:index-unavailable"
    assert answer.headers["retry-after"] == "1"
    assert retriever.value("qdrant_retries_total") >= 1
    wait_until(lambda: retriever.http.get("/readyz").status_code == 503, "not ready without Qdrant")
    assert "Qdrant did not answer within 1 s" in retriever.http.get("/readyz").json()["detail"]
    assert retriever.http.get("/healthz").status_code == 200
    assert retriever.value("qdrant_up") == 0
    wire.join()
    assert retriever.ask(history=["item-1"]) == before
    wait_until(lambda: retriever.http.get("/readyz").status_code == 200, "ready again")
    assert retriever.value("qdrant_up") == 1
