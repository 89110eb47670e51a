"""Makes the four topics, so that producer, streams and trainer meet the same partitions.

Station: before the data's way begins. It changes no topic that is there already: it only checks that it fits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from streams.contract import Topics

MAX_MESSAGE_BYTES = 4 << 20
"""Of clicks, dead letters and micro-batches: a dead letter holds what came, a micro-batch some hundred clicks."""


class TopicsError(RuntimeError):
    """The topics could not be made, or those that are there do not fit. Says which, and what to do."""


class BrokerAwayError(TopicsError):
    """No broker answered within the deadline."""


def create_topics(
    config: Mapping[str, Any],
    topics: Topics,
    *,
    num_partitions: int,
    replication_factor: int = -1,
    timeout_seconds: float = 30.0,
) -> dict[str, bool]:
    """Makes those of the topics that are missing and waits until each partition has a leader.

    Args:
        config: how to connect, for confluent-kafka.
        num_partitions: of each topic, ≥ 1. Clicks and micro-batches must agree.
        replication_factor: ≥ 1; −1: the broker's default.

    Returns:
        Each topic's name, and whether it was made now.

    Raises:
        BrokerAwayError: nobody answers.
        TopicsError: a topic is there with another number of partitions, or the broker refuses to make one.
    """
    deadline = time.monotonic() + timeout_seconds
    admin = AdminClient(dict(config) | {"log_level": 2})
    large = {"max.message.bytes": str(MAX_MESSAGE_BYTES)}
    wanted = {
        topics.clicks: large,
        topics.items: {"cleanup.policy": "compact"},
        topics.dead_letters: large,
        topics.micro_batches: large,
    }
    bootstrap = str(config.get("bootstrap.servers"))
    there = _partitions(admin, bootstrap, timeout_seconds)
    unfit = [
        f"{name} has {there[name][0]}"
        for name in (topics.clicks, topics.micro_batches)
        if name in there and there[name][0] != num_partitions
    ]
    if unfit:
        raise TopicsError(
            f"wanted {num_partitions} partitions, but {', '.join(unfit)}; give that number or another prefix, "
            "or delete the topic"
        )
    missing = {name: topic_config for name, topic_config in wanted.items() if name not in there}
    if missing:
        made = admin.create_topics(
            [NewTopic(name, num_partitions, replication_factor, config=c) for name, c in missing.items()],
            request_timeout=timeout_seconds,
        )
        for name, future in made.items():
            try:
                future.result(timeout_seconds)
            except KafkaException as error:
                # Somebody made it at the same moment: as good as ours, once its partitions are checked below.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise TopicsError(f"the broker refused to make {name}: {error.args[0].str()}") from error
    while any(there.get(name) != (num_partitions, num_partitions) for name in missing):
        if time.monotonic() > deadline:
            raise TopicsError(f"topics {sorted(missing)} have no leaders after {timeout_seconds:g} s")
        time.sleep(0.02)
        there = _partitions(admin, bootstrap, timeout_seconds)
    return {name: name in missing for name in wanted}


def num_partitions(config: Mapping[str, Any], topic: str, timeout_seconds: float = 10.0) -> int:
    """Of a topic that is there.

    Raises:
        BrokerAwayError: nobody answers within the timeout.
        TopicsError: there is no such topic.
    """
    there = _partitions(
        AdminClient(dict(config) | {"log_level": 2}), str(config.get("bootstrap.servers")), timeout_seconds
    )
    if topic not in there:
        raise TopicsError(f"there is no topic {topic!r}; streamtower topics makes it")
    return there[topic][0]


def require_broker(config: Mapping[str, Any], timeout_seconds: float = 10.0) -> None:
    """
    Raises:
        BrokerAwayError: nobody answers within the timeout.
    """
    _partitions(AdminClient(dict(config) | {"log_level": 2}), str(config.get("bootstrap.servers")), timeout_seconds)


def _partitions(admin: AdminClient, bootstrap: str, timeout_seconds: float) -> dict[str, tuple[int, int]]:
    """Number of partitions, and of those with a leader, by topic."""
    try:
        metadata = admin.list_topics(timeout=timeout_seconds)
    except KafkaException as error:
        raise BrokerAwayError(f"no Kafka broker answers at {bootstrap}: {error.args[0].str()}") from error
    return {
        name: (len(topic.partitions), sum(partition.leader >= 0 for partition in topic.partitions.values()))
        for name, topic in metadata.topics.items()
        if topic.error is None
    }
