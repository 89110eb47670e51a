"""Chunks on a real broker, on both transports: nothing lost, in order, committed only when acknowledged.

A worker is a process of its own, started by the `faust` command. Joining a group takes seconds, so that workers of both
transports, and of several ways to ack, run side by side, and several tests look at what they wrote down.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faust
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from streams import fetch
from streams.chunks import ChunkApp
from streams.contract import Topics
from streams.service import ConfigurationError
from tests.fixtures.kafka import topics_on

ROOT = Path(__file__).parents[2]
TRANSPORTS = ("fast", "stock")
LOSES = {"fast": (True, False, True), "stock": (True,)}
"""Which fetches are lost. A second loss without a rebalance, which Faust has none of, stock Faust could not tell from
compaction."""
SECONDS = 90.0
NOW_MS = int(time.time() * 1000)
"""A broker deletes records whose own time is past the topic's retention."""

Row = tuple[bytes | None, bytes | None, int]
"""key, value, timestamp in milliseconds"""
Log = dict[tuple[int, int], Row]
"""(partition, offset) → what was produced there"""


def wait_for(condition: Callable[[], bool], what: Callable[[], str], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    journal: Path
    output: Path

    def entries(self, kind: str) -> list[dict[str, Any]]:
        found = []
        stream = io.BytesIO(self.journal.read_bytes() if self.journal.exists() else b"")
        while True:
            try:
                entry = pickle.load(stream)
            except (EOFError, pickle.UnpicklingError):  # the last one is being written
                return found
            if entry["kind"] == kind:
                found.append(entry)

    def rows(self) -> list[tuple[tuple[int, int], Row]]:
        """Every record, in the order that it came."""
        return [
            ((entry["partition"], offset), (key, value, round(timestamp * 1000)))
            for entry in self.entries("chunk")
            for offset, key, value, timestamp in zip(
                entry["offsets"], entry["keys"], entry["values"], entry["timestamps"], strict=True
            )
        ]

    def acked(self) -> Counter[tuple[int, int]]:
        return Counter(
            (entry["partition"], offset)
            for entry in self.entries("ack")
            for offset in range(entry["first_offset"], entry["next_offset"])
        )

    def wait_for(self, condition: Callable[[Worker], bool]) -> None:
        def ended_or_true() -> bool:
            assert self.process.poll() is None, self.tail()
            return condition(self)

        wait_for(ended_or_true, self.tail)

    def tail(self) -> str:
        return f"{len(self.entries('chunk'))} chunks; its output ends with:\n" + self.output.read_text()[-3000:]

    def end(self, signum: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(signum)
        return self.process.wait(20)


@contextmanager
def worker(
    folder: Path,
    bootstrap: str,
    topic: str,
    group: str,
    transport: str,
    acks: str,
    *,
    held_offset: int = -1,
    loses: tuple[bool, ...] = (),
    seconds_per_chunk: float = 0.0,
    **options: Any,
) -> Iterator[Worker]:
    name = f"{group}-{random.getrandbits(32):08x}"
    journal, output = folder / f"{name}.journal", folder / f"{name}.out"
    config = {
        "journal": str(journal),
        "group": group,
        "bootstrap": bootstrap,
        "topic": topic,
        "transport": transport,
        "acks": acks,
        "held_offset": held_offset,
        "loses": loses,
        "seconds_per_chunk": seconds_per_chunk,
        "options": options,
    }
    with open(output, "wb") as sink:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "faust",
                "-A",
                "tests.streams.chunk_worker",
                "worker",
                "--without-web",
                "-l",
                "info",
            ],
            cwd=ROOT,
            env=os.environ | {"STREAMTOWER_TEST_CHUNKS": json.dumps(config)},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Worker(process, journal, output)
    finally:
        process.kill()
        process.wait()


def produce(bootstrap: str, topic: str, rows: list[tuple[int, Row]], codec: str = "none", per_batch: int = 150) -> Log:
    """Produces (partition, row) pairs; where the broker put each."""
    log: Log = {}
    failures = []

    def delivered(error: Any, message: Any) -> None:
        if error:
            failures.append(error)
        else:
            row = (message.key(), message.value(), message.timestamp()[1])
            log[message.partition(), message.offset()] = row

    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "acks": "all",
            "compression.type": codec,
            "linger.ms": 50,
            "batch.num.messages": per_batch,
            "message.max.bytes": 4 << 20,
        }
    )
    for partition, (key, value, timestamp) in rows:
        producer.produce(topic, value, key, partition=partition, timestamp=timestamp, on_delivery=delivered)
    assert producer.flush(30) == 0
    assert failures == []
    return log


