"""Reads the dead-letter topic, and sends what lies in it back to where it came from.

Station: behind streams' rejections; it turns records of `clicks-dead-letter` into records of `clicks`, byte for byte.
It mends nothing: what was wrong with a click is put right in streams (its bounds) or by its producer.

A replay reads up to the end that the topic has at its start, so a click that is rejected again is not sent again by the
same run. How far each reason has been replayed is kept in Kafka, as the offset of a consumer group for each reason; the
next run goes on from there.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams.contract import Topics
from streams.validate import Reason
from streamtower.producer import ClickProducer
from streamtower.topics import BrokerAwayError, TopicsError

_POLL_SECONDS = 0.5
_READ_RECORDS = 500

Offsets = dict[int, int]
"""Partition of the dead-letter topic → offset of the next letter."""


@dataclass(frozen=True)
class Letter:
    """A rejected record, as streams has kept it."""

    letter_partition: int
    letter_offset: int
    """Where it lies in the dead-letter topic."""
    key: bytes | None
    value: bytes | None
    reason: str
    topic: str
    partition: int
    offset: int
    """Where it came from."""
    time: float
    """Kafka's timestamp of the original record, in seconds since the epoch; NaN: it had none."""
    omitted_bytes: int
    """Length of a value that was too long for the dead-letter topic and was left in its own; 0: the value is here."""

    def excerpt(self, max_bytes: int) -> str:
        """The beginning of the value as text; what cannot be printed is escaped."""
        text = (self.value or b"")[:max_bytes].decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Listed:
    """What lies in the dead-letter topic."""

    reasons: Counter[str]
    """Reason → number of letters, of all that were asked for."""
    newest: list[Letter]
    num_foreign: int
    """Records that streams has not written."""


@dataclass(frozen=True)
class Replayed:
    """What a replay did."""

    reasons: Counter[str]
    """Reason → number of clicks sent."""
    num_without_value: int
    """Letters whose value was too long to be kept with them."""
    num_foreign: int
    """Records that streams has not written, or for another topic of clicks."""


