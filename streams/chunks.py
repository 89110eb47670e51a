"""Faust extension: one event of an agent is one chunk, many consecutive records of one partition.

Station: between Kafka and the agent. Stock Faust starts four tasks and takes some ten steps for each record (12,000
records/s); here it does so for each chunk. It decodes nothing and knows no topic's content, no click and no state.

Agent, consumer group, rebalance, flow control and commit timer are stock Faust:

    app = ChunkApp("clicks-reader", broker="kafka://127.0.0.1:9092")

    @app.agent(app.chunk_topic("clicks"))
    async def read(stream):
        async for event in stream.noack().events():
            chunk = event.value
            ...                     # chunk.values, .keys, .offsets, .timestamps
            event.ack()             # when all its effects are safe; may be later, in any order

Delivery: at least once. A chunk's offsets are committed when it and every chunk before it in its partition are
acknowledged, whatever the order of the acks. When partitions are revoked, chunks that the agent has begun may finish
and are committed; the others are forgotten and come again.

What an agent must know:

- No exception may leave it. Faust restarts the agent and goes on with the next chunk; with `noack()` the failed chunk
  is not committed, nor is anything after it until the process starts again. Without `noack()` an exception *acks*, and
  the chunk is lost. So: catch, retry or dead-letter, and end the process when that is no help.
- It must not wait for another chunk before it acks one: in a rebalance and at the end none comes, and Faust waits.
- `stream.take()` acks what a failed body held. A chunk is a batch already.
- Ack from the app's event loop. Acking an event twice is harmless; so is an ack that comes after a rebalance.
- Chunks of a partition come in order and without a hole: first_offset is the next_offset of the one before, except the
  first after a rebalance or a seek backwards.
- Values and keys may be None or empty, and of any size; a chunk has at least one record.
- Start the worker with `--without-web`, which overrides web_enabled=False: Faust's web server takes port 6066 on every
  address, and a second worker on the host ends because of it.
- The `faust` command redirects stdout and stderr into its log, whatever worker_redirect_stdouts says.

Private parts of Faust and aiokafka are used, so both are pinned. Where aiokafka's are not as expected, chunks are
gathered from aiokafka's own records, with a warning: the same chunks, more slowly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import faust
from aiokafka.errors import IllegalStateError, KafkaConnectionError
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Producer, Transport
from faust.types import TP, ConsumerMessage

from streams.fetch import Chunk, Columns, FetchedChunks, missing_aiokafka_parts, missing_parts
from streams.ledger import InFlight, Ledger, Span
from streams.service import ConfigurationError

__all__ = ["DEFAULTS", "Chunk", "ChunkApp", "missing_faust_parts"]

logger = logging.getLogger(__name__)

FAUST_VERSION = "0.15.3"
"""The version whose private parts are used."""

_RETRY_SECONDS = 0.5

DEFAULTS: Mapping[str, Any] = {
    "broker_commit_interval": 1.0,
    "broker_session_timeout": 6.0,
    "broker_rebalance_timeout": 10.0,
    "broker_heartbeat_interval": 2.0,
    "consumer_auto_offset_reset": "earliest",
    "consumer_max_fetch_size": 8 << 20,
    "stream_wait_empty": True,
    "topic_disable_leader": True,
    "topic_allow_declare": False,
    "web_enabled": False,
    "worker_redirect_stdouts": False,
}
"""Faust settings of a ChunkApp where its caller gives no other; seconds and bytes.

A process that was killed is given up by the broker after the session timeout; what it had not committed, at most the
commit interval's worth, comes again. stream_wait_empty lets chunks that the agent has begun finish before a rebalance
and at the end of the process.
"""


class ChunkMessage(ConsumerMessage):  # type: ignore[misc]
    """Faust's message for a chunk: passes the last ack on to the chunk's span."""

    __slots__ = ("span",)

    # Faust sets this attribute in two places, one of them compiled. Where it does so for a message that no stream has
    # taken (not `tracked`), the message was skipped because of a rebalance: that is no acknowledgement.
    @property
    def acked(self) -> bool:
        return bool(self.span.finished)

    @acked.setter
    def acked(self, value: bool) -> None:
        if value and self.tracked:
            self.span.finish()


class ChunkSchema(faust.Schema):  # type: ignore[misc]
    """The event's value is the chunk as it is, its key None."""

    def loads_key(self, app: Any, message: Any, **options: Any) -> Any:
        return None

    def loads_value(self, app: Any, message: Any, **options: Any) -> Any:
        return message.value


