"""The service on Apache Kafka: behind TLS and a password, and through a broker's sudden death."""

from __future__ import annotations

import os
import signal
import time

import pytest

from streams.contract import Topics
from streams.service import EXIT_DEPENDENCY
from tests.fixtures.kafka import create_topics
from tests.fixtures.secured_kafka import PASSWORD, ApacheKafka
from tests.streams.references import expected_rows
from tests.streams.running import Service, committed, micro_batches, next_offsets, produce, read_all, wait_for
from tests.streams.stand_ins import click, random_clicks
from tests.streams.test_partition import assert_rows, rows_of
from tests.streams.test_service import BATCH_SIZE, THROUGH_PAUSES, Stream

pytestmark = [pytest.mark.broker, pytest.mark.slow]


def make_topics(node: ApacheKafka, prefix: str) -> Topics:
    topics = Topics(prefix)
    create_topics(node.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.dead_letters: {}})
    return topics


def test_behind_tls_and_a_password_it_works_and_with_a_wrong_one_it_says_so(secured_kafka: ApacheKafka) -> None:
    topics = make_topics(secured_kafka, "tls-")
    produce(secured_kafka.bootstrap, topics.clicks, 1, [*random_clicks(500, 1), b"no"])
    secured = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ca_file": secured_kafka.certificate,
        "kafka_username": "app",
        "kafka_password": PASSWORD,
        "batch_age_seconds": 0.1,
    }
    with Service(secured_kafka.tls_bootstrap, topics, **secured).wait_until_ready() as service:
        wait_for(lambda: next_offsets(secured_kafka.bootstrap, topics) == {0: 0, 1: 501}, "all clicks passed on")
        assert service.stop() == 0
        assert PASSWORD not in service.log.read_text()
    # from the committed offset on: the replay goes the same way
    produce(secured_kafka.bootstrap, topics.clicks, 1, [click("late")])
    with Service(secured_kafka.tls_bootstrap, topics, **secured).wait_until_ready() as service:
        wait_for(lambda: next_offsets(secured_kafka.bootstrap, topics) == {0: 0, 1: 502}, "the last click passed on")
        assert service.events("replayed")[0]["num_records"] == 501
        assert service.stop() == 0
    assert [letter.value() for letter in read_all(secured_kafka.bootstrap, topics.dead_letters)] == [b"no"]
    wrong = {**secured, "kafka_password": "another", "dependency_deadline_seconds": 3}
    with Service(secured_kafka.tls_bootstrap, topics, **wrong) as service:
        assert service.process.wait(60) == EXIT_DEPENDENCY
        assert "uthentication" in service.log.read_text()


def test_through_the_death_of_the_broker_every_click_is_there_once_and_the_same(secured_kafka: ApacheKafka) -> None:
    topics = make_topics(secured_kafka, "death-")
    stream = Stream(secured_kafka.bootstrap, topics.clicks)
    try:
        with Service(secured_kafka.bootstrap, topics, **THROUGH_PAUSES).wait_until_ready() as service:
            wait_for(lambda: min(committed(secured_kafka.bootstrap, topics).values()) > 500, "something committed")
            os.kill(secured_kafka.process.pid, signal.SIGKILL)
            secured_kafka.process.wait()
            time.sleep(2)  # away for a moment, not merely restarted
            secured_kafka.start()
            behind = stream.written
            wait_for(lambda: stream.written > behind + 1_000, "clicks are written again", 120)
            written = stream.finish()
            ends = {partition: values_in(secured_kafka, topics, partition) for partition in written}
            wait_for(
                lambda: all(
                    next_offsets(secured_kafka.bootstrap, topics)[p] >= len(values) // BATCH_SIZE * BATCH_SIZE
                    for p, values in ends.items()
                ),
                "all clicks passed on",
                120,
            )
            assert service.stop() == 0
    finally:
        stream.finish()
    for partition, batches in micro_batches(secured_kafka.bootstrap, topics).items():
        # What the producer wrote twice because it heard no acknowledgement are two clicks.
        values = ends[partition][: len(ends[partition]) // BATCH_SIZE * BATCH_SIZE]
        assert len(values) >= len(written[partition]) - BATCH_SIZE
        rows = [row for row in rows_of(batches) if row.offset < len(values)]
        assert_rows(rows, expected_rows(values, BATCH_SIZE))


def values_in(node: ApacheKafka, topics: Topics, partition: int) -> list[bytes | None]:
    messages = read_all(node.bootstrap, topics.clicks)
    return [message.value() for message in messages if message.partition() == partition]
