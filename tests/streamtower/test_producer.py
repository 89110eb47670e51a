"""The producer, on a real broker: what arrives, where, and what is said when it does not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from streams.contract import ClickEvent, ItemEvent, Topics
from streamtower.producer import ClickProducer, DeliveryError


def read_all(bootstrap: str, topic: str) -> list[Message]:
    """Every record of a topic of two partitions, in the partitions' order."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"{topic}-reader",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    found: dict[int, list[Message]] = {0: [], 1: []}
    ended: set[int] = set()
    consumer.assign([TopicPartition(topic, partition, 0) for partition in found])
    deadline = time.monotonic() + 20
    while ended < set(found):
        assert time.monotonic() < deadline, "the ends of the partitions did not come"
        for message in consumer.consume(1000, 0.2):
            if message.error() is None:
                found[message.partition()].append(message)
            else:
                assert message.error().code() == KafkaError._PARTITION_EOF
                ended.add(message.partition())
    consumer.close()
    return found[0] + found[1]


@pytest.mark.broker
def test_clicks_arrive_as_json_keyed_by_user_each_user_in_order(kafka: str, topics: Topics) -> None:
    with ClickProducer({"bootstrap.servers": kafka}, topics) as producer:
        for number in range(1_000):
            producer.produce(
                ClickEvent(f"user-{number % 7}", f"item-{number}", 1.5, context={"device": "phone"}, reward=2.0)
            )
    assert (producer.num_sent, producer.num_delivered, producer.num_failed) == (1_000, 1_000, 0)
    found = [(m.key(), m.partition(), json.loads(m.value())) for m in read_all(kafka, topics.clicks)]
    assert all(key.decode() == value["user_id"] for key, _, value in found)
    for user in range(7):
        mine = [(partition, value["item_id"]) for key, partition, value in found if key == b"user-%d" % user]
        assert len({partition for partition, _ in mine}) == 1
        assert [item for _, item in mine] == [f"item-{number}" for number in range(user, 1_000, 7)]
    assert found[0][2] | {"user_id": "", "item_id": ""} == {
        "user_id": "",
        "item_id": "",
        "event_time": 1.5,
        "reward": 2.0,
        "context": {"device": "phone"},
    }


@pytest.mark.broker
def test_a_key_goes_to_the_partition_that_the_java_client_would_choose(kafka: str, topics: Topics) -> None:
    """murmur2 of the key: 21 → −973932308, foobar → −790332482, as Kafka's own tests have it."""
    with ClickProducer({"bootstrap.servers": kafka}, topics) as producer:
        for user in ("21", "foobar"):
            producer.produce(ClickEvent(user, "x", 1.0))
    found = {message.key().decode(): message.partition() for message in read_all(kafka, topics.clicks)}
    assert found == {"21": (-973932308 & 0x7FFFFFFF) % 2, "foobar": (-790332482 & 0x7FFFFFFF) % 2}


@pytest.mark.broker
def test_items_arrive_keyed_by_item_and_a_removal_is_a_null(kafka: str, topics: Topics) -> None:
    with ClickProducer({"bootstrap.servers": kafka}, topics) as producer:
        producer.produce_item(ItemEvent("tea", {"colour": "green"}, {"stock": 3}))
        producer.flush()
        producer.remove_item("tea")
    found = [(message.key(), message.value()) for message in read_all(kafka, topics.items)]
    assert [key for key, _ in found] == [b"tea", b"tea"]
    assert json.loads(found[0][1]) == {"item_id": "tea", "features": {"colour": "green"}, "payload": {"stock": 3}}
    assert found[1][1] is None


@pytest.mark.broker
def test_a_full_queue_makes_the_caller_wait_and_loses_nothing(kafka: str, topics: Topics) -> None:
    config = {"bootstrap.servers": kafka, "queue.buffering.max.messages": 10}
    with ClickProducer(config, topics) as producer:
        for number in range(500):
            producer.produce(ClickEvent("anna", str(number), 1.0))
    assert producer.num_delivered == 500
    assert len(read_all(kafka, topics.clicks)) == 500


@pytest.mark.broker
def test_a_record_that_is_too_large_is_counted_and_the_others_go_on(kafka: str, topics: Topics) -> None:
    producer = ClickProducer({"bootstrap.servers": kafka}, topics)
    producer.produce(ClickEvent("anna", "x" * (5 << 20), 1.0))
    producer.produce(ClickEvent("anna", "y", 1.0))
    with pytest.raises(DeliveryError, match="1 of 2 records: 1 × MSG_SIZE_TOO_LARGE"):
        producer.flush()
    assert (producer.num_delivered, producer.num_failed) == (1, 1)
    assert len(read_all(kafka, topics.clicks)) == 1


def test_a_broker_that_is_away_fails_each_record_within_the_timeout() -> None:
    producer = ClickProducer({"bootstrap.servers": "127.0.0.1:1"}, delivery_timeout_seconds=0.3)
    producer.produce(ClickEvent("anna", "tea", 1.0))
    with pytest.raises(DeliveryError, match="1 of 1 records: 1 × _MSG_TIMED_OUT"):
        producer.flush()


def test_a_queue_that_stays_full_is_given_up() -> None:
    config = {"bootstrap.servers": "127.0.0.1:1", "queue.buffering.max.messages": 1, "delivery.timeout.ms": 60_000}
    producer = ClickProducer(config, delivery_timeout_seconds=0.2)
    producer.produce(ClickEvent("anna", "tea", 1.0))
    with pytest.raises(DeliveryError, match=r"full for 0\.2 s"):
        producer.produce(ClickEvent("anna", "cup", 1.0))


def test_an_error_inside_with_is_heard_and_not_that_of_the_flush() -> None:
    with pytest.raises(ZeroDivisionError), ClickProducer({"bootstrap.servers": "127.0.0.1:1"}) as producer:
        producer.produce(ClickEvent("anna", "tea", 1.0))
        raise ZeroDivisionError


@pytest.mark.broker
def test_what_the_readme_shows_in_python_sends_a_click_and_an_item(kafka: str, topics: Topics) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    place = '{"bootstrap.servers": "127.0.0.1:9092"}'
    assert place in shown
    exec(shown.replace(place, f'{{"bootstrap.servers": "{kafka}"}}, topics'), {"topics": topics})
    (click,) = read_all(kafka, topics.clicks)
    assert click.key() == b"1899"
    (click_event,) = re.findall(r"```json\n(.*?)```", readme, flags=re.DOTALL)
    assert json.loads(click.value()).keys() == json.loads(click_event).keys() - {"reward"}  # its default is left out
    (item,) = read_all(kafka, topics.items)
    assert json.loads(item.value())["payload"] == {"in_stock": True}
