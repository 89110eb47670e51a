"""What counts as a click: every kind of damage has its reason, none raises, and the others are not touched by it."""

import json
import math
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import hash_id
from streams.validate import Clicks, Reason, Rejection, validate
from tests.streams.stand_ins import click

TIME = 1_790_000_000.0


def validated(*values: bytes | None, **options: int) -> tuple[Clicks, list[Rejection]]:
    return validate(values, np.arange(100, 100 + len(values)), np.full(len(values), TIME + 5), **options)


def reason_of(value: bytes | None, **options: int) -> Reason | None:
    clicks, rejections = validated(value, **options)
    assert len(clicks) + len(rejections) == 1
    return rejections[0].reason if rejections else None


def test_a_click_becomes_one_row_of_columns() -> None:
    clicks, rejections = validated(
        click("ann", "shoe", TIME + 0.25, reward=2.5, context={"device": "phone", "hour": 7, "new": True, "age": None})
    )
    assert rejections == []
    assert (clicks.offset.tolist(), clicks.user_id, clicks.item_id) == ([100], ["ann"], ["shoe"])
    assert clicks.user_hash.tolist() == [hash_id("ann")]
    assert clicks.item_hash.tolist() == [hash_id("shoe")]
    assert (clicks.event_time.tolist(), clicks.ingest_time.tolist()) == ([TIME + 0.25], [TIME + 5])
    assert clicks.reward.tolist() == [2.5]
    assert clicks.reward.dtype == np.float32
    assert clicks.context == [{"device": "phone", "hour": 7, "new": True, "age": None}]


def test_what_is_optional_has_its_default_whether_absent_or_null() -> None:
    clicks, _ = validated(click(), click(reward=None, context=None, event_id=None, session_id=None))
    assert clicks.reward.tolist() == [1.0, 1.0]
    assert clicks.context == [{}, {}]


def test_integers_are_ids_and_become_strings() -> None:
    clicks, _ = validated(click(7, -3), click(2**80, 0), b'{"user_id":-0,"item_id":"007","event_time":1}')
    assert clicks.user_id == ["7", str(2**80), "0"]
    assert clicks.item_id == ["-3", "0", "007"]


def test_event_times_are_seconds_or_rfc_3339() -> None:
    clicks, rejections = validated(
        click(time=0), click(time="1970-01-01T00:00:01.5Z"), click(time="2024-02-29 12:00:00+02:00"), click(time=12)
    )
    assert rejections == []
    assert clicks.event_time.tolist() == [0.0, 1.5, 1709200800.0, 12.0]


def test_a_record_without_a_timestamp_came_in_at_its_event_time() -> None:
    clicks, _ = validate([click(time=7), click(time=8), click(time=9)], np.arange(3), np.array([math.nan, -0.001, 3.0]))
    assert clicks.ingest_time.tolist() == [7.0, 8.0, 3.0]


def test_fields_that_are_not_read_may_hold_any_json() -> None:
    assert reason_of(click(event_id=["x"], session_id={"a": [1]}, anything=[[{}]])) is None


def test_of_a_field_that_comes_twice_the_last_one_counts() -> None:
    clicks, _ = validated(b'{"user_id":"a","user_id":"b","item_id":"i","event_time":1}')
    assert clicks.user_id == ["b"]


