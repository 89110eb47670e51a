"""The broker fixtures do what the other tests rely on."""

from __future__ import annotations

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from tests.fixtures.kafka import topics_on

pytestmark = pytest.mark.broker


def _use_and_leave(bootstrap: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    with topics_on(bootstrap) as topics:
        names = {topics.clicks, topics.items, topics.dead_letters, topics.micro_batches}
        known = admin.list_topics(timeout=10).topics
        assert {name: len(known[name].partitions) for name in names} == dict.fromkeys(names, 2)
        producer = Producer({"bootstrap.servers": bootstrap, "message.max.bytes": 4 << 20})
        failures = []
        producer.produce(topics.clicks, bytes(2_000_000), partition=0, callback=lambda error, _: failures.append(error))
        assert producer.flush(20) == 0
        assert failures == [None]
        consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"{topics.prefix}group",
                "auto.offset.reset": "earliest",
                "session.timeout.ms": 6000,
            }
        )
        consumer.subscribe([topics.clicks])
        record = consumer.poll(20)
        assert record is not None
        assert record.error() is None
        consumer.commit(record, asynchronous=False)
        consumer.close()
    assert not names & set(admin.list_topics(timeout=10).topics)
    groups = {group.group_id for group in admin.list_consumer_groups(request_timeout=10).result(10).valid}
    assert f"{topics.prefix}group" not in groups


def test_topics_are_made_with_two_partitions_take_two_megabytes_and_are_gone_afterwards(kafka: str) -> None:
    _use_and_leave(kafka)


@pytest.mark.slow
def test_apache_kafka_does_the_same(apache_kafka: str) -> None:
    _use_and_leave(apache_kafka)
