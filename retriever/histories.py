"""What each user clicked last, followed from the topic `micro-batches` in a thread of its own.

Station: beside the data's way, between streams and `encode`: a click counts for its user seconds later, though the
towers have not learnt it yet. It only reads: no offset is committed, and a record that breaks the contract is counted
and passed over. The history that a row carries is complete, so each user's last row of a micro-batch is all that is
looked at, and there is no state to save: at start the newest micro-batches are read, so many and no older than the
settings say, and whoever clicked in them is known as before.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from retriever.metrics import Metrics
from streams.contract import ContractError, MicroBatch

UInt64Array = npt.NDArray[np.uint64]
log = structlog.get_logger(__name__)

_RECORDS = 64
_CONSUME_SECONDS = 0.1
_REQUEST_SECONDS = 2.0
_STOP_SECONDS = 3.0


class HistoryTable:
    """User hash → item hashes of the last items, newest last; the users who clicked last are kept.

    One thread applies, any thread reads: each step is one operation on a dict, atomic under the interpreter's lock.
    """

    def __init__(self, max_users: int, history_length: int) -> None:
        self._max_users = max_users
        self._history_length = history_length
        self._histories: OrderedDict[int, bytes] = OrderedDict()
        self._next_offset: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._histories)

    def get(self, user_hash: int) -> UInt64Array | None:
        """uint64 [≤ history_length], newest last; None where no click of the user is known."""
        history = self._histories.get(user_hash)
        return None if history is None else np.frombuffer(history, np.uint64)

    def apply(self, batch: MicroBatch) -> tuple[int, int]:
        """Takes over the rows that are new. A row that was seen before (redelivered) changes nothing.

        Returns:
            Rows that were new, and users evicted for them.
        """
        fresh = batch.from_offset(self._next_offset.get(batch.partition, 0))
        self._next_offset[batch.partition] = max(batch.next_offset, self._next_offset.get(batch.partition, 0))
        if fresh is None:
            return 0, 0
        num_rows = len(fresh)
        # Each user's last row: the first from behind. In the order of the clicks, so that eviction is by last click.
        last = np.sort(num_rows - 1 - np.unique(fresh.user_hash[::-1], return_index=True)[1])
        # Histories with their own click behind them, one after the other, as bytes.
        ends = fresh.history_offsets[1:]
        items = np.insert(fresh.history_values, ends, fresh.item_hash).tobytes()
        stops = ends[last] + last + 1
        starts = np.maximum(fresh.history_offsets[:-1][last] + last, stops - self._history_length)
        histories = self._histories
        for user, start, stop in zip(
            fresh.user_hash[last].tolist(), (8 * starts).tolist(), (8 * stops).tolist(), strict=True
        ):
            histories[user] = items[start:stop]
            histories.move_to_end(user)
        evicted = max(0, len(histories) - self._max_users)
        for _ in range(evicted):
            histories.popitem(last=False)
        return num_rows, evicted


class HistoryFollower:
    """Reads `micro-batches` into a HistoryTable until stopped. A dead Kafka is waited for, without end."""

    def __init__(
        self,
        table: HistoryTable,
        metrics: Metrics,
        *,
        kafka_config: dict[str, Any],
        topic: str,
        lookback_seconds: float,
        max_micro_batches: int,
        partition_refresh_seconds: float,
        on_crash: Callable[[BaseException], object],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._metrics = metrics
        self._config = kafka_config
        self._topic = topic
        self._lookback_seconds = lookback_seconds
        self._max_micro_batches = max_micro_batches
        self._partition_refresh_seconds = partition_refresh_seconds
        self._on_crash = on_crash
        self._clock = clock
        self._positions: dict[int, int] = {}
        self._at_end: set[int] = set()
        self._newest_click = 0.0
        self._up: bool | None = None
        self._stopping = threading.Event()
        in_context = contextvars.copy_context().run  # its log lines name the service, as all others
        self._thread = threading.Thread(target=in_context, args=(self._run,), name="histories", daemon=True)
        self.caught_up = threading.Event()
        """Set once every partition has been read to its end since the start."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. One that waits for a dead Kafka is left behind: it holds nothing that could be lost."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        try:
            consumer = self._make_consumer()
            try:
                self._follow(consumer)
            finally:
                consumer.close()
        except BaseException as error:
            self._on_crash(error)

    def _make_consumer(self) -> Consumer:
        return Consumer(
            self._config
            | {
                "group.id": "streamtower-retriever",  # the library wants one; nothing is joined or committed
                "enable.auto.commit": False,
                "check.crcs": True,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",
                "queued.max.messages.kbytes": 16_384,
                "fetch.wait.max.ms": 100,
                "log_level": 2,  # what the library would print itself comes through error_cb too
                "error_cb": self._on_error,
            }
        )

    def _on_error(self, error: KafkaError) -> None:
        self._metrics.kafka_errors.inc()
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            self._say_up(False, str(error))

    def _say_up(self, up: bool, reason: str = "") -> None:
        """Sets the gauge; says it in the log where it changes."""
        if up != self._up:
            self._up = up
            self._metrics.kafka_up.set(up)
            (log.info if up else log.warning)("kafka answers" if up else "kafka does not answer", reason=reason)

    def _follow(self, consumer: Consumer) -> None:
        refresh_at = 0.0
        while not self._stopping.is_set():
            if time.monotonic() >= refresh_at:
                self._refresh_partitions(consumer)
                refresh_at = time.monotonic() + self._partition_refresh_seconds
            if not self._positions:
                self._stopping.wait(_CONSUME_SECONDS)
                continue
            for message in consumer.consume(_RECORDS, _CONSUME_SECONDS):
                self._take(message)
            if len(self._at_end) == len(self._positions):
                self.caught_up.set()
            self._measure(consumer)

    def _refresh_partitions(self, consumer: Consumer) -> None:
        """Assigns partitions that were not there before: at first from the lookback on, later ones from their start;
        in any case their newest micro-batches alone."""
        try:
            topic = consumer.list_topics(self._topic, timeout=_REQUEST_SECONDS).topics.get(self._topic)
            if topic is None or topic.error:
                if topic is not None and topic.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise KafkaException(topic.error)
                self.caught_up.set()  # no topic yet: there is nothing to know
            elif new := sorted(set(topic.partitions) - self._positions.keys()):
                since = 0.0 if self._positions else max(0.0, self._clock() - self._lookback_seconds)
                self._positions |= self._positions_at(consumer, new, since)
                consumer.assign([TopicPartition(self._topic, *position) for position in self._positions.items()])
                log.info("following", topic=self._topic, partitions=len(self._positions))
        except KafkaException as error:
            self._metrics.kafka_errors.inc()
            self._say_up(False, str(error))
        else:
            self._say_up(True)

    def _positions_at(self, consumer: Consumer, partitions: list[int], since: float) -> dict[int, int]:
        """Offset of the first record at or after `since` (seconds since the epoch) in each partition, else its end;
        `max_micro_batches` before its end at the earliest."""
        wanted = [TopicPartition(self._topic, partition, round(1000 * since)) for partition in partitions]
        # The ends come first: a record that is written between the two questions must not be passed over.
        bounds = {entry.partition: consumer.get_watermark_offsets(entry, timeout=_REQUEST_SECONDS) for entry in wanted}
        positions = {}
        for found in consumer.offsets_for_times(wanted, timeout=_REQUEST_SECONDS):
            if found.error:
                raise KafkaException(found.error)
            low, end = bounds[found.partition]
            first = found.offset if found.offset >= 0 else end
            positions[found.partition] = max(low, first, end - self._max_micro_batches)
        return positions

    def _take(self, message: Message) -> None:
        partition = message.partition()
        if error := message.error():
            if error.code() == KafkaError._PARTITION_EOF:
                self._at_end.add(partition)
            else:
                self._on_error(error)
            return
        self._positions[partition] = message.offset() + 1
        outcome = "applied"
        try:
            batch = MicroBatch.decode(message.value() or b"")
            if batch.partition != partition:
                raise ContractError(
                    f"a micro-batch of partition {batch.partition} was written to partition {partition}"
                )
        except ContractError as error:
            log.warning("micro-batch rejected", partition=partition, offset=message.offset(), reason=str(error))
            outcome = "rejected"
        else:
            num_rows, evicted = self._table.apply(batch)
            if num_rows:
                self._metrics.clicks.inc(num_rows)
                self._metrics.users.set(len(self._table))
                self._metrics.users_evicted.inc(evicted)
                self._newest_click = max(self._newest_click, float(batch.ingest_time.max()))
                self._metrics.followed.set(self._newest_click)
            else:
                outcome = "old"
        self._metrics.micro_batches.labels(outcome).inc()

    def _measure(self, consumer: Consumer) -> None:
        lag = 0
        for partition, position in self._positions.items():
            _, end = consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
            lag += max(0, end - position)
        self._metrics.consumer_lag.set(lag)
