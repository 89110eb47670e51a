"""Dead letters on a real broker: listed, and sent back as they were."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from streams.contract import Topics
from streams.dead_letter import DeadLetter
from streams.validate import Reason
from streamtower.dead_letters import DeadLetters, Letter
from streamtower.topics import BrokerAwayError, TopicsError

pytestmark = pytest.mark.broker


class Bench:
    """Writes dead letters as streams does, and reads clicks."""

    def __init__(self, bootstrap: str, topics: Topics) -> None:
        self.bootstrap, self.topics = bootstrap, topics
        self.config = {"bootstrap.servers": bootstrap}
        self.producer = Producer(self.config | {"acks": "all"})
        self.dead_letters = DeadLetters(self.config, topics)

    def reject(self, offset: int, reason: Reason, value: bytes | None, partition: int = 0, **other: Any) -> DeadLetter:
        key = other.get("key", b"k%d" % offset)
        letter = DeadLetter(key, value, reason, self.topics.clicks, partition, offset, 1_700_000_000.5 + offset)
        headers = letter.headers_without_value() if other.get("omitted") else letter.headers()
        kept = None if other.get("omitted") else value
        self.producer.produce(self.topics.dead_letters, kept, key, partition, headers=headers)
        assert self.producer.flush(30) == 0
        return letter

    def clicks(self) -> list[tuple[int, bytes | None, bytes | None]]:
        """Partition, key and value of all clicks."""
        consumer = Consumer(self.config | {"group.id": f"{self.topics.prefix}reader"})
        name, found = self.topics.clicks, []
        for partition in (0, 1):
            place = TopicPartition(name, partition, 0)
            end = consumer.get_watermark_offsets(place, timeout=30)[1]
            consumer.assign([place])
            deadline, read = time.monotonic() + 30, 0
            while read < end:
                assert time.monotonic() < deadline
                for message in consumer.consume(100, 0.2):
                    found.append((partition, message.key(), message.value()))
                    read = message.offset() + 1
        consumer.close()
        return found


@pytest.fixture
def bench(kafka: str, topics: Topics) -> Bench:
    return Bench(kafka, topics)


def test_letters_are_listed_with_reason_place_time_and_the_beginning_of_the_value(bench: Bench) -> None:
    bench.reject(7, Reason.NOT_JSON, b"{broken\x00\xff" + b"x" * 500)
    bench.reject(9, Reason.BAD_ID, b"{}", partition=1, key=None)
    listed = bench.dead_letters.list_letters()
    assert listed.reasons == {"not_json": 1, "bad_id": 1} and listed.num_foreign == 0
    first, second = listed.newest
    assert (first.reason, first.topic, first.partition, first.offset) == ("not_json", bench.topics.clicks, 0, 7)
    assert (first.time, first.excerpt(12)) == (1_700_000_007.5, r"{broken\x00\xffxxx")
    assert (second.partition, second.offset, second.key, second.value) == (1, 9, None, b"{}")


def test_of_many_letters_the_newest_are_shown_and_all_of_the_reason_counted(bench: Bench) -> None:
    for offset in range(6):
        bench.reject(offset, Reason.BAD_ID if offset % 2 else Reason.BAD_TIME, b"%d" % offset, partition=offset % 2)
    listed = bench.dead_letters.list_letters(["bad_id"], limit=2)
    assert listed.reasons == {"bad_id": 3}
    assert [letter.offset for letter in listed.newest] == [3, 5]


def test_what_is_sent_back_is_key_and_value_as_they_were_in_the_partition_they_came_from(bench: Bench) -> None:
    values = [b'{"user_id": "\xff', None, b"", b"0"]
    for offset, value in enumerate(values):
        bench.reject(offset, Reason.NOT_UTF8, value, partition=offset % 2, key=None if offset == 3 else b"k%d" % offset)
    done = bench.dead_letters.replay()
    assert done.reasons == {"not_utf8": 4} and done.num_without_value == done.num_foreign == 0
    assert bench.clicks() == [(0, b"k0", values[0]), (0, b"k2", b""), (1, b"k1", None), (1, None, b"0")]


def test_each_is_sent_once_by_all_replays_of_its_reason_and_again_when_asked(bench: Bench) -> None:
    bench.reject(0, Reason.BAD_ID, b"a")
    bench.reject(1, Reason.BAD_TIME, b"b")
    assert bench.dead_letters.replay([Reason.BAD_TIME]).reasons == {"bad_time": 1}
    bench.reject(2, Reason.BAD_TIME, b"b")  # rejected again
    assert bench.dead_letters.replay().reasons == {"bad_id": 1, "bad_time": 1}
    assert bench.dead_letters.replay().reasons == {}
    assert [value for _, _, value in bench.clicks()] == [b"b", b"a", b"b"]
    assert bench.dead_letters.replay([Reason.BAD_ID], again=True).reasons == {"bad_id": 1}


def test_a_letter_that_was_written_twice_is_sent_once(bench: Bench) -> None:
    for _ in range(2):
        bench.reject(4, Reason.BAD_ID, b"a")
        bench.reject(5, Reason.BAD_ID, b"a")
    assert bench.dead_letters.replay().reasons == {"bad_id": 2}


def test_what_cannot_be_sent_is_counted(bench: Bench) -> None:
    bench.reject(0, Reason.TOO_LARGE, b"long" * 10, omitted=True)
    bench.producer.produce(bench.topics.dead_letters, b"no headers", partition=1)
    headers = DeadLetter(None, b"", Reason.BAD_ID, "other-clicks", 0, 0, 0.0).headers()
    bench.producer.produce(bench.topics.dead_letters, b"of another topic", partition=0, headers=headers)
    assert bench.producer.flush(30) == 0
    done = bench.dead_letters.replay()
    assert (done.reasons, done.num_without_value, done.num_foreign) == ({}, 1, 2)
    [letter] = [letter for letter in bench.dead_letters.list_letters().newest if letter.reason == "too_large"]
    assert (letter.value, letter.omitted_bytes) == (None, 40)
    assert bench.clicks() == []


def test_a_topic_that_is_missing_and_a_broker_that_is_away_are_named(bench: Bench) -> None:
    with pytest.raises(TopicsError, match="there is no topic nobody-made-clicks-dead-letter"):
        DeadLetters(bench.config, Topics("nobody-made-")).list_letters()
    with pytest.raises(BrokerAwayError, match=r"127\.0\.0\.1:1"):
        DeadLetters({"bootstrap.servers": "127.0.0.1:1"}, Topics(), timeout_seconds=0.3).replay()


def test_the_command_line_prints_one_document(bench: Bench) -> None:
    bench.reject(3, Reason.BAD_REWARD, b'{"reward": -1}')

    def run(*arguments: str) -> Any:
        place = ["--kafka", bench.bootstrap, "--topic-prefix", bench.topics.prefix]
        command = [sys.executable, "-m", "streamtower", "dead-letters", *arguments, *place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    assert json.loads(run("list", "--json", "--excerpt", "9")) == {
        "schema": "streamtower.dead-letters/1",
        "reasons": {"bad_reward": 1},
        "foreign": 0,
        "letters": [
            {
                "reason": "bad_reward",
                "topic": bench.topics.clicks,
                "partition": 0,
                "offset": 3,
                "time": "2023-11-14T22:13:23.500+00:00",
                "value_bytes": 14,
                "excerpt": '{"reward"',
            }
        ],
    }
    assert f'2023-11-14T22:13:23.500+00:00  {bench.topics.clicks}[0]@3  bad_reward  {{"reward": -1}}' in run("list")
    assert json.loads(run("replay", "--json")) == {
        "schema": "streamtower.replay/1", "sent": 1, "reasons": {"bad_reward": 1}, "without_value": 0, "foreign": 0,
    }  # fmt: skip
    assert run("replay") == "0 sent\n"


def test_an_excerpt_holds_nothing_that_a_terminal_obeys() -> None:
    letter = Letter(0, 0, None, b"\x1b[2J\n\xe2\x80\xae ok", "bad_id", "clicks", 0, 0, 0.0, 0)
    assert letter.excerpt(100) == r"\x1b[2J\n\u202e ok"
    assert letter.excerpt(0) == ""
