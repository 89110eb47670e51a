"""From chunks to acknowledged micro-batches: nothing lost, nothing out of order, whatever is delivered how often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streams.broker import DependencyError
from streams.contract import MicroBatch, Topics, hash_ids
from streams.dead_letter import RejectedShare
from streams.fetch import Chunk
from streams.metrics import Metrics
from streams.partition import (
    SLICE_CLICKS,
    Partitions,
    PartitionWorker,
    RetentionExpiredError,
    TooManyRejectedError,
)
from streams.settings import StreamsSettings
from streams.snapshot import Snapshots
from streams.validate import Reason
from tests.streams.references import Row, expected_rows
from tests.streams.stand_ins import ClicksInMemory, Event, SenderInMemory, chunk, click, random_clicks

NEVER = 60.0
VALUES: list[bytes | None] = random_clicks(700, 21)
VALUES[5:5] = [b"no", None]
VALUES[300] = b"\xff"


class Bench:
    """One worker among stand-ins."""

    def __init__(
        self,
        values: list[bytes | None] = VALUES,
        sender: SenderInMemory | None = None,
        batch_size: int = 64,
        batch_age_seconds: float = NEVER,
        max_rejected_ratio: float = 1.0,
        snapshots: Path | None = None,
        retention_expired: str = "fail",
        first_offset: int = 0,
        event_id_window: int = 0,
    ) -> None:
        settings = StreamsSettings(
            batch_size=batch_size,
            batch_age_seconds=batch_age_seconds,
            num_buckets=2**14,
            history_users=1_000,
            max_rejected_ratio=max_rejected_ratio,
            rejected_window_clicks=100,
            retention_expired=retention_expired,
            event_id_window=event_id_window,
        )
        self.sender = sender or SenderInMemory()
        self.clicks = ClicksInMemory(values, first_offset=first_offset)
        self.metrics = Metrics()
        self.snapshots = None
        if snapshots:
            self.snapshots = Snapshots(
                str(snapshots), "clicks", lambda: "id", settings.state_config(), self.metrics, keep=10
            )
        self.worker = PartitionWorker(
            0,
            settings,
            Topics(),
            self.sender,  # type: ignore[arg-type]
            self.clicks,  # type: ignore[arg-type]
            self.metrics,
            RejectedShare(max_rejected_ratio, settings.rejected_window_clicks),
            self.snapshots,
        )

    @property
    def batches(self) -> list[MicroBatch]:
        return [MicroBatch.decode(value) for _, value in self.sender.micro_batches]

    async def work(self, events: list[Event], until: Callable[[], bool]) -> None:
        """Runs the worker over the events until a condition holds; what the worker raises comes out."""
        task = asyncio.create_task(self.worker.run())
        for event in events:
            self.worker.put(event)
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline, "the condition was never met"
            if task.done():
                task.result()
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"streamtower_streams_{name}", labels)
        assert value is not None
        return value


def chunks(values: list[bytes | None], bounds: list[int], first_offset: int = 0) -> list[Event]:
    """The values from first_offset on, cut at the bounds."""
    bounds = sorted({first_offset, len(values), *(bound for bound in bounds if first_offset < bound < len(values))})
    return [Event(chunk(values[low:high], low)) for low, high in pairwise(bounds)]


def rows_of(batches: list[MicroBatch], from_offset: int = 0) -> list[Row]:
    """Their rows, as a reader sees them that drops what it has seen."""
    rows: list[Row] = []
    for batch in batches:
        if (new := batch.from_offset(from_offset)) is not None:
            rows += [
                Row(
                    int(new.offset[n]),
                    new.user_id[n].as_py(),
                    new.item_id[n].as_py(),
                    float(new.event_time[n]),
                    new.history(n).tolist(),
                    float(new.sampling_probability[n]),
                )
                for n in range(len(new))
            ]
        from_offset = max(from_offset, batch.next_offset)
    return rows


def assert_rows(came: list[Row], expected: list[Row]) -> None:
    assert [row.offset for row in came] == [row.offset for row in expected]
    for row, wanted in zip(came, expected, strict=True):
        assert row.sampling_probability == pytest.approx(wanted.sampling_probability, rel=1e-5)
        assert Row(**{**vars(row), "sampling_probability": 0.0}) == Row(**{**vars(wanted), "sampling_probability": 0.0})


def run(work: Awaitable[Any]) -> None:
    async def wrapped() -> None:
        await work

    asyncio.run(wrapped())


def test_rows_histories_and_probabilities_are_those_of_a_slow_recomputation() -> None:
    bench = Bench()
    run(bench.work(chunks(VALUES, [100, 101, 555]), until=lambda: bench.worker.position == 640))
    assert_rows(rows_of(bench.batches), [row for row in expected_rows(VALUES, 64) if row.offset < 640])
    assert [batch.first_offset for batch in bench.batches] == list(range(0, 640, 64))
    assert {batch.partition for batch in bench.batches} == {0}


def test_a_chunk_is_acknowledged_once_all_of_it_is_in_acknowledged_micro_batches() -> None:
    bench = Bench()
    events = chunks(VALUES, [64, 128, 200])
    run(bench.work(events[:3], until=lambda: bench.worker.position == 192))
    assert [event.acked for event in events[:3]] == [True, True, False]


def test_nothing_is_acknowledged_before_the_broker_has_it() -> None:
    class SlowSender(SenderInMemory):
        async def send(self, *record: Any, **more: Any) -> None:
            await self.gate.wait()
            await super().send(*record, **more)

    async def work() -> None:
        sender = SlowSender()
        sender.gate = asyncio.Event()
        bench = Bench(sender=sender)
        events = chunks(VALUES[:64], [])
        asking = iter(range(50))
        await bench.work(events, until=lambda: next(asking, None) is None)
        assert bench.worker.state is not None
        assert not events[0].acked
        assert sender.micro_batches == []

    asyncio.run(work())


def test_an_open_micro_batch_is_closed_by_its_age_and_its_chunk_acknowledged() -> None:
    bench = Bench(batch_age_seconds=0.01)
    events = [Event(chunk([click(), None], 0))]
    run(bench.work(events, until=lambda: events[0].acked))
    assert [(batch.first_offset, batch.next_offset, len(batch)) for batch in bench.batches] == [(0, 2, 1)]
    assert bench.metric("micro_batches_total", closed_by="age") == 1


def test_rejected_records_become_dead_letters_with_their_bytes_and_places() -> None:
    values = [click("a"), b"no", None, click("b"), b"\xff" * 3]
    bench = Bench(values, batch_size=1)
    run(bench.work([Event(chunk(values, 0))], until=lambda: bench.worker.position == 5))
    letters = bench.sender.letters
    assert [(letter.offset, letter.reason, letter.value, letter.key) for letter in letters] == [
        (1, Reason.NOT_JSON, b"no", b"key-1"),
        (2, Reason.NULL_VALUE, None, b"key-2"),
        (4, Reason.NOT_UTF8, b"\xff\xff\xff", b"key-4"),
    ]
    assert {(letter.topic, letter.partition) for letter in letters} == {("clicks", 0)}
    assert letters[0].time == 1_790_000_001.0
    assert bench.metric("dead_letters_total", reason="not_json") == 1
    assert bench.metric("clicks_total") == 5


def test_what_comes_again_while_it_is_on_its_way_is_not_sent_again() -> None:
    bench = Bench()
    events = [
        Event(chunk(VALUES[:100], 0)),
        Event(chunk(VALUES[64:150], 64)),
        Event(chunk(VALUES[70:90], 70)),
        Event(chunk(VALUES[:640], 0)),
    ]
    run(bench.work(events, until=lambda: events[3].acked))
    assert_rows(rows_of(bench.batches), [row for row in expected_rows(VALUES, 64) if row.offset < 640])
    assert [batch.first_offset for batch in bench.batches] == list(range(0, 640, 64))
    assert all(event.acked for event in events)
    assert bench.clicks.reads == [(0, 0)]


def test_clicks_that_another_worker_took_meanwhile_are_replayed_into_the_state_only() -> None:
    bench = Bench()
    events = [Event(chunk(VALUES[:100], 0)), Event(chunk(VALUES[400:640], 400))]
    run(bench.work(events, until=lambda: events[1].acked))
    assert bench.clicks.reads == [(0, 0), (100, 400)]
    assert [(batch.first_offset, batch.next_offset) for batch in bench.batches][:3] == [(0, 64), (64, 100), (400, 448)]
    expected = {row.offset: row for row in expected_rows(VALUES, 64)}
    came = rows_of(bench.batches)
    assert [row.offset for row in came if row.offset >= 400] == [o for o in expected if 400 <= o < 640]
    assert_rows([r for r in came if r.offset >= 400], [expected[o] for o in expected if 400 <= o < 640])
    assert (bench.metric("replays_total"), bench.metric("replayed_clicks_total")) == (2, 300)


@hypothesis_settings(max_examples=25)
@given(
    bounds=st.lists(st.integers(1, 700), max_size=6),
    sends=st.integers(0, 13),
    committed=st.integers(0, 700),
    bounds_after=st.lists(st.integers(1, 700), max_size=6),
)
def test_after_a_crash_a_reader_that_drops_what_it_has_seen_gets_every_click_once_and_the_same(
    bounds: list[int], sends: int, committed: int, bounds_after: list[int]
) -> None:
    """The worker dies at any send, and the next one starts at any offset that may have been committed by then."""
    first = Bench(sender=SenderInMemory(fail_after=sends, failure=DependencyError("gone")))
    events = chunks(VALUES, bounds)
    if sends < 13:  # three dead letters and ten micro-batches
        with pytest.raises(DependencyError, match="gone"):
            run(first.work(events, until=lambda: False))
    else:
        run(first.work(events, until=lambda: first.worker.position == 640))
    acked = max((event.value.next_offset for event in events if event.acked), default=0)
    start = min(committed, acked)
    second = Bench()
    run(second.work(chunks(VALUES, bounds_after, start), until=lambda: second.worker.position == 640))
    assert_rows(rows_of(first.batches + second.batches), [row for row in expected_rows(VALUES, 64) if row.offset < 640])
    letters = {letter.offset for bench in (first, second) for letter in bench.sender.letters}
    assert letters >= {5, 6, 300}


def test_an_undisturbed_and_a_disturbed_run_send_the_same_bytes() -> None:
    undisturbed, disturbed = Bench(), Bench()
    run(undisturbed.work(chunks(VALUES, []), until=lambda: undisturbed.worker.position == 640))
    run(disturbed.work(chunks(VALUES, [11, 400], 200), until=lambda: disturbed.worker.position == 640))
    assert disturbed.sender.micro_batches[1:] == undisturbed.sender.micro_batches[4:]


def saved_at(folder: Path, offsets: list[int]) -> None:
    """Snapshots of a worker that has passed on the clicks up to each of the offsets, multiples of 64."""
    bench = Bench(snapshots=folder)
    assert bench.snapshots
    for offset in offsets:
        run(bench.work(chunks(VALUES[:offset], []), until=lambda offset=offset: bench.worker.position == offset))
        assert bench.worker.state
        bench.snapshots.save(0, bench.worker.state.state(), offset)


def test_from_a_snapshot_on_only_what_came_after_it_is_replayed_and_the_same_bytes_are_sent(tmp_path: Path) -> None:
    undisturbed = Bench()
    run(undisturbed.work(chunks(VALUES, []), until=lambda: undisturbed.worker.position == 640))
    saved_at(tmp_path, [128, 256, 512])
    for first_offset, snapshot in ((320, 256), (256, 256), (255, 128), (64, 0), (640, 512)):
        bench = Bench(snapshots=tmp_path)
        run(bench.work(chunks(VALUES, [], first_offset), until=lambda: bench.worker.position is not None))  # noqa: B023
        assert bench.clicks.reads == [(snapshot, first_offset)]
        bench = Bench(snapshots=tmp_path)
        events = chunks(VALUES, [], first_offset)
        run(bench.work(events, until=lambda: (bench.worker.position or 0) >= 640))  # noqa: B023
        whole = [batch for batch in undisturbed.batches if batch.first_offset >= first_offset]
        assert [b.encode() for b in bench.batches if b.first_offset % 64 == 0] == [batch.encode() for batch in whole]


def test_if_retention_has_deleted_what_was_never_passed_on_it_ends_and_says_why() -> None:
    bench = Bench(first_offset=300)
    with pytest.raises(
        RetentionExpiredError,
        match=r"clicks 100 … 299 of partition 0 of topic 'clicks' were deleted.*passed on\. .* retention_expired",
    ):
        run(bench.work([late_event(100, 300)], until=lambda: False))
    assert bench.sender.micro_batches == []


def late_event(committed: int, first_offset: int) -> Event:
    """The first chunk after the committed offset, of which the beginning is gone, as the Faust extension gives it."""
    return Event(replace(chunk(VALUES[first_offset:], first_offset), first_offset=committed))


def test_told_to_take_the_earliest_it_goes_on_with_the_oldest_click_that_is_left_and_counts_the_gap() -> None:
    bench = Bench(first_offset=300, retention_expired="earliest")
    event = late_event(100, 300)
    run(bench.work([event], until=lambda: bench.worker.position == 640))
    assert [(b.first_offset, b.next_offset) for b in bench.batches][:2] == [(300, 320), (320, 384)]
    assert bench.metric("gap_offsets_total", of="micro_batches") == 200
    assert bench.metric("gap_offsets_total", of="state") == 0


def test_told_to_take_the_latest_it_passes_over_all_that_is_there() -> None:
    bench = Bench(VALUES, first_offset=300, retention_expired="latest", batch_size=8)
    event = late_event(100, 300)
    run(bench.work([event], until=lambda: event.acked))
    assert (bench.worker.position, bench.sender.micro_batches) == (len(VALUES), [])
    assert bench.metric("gap_offsets_total", of="micro_batches") == len(VALUES) - 100
    values = random_clicks(16, 1)
    run(bench.work([Event(chunk(values, len(VALUES)))], until=lambda: len(bench.batches) == 2))
    assert bench.batches[0].first_offset == len(VALUES)


@pytest.mark.parametrize("retention_expired", ["fail", "earliest", "latest"])
def test_clicks_deleted_behind_a_snapshot_are_a_gap_in_the_state(tmp_path: Path, retention_expired: str) -> None:
    saved_at(tmp_path, [128])
    bench = Bench(snapshots=tmp_path, first_offset=300, retention_expired=retention_expired)
    events = chunks(VALUES, [], 320)
    if retention_expired == "fail":
        with pytest.raises(RetentionExpiredError, match=r"clicks 128 … 299 .* taken into the state"):
            run(bench.work(events, until=lambda: False))
        return
    run(bench.work(events, until=lambda: bench.worker.position == 640))
    assert [(b.first_offset, b.next_offset) for b in bench.batches][:1] == [(320, 384)]
    assert bench.metric("gap_offsets_total", of="state") == 172
    assert bench.worker.state
    seen = 640 - (320 if retention_expired == "latest" else 300) + 128
    rejected = sum(n in (5, 6, 300) for n in [*range(128), *range(320 if retention_expired == "latest" else 300, 640)])
    assert bench.worker.state.estimator.step == seen - rejected


def test_without_a_snapshot_a_state_begins_with_the_oldest_click_and_that_is_no_gap(tmp_path: Path) -> None:
    bench = Bench(snapshots=tmp_path, first_offset=300)
    run(bench.work(chunks(VALUES, [], 320), until=lambda: bench.worker.position == 640))
    assert bench.metric("gap_offsets_total", of="state") == 0
    assert bench.clicks.reads == [(0, 320)]


def test_late_clicks_and_clicks_out_of_order_count_in_the_order_of_their_offsets() -> None:
    times = [1_790_000_000.0, 1_000.0, 1_790_000_000.0 + 10**8, 1_500.0]
    values: list[bytes | None] = [click("u", f"i{n}", time) for n, time in enumerate(times)]
    bench = Bench(values, batch_size=4)
    run(bench.work([Event(chunk(values, 0))], until=lambda: bench.worker.position == 4))
    (batch,) = bench.batches
    assert batch.event_time.tolist() == times
    assert [batch.history(n).tolist() for n in range(4)] == [
        hash_ids([f"i{m}" for m in range(n)]).tolist() for n in range(4)
    ]


def test_without_a_window_a_click_that_is_written_twice_is_two_clicks() -> None:
    values: list[bytes | None] = [click("u", "i", event_id="e1")] * 2
    bench = Bench(values, batch_size=2)
    run(bench.work([Event(chunk(values, 0))], until=lambda: bench.worker.position == 2))
    assert [len(batch) for batch in bench.batches] == [2]


def test_with_a_window_a_click_whose_event_id_came_lately_is_left_out_and_counted() -> None:
    ids = ["e1", "e2", "e1", None, None, 7, "7", 7, "e3", "e4", "e1"]
    values: list[bytes | None] = [click("u", f"i{n}", event_id=event_id) for n, event_id in enumerate(ids)]
    bench = Bench([*values, b"no"], batch_size=4, event_id_window=4)
    run(bench.work([Event(chunk([*values, b"no"], 0))], until=lambda: bench.worker.position == 12))
    kept = [offset for batch in bench.batches for offset in batch.offset.tolist()]
    assert kept == [0, 1, 3, 4, 5, 6, 8, 9, 10], "e1 has left the window of four when it comes the third time"
    assert bench.metric("duplicates_total") == 2
    assert bench.batches[-1].history(2).tolist() == hash_ids([f"i{n}" for n in kept[:-1]]).tolist()


@hypothesis_settings(max_examples=15)
@given(start=st.integers(1, 300), bounds=st.lists(st.integers(1, 300), max_size=4))
def test_duplicates_are_the_same_ones_after_a_replay(start: int, bounds: list[int]) -> None:
    rng = np.random.default_rng(5)
    values: list[bytes | None] = [click("u", f"i{n}", event_id=f"e{rng.integers(60)}") for n in range(320)]
    undisturbed, disturbed = Bench(values, event_id_window=40), Bench(values, event_id_window=40)
    run(undisturbed.work(chunks(values, []), until=lambda: undisturbed.worker.position == 320))
    run(disturbed.work(chunks(values, bounds, start), until=lambda: disturbed.worker.position == 320))
    assert sum(map(len, undisturbed.batches)) < 320
    whole = [batch.encode() for batch in undisturbed.batches if batch.first_offset >= start]
    assert [batch.encode() for batch in disturbed.batches if batch.first_offset % 64 == 0] == whole


def test_a_record_that_cannot_be_sent_ends_the_worker_without_an_acknowledgement() -> None:
    bench = Bench(sender=SenderInMemory(fail_after=0, failure=DependencyError("no broker")))
    events = chunks(VALUES, [])
    with pytest.raises(DependencyError, match="no broker"):
        run(bench.work(events, until=lambda: False))
    assert not events[0].acked


def test_a_dead_letter_that_cannot_be_sent_ends_the_worker_before_its_micro_batch_is_sent() -> None:
    sender = SenderInMemory(fail_after=1, failure=DependencyError("no broker"))
    bench = Bench([None, None], sender=sender, batch_size=1)
    with pytest.raises(DependencyError, match="no broker"):
        run(bench.work([Event(chunk([None, None], 0))], until=lambda: False))
    assert sender.micro_batches == []


def test_above_a_share_of_rejected_records_the_worker_ends_and_all_of_them_are_kept() -> None:
    values: list[bytes | None] = [click(), b"no", b"no"] * 50
    bench = Bench(values, max_rejected_ratio=0.5, batch_size=10)
    events = [Event(chunk(values, 0))]
    with pytest.raises(
        TooManyRejectedError, match=r"100 of the last 150 clicks.*max_rejected_ratio = 0\.5.*'clicks-dead-letter'"
    ):
        run(bench.work(events, until=lambda: False))
    assert len(bench.sender.letters) == 100
    assert events[0].acked, "so that a restart begins behind them"


def test_a_chunk_longer_than_a_slice_keeps_its_order() -> None:
    values: list[bytes | None] = [click(f"u{n}") for n in range(2 * SLICE_CLICKS + 10)]
    bench = Bench(values, batch_size=len(values))
    run(bench.work([Event(chunk(values, 0))], until=lambda: bench.worker.position == len(values)))
    assert bench.batches[0].user_id.to_pylist() == [f"u{n}" for n in range(len(values))]


def test_offsets_without_records_are_covered_by_micro_batches_all_the_same() -> None:
    values: list[bytes | None] = [click()] * 20
    whole = chunk(values, 0)
    bench = Bench(values, batch_size=8)
    with_holes = Chunk("clicks", 0, 0, 24, whole.offsets[[1, 7, 17]], [click()] * 3, [None] * 3, whole.timestamps[:3])
    run(bench.work([Event(with_holes)], until=lambda: bench.worker.position == 24))
    assert [(b.first_offset, b.next_offset, b.offset.tolist()) for b in bench.batches] == [
        (0, 16, [1, 7]),
        (16, 24, [17]),
    ]


def test_a_worker_that_is_cancelled_in_a_replay_stops_reading() -> None:
    bench = Bench()
    asked: list[bool] = []

    def read(partition: int, start: int, stop: int, cancelled: Callable[[], bool]) -> Any:
        while not cancelled():
            asked.append(True)
            time.sleep(0.001)
        asked.append(False)
        yield from ()

    bench.clicks.read = read  # type: ignore[method-assign]
    run(bench.work([Event(chunk(VALUES[100:200], 100))], until=lambda: bench.worker.is_replaying and len(asked) > 0))
    assert bench.worker.position is None, "only a lag from the committed offset on is true now"
    deadline = time.monotonic() + 10
    while asked[-1] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert asked[-1] is False


def test_partitions_that_went_elsewhere_are_forgotten_and_the_others_kept() -> None:
    async def work() -> None:
        made: list[int] = []

        def new_worker(partition: int) -> PartitionWorker:
            made.append(partition)
            return Bench().worker

        failures: list[BaseException] = []
        partitions = Partitions(new_worker, failures.append)
        zero, one = partitions.worker(0), partitions.worker(1)
        assert partitions.worker(0) is zero
        partitions.keep_only({1, 2})
        assert (partitions.owned, set(partitions.workers)) == ({1, 2}, {1})
        assert partitions.worker(1) is one
        assert partitions.worker(0) is not zero
        partitions.keep_only(set())
        await asyncio.sleep(0)
        assert (made, failures, partitions.workers) == ([0, 1, 0], [], {})

    asyncio.run(work())


def test_a_failing_worker_is_reported_once() -> None:
    async def work() -> None:
        failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        bench = Bench(sender=SenderInMemory(fail_after=0, failure=RuntimeError("bug")))
        partitions = Partitions(lambda _: bench.worker, failure.set_result)
        partitions.worker(0).put(Event(chunk(VALUES[:64], 0)))
        assert str(await asyncio.wait_for(failure, 10)) == "bug"

    asyncio.run(work())


def test_numbers_of_rows_and_bytes_are_those_acknowledged() -> None:
    bench = Bench()
    run(bench.work(chunks(VALUES, []), until=lambda: bench.worker.position == 640))
    assert bench.metric("micro_batches_total", closed_by="size") == 10
    assert bench.metric("micro_batch_rows_total") == sum(map(len, bench.batches)) == 637
    assert bench.metric("micro_batch_bytes_total") == sum(len(value) for _, value in bench.sender.micro_batches)
    assert bench.metric("send_seconds_count") == 10
    assert np.isclose(bench.metric("clicks_total"), len(VALUES))
