"""Making the topics, on a real broker."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from streams.contract import Topics
from streamtower.topics import BrokerAwayError, TopicsError, create_topics, require_broker


@pytest.fixture
def names(kafka: str) -> Iterator[Topics]:
    topics = Topics(prefix=f"test-{uuid.uuid4().hex[:12]}-")
    yield topics
    admin = AdminClient({"bootstrap.servers": kafka})
    there = [name for name in admin.list_topics(timeout=10).topics if name.startswith(topics.prefix)]
    for future in (admin.delete_topics(there) if there else {}).values():
        future.result(10)


def every(topics: Topics) -> list[str]:
    return [topics.clicks, topics.items, topics.dead_letters, topics.micro_batches]


@pytest.mark.broker
def test_the_missing_topics_are_made_and_the_others_left(kafka: str, names: Topics) -> None:
    config = {"bootstrap.servers": kafka}
    assert create_topics(config, names, num_partitions=3) == dict.fromkeys(every(names), True)
    assert create_topics(config, names, num_partitions=3) == dict.fromkeys(every(names), False)
    there = AdminClient(config).list_topics(timeout=10).topics
    assert {name: len(there[name].partitions) for name in every(names)} == dict.fromkeys(every(names), 3)


@pytest.mark.broker
def test_items_are_compacted_and_the_rest_take_large_records(kafka: str, names: Topics) -> None:
    create_topics({"bootstrap.servers": kafka}, names, num_partitions=1)
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in every(names)]
    admin = AdminClient({"bootstrap.servers": kafka})
    found = admin.describe_configs(resources)
    configs = {resource.name: future.result(10) for resource, future in found.items()}
    assert configs[names.items]["cleanup.policy"].value == "compact"
    for name in (names.clicks, names.dead_letters, names.micro_batches):
        assert configs[name]["max.message.bytes"].value == str(4 << 20)


@pytest.mark.broker
def test_another_number_of_partitions_is_refused(kafka: str, names: Topics) -> None:
    create_topics({"bootstrap.servers": kafka}, names, num_partitions=1)
    with pytest.raises(TopicsError, match=r"wanted 2 partitions, but .*clicks has 1, .*micro-batches has 1"):
        create_topics({"bootstrap.servers": kafka}, names, num_partitions=2)


def test_a_broker_that_is_away_is_named() -> None:
    with pytest.raises(BrokerAwayError, match=r"no Kafka broker answers at 127\.0\.0\.1:1"):
        create_topics({"bootstrap.servers": "127.0.0.1:1"}, Topics(), num_partitions=1, timeout_seconds=0.5)
    with pytest.raises(BrokerAwayError, match=r"no Kafka broker answers at 127\.0\.0\.1:1"):
        require_broker({"bootstrap.servers": "127.0.0.1:1"}, timeout_seconds=0.5)