@pytest.mark.parametrize(
    ("reason", "values"),
    {
        Reason.NULL_VALUE: [None],
        Reason.NOT_UTF8: [
            b'{"user_id":"\xff","item_id":"i","event_time":1}',
            b'{"user_id":"u","item_id":"i","event_time":1,"other":"\xed\xa0\x80"}',
            b"\xff\xfe",
        ],
        Reason.NOT_JSON: [
            b"",
            b" ",
            b"{",
            b"no",
            click()[:-1],
            click() + b"{}",
            click() + b"," + click(),
            b"\xef\xbb\xbf" + click(),
            b'{"user_id":"u","item_id":"i","event_time":1,"other":NaN}',
            b'{"user_id":"u","item_id":"i","event_time":1,"other":"\\ud800"}',
            b'{"user_id":"a\nb","item_id":"i","event_time":1}',
            b'{"user_id":"u","item_id":"i","event_time":1,"other":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
            b'{"user_id":true,"user_id":"u","item_id":"i","event_time":1}',
        ],
        Reason.NOT_AN_OBJECT: [b"1", b"null", b"[" + click() + b"]", b'"text"', b'["u","i",1]'],
        Reason.MISSING_FIELD: [
            b"{}",
            click(user=None),
            click(item=None),
            click(time=None),
            b'{"user_id":"u","item_id":"i"}',
            b'{"item_id":"i","event_time":1}',
        ],
        Reason.BAD_ID: [
            click(user=""),
            click(item=""),
            click(user=1.0),
            click(user=True),
            click(item=["i"]),
            click(user={}),
            click(user="u" * 513),
            click(item="é" * 257),
            click(user=10**512),
            b'{"user_id":"\\ud800","item_id":"i","event_time":1}',
            b'{"user_id":' + b"9" * 5000 + b',"item_id":"i","event_time":1}',
        ],
        Reason.BAD_TIME: [
            b'{"user_id":"u","item_id":"i","event_time":NaN}',
            b'{"user_id":"u","item_id":"i","event_time":-Infinity}',
            b'{"user_id":"u","item_id":"i","event_time":1e999}',
            b'{"user_id":"u","item_id":"i","event_time":' + b"9" * 400 + b"}",
            click(time=-1),
            click(time=TIME * 1000),
            click(time=True),
            click(time="yesterday"),
            click(time="1790000000"),
            click(time="2026-01-01T00:00:00"),
            click(time="1969-12-31T23:59:59Z"),
            click(time="0001-01-01T00:00:00+14:00"),
            click(time=[1]),
        ],
        Reason.BAD_REWARD: [
            click(reward=-0.5),
            click(reward=1_000_001),
            click(reward="1"),
            click(reward=True),
            b'{"user_id":"u","item_id":"i","event_time":1,"reward":NaN}',
            b'{"user_id":"u","item_id":"i","event_time":1,"reward":1e999}',
            b'{"user_id":"u","item_id":"i","event_time":1,"reward":' + b"9" * 5000 + b"}",
        ],
        Reason.BAD_CONTEXT: [
            click(context=[]),
            click(context="device"),
            click(context={"a": {"b": 1}}),
            click(context={"a": [1]}),
            b'{"user_id":"u","item_id":"i","event_time":1,"context":{"a":NaN}}',
            b'{"user_id":"u","item_id":"i","event_time":1,"context":{"a":1e999}}',
            b'{"user_id":"u","item_id":"i","event_time":1,"context":{"\\udfff":1}}',
        ],
        Reason.TOO_MANY_CONTEXT_FEATURES: [click(context={f"f{n}": n for n in range(65)})],
    }.items(),
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
def test_each_kind_of_damage_has_its_reason(reason: Reason, values: list[bytes | None]) -> None:
    assert [reason_of(value, max_click_bytes=1_000_000) for value in values] == [reason] * len(values)


def test_values_just_inside_the_bounds_are_clicks() -> None:
    accepted = [
        click(user="u" * 512),
        click(item="é" * 256),
        click(user=10**511),
        click(reward=0),
        click(reward=1e6),
        click(time=253_402_300_799.9),
        click(time="9999-12-31T23:59:59Z"),
        click(context={f"f{n}": n for n in range(64)}),
        click(context={"": "", "big": 10**400}),
    ]
    assert [reason_of(value) for value in accepted] == [None] * len(accepted)


def test_a_value_is_too_large_by_its_bytes_alone() -> None:
    value = click()
    assert reason_of(value, max_click_bytes=len(value)) is None
    assert reason_of(value, max_click_bytes=len(value) - 1) is Reason.TOO_LARGE
    assert reason_of(b"\xff" * 2_000_000) is Reason.TOO_LARGE


def test_every_reason_can_be_reached() -> None:
    """A reason that nothing can have would be a metric's label that is always 0."""
    cases = next(
        mark for mark in test_each_kind_of_damage_has_its_reason.pytestmark if mark.name == "parametrize"
    ).args[1]
    assert {reason for reason, _ in cases} | {Reason.TOO_LARGE} == set(Reason)


@pytest.mark.parametrize("size", [0, 1])
def test_few_values_make_few_rows(size: int) -> None:
    clicks, rejections = validated(*[click()] * size)
    assert len(clicks) == size
    assert rejections == []


def test_halves_of_clicks_are_not_glued_together() -> None:
    """Joined by commas, the first two would be one click and the third two: as many as there are values."""
    first, second = b'{"user_id":"a","item_id":"i","x":[{}', b'{}],"event_time":1}'
    clicks, rejections = validated(first, second, click("b") + b"," + click("c"), click("d"))
    assert clicks.user_id == ["d"]
    assert [(rejection.index, rejection.reason) for rejection in rejections] == [
        (0, Reason.NOT_JSON),
        (1, Reason.NOT_JSON),
        (2, Reason.NOT_JSON),
    ]


def test_one_bad_value_costs_only_itself() -> None:
    values = [click(f"u{n}") for n in range(50)]
    values[17] = b"\xff"
    values[30] = b"{}"
    clicks, rejections = validated(*values)
    assert clicks.user_id == [f"u{n}" for n in range(50) if n not in (17, 30)]
    assert clicks.offset.tolist() == [100 + n for n in range(50) if n not in (17, 30)]
    assert rejections == [Rejection(17, Reason.NOT_UTF8), Rejection(30, Reason.MISSING_FIELD)]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
nearly_clicks = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.text(max_size=3) | scalars,
        "item_id": st.text(max_size=3) | scalars,
        "event_time": st.floats(-1, 3e11) | scalars | st.datetimes().map(lambda t: t.isoformat() + "Z"),
        "reward": st.floats(-1, 2e6) | scalars,
        "context": scalars | st.dictionaries(st.text(max_size=3), scalars | st.lists(scalars, max_size=1), max_size=3),
        "other": scalars,
    },
).map(lambda fields: json.dumps(fields).encode())
anything = st.none() | st.binary(max_size=60) | nearly_clicks | st.just(click())


