"""Hands records to Faust's producer and waits until every in-sync replica has them.

Station: the way out of streams, to the topics `micro-batches` and `clicks-dead-letter`. It knows no click.

Retries are the producer's: it repeats a request until the record is older than the deadline. One record of a
micro-batch topic's partition is under way at a time, so that none can overtake another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from faust.exceptions import ProducerSendError

from streams.broker import DependencyError
from streams.dead_letter import DeadLetter, Headers

Produce = Callable[[str, bytes | None, bytes | None, int | None, float | None, Headers | None], Awaitable[Any]]
"""Faust's `Producer.send`: topic, key, value, partition, timestamp, headers; gives a future of the acknowledgement."""


class TooLargeError(Exception):
    """The topic takes no record of this size: says which topic, how large."""


class Sender:
    """Sends one record and waits for its acknowledgement."""

    def __init__(self, produce: Produce, deadline_seconds: float) -> None:
        self._produce, self._deadline_seconds = produce, deadline_seconds

    async def send(
        self, topic: str, partition: int, value: bytes | None, key: bytes | None = None, headers: Headers | None = None
    ) -> None:
        """Returns once the record is acknowledged.

        Raises:
            TooLargeError: producer or broker refuse a record of this size.
            DependencyError: not acknowledged within the deadline, or refused.
        """
        try:
            async with asyncio.timeout(self._deadline_seconds):
                await (await self._produce(topic, key, value, partition, None, headers))
        except (KafkaError, ProducerSendError, TimeoutError) as error:
            cause = error.__cause__ if isinstance(error, ProducerSendError) and error.__cause__ else error
            what = f"a record of {len(value or b'')} bytes to partition {partition} of topic {topic!r}"
            if isinstance(cause, MessageSizeTooLargeError):
                raise TooLargeError(
                    f"{what} is too large for it; raise its max.message.bytes or lower max_micro_batch_bytes"
                ) from error
            raise DependencyError(
                f"{what} was not acknowledged within {self._deadline_seconds:g} s: {cause!r}"
            ) from error

    async def send_dead_letter(self, topic: str, letter: DeadLetter) -> None:
        """Sends a dead letter; one that is too large for the topic goes without its value, which its headers say.

        Raises:
            DependencyError: not acknowledged within the deadline, or refused.
        """
        try:
            await self.send(topic, letter.partition, letter.value, letter.key, letter.headers())
        except TooLargeError:
            await self.send(topic, letter.partition, None, letter.key, letter.headers_without_value())
