"""The Kafka source on a real broker: order, positions, bad records, absence."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from streams.contract import ItemEvent, MicroBatch, Topics, encode_event
from tests.trainer.streams_of_clicks import click_stream, micro_batch
from trainer.item_events import ItemChange
from trainer.metrics import Metrics
from trainer.progress import Positions
from trainer.source import (
    BrokenRecordError,
    Delivery,
    ForeignTopicError,
    KafkaSource,
    Poll,
    RetentionExpiredError,
    SourceAwayError,
)

pytestmark = pytest.mark.broker
DEADLINE_SECONDS = 60.0


class Broker:
    """Writes into one test's topics."""

    def __init__(self, bootstrap: str, topics: Topics) -> None:
        self.bootstrap, self.topics = bootstrap, topics
        self._producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})

    def send(self, topic: str, value: bytes | None, *, key: bytes | None = None, partition: int = 0) -> None:
        self._producer.produce(topic, value, key, partition)
        assert self._producer.flush(DEADLINE_SECONDS) == 0

    def item(self, item_id: str, *, partition: int = 0) -> None:
        self.send(self.topics.items, encode_event(ItemEvent(item_id)), key=item_id.encode(), partition=partition)

    def batch(self, batch: MicroBatch) -> None:
        self.send(self.topics.micro_batches, batch.encode(), partition=batch.partition)


@pytest.fixture
def broker(kafka: str, topics: Topics) -> Broker:
    return Broker(kafka, topics)


@pytest.fixture
def new_source(broker: Broker) -> Iterator[Callable[..., KafkaSource]]:
    made: list[KafkaSource] = []

    def make(
        topics: Topics = broker.topics, deadline_seconds: float = DEADLINE_SECONDS, **settings: Any
    ) -> KafkaSource:
        config: dict[str, Any] = {"bootstrap.servers": broker.bootstrap}
        made.append(KafkaSource(config, topics, Metrics(), deadline_seconds=deadline_seconds, **settings))
        return made[-1]

    yield make
    for source in made:
        source.close()


def read(source: KafkaSource, until: Callable[[list[Poll]], object]) -> list[Poll]:
    deadline, polls = time.monotonic() + DEADLINE_SECONDS, [Poll()]
    while not until(polls):
        assert time.monotonic() < deadline, f"only {[poll for poll in polls if poll != Poll()][-10:]}"
        polls.append(source.poll(0.05))
    return polls


def deliveries(polls: list[Poll]) -> list[Delivery]:
    return [delivery for poll in polls for delivery in poll.deliveries]


def items(polls: list[Poll]) -> list[ItemChange]:
    return [change for poll in polls for change in poll.items]