async def _connected(start: Callable[[], Awaitable[None]], client: Callable[[], Any], deadline_seconds: float) -> None:
    """Starts a client of aiokafka's, `client()`, again and again until a broker is reached, or the deadline is over."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        try:
            return await start()
        except KafkaConnectionError as error:
            await client().stop()
            if time.monotonic() > deadline:
                raise
            logger.warning("Waiting for Kafka, for up to %g s: %s", deadline_seconds, error)
            await asyncio.sleep(_RETRY_SECONDS)


class ChunkProducer(Producer):  # type: ignore[misc]
    """Faust's producer, which waits for the broker when it starts."""

    async def on_start(self) -> None:
        await _connected(super().on_start, lambda: self._producer, self.app.chunk_start_deadline)


class ChunkThread(AIOKafkaConsumerThread):  # type: ignore[misc]
    """The thread in which aiokafka fetches."""

    async def on_start(self) -> None:
        await _connected(super().on_start, lambda: self._consumer, self.app.chunk_start_deadline)
        if self.app.chunk_transport == "fast":
            fetcher = self._consumer._fetcher
            if type(fetcher._records) is not OrderedDict or fetcher._records:
                raise ConfigurationError(
                    ["aiokafka's Fetcher._records is not an empty OrderedDict; use its pinned version"]
                )
            if type(fetcher._fetch_max_wait_ms) is not int:
                raise ConfigurationError(["aiokafka's Fetcher._fetch_max_wait_ms is no int; use its pinned version"])
            fetcher._fetch_max_wait_ms = round(1_000 * self.app.chunk_fetch_wait)
            fetcher._records = FetchedChunks(self.app.chunk_topics, self.app.chunk_max_records)

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: Any,
        timeout: float | None = None,  # noqa: ASYNC109 - Faust's signature
        max_records: int | None = None,
    ) -> Any:
        app = self.app
        if app.chunk_transport == "fast" and all(tp.topic in app.chunk_topics for tp in active_partitions or ()):
            room = app.chunk_max_inflight - self.consumer.in_flight.num_records
            max_records = max(1, room // app.chunk_max_records)  # what is counted here are chunks
        return await super()._fetch_records(consumer, active_partitions, timeout, max_records)

    def position_of(self, tp: TP) -> int | None:
        """Where aiokafka reads next, if it knows; may be called from any thread."""
        assignment = self._consumer._subscription.subscription.assignment
        state = assignment and assignment.state_value(tp)
        return int(state.position) if state and state.has_valid_position else None


def _chunks(tp: TP, batch: Sequence[Any] | None) -> Sequence[Chunk]:
    """What was fetched of a partition: chunks already, or aiokafka's records, or nothing."""
    if not batch or isinstance(batch[0], Chunk):
        return batch or ()
    columns = Columns()
    columns.append(batch)
    # These records do not say whether anything but control batches and compaction lies before them.
    return [columns.chunk(tp, batch[0].offset, batch[-1].offset + 1)]


class ChunkConsumer(Consumer):  # type: ignore[misc]
    """The consumer that makes chunks into messages and knows what may be committed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.in_flight = InFlight(self.app.chunk_max_inflight, self.app.chunk_max_inflight_bytes)
        self.ledgers: dict[TP, Ledger] = {}
        self._begins: dict[TP, int | None] = {}
        self._sought: dict[TP, int] = {}

    def _new_consumer_thread(self) -> ChunkThread:
        return ChunkThread(self, loop=self.loop, beacon=self.beacon)

    async def _getmany(self, active_partitions: Any, timeout: float) -> Any:  # noqa: ASYNC109 - Faust's signature
        if not await self.in_flight.has_room(timeout):
            return {}
        batches = {TP(*tp): batch for tp, batch in (await super()._getmany(active_partitions, timeout)).items()}
        generation = self.app.consumer_generation_id
        fetched = {tp: batch for tp, batch in batches.items() if tp.topic not in self.app.chunk_topics}
        owned = [tp for tp in self._active_partitions | self._buffered_partitions if tp.topic in self.app.chunk_topics]
        # In a rebalance Faust drops what was fetched, and does not know committed offsets: then nothing may be entered.
        expected = {tp: await self._expected(tp) for tp in owned if self.flow_active}
        if not self.flow_active or self.app.consumer_generation_id != generation:
            return fetched
        late = {}
        for tp, begin in expected.items():
            chunks = _chunks(tp, batches.get(tp))
            first_offset = chunks[0].first_offset if chunks else self._thread.position_of(tp)
            if begin is not None and first_offset is not None and first_offset > begin:
                # What Faust dropped is lost to it: reading has gone past. So what comes later is not taken, and reading
                # goes back, until it is certain that nothing is before.
                if not await self._is_hole(tp, begin):
                    late[tp] = self._sought[tp] = begin
                    continue
                self._ledger(tp, begin).enter(first_offset, 0, 0)
            if chunks:
                self._sought.pop(tp, None)
                fetched[tp] = [entry for chunk in chunks if (entry := self._enter(tp, chunk))]
        if late:
            logger.info("Reading has gone further than what has come; going back: %s", late)
            with contextlib.suppress(IllegalStateError):  # not ours any more
                await self.seek_wait(late)
        return fetched

    async def _expected(self, tp: TP) -> int | None:
        """The offset at which the next chunk must begin; None: any."""
        if ledger := self.ledgers.get(tp):
            return ledger.end
        if tp not in self._begins:
            begin: int | None = self._committed_offset[tp]
            if begin is None and self.app.conf.consumer_auto_offset_reset == "earliest":
                begin = (await self.earliest_offsets(tp))[tp]
            self._begins[tp] = begin
        return self._begins[tp]

    async def _is_hole(self, tp: TP, begin: int) -> bool:
        """Whether nothing can be read from this offset on before what was read last."""
        if self.app.chunk_transport == "fast":  # a chunk stands for its control batches and compacted records too
            return begin < int((await self.earliest_offsets(tp))[tp])
        return self._sought.get(tp) == begin  # it was read from there, without a rebalance since

    def _ledger(self, tp: TP, first_offset: int) -> Ledger:
        """The partition's ledger; a new one if reading went backwards."""
        ledger = self.ledgers.get(tp)
        if ledger is None or first_offset < ledger.end:
            if ledger:
                ledger.close()
            ledger = self.ledgers[tp] = Ledger(first_offset, self.in_flight)
        return ledger

    def _enter(self, tp: TP, chunk: Chunk) -> tuple[Span, Chunk] | None:
        """Enters a chunk; what `_to_message` makes a message of, or None if the chunk has no record."""
        ledger = self._ledger(tp, chunk.first_offset)
        first_offset = ledger.delivered
        span = ledger.enter(chunk.next_offset, len(chunk), sum(map(len, filter(None, chunk.values))))
        return (span, replace(chunk, first_offset=first_offset)) if len(chunk) else None

    def _to_message(self, tp: TP, record: Any) -> Any:
        if tp.topic not in self.app.chunk_topics:
            return super()._to_message(tp, record)
        span, chunk = record
        # Faust drops messages below this offset and takes offsets between messages for holes; the ledger does both.
        self._read_offset[tp] = None
        message = ChunkMessage(
            topic=chunk.topic,
            partition=chunk.partition,
            offset=chunk.next_offset - 1,
            timestamp=float(chunk.timestamps[-1]),
            timestamp_type=0,
            headers={},
            key=None,
            value=chunk,
            checksum=None,
            serialized_key_size=0,
            serialized_value_size=span.num_bytes,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )
        message.span = span
        return message

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        for tp in super()._filter_tps_with_pending_acks(topics):
            if tp.topic not in self.app.chunk_topics:
                yield tp
        for tp in self.ledgers:
            if topics is None or tp in topics or tp.topic in topics:
                yield tp

    def _new_offset(self, tp: TP) -> int | None:
        if tp.topic not in self.app.chunk_topics:
            offset: int | None = super()._new_offset(tp)
            return offset
        self._acked.pop(tp, None)  # Faust's own list of acks: not used here, must not grow
        self._acked_index.pop(tp, None)
        return self.ledgers[tp].committable

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        await super().on_partitions_revoked(revoked)  # waits for chunks that agents have begun, and commits them
        self._begins.clear()
        self._sought.clear()
        for tp in revoked:
            if ledger := self.ledgers.pop(tp, None):
                ledger.close()


class ChunkTransport(Transport):  # type: ignore[misc]
    """Faust's aiokafka transport with the consumer above."""

    Consumer = ChunkConsumer
    Producer = ChunkProducer


_PARTS: Mapping[tuple[type, str], str] = {
    (Consumer, "_new_consumer_thread"): "self",
    (Consumer, "_getmany"): "self active_partitions timeout",
    (Consumer, "_to_message"): "self tp record",
    (Consumer, "_filter_tps_with_pending_acks"): "self topics",
    (Consumer, "_new_offset"): "self tp",
    (Consumer, "on_partitions_revoked"): "self revoked",
    (Consumer, "seek_wait"): "self partitions",
    (AIOKafkaConsumerThread, "_fetch_records"): "self consumer active_partitions timeout max_records",
    (faust.App, "_new_transport"): "self",
    (faust.App, "_create_directories"): "self",
}


def missing_faust_parts() -> list[str]:
    """What chunks need of Faust, on either transport, and do not find: one line each."""
    return missing_parts("faust-streaming", FAUST_VERSION, _PARTS)


class ChunkApp(faust.App):  # type: ignore[misc]
    """A Faust app with chunk topics."""

    def __init__(
        self,
        id: str,
        *,
        chunk_max_records: int = 10_000,
        chunk_max_inflight: int = 100_000,
        chunk_max_inflight_bytes: int = 128 << 20,
        chunk_fetch_wait: float = 0.1,
        chunk_start_deadline: float = 60.0,
        chunk_transport: Literal["auto", "fast", "stock"] = "auto",
        **options: Any,
    ) -> None:
        """
        Args:
            id: consumer group.
            chunk_max_records: a chunk ends with the record batch that brings it to this many records, ≥ 1.
            chunk_max_inflight: nothing more is fetched while this many records are with agents and not acknowledged,
                ≥ chunk_max_records; one chunk may go beyond it.
            chunk_max_inflight_bytes: the same for the bytes of their values; one fetch may go beyond it.
            chunk_fetch_wait: how long the broker may hold an answer back to put more into it, in seconds, on the fast
                transport. Faust's own 1.5 s cannot be set; a broker that uses up half of it, as Tansu does, would add
                a second to the way of every click.
            chunk_start_deadline: how long a start waits for a broker that cannot be reached, in seconds.
            chunk_transport: "fast" reads aiokafka's private parts, "stock" does not; "auto" is fast where it can be.
            options: Faust's settings; DEFAULTS where not given.

        Raises:
            ConfigurationError: Faust's private parts are not there, or aiokafka's and `chunk_transport` is "fast".
        """
        problems = missing_aiokafka_parts()
        refusals = missing_faust_parts() + (problems if chunk_transport == "fast" else [])
        if refusals:
            raise ConfigurationError(refusals)
        if problems and chunk_transport == "auto":
            logger.warning("Chunks are gathered record by record, which is slow: %s", "; ".join(problems))
        self.chunk_transport = "stock" if problems or chunk_transport == "stock" else "fast"
        self.chunk_topics: set[str] = set()
        self.chunk_max_records = chunk_max_records
        self.chunk_max_inflight = chunk_max_inflight
        self.chunk_max_inflight_bytes = chunk_max_inflight_bytes
        self.chunk_fetch_wait = chunk_fetch_wait
        self.chunk_start_deadline = chunk_start_deadline
        super().__init__(id, **{**DEFAULTS, "broker_max_poll_records": chunk_max_records, **options})

    def chunk_topic(self, *names: str, **options: Any) -> Any:
        """A topic whose events' values are Chunks; `options` as for `topic`. It must exist on the broker."""
        self.chunk_topics.update(names)
        return self.topic(*names, schema=ChunkSchema(), **options)

    def chunk_lag(self) -> dict[TP, int]:
        """Messages on the broker that are not acknowledged, for each owned partition that has been read from."""
        consumer = self.consumer
        return {tp: max(0, consumer.highwater(tp) - ledger.position) for tp, ledger in consumer.ledgers.items()}

    def _new_transport(self) -> Any:
        return ChunkTransport(self.conf.broker_consumer, self)

    def _create_directories(self) -> None:
        if self.tables:  # Faust would leave empty folders in the working directory, which may be read-only
            super()._create_directories()
