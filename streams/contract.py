"""PUBLIC: what crosses the borders of `streams` — topic names, ids, events, and the micro-batch with its codec.

Station: the words that producer, streams, trainer and retriever have in common. It loads no Faust, Kafka, Qdrant or
torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

HASH_SEED = 0x5EED
"""Seed of every id's 64-bit hash. Part of the contract: Qdrant point ids and embedding rows depend on it."""

CANARY_ID = "streamtower-canary"
"""User id and item id of the clicks that only measure the way: they pass through everything and are learnt nowhere."""
CANARY_HASH = 15_760_794_448_242_869_712
"""`hash_id` of it."""

MICRO_BATCH_VERSION = 1
"""Version of the micro-batch's layout. Readers accept any version whose required columns are there."""

MAX_ID_BYTES = 512
"""Longest user or item id, in UTF-8 bytes."""
MAX_CONTEXT_FEATURES = 64
"""Most context features that one click may carry."""

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

Scalar = str | int | float | bool | None


class ContractError(ValueError):
    """Bytes or values that break this contract: says what was expected and what came."""


@dataclass(frozen=True)
class Topics:
    """Topic names of one Streamtower; `prefix` keeps several apart on one broker."""

    prefix: str = ""

    @property
    def clicks(self) -> str:
        return f"{self.prefix}clicks"

    @property
    def items(self) -> str:
        return f"{self.prefix}items"

    @property
    def dead_letters(self) -> str:
        return f"{self.prefix}clicks-dead-letter"

    @property
    def micro_batches(self) -> str:
        return f"{self.prefix}micro-batches"


def hash_id(text: str) -> int:
    """The stable 64-bit hash of a caller's id: xxh3-64 of its UTF-8 bytes, seeded. Range 0 … 2^64 − 1."""
    return xxhash.xxh3_64_intdigest(text.encode(), HASH_SEED)


def hash_ids(texts: Sequence[str]) -> UInt64Array:
    """`hash_id` of each text: uint64 [n]."""
    digest, seed = xxhash.xxh3_64_intdigest, HASH_SEED
    return np.fromiter((digest(text.encode(), seed) for text in texts), np.uint64, len(texts))


class ClickEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One click, as a producer writes it: topic `clicks`, key = user id, value = JSON.

    event_time: seconds since the epoch, UTC. reward: ≥ 0, the paper's r. context: flat query features (device, hour …).
    """

    user_id: str
    item_id: str
    event_time: float
    event_id: str | None = None
    reward: float = 1.0
    context: dict[str, Scalar] = {}
    session_id: str | None = None


class ItemEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One item, as a producer writes it: topic `items`, compacted, key = item id, value = JSON; null = it is gone.

    features: what the item tower may learn from. payload: what Qdrant stores with the vector, for filters and answers.
    """

    item_id: str
    features: dict[str, Scalar | list[Scalar]] = {}
    payload: dict[str, msgspec.Raw] | dict[str, object] = {}


_click_encoder = msgspec.json.Encoder()


def encode_event(event: ClickEvent | ItemEvent) -> bytes:
    """JSON bytes of an event, for a producer's value."""
    return _click_encoder.encode(event)