def plain_rows(count: int, start: int = 0) -> list[tuple[int, Row]]:
    rows = range(start, start + count)
    return [(row % 2, (b"u%d" % row, b'{"click":%d}' % row, NOW_MS + 7 * row)) for row in rows]


def ends(log: Log) -> dict[int, int]:
    """The next offset of each partition."""
    found: dict[int, int] = {}
    for partition, offset in log:
        found[partition] = max(found.get(partition, 0), offset + 1)
    return found


def committed(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    """Each partition's committed offset, of those that have one."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, partition) for partition in range(2)])
    found = admin.list_consumer_group_offsets([wanted])[group].result(20).topic_partitions
    return {partition.partition: partition.offset for partition in found if partition.offset >= 0}


def commit(bootstrap: str, group: str, topic: str, offsets: dict[int, int]) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    wanted = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
    admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, wanted)])[group].result(20)


def assert_no_hole(entries: list[dict[str, Any]]) -> None:
    """One process's chunks of each partition follow each other, with rising offsets inside their range."""
    position: dict[int, int] = {}
    for entry in entries:
        partition, offsets = entry["partition"], entry["offsets"]
        assert entry["first_offset"] == position.get(partition, entry["first_offset"])
        assert entry["first_offset"] <= offsets[0] <= offsets[-1] < entry["next_offset"]
        assert all(before < after for before, after in itertools.pairwise(offsets))
        position[partition] = entry["next_offset"]


@pytest.fixture(scope="module")
def broker_topics(kafka: str) -> Iterator[Topics]:
    with topics_on(kafka) as topics:
        yield topics


@dataclass
class Reading:
    """What workers of both transports read of one log."""

    log: Log
    begins: dict[int, int]
    whole: dict[str, Worker] = field(default_factory=dict)
    inside: dict[str, Worker] = field(default_factory=dict)
    hoarding: dict[str, Worker] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)
    committed: dict[str, dict[int, int]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def reading(kafka: str, broker_topics: Topics, tmp_path_factory: pytest.TempPathFactory) -> Reading:
    topic, prefix = broker_topics.clicks, broker_topics.prefix
    folder = tmp_path_factory.mktemp("reading")
    log: Log = {}
    for index, codec in enumerate(("none", "gzip", "lz4", "zstd")):
        log |= produce(kafka, topic, plain_rows(600, start=600 * index), codec)
    log |= produce(kafka, topic, [(1, (b"large", random.Random(5).randbytes(2_000_000), NOW_MS - 7))])
    log |= produce(
        kafka, topic, [(0, (None, None, NOW_MS)), (0, (b"", b"", NOW_MS - 1)), (1, (b"tombstone", None, NOW_MS - 2))]
    )
    log |= produce(kafka, topic, plain_rows(300, start=2400), "lz4")
    found = Reading(log, begins={0: 437, 1: 911})
    last = ends(log)
    with ExitStack() as stack:
        for transport in TRANSPORTS:
            group = f"{prefix}inside-{transport}"
            commit(kafka, group, topic, found.begins)
            start = lambda name, acks, **options: stack.enter_context(  # noqa: E731
                worker(folder, kafka, topic, f"{prefix}{name}-{transport}", transport, acks, **options)  # noqa: B023
            )
            found.whole[transport] = start("whole", "late", chunk_max_records=100)
            found.inside[transport] = start(
                "inside", "at once", loses=LOSES[transport], chunk_max_records=100, chunk_max_inflight=300
            )
            found.hoarding[transport] = start(
                "hoarding", "never", chunk_max_records=100, chunk_max_inflight=300, stream_wait_empty=False
            )
        for transport in TRANSPORTS:
            for name, ended in (("whole", found.whole[transport]), ("inside", found.inside[transport])):
                group = f"{prefix}{name}-{transport}"
                ended.wait_for(lambda w: all((partition, end - 1) in w.acked() for partition, end in last.items()))
                found.exit_codes[group.removeprefix(prefix)] = ended.end()
                found.committed[group.removeprefix(prefix)] = committed(kafka, group, topic)
            found.hoarding[transport].wait_for(lambda w: len(w.rows()) >= 300)
            found.committed[f"hoarding-{transport}"] = committed(kafka, f"{prefix}hoarding-{transport}", topic)
    return found


pytestmark = pytest.mark.broker
both_transports = pytest.mark.parametrize("transport", TRANSPORTS)


@both_transports
def test_every_record_comes_once_with_its_key_value_and_time_and_in_order(reading: Reading, transport: str) -> None:
    rows = reading.whole[transport].rows()
    assert dict(rows) == reading.log
    assert len(rows) == len(reading.log)
    for partition in (0, 1):
        offsets = [offset for (owner, offset), _ in rows if owner == partition]
        assert offsets == sorted(offsets)


@both_transports
def test_the_records_are_of_every_kind(reading: Reading, transport: str) -> None:
    rows = [row for _, row in reading.whole[transport].rows()]
    assert max(len(value or b"") for _, value, _ in rows) == 2_000_000
    assert (None, None, NOW_MS) in rows
    assert (b"", b"", NOW_MS - 1) in rows
    assert (b"tombstone", None, NOW_MS - 2) in rows


@both_transports
def test_chunks_follow_each_other_without_a_hole_and_are_of_about_the_wished_size(
    reading: Reading, transport: str
) -> None:
    entries = reading.whole[transport].entries("chunk")
    assert_no_hole(entries)
    assert {entry["transport"] for entry in reading.whole[transport].entries("started")} == {transport}
    assert max(len(entry["offsets"]) for entry in entries) < 100 + 150  # it ends with the batch that fills it
    assert len(entries) >= len(reading.log) / (100 + 150)


def test_the_broker_may_hold_an_answer_back_for_a_tenth_of_a_second(reading: Reading) -> None:
    waits = {transport: reading.whole[transport].entries("chunk")[0]["fetch_wait_ms"] for transport in TRANSPORTS}
    assert waits == {"fast": 100, "stock": 1_500}  # the latter is Faust's own


@both_transports
def test_reading_begins_at_a_committed_offset_inside_a_batch_and_gets_again_what_a_fetch_lost(
    reading: Reading, transport: str
) -> None:
    worker = reading.inside[transport]
    rows = worker.rows()
    assert dict(rows) == {place: row for place, row in reading.log.items() if place[1] >= reading.begins[place[0]]}
    assert len(rows) == len(dict(rows))
    assert_no_hole(worker.entries("chunk"))
    begins = {}
    for entry in worker.entries("chunk"):
        begins.setdefault(entry["partition"], entry["first_offset"])
    assert begins == reading.begins
    assert len(worker.entries("lost")) == sum(LOSES[transport])


@both_transports
def test_a_worker_that_is_asked_to_end_has_committed_all_that_it_acknowledged(reading: Reading, transport: str) -> None:
    for name in (f"whole-{transport}", f"inside-{transport}"):
        assert reading.exit_codes[name] == 0
        assert reading.committed[name] == ends(reading.log)


@both_transports
def test_an_agent_that_does_not_ack_gets_no_more_than_the_bound_and_nothing_is_committed(
    reading: Reading, transport: str
) -> None:
    entries = reading.hoarding[transport].entries("chunk")
    chunk_limit = 100 + 150
    assert 300 <= sum(len(entry["offsets"]) for entry in entries) < 300 + chunk_limit
    assert max(entry["in_flight"] for entry in entries) < 300 + chunk_limit
    assert reading.committed[f"hoarding-{transport}"] == {}


def test_after_kill_9_reading_begins_at_the_first_record_that_was_not_acknowledged(
    kafka: str, topics: Topics, tmp_path: Path
) -> None:
    log = produce(kafka, topics.clicks, plain_rows(4000), "lz4", per_batch=100)
    last = ends(log)
    held_offset = 450
    ways = [(transport, acks) for transport in TRANSPORTS for acks in ("all but one", "at once")]

    def start(transport: str, acks: str, seconds: float = 0.0) -> Worker:
        group = f"{topics.prefix}{transport}-{acks.replace(' ', '-')}"
        options: dict[str, Any] = {"held_offset": held_offset, "seconds_per_chunk": seconds, "chunk_max_records": 100}
        return stack.enter_context(worker(tmp_path, kafka, topics.clicks, group, transport, acks, **options))

    def position(transport: str, acks: str) -> dict[int, int]:
        return committed(kafka, f"{topics.prefix}{transport}-{acks.replace(' ', '-')}", topics.clicks)

    with ExitStack() as stack:
        killed = {
            (transport, acks): start(transport, acks, 0.05 if acks == "at once" else 0) for transport, acks in ways
        }
        for way, first in killed.items():
            if way[1] == "at once":
                first.wait_for(lambda w: len(w.acked()) >= 1000)  # in the midst of its work
            else:
                first.wait_for(lambda w: len(w.rows()) == 4000)
                # All but one chunk are acknowledged: the commit stops before that one, and stays there.
                held = next(
                    entry
                    for entry in first.entries("chunk")
                    if entry["partition"] == 0 and entry["first_offset"] <= held_offset < entry["next_offset"]
                )
                wished = {0: held["first_offset"], 1: last[1]}
                wait_for(lambda way=way, wished=wished: position(*way) == wished, lambda way=way: str(position(*way)))
            first.end(signal.SIGKILL)
        begins_of = {way: position(*way) for way in ways}
        second = {way: start(way[0], "at once" if way[1] == "at once" else way[1]) for way in ways}
        for way, first in killed.items():
            acked = first.acked()
            unacked = {
                partition: next((o for o in range(last[partition]) if (partition, o) not in acked), last[partition])
                for partition in last
            }
            begins = begins_of[way]
            assert all(begins.get(partition, 0) <= unacked[partition] for partition in last)
            wanted = {place: row for place, row in log.items() if place[1] >= begins.get(place[0], 0)}
            second[way].wait_for(lambda w, wanted=wanted: len(w.rows()) >= len(wanted))
            rows = second[way].rows()
            assert dict(rows) == wanted
            assert len(rows) == len(wanted)
            assert dict(rows) | dict(first.rows()) == log


def test_a_second_worker_joins_and_leaves_and_every_record_is_acknowledged_once(
    kafka: str, topics: Topics, tmp_path: Path
) -> None:
    log: Log = {}
    stop = threading.Event()

    def keep_producing() -> None:
        start = 0
        while not stop.is_set():
            log.update(produce(kafka, topics.clicks, plain_rows(20, start), "lz4"))
            start += 20
            stop.wait(0.05)

    producing = threading.Thread(target=keep_producing)
    producing.start()

    def start(transport: str) -> Worker:
        options: dict[str, Any] = {"seconds_per_chunk": 0.01, "chunk_max_records": 50}
        group = topics.prefix + transport
        return stack.enter_context(worker(tmp_path, kafka, topics.clicks, group, transport, "late", **options))

    with ExitStack() as stack:
        try:
            staying = {transport: start(transport) for transport in TRANSPORTS}
            for stayer in staying.values():
                stayer.wait_for(lambda w: len(w.acked()) >= 300)
            leaving = {transport: start(transport) for transport in TRANSPORTS}
            for leaver in leaving.values():
                leaver.wait_for(lambda w: len(w.acked()) >= 300)
            for leaver in leaving.values():
                assert leaver.end() == 0
        finally:
            stop.set()
            producing.join()
        for transport in TRANSPORTS:
            left, stayed = leaving[transport], staying[transport]
            stayed.wait_for(lambda w, left=left: len(w.acked() | left.acked()) >= len(log))
            assert dict(stayed.rows()) | dict(left.rows()) == log
            assert stayed.acked() + left.acked() == Counter(log.keys())
            for process in (stayed, left):
                partitions = {entry["partition"] for entry in process.entries("ack")}
                assert partitions == ({0, 1} if process is stayed else partitions)
                assert len({entry["partition"] for entry in left.entries("ack")}) == 1


@pytest.mark.slow
def test_the_markers_of_transactions_are_passed_over(apache_kafka: str, tmp_path: Path) -> None:
    with topics_on(apache_kafka) as topics, ExitStack() as stack:
        producer = Producer({"bootstrap.servers": apache_kafka, "transactional.id": topics.prefix})
        producer.init_transactions(30)
        for end in ("commit", "abort", "commit"):
            producer.begin_transaction()
            for row in range(10):
                producer.produce(topics.clicks, b"%d" % row, partition=0)
            producer.flush(20)
            (producer.commit_transaction if end == "commit" else producer.abort_transaction)(20)
        workers = {
            transport: stack.enter_context(
                worker(tmp_path, apache_kafka, topics.clicks, topics.prefix + transport, transport, "at once")
            )
            for transport in TRANSPORTS
        }
        # Ten records and a marker, three times.
        for transport in TRANSPORTS:
            workers[transport].wait_for(lambda w: len(w.rows()) == 30)
            group = topics.prefix + transport
            wait_for(
                lambda group=group: committed(apache_kafka, group, topics.clicks) == {0: 33},
                lambda group=group: str(committed(apache_kafka, group, topics.clicks)),
            )
        produce(apache_kafka, topics.clicks, [(0, (None, b"after", NOW_MS))])
        for transport in TRANSPORTS:
            workers[transport].wait_for(lambda w: len(w.rows()) == 31)
            entries = workers[transport].entries("chunk")
            assert_no_hole(entries)
            assert entries[-1]["offsets"] == [33]
            assert entries[-1]["next_offset"] == 34
            group = topics.prefix + transport
            wait_for(
                lambda group=group: committed(apache_kafka, group, topics.clicks) == {0: 34},
                lambda group=group: str(committed(apache_kafka, group, topics.clicks)),
            )


def test_where_aiokafka_is_another_the_slow_way_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch, "version", lambda package: "0.15.0")
    app = ChunkApp("reader", broker="kafka://127.0.0.1:1")
    assert app.chunk_transport == "stock"
    assert "record by record" in caplog.text
    assert "0.15.0" in caplog.text
    with pytest.raises(ConfigurationError, match=r"0\.15\.0"):
        ChunkApp("reader", broker="kafka://127.0.0.1:1", chunk_transport="fast")


def test_where_faust_is_another_it_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faust.transport.consumer.Consumer, "_new_offset")
    with pytest.raises(
        ConfigurationError, match=r"no Consumer\._new_offset\(self, tp\); install faust-streaming==0\.15\.3"
    ):
        ChunkApp("reader", broker="kafka://127.0.0.1:1")


def test_the_fast_way_is_taken_where_it_can_be_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = ChunkApp("reader", broker="kafka://127.0.0.1:1", broker_session_timeout=9.0)
    assert app.chunk_transport == "fast"
    assert caplog.text == ""
    assert app.conf.broker_session_timeout == 9.0
    assert app.conf.broker_commit_interval == 1.0
    assert app.conf.topic_disable_leader is True
