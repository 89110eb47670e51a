"""The whole chain as processes, on a real broker and a real index: from a click in Kafka to a candidate."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from qdrant_client import QdrantClient, models

from streams.contract import ClickEvent, ItemEvent, hash_id, hash_ids
from streamtower.asking import ask, lines_for
from streamtower.datasets.clicks import Dataset
from streamtower.figures import Figures, figures
from streamtower.producer import ClickProducer
from streamtower.stack import Servers, Stack
from streamtower.watch import Watch
from tests.fixtures.kafka import topics_on
from tests.fixtures.qdrant import names_of_its_own
from trainer.contract import (
    COVISIT,
    DENSE,
    ITEM_ID,
    QUERY_TOWER_FILE,
    covisit_query,
    covisit_weight,
    load_manifest,
    query_vector,
    version_directory,
)

pytestmark = [pytest.mark.broker, pytest.mark.index, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_ITEMS = 60
COLOURS = ("red", "green", "blue")
DATASET = Dataset(
    name="test",
    num_clicks=0,
    clicks=lambda: iter(()),
    items=lambda: (
        ItemEvent(f"item-{n}", {"colour": COLOURS[n % 3]}, {"colour": COLOURS[n % 3], "number": n})
        for n in range(NUM_ITEMS)
    ),
    context_features={"device": "categorical"},
    item_features={"colour": "categorical"},
    num_items=NUM_ITEMS,
)
# Everything happens in seconds here; what the settings do is tested with the services.
QUICK = {
    "STREAMTOWER_TRAINER_PUBLISH_INTERVAL_SECONDS": "0.2",
    "STREAMTOWER_RETRIEVER_VERSION_POLL_SECONDS": "0.1",
}


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """The first truthy answer of `condition`; fails the test when none comes."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return answer


class Chain:
    """A running stack, and what the tests do with it."""

    def __init__(self, stack: Stack, model_dir: Path) -> None:
        self.stack = stack
        self.model_dir = model_dir
        self.qdrant = QdrantClient(stack.qdrant, headers={"accept-encoding": "identity"})
        self.watch = Watch(stack.metrics_urls())
        self.num_accepted = 0

    def click(self, clicks: Sequence[tuple[str, str]]) -> None:
        """Sends clicks (user, item) that happen now."""
        with ClickProducer({"bootstrap.servers": self.stack.kafka}, self.stack.topics) as producer:
            for user_id, item_id in clicks:
                producer.produce(ClickEvent(user_id, item_id, time.time(), context={"device": "phone"}))
        self.num_accepted += len(clicks)

    def figures(self) -> Figures:
        self.stack.check()
        return figures(self.watch.read())

    def wait_learnt(self) -> None:
        """Until every click that was sent and is a click has been learnt."""
        wait_until(lambda: self.figures().clicks_learnt == self.num_accepted, "all clicks are learnt")

    def candidates(self, **body: Any) -> dict[str, Any]:
        return ask(self.stack.retriever, "/v1/candidates", body)

    def ids(self, **body: Any) -> list[str]:
        return [candidate["item_id"] for candidate in self.candidates(**body)["candidates"]]

    def history(self, user_id: str) -> list[str]:
        items: list[str] = ask(self.stack.retriever, f"/v1/users/{user_id}/history")["items"]
        return items


