"""Writes clicks and items into Kafka, so that none is lost, doubled or reordered on the way.

Station: the first one; topic `clicks` and topic `items`. It validates nothing: `streams` does that for every producer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streams.contract import ClickEvent, ItemEvent, Topics, encode_event

PARTITION_UA = -1
"""librdkafka's: the key decides."""


class DeliveryError(RuntimeError):
    """Records that Kafka did not acknowledge in time. The message counts them by cause."""


class ClickProducer:
    """Sends events in the background; errors come up in `num_failed`, `failures`, and at `flush` or the end of `with`.

    Idempotent, acknowledged by all in-sync replicas, lz4. The key is the user id, so that a user's clicks keep their
    order in one partition; the partitioner is the Java client's, so that producers in other languages agree. Not for
    several threads at once.

    Example:
        with ClickProducer({"bootstrap.servers": "127.0.0.1:9092"}) as producer:
            producer.produce(ClickEvent(user_id="anna", item_id="tea", event_time=time.time()))
    """

    num_sent: int = 0
    """Records handed over."""
    num_delivered: int = 0
    """Records that Kafka has acknowledged."""
    num_failed: int = 0
    """Records that were given up."""

    def __init__(
        self, config: Mapping[str, Any], topics: Topics | None = None, *, delivery_timeout_seconds: float = 30.0
    ) -> None:
        """
        Args:
            config: for confluent-kafka, `bootstrap.servers` at least; what it sets wins over what is set here.
            topics: names; default without prefix.
            delivery_timeout_seconds: how long one record, and a full queue, may wait for the broker, > 0.
        """
        self._topics = topics or Topics()
        self._timeout_seconds = delivery_timeout_seconds
        self.failures: Counter[str] = Counter()
        """Cause → number of records."""
        self._producer = Producer(
            {
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "lz4",
                "linger.ms": 10,
                "batch.size": 1 << 18,
                "queue.buffering.max.messages": 100_000,
                "message.max.bytes": 4 << 20,
                "delivery.timeout.ms": int(delivery_timeout_seconds * 1000),
                "partitioner": "murmur2_random",
                "log_level": 2,
            }
            | dict(config)
        )

    @property
    def num_in_flight(self) -> int:
        """Records handed over of which nothing is known yet."""
        return self.num_sent - self.num_delivered - self.num_failed

    def produce(self, event: ClickEvent) -> None:
        """Hands one click over; waits only while the queue is full.

        Raises:
            DeliveryError: the queue has stayed full for the whole delivery timeout.
        """
        self._send(self._topics.clicks, event.user_id.encode(), encode_event(event))

    def produce_item(self, event: ItemEvent) -> None:
        """Hands one item over: it replaces what was known of it."""
        self._send(self._topics.items, event.item_id.encode(), encode_event(event))

    def remove_item(self, item_id: str) -> None:
        """Says that an item is gone."""
        self._send(self._topics.items, item_id.encode(), None)

    def produce_record(self, key: bytes | None, value: bytes | None, partition: int) -> None:
        """Hands over a record of the topic of clicks as it is, for a partition of it; see `produce`."""
        self._send(self._topics.clicks, key, value, partition)

    def poll(self) -> None:
        """Takes in acknowledgements that have come; does not wait."""
        self._producer.poll(0)

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Waits until everything is acknowledged.

        Args:
            timeout_seconds: default the delivery timeout and a little, after which no record is left undecided.

        Raises:
            DeliveryError: some record, now or since the start, was given up or is still on its way.
        """
        self._producer.flush(self._timeout_seconds + 5.0 if timeout_seconds is None else timeout_seconds)
        if self.num_failed or self.num_in_flight:
            causes = dict(self.failures) | ({"no answer yet": self.num_in_flight} if self.num_in_flight else {})
            listed = ", ".join(f"{count} × {cause}" for cause, count in causes.items())
            raise DeliveryError(f"{self.num_failed + self.num_in_flight} of {self.num_sent} records: {listed}")

    def __enter__(self) -> ClickProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        else:  # something else went wrong: give what is under way a moment, and let that error be heard
            self._producer.flush(1.0)

    def _send(self, topic: str, key: bytes | None, value: bytes | None, partition: int = PARTITION_UA) -> None:
        deadline = 0.0
        while True:
            try:
                self._producer.produce(topic, value, key, partition, on_delivery=self._delivered)
                break
            except BufferError:
                deadline = deadline or time.monotonic() + self._timeout_seconds
                if time.monotonic() > deadline:
                    raise DeliveryError(
                        f"the queue has been full for {self._timeout_seconds:g} s: the broker takes nothing"
                    ) from None
                self._producer.poll(0.05)
            except KafkaException as error:  # refused before it was sent, such as a value that is too large
                self.num_sent += 1
                self.num_failed += 1
                self.failures[error.args[0].name()] += 1
                return
        self.num_sent += 1
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self.num_delivered += 1
        else:
            self.num_failed += 1
            self.failures[error.name()] += 1
