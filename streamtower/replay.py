"""Replays clicks as if they happened now, evenly at a given rate.

Station: between a data set and the producer. It says how many clicks it has sent and which items were clicked most.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec

from streams.contract import ClickEvent
from streamtower.datasets.clicks import Clicks
from streamtower.producer import ClickProducer, DeliveryError

TICK_SECONDS = 0.01
LONGEST_CATCH_UP_SECONDS = 0.5
"""After a halt longer than this, the clicks that were due meanwhile are not sent in one burst, but the clock is set."""


class Pace:
    """How many events are due, for an even rate.

    Args:
        rate: events a second, > 0.
        clock: seconds that never fall.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._start = clock()
        self._given = 0

    def due(self) -> int:
        """How many events may be sent now, given that all that were due before have been."""
        elapsed = self._clock() - self._start
        behind = elapsed - self._given / self._rate
        if behind > LONGEST_CATCH_UP_SECONDS:
            self._start += behind - LONGEST_CATCH_UP_SECONDS
            elapsed = self._clock() - self._start
        count = int(elapsed * self._rate) - self._given
        self._given += count
        return count


class Replay:
    """Sends the clicks from a thread of its own, from `start` until the data's end or `stop`.

    The only user of its producer between the two.
    """

    def __init__(self, pieces: Iterator[Clicks], producer: ClickProducer, rate: float) -> None:
        """
        Args:
            pieces: the clicks; a replay that is stopped has taken no piece that it did not begin.
            rate: clicks a second, > 0.
        """
        self._pieces = pieces
        self._producer = producer
        self._rate = rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self.num_sent = 0
        self.at_end = False
        """Whether the data's last click has been sent."""
        self.error: Exception | None = None
        """What ended the thread before its time."""
        self.item_counts: Counter[str] = Counter()
        """Clicks sent, by item id. To be read when the replay has stopped."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Sends no more; returns when everything sent is acknowledged, or after the timeout."""
        self._stop.set()
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            try:
                self._producer.flush(timeout_seconds)
            except DeliveryError as error:
                self.error = self.error or error

    def _run(self) -> None:
        try:
            events = self._events()
            pace = Pace(self._rate)
            while not self._stop.wait(TICK_SECONDS):
                for _ in range(pace.due()):
                    event = next(events, None)
                    if event is None:
                        self.at_end = True
                        return
                    # The clicks are old, the demonstration is about now.
                    self._producer.produce(msgspec.structs.replace(event, event_time=time.time()))
                    self.num_sent += 1
                self._producer.poll()
        except Exception as error:  # told by the thread that waits
            self.error = error

    def _events(self) -> Iterator[ClickEvent]:
        for piece in self._pieces:
            for event in piece.events():
                self.item_counts[event.item_id] += 1
                yield event
