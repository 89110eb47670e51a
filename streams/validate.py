"""Raw bytes of clicks → accepted clicks in columns, and a rejection with a reason for every other value.

Station: the first behind Kafka. It never raises on data, reads no clock, and does not know where rejected values go.
Values are decoded one by one: joining them into one JSON text is no faster with msgspec (measured), and a value that is
half of two clicks could then pass as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import chain
from typing import Annotated, TypeGuard

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from streams.contract import (
    HASH_SEED,
    MAX_CONTEXT_FEATURES,
    MAX_ID_BYTES,
    Float32Array,
    Float64Array,
    Int64Array,
    Scalar,
    UInt64Array,
    hash_ids,
)

BoolArray = npt.NDArray[np.bool_]

MAX_EVENT_TIME = 253_402_300_800.0
"""Event times are below this, the year 10000: what RFC 3339 can say. Milliseconds taken for seconds are above it."""
MAX_REWARD = 1e6
"""Largest reward. It is a weight in the loss, which must stay finite in 32 bits."""
_ABOVE_MAX_REWARD = math.nextafter(MAX_REWARD, math.inf)


class Reason(StrEnum):
    """Why a value is no click. Closed: it is a metric's label and a dead letter's header."""

    NULL_VALUE = "null_value"
    """No value at all (a tombstone)."""
    TOO_LARGE = "too_large"
    """More bytes than the service accepts for a click."""
    NOT_UTF8 = "not_utf8"
    """Bytes that are no UTF-8, anywhere in the value."""
    NOT_JSON = "not_json"
    """Not one JSON text; or one whose fault is in no field that is read (NaN, half a surrogate pair, a field twice)."""
    NOT_AN_OBJECT = "not_an_object"
    """JSON, but no object."""
    MISSING_FIELD = "missing_field"
    """user_id, item_id or event_time is absent or null."""
    BAD_ID = "bad_id"
    """user_id or item_id is neither a string nor an integer, or has no bytes, or more than 512 of them in UTF-8."""
    BAD_TIME = "bad_time"
    """event_time is neither a number of seconds in 0 … year 10000 nor an RFC 3339 string with an offset."""
    BAD_REWARD = "bad_reward"
    """reward is no number in 0 … 1e6."""
    BAD_CONTEXT = "bad_context"
    """context is no flat object of strings, finite numbers, booleans and nulls."""
    TOO_MANY_CONTEXT_FEATURES = "too_many_context_features"
    """context has more than 64 features."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """`index`: which of the values."""

    index: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Clicks:
    """Accepted clicks of one partition, columnar, n rows in the order of their offsets."""

    offset: Int64Array
    """[n] offset in the partition, strictly rising."""
    user_id: Sequence[str]
    item_id: Sequence[str]
    user_hash: UInt64Array
    """[n] `contract.hash_ids`."""
    item_hash: UInt64Array
    """[n] `contract.hash_ids`."""
    event_time: Float64Array
    """[n] seconds since the epoch, 0 ≤ t < MAX_EVENT_TIME."""
    ingest_time: Float64Array
    """[n] seconds since the epoch: the record's Kafka timestamp, or the event time of one that has none."""
    reward: Float32Array
    """[n] 0 … MAX_REWARD."""
    context: Sequence[Mapping[str, Scalar]]
    """[n] query features, perhaps none."""
    event_hash: UInt64Array
    """[n] hash of event_id as it stands in the JSON; 0 where there is none, or where none was asked for."""

    def __len__(self) -> int:
        return len(self.offset)

    def rows(self, start: int, stop: int) -> Clicks:
        """Rows start … stop − 1; the arrays are views."""
        return Clicks(
            offset=self.offset[start:stop],
            user_id=self.user_id[start:stop],
            item_id=self.item_id[start:stop],
            user_hash=self.user_hash[start:stop],
            item_hash=self.item_hash[start:stop],
            event_time=self.event_time[start:stop],
            ingest_time=self.ingest_time[start:stop],
            reward=self.reward[start:stop],
            context=self.context[start:stop],
            event_hash=self.event_hash[start:stop],
        )

    def take(self, rows: Int64Array) -> Clicks:
        """These rows, in this order."""
        numbers = rows.tolist()
        return Clicks(
            offset=self.offset[rows],
            user_id=[self.user_id[row] for row in numbers],
            item_id=[self.item_id[row] for row in numbers],
            user_hash=self.user_hash[rows],
            item_hash=self.item_hash[rows],
            event_time=self.event_time[rows],
            ingest_time=self.ingest_time[rows],
            reward=self.reward[rows],
            context=[self.context[row] for row in numbers],
            event_hash=self.event_hash[rows],
        )

    @classmethod
    def concatenated(cls, parts: Sequence[Clicks]) -> Clicks:
        """The rows of one or more parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            offset=np.concatenate([part.offset for part in parts]),
            user_id=list(chain.from_iterable(part.user_id for part in parts)),
            item_id=list(chain.from_iterable(part.item_id for part in parts)),
            user_hash=np.concatenate([part.user_hash for part in parts]),
            item_hash=np.concatenate([part.item_hash for part in parts]),
            event_time=np.concatenate([part.event_time for part in parts]),
            ingest_time=np.concatenate([part.ingest_time for part in parts]),
            reward=np.concatenate([part.reward for part in parts]),
            context=list(chain.from_iterable(part.context for part in parts)),
            event_hash=np.concatenate([part.event_hash for part in parts]),
        )


_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class _Click(msgspec.Struct, gc=False):
    """A click as producers write it. Other fields are skipped; of one that comes twice, the last counts."""

    user_id: str | int
    item_id: str | int
    event_time: float | _Moment
    reward: float | None = 1.0
    context: dict[str, str | int | float | bool | None] | None = None


class _ClickWithEventId(_Click, gc=False):
    """The same, and its event id as it stands there."""

    event_id: msgspec.Raw = msgspec.Raw(b"null")


_NO_CONTEXT: Mapping[str, Scalar] = {}
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def validate(
    values: Sequence[bytes | None],
    offsets: Int64Array,
    ingest_time: Float64Array,
    max_click_bytes: int = 65_536,
    with_event_ids: bool = False,
) -> tuple[Clicks, list[Rejection]]:
    """Takes values apart into clicks and rejections; each value is in exactly one of both.

    Ids are strings, or integers, which become strings (-0 becomes "0"; 1.0 and true are no ids). A null reward or
    context is as good as none. `event_id`, `session_id` and unknown fields may hold anything that is JSON.

    Args:
        values: n records' values.
        offsets: int64 [n], strictly rising.
        ingest_time: float64 [n], seconds; NaN or negative: the record has no timestamp.
        max_click_bytes: longer values are rejected unread.
        with_event_ids: whether event ids are read; the same text is the same id, of whatever type.
    """
    decode = msgspec.json.Decoder(_ClickWithEventId if with_event_ids else _Click).decode
    only_ascii = all(map(bytes.isascii, filter(None, values)))
    clicks: list[_Click] = []
    indices: list[int] = []
    rejections: list[Rejection] = []
    for index, value in enumerate(values):
        if value is None:
            rejections.append(Rejection(index, Reason.NULL_VALUE))
        elif len(value) > max_click_bytes:
            rejections.append(Rejection(index, Reason.TOO_LARGE))
        elif not only_ascii and not _is_utf8(value):
            rejections.append(Rejection(index, Reason.NOT_UTF8))
        else:
            try:
                clicks.append(decode(value))
                indices.append(index)
            except _UNDECODABLE:
                rejections.append(Rejection(index, _undecodable_reason(value)))

    event_time = _seconds([click.event_time for click in clicks])
    reward = np.array([click.reward for click in clicks], np.float64)
    reward[np.isnan(reward)] = 1.0  # null; a NaN cannot come out of JSON
    user_id = _strings([click.user_id for click in clicks])
    item_id = _strings([click.item_id for click in clicks])
    context = [click.context or _NO_CONTEXT for click in clicks]
    faults = {
        Reason.BAD_ID: _too_short_or_long(user_id) | _too_short_or_long(item_id),
        Reason.BAD_TIME: ~((event_time >= 0) & (event_time < MAX_EVENT_TIME)),
        Reason.BAD_REWARD: ~((reward >= 0) & (reward <= MAX_REWARD)),
        Reason.TOO_MANY_CONTEXT_FEATURES: np.fromiter(map(len, context), np.int64, len(context)) > MAX_CONTEXT_FEATURES,
    }
    accepted = ~np.logical_or.reduce(list(faults.values()))
    kept = np.array(indices, np.int64)
    if not accepted.all():
        for row in np.flatnonzero(~accepted):
            reason = next(reason for reason, faulty in faults.items() if faulty[row])
            rejections.append(Rejection(indices[row], reason))
        rejections.sort(key=lambda rejection: rejection.index)
        rows = np.flatnonzero(accepted)
        kept, event_time, reward = kept[rows], event_time[rows], reward[rows]
        user_id, item_id = [user_id[row] for row in rows], [item_id[row] for row in rows]
        context = [context[row] for row in rows]
        clicks = [clicks[row] for row in rows]
    columns = Clicks(
        offset=offsets[kept],
        user_id=user_id,
        item_id=item_id,
        user_hash=hash_ids(user_id),
        item_hash=hash_ids(item_id),
        event_time=event_time,
        ingest_time=np.where(ingest_time[kept] >= 0, ingest_time[kept], event_time),
        reward=reward.astype(np.float32),
        context=context,
        event_hash=_event_hashes(clicks) if with_event_ids else np.zeros(len(clicks), np.uint64),
    )
    return columns, rejections


def _event_hashes(clicks: Sequence[_Click]) -> UInt64Array:
    texts = (bytes(click.event_id) for click in clicks if isinstance(click, _ClickWithEventId))
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((0 if text == b"null" else digest(text, HASH_SEED) for text in texts), np.uint64, len(clicks))


def _seconds(event_time: Sequence[float | datetime]) -> Float64Array:
    try:
        return np.array(event_time, np.float64)
    except TypeError:
        return np.array([t.timestamp() if isinstance(t, datetime) else t for t in event_time], np.float64)


def _strings(ids: list[str | int]) -> list[str]:
    return [str(value) for value in ids] if int in set(map(type, ids)) else ids  # type: ignore[return-value]


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _too_short_or_long(ids: Sequence[str]) -> BoolArray:
    num_characters: Int64Array = np.fromiter(map(len, ids), np.int64, len(ids))
    bad: BoolArray = (num_characters == 0) | (num_characters > MAX_ID_BYTES)
    for row in np.flatnonzero(~bad & (num_characters > MAX_ID_BYTES // 4)).tolist():
        bad[row] = len(ids[row].encode()) > MAX_ID_BYTES
    return bad


def _undecodable_reason(value: bytes) -> Reason:
    """Why msgspec refused a value of UTF-8: reads it again, slowly, with a decoder that forgives more."""
    try:
        click = json.loads(value.decode(), parse_int=_lenient_int)
    except (ValueError, RecursionError):
        return Reason.NOT_JSON
    if not isinstance(click, dict):
        return Reason.NOT_AN_OBJECT
    user_id, item_id, event_time = (click.get(name) for name in ("user_id", "item_id", "event_time"))
    if user_id is None or item_id is None or event_time is None:
        return Reason.MISSING_FIELD
    if not _is_id(user_id) or not _is_id(item_id):
        return Reason.BAD_ID
    if not _is_time(event_time):
        return Reason.BAD_TIME
    reward, context = click.get("reward"), click.get("context")
    if reward is not None and not _is_number(reward, 0, _ABOVE_MAX_REWARD):
        return Reason.BAD_REWARD
    if context is not None:
        if not isinstance(context, dict) or not all(
            _is_text(name) and (value is None or isinstance(value, bool) or _is_number(value) or _is_text(value))
            for name, value in context.items()
        ):
            return Reason.BAD_CONTEXT
        if len(context) > MAX_CONTEXT_FEATURES:
            return Reason.TOO_MANY_CONTEXT_FEATURES
    return Reason.NOT_JSON


def _lenient_int(digits: str) -> int | float:
    """Python reads no integers of more than 4,300 digits; they all mean the same here: out of every range."""
    return int(digits) if len(digits) <= 4300 else math.inf


def _is_text(value: object) -> TypeGuard[str]:
    """A string that UTF-8 can write: no half of a surrogate pair in it."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object, low: float = -math.inf, above: float = math.inf) -> bool:
    return (_is_integer(value) or isinstance(value, float)) and low <= value < above and value != -math.inf


def _is_id(value: object) -> bool:
    return (_is_text(value) or _is_integer(value)) and not _too_short_or_long([str(value)])[0]


def _is_time(value: object) -> bool:
    if isinstance(value, str):
        try:
            value = msgspec.convert(value, _Moment).timestamp()
        except (msgspec.ValidationError, UnicodeEncodeError):
            return False
    return _is_number(value, 0, MAX_EVENT_TIME)
