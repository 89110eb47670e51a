"""The producer that never stops: clicks with a known number in each partition, some of them no clicks at all."""

from __future__ import annotations

import json
import threading
import time
import zlib

import numpy as np
from confluent_kafka import KafkaError, Message, Producer

from streams.contract import Topics

NUM_USERS, NUM_ITEMS = 120, 150
MALFORMED_EVERY = 37
TICK_SECONDS = 0.05


def partition_of(user: int, num_partitions: int) -> int:
    """Where all clicks of a user go."""
    return zlib.crc32(b"u%d" % user) % num_partitions


class Writer(threading.Thread):
    """Writes clicks until `finish`; each record's key is its number in its partition: 0, 1, 2 …"""

    def __init__(self, kafka: str, topics: Topics, num_partitions: int, clicks_per_second: float, seed: int) -> None:
        super().__init__(name="writer")
        self.acknowledged: list[list[int]] = [[] for _ in range(num_partitions)]
        """Numbers that the broker has acknowledged, by partition, in the order in which it did."""
        self.failures: list[str] = []
        self._topics, self._num_partitions, self._rate = topics, num_partitions, clicks_per_second
        self._rng = np.random.default_rng(seed)
        self._numbers = [0] * num_partitions
        self._finished = threading.Event()
        self._producer = Producer(
            {
                "bootstrap.servers": kafka,
                "enable.idempotence": True,
                "compression.type": "lz4",
                "linger.ms": 5,
                "delivery.timeout.ms": 300_000,
                "log_level": 0,
            }
        )

    def run(self) -> None:
        due = time.monotonic()
        while not self._finished.is_set():
            for _ in range(max(1, round(self._rate * TICK_SECONDS))):
                self._write(int(self._rng.zipf(1.2)) % NUM_USERS, int(self._rng.zipf(1.2)) % NUM_ITEMS)
            self._producer.poll(0)
            due = max(due + TICK_SECONDS, time.monotonic() - 1.0)
            self._finished.wait(max(0.0, due - time.monotonic()))

    def written(self) -> list[int]:
        """How many records the broker has, by partition."""
        return [len(numbers) for numbers in self.acknowledged]

    def finish(self, multiple_of: int) -> None:
        """Ends the stream with a click of each user, and then some more up to a multiple of so many in a partition."""
        self._finished.set()
        self.join()
        for user in range(NUM_USERS):
            self._write(user, user % NUM_ITEMS, malformed=False)
        for partition in range(self._num_partitions):
            user = next(user for user in range(NUM_USERS) if partition_of(user, self._num_partitions) == partition)
            while self._numbers[partition] % multiple_of:
                self._write(user, self._numbers[partition] % NUM_ITEMS, malformed=False)
        assert self._producer.flush(120) == 0, "the broker has not taken everything"
        assert self.failures == []

    def _write(self, user: int, item: int, malformed: bool = True) -> None:
        partition = partition_of(user, self._num_partitions)
        number = self._numbers[partition]
        self._numbers[partition] += 1
        value: bytes | None = json.dumps(
            {"user_id": f"u{user}", "item_id": f"i{item}", "event_time": time.time(), "reward": 1 + number % 3}
        ).encode()
        if malformed and number % MALFORMED_EVERY == 5:
            value = (b"{", None, b'{"user_id": "u1", "event_time": 1}')[number % 3]
        self._produce(partition, number, value)

    def _produce(self, partition: int, number: int, value: bytes | None) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error:
                self.failures.append(error.str())
            else:
                self.acknowledged[partition].append(number)

        while True:
            try:
                self._producer.produce(self._topics.clicks, value, b"%d" % number, partition, on_delivery=delivered)
                return
            except BufferError:
                self._producer.poll(0.1)