class DeadLetters:
    """The dead-letter topic of one Streamtower. Every method waits for Kafka.

    Each may raise BrokerAwayError (no answer within the timeout) and TopicsError (there is no such topic).
    """

    def __init__(self, config: Mapping[str, Any], topics: Topics, *, timeout_seconds: float = 30.0) -> None:
        """
        Args:
            config: how to connect, for confluent-kafka.
            topics: names.
            timeout_seconds: longest silence of Kafka, > 0.
        """
        self._config = dict(config)
        self._topics = topics
        self._timeout = timeout_seconds

    def list_letters(self, reasons: Collection[str] = (), limit: int = 50) -> Listed:
        """Counts the letters of these reasons (none: of all), and gives the newest ones, oldest first."""
        counts: Counter[str] = Counter()
        newest: deque[Letter] = deque(maxlen=limit)
        num_foreign = 0
        for letter in self._read({}, self._ends()):
            if letter is None:
                num_foreign += 1
            elif not reasons or letter.reason in reasons:
                counts[letter.reason] += 1
                newest.append(letter)
        return Listed(counts, sorted(newest, key=lambda letter: letter.time), num_foreign)

    def replay(self, reasons: Collection[Reason] = (), *, again: bool = False) -> Replayed:
        """Sends letters back to `clicks`, with key and value as they were, into the partition that they came from.

        At least once: a replay that is cut off before its end sends the same again when it is repeated.

        Args:
            reasons: only letters of these; none: of all.
            again: from the beginning of the topic, whatever was replayed before.

        Raises:
            DeliveryError: some click was not acknowledged; the next replay begins where this one began.
        """
        chosen, named = list(reasons) or list(Reason), {reason.value: reason for reason in Reason}
        ends = self._ends()
        done = {reason: {} if again else self._replayed(reason, ends) for reason in chosen}
        begin = {p: min(of.get(p, 0) for of in done.values()) for p in ends}
        counts: Counter[str] = Counter()
        num_without_value = num_foreign = 0
        with ClickProducer(self._config, self._topics) as producer:
            for letter in self._read(begin, ends):
                if letter is None or letter.topic != self._topics.clicks or letter.reason not in named:
                    num_foreign += 1
                    continue
                of = done.get(named[letter.reason])
                if of is None or letter.letter_offset < of.get(letter.letter_partition, 0):
                    continue
                if letter.omitted_bytes:
                    num_without_value += 1
                    continue
                producer.produce_record(letter.key, letter.value, letter.partition)
                counts[letter.reason] += 1
        for reason in chosen:  # all is acknowledged
            self._note_replayed(reason, ends)
        return Replayed(counts, num_without_value, num_foreign)

    def _ends(self) -> Offsets:
        consumer = self._consumer("ends")
        try:
            name = self._topics.dead_letters
            found = consumer.list_topics(name, timeout=self._timeout).topics[name]
            if found.error is not None or not found.partitions:
                raise TopicsError(f"there is no topic {name}; `streamtower topics` makes it")
            places = [TopicPartition(name, partition) for partition in found.partitions]
            return {p.partition: consumer.get_watermark_offsets(p, timeout=self._timeout)[1] for p in places}
        except KafkaException as error:
            raise self._away(error.args[0].str()) from error
        finally:
            consumer.close()

    def _read(self, begin: Offsets, ends: Offsets) -> Iterator[Letter | None]:
        """Letters from `begin` (not named: from the first one) to `ends`; None for a record that is none.

        A letter that streams has written twice, after a crash, comes once.
        """
        name = self._topics.dead_letters
        seen: set[int] = set()
        left = {partition for partition, end in ends.items() if begin.get(partition, 0) < end}
        consumer = self._consumer("reader")
        try:
            consumer.assign([TopicPartition(name, partition, begin.get(partition, 0)) for partition in left])
            heard, trouble = time.monotonic(), "no records came"
            while left:
                for message in consumer.consume(_READ_RECORDS, _POLL_SECONDS):
                    partition = message.partition()
                    if error := message.error():
                        if error.code() == KafkaError._PARTITION_EOF and message.offset() >= ends[partition]:
                            left.discard(partition)
                        trouble = error.str()
                        continue
                    heard = time.monotonic()
                    if message.offset() < ends[partition]:
                        letter = _letter(message)
                        place = hash(letter and (letter.topic, letter.partition, letter.offset, letter.time))
                        if letter is None or place not in seen:
                            seen.add(place)
                            yield letter
                    if message.offset() + 1 >= ends[partition]:
                        left.discard(partition)
                if left and time.monotonic() - heard > self._timeout:
                    raise self._away(trouble)
        except KafkaException as error:
            raise self._away(error.args[0].str()) from error
        finally:
            consumer.close()

    def _replayed(self, reason: Reason, ends: Offsets) -> Offsets:
        consumer = self._consumer(f"replay-{reason.value}")
        try:
            places = [TopicPartition(self._topics.dead_letters, partition) for partition in ends]
            found = consumer.committed(places, timeout=self._timeout)
            return {p.partition: p.offset for p in found if p.offset != OFFSET_INVALID}
        except KafkaException as error:
            raise self._away(error.args[0].str()) from error
        finally:
            consumer.close()

    def _note_replayed(self, reason: Reason, ends: Offsets) -> None:
        consumer = self._consumer(f"replay-{reason.value}")
        try:
            places = [TopicPartition(self._topics.dead_letters, *place) for place in ends.items()]
            consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as error:
            raise self._away(error.args[0].str()) from error
        finally:
            consumer.close()

    def _consumer(self, name: str) -> Consumer:
        return Consumer(
            self._config
            | {
                "group.id": f"{self._topics.dead_letters}-{name}",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "enable.partition.eof": True,
                "check.crcs": True,
                "log_level": 2,
            }
        )

    def _away(self, why: str) -> BrokerAwayError:
        return BrokerAwayError(f"no Kafka broker answers at {self._config.get('bootstrap.servers')}: {why}")


def _letter(message: Message) -> Letter | None:
    headers = {name: value or b"" for name, value in message.headers() or []}
    try:
        return Letter(
            letter_partition=message.partition(),
            letter_offset=message.offset(),
            key=message.key(),
            value=message.value(),
            reason=headers["reason"].decode(),
            topic=headers["topic"].decode(),
            partition=int(headers["partition"]),
            offset=int(headers["offset"]),
            time=float(headers["time"]),
            omitted_bytes=int(headers.get("omitted-value-bytes", b"0")),
        )
    except (KeyError, ValueError):
        return None
