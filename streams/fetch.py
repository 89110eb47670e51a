"""What aiokafka fetched → chunks, without an object for each record.

Station: between aiokafka's fetcher and the Faust extension in chunks.py, in the thread that fetches. aiokafka makes a
ConsumerRecord in 1.35 µs; reading `.value` from its parser's record takes 0.08 µs. It decodes nothing.

It uses private parts of aiokafka: `missing_aiokafka_parts` says whether they are as expected.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import dropwhile
from typing import Any

import numpy as np
import numpy.typing as npt
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition

AIOKAFKA_VERSION = "0.14.0"
"""The version whose private parts are used."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """n ≥ 1 consecutive records of one partition. It stands for the offsets first_offset … next_offset − 1.

    Offsets in that range that are not in `offsets` hold no record (control batches, compaction, retention).
    """

    topic: str
    partition: int
    first_offset: int
    next_offset: int
    offsets: npt.NDArray[np.int64]
    """[n] strictly rising."""
    values: list[bytes | None]
    """[n]"""
    keys: list[bytes | None]
    """[n]"""
    timestamps: npt.NDArray[np.float64]
    """[n] seconds since the epoch: the record's CreateTime or LogAppendTime, as the topic is set. NaN: it has none."""

    def __len__(self) -> int:
        return len(self.values)


class Columns:
    """Gathers aiokafka's records, either its parser's or its ConsumerRecords, into a chunk.

    It keeps no record: thousands of them at a time cost the garbage collector three times what reading them costs.
    """

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._values: list[bytes | None] = []
        self._keys: list[bytes | None] = []
        self._timestamps: list[int | None] = []

    def __len__(self) -> int:
        return len(self._values)

    def append(self, records: Iterable[Any]) -> None:
        offset, value, key = self._offsets.append, self._values.append, self._keys.append
        timestamp = self._timestamps.append
        for record in records:
            offset(record.offset)
            value(record.value)
            key(record.key)
            timestamp(record.timestamp)

    def chunk(self, tp: TopicPartition, first_offset: int, next_offset: int) -> Chunk:
        return Chunk(
            topic=tp.topic,
            partition=tp.partition,
            first_offset=first_offset,
            next_offset=next_offset,
            offsets=np.array(self._offsets, dtype=np.int64),
            values=self._values,
            keys=self._keys,
            timestamps=np.array(self._timestamps, dtype=np.float64) / 1000.0,
        )


def read_chunks(fetched: PartitionRecords, max_records: int) -> Iterator[Chunk]:
    """What one fetch brought for one partition, as chunks: takes the place of PartitionRecords' iterator of records.

    A chunk ends with the record batch that brings it to `max_records`. If the fetch ends with control batches or with
    batches that compaction emptied, the last chunk may have no record. `next_fetch_offset` moves only past what has
    been yielded, so that an error loses nothing: aiokafka fetches again from there.

    Raises:
        CorruptRecordException: a record batch is not what the broker stored.
    """
    batches = fetched._records
    while batches.has_next():
        first_offset = next_offset = fetched.next_fetch_offset
        columns = Columns()
        while len(columns) < max_records and batches.has_next():
            batch = batches.next_batch()
            if fetched._check_crcs and not batch.validate_crc():
                raise CorruptRecordException(f"Invalid CRC in {fetched._tp}, offset {next_offset} or after")
            if not batch.is_control_batch:
                # The fetch may have begun inside the batch; one of an old format does not say where it begins itself.
                whole = getattr(batch, "base_offset", -1) >= first_offset
                columns.append(batch if whole else _from_offset(batch, first_offset))
            next_offset = max(next_offset, batch.next_offset)
        if next_offset > first_offset:
            fetched.next_fetch_offset = next_offset
            yield columns.chunk(fetched._tp, first_offset, next_offset)


def _from_offset(records: Iterable[Any], first_offset: int) -> Iterator[Any]:
    return dropwhile(lambda record: record.offset < first_offset, records)


class FetchedChunks(OrderedDict[TopicPartition, Any]):
    """aiokafka's store of what was fetched and not yet taken (Fetcher._records) that gives results of chunk topics
    `read_chunks` as their iterator; the rest of aiokafka's fetching is its own."""

    def __init__(self, topics: Collection[str], max_records: int) -> None:
        super().__init__()
        self._topics = topics
        self._max_records = max_records

    def __setitem__(self, tp: TopicPartition, result: Any) -> None:
        if type(result) is FetchResult and tp.topic in self._topics:
            records = result._partition_records
            records._records_iterator = read_chunks(records, self._max_records)
        super().__setitem__(tp, result)


def missing_parts(package: str, pinned: str, parts: Mapping[tuple[type, str], str]) -> list[str]:
    """Which of `parts` ((class, name) → its parameters, with blanks between) a package does not have, one line each."""
    problems = []
    for (owner, name), parameters in parts.items():
        found = getattr(owner, name, None)
        if found is None or list(inspect.signature(found).parameters) != parameters.split():
            problems.append(
                f"{package} {version(package)} has no {owner.__qualname__}.{name}({parameters.replace(' ', ', ')}); "
                f"install {package}=={pinned}"
            )
    return problems


_PARTS: Mapping[tuple[type, str], str] = {
    (Fetcher, "fetched_records"): "self partitions timeout max_records",
    (FetchResult, "getall"): "self max_records",
    (PartitionRecords, "__init__"): "self tp records aborted_transactions fetch_offset key_deserializer "
    "value_deserializer check_crcs isolation_level",
}


def missing_aiokafka_parts() -> list[str]:
    """What `read_chunks` needs of aiokafka and does not find, one line each; tried out on a fetch of three records."""
    if (found := version("aiokafka")) != AIOKAFKA_VERSION:
        return [f"aiokafka is {found}; chunks are known to be read rightly from {AIOKAFKA_VERSION} alone"]
    if problems := missing_parts("aiokafka", AIOKAFKA_VERSION, _PARTS):
        return problems
    records = [(0, 1_000, b"k", b"v"), (1, 2_000, None, None), (2, 3_000, b"", b"")]
    try:
        builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 4096)
        for offset, timestamp, key, value in records:
            builder.append(offset, timestamp, key, value, [])
        batch = MemoryRecords(bytes(builder.build()))
        fetched = PartitionRecords(TopicPartition("t", 0), batch, None, 1, None, None, True, 0)
        fetched._records_iterator = read_chunks(fetched, 10)
        (chunk,) = fetched
        read = list(zip(chunk.offsets, chunk.timestamps * 1_000, chunk.keys, chunk.values, strict=True))
    except Exception as error:
        return [f"aiokafka's record batches cannot be read: {error!r}"]
    if read != records[1:] or fetched.next_fetch_offset != 3:
        return [f"aiokafka's record batches are read wrongly: {read}"]
    return []
