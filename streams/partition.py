"""One partition's clicks, from chunk to acknowledged micro-batches and dead letters.

Station: between the agent, which hands over chunks, and the sender. It runs as a task of its own, keeps the partition's
state, and acknowledges a chunk once everything that it holds is acknowledged by the broker. It knows no Faust.

Nothing overtakes anything: a micro-batch is sent when the one before it is acknowledged. So whatever lies in the topic,
every offset below a micro-batch's first has been sent before, even if two workers believe for a moment that the
partition is theirs; a reader that drops what it has seen misses nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import structlog

from streams.batcher import Batcher, Cut, encode_within, micro_batch
from streams.broker import ClicksOnBroker
from streams.contract import Topics
from streams.dead_letter import DeadLetter, RejectedShare
from streams.fetch import Chunk
from streams.metrics import Metrics
from streams.replay import replay
from streams.send import Sender
from streams.settings import StreamsSettings
from streams.snapshot import Snapshots
from streams.state import PartitionState
from streams.validate import validate

SLICE_CLICKS = 1024
"""Clicks validated at a time: few enough to stay in the processor's cache, and to let the event loop breathe."""

log = structlog.get_logger("streams")


class ChunkEvent(Protocol):
    """What of Faust's event is needed here."""

    value: Chunk

    def ack(self) -> bool: ...


class RetentionExpiredError(Exception):
    """Kafka has deleted clicks that are needed still: says which, for what, and what can be done."""


class TooManyRejectedError(Exception):
    """More of the input than allowed is no clicks; all of it was kept."""


