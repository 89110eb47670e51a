"""Micro-batches that retention deletes before they are learnt: only a full broker shows them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from tests.fixtures.kafka import topics_on
from tests.trainer.small_trainer import Trainer
from tests.trainer.streams_of_clicks import click_stream
from tests.trainer.test_source import DEADLINE_SECONDS, Broker, deliveries, read
from trainer.metrics import Metrics
from trainer.progress import Positions
from trainer.source import KafkaSource, RetentionExpiredError

pytestmark = [pytest.mark.broker, pytest.mark.slow]
BATCHES = click_stream(12)
"""Of 16 clicks each, all of partition 0."""


class Bench(Broker):
    """A broker that keeps nothing for long."""

    def delete(self, before: int) -> None:
        """Deletes micro-batches below this offset, as retention does."""
        place = TopicPartition(self.topics.micro_batches, 0, before)
        admin = AdminClient({"bootstrap.servers": self.bootstrap})  # to be held until its answer is here
        for future in admin.delete_records([place]).values():
            assert future.result(30).low_watermark == before

    def source(self, retention_expired: Literal["fail", "earliest", "latest"], metrics: Metrics) -> KafkaSource:
        config: dict[str, Any] = {"bootstrap.servers": self.bootstrap}
        return KafkaSource(
            config, self.topics, metrics, deadline_seconds=DEADLINE_SECONDS, retention_expired=retention_expired
        )

    def learn(self, trainer: Trainer, retention_expired: Literal["fail", "earliest", "latest"], until: int) -> None:
        """Runs a trainer until the source offset `until` is learnt."""
        trainer.source = self.source(retention_expired, trainer.metrics)
        stop, failures = threading.Event(), []

        def run() -> None:
            try:
                trainer.run(stop)
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while thread.is_alive() and trainer.progress.learnt.get(0, 0) < until:
            assert time.monotonic() < deadline, trainer.progress
            time.sleep(0.02)
        stop.set()
        thread.join()
        trainer.source.close()
        if failures:
            trainer.checkpoints.close()
            raise failures[0]


@pytest.fixture
def bench(apache_kafka: str) -> Iterator[Bench]:
    with topics_on(apache_kafka) as topics:
        yield Bench(apache_kafka, topics)


def test_a_position_that_kafka_has_deleted_ends_the_trainer_and_says_what_can_be_done(
    bench: Bench, tmp_path: Path
) -> None:
    for batch in BATCHES[:4]:
        bench.batch(batch)
    bench.learn(Trainer(tmp_path), "fail", 64)
    for batch in BATCHES[4:8]:
        bench.batch(batch)
    bench.delete(6)
    with pytest.raises(
        RetentionExpiredError,
        match=r"micro-batches 4 … 5 of partition 0 of topic '.*' were deleted.*retention_expired to earliest",
    ):
        bench.learn(Trainer(tmp_path), "fail", 128)
    again = Trainer(tmp_path)
    assert again.progress.learnt == {0: 64} and again.progress.positions.micro_batches == {0: 4}
    again.checkpoints.close()


def test_earliest_goes_on_with_what_is_left_and_the_clicks_between_are_counted(bench: Bench, tmp_path: Path) -> None:
    for batch in BATCHES[:4]:
        bench.batch(batch)
    bench.learn(Trainer(tmp_path), "fail", 64)
    for batch in BATCHES[4:8]:
        bench.batch(batch)
    bench.delete(6)
    trainer = Trainer(tmp_path)
    bench.learn(trainer, "earliest", 128)
    assert trainer.value("source_gap_offsets_total") == 32
    assert trainer.value("clicks_learnt_total") == 32 and trainer.progress.clicks_learnt == 96


def test_latest_goes_on_with_what_comes_later(bench: Bench, tmp_path: Path) -> None:
    for batch in BATCHES[:4]:
        bench.batch(batch)
    bench.learn(Trainer(tmp_path), "fail", 64)
    for batch in BATCHES[4:8]:
        bench.batch(batch)
    bench.delete(6)
    source, positions = bench.source("latest", Metrics()), Positions({0: 4})
    source.start(positions)
    assert positions.micro_batches == {0: 8}
    bench.batch(BATCHES[8])
    assert [d.batch.first_offset for d in deliveries(read(source, deliveries))] == [128]
    source.close()


@pytest.mark.parametrize(("retention_expired", "first"), [("fail", None), ("earliest", 6), ("latest", 8)])
def test_what_is_deleted_under_a_running_trainer_is_seen_too(
    bench: Bench, retention_expired: Literal["fail", "earliest", "latest"], first: int | None
) -> None:
    bench.batch(BATCHES[0])
    source = bench.source(retention_expired, Metrics())
    source.start(Positions())
    read(source, deliveries)
    place = TopicPartition(bench.topics.micro_batches, 0)
    source._consumer.pause([place])
    for batch in BATCHES[1:8]:
        bench.batch(batch)
    bench.delete(6)
    source._consumer.resume([place])
    # What was fetched before the pause is thrown away by it.
    if first is None:
        with pytest.raises(RetentionExpiredError, match=r"micro-batches 1 … 5"):
            read(source, deliveries)
    else:
        if first == 8:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while source._given[0] != 8:
                assert time.monotonic() < deadline
                assert source.poll(0.05).deliveries == []
            bench.batch(BATCHES[8])
        assert next(d.next_position for d in deliveries(read(source, deliveries))) == first + 1
    source.close()


def test_a_new_trainer_begins_with_the_oldest_that_is_there_and_misses_nothing(bench: Bench, tmp_path: Path) -> None:
    for batch in BATCHES[:8]:
        bench.batch(batch)
    bench.delete(6)
    trainer = Trainer(tmp_path)
    bench.learn(trainer, "fail", 128)
    assert trainer.value("source_gap_offsets_total") == 0 and trainer.value("clicks_learnt_total") == 32
