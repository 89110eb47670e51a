"""What streams asks of Kafka beside Faust: whether the topics are there, how long they are, and old clicks again.

Station: beside the agent, over confluent-kafka, so that it sees the broker even where Faust's consumer has gone silent.
It joins no consumer group and commits nothing. Every call blocks: threads only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import structlog
from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from streams.contract import Int64Array, Topics
from streams.service import ConfigurationError

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
_READ_RECORDS = 10_000
_REMEDY = "create the topics with `streamtower topics`"
_UNSUPPORTED = (KafkaError.UNSUPPORTED_VERSION, KafkaError._UNSUPPORTED_FEATURE)

log = structlog.get_logger("streams")


class DependencyError(Exception):
    """Kafka did not do its part within the deadline: says what was asked, of whom, and for how long."""


class ClicksOnBroker:
    """The clicks topic as it lies on the broker.

    For several threads; each `read` has a connection of its own.

    Args:
        config: confluent-kafka's, enough to connect.
        topics: names.
        group: whose committed offsets `committed` tells.
        deadline_seconds: how long `check_topics` and `read` go on asking.
    """

    def __init__(self, config: dict[str, Any], topics: Topics, group: str, deadline_seconds: float) -> None:
        self._config = config
        self._reader_config = {
            **config,
            "group.id": group,
            "enable.auto.commit": False,
            "check.crcs": True,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_uncommitted",  # as Faust's consumer reads
            "enable.partition.eof": True,
            "log_level": 2,  # what goes wrong is told by errors; without Kafka it would also write 20 lines a second
            "reconnect.backoff.ms": 500,
        }
        self._topics, self._deadline_seconds = topics, deadline_seconds
        self._observer: Consumer | None = None
        self._observing = threading.Lock()

    def check_topics(self) -> None:
        """Waits for the broker and its topics, and looks whether they can be used.

        Raises:
            DependencyError: nobody answered within the deadline.
            ConfigurationError: a topic was still missing at the deadline, or partitions do not match.
        """
        wanted = (self._topics.clicks, self._topics.micro_batches, self._topics.dead_letters)
        deadline, said = time.monotonic() + self._deadline_seconds, ""
        troubles: dict[
            int, str
        ] = {}  # why nobody answers: a wrong password, say, which the answer itself does not tell
        admin = AdminClient(
            {**self._config, "log_level": 2, "error_cb": lambda error: troubles.update({error.code(): error.str()})}
        )
        while True:
            away: KafkaException | None = None
            problems: list[str] = []
            try:
                found = admin.list_topics(timeout=min(_ANSWER_SECONDS, self._deadline_seconds)).topics
                sizes = {name: len(found[name].partitions) for name in wanted if name in found}
                sizes = {name: size for name, size in sizes.items() if size and not found[name].error}
                missing = [name for name in wanted if name not in sizes]
                problems = [f"topic {name!r} is missing on {self._where}; {_REMEDY}" for name in missing]
            except KafkaException as error:
                admin.poll(0)
                troubles.pop(KafkaError._ALL_BROKERS_DOWN, None)
                away = error
                problems = [
                    f"no answer from Kafka at {self._where}: {', '.join([error.args[0].str(), *troubles.values()])}"
                ]
            if not problems:
                break
            kind = str(sorted(troubles)) if away else str(problems)
            if kind != said:
                log.warning("waiting for kafka", problem="; ".join(problems), deadline_seconds=self._deadline_seconds)
                said = kind
            if time.monotonic() > deadline:
                if away:
                    raise DependencyError(f"{problems[0]} (waited {self._deadline_seconds:g} s)") from away
                raise ConfigurationError(problems)
            time.sleep(_POLL_SECONDS)
        fewer = [name for name in wanted if sizes[name] < sizes[wanted[0]]]
        if fewer:
            raise ConfigurationError(
                [
                    f"topic {name!r} has {sizes[name]} partitions, fewer than the {sizes[wanted[0]]} of "
                    f"{wanted[0]!r}: what comes from a partition goes to the one of the same number; {_REMEDY}"
                    for name in fewer
                ]
            )

    def bounds(self, partitions: Collection[int]) -> dict[int, tuple[int, int, int | None]]:
        """(first offset, end offset, committed offset or None) of each partition, fresh from the broker.

        Raises:
            DependencyError: the broker did not answer.
        """
        if not partitions:
            return {}
        try:
            with self._observing:
                observer = self._observer = self._observer or Consumer(self._reader_config)
                found = {}
                asked = [TopicPartition(self._topics.clicks, partition) for partition in partitions]
                for tp in observer.committed(asked, timeout=_ANSWER_SECONDS):
                    first, end = observer.get_watermark_offsets(tp, timeout=_ANSWER_SECONDS)
                    found[tp.partition] = first, end, None if tp.offset == OFFSET_INVALID else tp.offset
                return found
        except KafkaException as error:
            raise DependencyError(f"no offsets from Kafka at {self._where}: {error}") from error

    def ends(self, partition: int, cancelled: Callable[[], bool]) -> tuple[int, int]:
        """(first offset, end offset) of a partition, asked until the broker answers; (0, 0) once `cancelled` says so.

        Raises:
            DependencyError: the broker did not answer within the deadline.
        """
        deadline = time.monotonic() + self._deadline_seconds
        while not cancelled():
            try:
                first, end, _ = self.bounds([partition])[partition]
                return first, end
            except DependencyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
        return 0, 0

    def topic_id(self) -> str:
        """The id that the broker gave the clicks topic when it was made; "" from brokers that give none.

        Raises:
            DependencyError: the broker did not answer within the deadline.
        """
        name, deadline = self._topics.clicks, time.monotonic() + self._deadline_seconds
        admin = AdminClient({**self._config, "log_level": 2})  # to be held until its answer is here
        while True:
            try:
                future = admin.describe_topics(TopicCollection([name]), request_timeout=_ANSWER_SECONDS)[name]
                found = str(future.result(_ANSWER_SECONDS).topic_id)
                return "" if found.strip("A=") in ("", "None") else found
            except (KafkaException, TimeoutError) as error:
                if isinstance(error, KafkaException) and error.args[0].code() in _UNSUPPORTED:
                    return ""
                if time.monotonic() > deadline:
                    raise DependencyError(f"no id of topic {name!r} from Kafka at {self._where}: {error}") from error
                time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Lets the connections go."""
        if self._observer:
            self._observer.close()
            self._observer = None

    def read(
        self, partition: int, start: int, stop: int, cancelled: Callable[[], bool]
    ) -> Iterator[tuple[list[bytes | None], Int64Array]]:
        """The records of a partition with offsets in start … stop − 1, in order: values and offsets, some at a time.

        What retention has deleted is passed over. Ends early, without a word, when `cancelled` says so.

        Raises:
            DependencyError: no record came for the length of the deadline.
        """
        if start >= stop:
            return
        consumer = Consumer(self._reader_config)
        trouble: object = "no error was reported"
        try:
            consumer.assign([TopicPartition(self._topics.clicks, partition, start)])
            heard = time.monotonic()
            while not cancelled():
                values: list[bytes | None] = []
                offsets: list[int] = []
                ended = False
                for message in consumer.consume(_READ_RECORDS, _POLL_SECONDS):
                    if error := message.error():
                        ended = error.code() == KafkaError._PARTITION_EOF and message.offset() >= stop
                        trouble = error
                    elif message.offset() >= stop:
                        ended = True
                        break
                    else:
                        values.append(message.value())
                        offsets.append(message.offset())
                if values:
                    heard = time.monotonic()
                    yield values, np.array(offsets, np.int64)
                if ended:
                    return
                if time.monotonic() - heard > self._deadline_seconds:
                    raise DependencyError(
                        f"no clicks of partition {partition} from offset {start} on came from Kafka at {self._where} "
                        f"in {self._deadline_seconds:g} s: {trouble}"
                    )
        finally:
            consumer.close()

    @property
    def _where(self) -> str:
        return str(self._config["bootstrap.servers"])