@pytest.fixture(scope="module", params=["kafka", "apache_kafka"])
def chain(request: pytest.FixtureRequest, qdrant_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """All three services at work, 60 items known, and 1,200 clicks of 40 users learnt, each on items of one colour.

    On the embedded broker, or the one that is named, and on Apache Kafka where there is one.
    """
    kafka = request.getfixturevalue(request.param)
    directory = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch, topics_on(kafka) as topics, names_of_its_own(qdrant_url) as alias:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        servers = Servers(kafka=kafka, qdrant=qdrant_url, topic_prefix=topics.prefix, alias=alias)
        with Stack(servers, directory, DATASET, tell=lambda line: None) as stack:
            stack.wait_listening()
            with ClickProducer({"bootstrap.servers": kafka}, topics) as producer:
                for item in DATASET.items():
                    producer.produce_item(item)
            for service in ("streams", "trainer", "retriever"):
                stack.wait_ready(service)
            chain = Chain(stack, directory / "models")
            rng = np.random.default_rng(0)
            picks = rng.integers(NUM_ITEMS // 3, size=1_200)
            chain.click([(f"user-{n % 40}", f"item-{3 * pick + n % 40 % 3}") for n, pick in enumerate(picks)])
            chain.wait_learnt()
            yield chain
            chain.qdrant.close()
            chain.watch.close()


def test_a_user_gets_candidates_of_their_colour_and_none_that_they_have_seen(chain: Chain) -> None:
    wait_until(lambda: chain.history("user-3"), "the history is followed")
    answer = chain.candidates(user_id="user-3", k=10, with_payload=True)
    assert (answer["history_source"], answer["user_known"]) == ("followed", True)
    assert len(answer["candidates"]) == 10
    scores = [candidate["score"] for candidate in answer["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert not {candidate["item_id"] for candidate in answer["candidates"]} & set(chain.history("user-3"))
    green = chain.candidates(
        user_id="user-3",
        k=NUM_ITEMS,
        exclude_seen=False,
        filter={"must": [{"key": "colour", "match": {"value": "green"}}]},
        with_payload=True,
    )
    assert {candidate["payload"]["number"] % 3 for candidate in green["candidates"]} == {1}
    assert len(green["candidates"]) == NUM_ITEMS // 3


def test_any_qdrant_client_with_the_query_gets_the_same_candidates(chain: Chain) -> None:
    from trainer.towers import TowerConfig, load_query_tower, query_inputs

    history = ["item-0", "item-3", "item-9"]
    wait_until(lambda: chain.figures().index_version >= 1, "a version is live")
    for _ in range(5):  # a new version may go live between the two questions: then ask again
        answer = chain.candidates(history=history, k=20, exclude_seen=False, popularity=0.5)
        directory = version_directory(chain.model_dir, answer["model_version"])
        manifest = load_manifest(directory)
        config = TowerConfig.from_dict(manifest.towers)
        tower = load_query_tower(directory / QUERY_TOWER_FILE, config)
        hashes = hash_ids(history)
        inputs = query_inputs(config, hash_ids(["nobody"]), hashes, np.array([0, len(hashes)]), {})
        vector = query_vector(manifest, tower(inputs)[0].tolist(), 0.5, len(history))
        indices, values = covisit_query(manifest, hashes.tolist())
        sparse = models.SparseVector(indices=indices, values=values)
        best = [
            models.Prefetch(query=vector, using=DENSE, limit=500),
            models.Prefetch(query=sparse, using=COVISIT, limit=500),
        ]
        logarithm = models.LnExpression(ln=models.SumExpression(sum=[1.0, "$score[1]"]))
        weighed = models.MultExpression(mult=[covisit_weight(manifest, len(history)), logarithm])
        found = chain.qdrant.query_points(
            manifest.collection,
            prefetch=[
                models.Prefetch(prefetch=best, query=vector, using=DENSE, limit=1_000),
                models.Prefetch(prefetch=best, query=sparse, using=COVISIT, limit=1_000),
            ],
            query=models.FormulaQuery(
                formula=models.SumExpression(sum=["$score[0]", weighed]), defaults={"$score[1]": 0.0}
            ),
            limit=20,
            with_payload=[ITEM_ID],
        ).points
        same = [candidate["item_id"] for candidate in answer["candidates"]] == [p.payload[ITEM_ID] for p in found]
        if same:
            break
    assert same
    assert [p.score for p in found] == pytest.approx([c["score"] for c in answer["candidates"]], abs=1e-4)


def test_a_canary_measures_the_whole_way_from_outside_and_leaves_no_trace(chain: Chain) -> None:
    servers = chain.stack.servers
    command = [sys.executable, "-m", "streamtower", "canary", "--count", "3", "--every", "0.1", "--json"]
    where = ["--kafka", chain.stack.kafka, "--topic-prefix", servers.topic_prefix]
    where += ["--qdrant", chain.stack.qdrant, "--alias", servers.alias]
    known = chain.candidates(history=["item-1"], k=1_000, exclude_seen=False)["candidates"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    probes = [json.loads(line) for line in done.stdout.splitlines()]
    assert [probe["partition"] for probe in probes] in ([0, 1, 0], [0, 0, 0])
    assert all(0 < probe["seconds"] < 60 for probe in probes)
    chain.wait_learnt()  # as many as without the canaries
    found = chain.candidates(history=["item-1"], k=1_000, exclude_seen=False)["candidates"]
    assert {candidate["item_id"] for candidate in found} == {candidate["item_id"] for candidate in known}


def test_the_lines_that_the_demo_shows_work_as_they_are(chain: Chain) -> None:
    wait_until(lambda: chain.history("user-5"), "the history is followed")
    lines = lines_for(chain.stack.retriever, chain.stack.qdrant, chain.stack.servers.alias, "user-5", "item-7")
    shell = subprocess.run(lines["curl"], shell=True, capture_output=True, text=True, check=True, timeout=30)
    answer = json.loads(shell.stdout)
    assert len(answer["candidates"]) == 5
    assert set(answer["candidates"][0]["payload"]) >= {"colour", "number"}

    def told() -> list[str]:
        line = lines["streamtower"]
        out = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=60).stdout
        return [row.split()[1] for row in out.splitlines()]

    # Between the two the index may have moved on.
    wait_until(lambda: told() == chain.ids(user_id="user-5", k=5), "the command tells what the service answers")

    python = subprocess.run([sys.executable, "-c", lines["python"]], capture_output=True, text=True, timeout=30)
    assert python.returncode == 0, python.stderr
    neighbours = [line.split()[1] for line in python.stdout.splitlines()]
    assert len(neighbours) == 5
    assert set(neighbours) <= {f"item-{n}" for n in range(NUM_ITEMS)}


def test_a_click_of_a_new_user_on_a_new_item_is_servable(chain: Chain) -> None:
    chain.click([("newcomer", "item-new")])
    wait_until(lambda: chain.history("newcomer") == ["item-new"], "the click counts in the user's history, by its id")
    points = chain.qdrant.retrieve(chain.stack.servers.alias, [hash_id("item-new")], with_payload=True)
    assert [point.payload[ITEM_ID] for point in points] == ["item-new"]
    everything = chain.ids(user_id="newcomer", k=1000, exclude_seen=False)
    assert sorted(everything) == sorted({*everything} | {"item-new"})
    assert len(everything) >= NUM_ITEMS + 1
    assert "item-new" not in chain.ids(user_id="newcomer", k=1000)
    assert "item-new" in chain.ids(user_id="user-1", k=1000, popularity=0)


def test_an_item_that_is_gone_is_no_candidate_any_more(chain: Chain) -> None:
    with ClickProducer({"bootstrap.servers": chain.stack.kafka}, chain.stack.topics) as producer:
        producer.remove_item("item-59")
    wait_until(lambda: "item-59" not in chain.ids(history=[], k=1000), "the item has left the index")


MALFORMED: dict[str, tuple[bytes | None, str]] = {
    "bad JSON": (b'{"user_id": "anna", ', "not_json"),
    "a wrong type of id": (b'{"user_id": {"id": 1}, "item_id": "tea", "event_time": 1}', "bad_id"),
    "a wrong type of reward": (b'{"user_id": "a", "item_id": "b", "event_time": 1, "reward": "much"}', "bad_reward"),
    "a missing user": (b'{"item_id": "tea", "event_time": 1}', "missing_field"),
    "a missing item": (b'{"user_id": "anna", "event_time": 1}', "missing_field"),
    "null": (None, "null_value"),
    "no object": (b"[1, 2]", "not_an_object"),
    "2 MB": (b'{"user_id": "anna", "item_id": "' + b"x" * (2 << 20) + b'", "event_time": 1}', "too_large"),
    "not UTF-8": (b'{"user_id": "\xff\xfe", "item_id": "tea", "event_time": 1}', "not_utf8"),
    "a time that is not a number": (b'{"user_id": "anna", "item_id": "tea", "event_time": NaN}', "bad_time"),
    "a time in words": (b'{"user_id": "anna", "item_id": "tea", "event_time": "noon"}', "bad_time"),
}


def test_malformed_clicks_become_dead_letters_with_their_reason_and_nothing_stops(chain: Chain) -> None:
    topics, bootstrap = chain.stack.topics, chain.stack.kafka
    before = chain.figures().clicks_dead_lettered
    producer = Producer({"bootstrap.servers": bootstrap, "message.max.bytes": 4 << 20, "log_level": 2})
    sent: dict[bytes, tuple[bytes | None, str]] = {}
    for name, (value, reason) in MALFORMED.items():
        sent[name.encode()] = (value, reason)
        producer.produce(topics.clicks, value, name.encode())
        chain.click([("after", "item-1")])  # each bad one is between two good ones
    assert producer.flush(30) == 0
    wait_until(lambda: chain.figures().clicks_dead_lettered >= before + len(MALFORMED), "all are dead letters")
    chain.wait_learnt()

    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"{topics.prefix}reader"})
    consumer.assign([TopicPartition(topics.dead_letters, partition, 0) for partition in range(2)])
    found: dict[bytes, tuple[bytes | None, str]] = {}

    def read() -> bool:
        for message in consumer.consume(100, 0.2):
            assert message.error() is None, message.error()
            headers = dict(message.headers())
            assert headers["topic"].decode() == topics.clicks
            assert int(headers["offset"]) >= 0
            found[message.key()] = (message.value(), headers["reason"].decode())
        return len(found) >= len(sent)

    wait_until(read, "all dead letters are read")
    consumer.close()
    assert found == sent
    chain.stack.check()
