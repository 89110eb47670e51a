"""Whatever the order of the acks, no commit passes an unfinished chunk."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.ledger import InFlight, Ledger

Sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=30)


def make_ledger(start: int = 0) -> Ledger:
    return Ledger(start, InFlight(10**9, 10**9))


@given(start=st.integers(0, 1_000), sizes=Sizes, data=st.data())
def test_the_position_is_the_end_of_the_finished_prefix_after_every_ack(
    start: int, sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    ledger = make_ledger(start)
    spans = []
    for width, _ in sizes:
        spans.append(ledger.enter(ledger.end + width, num_records=width, num_bytes=0))
    for index in data.draw(st.permutations(range(len(spans)))):
        spans[index].finish()
        prefix = start
        for span in spans:
            if not span.finished:
                break
            prefix = span.next_offset
        assert ledger.position == prefix
        assert ledger.committable == (prefix if prefix > start else None)


@given(sizes=Sizes, data=st.data())
def test_the_position_never_goes_back_while_chunks_enter_and_finish(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    ledger = make_ledger()
    waiting = []
    last = 0
    for width, _ in sizes:
        waiting.append(ledger.enter(ledger.end + width, num_records=width, num_bytes=0))
        while waiting and data.draw(st.booleans()):
            waiting.pop(data.draw(st.integers(0, len(waiting) - 1))).finish()
            assert ledger.position >= last
            assert not waiting or ledger.position < min(span.next_offset for span in waiting)
            last = ledger.position


@given(sizes=Sizes, finished=st.sets(st.integers(0, 29)), close=st.booleans())
def test_in_flight_is_what_is_delivered_and_not_finished(
    sizes: list[tuple[int, int]], finished: set[int], close: bool
) -> None:
    in_flight = InFlight(10**9, 10**9)
    ledger = Ledger(0, in_flight)
    spans = [ledger.enter(ledger.end + width, width, num_bytes) for width, num_bytes in sizes]
    for index in finished:
        if index < len(spans):
            spans[index].finish()
    if close:
        ledger.close()
    waiting = [] if close else [size for index, size in enumerate(sizes) if index not in finished]
    assert in_flight.num_records == sum(width for width, _ in waiting)
    assert in_flight.num_bytes == sum(num_bytes for _, num_bytes in waiting)


def test_a_second_ack_counts_for_nothing() -> None:
    in_flight = InFlight(10, 10)
    ledger = Ledger(0, in_flight)
    span = ledger.enter(5, num_records=5, num_bytes=3)
    span.finish()
    span.finish()
    assert (in_flight.num_records, in_flight.num_bytes, ledger.position) == (0, 0, 5)


def test_an_ack_after_the_ledger_was_closed_moves_nothing() -> None:
    in_flight = InFlight(10, 10)
    ledger = Ledger(0, in_flight)
    first, second = ledger.enter(5, 5, 0), ledger.enter(9, 4, 0)
    first.finish()
    ledger.close()
    ledger.close()
    second.finish()
    assert ledger.position == 5
    assert in_flight.num_records == 0


def test_a_chunk_without_records_lets_the_position_pass_when_all_before_it_is_finished() -> None:
    ledger = make_ledger(start=100)
    before = ledger.enter(110, num_records=10, num_bytes=0)
    ledger.enter(115, num_records=0, num_bytes=0)
    assert (ledger.committable, ledger.delivered, ledger.end) == (None, 110, 115)
    before.finish()
    assert ledger.committable == 115


@pytest.mark.parametrize("next_offset", [0, 5, 10])
def test_a_chunk_cannot_end_where_the_one_before_it_ended_or_earlier(next_offset: int) -> None:
    ledger = make_ledger()
    ledger.enter(10, 10, 0)
    with pytest.raises(ValueError, match="cannot follow one up to 10"):
        ledger.enter(next_offset, 1, 0)


@pytest.mark.parametrize(("num_records", "num_bytes"), [(10, 0), (0, 10), (11, 11)])
def test_fetching_waits_while_records_or_bytes_in_flight_reach_their_bound(num_records: int, num_bytes: int) -> None:
    async def scenario() -> None:
        in_flight = InFlight(max_records=10, max_bytes=10)
        assert await in_flight.has_room(60)
        in_flight.add(num_records, num_bytes)
        assert in_flight.is_full
        assert not await in_flight.has_room(0.01)
        waiting = asyncio.create_task(in_flight.has_room(60))
        await asyncio.sleep(0)
        in_flight.add(-num_records, -num_bytes)
        assert await waiting

    asyncio.run(scenario())