class PartitionWorker:
    """Owns one partition's state, open micro-batch and unacknowledged chunks.

    Args:
        partition: its number.
        rejected_share: shared by all partitions of the process.
        snapshots: where states may be; None: nowhere.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        partition: int,
        settings: StreamsSettings,
        topics: Topics,
        sender: Sender,
        clicks_on_broker: ClicksOnBroker,
        metrics: Metrics,
        rejected_share: RejectedShare,
        snapshots: Snapshots | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.partition = partition
        self.state: PartitionState | None = None
        """None until the first chunk has come and the clicks before it are replayed."""
        self.is_replaying = False
        self.committed = 0
        """The committed offset, as far as known."""
        self._settings, self._topics, self._sender = settings, topics, sender
        self._clicks_on_broker, self._metrics = clicks_on_broker, metrics
        self._rejected_share, self._snapshots, self._clock = rejected_share, snapshots, clock
        self._inbox: asyncio.Queue[ChunkEvent] = asyncio.Queue()
        self._batcher = Batcher(0, settings.batch_size, settings.batch_age_seconds, clock)
        self._unacknowledged: deque[tuple[int, ChunkEvent]] = deque()
        self._cancelled = False

    @property
    def position(self) -> int | None:
        """The next offset to pass on: everything below it is acknowledged by the broker. None: known after a replay."""
        return self._batcher.first_offset if self.state and not self.is_replaying else None

    def put(self, event: ChunkEvent) -> None:
        """Hands over a chunk. Chunks come in order; they may begin again at an earlier offset, or further on."""
        self._inbox.put_nowait(event)

    async def run(self) -> None:
        """Works until cancelled.

        Raises:
            DependencyError: Kafka did not take or give what it had to, within the deadline.
            RetentionExpiredError: clicks that are needed were deleted, and `retention_expired` is "fail".
            TooManyRejectedError: more than the allowed share of the input is no clicks.
        """
        try:
            while True:
                due_in = self._batcher.due_in()
                if due_in == 0:
                    await self._close_by_age()
                    continue
                try:
                    async with asyncio.timeout(due_in):
                        event = await self._inbox.get()
                except TimeoutError:
                    continue
                await self._take(event)
        finally:
            self._cancelled = True  # ends a replay's thread

    async def _take(self, event: ChunkEvent) -> None:
        chunk = event.value
        started = self._clock()
        if self.state is None or chunk.first_offset > self._batcher.next_offset:
            await self._catch_up(chunk.first_offset)
        # What comes again after a rebalance is in the state and on its way already.
        start = int(np.searchsorted(chunk.offsets, self._batcher.next_offset))
        if start < len(chunk) and chunk.offsets[start] > self._batcher.next_offset:
            await self._pass_hole(int(chunk.offsets[start]))
            start = int(np.searchsorted(chunk.offsets, self._batcher.next_offset))
        for low in range(start, len(chunk), SLICE_CLICKS):
            await self._take_slice(chunk, low, min(low + SLICE_CLICKS, len(chunk)))
        self._unacknowledged.append((chunk.next_offset, event))
        self._acknowledge()
        self._metrics.processing_seconds.observe(self._clock() - started)
        if self._rejected_share.is_exceeded:
            raise TooManyRejectedError(
                f"{self._rejected_share.num_rejected} of the last {self._rejected_share.num_clicks} clicks were "
                f"rejected, more than max_rejected_ratio = {self._settings.max_rejected_ratio:g}; all are kept in "
                f"topic {self._topics.dead_letters!r} with their reasons. Mend the producer or raise max_rejected_ratio"
            )

    async def _take_slice(self, chunk: Chunk, low: int, high: int) -> None:
        offsets, times = chunk.offsets[low:high], chunk.timestamps[low:high]
        clicks, rejections = validate(
            chunk.values[low:high],
            offsets,
            times,
            self._settings.max_click_bytes,
            with_event_ids=self._settings.event_id_window > 0,
        )
        self._metrics.clicks.inc(high - low)
        letters = [
            DeadLetter(
                key=chunk.keys[low + rejection.index],
                value=chunk.values[low + rejection.index],
                reason=rejection.reason,
                topic=chunk.topic,
                partition=chunk.partition,
                offset=int(offsets[rejection.index]),
                time=float(times[rejection.index]),
            )
            for rejection in rejections
        ]
        # Before the clicks are batched: a chunk is acknowledged by its micro-batches, which must not outrun these.
        await asyncio.gather(*(self._sender.send_dead_letter(self._topics.dead_letters, letter) for letter in letters))
        for letter in letters:
            self._metrics.dead_letters.labels(letter.reason.value).inc()
        self._rejected_share.add(high - low, len(letters))
        next_offset = chunk.next_offset if high == len(chunk) else int(offsets[-1]) + 1
        for cut in self._batcher.add(clicks, offsets, next_offset):
            await self._send(cut)

    async def _close_by_age(self) -> None:
        if cut := self._batcher.close():
            await self._send(cut)
            self._acknowledge()

    async def _send(self, cut: Cut) -> None:
        assert self.state is not None
        num_accepted = len(cut.clicks)
        cut = replace(cut, clicks=self.state.without_duplicates(cut.clicks))
        self._metrics.duplicates.inc(num_accepted - len(cut.clicks))
        learnt = self.state.learn(cut.clicks, cut.next_offset)
        batch = micro_batch(self.partition, cut, learnt)
        for value in encode_within(batch, self._settings.max_micro_batch_bytes):
            started = self._clock()
            await self._sender.send(self._topics.micro_batches, self.partition, value)
            self._metrics.send_seconds.observe(self._clock() - started)
            self._metrics.micro_batches.labels(cut.reason.value).inc()
            self._metrics.bytes.inc(len(value))
        self._metrics.rows.inc(len(batch))

    def _acknowledge(self) -> None:
        while self._unacknowledged and self._unacknowledged[0][0] <= self._batcher.first_offset:
            self._unacknowledged.popleft()[1].ack()

    async def _catch_up(self, first_offset: int) -> None:
        """Brings the state up to a chunk that does not follow upon it: after the start, or after another worker."""
        await self._close_by_age()  # sent twice at worst, which readers know to drop
        self.is_replaying = True
        started = self._clock()
        begin, num_records = await asyncio.to_thread(self._restore_and_replay, first_offset)
        self._batcher = Batcher(first_offset, self._settings.batch_size, self._settings.batch_age_seconds, self._clock)
        self.committed = first_offset
        self.is_replaying = False
        self._metrics.replays.inc()
        self._metrics.replayed_clicks.inc(num_records)
        log.info(
            "replayed",
            partition=self.partition,
            first_offset=begin,
            next_offset=first_offset,
            num_records=num_records,
            seconds=round(self._clock() - started, 3),
        )

    def _restore_and_replay(self, stop: int) -> tuple[int, int]:
        """In a thread. Returns where the replay began, and how many records it read."""
        above = self.state.next_offset if self.state else 0
        if self._snapshots and (restored := self._snapshots.load(self.partition, above, stop)):
            self.state = restored
        elif self.state is None:
            self.state = PartitionState(self._settings.state_config())
        state = self.state
        begin = state.next_offset
        if 0 < begin < stop:  # a state from nothing begins with the first click that there is
            oldest, _ = self._clicks_on_broker.ends(self.partition, self._is_cancelled)
            if oldest > begin:
                self._count_gap("state", begin, min(oldest, stop))
                if self._settings.retention_expired == "latest":
                    state.next_offset = stop
        num_records = replay(
            state,
            self._clicks_on_broker,
            self.partition,
            stop,
            batch_size=self._settings.batch_size,
            max_click_bytes=self._settings.max_click_bytes,
            cancelled=self._is_cancelled,
        )
        return begin, num_records

    async def _pass_hole(self, found: int) -> None:
        """Looks why no record lies before `found`, and passes over what retention has deleted."""
        assert self.state is not None
        begin = self._batcher.next_offset
        oldest, end = await asyncio.to_thread(self._clicks_on_broker.ends, self.partition, self._is_cancelled)
        if oldest <= begin:
            return  # compacted, or marks of transactions: nothing was lost
        target = end if self._settings.retention_expired == "latest" else min(oldest, found)
        self._count_gap("micro_batches", begin, target)
        await self._close_by_age()
        self.state.next_offset = target
        self._batcher = Batcher(target, self._settings.batch_size, self._settings.batch_age_seconds, self._clock)

    def _count_gap(self, of: str, begin: int, end: int) -> None:
        what = (
            f"clicks {begin} … {end - 1} of partition {self.partition} of topic {self._topics.clicks!r} were deleted "
            f"by its retention before they were {'passed on' if of == 'micro_batches' else 'taken into the state'}"
        )
        if self._settings.retention_expired == "fail":
            raise RetentionExpiredError(
                f"{what}. They cannot be had back from Kafka. Set retention_expired to earliest, to go on with the "
                "oldest clicks that are left, or to latest, to begin with those to come; and raise the topic's "
                "retention above the longest time that the service may be away"
            )
        log.warning("retention expired", reason=what, retention_expired=self._settings.retention_expired)
        self._metrics.gap.labels(of).inc(end - begin)

    def _is_cancelled(self) -> bool:
        return self._cancelled


class Partitions:
    """The workers of the partitions that this process owns, each in a task of its own.

    Args:
        new_worker: makes the worker of a partition.
        end: called when a worker fails; does not come back.
    """

    def __init__(self, new_worker: Callable[[int], PartitionWorker], end: Callable[[BaseException], object]) -> None:
        self.owned: set[int] = set()
        self.is_assigned = False
        """Whether the group has shared the partitions out, and is not about to do so again."""
        self.workers: dict[int, PartitionWorker] = {}
        """Of partitions that clicks came from."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._new_worker, self._end = new_worker, end

    def worker(self, partition: int) -> PartitionWorker:
        """The partition's worker, started if there is none."""
        if partition not in self.workers:
            worker = self.workers[partition] = self._new_worker(partition)
            task = self._tasks[partition] = asyncio.create_task(worker.run(), name=f"partition {partition}")
            task.add_done_callback(self._on_done)
        return self.workers[partition]

    def note_committed(self, offsets: Mapping[int, int]) -> None:
        """The broker has taken a commit of these offsets, by partition."""
        for partition, offset in offsets.items():
            if partition in self.workers:
                self.workers[partition].committed = offset

    def keep_only(self, partitions: set[int]) -> None:
        """Ends the workers of all other partitions and forgets their state; what they had under way comes again."""
        self.owned = partitions
        for partition in self.workers.keys() - partitions:
            del self.workers[partition]
            self._tasks.pop(partition).cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._end(error)
