"""A record is sent when every replica has it; everything else is an error that says what was not done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError, MessageSizeTooLargeError, NotEnoughReplicasError
from faust.exceptions import ProducerSendError

from streams.broker import DependencyError
from streams.dead_letter import DeadLetter
from streams.send import Sender, TooLargeError
from streams.validate import Reason


class Producer:
    """Stands in for Faust's: keeps records, and answers each with what it is told."""

    def __init__(self, *answers: Exception | None, raises_at_once: bool = False) -> None:
        self.answers, self.raises_at_once = list(answers), raises_at_once
        self.records: list[tuple[Any, ...]] = []

    async def send(self, *record: Any) -> Awaitable[None]:
        self.records.append(record)
        answer = self.answers.pop(0) if self.answers else None
        if answer and self.raises_at_once:
            raise ProducerSendError("Error while sending") from answer
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if answer:
            future.set_exception(answer)
        else:
            future.set_result(None)
        return future


def test_a_record_goes_out_as_it_is() -> None:
    producer = Producer()
    asyncio.run(Sender(producer.send, 1).send("topic", 3, b"value", b"key", [("a", b"b")]))
    assert producer.records == [("topic", b"key", b"value", 3, None, [("a", b"b")])]


@pytest.mark.parametrize("raises_at_once", [True, False])
@pytest.mark.parametrize("failure", [KafkaTimeoutError(), NotEnoughReplicasError()])
def test_a_record_that_is_not_acknowledged_is_a_dependency_away(failure: Exception, raises_at_once: bool) -> None:
    producer = Producer(failure, raises_at_once=raises_at_once)
    with pytest.raises(
        DependencyError,
        match=r"record of 5 bytes to partition 3 of topic 'topic' was not ack.*" + type(failure).__name__,
    ):
        asyncio.run(Sender(producer.send, 1).send("topic", 3, b"value"))


def test_an_answer_that_never_comes_is_waited_for_until_the_deadline() -> None:
    async def never(*_: Any) -> Awaitable[None]:
        return asyncio.get_running_loop().create_future()

    with pytest.raises(DependencyError, match=r"within 0\.01 s"):
        asyncio.run(Sender(never, 0.01).send("topic", 3, b"value"))


def test_a_bug_is_not_taken_for_a_dependency() -> None:
    async def broken(*_: Any) -> Awaitable[None]:
        raise AssertionError("Unrecognized partition")

    with pytest.raises(AssertionError):
        asyncio.run(Sender(broken, 1).send("topic", 3, b"value"))


@pytest.mark.parametrize("raises_at_once", [True, False])
def test_a_dead_letter_too_large_for_its_topic_goes_without_its_value(raises_at_once: bool) -> None:
    producer = Producer(MessageSizeTooLargeError(), raises_at_once=raises_at_once)
    letter = DeadLetter(b"key", b"x" * 9, Reason.TOO_LARGE, "clicks", 1, 7, 5.0)
    asyncio.run(Sender(producer.send, 1).send_dead_letter("letters", letter))
    assert producer.records == [
        ("letters", b"key", b"x" * 9, 1, None, letter.headers()),
        ("letters", b"key", None, 1, None, letter.headers_without_value()),
    ]


def test_another_record_too_large_for_its_topic_is_an_error() -> None:
    producer = Producer(MessageSizeTooLargeError())
    with pytest.raises(TooLargeError, match=r"max\.message\.bytes"):
        asyncio.run(Sender(producer.send, 1).send("topic", 3, b"value"))
