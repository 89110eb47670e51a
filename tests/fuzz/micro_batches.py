"""Micro-batches: bytes → decode, held against Arrow's own plain reading of the same bytes, value by value."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from streams.contract import ContractError, MicroBatch, hash_id, hash_ids
from tests.contract.batches import FIXED

COLUMNS = (
    "offset", "user_id", "item_id", "user_hash", "item_hash", "reward", "event_time", "ingest_time",
    "sampling_probability",
)  # fmt: skip


def _batch(num_rows: int) -> MicroBatch:
    ids = [f"id-{number % 7}" for number in range(num_rows)]
    return MicroBatch(
        partition=0,
        first_offset=2**40,
        next_offset=2**40 + 2 * num_rows + 1,
        offset=2**40 + 2 * np.arange(num_rows),
        user_id=pa.array(ids, pa.string()),
        item_id=pa.array(ids[::-1], pa.string()),
        user_hash=hash_ids(ids),
        item_hash=hash_ids(ids[::-1]),
        history_values=hash_ids(ids),
        history_offsets=np.arange(num_rows + 1),
        reward=np.ones(num_rows, np.float32),
        event_time=np.full(num_rows, 1.79e9),
        ingest_time=np.full(num_rows, 1.79e9),
        sampling_probability=np.full(num_rows, 0.25, np.float32),
        context={"a": pa.array([None, *ids[1:]], pa.string()), "b": pa.array(ids, pa.string())} if num_rows else {},
    )


CORPUS = (FIXED.encode(), _batch(12).encode(), _batch(0).encode())
WORDS = (
    b"context.a", b"context.b", b"offset", b"history", b"reward", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0\0\0\0\0",
    b'"partition": 1.5', b'"partition": "1"', b'"next_offset": 1e30', b'"first_offset": true', b"[" * 3000,
)  # fmt: skip


def check(data: bytes) -> bool:
    """Whether the input is accepted as a micro-batch.

    Raises:
        AssertionError: it is accepted and breaks the contract, or as another one.
    """
    try:
        came = MicroBatch.decode(data)
    except ContractError:
        return False
    with pa.ipc.open_stream(data) as reader:
        plain = reader.read_next_batch()
    header = json.loads(plain.schema.metadata[b"streamtower.micro_batch"])
    bounds = (header["partition"], header["first_offset"], header["next_offset"])
    assert all(type(bound) is int for bound in bounds), f"header {header}"
    assert (came.partition, came.first_offset, came.next_offset) == bounds
    assert 0 <= came.partition < 2**31 and 0 <= came.first_offset < came.next_offset < 2**63
    for name in COLUMNS:
        assert _values(getattr(came, name)) == plain.column(name).to_pylist(), name
    histories: list[Any] = plain.column("history").to_pylist()
    assert [came.history(row).tolist() for row in range(len(came))] == histories
    assert all(type(item) is int for history in histories for item in history), "a history with nulls"
    for name, column in came.context.items():
        assert repr(column.to_pylist()) == repr(plain.column(f"context.{name}").to_pylist()), name
    _check_contract(came)
    again = MicroBatch.decode(came.encode())
    assert all(_values(getattr(again, name)) == _values(getattr(came, name)) for name in COLUMNS)
    return True


def _values(array: Any) -> list[Any]:
    return array.to_pylist() if isinstance(array, pa.Array) else array.tolist()  # type: ignore[no-any-return]


def _check_contract(batch: MicroBatch) -> None:
    offsets = batch.offset.tolist()
    assert all(low < high for low, high in pairwise(offsets))
    assert all(batch.first_offset <= offset < batch.next_offset for offset in offsets)
    assert all(0 <= reward < math.inf for reward in batch.reward.tolist())
    assert all(0 < share <= 1 for share in batch.sampling_probability.tolist())
    assert all(map(math.isfinite, batch.event_time.tolist() + batch.ingest_time.tolist()))
    for ids, hashes in ((batch.user_id, batch.user_hash), (batch.item_id, batch.item_hash)):
        assert [hash_id(text) for text in ids.to_pylist()] == hashes.tolist(), "an id and its hash are two"
