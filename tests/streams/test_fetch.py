"""Chunks hold exactly the records that aiokafka itself would have given, whatever the batches look like."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record._crecords.cutil import crc32c_cython
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from streams import fetch
from streams.fetch import AIOKAFKA_VERSION, Chunk, missing_aiokafka_parts, missing_parts, read_chunks

TP = TopicPartition("clicks", 3)
CODECS = {"none": 0, "gzip": 1, "lz4": 3, "zstd": 4}
LOG_APPEND_TIME, CONTROL = 0x08, 0x20


@dataclass
class Batch:
    """A record batch as the broker keeps it. `kept`: offsets inside it that compaction has left."""

    base_offset: int
    width: int
    kept: Sequence[int]
    codec: int = 0
    attributes: int = 0
    max_timestamp: int | None = None
    records: dict[int, tuple[int, bytes | None, bytes | None]] = field(default_factory=dict)

    def encode(self) -> bytes:
        builder = DefaultRecordBatchBuilder(2, self.codec, 0, -1, -1, -1, 1 << 30)
        for delta in self.kept:
            timestamp, key, value = self.records.get(delta, (1_000 + delta, b"k%d" % delta, b"v%d" % delta))
            builder.append(delta, timestamp, key, value, [])
        data = bytearray(builder.build())
        struct.pack_into(">q", data, 0, self.base_offset)
        (attributes,) = struct.unpack_from(">h", data, 21)
        struct.pack_into(">h", data, 21, attributes | self.attributes)
        struct.pack_into(">i", data, 23, self.width - 1)
        if self.max_timestamp is not None:
            struct.pack_into(">q", data, 35, self.max_timestamp)
        struct.pack_into(">I", data, 17, crc32c_cython(bytes(data[21:])))
        return bytes(data)


def fetched(data: bytes, offset: int) -> PartitionRecords:
    return PartitionRecords(TP, MemoryRecords(data), None, offset, None, None, True, 0)


def chunks_of(data: bytes, offset: int, max_records: int = 10_000) -> tuple[list[Chunk], int]:
    records = fetched(data, offset)
    records._records_iterator = read_chunks(records, max_records)
    return list(records), records.next_fetch_offset


Rows = list[tuple[int, bytes | None, bytes | None, float]]


def rows_of(chunks: Sequence[Chunk]) -> Rows:
    return [
        (int(offset), key, value, float(timestamp))
        for chunk in chunks
        for offset, key, value, timestamp in zip(chunk.offsets, chunk.keys, chunk.values, chunk.timestamps, strict=True)
    ]


def rows_by_aiokafka(data: bytes, offset: int) -> tuple[Rows, int]:
    records = fetched(data, offset)
    rows = [(r.offset, r.key, r.value, r.timestamp / 1000) for r in records]
    return rows, records.next_fetch_offset


@st.composite
def logs(draw: st.DrawFn) -> tuple[bytes, int]:
    """A stretch of a partition, and an offset in its first batch that reading begins at."""
    base = draw(st.integers(0, 10_000))
    begin = base
    data = b""
    maybe_bytes = st.none() | st.binary(max_size=20)
    for index in range(draw(st.integers(1, 6))):
        width = draw(st.integers(1, 12))
        kept = sorted(draw(st.sets(st.integers(0, width - 1), max_size=width)))
        attributes = draw(st.sampled_from([0, 0, 0, LOG_APPEND_TIME, CONTROL]))
        if attributes == CONTROL:
            width, kept = 1, [0]
        records = {delta: draw(st.tuples(st.integers(0, 2**41), maybe_bytes, maybe_bytes)) for delta in kept}
        codec = draw(st.sampled_from(sorted(CODECS.values()))) if kept and attributes != CONTROL else 0
        data += Batch(base, width, kept, codec, attributes, records=records).encode()
        if index == 0:
            begin = draw(st.integers(base, base + width - 1))
        base += width + draw(st.sampled_from([0, 0, 3]))  # compaction may take whole batches away
    return data, begin


@given(logs(), st.integers(1, 20))
def test_chunks_hold_the_records_that_aiokafka_gives_and_end_where_it_ends(
    log: tuple[bytes, int], max_records: int
) -> None:
    data, begin = log
    rows, next_offset = rows_by_aiokafka(data, begin)
    chunks, chunks_next_offset = chunks_of(data, begin, max_records)
    assert rows_of(chunks) == rows
    assert chunks_next_offset == next_offset
    assert chunks[0].first_offset == begin
    assert chunks[-1].next_offset == next_offset
    for chunk, following in itertools.pairwise(chunks):
        assert chunk.next_offset == following.first_offset
        assert len(chunk) >= max_records
    for chunk in chunks:
        assert (chunk.topic, chunk.partition) == TP
        assert chunk.offsets.dtype == np.int64
        assert chunk.timestamps.dtype == np.float64
        assert np.all((chunk.offsets >= chunk.first_offset) & (chunk.offsets < chunk.next_offset))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_every_codec_gives_keys_values_offsets_and_times(codec: int) -> None:
    records = {0: (1_500, b"user", b'{"a":1}'), 1: (2_250, None, None), 2: (3_000, b"", b"")}
    (chunk,), _ = chunks_of(Batch(70, 3, [0, 1, 2], codec, records=records).encode(), 70)
    assert chunk.offsets.tolist() == [70, 71, 72]
    assert chunk.keys == [b"user", None, b""]
    assert chunk.values == [b'{"a":1}', None, b""]
    assert chunk.timestamps.tolist() == [1.5, 2.25, 3.0]
    assert (chunk.first_offset, chunk.next_offset, len(chunk)) == (70, 73, 3)


def test_a_position_inside_a_batch_leaves_out_what_is_before_it() -> None:
    data = Batch(100, 10, range(10), CODECS["lz4"]).encode() + Batch(110, 2, range(2)).encode()
    (chunk,), next_offset = chunks_of(data, 107)
    assert chunk.offsets.tolist() == [107, 108, 109, 110, 111]
    assert (chunk.first_offset, next_offset) == (107, 112)


def test_the_brokers_time_is_the_time_of_every_record_where_the_topic_says_so() -> None:
    batch = Batch(0, 3, range(3), attributes=LOG_APPEND_TIME, max_timestamp=9_000)
    (chunk,), _ = chunks_of(batch.encode(), 0)
    assert chunk.timestamps.tolist() == [9.0, 9.0, 9.0]


def test_a_hole_left_by_compaction_belongs_to_the_chunk() -> None:
    data = Batch(0, 5, [0, 4]).encode() + Batch(20, 5, [1]).encode()
    (chunk,), _ = chunks_of(data, 0)
    assert chunk.offsets.tolist() == [0, 4, 21]
    assert (chunk.first_offset, chunk.next_offset) == (0, 25)


def test_a_fetch_of_nothing_but_control_and_emptied_batches_moves_the_position() -> None:
    data = Batch(40, 1, [0], attributes=CONTROL).encode() + Batch(41, 6, []).encode()
    (chunk,), next_offset = chunks_of(data, 40)
    assert len(chunk) == 0
    assert (chunk.first_offset, chunk.next_offset, next_offset) == (40, 47, 47)


def test_a_chunk_ends_with_the_batch_that_fills_it() -> None:
    data = b"".join(Batch(base, 4, range(4)).encode() for base in range(0, 20, 4))
    chunks, _ = chunks_of(data, 0, max_records=6)
    assert [(chunk.first_offset, chunk.next_offset) for chunk in chunks] == [(0, 8), (8, 16), (16, 20)]


def test_a_flipped_bit_is_an_error_and_nothing_before_it_in_the_chunk_is_passed_over() -> None:
    damaged = bytearray(Batch(4, 4, range(4)).encode())
    damaged[-3] ^= 1
    records = fetched(Batch(0, 4, range(4)).encode() + bytes(damaged), 0)
    chunks = read_chunks(records, 10)
    with pytest.raises(CorruptRecordException, match="offset 4 or after"):
        next(chunks)
    assert records.next_fetch_offset == 0


def test_an_error_after_a_whole_chunk_leaves_the_position_behind_that_chunk() -> None:
    damaged = bytearray(Batch(4, 4, range(4)).encode())
    damaged[-3] ^= 1
    records = fetched(Batch(0, 4, range(4)).encode() + bytes(damaged), 0)
    chunks = read_chunks(records, 4)
    assert next(chunks).next_offset == 4
    with pytest.raises(CorruptRecordException):
        next(chunks)
    assert records.next_fetch_offset == 4


@pytest.mark.parametrize("magic", [0, 1])
def test_batches_of_the_old_formats_are_read_and_may_have_no_time(magic: int) -> None:
    data = b""
    for offset in range(3):
        builder = LegacyRecordBatchBuilder(magic, 0, 4096)
        builder.append(0, 5_000 if magic else None, b"k", b"v%d" % offset)
        message = bytearray(builder.build())
        struct.pack_into(">q", message, 0, offset)
        data += bytes(message)
    (chunk,), next_offset = chunks_of(data, 1)
    assert chunk.offsets.tolist() == [1, 2]
    assert chunk.values == [b"v1", b"v2"]
    assert next_offset == 3
    assert all(time == 5.0 if magic else math.isnan(time) for time in chunk.timestamps.tolist())


def test_the_installed_aiokafka_has_what_is_used_of_it() -> None:
    assert missing_aiokafka_parts() == []


def test_another_version_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "version", lambda package: "0.15.0")
    (problem,) = missing_aiokafka_parts()
    assert "0.15.0" in problem
    assert AIOKAFKA_VERSION in problem


def test_batches_that_are_read_wrongly_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.Columns, "append", lambda self, records: [self._values.append(b"") for _ in records])
    (problem,) = missing_aiokafka_parts()
    assert "read wrongly" in problem or "cannot be read" in problem


def test_a_missing_or_changed_method_is_named_with_its_remedy() -> None:
    class Owner:
        def renamed(self, tp: str) -> None: ...

    problems = missing_parts("aiokafka", "0.14.0", {(Owner, "gone"): "self", (Owner, "renamed"): "self partition"})
    assert len(problems) == 2
    assert all("install aiokafka==0.14.0" in problem for problem in problems)
    assert "Owner.gone(self)" in problems[0]
    assert "Owner.renamed(self, partition)" in problems[1]