def test_micro_batches_come_in_order_with_the_position_behind_them(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    written = [*click_stream(3), *click_stream(2, partition=1)]
    for batch in written:
        broker.batch(batch)
    source = new_source()
    source.start(Positions())
    got = deliveries(read(source, lambda polls: len(deliveries(polls)) == 5))
    for partition, positions in ((0, [1, 2, 3]), (1, [1, 2])):
        mine = [delivery for delivery in got if delivery.batch.partition == partition]
        assert [delivery.next_position for delivery in mine] == positions
        wanted = [batch.encode() for batch in written if batch.partition == partition]
        assert [delivery.batch.encode() for delivery in mine] == wanted
    assert source.lag() == 0


def test_items_of_the_start_are_here_before_the_first_micro_batch(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    broker.batch(micro_batch(["a"]))
    for number in range(300):
        broker._producer.produce(broker.topics.items, encode_event(ItemEvent(f"i{number}")), f"i{number}", number % 2)
    assert broker._producer.flush(DEADLINE_SECONDS) == 0
    source = new_source()
    source.start(Positions())
    polls = read(source, deliveries)
    first = next(place for place, poll in enumerate(polls) if poll.deliveries)
    assert len(items(polls[:first])) == 300
    loading = [poll.loading for poll in polls[1:first]]
    assert loading == sorted(loading, reverse=True) and loading[0] and not polls[first].loading
    broker.item("later")
    polls = read(source, items)
    assert items(polls) == [ItemChange("later")] and polls[-1].item_positions == {0: 151}


def test_reading_resumes_at_the_positions_of_the_checkpoint(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    for batch in click_stream(4):
        broker.batch(batch)
    for name in ("a", "b", "c"):
        broker.item(name, partition=1)
    source = new_source()
    source.start(Positions({0: 2}, {1: 2}))
    polls = read(source, lambda polls: len(deliveries(polls)) == 2)
    assert [delivery.batch.first_offset for delivery in deliveries(polls)] == [32, 48]
    assert [change.item_id for change in items(polls)] == ["c"]


def test_an_empty_broker_is_no_reason_to_wait(broker: Broker, new_source: Callable[..., KafkaSource]) -> None:
    source = new_source()
    source.start(Positions())
    read(source, lambda polls: not polls[-1].loading and len(polls) > 1)
    broker.batch(micro_batch(["a"], partition=1))
    assert len(deliveries(read(source, deliveries))) == 1


def test_bad_item_events_are_counted_and_passed_over(broker: Broker, new_source: Callable[..., KafkaSource]) -> None:
    broker.send(broker.topics.items, b"{", key=b"a")
    broker.send(broker.topics.items, None, key=b"gone")
    broker.item("good")
    source = new_source()
    source.start(Positions())
    polls = read(source, lambda polls: len(items(polls)) == 2)
    assert items(polls) == [ItemChange("gone", gone=True), ItemChange("good")]
    registry = source._metrics.registry
    assert registry.get_sample_value("streamtower_trainer_item_events_rejected_total") == 1


@pytest.mark.parametrize("record", [b"no arrow", b"", None])
def test_a_broken_micro_batch_ends_the_work_and_says_where(
    broker: Broker, new_source: Callable[..., KafkaSource], record: bytes | None
) -> None:
    broker.send(broker.topics.micro_batches, record)
    source = new_source()
    source.start(Positions())
    with pytest.raises(BrokenRecordError, match=r"micro-batches\[0\]@0"):
        read(source, lambda polls: False)


def test_a_micro_batch_in_the_wrong_partition_ends_the_work(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    broker.send(broker.topics.micro_batches, micro_batch(["a"], partition=5).encode())
    source = new_source()
    source.start(Positions())
    with pytest.raises(BrokenRecordError, match="partition 5"):
        read(source, lambda polls: False)


def test_positions_in_a_topic_that_was_made_anew_are_forgotten(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    positions = Positions()
    new_source().start(positions)
    assert positions.topic_ids.keys() == {broker.topics.clicks, broker.topics.micro_batches, broker.topics.items}
    positions.micro_batches, positions.items = {0: 7}, {0: 0}
    positions.topic_ids[broker.topics.micro_batches] = "that of another one"
    broker.batch(micro_batch(["a"]))
    source = new_source()
    source.start(positions)
    assert positions.micro_batches == {} and positions.items == {0: 0}
    assert len(deliveries(read(source, deliveries))) == 1


def test_an_end_of_the_items_topic_that_is_never_told_does_not_hold_up_the_clicks(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    broker.batch(micro_batch(["a"]))
    source = new_source()
    source.start(Positions(items={0: 99}))
    assert len(deliveries(read(source, deliveries))) == 1


def test_offsets_of_other_clicks_are_no_offsets_of_these(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    positions = Positions()
    new_source().start(positions)
    positions.topic_ids[broker.topics.clicks] = "that of another one"
    with pytest.raises(ForeignTopicError, match="clicks was made anew"):
        new_source().start(positions)


def test_one_that_begins_in_the_past_is_loading_until_what_was_there_is_given_out(
    broker: Broker, new_source: Callable[..., KafkaSource]
) -> None:
    for batch in click_stream(4):
        broker.batch(batch)
    source = new_source(learn_from={0: 20})
    source.start(Positions())
    polls = read(source, lambda polls: len(deliveries(polls)) == 4)
    assert all(poll.loading for poll in polls[1:])  # what the last one gave out is not learnt yet
    assert not source.poll(0.05).loading


@pytest.mark.parametrize("retention_expired", ["fail", "earliest"])
def test_clicks_to_begin_with_that_are_in_no_micro_batch_are_a_gap(
    broker: Broker, new_source: Callable[..., KafkaSource], retention_expired: str
) -> None:
    broker.batch(click_stream(4)[2])
    source = new_source(learn_from={0: 20}, retention_expired=retention_expired)
    source.start(Positions())
    if retention_expired == "fail":
        with pytest.raises(RetentionExpiredError, match="clicks 20 … 31 of partition 0 were to be learnt"):
            read(source, deliveries)
    else:
        assert [delivery.batch.first_offset for delivery in deliveries(read(source, deliveries))] == [32]


def test_missing_topics_are_waited_for_until_the_deadline(new_source: Callable[..., KafkaSource]) -> None:
    source = new_source(Topics("nobody-made-"), deadline_seconds=0.5)
    with pytest.raises(SourceAwayError, match="no topic nobody-made-clicks"):
        source.start(Positions())


def test_lag_is_what_was_not_given_out(broker: Broker, new_source: Callable[..., KafkaSource]) -> None:
    source = new_source()
    for batch in click_stream(2):
        broker.batch(batch)
    source.start(Positions())
    read(source, lambda polls: len(deliveries(polls)) == 2)
    for batch in click_stream(5)[2:]:
        broker.batch(batch)
    read(source, lambda polls: len(deliveries(polls)) == 3)
    assert source.lag() == 0


def test_shown_positions_can_be_seen_in_kafka(broker: Broker, new_source: Callable[..., KafkaSource]) -> None:
    broker.batch(micro_batch(["a"]))
    source = new_source()
    source.start(Positions())
    read(source, deliveries)
    group = f"{broker.topics.prefix}trainer"
    watcher = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": group})
    place = TopicPartition(broker.topics.micro_batches, 0)
    deadline = time.monotonic() + DEADLINE_SECONDS
    source.show_positions({0: 1})
    while watcher.committed([place], timeout=10)[0].offset != 1:
        assert time.monotonic() < deadline
        source.poll(0.05)
    watcher.close()


def test_a_broker_that_died_is_reported_after_the_deadline(topics: Topics) -> None:
    dev = pytest.importorskip("streamtower.dev.broker")
    from tests.fixtures.kafka import create_topics

    with dev.LocalBroker(port=0) as local:
        create_topics(local.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.items: {}})
        source = KafkaSource({"bootstrap.servers": local.bootstrap}, topics, Metrics(), deadline_seconds=3.0)
        source.start(Positions())
        source.poll(0.1)
        local.stop()
        with pytest.raises(SourceAwayError, match="no answer from Kafka for 3 s"):
            read(source, lambda polls: False)
        assert source._metrics.registry.get_sample_value("streamtower_trainer_kafka_up") == 0
        source.close()


def test_at_the_end_a_kafka_that_is_away_is_not_waited_for_whatever_answer_it_owes(topics: Topics) -> None:
    dev = pytest.importorskip("streamtower.dev.broker")
    from tests.fixtures.kafka import create_topics

    with dev.LocalBroker(port=0) as server:
        create_topics(server.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.items: {}})
        source = KafkaSource({"bootstrap.servers": server.bootstrap}, topics, Metrics(), deadline_seconds=60)
        source.start(Positions())
        Broker(server.bootstrap, topics).batch(micro_batch(["a"]))
        read(source, lambda polls: deliveries(polls))
        wait_until_shown(source, server.bootstrap, topics, 1)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            source.show_positions({0: 2})
            closing = threading.Thread(target=source.close, daemon=True)
            closing.start()
            closing.join(20)
            assert not closing.is_alive()
        finally:
            os.kill(server.pid, signal.SIGCONT)


def wait_until_shown(source: KafkaSource, bootstrap: str, topics: Topics, position: int) -> None:
    watcher = Consumer({"bootstrap.servers": bootstrap, "group.id": f"{topics.prefix}trainer"})
    place, deadline = TopicPartition(topics.micro_batches, 0), time.monotonic() + DEADLINE_SECONDS
    source.show_positions({0: position})
    while watcher.committed([place], timeout=10)[0].offset != position:
        assert time.monotonic() < deadline
        source.poll(0.05)
    watcher.close()