@given(st.lists(anything, max_size=8))
def test_values_together_are_judged_as_each_alone(values: list[bytes | None]) -> None:
    clicks, rejections = validated(*values)
    assert sorted(clicks.offset.tolist() + [100 + rejection.index for rejection in rejections]) == list(
        range(100, 100 + len(values))
    )
    row = 0
    reasons = {rejection.index: rejection.reason for rejection in rejections}
    for index, value in enumerate(values):
        alone, _ = validated(value)
        assert reason_of(value) == reasons.get(index)
        if len(alone):
            assert (clicks.user_id[row], clicks.item_id[row]) == (alone.user_id[0], alone.item_id[0])
            assert (clicks.event_time[row], clicks.reward[row]) == (alone.event_time[0], alone.reward[0])
            assert clicks.context[row] == alone.context[0]
            row += 1


@given(nearly_clicks)
def test_accepted_rows_say_what_the_json_says(value: bytes) -> None:
    """Against Python's own JSON reader, field by field."""
    clicks, rejections = validated(value)
    fields = json.loads(value)
    if rejections:
        return
    assert clicks.user_id == [str(fields["user_id"])]
    assert clicks.item_id == [str(fields["item_id"])]
    expected = fields["event_time"]
    if isinstance(expected, str):
        expected = datetime.fromisoformat(expected).timestamp()
    assert clicks.event_time[0] == expected
    assert clicks.reward[0] == np.float32(1.0 if fields.get("reward") is None else fields["reward"])
    assert clicks.context == [fields.get("context") or {}]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128))
def test_any_text_is_an_id_and_keeps_its_characters(text: str) -> None:
    clicks, _ = validated(click(text, text))
    assert clicks.user_id == [text]
    assert clicks.item_hash.tolist() == [hash_id(text)]


def test_rows_and_concatenation_are_inverse() -> None:
    clicks, _ = validated(*[click(f"u{n}", f"i{n}", n, context={"n": n}) for n in range(7)])
    again = Clicks.concatenated([clicks.rows(0, 3), clicks.rows(3, 3), clicks.rows(3, 7)])
    for name in ("offset", "user_hash", "item_hash", "event_time", "ingest_time", "reward"):
        assert getattr(again, name).tolist() == getattr(clicks, name).tolist()
    assert (again.user_id, again.item_id, again.context) == (clicks.user_id, clicks.item_id, clicks.context)


def test_event_ids_are_read_only_when_asked_for_and_are_the_same_where_their_text_is() -> None:
    values = [
        click(event_id="a"),
        click(event_id=1),
        click(event_id="1"),
        click(),
        click(event_id=None),
        b"no",
        click(event_id="a"),
    ]
    offsets, times = np.arange(len(values)), np.zeros(len(values))
    without, _ = validate(values, offsets, times)
    assert without.event_hash.tolist() == [0] * 6
    clicks, rejections = validate(values, offsets, times, with_event_ids=True)
    first, number, digit, *none, again = clicks.event_hash.tolist()
    assert (none, again, len({first, number, digit, 0})) == ([0, 0], first, 4)
    assert [rejection.index for rejection in rejections] == [5]
    rejected_later, _ = validate(
        [click(reward=-1, event_id="b"), values[0]], offsets[:2], times[:2], with_event_ids=True
    )
    assert rejected_later.event_hash.tolist() == [first]
    assert validate([click(event_id={"any": ["JSON"]})], offsets[:1], times[:1], with_event_ids=True)[1] == []
