"""What of a partition may be committed: its chunks in order, finished in any order.

Station: beside the Faust extension in chunks.py, which enters chunks as they are fetched and asks before each commit.
It knows no Kafka client and reads no value.
"""

from __future__ import annotations

import asyncio
from collections import deque


class InFlight:
    """Records and bytes that were delivered to agents and are not acknowledged, of all partitions."""

    def __init__(self, max_records: int, max_bytes: int) -> None:
        self.num_records = 0
        self.num_bytes = 0
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        return self.num_records >= self._max_records or self.num_bytes >= self._max_bytes

    def add(self, num_records: int, num_bytes: int) -> None:
        """Counts a chunk in, or out where both are negative."""
        self.num_records += num_records
        self.num_bytes += num_bytes
        self._changed.set()

    async def has_room(self, seconds: float) -> bool:
        """Waits until it is not full, at most `seconds`; whether it is not."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.is_full:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._changed.wait()
            except TimeoutError:
                return False
        return True


class Span:
    """One chunk in a ledger: the offsets from the one before it to `next_offset` − 1."""

    __slots__ = ("finished", "ledger", "next_offset", "num_bytes", "num_records")

    def __init__(self, ledger: Ledger, next_offset: int, num_records: int, num_bytes: int) -> None:
        self.ledger = ledger
        self.next_offset = next_offset
        self.num_records = num_records
        self.num_bytes = num_bytes
        self.finished = False

    def finish(self) -> None:
        """Its chunk is acknowledged. Harmless a second time, and after the ledger was closed."""
        if not self.finished:
            self.finished = True
            self.ledger.note_finished(self)


class Ledger:
    """The chunks of one partition in the order of their offsets, from one assignment (or seek backwards) to the next.

    Invariant: `position` is the next_offset of the last chunk that is finished together with every chunk before it.
    """

    def __init__(self, start: int, in_flight: InFlight) -> None:
        self.start = start
        self.position = start
        """Next offset to commit."""
        self.end = start
        """Next offset expected from the broker."""
        self.delivered = start
        """next_offset of the last chunk that has records."""
        self._spans: deque[Span] = deque()
        self._in_flight = in_flight
        self._open = True

    @property
    def committable(self) -> int | None:
        """`position`, or None before anything is finished."""
        return self.position if self.position > self.start else None

    def enter(self, next_offset: int, num_records: int, num_bytes: int) -> Span:
        """Enters the chunk from `end` to next_offset − 1; one without records is finished at once.

        Raises:
            ValueError: next_offset is not after `end`.
        """
        if next_offset <= self.end:
            raise ValueError(f"a chunk up to offset {next_offset} cannot follow one up to {self.end}")
        span = Span(self, next_offset, num_records, num_bytes)
        self.end = next_offset
        self._spans.append(span)
        self._in_flight.add(num_records, num_bytes)
        if num_records:
            self.delivered = next_offset
        else:
            span.finish()
        return span

    def close(self) -> None:
        """Its chunks count no more: neither as in flight nor, when they are acknowledged later, for a commit."""
        if self._open:
            self._open = False
            for span in self._spans:
                if not span.finished:
                    self._in_flight.add(-span.num_records, -span.num_bytes)

    def note_finished(self, span: Span) -> None:
        """Called by a span, once."""
        if not self._open:
            return
        self._in_flight.add(-span.num_records, -span.num_bytes)
        while self._spans and self._spans[0].finished:
            self.position = self._spans.popleft().next_offset
