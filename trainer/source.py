"""Micro-batches and item events from Kafka, with the positions to resume from.

Station: the trainer's way in. It commits nothing that anybody resumes from: positions live in the checkpoint, and the
offsets in Kafka are for display. It learns nothing and drops nothing: what was learnt already is the loop's business.

Item events come first: at the start the items topic is read up to its end, before any micro-batch is given out, so that
features are there when items are clicked.

A record of `micro-batches` that cannot be decoded was written by our own streams and holds clicks: skipping it would
lose them in silence, so it ends the process (`BrokenRecordError`). A bad item event was written by somebody else: it is
counted, logged and passed over.

Where Kafka has deleted micro-batches behind a position, `retention_expired` says whether that ends the process, or
where it goes on. How many clicks are passed over is counted by the loop, from source offsets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from streams.contract import ContractError, MicroBatch, Topics
from trainer.item_events import ItemChange, decode_item_change
from trainer.metrics import Metrics
from trainer.progress import Positions

RetentionExpired = Literal["fail", "earliest", "latest"]
PROBE_SECONDS = 2.0
"""Silence after which Kafka is asked whether it is there."""
CLOSE_SECONDS = 2.0
"""Longest wait for Kafka at the end."""
MAX_RECORDS = 128
"""Most records of one poll."""

log = structlog.get_logger()


class SourceAwayError(Exception):
    """Kafka, or a topic in it, did not answer within the deadline."""


class ForeignTopicError(Exception):
    """The checkpoint has learnt from another topic `clicks` than this one."""


class SourceStoppedError(Exception):
    """The process is to end while Kafka is still waited for."""


class RetentionExpiredError(Exception):
    """Micro-batches that are to be learnt were deleted, and `retention_expired` is "fail"."""


class BrokenRecordError(Exception):
    """A record of `micro-batches` breaks the contract between streams and trainer."""


@dataclass(frozen=True)
class Delivery:
    """A micro-batch with the position to resume from once it is learnt."""

    batch: MicroBatch
    next_position: int
    """Offset in partition `batch.partition` of `micro-batches`."""


@dataclass(frozen=True)
class Poll:
    """What came in: item changes are to be taken before the micro-batches."""

    items: list[ItemChange] = field(default_factory=list)
    item_positions: dict[int, int] = field(default_factory=dict)
    """Partition of `items` → position to resume from once `items` are taken."""
    deliveries: list[Delivery] = field(default_factory=list)
    loading: bool = False
    """Nothing is to be published yet: the items of the start are not all here, and no micro-batch is given out before;
    or the micro-batches of the start are to be learnt first."""
    ended: bool = False
    """Nothing will ever come again, which Kafka never says."""


class Source(Protocol):
    """Where the loop gets its work."""

    def start(self, positions: Positions) -> None:
        """Called once, before the first poll. Partitions that are not named begin at their beginning; positions in a
        topic that was made anew are taken out."""

    def poll(self, timeout_seconds: float) -> Poll:
        """What there is; waits at most so long for the first record. Raises the errors of this module."""

    def lag(self) -> int:
        """Micro-batches that were not given out yet, as far as known."""

    def show_positions(self, positions: dict[int, int]) -> None:
        """Lets others see how far the checkpoint is. Never raises, never waits."""

    def close(self) -> None:
        """Ends the source; harmless when repeated."""


class KafkaSource:
    """Topics `micro-batches` and `items`, all partitions, by assignment: no group, no rebalance."""

    def __init__(
        self,
        config: dict[str, Any],
        topics: Topics,
        metrics: Metrics,
        *,
        deadline_seconds: float,
        retention_expired: RetentionExpired = "fail",
        learn_from: Mapping[int, int] | None = None,
        stopping: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            config: how to connect, for confluent-kafka.
            deadline_seconds: longest silence of Kafka before `SourceAwayError`.
            retention_expired: what to do where micro-batches were deleted before they were learnt.
            learn_from: partition of `clicks` → first offset that is to be learnt by a trainer that begins anew; with it
                polls are `loading` until all micro-batches that were there at the start are given out.
            stopping: once set, `start` waits no longer.
            clock: rising seconds.
        """
        self._config = {**config, "log_level": 2}
        self._topics = topics
        self._metrics = metrics
        self._deadline = deadline_seconds
        self._retention_expired = retention_expired
        self._learn_from = learn_from
        self._stopping = stopping or threading.Event()
        self._clock = clock
        self._heard = clock()
        self._consumer = Consumer(
            {
                **self._config,
                "group.id": f"{topics.prefix}trainer",
                "enable.auto.commit": False,
                "check.crcs": True,
                "enable.auto.offset.store": False,
                # Where retention has cut off what was not learnt yet. The gap is counted by source offsets.
                "auto.offset.reset": "earliest",
                # Tells the end of a partition even where its last offsets hold no record (compaction, transactions).
                "enable.partition.eof": True,
                "error_cb": lambda error: log.warning("kafka error", error=error.str()),
                "queued.max.messages.kbytes": 65_536,
                "fetch.max.bytes": 16 << 20,
                "max.partition.fetch.bytes": 8 << 20,
                # The end of an empty partition is told when a fetch comes back empty.
                "fetch.wait.max.ms": 100,
            }
        )
        self._loading: set[int] = set()
        """Items partitions whose end has not been seen yet."""
        self._waiting: list[TopicPartition] = []
        """Partitions of micro-batches, until the items are loaded."""
        self._given: dict[int, int] = {}
        """Partition of micro-batches → offset of the next one to give out."""
        self._begun: set[int] = set()
        """Partitions of micro-batches of which something was given out, now or before: a hole there is a loss."""
        self._catch_up_to: dict[int, int] = {}
        """Partition of micro-batches → its end at the start, while it has to be reached."""

    def start(self, positions: Positions) -> None:
        """Finds the topics, checks the positions against them, and assigns: see `Source`.

        Raises:
            SourceAwayError: no answer, or no such topics, within the deadline.
            SourceStoppedError: the process is to end.
            ForeignTopicError: topic `clicks` is not the one that the checkpoint has learnt from.
            RetentionExpiredError: micro-batches that the checkpoint has not learnt were deleted.
        """
        topics = self._topics
        first = {topic: self._first_offsets(topic) for topic in (topics.clicks, topics.micro_batches, topics.items)}
        ids = self._topic_ids(list(first))
        anew = {topic for topic, known in positions.topic_ids.items() if ids.get(topic) not in (None, known)}
        if topics.clicks in anew:
            raise ForeignTopicError(
                f"topic {topics.clicks} was made anew, or is on another broker, since the checkpoint was written: its "
                "offsets say nothing about what was learnt; give the right broker or another checkpoint_dir"
            )
        for topic, places in ((topics.micro_batches, positions.micro_batches), (topics.items, positions.items)):
            if topic in anew:
                log.warning("topic was made anew: read from its beginning", topic=topic)
                places.clear()
        positions.topic_ids = {**positions.topic_ids, **ids}
        for partition, position in positions.micro_batches.items():
            if position < (oldest := first[topics.micro_batches].get(partition, 0)):
                positions.micro_batches[partition] = self._go_on_from(partition, position, oldest)

        def assignment(topic: str, places: dict[int, int]) -> list[TopicPartition]:
            return [
                TopicPartition(topic, partition, places.get(partition, OFFSET_BEGINNING)) for partition in first[topic]
            ]

        self._given = first[topics.micro_batches] | positions.micro_batches
        self._begun = set(positions.micro_batches)
        if self._learn_from is not None:
            self._catch_up_to = {partition: self._bounds(partition)[1] for partition in self._given}
        self._waiting = assignment(topics.micro_batches, positions.micro_batches)
        self._loading = set(first[topics.items])
        self._consumer.assign(assignment(topics.items, positions.items))

    def poll(self, timeout_seconds: float) -> Poll:
        """What there is: see `Source`."""
        self._catch_up_to = {p: end for p, end in self._catch_up_to.items() if self._given[p] < end}
        behind = bool(self._catch_up_to)  # before this poll: what it gives out is learnt after it
        messages = self._consumer.consume(MAX_RECORDS, timeout_seconds)
        self._listen(bool(messages))
        items: list[ItemChange] = []
        item_positions: dict[int, int] = {}
        deliveries: list[Delivery] = []
        for message in messages:
            if error := message.error():
                if error.code() == KafkaError._PARTITION_EOF:
                    if message.topic() == self._topics.items:
                        self._loading.discard(message.partition())
                    else:
                        self._given[message.partition()] = max(self._given[message.partition()], message.offset())
                elif error.fatal() or error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    raise SourceAwayError(f"Kafka refuses: {error.str()}")
                else:
                    log.warning("kafka error", error=error.str())
            elif message.topic() == self._topics.items:
                item_positions[message.partition()] = message.offset() + 1
                if change := self._item_change(message):
                    items.append(change)
            elif self._is_next(message):
                deliveries.append(_delivery(message))
                self._check_beginning(deliveries[-1].batch)
                self._given[message.partition()] = message.offset() + 1
        if self._waiting and not self._loading:
            self._consumer.incremental_assign(self._waiting)
            self._waiting = []
        return Poll(items, item_positions, deliveries, loading=behind or bool(self._loading))

    def lag(self) -> int:
        """Micro-batches not given out, by the ends that Kafka told with the last records."""
        places = [TopicPartition(self._topics.micro_batches, partition) for partition in self._given]
        ends = [self._consumer.get_watermark_offsets(place, cached=True)[1] for place in places]
        return sum(max(0, end - given) for end, given in zip(ends, self._given.values(), strict=True))

    def show_positions(self, positions: dict[int, int]) -> None:
        """Commits them for display, in the background."""
        offsets = [TopicPartition(self._topics.micro_batches, *position) for position in positions.items()]
        try:
            if offsets:
                self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            log.warning("positions not shown in kafka", error=str(error))

    def close(self) -> None:
        """Leaves Kafka; a Kafka that is away is not waited for long.

        The library waits, without end, for the answer to what `show_positions` sent. Nothing that counts is in it.
        """
        closing = threading.Thread(target=self._consumer.close, name="leave kafka", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            log.warning("left without Kafka's goodbye", waited_seconds=CLOSE_SECONDS)

    def _is_next(self, message: Message) -> bool:
        """Whether a micro-batch is to be given out; the reader is moved where it has to go on elsewhere."""
        partition, offset, given = message.partition(), message.offset(), self._given[message.partition()]
        # Holes are also left by transactions of whoever else writes there; nothing was lost then.
        hole = offset > given and partition in self._begun
        if hole and (oldest := self._bounds(partition)[0]) > given:
            self._given[partition] = given = self._go_on_from(partition, given, min(oldest, offset))
            if given > offset:
                self._consumer.seek(TopicPartition(self._topics.micro_batches, partition, given))
        return bool(offset >= given)

    def _check_beginning(self, batch: MicroBatch) -> None:
        """Whether a trainer that begins anew gets what it was to begin with."""
        wanted = (self._learn_from or {}).get(batch.partition, batch.first_offset)
        begun, self._begun = batch.partition in self._begun, self._begun | {batch.partition}
        if not begun and batch.first_offset > wanted and self._retention_expired == "fail":
            raise RetentionExpiredError(
                f"clicks {wanted} … {batch.first_offset - 1} of partition {batch.partition} were to be learnt and are "
                "in no micro-batch any more. Begin later, or with the oldest that are left: retention_expired earliest"
            )

    def _go_on_from(self, partition: int, position: int, oldest: int) -> int:
        """Where to read on, as micro-batches from `position` to before `oldest` were deleted."""
        what = (
            f"micro-batches {position} … {oldest - 1} of partition {partition} of topic "
            f"{self._topics.micro_batches!r} were deleted by its retention before they were learnt"
        )
        if self._retention_expired == "fail":
            raise RetentionExpiredError(
                f"{what}. They cannot be had back from Kafka. Set retention_expired to earliest, to go on with the "
                "oldest ones that are left, or to latest, to begin with those to come; and raise the topic's retention "
                "above the longest time that the trainer may be away"
            )
        log.warning("retention expired", reason=what, retention_expired=self._retention_expired)
        if self._retention_expired == "earliest":
            return oldest
        return self._bounds(partition)[1]

    def _bounds(self, partition: int) -> tuple[int, int]:
        """First offset and end of a partition of micro-batches."""
        try:
            return self._ask_bounds(TopicPartition(self._topics.micro_batches, partition))
        except KafkaException as error:
            raise SourceAwayError(f"Kafka does not tell its offsets: {error.args[0].str()}") from error

    def _first_offsets(self, topic: str) -> dict[int, int]:
        """First offset of each partition, waiting for the topic within the deadline."""
        since, said = self._clock(), ""
        while True:
            try:
                metadata = self._consumer.list_topics(topic, timeout=min(PROBE_SECONDS, self._deadline)).topics[topic]
                if metadata.error is None and metadata.partitions:
                    places = [TopicPartition(topic, partition) for partition in metadata.partitions]
                    return {place.partition: self._ask_bounds(place)[0] for place in places}
                problem = f"there is no topic {topic}; `streamtower topics` makes it"
            except KafkaException as error:
                problem = f"Kafka does not answer: {error.args[0].str()}"
            if self._clock() - since > self._deadline:
                raise SourceAwayError(f"{problem} (waited {self._deadline:g} s)")
            self._metrics.kafka_up.set(0)
            if problem != said:
                log.warning("waiting for kafka", problem=problem, deadline_seconds=self._deadline)
                said = problem
            if self._stopping.wait(0.2):
                raise SourceStoppedError

    def _topic_ids(self, topics: list[str]) -> dict[str, str]:
        """The ids that a broker gives topics when they are made; none from brokers before Kafka 2.8."""
        admin = AdminClient(self._config)  # to be held until its answers are here
        try:
            futures = admin.describe_topics(TopicCollection(topics), request_timeout=10.0)
            ids = {topic: str(future.result(10.0).topic_id) for topic, future in futures.items()}
        except (KafkaException, TimeoutError) as error:
            log.warning("topic ids are unknown: a topic made anew cannot be told", error=str(error))
            return {}
        return {topic: topic_id for topic, topic_id in ids.items() if topic_id.strip("A=") not in ("", "None")}

    def _ask_bounds(self, place: TopicPartition) -> tuple[int, int]:
        bounds: tuple[int, int] | None = self._consumer.get_watermark_offsets(place, timeout=PROBE_SECONDS)
        if bounds is None:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        return bounds

    def _listen(self, heard: bool) -> None:
        """Keeps watch over Kafka: silence is normal, no answer to a question is not."""
        now = self._clock()
        if not heard and now - self._heard >= PROBE_SECONDS:
            try:
                self._ask_bounds(TopicPartition(self._topics.micro_batches, min(self._given)))
                heard = True
                if self._loading:
                    log.warning("an end of the items topic was never told: going on", partitions=sorted(self._loading))
                    self._loading.clear()
            except KafkaException as error:
                self._metrics.kafka_up.set(0)
                if self._clock() - self._heard > self._deadline:
                    raise SourceAwayError(
                        f"no answer from Kafka for {self._deadline:g} s: {error.args[0].str()}"
                    ) from error
        if heard:
            self._heard = self._clock()
            self._metrics.kafka_up.set(1)

    def _item_change(self, message: Message) -> ItemChange | None:
        try:
            return decode_item_change(message.key(), message.value())
        except ContractError as error:
            self._metrics.item_events_rejected.inc()
            log.warning("item event rejected", partition=message.partition(), offset=message.offset(), error=str(error))
            return None


def _delivery(message: Message) -> Delivery:
    where = f"{message.topic()}[{message.partition()}]@{message.offset()}"
    try:
        batch = MicroBatch.decode(message.value() or b"")
    except ContractError as error:
        raise BrokenRecordError(f"{where}: {error}; streams and trainer may be of versions that do not fit") from error
    if batch.partition != message.partition():
        raise BrokenRecordError(f"{where} holds clicks of partition {batch.partition}; partition counts differ")
    return Delivery(batch, message.offset() + 1)
