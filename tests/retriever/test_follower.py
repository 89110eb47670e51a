"""HistoryFollower on a real broker: micro-batches by the codec, in; histories, out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions

from retriever.histories import HistoryFollower, HistoryTable
from retriever.metrics import Metrics
from streams.contract import MicroBatch, Topics, hash_id, hash_ids
from tests.fixtures.kafka import create_topics, topics_on
from tests.retriever.running import wait_until
from tests.retriever.test_histories import make_batch

pytestmark = pytest.mark.broker


def produce(
    kafka: str, topic: str, records: Sequence[tuple[int, bytes | None]], timestamp: float | None = None
) -> None:
    """Writes (partition, value) records; returns when the broker has them."""
    producer = Producer({"bootstrap.servers": kafka, "acks": "all"})
    for partition, value in records:
        extra = {} if timestamp is None else {"timestamp": round(1000 * timestamp)}
        producer.produce(topic, value, partition=partition, **extra)
    assert producer.flush(30) == 0


class Following:
    """A follower with its table and metrics."""

    def __init__(
        self,
        kafka: str,
        topics: Topics,
        lookback_seconds: float,
        clock: Callable[[], float],
        max_micro_batches: int = 1_000,
    ) -> None:
        self.table = HistoryTable(max_users=1_000, history_length=5)
        self.metrics = Metrics()
        self.crashes: list[BaseException] = []
        self.follower = HistoryFollower(
            self.table,
            self.metrics,
            kafka_config={"bootstrap.servers": kafka},
            topic=topics.micro_batches,
            lookback_seconds=lookback_seconds,
            max_micro_batches=max_micro_batches,
            partition_refresh_seconds=0.1,
            on_crash=self.crashes.append,
            clock=clock,
        )

    def items_of(self, user: str) -> list[int] | None:
        history = self.table.get(hash_id(user))
        return None if history is None else history.tolist()

    def wait_for(self, user: str, items: Sequence[str]) -> None:
        wait_until(lambda: self.items_of(user) == hash_ids(items).tolist(), f"{user} has clicked {items}")

    def value(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(f"streamtower_retriever_{name}", labels)
        assert found is not None, name
        return found


@contextmanager
def following(
    kafka: str,
    topics: Topics,
    lookback_seconds: float = 3_600,
    clock: Callable[[], float] = time.time,
    max_micro_batches: int = 1_000,
) -> Iterator[Following]:
    made = Following(kafka, topics, lookback_seconds, clock, max_micro_batches)
    made.follower.start()
    try:
        yield made
    finally:
        made.follower.stop()
    assert made.crashes == []


def test_a_click_is_known_soon_after_it_was_written(kafka: str, topics: Topics) -> None:
    with following(kafka, topics) as made:
        assert made.follower.caught_up.wait(20)
        for partition, user in enumerate("ab"):
            batch = make_batch([(user, "3")], [["1", "2"]], partition=partition)
            produce(kafka, topics.micro_batches, [(partition, batch.encode())])
            made.wait_for(user, ["1", "2", "3"])
        wait_until(lambda: made.value("micro_batches_total", outcome="applied") == 2, "both are counted")
        assert made.value("clicks_total") == made.value("users") == 2
        assert made.value("kafka_up") == 1
        wait_until(lambda: made.value("consumer_lag_messages") == 0, "no lag")


def test_what_was_written_before_is_read_from_the_start(kafka: str, topics: Topics) -> None:
    batches = [make_batch([("a", str(n))], [[str(n - 1)]], first_offset=n) for n in range(1, 40)]
    produce(kafka, topics.micro_batches, [(0, batch.encode()) for batch in batches])
    with following(kafka, topics) as made:
        assert made.follower.caught_up.wait(20)
        assert made.items_of("a") == hash_ids(["38", "39"]).tolist()
        assert made.value("clicks_total") == 39
        assert made.value("followed_click_timestamp_seconds") == 0  # the ingest time in these batches


def test_with_a_clock_that_has_jumped_back_before_all_clicks_they_are_all_read(kafka: str, topics: Topics) -> None:
    produce(kafka, topics.micro_batches, [(0, make_batch([("a", "2")], [["1"]]).encode())])
    with following(kafka, topics, clock=lambda: -1e9) as made:
        assert made.follower.caught_up.wait(20)
        assert made.items_of("a") == hash_ids(["1", "2"]).tolist()
        produce(kafka, topics.micro_batches, [(0, make_batch([("a", "3")], [["1", "2"]], first_offset=1).encode())])
        made.wait_for("a", ["1", "2", "3"])


def test_an_old_row_that_is_delivered_again_changes_nothing(kafka: str, topics: Topics) -> None:
    old = make_batch([("a", "1")], [[]], first_offset=0)
    new = make_batch([("a", "2")], [["1"]], first_offset=1)
    last = make_batch([("b", "9")], [[]], first_offset=2)
    produce(kafka, topics.micro_batches, [(0, batch.encode()) for batch in (old, new, old, new, last)])
    with following(kafka, topics) as made:
        made.wait_for("b", ["9"])
        assert made.items_of("a") == hash_ids(["1", "2"]).tolist()
        wait_until(lambda: made.value("micro_batches_total", outcome="old") == 2, "two were old")


def test_what_breaks_the_contract_is_counted_and_passed_over(kafka: str, topics: Topics) -> None:
    good = make_batch([("a", "1")], [[]])
    elsewhere = make_batch([("x", "1")], [[]], partition=1)
    cut = good.encode()[:-40]
    produce(
        kafka,
        topics.micro_batches,
        [(0, b"not arrow"), (0, None), (0, cut), (0, elsewhere.encode()), (0, good.encode())],
    )
    with following(kafka, topics) as made:
        made.wait_for("a", ["1"])
        assert made.value("micro_batches_total", outcome="rejected") == 4
        assert made.items_of("x") is None


@pytest.fixture
def apache_topics(apache_kafka: str) -> Iterator[Topics]:
    """Topics on Apache Kafka: the embedded broker looks no offset up by time, and adds no partition."""
    with topics_on(apache_kafka) as created:
        yield created


def test_only_the_lookback_is_read_at_start(apache_kafka: str, apache_topics: Topics) -> None:
    kafka, topics = apache_kafka, apache_topics
    now = time.time()
    for offset, (user, age) in enumerate([("long ago", 1_000.0), ("lately", 10.0)]):
        batch = make_batch([(user, "1")], [[]], first_offset=offset)
        produce(kafka, topics.micro_batches, [(0, batch.encode())], timestamp=now - age)
    with following(kafka, topics, lookback_seconds=100, clock=lambda: now) as made:
        made.wait_for("lately", ["1"])
        assert made.items_of("long ago") is None
    with following(kafka, topics, lookback_seconds=0, clock=lambda: now + 100) as made:
        assert made.follower.caught_up.wait(20)
        produce(kafka, topics.micro_batches, [(0, make_batch([("now", "1")], [[]], first_offset=2).encode())])
        made.wait_for("now", ["1"])
        assert made.items_of("lately") is None


def test_a_restart_is_caught_up_after_the_newest_micro_batches_and_knows_whole_histories(
    apache_kafka: str, apache_topics: Topics
) -> None:
    kafka, topics = apache_kafka, apache_topics
    batches = [make_batch([(f"u{n % 7}", str(n))], [[str(n - 14), str(n - 7)]], first_offset=n) for n in range(100)]
    produce(kafka, topics.micro_batches, [(0, batch.encode()) for batch in batches])
    produce(kafka, topics.micro_batches, [(1, make_batch([("v", "1")], [[]], partition=1).encode())])
    with following(kafka, topics, max_micro_batches=5) as made:
        assert made.follower.caught_up.wait(20)
        assert made.value("micro_batches_total", outcome="applied") == 5 + 1
        for n in range(95, 100):
            assert made.items_of(f"u{n % 7}") == hash_ids([str(n - 14), str(n - 7), str(n)]).tolist()
        assert made.items_of("v") == hash_ids(["1"]).tolist()
        assert made.value("users") == 6
        assert made.items_of(f"u{94 % 7}") is None, "their last click is in none of those"
        produce(kafka, topics.micro_batches, [(0, make_batch([("u3", "9")], [["1"]], first_offset=100).encode())])
        made.wait_for("u3", ["1", "9"])


class GrowingPartition:
    """A consumer's view of partitions that get another record after every question."""

    def __init__(self) -> None:
        self.end = 3

    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]:
        self.end += 1
        return 0, self.end - 1

    def offsets_for_times(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        self.end += 1
        return [TopicPartition(entry.topic, entry.partition, -1) for entry in partitions]  # none that young, it says


def test_a_record_written_while_the_start_is_looked_up_is_read() -> None:
    follower = Following("127.0.0.1:9", Topics("x"), 3_600, time.time).follower
    assert follower._positions_at(GrowingPartition(), [0, 1], time.time()) == {0: 3, 1: 4}


def test_no_more_than_the_newest_micro_batches_are_read_however_long_the_lookback() -> None:
    class Partition(GrowingPartition):
        def offsets_for_times(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
            return [TopicPartition(entry.topic, entry.partition, 0) for entry in partitions]

    for bound, first in ((1, 2), (2, 1), (1_000, 0)):
        follower = Following("127.0.0.1:9", Topics("x"), 3_600, time.time, bound).follower
        assert follower._positions_at(Partition(), [0], 0.0) == {0: first}


def test_a_topic_that_comes_later_is_followed(kafka: str, topics: Topics) -> None:
    later = Topics(topics.prefix + "later-")
    with following(kafka, later) as made:
        assert made.follower.caught_up.wait(20)  # nothing is there, so nothing is missed
        create_topics(kafka, {later.micro_batches: {}})
        produce(kafka, later.micro_batches, [(1, make_batch([("a", "1")], [[]], partition=1).encode())])
        made.wait_for("a", ["1"])


def test_partitions_that_come_later_are_followed_from_their_start(apache_kafka: str, apache_topics: Topics) -> None:
    kafka, topics = apache_kafka, apache_topics
    with following(kafka, topics) as made:
        produce(kafka, topics.micro_batches, [(0, make_batch([("a", "1")], [[]]).encode())])
        made.wait_for("a", ["1"])
        admin = AdminClient({"bootstrap.servers": kafka})
        admin.create_partitions([NewPartitions(topics.micro_batches, 3)])[topics.micro_batches].result(30)
        wait_until(
            lambda: (
                len(admin.list_topics(topics.micro_batches, timeout=10).topics[topics.micro_batches].partitions) == 3
            ),
            "three partitions",
        )
        produce(kafka, topics.micro_batches, [(2, make_batch([("b", "2")], [[]], partition=2).encode())])
        made.wait_for("b", ["2"])
        produce(kafka, topics.micro_batches, [(0, make_batch([("a", "2")], [["1"]], first_offset=1).encode())])
        made.wait_for("a", ["1", "2"])
        assert made.value("micro_batches_total", outcome="old") == 0


def test_a_dead_kafka_is_waited_for(topics: Topics) -> None:
    with following("127.0.0.1:9", topics) as made:
        wait_until(lambda: made.value("kafka_errors_total") >= 1, "the error is counted")
        assert made.value("kafka_up") == 0
        assert not made.follower.caught_up.is_set()


def test_a_fault_of_its_own_is_reported(kafka: str, topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: MicroBatch) -> tuple[int, int]:
        raise ZeroDivisionError

    made = Following(kafka, topics, 3_600, time.time)
    monkeypatch.setattr(made.table, "apply", fail)
    made.follower.start()
    produce(kafka, topics.micro_batches, [(0, make_batch([("a", "1")], [[]]).encode())])
    wait_until(lambda: made.crashes, "the crash is reported")
    assert isinstance(made.crashes[0], ZeroDivisionError)
    made.follower.stop()
