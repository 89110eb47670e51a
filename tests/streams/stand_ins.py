"""Stand-ins of the unit tests of streams: clicks as producers write them, a clock that stands, a broker in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from streams.dead_letter import DeadLetter, Headers
from streams.fetch import Chunk
from streams.send import TooLargeError


def click(user: object = "u1", item: object = "i1", time: object = 1_790_000_000.0, **fields: object) -> bytes:
    """One click's JSON."""
    return json.dumps({"user_id": user, "item_id": item, "event_time": time, **fields}).encode()


def random_clicks(num_clicks: int, seed: int, num_users: int = 40, num_items: int = 60) -> list[bytes]:
    """Clicks of which items and users are skewed, with a context in places."""
    rng = np.random.default_rng(seed)
    users, items = rng.zipf(1.3, num_clicks) % num_users, rng.zipf(1.3, num_clicks) % num_items
    return [
        click(f"u{user}", f"i{item}", 1_790_000_000.0 + n, **({"context": {"hour": n % 24}} if n % 3 else {}))
        for n, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True))
    ]


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def chunk(values: Sequence[bytes | None], first_offset: int, partition: int = 0, topic: str = "clicks") -> Chunk:
    """Consecutive records as one chunk, each with its offset's number as key."""
    offsets = np.arange(first_offset, first_offset + len(values), dtype=np.int64)
    return Chunk(
        topic=topic,
        partition=partition,
        first_offset=first_offset,
        next_offset=first_offset + len(values),
        offsets=offsets,
        values=list(values),
        keys=[b"key-%d" % offset for offset in offsets],
        timestamps=1_790_000_000.0 + offsets,
    )


class Event:
    """What Faust gives an agent, as far as it is used."""

    def __init__(self, value: Chunk) -> None:
        self.value = value
        self.acked = False

    def ack(self) -> bool:
        self.acked = True
        return True


class ClicksInMemory:
    """The clicks of one partition, as `broker.ClicksOnBroker` gives them, some at a time; none below first_offset."""

    def __init__(self, values: Sequence[bytes | None], at_a_time: int = 100, first_offset: int = 0) -> None:
        self.values, self.at_a_time, self.first_offset = values, at_a_time, first_offset
        self.reads: list[tuple[int, int]] = []

    def read(
        self, partition: int, start: int, stop: int, cancelled: Callable[[], bool]
    ) -> Iterator[tuple[list[bytes | None], np.ndarray]]:
        self.reads.append((start, stop))
        start = max(start, self.first_offset)
        for low in range(start, stop, self.at_a_time):
            if cancelled():
                return
            high = min(low + self.at_a_time, stop)
            yield list(self.values[low:high]), np.arange(low, high)

    def ends(self, partition: int, cancelled: Callable[[], bool]) -> tuple[int, int]:
        return self.first_offset, len(self.values)


class SenderInMemory:
    """Keeps what is sent: (partition, value) of micro-batches, dead letters. `fail_after`: sends that still succeed."""

    def __init__(self, fail_after: int | None = None, failure: Exception | None = None) -> None:
        self.micro_batches: list[tuple[int, bytes]] = []
        self.letters: list[DeadLetter] = []
        self.fail_after, self.failure = fail_after, failure

    async def send(
        self, topic: str, partition: int, value: bytes | None, key: bytes | None = None, headers: Headers | None = None
    ) -> None:
        self._count()
        assert topic == "micro-batches" and value is not None
        self.micro_batches.append((partition, value))

    async def send_dead_letter(self, topic: str, letter: DeadLetter) -> None:
        self._count()
        assert topic == "clicks-dead-letter"
        self.letters.append(letter)

    def _count(self) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise self.failure or TooLargeError("told to fail")
            self.fail_after -= 1
