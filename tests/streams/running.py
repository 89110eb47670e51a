"""The service as a process of its own on a real broker, and what it left in the topics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from streams.contract import MicroBatch, Topics

ROOT = Path(__file__).parent.parent.parent
GROUP = "streamtower-streams"
READY_SECONDS = 60.0


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Returns as soon as the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.02)


class Service:
    """`python -m streams`, or another command, with settings; ended at the end in any case."""

    def __init__(
        self, kafka: str, topics: Topics, command: Sequence[str] = ("-m", "streams"), **settings: object
    ) -> None:
        self.log = Path(tempfile.mkstemp(prefix="streams-", suffix=".log")[1])
        values = {"kafka": kafka, "topic_prefix": topics.prefix, "metrics_port": 0, "snapshots": "", **settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMTOWER_")}
        environment |= {f"STREAMTOWER_STREAMS_{name.upper()}": str(value) for name, value in values.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if error:
            print(self.log.read_text())
        self.log.unlink()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log lines of one name so far."""
        lines = [json.loads(line[line.index("{") :]) for line in self.log.read_text().splitlines() if '{"' in line]
        return [line for line in lines if line.get("event") == name]

    def wait_until_ready(self) -> Self:
        wait_for(lambda: self.process.poll() is not None or bool(self.events("ready")), "ready", READY_SECONDS)
        assert self.process.poll() is None, self.log.read_text()
        return self

    def metric(self, name: str) -> float:
        """A metric as /metrics shows it now; `name` with its labels."""
        port = self.events("listening")[0]["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"streamtower_streams_{name} "):
                    return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def movers(self) -> dict[str, Any]:
        """What /movers answers now."""
        port = self.events("listening")[0]["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/movers", timeout=10) as answer:
            return json.load(answer)  # type: ignore[no-any-return]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)


def produce(kafka: str, topic: str, partition: int, values: Sequence[bytes | None]) -> None:
    """Writes values, each with its number as key, and waits until the broker has them."""
    producer = Producer({"bootstrap.servers": kafka, "message.max.bytes": 4 << 20, "linger.ms": 5})
    failures: list[KafkaError] = []
    for number, value in enumerate(values):
        producer.produce(
            topic, value, b"key-%d" % number, partition, on_delivery=lambda error, _: error and failures.append(error)
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    assert failures == []


def read_all(kafka: str, topic: str, num_partitions: int = 2) -> list[Message]:
    """All records of a topic as of now, partition by partition."""
    config = {"bootstrap.servers": kafka, "group.id": "reader-of-all", "enable.auto.commit": False}
    consumer = Consumer({**config, "enable.partition.eof": True})
    found: list[Message] = []
    try:
        for partition in range(num_partitions):
            consumer.assign([TopicPartition(topic, partition, 0)])
            deadline, at_end = time.monotonic() + 30, False
            while not at_end:
                assert time.monotonic() < deadline, f"{topic} {partition} has no end"
                for message in consumer.consume(1000, 0.2):
                    if error := message.error():
                        at_end = at_end or error.code() == KafkaError._PARTITION_EOF
                    else:
                        found.append(message)
    finally:
        consumer.close()
    return found


def micro_batches(kafka: str, topics: Topics) -> dict[int, list[MicroBatch]]:
    """All micro-batches as of now, by partition; each lies in the partition that it names."""
    batches: dict[int, list[MicroBatch]] = {0: [], 1: []}
    for message in read_all(kafka, topics.micro_batches):
        batch = MicroBatch.decode(message.value())
        assert batch.partition == message.partition()
        batches[batch.partition].append(batch)
    return batches


def next_offsets(kafka: str, topics: Topics) -> dict[int, int]:
    """How far the micro-batches go, by partition."""
    return {
        partition: max((batch.next_offset for batch in batches), default=0)
        for partition, batches in micro_batches(kafka, topics).items()
    }


def committed(kafka: str, topics: Topics) -> dict[int, int]:
    """Offsets that the service has committed, by partition."""
    observer = Consumer({"bootstrap.servers": kafka, "group.id": topics.prefix + GROUP})
    try:
        asked = [TopicPartition(topics.clicks, partition) for partition in range(2)]
        return {tp.partition: max(0, tp.offset) for tp in observer.committed(asked, timeout=30)}
    finally:
        observer.close()
