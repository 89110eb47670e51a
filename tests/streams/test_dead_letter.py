"""What a dead letter says of its record, and when there are too many of them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from streams.dead_letter import DeadLetter, RejectedShare
from streams.validate import Reason


def letter(value: bytes | None = b"\xff", time: float = 1_790_000_000.25) -> DeadLetter:
    return DeadLetter(b"key", value, Reason.NOT_UTF8, "clicks", 3, 41, time)


def test_headers_say_why_and_where_from() -> None:
    assert letter().headers() == [
        ("reason", b"not_utf8"),
        ("topic", b"clicks"),
        ("partition", b"3"),
        ("offset", b"41"),
        ("time", b"1790000000.250"),
    ]
    assert ("time", b"nan") in letter(time=math.nan).headers()


def test_a_letter_without_its_value_says_how_long_that_was() -> None:
    assert letter(b"x" * 7).headers_without_value() == [*letter().headers(), ("omitted-value-bytes", b"7")]


def test_nothing_is_judged_before_the_window_is_full() -> None:
    share = RejectedShare(0.5, 100)
    share.add(99, 99)
    assert not share.is_exceeded
    share.add(1, 1)
    assert share.is_exceeded


def test_the_share_itself_is_still_allowed() -> None:
    share = RejectedShare(0.5, 100)
    share.add(100, 50)
    assert not share.is_exceeded
    share.add(2, 2)
    assert share.is_exceeded


def test_what_has_left_the_window_is_forgotten() -> None:
    share = RejectedShare(0.5, 100)
    for _ in range(10):
        share.add(20, 20)
    assert share.is_exceeded
    for _ in range(5):
        share.add(20, 0)
    assert (share.num_clicks, share.num_rejected) == (100, 0)
    assert not share.is_exceeded


def test_with_all_allowed_nothing_is_ever_too_much() -> None:
    share = RejectedShare(1.0, 1)
    share.add(10, 10)
    assert not share.is_exceeded


@given(st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1))
def test_the_window_is_the_shortest_run_of_the_last_clicks_that_fills_it(runs: list[tuple[int, int]]) -> None:
    share = RejectedShare(0.5, 50)
    for run in runs:
        share.add(*run)
    expected = next(
        (runs[start:] for start in reversed(range(len(runs))) if sum(n for n, _ in runs[start:]) >= 50), runs
    )
    assert (share.num_clicks, share.num_rejected) == (sum(n for n, _ in expected), sum(r for _, r in expected))
