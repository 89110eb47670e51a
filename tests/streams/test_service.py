"""The service as a process on a real broker: every click once and right, whatever is thrown at it."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.contract import Topics
from streams.dead_letter import EXIT_BAD_INPUT
from streams.service import EXIT_CONFIGURATION, EXIT_DEPENDENCY
from tests.fixtures.kafka import create_topics
from tests.streams.references import expected_rows
from tests.streams.running import Service, committed, micro_batches, next_offsets, produce, read_all, wait_for
from tests.streams.stand_ins import click, random_clicks
from tests.streams.test_partition import assert_rows, rows_of

pytestmark = pytest.mark.broker

BATCH_SIZE = 64
PATIENT = {
    "batch_size": BATCH_SIZE,
    "batch_age_seconds": 3,
    "commit_interval_seconds": 0.2,
    "session_timeout_seconds": 6,
}
"""Micro-batches close by size while clicks come, so that their rows can be computed beforehand."""
THROUGH_PAUSES = {**PATIENT, "batch_age_seconds": 60}
"""They do even while a rebalance holds the clicks back."""

MALFORMED: dict[str, bytes | None] = {
    "not_json": b'{"user_id": "u", ',
    "bad_id": click(user=["u"]),
    "missing_field": click(item=None),
    "null_value": None,
    "too_large": b'{"user_id":"' + b"x" * 2_000_000 + b'"}',
    "not_utf8": b'{"user_id":"\xff","item_id":"i","event_time":1}',
    "bad_time": b'{"user_id":"u","item_id":"i","event_time":NaN}',
    "bad_reward": click(reward=-1),
    "bad_context": click(context={"a": []}),
}


def with_malformed(values: list[bytes]) -> list[bytes | None]:
    """Malformed ones of each kind, spread among clicks."""
    mixed: list[bytes | None] = list(values)
    for number, value in enumerate(MALFORMED.values(), 1):
        mixed.insert(number * len(values) // 11, value)
    return mixed


def wait_until_passed_on(kafka: str, topics: Topics, counts: dict[int, int]) -> None:
    wait_for(lambda: next_offsets(kafka, topics) == counts, f"micro-batches up to {counts}")


def test_clicks_with_malformed_ones_among_them_come_out_right_and_the_others_as_dead_letters(
    kafka: str, topics: Topics
) -> None:
    values = {0: with_malformed(random_clicks(2_500, 1)), 1: with_malformed(random_clicks(2_500, 2))}
    for partition in values:
        produce(kafka, topics.clicks, partition, values[partition])
    with Service(kafka, topics, **PATIENT).wait_until_ready() as service:
        counts = {partition: len(all_of) for partition, all_of in values.items()}
        wait_until_passed_on(kafka, topics, counts)
        wait_for(lambda: committed(kafka, topics) == counts, "all clicks committed")
        wait_for(lambda: service.metric("consumer_lag_messages") == 0, "no lag")
        wait_for(lambda: service.movers()["partitions"] == [0, 1], "movers of both partitions")
        assert service.metric("clicks_total") == 5_000 + 2 * len(MALFORMED)
        assert service.metric("micro_batch_rows_total") == 5_000
        assert service.metric('dead_letters_total{reason="too_large"}') == 2
        assert service.metric("commits_total") >= 1
        assert service.metric("ready") == 1
        started = time.monotonic()
        assert service.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 10
    for batches in micro_batches(kafka, topics).values():
        assert [batch.first_offset for batch in batches] == [0, *(batch.next_offset for batch in batches[:-1])]
    assert_all_once_and_right(kafka, topics, values)
    letters = read_all(kafka, topics.dead_letters)
    assert len(letters) == 2 * len(MALFORMED)
    for letter in letters:
        headers = {name: value.decode() for name, value in letter.headers()}
        offset = int(headers["offset"])
        original = values[letter.partition()][offset]
        assert letter.value() == original
        assert letter.key() == b"key-%d" % offset
        assert MALFORMED[headers["reason"]] == original
        assert (headers["topic"], headers["partition"]) == (topics.clicks, str(letter.partition()))
        assert abs(float(headers["time"]) - time.time()) < 3_600


class Stream:
    """Clicks that are written while a test goes on, about 750 a second into each partition, until `finish`."""

    def __init__(self, kafka: str, topic: str) -> None:
        self._kafka, self._topic = kafka, topic
        self._values: dict[int, list[bytes | None]] = {0: [*random_clicks(50_000, 3)], 1: [*random_clicks(50_000, 4)]}
        self.written = 0
        self._finished = threading.Event()
        self._writer = threading.Thread(target=self._write)
        self._writer.start()

    def _write(self) -> None:
        while not self._finished.wait(0.2) and self.written < 50_000:
            for partition, values in self._values.items():
                produce(self._kafka, self._topic, partition, values[self.written : self.written + 150])
            self.written += 150

    def finish(self) -> dict[int, list[bytes | None]]:
        """What was written, by partition; filled up so that the last micro-batch closes by size, too."""
        self._finished.set()
        self._writer.join()
        if missing := -self.written % BATCH_SIZE:
            for partition, values in self._values.items():
                produce(self._kafka, self._topic, partition, values[self.written : self.written + missing])
            self.written += missing
        return {partition: values[: self.written] for partition, values in self._values.items()}


@pytest.fixture
def stream(kafka: str, topics: Topics) -> Iterator[Stream]:
    clicks = Stream(kafka, topics.clicks)
    yield clicks
    clicks.finish()


@pytest.mark.slow
def test_after_kill_9_in_the_middle_every_click_is_there_once_and_the_same(
    kafka: str, topics: Topics, stream: Stream
) -> None:
    with Service(kafka, topics, **THROUGH_PAUSES).wait_until_ready() as first:
        wait_for(lambda: min(committed(kafka, topics).values()) > 1_000, "something committed")
        first.stop(signal.SIGKILL)
    with Service(kafka, topics, **THROUGH_PAUSES).wait_until_ready() as second:
        wait_for(lambda: len(second.events("replayed")) == 2, "replays")
        written = stream.finish()
        wait_until_passed_on(kafka, topics, {partition: len(values) for partition, values in written.items()})
        replayed = second.events("replayed")
        assert sorted(line["partition"] for line in replayed) == [0, 1]
        assert all(line["num_records"] == line["next_offset"] > 1_000 for line in replayed)
        assert second.stop() == 0
    assert_all_once_and_right(kafka, topics, written)


@pytest.mark.slow
def test_after_kill_9_it_goes_on_from_its_snapshot_and_every_click_is_there_once_and_the_same(
    kafka: str, topics: Topics, stream: Stream, tmp_path: Path
) -> None:
    settings = {**THROUGH_PAUSES, "snapshots": tmp_path, "snapshot_interval_seconds": 0.5}
    with Service(kafka, topics, **settings).wait_until_ready() as first:
        wait_for(lambda: {line["partition"] for line in first.events("snapshot")[4:]} == {0, 1}, "two snapshots each")
        wait_for(lambda: min(committed(kafka, topics).values()) > 1_000, "something committed")
        first.stop(signal.SIGKILL)
    with Service(kafka, topics, **settings).wait_until_ready() as second:
        wait_for(lambda: len(second.events("replayed")) == 2, "replays")
        written = stream.finish()
        wait_until_passed_on(kafka, topics, {partition: len(values) for partition, values in written.items()})
        for line in second.events("replayed"):
            assert line["first_offset"] > 0
            assert line["num_records"] == line["next_offset"] - line["first_offset"]
        assert second.stop() == 0
    assert_all_once_and_right(kafka, topics, written)


@pytest.mark.slow
def test_while_workers_come_and_go_every_click_is_there_once_and_the_same(
    kafka: str, topics: Topics, stream: Stream
) -> None:
    with Service(kafka, topics, **THROUGH_PAUSES).wait_until_ready() as first:
        wait_for(lambda: min(committed(kafka, topics).values()) > 500, "something committed")
        with Service(kafka, topics, **THROUGH_PAUSES).wait_until_ready() as second:
            wait_for(lambda: [len(line["partitions"]) for line in first.events("ready")][-1:] == [1], "first shares")
            wait_for(lambda: len(second.events("replayed")) == 1, "the second has clicks")
            assert first.stop() == 0
            wait_for(lambda: len(second.events("replayed")) == 2, "the second has all clicks")
            written = stream.finish()
            wait_until_passed_on(kafka, topics, {partition: len(values) for partition, values in written.items()})
            assert second.events("ready")[-1]["partitions"] == [0, 1]
            assert second.stop() == 0
    assert_all_once_and_right(kafka, topics, written)


def assert_all_once_and_right(kafka: str, topics: Topics, written: dict[int, list[bytes | None]]) -> None:
    for partition, batches in micro_batches(kafka, topics).items():
        assert_rows(rows_of(batches), expected_rows(written[partition], BATCH_SIZE))


def test_above_a_share_of_rejected_clicks_it_stops_and_keeps_them_all(kafka: str, topics: Topics) -> None:
    produce(kafka, topics.clicks, 0, [click(), b"no", b"no"] * 100)
    with Service(kafka, topics, rejected_window_clicks=100, batch_age_seconds=0.1, batch_size=50) as service:
        assert service.process.wait(60) == EXIT_BAD_INPUT
        (line,) = service.events("too many rejected")
        assert "max_rejected_ratio = 0.5" in line["reason"]
    assert Counter(letter.value() for letter in read_all(kafka, topics.dead_letters)) == {b"no": 200}
    assert committed(kafka, topics)[0] == 300


def test_it_refuses_to_start_without_its_topics(kafka: str) -> None:
    with Service(kafka, Topics("nobody-made-these-"), dependency_deadline_seconds=1) as service:
        assert service.process.wait(60) == EXIT_CONFIGURATION
        printed = service.log.read_text()
        for name in ("clicks", "micro-batches", "clicks-dead-letter"):
            assert f"'nobody-made-these-{name}' is missing" in printed
        assert "streamtower topics" in printed


def test_it_says_so_when_nobody_answers() -> None:
    with Service("127.0.0.1:1", Topics(), dependency_deadline_seconds=1) as service:
        assert service.process.wait(60) == EXIT_DEPENDENCY
        (line,) = service.events("dependency away")
        assert "127.0.0.1:1" in line["reason"]
        assert "127.0.0.1:1" in service.events("waiting for kafka")[0]["problem"]


UNCHECKED = "import sys, streams.__main__ as m; m.ClicksOnBroker.check_topics = lambda self: None; sys.exit(m.main([]))"
"""The service where Kafka went away between the first question and the first fetch."""


@pytest.mark.parametrize("command", [("-m", "streams"), ("-c", UNCHECKED)], ids=["nothing yet", "gone again"])
def test_started_before_its_broker_it_waits_for_it_and_its_topics(command: tuple[str, ...]) -> None:
    broker_module = pytest.importorskip("streamtower.dev.broker", reason="the extra `embedded` is not installed")
    topics, port = Topics(), broker_module.free_port()
    with Service(f"127.0.0.1:{port}", topics, command, batch_age_seconds=0.1) as service:
        wait_for(lambda: "aiting for" in service.log.read_text(), "it waits")
        with broker_module.LocalBroker(port=port) as broker:
            create_topics(broker.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.dead_letters: {}})
            service.wait_until_ready()
            produce(broker.bootstrap, topics.clicks, 0, [click()] * 10)
            wait_until_passed_on(broker.bootstrap, topics, {0: 10, 1: 0})
            assert service.stop() == 0


def test_fausts_own_command_starts_it_too(kafka: str, topics: Topics) -> None:
    command = ("-m", "faust", "-A", "streams.app", "worker", "--without-web", "-l", "error")
    with Service(kafka, topics, command, batch_age_seconds=0.1) as service:
        wait_for(lambda: bool(service.events("ready")), "ready")
        produce(kafka, topics.clicks, 1, [click("ann", "shoe")])
        wait_until_passed_on(kafka, topics, {0: 0, 1: 1})
        assert service.stop() == 0
    (batch,) = micro_batches(kafka, topics)[1]
    assert (batch.user_id.to_pylist(), batch.item_id.to_pylist()) == (["ann"], ["shoe"])


def test_help_needs_nothing(kafka: str) -> None:
    with Service(kafka, Topics(), ("-m", "streams", "--help")) as service:
        assert service.process.wait(60) == 0
        assert "STREAMTOWER_STREAMS_BATCH_SIZE (default: 256)" in service.log.read_text()


def test_its_log_is_json_and_holds_no_ids(kafka: str, topics: Topics) -> None:
    produce(kafka, topics.clicks, 0, [click("very-private-user", "thing") for _ in range(100)])
    with Service(kafka, topics, batch_age_seconds=0.1).wait_until_ready() as service:
        wait_until_passed_on(kafka, topics, {0: 100, 1: 0})
        assert service.stop() == 0
        printed = service.log.read_text()
        assert "very-private-user" not in printed
        assert [json.loads(line)["service"] for line in printed.splitlines()]


def test_a_broker_that_goes_away_for_good_ends_it() -> None:
    broker_module = pytest.importorskip("streamtower.dev.broker", reason="the extra `embedded` is not installed")
    topics = Topics()
    with broker_module.LocalBroker(port=0) as broker:
        create_topics(broker.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.dead_letters: {}})
        produce(broker.bootstrap, topics.clicks, 0, [click()] * 10)
        with Service(broker.bootstrap, topics, dependency_deadline_seconds=3).wait_until_ready() as service:
            wait_until_passed_on(broker.bootstrap, topics, {0: 10, 1: 0})
            broker.stop()
            assert service.process.wait(60) == EXIT_DEPENDENCY
            (line,) = service.events("dependency away")
            assert broker.bootstrap in line["reason"]


def test_a_signal_ends_it_within_ten_seconds_even_if_the_broker_is_gone() -> None:
    broker_module = pytest.importorskip("streamtower.dev.broker", reason="the extra `embedded` is not installed")
    topics = Topics()
    with broker_module.LocalBroker(port=0) as broker:
        create_topics(broker.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.dead_letters: {}})
        produce(broker.bootstrap, topics.clicks, 0, [click()] * 1_000)
        with Service(broker.bootstrap, topics, commit_interval_seconds=30).wait_until_ready() as service:
            wait_until_passed_on(broker.bootstrap, topics, {0: 1_000, 1: 0})
            broker.stop()
            started = time.monotonic()
            exit_code = service.stop()
            assert time.monotonic() - started < 10
            assert exit_code == 0
            assert len(service.log.read_text().splitlines()) < 100, "a broker that is away must not flood the log"


def test_a_kafka_that_goes_away_before_the_first_fetch_is_a_missing_dependency_after_the_deadline() -> None:
    with Service("127.0.0.1:9", Topics(), ("-c", UNCHECKED), dependency_deadline_seconds=2) as service:
        assert service.process.wait(90) == EXIT_DEPENDENCY
        assert service.events("dependency away") and "Waiting for Kafka, for up to 2 s" in service.log.read_text()
