"""Publishing to a server that fails: every fault on every kind of call, and calls that are carried out too late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from qdrant_client import models

from tests.fixtures.strict_qdrant import StrictQdrant
from tests.trainer.publishing import SETTINGS, Publishing, publishings
from trainer.contract import collection_name
from trainer.index import Index, IndexAwayError
from trainer.item_events import ItemChange

pytestmark = pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")

PASSING = ("unavailable", "too_many", "time_out_before", "time_out_after", "drop_before", "drop_after")
UPSERT = r"^PUT .*/points$"
DELETE = r"^POST .*/points/delete$"
ALIASES = r"^POST /collections/aliases$"
COUNT = r"/points/count$"
INFO = r"^GET /collections/items__v\d+$"
CREATE = r"^PUT /collections/items__v\d+$"
DROP = r"^DELETE /collections/items__v\d+$"
OTHERS = [
    CREATE,
    DROP,
    ALIASES,
    COUNT,
    INFO,
    r"^PUT .*/index$",
    r"query/batch$",
    r"^GET /aliases$",
    r"^GET /collections$",
]


class Hasty(Index):
    """Pauses only as long as was asked for by tests: not at all. Keeps how long it would have paused."""

    pauses: list[float]

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        super()._pause(0.0)


@pytest.fixture
def double() -> Iterator[StrictQdrant]:
    with StrictQdrant() as server:
        yield server
        assert server.violations == [] and server.num_faults_left == 0


@pytest.fixture
def new(double: StrictQdrant, tmp_path: Path) -> Iterator[Callable[..., Publishing]]:
    with publishings(double.url, "items", tmp_path / "models") as make:

        def hasty(**values: object) -> Publishing:
            publishing = make(**{"attempts": 3, "timeout_seconds": 1, "index_class": Hasty} | values)
            publishing.index.pauses = []  # type: ignore[attr-defined]
            return publishing

        yield hasty


def steps(publishing: Publishing) -> dict[str, int]:
    return {item: (record.payload or {})["step"] for item, record in publishing.points().items()}


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("call", [UPSERT, DELETE, *OTHERS])
def test_a_full_publish_stands_one_fault_of_any_call(
    new: Callable[..., Publishing], double: StrictQdrant, kind: str, call: str
) -> None:
    publishing = new()
    publishing.click("a", "b", "c", "d", "e", "gone")
    vectors = models.VectorParams(size=2, distance=models.Distance.DOT)
    publishing.client.create_collection(collection_name("items", 1), vectors)  # what a cut-off publish left
    if call == DELETE:
        double.fail("yellow", INFO)  # the version is whole, and something goes before it is live
        publishing.until(lambda: double.num_faults_left == 0)
    publishing.take(ItemChange("gone", gone=True))
    double.fail(kind, call)  # type: ignore[arg-type]
    publishing.until(lambda: publishing.publisher.idle)
    publishing.settle()
    assert steps(publishing).keys() == {"a", "b", "c", "d", "e"}
    assert publishing.value("publish_failures_total", kind="full") == 0
    assert publishing.live == 2 and publishing.collections() == [collection_name("items", 2)]


def test_a_collection_that_is_there_before_the_first_attempt_to_make_it_is_not_taken_for_ones_own(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    index = new().index
    index.create(1, 10, hnsw=False)
    with pytest.raises(IndexAwayError, match=r"(?s)attempt 1 of 3: .*already exists"):
        index.create(1, 10, hnsw=False)


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("call", [UPSERT, DELETE, r"^GET /aliases$"])
def test_a_delta_stands_one_fault_of_any_call_and_ends_as_without_it(
    new: Callable[..., Publishing], double: StrictQdrant, kind: str, call: str
) -> None:
    publishing = new()
    publishing.click("a", "b", "c", "gone")
    publishing.settle()
    publishing.click("b", "new")
    publishing.take(ItemChange("gone", gone=True))
    double.fail(kind, call)  # type: ignore[arg-type]
    publishing.settle()
    assert steps(publishing) == {"a": 1, "b": 3, "c": 1, "new": 3}
    # The aliases are asked for by two threads: the one that meets the fault may be the later one.
    publishing.until(lambda: len(publishing.index.pauses) == 1)  # type: ignore[attr-defined]
    assert publishing.live == 1
    assert publishing.value("publish_failures_total", kind="delta") == 0


def test_a_pause_that_the_server_asks_for_is_kept(new: Callable[..., Publishing], double: StrictQdrant) -> None:
    publishing = new(attempts=5)
    publishing.click("a")
    publishing.settle()
    publishing.click("a")
    double.fail("unavailable", UPSERT, times=2)
    double.fail("too_many", UPSERT, times=2)  # Retry-After: 2
    publishing.settle()
    assert publishing.index.pauses == [0.25, 0.5, 2.0, 2.0]  # type: ignore[attr-defined]
    assert publishing.value("qdrant_retries_total") == 4 and steps(publishing) == {"a": 2}


@pytest.mark.parametrize("kind", PASSING)
def test_a_delta_that_fails_in_all_attempts_goes_out_later_with_what_came_since(
    new: Callable[..., Publishing], double: StrictQdrant, kind: str
) -> None:
    publishing = new(attempts=1)
    publishing.click("a", "b")
    publishing.settle()
    publishing.click("b", "new")
    double.fail(kind, UPSERT)  # type: ignore[arg-type]
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("publish_failures_total", kind="delta"))
    publishing.click("a", "newer")
    publishing.settle()
    assert steps(publishing) == {"a": 3, "b": 3, "new": 3, "newer": 3}


def test_a_version_that_is_slow_to_index_is_waited_for(new: Callable[..., Publishing], double: StrictQdrant) -> None:
    publishing = new()
    publishing.click("a")
    double.fail("yellow", INFO, times=5)
    publishing.until(lambda: publishing.live == 1)
    assert publishing.index.pauses == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32])  # type: ignore[attr-defined]
    assert publishing.value("publish_failures_total", kind="full") == 0


@pytest.mark.parametrize(("kind", "call"), [("yellow", INFO), ("wrong_count", COUNT)])
def test_a_version_that_is_not_indexed_in_time_or_not_whole_does_not_go_live(
    new: Callable[..., Publishing], double: StrictQdrant, kind: str, call: str
) -> None:
    publishing = new(settings=replace(SETTINGS, green_seconds=0.0))
    publishing.click("a", "b")
    publishing.settle()
    publishing.click("c")
    publishing.settle()
    before = publishing.points()
    double.fail(kind, call)  # type: ignore[arg-type]
    publishing.clock.now += 60.0
    publishing.until(lambda: publishing.value("publish_failures_total", kind="full"))
    assert publishing.live == 1 and publishing.points() == before
    publishing.click("d")
    publishing.clock.now += 10.0
    publishing.until(lambda: publishing.live == 3)
    assert publishing.collections() == ["items__v1", "items__v3"]


def late_upsert(publishing: Publishing, double: StrictQdrant, item: str) -> None:
    """A delta with this item times out, and waits on the server."""
    publishing.click(item)
    double.fail("late", UPSERT, body=item)
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("publish_failures_total", kind="delta"))


def test_the_late_upsert_of_a_known_item_changes_nothing_that_came_after_it(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    publishing = new(attempts=1)
    publishing.click("a", "b")
    publishing.settle()
    late_upsert(publishing, double, "a")
    publishing.click("a")
    publishing.settle()
    before = publishing.points()
    double.release()
    assert publishing.points() == before and steps(publishing) == {"a": 3, "b": 1}


def test_the_late_upsert_of_a_known_item_cannot_bring_it_back_when_it_is_gone(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    publishing = new(attempts=1)
    publishing.click("a", "b")
    publishing.settle()
    late_upsert(publishing, double, "a")
    publishing.take(ItemChange("a", gone=True))
    publishing.settle()
    assert steps(publishing) == {"b": 1}
    double.release()
    assert steps(publishing) == {"b": 1}


def test_the_late_upsert_of_an_item_that_was_new_and_is_gone_is_swept_up_by_the_next_delta(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    publishing = new(attempts=1)
    publishing.click("b")
    publishing.settle()
    late_upsert(publishing, double, "fresh")
    publishing.take(ItemChange("fresh", gone=True))
    publishing.settle()
    assert steps(publishing) == {"b": 1}
    double.release()
    assert steps(publishing) == {"b": 1, "fresh": 2}
    publishing.clock.now += 2.0  # nothing was touched
    publishing.until(lambda: steps(publishing) == {"b": 1})
    assert publishing.live == 1


def test_what_went_is_deleted_again_for_a_minute_and_then_no_more(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    rarely = {"first_publish_interval_seconds": 1_000.0, "full_publish_interval_seconds": 1_000.0}
    publishing = new(settings=replace(SETTINGS, **rarely))
    publishing.click("a", "b", "c")
    publishing.settle()

    def tick() -> int:
        """Lets an interval pass; how often something was deleted in it."""
        before = sum("points/delete" in call for call in double.calls)
        publishing.clock.now += 2.0
        publishing.publisher.advance()
        publishing.until(lambda: publishing.publisher._delta is None)
        return sum("points/delete" in call for call in double.calls) - before

    publishing.take(ItemChange("a", gone=True))
    deletes = [tick() for _ in range(40)]
    assert deletes == [1] * 32 + [0] * 8  # the first, and again until it is more than 60 seconds ago
    publishing.take(ItemChange("b", gone=True))
    double.fail("unavailable", DELETE, body=r'"has_id": ?\[\d+\]')  # b alone is named
    assert tick() == 2
    assert steps(publishing) == {"c": 1}


def test_a_late_delete_does_not_take_an_item_that_has_come_back(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    publishing = new(attempts=1)
    publishing.click("a", "b")
    publishing.settle()
    publishing.take(ItemChange("a", gone=True))
    double.fail("late", DELETE)
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("publish_failures_total", kind="delta"))
    publishing.take(ItemChange("a"))
    publishing.settle()
    assert steps(publishing) == {"a": 3, "b": 1}
    double.release()
    assert steps(publishing) == {"a": 3, "b": 1}


def test_what_went_while_a_version_was_filled_does_not_come_with_it(
    new: Callable[..., Publishing], double: StrictQdrant
) -> None:
    publishing = new(attempts=1)
    publishing.click("a", "b")
    publishing.settle()
    double.fail("late", UPSERT, body="a")  # the fill of version 2
    publishing.clock.now += 60.0
    publishing.until(lambda: double.num_faults_left == 0)
    publishing.take(ItemChange("a", gone=True))
    publishing.until(lambda: publishing.value("publish_failures_total", kind="full"))
    double.release()
    publishing.clock.now += 60.0
    publishing.until(lambda: publishing.live == 3)
    assert steps(publishing).keys() == {"b"}
