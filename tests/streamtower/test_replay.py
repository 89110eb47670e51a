"""Replaying clicks: an even pace by a settable clock, and what comes out at the producer's end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from streams.contract import ClickEvent
from streamtower.datasets.clicks import Clicks
from streamtower.producer import ClickProducer, DeliveryError
from streamtower.replay import LONGEST_CATCH_UP_SECONDS, Pace, Replay


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_pace_gives_as_many_as_the_rate_says_whenever_it_is_asked() -> None:
    clock = Clock()
    pace = Pace(256.0, clock)
    assert pace.due() == 0
    given = []
    for seconds in (1 / 64, 1 / 512, 1 / 512, 1 / 8, 0.0):
        clock.now += seconds
        given.append(pace.due())
    assert given == [4, 0, 1, 32, 0]


def test_after_a_long_halt_there_is_no_burst_beyond_the_catch_up() -> None:
    clock = Clock()
    pace = Pace(1_000.0, clock)
    clock.now += 60.0
    assert pace.due() == pytest.approx(1_000 * LONGEST_CATCH_UP_SECONDS, abs=1)
    clock.now += 0.1
    assert pace.due() == pytest.approx(100, abs=1)


class Sink(ClickProducer):
    """A producer without Kafka: keeps what it is given."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.events: list[ClickEvent] = []
        self._fail_after = fail_after

    def produce(self, event: ClickEvent) -> None:
        if len(self.events) == self._fail_after:
            raise DeliveryError("the queue has been full")
        self.events.append(event)

    def poll(self) -> None:
        pass

    def flush(self, timeout_seconds: float | None = None) -> None:
        pass


def pieces(*sizes: int) -> Iterator[Clicks]:
    start = 0
    for size in sizes:
        rows = np.arange(start, start + size)
        names = pa.array([str(row) for row in rows])
        yield Clicks(names, names, rows.astype(float))
        start += size


def wait_until_ended(replay: Replay) -> None:
    deadline = time.monotonic() + 20
    while not (replay.at_end or replay.error):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_clicks_are_sent_in_order_as_if_they_happened_now() -> None:
    sink, before = Sink(), time.time()
    replay = Replay(pieces(3, 4), sink, rate=1_000.0)
    replay.start()
    wait_until_ended(replay)
    replay.stop()
    assert [event.item_id for event in sink.events] == [str(n) for n in range(7)]
    assert all(before <= event.event_time <= time.time() for event in sink.events)
    assert (replay.num_sent, replay.error, replay.item_counts["3"]) == (7, None, 1)


def test_a_replay_that_is_stopped_sends_no_more() -> None:
    sink = Sink()
    replay = Replay(pieces(100_000), sink, rate=100.0)
    replay.start()
    replay.stop()
    sent = len(sink.events)
    assert sent == replay.num_sent < 100_000
    assert not replay.at_end


def test_what_ends_a_replay_is_kept_for_whoever_waits() -> None:
    replay = Replay(pieces(10), Sink(fail_after=4), rate=1_000.0)
    replay.start()
    wait_until_ended(replay)
    replay.stop()
    assert isinstance(replay.error, DeliveryError)
    assert replay.num_sent == 4
    assert not replay.at_end
