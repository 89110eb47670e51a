"""Clicks: bytes → validate → micro-batch → bytes → what trainer and retriever read, held against a reading by hand."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta, timezone

import numpy as np

from streams.batcher import CloseReason, Cut, context_columns, micro_batch
from streams.contract import MicroBatch, hash_id
from streams.state import Learnt
from streams.validate import validate
from tests.fuzz.mutator import JSON_WORDS
from tests.fuzz.strict_json import Refused, Undecided, id_of, is_number, read, typed

MAX_CLICK_BYTES = 65_536


def _json(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


CORPUS = (
    _json(user_id="ann", item_id="shoe", event_time=1790000000.25),
    _json(user_id=7, item_id=-3, event_time="2026-09-21T12:00:00.5+02:00", reward=2.5, event_id="e-1"),
    _json(
        user_id="böb", item_id="h\n", event_time=12, context={"device": "phone", "hour": 7, "new": True, "age": None}
    ),
    _json(user_id="u", item_id="i", event_time="1970-01-01T00:00:00Z", reward=None, context={"x": 1e300, "y": 2**70}),
    _json(session_id={"a": [1, "é"]}, user_id="u", item_id="i", event_time=0, context={"a": "1", "b": False, "c": 0.5}),
    b' { "user_id" : "\\u00e9" , "item_id":"i", "event_time":1e9,"event_time":1E+9, "event_id":null } ',
    _json(user_id="u", item_id="i", event_time=1, context={f"f{number}": number for number in range(64)}),
)
WORDS = (
    *JSON_WORDS, b'"user_id":', b'"item_id":', b'"event_time":', b'"reward":', b'"context":', b'"event_id":',
    b'"2026-09-21T12:00:00Z"', b'"0001-01-01T00:00:00+23:59"', b',"reward":0.1', b'"user_id":"other",',
)  # fmt: skip
_BEFORE, _AFTER = _json(user_id="before", item_id="i", event_time=1), _json(user_id="after", item_id="i", event_time=2)
# RFC 3339, and offsets without their colon, which can mean nothing else.
_MOMENT = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(\.\d+)?([Zz]|([+-])(\d\d):?(\d\d))", flags=re.ASCII
)


def check(data: bytes) -> bool:
    """Whether the input is accepted as a click.

    Raises:
        AssertionError: it is accepted and is none, or as another one; or it is one and is refused.
    """
    clicks, rejections = validate(
        [_BEFORE, data, _AFTER], np.array([5, 6, 7]), np.array([1.0, 2.0, 3.0]), MAX_CLICK_BYTES, with_event_ids=True
    )
    assert len(clicks) + len(rejections) == 3
    assert (clicks.user_id[0], clicks.user_id[-1]) == ("before", "after"), "a neighbour was touched"
    accepted = not rejections
    assert accepted or rejections[0].index == 1
    try:
        expected = _reading(data)
    except Undecided:
        return accepted
    except Refused as error:
        assert not accepted, f"accepted, but {error or error.__cause__!r}"
        return False
    assert accepted or _has_doubled_names(data), f"refused as {rejections[0].reason}"
    if not accepted:
        return False
    user_id, item_id, event_time, reward, context, has_event_id = expected
    assert (clicks.user_id[1], clicks.item_id[1]) == (user_id, item_id)
    assert clicks.user_hash.tolist()[1] == hash_id(user_id) and clicks.item_hash.tolist()[1] == hash_id(item_id)
    assert abs(clicks.event_time[1] - event_time) < 1e-5, (clicks.event_time[1], event_time)
    assert clicks.reward[1] == np.float32(reward)
    assert typed(dict(clicks.context[1])) == typed(context)
    assert (clicks.event_hash[1] != 0) == has_event_id
    _check_micro_batch(clicks)
    return True


def _reading(data: bytes) -> tuple[str, str, float, float, dict[str, object], bool]:
    if len(data) > MAX_CLICK_BYTES:
        raise Refused("too large")
    click = read(data)
    if not isinstance(click, dict):
        raise Refused("no object")
    user_id, item_id = id_of(click.get("user_id")), id_of(click.get("item_id"))
    event_time = click.get("event_time")
    seconds = _moment(event_time) if isinstance(event_time, str) else event_time
    if not is_number(seconds) or not 0 <= seconds < 253_402_300_800:
        raise Refused("no time")
    reward = click.get("reward")
    reward = 1.0 if reward is None else reward
    if not is_number(reward) or not 0 <= reward <= 1e6:
        raise Refused("no reward")
    context = click.get("context")
    context = {} if context is None else context
    if not isinstance(context, dict) or len(context) > 64:
        raise Refused("no context")
    for value in context.values():
        if not (value is None or isinstance(value, bool | str) or is_number(value)):
            raise Refused("no flat context")
    return user_id, item_id, seconds, reward, context, click.get("event_id") is not None


def _moment(text: str) -> float:
    if not (match := _MOMENT.fullmatch(text)):
        raise Refused("no RFC 3339")
    zone = UTC
    try:
        if match[9]:
            offset = timedelta(hours=int(match[10]), minutes=int(match[11]))
            if int(match[10]) > 23 or int(match[11]) > 59:
                raise Refused("no offset")
            zone = timezone(offset if match[9] == "+" else -offset)
        whole = datetime(*(int(match[part]) for part in range(1, 7)), tzinfo=UTC)
        return (
            (whole - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()
            - zone.utcoffset(None).total_seconds()
            + float(match[7] or 0)
        )
    except ValueError as error:
        raise Refused(str(error)) from error


def _has_doubled_names(data: bytes) -> bool:
    doubled = False

    def look(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal doubled
        doubled |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    json.loads(data, object_pairs_hook=look, parse_int=float)
    return doubled


def _check_micro_batch(clicks: object) -> None:
    """What was accepted can be sent, and is read as it was sent."""
    learnt = Learnt(np.zeros(0, np.uint64), np.zeros(4, np.int64), np.full(3, 0.5, np.float32))
    sent = micro_batch(0, Cut(5, 8, clicks, CloseReason.SIZE), learnt)
    came = MicroBatch.decode(sent.encode())
    assert came.user_id.equals(sent.user_id) and came.item_id.equals(sent.item_id)
    assert came.context.keys() == context_columns(clicks.context).keys()
    assert all(came.context[name].equals(column) for name, column in sent.context.items())
    np.testing.assert_array_equal(came.reward, clicks.reward)
