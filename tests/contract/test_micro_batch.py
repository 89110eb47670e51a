"""The micro-batch's bytes: what goes in comes out, old and new understand each other, damage is never another error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import CANARY_HASH, CANARY_ID, MICRO_BATCH_VERSION, ContractError, MicroBatch, hash_id
from tests.contract.batches import FIXED, assert_same, micro_batches

GOLDEN = Path(__file__).parent / "golden"
HEADER = b"streamtower.micro_batch"


@settings(deadline=None)
@given(micro_batches())
def test_what_is_encoded_is_decoded(batch: MicroBatch) -> None:
    assert_same(MicroBatch.decode(batch.encode()), batch)


@settings(deadline=None)
@given(micro_batches(), st.data())
def test_a_part_of_a_micro_batch_is_a_micro_batch(batch: MicroBatch, data: st.DataObject) -> None:
    if not len(batch):
        return
    start = data.draw(st.integers(0, len(batch) - 1))
    stop = data.draw(st.integers(start + 1, len(batch)))
    part = batch.rows(start, stop)
    assert_same(MicroBatch.decode(part.encode()), part)
    assert part.offset.tolist() == batch.offset[start:stop].tolist()
    for row in range(len(part)):
        assert part.history(row).tolist() == batch.history(start + row).tolist()


@settings(deadline=None)
@given(micro_batches(), st.data())
def test_some_rows_of_a_micro_batch_stand_for_all_its_offsets(batch: MicroBatch, data: st.DataObject) -> None:
    rows = data.draw(st.sets(st.integers(0, len(batch) - 1)) if len(batch) else st.just(set()))
    part = batch.take(np.array(sorted(rows), np.int64))
    assert_same(MicroBatch.decode(part.encode()), part)
    assert (part.first_offset, part.next_offset) == (batch.first_offset, batch.next_offset)
    for name in ("user_id", "item_id", "reward", "event_time", "offset"):
        assert getattr(part, name).tolist() == [getattr(batch, name).tolist()[row] for row in sorted(rows)]
    for place, row in enumerate(sorted(rows)):
        assert part.history(place).tolist() == batch.history(row).tolist()
        assert {name: column[place] for name, column in part.context.items()} == {
            name: column[row] for name, column in batch.context.items()
        }


def test_canaries_are_told_by_user_and_by_item() -> None:
    assert hash_id(CANARY_ID) == CANARY_HASH
    assert not FIXED.is_canary.any()
    hashes = FIXED.user_hash.copy()
    hashes[1] = CANARY_HASH
    assert replace(FIXED, user_hash=hashes).is_canary.tolist() == [False, True, False]
    assert replace(FIXED, item_hash=hashes).is_canary.tolist() == [False, True, False]


@settings(deadline=None)
@given(micro_batches(), st.integers(-2, 30))
def test_from_an_offset_on_only_its_rows_are_left(batch: MicroBatch, ahead: int) -> None:
    offset = batch.first_offset + ahead
    rest = batch.from_offset(offset)
    expected = [o for o in batch.offset.tolist() if o >= offset]
    assert (rest.offset.tolist() if rest else []) == expected


@settings(deadline=None)
@given(micro_batches().filter(lambda batch: len(batch) > 1), st.data())
def test_two_parts_stand_for_the_offsets_of_the_whole(batch: MicroBatch, data: st.DataObject) -> None:
    middle = data.draw(st.integers(1, len(batch) - 1))
    first, second = batch.rows(0, middle), batch.rows(middle, len(batch))
    assert (first.first_offset, first.next_offset) == (batch.first_offset, second.first_offset)
    assert second.next_offset == batch.next_offset


def test_rows_outside_the_micro_batch_are_refused() -> None:
    for start, stop in ((0, 4), (2, 2), (-1, 1)):
        with pytest.raises(IndexError, match="of a micro-batch of 3"):
            FIXED.rows(start, stop)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("micro_batch_v*.arrow")), ids=lambda path: path.stem)
def test_bytes_of_every_version_that_was_ever_written_are_still_read(path: Path) -> None:
    assert_same(MicroBatch.decode(path.read_bytes()), FIXED)


def test_there_are_golden_bytes_of_the_version_that_is_written() -> None:
    """A change of layout needs a new version and a new file; `python -m tests.contract.write_golden` writes it."""
    golden = GOLDEN / f"micro_batch_v{MICRO_BATCH_VERSION}.arrow"
    came, kept = _table(FIXED.encode()), _table(golden.read_bytes())
    assert came.schema.equals(kept.schema, check_metadata=False)
    assert json.loads(came.schema.metadata[HEADER]) == json.loads(kept.schema.metadata[HEADER])
    assert came.equals(kept)


def _table(data: bytes) -> pa.RecordBatch:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_next_batch()


def _bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """The fixed micro-batch's bytes after `change` to its columns and header."""
    batch = _table(FIXED.encode())
    header = json.loads(batch.schema.metadata[HEADER])
    columns = {name: batch.column(name) for name in batch.schema.names}
    change(columns, header)
    metadata = {HEADER: json.dumps(header) if isinstance(header, dict) else header}
    return _bytes(pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata))


