"""What becomes of a value that is no click: a dead letter, and the end of the service if there are too many of them.

Station: beside validate, on the way to the dead-letter topic. It sends nothing itself, and never changes the bytes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from streams.validate import Reason

EXIT_BAD_INPUT = 65
"""Too large a share of the input is no clicks (EX_DATAERR); all of it was kept as dead letters."""

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A rejected record with its reason and its position: enough to produce it again.

    At least once: after a crash the same record may come as a dead letter again; topic, partition and offset tell.
    """

    key: bytes | None
    value: bytes | None
    reason: Reason
    topic: str
    partition: int
    offset: int
    time: float
    """Kafka's timestamp of the record, in seconds since the epoch; NaN: it had none."""

    def headers(self) -> Headers:
        """Headers `reason`, `topic`, `partition`, `offset`, `time` as text."""
        return [
            ("reason", self.reason.value.encode()),
            ("topic", self.topic.encode()),
            ("partition", b"%d" % self.partition),
            ("offset", b"%d" % self.offset),
            ("time", f"{self.time:.3f}".encode()),
        ]

    def headers_without_value(self) -> Headers:
        """Headers for when the value is longer than the dead-letter topic takes and is left behind in its topic."""
        return [*self.headers(), ("omitted-value-bytes", b"%d" % len(self.value or b""))]


class RejectedShare:
    """The share of rejected ones among the last `window_clicks` clicks; a few more, as it counts runs of them."""

    def __init__(self, max_ratio: float, window_clicks: int) -> None:
        self._max_ratio, self._window_clicks = max_ratio, window_clicks
        self._runs: deque[tuple[int, int]] = deque()
        self.num_clicks = 0
        self.num_rejected = 0

    def add(self, num_clicks: int, num_rejected: int) -> None:
        """Counts a run of clicks in, and out what is no longer needed to fill the window."""
        self._runs.append((num_clicks, num_rejected))
        self.num_clicks += num_clicks
        self.num_rejected += num_rejected
        while self.num_clicks - self._runs[0][0] >= self._window_clicks:
            oldest_clicks, oldest_rejected = self._runs.popleft()
            self.num_clicks -= oldest_clicks
            self.num_rejected -= oldest_rejected

    @property
    def is_exceeded(self) -> bool:
        """Whether the window is full and more than the allowed share of it was rejected."""
        return self.num_clicks >= self._window_clicks and self.num_rejected > self._max_ratio * self.num_clicks