_REQUIRED = pa.schema(
    [
        ("offset", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("user_hash", pa.uint64()),
        ("item_hash", pa.uint64()),
        ("history", pa.list_(pa.uint64())),
        ("reward", pa.float32()),
        ("event_time", pa.float64()),
        ("ingest_time", pa.float64()),
        ("sampling_probability", pa.float32()),
    ]
)
_CONTEXT = "context."


@dataclass(frozen=True)
class MicroBatch:
    """Clicks of one partition, columnar, n rows in the order of their offsets: one record of topic `micro-batches`.

    It stands for the source offsets first_offset … next_offset − 1: each of them is a row here or was rejected.
    """

    partition: int
    """Partition of `clicks` that the rows come from, and of `micro-batches` that the record is written to."""
    first_offset: int
    next_offset: int
    offset: Int64Array
    """[n] the click's offset in its partition, strictly rising."""
    user_id: pa.StringArray
    item_id: pa.StringArray
    user_hash: UInt64Array
    """[n] `hash_id` of user_id."""
    item_hash: UInt64Array
    """[n] `hash_id` of item_id; also the item's point id in Qdrant."""
    history_values: UInt64Array
    """[h] item hashes of all rows' histories, one after the other, newest last, from before the row's click."""
    history_offsets: Int64Array
    """[n + 1] row i's history is history_values[history_offsets[i]:history_offsets[i + 1]]."""
    reward: Float32Array
    """[n] ≥ 0."""
    event_time: Float64Array
    """[n] seconds since the epoch, as the caller says."""
    ingest_time: Float64Array
    """[n] seconds since the epoch at which the record came into Kafka (its timestamp)."""
    sampling_probability: Float32Array
    """[n] the item's estimated share of the partition's clicks, in (0, 1]."""
    context: Mapping[str, pa.Array] = field(default_factory=dict)
    """Context features by name: string or double arrays [n], null where a click has none."""

    def __len__(self) -> int:
        return len(self.offset)

    def history(self, row: int) -> UInt64Array:
        """Row `row`'s history: item hashes, newest last."""
        return self.history_values[self.history_offsets[row] : self.history_offsets[row + 1]]

    def rows(self, start: int, stop: int) -> MicroBatch:
        """Rows start … stop − 1 as a micro-batch of their own; the offsets it stands for shrink with it."""
        if (start, stop) == (0, len(self)):
            return self
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"rows {start} … {stop} of a micro-batch of {len(self)}")
        low, high = self.history_offsets[start], self.history_offsets[stop]
        return MicroBatch(
            partition=self.partition,
            first_offset=self.first_offset if start == 0 else int(self.offset[start]),
            next_offset=self.next_offset if stop == len(self) else int(self.offset[stop]),
            offset=self.offset[start:stop],
            user_id=self.user_id[start:stop],
            item_id=self.item_id[start:stop],
            user_hash=self.user_hash[start:stop],
            item_hash=self.item_hash[start:stop],
            history_values=self.history_values[low:high],
            history_offsets=self.history_offsets[start : stop + 1] - low,
            reward=self.reward[start:stop],
            event_time=self.event_time[start:stop],
            ingest_time=self.ingest_time[start:stop],
            sampling_probability=self.sampling_probability[start:stop],
            context={name: column[start:stop] for name, column in self.context.items()},
        )

    @property
    def is_canary(self) -> npt.NDArray[np.bool_]:
        """bool [n] which rows only measure the way."""
        is_canary: npt.NDArray[np.bool_] = (self.item_hash == CANARY_HASH) | (self.user_hash == CANARY_HASH)
        return is_canary

    def take(self, rows: Int64Array) -> MicroBatch:
        """These rows, rising; the source offsets that it stands for stay the same."""
        lengths = np.diff(self.history_offsets)[rows]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        places = np.repeat(self.history_offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        picked = pa.array(rows)
        return MicroBatch(
            partition=self.partition,
            first_offset=self.first_offset,
            next_offset=self.next_offset,
            offset=self.offset[rows],
            user_id=self.user_id.take(picked),
            item_id=self.item_id.take(picked),
            user_hash=self.user_hash[rows],
            item_hash=self.item_hash[rows],
            history_values=self.history_values[places],
            history_offsets=offsets,
            reward=self.reward[rows],
            event_time=self.event_time[rows],
            ingest_time=self.ingest_time[rows],
            sampling_probability=self.sampling_probability[rows],
            context={name: column.take(picked) for name, column in self.context.items()},
        )

    def from_offset(self, offset: int) -> MicroBatch | None:
        """Only the rows at or after a source offset, or None: what a reader that is at `offset` needs."""
        start = int(np.searchsorted(self.offset, offset))
        return None if start == len(self) else self.rows(start, len(self))

    def encode(self) -> bytes:
        """Arrow IPC stream: one record batch; partition, offsets and version in the schema's metadata."""
        columns: dict[str, pa.Array] = {
            "offset": pa.array(self.offset),
            "user_id": self.user_id,
            "item_id": self.item_id,
            "user_hash": pa.array(self.user_hash),
            "item_hash": pa.array(self.item_hash),
            "history": pa.ListArray.from_arrays(
                pa.array(self.history_offsets.astype(np.int32)), pa.array(self.history_values)
            ),
            "reward": pa.array(self.reward),
            "event_time": pa.array(self.event_time),
            "ingest_time": pa.array(self.ingest_time),
            "sampling_probability": pa.array(self.sampling_probability),
        }
        columns |= {_CONTEXT + name: column for name, column in self.context.items()}
        header = {
            "version": MICRO_BATCH_VERSION,
            "partition": self.partition,
            "first_offset": self.first_offset,
            "next_offset": self.next_offset,
        }
        batch = pa.RecordBatch.from_pydict(columns)
        batch = batch.replace_schema_metadata({"streamtower.micro_batch": json.dumps(header)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return bytes(sink.getvalue())

    @classmethod
    def decode(cls, data: bytes) -> MicroBatch:
        """The micro-batch in `data`. Columns that this version does not know are left out.

        Raises:
            ContractError: not an Arrow stream, a required column is missing or of another type, or values contradict
                each other.
        """
        try:
            with pa.ipc.open_stream(data) as reader:
                batch = reader.read_next_batch()
            batch.validate(full=True)
            header = json.loads((batch.schema.metadata or {})[b"streamtower.micro_batch"])
            bounds = {name: header[name] for name in ("partition", "first_offset", "next_offset")}
            names = batch.schema.names
        except (pa.ArrowException, OSError, StopIteration, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ContractError(f"not a micro-batch: {error}") from error
        if not all(type(bound) is int and bound < 2**63 for bound in bounds.values()):
            raise ContractError(f"micro-batch header must have partition and offsets as integers, not {bounds}")
        if len(set(names)) < len(names):
            raise ContractError("micro-batch has two columns of one name")
        for wanted in _REQUIRED:
            index = batch.schema.get_field_index(wanted.name)
            if index < 0:
                raise ContractError(f"micro-batch lacks the column {wanted.name!r}")
            if (came := batch.schema.field(index).type) != wanted.type:
                raise ContractError(f"micro-batch column {wanted.name!r} must be {wanted.type}, not {came}")
            if batch.column(index).null_count:
                raise ContractError(f"micro-batch column {wanted.name!r} has nulls")
        history = batch.column("history")
        if history.values.null_count:
            raise ContractError("micro-batch column 'history' has nulls inside")
        history_offsets = history.offsets.to_numpy(zero_copy_only=False).astype(np.int64)

        def column(name: str) -> npt.NDArray[Any]:
            return batch.column(name).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]

        decoded = cls(
            partition=bounds["partition"],
            first_offset=bounds["first_offset"],
            next_offset=bounds["next_offset"],
            offset=column("offset"),
            user_id=batch.column("user_id"),
            item_id=batch.column("item_id"),
            user_hash=column("user_hash"),
            item_hash=column("item_hash"),
            history_values=history.values.to_numpy(zero_copy_only=False)[history_offsets[0] : history_offsets[-1]],
            history_offsets=history_offsets - history_offsets[0],
            reward=column("reward"),
            event_time=column("event_time"),
            ingest_time=column("ingest_time"),
            sampling_probability=column("sampling_probability"),
            context={
                name.removeprefix(_CONTEXT): batch.column(name)
                for name in names
                if name.startswith(_CONTEXT) and batch.schema.field(name).type in (pa.string(), pa.float64())
            },
        )
        decoded._check()
        return decoded

    def _check(self) -> None:
        offset = self.offset
        if not 0 <= self.first_offset < self.next_offset or self.partition < 0:
            raise ContractError(
                f"micro-batch of partition {self.partition} stands for {self.first_offset} … {self.next_offset}"
            )
        if len(offset) and (
            offset[0] < self.first_offset or offset[-1] >= self.next_offset or np.any(np.diff(offset) <= 0)
        ):
            raise ContractError("micro-batch offsets must rise strictly, inside the range that it stands for")
        for name, low, high in (("reward", 0.0, np.inf), ("sampling_probability", np.nextafter(np.float32(0), 1), 1.0)):
            values = getattr(self, name)
            if not np.all((values >= low) & (values <= high) & np.isfinite(values)):
                raise ContractError(f"micro-batch column {name!r} must be finite and within {low:g} … {high:g}")
        if not (np.all(np.isfinite(self.event_time)) and np.all(np.isfinite(self.ingest_time))):
            raise ContractError("micro-batch times must be finite")
        for name, ids, hashes in (("user", self.user_id, self.user_hash), ("item", self.item_id, self.item_hash)):
            if not np.array_equal(hash_ids(ids.to_pylist()), hashes):
                raise ContractError(f"micro-batch column '{name}_hash' is not the hash of '{name}_id'")