def test_an_old_reader_reads_a_new_batch_with_more_in_it() -> None:
    def newer(columns: dict[str, Any], header: dict[str, Any]) -> None:
        columns["surprise"] = pa.array([1, 2, 3])
        columns["context.place"] = pa.array([{"x": 1}] * 3)  # of a type that this version does not know
        header["version"] = MICRO_BATCH_VERSION + 1
        header["more"] = "of it"

    assert_same(MicroBatch.decode(changed(newer)), FIXED)


def test_a_new_reader_reads_an_old_batch_without_context_and_in_another_order() -> None:
    def older(columns: dict[str, Any], header: dict[str, Any]) -> None:
        for name in list(columns):
            column = columns.pop(name)
            if not name.startswith("context."):
                columns[name] = column
        for name in sorted(columns, reverse=True):
            columns[name] = columns.pop(name)
        header["version"] = 0

    decoded = MicroBatch.decode(changed(older))
    assert decoded.context == {}
    assert decoded.offset.tolist() == FIXED.offset.tolist()
    assert decoded.history(2).tolist() == FIXED.history(2).tolist()


def replaced(name: str, array: pa.Array) -> bytes:
    return changed(lambda columns, _: columns.update({name: array}))


def headed(**fields: object) -> bytes:
    return changed(lambda _, header: header.update(fields))


f32, f64 = pa.float32(), pa.float64()
DAMAGE = {
    "nothing": b"",
    "no Arrow": b"{}",
    "cut off": FIXED.encode()[:-300],
    "no batch in the stream": FIXED.encode()[: FIXED.encode().index(b"\xff\xff\xff\xff", 4)]
    + b"\xff\xff\xff\xff"
    + bytes(4),
    "no header": _bytes(_table(FIXED.encode()).replace_schema_metadata({})),
    "a header that is no JSON": _bytes(_table(FIXED.encode()).replace_schema_metadata({HEADER: b"{"})),
    "a header that is no object": _bytes(_table(FIXED.encode()).replace_schema_metadata({HEADER: b"[1]"})),
    "a header without the partition": changed(lambda _, header: header.pop("partition")),
    "a partition that is no number": headed(partition="one"),
    "a negative partition": headed(partition=-1),
    "a negative offset": headed(first_offset=-1),
    "offsets that stand for nothing": headed(next_offset=100),
    "an endless offset": headed(next_offset=float("inf")),
    "rows before the range": headed(first_offset=102),
    "rows behind the range": headed(next_offset=109),
    "offsets that do not rise": replaced("offset", pa.array([101, 101, 109])),
    "a column missing": changed(lambda columns, _: columns.pop("item_hash")),
    "a column of another type": replaced("reward", pa.array([1.0, 2.0, 3.0], f64)),
    "a history of another type": replaced("history", pa.array([[1], [], []], pa.list_(pa.int64()))),
    "a null id": replaced("user_id", pa.array(["a", None, "b"])),
    "a null offset": replaced("offset", pa.array([101, None, 109])),
    "a null history": replaced("history", pa.array([[1], None, []], pa.list_(pa.uint64()))),
    "a negative reward": replaced("reward", pa.array([1, -0.5, 1], f32)),
    "an endless reward": replaced("reward", pa.array([1, np.inf, 1], f32)),
    "a reward that is no number": replaced("reward", pa.array([1, np.nan, 1], f32)),
    "a probability of zero": replaced("sampling_probability", pa.array([1, 0, 1], f32)),
    "a probability above one": replaced("sampling_probability", pa.array([1, 1.5, 1], f32)),
    "a probability that is no number": replaced("sampling_probability", pa.array([1, np.nan, 1], f32)),
    "an endless event time": replaced("event_time", pa.array([1, -np.inf, 1], f64)),
    "an ingest time that is no number": replaced("ingest_time", pa.array([1, np.nan, 1], f64)),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE.keys())
def test_each_kind_of_damage_is_a_contract_error(data: bytes) -> None:
    with pytest.raises(ContractError):
        MicroBatch.decode(data)


def test_an_error_says_what_was_expected_and_what_came() -> None:
    with pytest.raises(ContractError, match="'reward' must be float, not double"):
        MicroBatch.decode(DAMAGE["a column of another type"])
    with pytest.raises(ContractError, match="lacks the column 'item_hash'"):
        MicroBatch.decode(DAMAGE["a column missing"])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_bytes_are_a_contract_error_or_keep_every_promise_of_a_micro_batch(data: st.DataObject) -> None:
    """A flipped bit of a reward cannot be told from another reward (Kafka's checksums do that); all else must show."""
    encoded = bytearray(FIXED.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(encoded) - 1))
        del encoded[start : start + data.draw(st.integers(1, 64))]
    try:
        decoded = MicroBatch.decode(bytes(encoded))
    except ContractError:
        return
    assert_same(MicroBatch.decode(decoded.encode()), decoded)
    assert len(decoded.user_id) == len(decoded.history_offsets) - 1 == len(decoded)
    assert np.all(np.diff(decoded.offset) > 0)
    assert np.all((decoded.sampling_probability > 0) & (decoded.sampling_probability <= 1))
    assert np.all(np.isfinite(decoded.reward) & (decoded.reward >= 0))
    assert len(decoded.history_values) == decoded.history_offsets[-1]


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=200))
def test_any_other_bytes_are_a_contract_error(data: bytes) -> None:
    with pytest.raises(ContractError):
        MicroBatch.decode(data)
