"""What only a full broker shows: clicks that retention deletes, and workers that keep their partitions."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from streams.contract import Topics
from streams.service import EXIT_CONFIGURATION
from tests.fixtures.kafka import topics_on
from tests.streams.references import expected_rows
from tests.streams.running import Service, committed, micro_batches, next_offsets, produce, wait_for
from tests.streams.stand_ins import random_clicks
from tests.streams.test_partition import assert_rows, rows_of
from tests.streams.test_service import PATIENT

pytestmark = [pytest.mark.broker, pytest.mark.slow]

VALUES = random_clicks(1_600, 11)


def delete_clicks(kafka: str, topics: Topics, before: int) -> None:
    """As retention does it."""
    admin = AdminClient({"bootstrap.servers": kafka})
    for future in admin.delete_records([TopicPartition(topics.clicks, 0, before)]).values():
        assert future.result(30).low_watermark == before


def pass_on(kafka: str, topics: Topics, end: int, **settings: object) -> None:
    """Runs the service until clicks up to `end` are committed."""
    with Service(kafka, topics, **PATIENT, **settings).wait_until_ready() as service:
        wait_for(lambda: committed(kafka, topics)[0] == end, f"committed up to {end}")
        assert service.stop() == 0


@pytest.mark.parametrize(("retention_expired", "gap"), [("fail", None), ("earliest", 192), ("latest", 512)])
def test_clicks_deleted_before_they_were_passed_on(apache_kafka: str, retention_expired: str, gap: int | None) -> None:
    with topics_on(apache_kafka) as topics:
        produce(apache_kafka, topics.clicks, 0, VALUES[:1_024])
        pass_on(apache_kafka, topics, 1_024)
        produce(apache_kafka, topics.clicks, 0, VALUES[1_024:1_536])
        delete_clicks(apache_kafka, topics, 1_216)
        with Service(apache_kafka, topics, **PATIENT, retention_expired=retention_expired) as service:
            if gap is None:
                assert service.process.wait(60) == EXIT_CONFIGURATION
                (line,) = service.events("retention expired")
                assert "clicks 1024 … 1215 of partition 0" in line["reason"]
                assert next_offsets(apache_kafka, topics) == {0: 1_024, 1: 0}
                return
            wait_for(lambda: bool(service.events("retention expired")), "the gap is noticed")
            wait_for(lambda: committed(apache_kafka, topics)[0] == 1_536, "all that is there is passed on or over")
            produce(apache_kafka, topics.clicks, 0, VALUES[1_536:])
            wait_for(lambda: committed(apache_kafka, topics)[0] == 1_600, "what came later is passed on")
            assert service.metric('gap_offsets_total{of="micro_batches"}') == gap
            assert service.stop() == 0
        offsets = [offset for batch in micro_batches(apache_kafka, topics)[0] for offset in batch.offset.tolist()]
        assert offsets == [*range(1_024), *range(1_024 + gap, 1_600)]


def test_clicks_deleted_behind_the_committed_offset_are_no_loss_where_a_snapshot_has_them(
    apache_kafka: str, tmp_path: Path
) -> None:
    with topics_on(apache_kafka) as topics:
        produce(apache_kafka, topics.clicks, 0, VALUES[:1_024])
        with Service(
            apache_kafka, topics, **PATIENT, snapshots=tmp_path, snapshot_interval_seconds=0.2
        ).wait_until_ready() as service:
            wait_for(lambda: any(e["next_offset"] == 1_024 for e in service.events("snapshot")), "a snapshot of all")
            wait_for(lambda: committed(apache_kafka, topics)[0] == 1_024, "committed")
            assert service.stop(signal.SIGKILL) == -signal.SIGKILL
        delete_clicks(apache_kafka, topics, 1_024)
        produce(apache_kafka, topics.clicks, 0, VALUES[1_024:])
        pass_on(apache_kafka, topics, 1_600, snapshots=tmp_path)
        assert_rows(rows_of(micro_batches(apache_kafka, topics)[0]), expected_rows(VALUES, 64))


def test_a_worker_with_a_name_of_its_own_comes_back_to_its_partition_and_the_other_is_not_disturbed(
    apache_kafka: str,
) -> None:
    settings = {**PATIENT, "session_timeout_seconds": 20}
    with topics_on(apache_kafka) as topics:
        first, second = (
            Service(apache_kafka, topics, **settings, group_instance_id=name) for name in ("first", "second")
        )
        with first, second:
            wait_for(
                lambda: (
                    [
                        len(service.events("ready")[-1:] and service.events("ready")[-1]["partitions"])
                        for service in (first, second)
                    ]
                    == [1, 1]
                ),
                "each has a partition",
            )
            seen, own = len(first.events("ready")), second.events("ready")[-1]["partitions"]
            second.stop(signal.SIGKILL)
            for partition in (0, 1):
                produce(apache_kafka, topics.clicks, partition, VALUES[:640])
            with Service(apache_kafka, topics, **settings, group_instance_id="second").wait_until_ready() as again:
                wait_for(lambda: next_offsets(apache_kafka, topics) == {0: 640, 1: 640}, "all clicks are passed on")
                assert [line["partitions"] for line in again.events("ready")] == [own]
                assert len(first.events("ready")) == seen, "no rebalance"
                assert again.stop() == 0
            assert first.stop() == 0
        for batches in micro_batches(apache_kafka, topics).values():
            assert_rows(rows_of(batches), expected_rows(VALUES[:640], 64))
