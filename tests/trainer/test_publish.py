"""Publishing on a real Qdrant endpoint: versions, deltas, late writers, tombstones, cut-offs, an index that is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from qdrant_client import models

from streams.contract import CANARY_HASH, CANARY_ID, MicroBatch, hash_id, hash_ids
from tests.fixtures.strict_qdrant import StrictQdrant
from tests.trainer.gate import Gate
from tests.trainer.publishing import DEADLINE_SECONDS, SETTINGS, Publishing, publishings
from tests.trainer.small_trainer import CONFIG, TRAINING
from tests.trainer.streams_of_clicks import micro_batch
from tests.trainer.test_columns import plain
from trainer.aliases import Named, switch
from trainer.contract import (
    COVISIT,
    DENSE,
    QUERY_TOWER_FILE,
    PrequentialScore,
    collection_name,
    covisit_query,
    covisit_weight,
    load_manifest,
    query_vector,
    version_directory,
)
from trainer.evaluate import Prequential
from trainer.index import Index, IndexAwayError, Points, new_client
from trainer.item_events import ItemChange
from trainer.progress import Progress
from trainer.rollout import LARGEST_RISE, PAUSE_RATIO, PublishSettings
from trainer.step import Learner
from trainer.towers import load_query_tower, query_inputs

pytestmark = [
    pytest.mark.index,
    # The client looks at the server's version on a thread of its own; the gate may be shut by then.
    pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning"),
]


@pytest.fixture(scope="module")
def double() -> Iterator[StrictQdrant]:
    with StrictQdrant() as server:
        yield server


@pytest.fixture(params=["endpoint", "strict double"])
def qdrant_url(request: pytest.FixtureRequest, qdrant_url: str, double: StrictQdrant) -> Iterator[str]:
    """Every test here runs on both; the double takes only what the client's own models allow."""
    yield qdrant_url if request.param == "endpoint" else double.url
    assert double.violations == []


@pytest.fixture
def new(qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Callable[..., Publishing]]:
    with publishings(qdrant_url, alias, tmp_path / "models") as make:
        yield make


def vector_of(record: models.Record) -> np.ndarray:
    assert isinstance(record.vector, dict)
    return np.array(record.vector[DENSE], np.float32)


def test_nothing_is_published_before_there_is_an_item(new: Callable[..., Publishing]) -> None:
    publishing = new()
    for _ in range(3):
        publishing.publisher.advance()
    assert not publishing.collections() and publishing.live is None


def test_the_first_version_has_every_item_with_its_vector_and_payload(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.take(ItemChange("a", {"brand": "x"}, b'{"title": "A", "item_id": "not mine"}'), ItemChange("b"))
    publishing.click("a", "c", "c")
    publishing.progress.learnt = {0: 3}
    publishing.settle()
    points = publishing.points()
    assert points.keys() == {"a", "b", "c"}
    assert publishing.collection() == collection_name(publishing.alias, 1)
    assert {key: record.id for key, record in points.items()} == {key: hash_id(key) for key in points}
    assert points["a"].payload == {"title": "A", "item_id": "a", "step": 2}
    manifest = load_manifest(version_directory(publishing.model_dir, 1))
    assert (manifest.model_version, manifest.collection) == (1, publishing.collection())
    assert (manifest.num_items, manifest.source_offsets, manifest.settings_hash) == (3, {0: 3}, "abc")
    for item, record in points.items():
        row = int(publishing.catalogue.find(hash_ids([item]))[0])
        wanted = np.append(publishing.catalogue.embedding[row], publishing.catalogue.log_qs()[row] / 20.0)
        np.testing.assert_allclose(vector_of(record), wanted, rtol=1e-5, atol=1e-6)


def test_versions_and_deltas_change_nothing_of_the_model(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click(*[f"i{n % 9}" for n in range(40)])
    before = plain(publishing.model.state_dict())
    publishing.settle()
    publishing.clock.now += SETTINGS.full_publish_interval_seconds
    publishing.until(lambda: publishing.live == 2 and publishing.publisher.idle)
    np.testing.assert_equal(plain(publishing.model.state_dict()), before)


def test_any_client_gets_the_score_from_manifest_tower_and_index(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click(*[f"i{n % 7}" for n in range(40)])
    publishing.settle()
    manifest = load_manifest(version_directory(publishing.model_dir, 1))
    tower = load_query_tower(version_directory(publishing.model_dir, 1) / QUERY_TOWER_FILE, CONFIG)
    query = query_inputs(CONFIG, hash_ids(["me"]), hash_ids(["i1", "i2"]), np.array([0, 2]))
    answer = tower(query).numpy()[0]
    embedding, leaning = answer[: CONFIG.embedding_dim], answer[CONFIG.embedding_dim :]
    vector = query_vector(manifest, answer.tolist(), popularity=0.7)
    hits = publishing.client.query_points(publishing.alias, query=vector, using=DENSE, limit=7).points
    cosine = publishing.catalogue.embedding @ embedding
    weights = [0.7, 0.4] + 1.3 * leaning
    score = 1.3 * cosine / CONFIG.temperature + 0.7 * publishing.catalogue.log_qs() @ weights
    for hit in hits:
        assert hit.payload is not None
        row = int(publishing.catalogue.find(hash_ids([hit.payload["item_id"]]))[0])
        assert hit.score == pytest.approx(score[row], abs=1e-4)
    assert len(hits) == 7


def test_the_whole_score_of_the_model_is_served_by_one_query(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click(*[f"i{n % 7}" for n in range(40)])
    publishing.settle()
    publishing.click("i3", "i5", "fresh")  # by a delta
    publishing.settle()
    assert publishing.live == 1
    manifest = load_manifest(version_directory(publishing.model_dir, 1))
    history = ["i1", "fresh", "i2"]
    query = query_inputs(CONFIG, None, hash_ids(history), np.array([0, 3]))
    embedding = load_query_tower(version_directory(publishing.model_dir, 1) / QUERY_TOWER_FILE, CONFIG)(query).numpy()
    indices, values = covisit_query(manifest, hash_ids(history).tolist())
    dense = query_vector(manifest, embedding[0].tolist(), 1.0, 3)
    best = models.Prefetch(query=dense, using=DENSE, limit=100)
    sparse = models.SparseVector(indices=indices, values=values)
    logarithm = models.LnExpression(ln=models.SumExpression(sum=[1.0, "$score[1]"]))
    hits = publishing.client.query_points(
        publishing.alias,
        prefetch=[
            models.Prefetch(prefetch=best, query=dense, using=DENSE, limit=100),
            models.Prefetch(prefetch=best, query=sparse, using=COVISIT, limit=100),
        ],
        query=models.FormulaQuery(
            formula=models.SumExpression(
                sum=["$score[0]", models.MultExpression(mult=[covisit_weight(manifest, 3), logarithm])]
            ),
            defaults={"$score[1]": 0.0},
        ),
        limit=100,
    ).points
    catalogue = publishing.catalogue
    rows = catalogue.find(hash_ids(history))
    popularity = catalogue.log_qs().astype(np.float32)
    wanted = publishing.score.combine(
        publishing.model._logits(query, popularity),
        popularity,
        publishing.covisit.scores(rows, np.array([0, 3]), len(catalogue)),
        np.array([3]),
    )[0]
    assert len(hits) == 8
    touched = [hit for hit in hits if (hit.payload or {})["step"] == 2]
    assert len(touched) == 3
    # Popularity is relative to the version's landmark: the same for all items.
    row_of = {hit.id: int(catalogue.find(np.array([hit.id], np.uint64))[0]) for hit in hits}
    offset = touched[0].score - wanted[row_of[touched[0].id]]
    for hit in touched:
        assert hit.score - wanted[row_of[hit.id]] == pytest.approx(offset, abs=1e-3)


def test_a_delta_writes_the_touched_items_alone_into_the_live_collection(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b", "c")
    publishing.settle()
    before = publishing.points()
    publishing.click("b", "new")
    publishing.take(ItemChange("c", {}, b'{"title": "C"}'))
    publishing.settle()
    after = publishing.points()
    assert publishing.live == 1 and publishing.collections() == [collection_name(publishing.alias, 1)]
    steps = {item: record.payload["step"] for item, record in after.items() if record.payload}
    assert steps == {"a": 1, "b": 3, "c": 3, "new": 3}
    assert after["a"] == before["a"]
    assert after["c"].payload == {"title": "C", "item_id": "c", "step": 3}
    assert publishing.value("items_published_total", kind="delta") == 3
    assert publishing.value("items_published_total", kind="full") == 3


class Measured(Index):
    """Takes four points a second of the test's clock; keeps what it was given."""

    def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
        super().upsert(version, points, step, **known)
        self.clock.now += len(points) / 4  # type: ignore[attr-defined]
        self.given.append((step, points.item_ids))  # type: ignore[attr-defined]


def test_more_than_fits_the_interval_goes_out_in_turns_and_all_of_it_is_measured(
    new: Callable[..., Publishing],
) -> None:
    rarely = {"first_publish_interval_seconds": 1_000.0, "full_publish_interval_seconds": 1_000.0}
    publishing = new(index_class=Measured, settings=replace(SETTINGS, **rarely))
    given: list[tuple[int, list[str]]] = []
    publishing.index.clock, publishing.index.given = publishing.clock, given  # type: ignore[attr-defined]
    publishing.click(*[f"i{n}" for n in range(40)])
    publishing.until(lambda: publishing.live == 1)
    assert publishing.value("delta_limit_items") == 8
    clicked = [*[f"i{n}" for n in range(20)], *["i19"] * 30, "new"]
    publishing.click(*clicked)
    step, came = publishing.progress.step, publishing.clock.now
    publishing.publisher.freshness.note(step, hash_ids(clicked), np.full(51, came))
    publishing.clock.now += 2.0
    publishing.publisher.advance()
    assert publishing.value("items_unpublished") == 21
    assert publishing.value("unservable_click_timestamp_seconds") == came
    publishing.until(lambda: publishing.publisher.idle)
    assert [len(items) for at, items in given if at == step] == [1, 4, 3, 4, 4, 4, 1]
    in_turn = [item for at, items in given if at == step for item in items]
    assert in_turn[:2] == ["new", "i19"] and sorted(in_turn) == sorted(set(clicked))
    # 4, 6 and 7.25 seconds after the clicks came: new, i19 with 31 clicks and 6 items; 8 items; 5 items.
    assert publishing.value("click_to_servable_seconds_sum") == 4 * (1 + 31 + 6) + 6 * 8 + 7.25 * 5
    assert publishing.value("servable_stage_seconds_count", stage="publish") == 51
    assert publishing.value("unservable_click_timestamp_seconds") == publishing.value("items_unpublished") == 0
    assert publishing.live == 1 and publishing.points().keys() == {f"i{n}" for n in range(40)} | {"new"}


def canary_batch(event_time: float, *item_ids: str) -> MicroBatch:
    """A click of the canary, then clicks on these items."""
    return replace(micro_batch([CANARY_ID, *item_ids]), event_time=np.array([event_time, *[2.0] * len(item_ids)]))


def test_a_canary_is_told_by_the_next_delta_and_found_by_no_search(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    rest = publishing.publisher.without_canary(canary_batch(1_700.25, "x", "y"))
    assert rest is not None and rest.item_id.to_pylist() == ["x", "y"]
    assert publishing.publisher.without_canary(rest) is rest
    publishing.progress.step += 1
    publishing.settle()
    point = publishing.points()[CANARY_ID]
    assert (point.id, point.vector or {}) == (CANARY_HASH, {})
    assert point.payload == {"item_id": CANARY_ID, "step": 2, "event_time": 1_700.25}
    hits = publishing.client.query_points(publishing.alias, query=[0.1] * 10, using=DENSE, limit=10).points
    assert sorted((hit.payload or {})["item_id"] for hit in hits) == ["a", "b"]
    before = len(publishing.catalogue)
    for event_time in (1_900.5, 1e12, 1_901.5):  # the second one's clock is wrong
        publishing.progress.step += 1
        assert publishing.publisher.without_canary(canary_batch(event_time)) is None
        publishing.settle()
        assert (publishing.points()[CANARY_ID].payload or {})["event_time"] == event_time
    publishing.renew()  # its count is right, and what was told is told again
    publishing.settle()
    assert (publishing.points()[CANARY_ID].payload or {})["event_time"] == 1_901.5
    assert len(publishing.catalogue) == before == 2
    assert load_manifest(version_directory(publishing.model_dir, 2)).num_items == 2


def test_popularity_of_touched_and_untouched_items_stays_comparable(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click(*["a"] * 5, *["b"] * 3, "c")
    publishing.settle()
    for _ in range(6):
        publishing.click("b", "d", "d")
        publishing.settle()
    assert publishing.live == 1
    log_q = publishing.catalogue.log_qs()
    stored = {item: 20.0 * np.array(vector_of(record)[-2:]) for item, record in publishing.points().items()}
    for item, value in stored.items():
        row = int(publishing.catalogue.find(hash_ids([item]))[0])
        row_of_a = int(publishing.catalogue.find(hash_ids(["a"]))[0])
        np.testing.assert_allclose(value - stored["a"], log_q[row] - log_q[row_of_a], atol=1e-4)


def test_log_frequencies_of_a_delta_rise_no_further_than_the_others_can_fall(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    for _ in range(40):  # 120 clicks: at a half-life of 10 the untouched fell by 8 meanwhile, at 100 by 0.8
        publishing.click("b", "b", "b")
    publishing.settle()
    assert publishing.live == 1
    row = publishing.catalogue.find(hash_ids(["b"]))
    stored = 20.0 * np.array(vector_of(publishing.points()["b"])[-2:])
    rise = publishing.catalogue.log_totals - publishing.publisher.live.landmark  # type: ignore[union-attr]
    assert rise[0] < LARGEST_RISE < rise[1]
    np.testing.assert_allclose(stored - publishing.catalogue.log_qs(row)[0], [rise[0], LARGEST_RISE], atol=1e-4)


def test_a_late_writer_changes_nothing(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    publishing.click("a")
    publishing.settle()
    before = publishing.points()
    late = Points(hash_ids(["a", "b"]), np.ones((2, 10), np.float32), ["a", "b"], [b'{"late": 1}', b'{"late": 2}'])
    publishing.index.upsert(1, late, step=1)
    publishing.index.delete(1, hash_ids(["a"]), step=1)
    assert publishing.points() == before


def test_a_gone_item_is_deleted_and_a_late_upsert_does_not_bring_it_back(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    publishing.take(ItemChange("a", gone=True))
    publishing.settle()
    assert publishing.points().keys() == {"b"}
    publishing.index.upsert(1, Points(hash_ids(["a"]), np.ones((1, 10), np.float32), ["a"], [b"{}"]), step=1)
    assert publishing.points().keys() == {"a", "b"}
    publishing.click("a", "b")
    publishing.settle()
    assert publishing.points().keys() == {"b"}
    publishing.renew()
    assert publishing.points().keys() == {"b"}
    publishing.clock.now += 100.0
    publishing.until(lambda: publishing.catalogue.gone == {})
    publishing.take(ItemChange("a"))
    publishing.settle()
    assert publishing.points().keys() == {"a", "b"}


def test_an_expired_item_leaves_the_index_with_the_next_delta_and_a_late_upsert_does_not_bring_it_back(
    new: Callable[..., Publishing],
) -> None:
    publishing = new(expire_clicks=16)
    publishing.click("a", "b")
    publishing.settle()
    for _ in range(14):
        assert publishing.points().keys() == {"a", "b"}
        publishing.click("b")
        publishing.settle()
    publishing.click("b")
    publishing.click("b")
    publishing.settle()
    assert publishing.points().keys() == {"b"} and publishing.catalogue.num_expired == 1
    publishing.index.upsert(1, Points(hash_ids(["a"]), np.ones((1, 10), np.float32), ["a"], [b"{}"]), step=1)
    publishing.click("b")
    publishing.settle()
    assert publishing.points().keys() == {"b"}
    publishing.click("a")
    publishing.settle()
    assert publishing.points().keys() == {"a", "b"}


def test_a_new_version_gets_its_own_collection_and_the_last_two_stay(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    for version in (2, 3, 4):
        publishing.renew()
        assert publishing.live == version
    names = [collection_name(publishing.alias, version) for version in (3, 4)]
    assert publishing.collections() == names and publishing.collection() == names[1]
    assert sorted(path.name for path in publishing.model_dir.iterdir()) == ["v00000003", "v00000004"]
    assert publishing.value("index_version") == 4


def test_what_is_touched_while_a_version_is_filled_is_in_it_when_it_goes_live(new: Callable[..., Publishing]) -> None:
    filled = threading.Event()
    touched = threading.Event()

    class Slow(Index):
        def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
            super().upsert(version, points, step, **known)
            filled.set()
            assert touched.wait(DEADLINE_SECONDS)

    publishing = new(index_class=Slow)
    publishing.click("a", "b")
    publishing.until(filled.is_set)
    publishing.click("b", "new")
    publishing.take(ItemChange("a", gone=True))
    touched.set()
    publishing.until(lambda: publishing.live == 1)
    points = publishing.points()
    assert points.keys() == {"b", "new"}
    assert points["b"].payload == {"item_id": "b", "step": 3}


def test_deltas_go_on_while_a_version_is_checked_and_it_has_what_they_brought(new: Callable[..., Publishing]) -> None:
    being_checked, go_on = threading.Event(), threading.Event()

    class Slow(Index):
        def wait_until_green(self, version: int, seconds: float) -> None:
            super().wait_until_green(version, seconds)
            if version == 2:
                being_checked.set()
                assert go_on.wait(DEADLINE_SECONDS)

    publishing = new(index_class=Slow)
    publishing.click("a", "b")
    publishing.settle()
    publishing.clock.now += SETTINGS.full_publish_interval_seconds
    publishing.until(being_checked.is_set)
    publishing.click("b", "new")
    publishing.take(ItemChange("a", gone=True))
    publishing.clock.now += SETTINGS.publish_interval_seconds
    publishing.until(lambda: publishing.publisher.published_step == publishing.progress.step)
    assert publishing.live == 1 and publishing.points().keys() == {"b", "new"}
    publishing.click("late", "b")
    go_on.set()
    publishing.until(lambda: publishing.live == 2)
    points = publishing.points()
    assert points.keys() == {"b", "new", "late"}
    assert [points[item].payload["step"] for item in ("b", "new", "late")] == [4, 4, 4]  # type: ignore[index]
    assert publishing.publisher.published_step == publishing.progress.step


def test_filling_a_version_waits_while_a_delta_is_written(new: Callable[..., Publishing]) -> None:
    begun, go_on = threading.Event(), threading.Event()
    order: list[int] = []

    class Slow(Index):
        def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
            if version == 1 and step > 1:
                begun.set()
                assert go_on.wait(DEADLINE_SECONDS)
            super().upsert(version, points, step, **known)
            order.append(version)

    publishing = new(index_class=Slow, settings=replace(SETTINGS, publish_interval_seconds=DEADLINE_SECONDS))
    publishing.click("a", "b")
    publishing.until(lambda: publishing.live == 1)
    order.clear()
    no_delta, waiting = publishing.rollout.no_delta, threading.Event()
    wait = no_delta.wait
    no_delta.wait = lambda timeout=None: (waiting.set(), wait(timeout))[1]  # type: ignore[method-assign]
    publishing.click("c")
    publishing.clock.now += DEADLINE_SECONDS
    publishing.until(begun.is_set)
    publishing.clock.now += 1_000.0
    publishing.until(waiting.is_set)
    assert order == []
    go_on.set()
    publishing.until(lambda: publishing.live == 2)
    assert order[:2] == [1, 2]


def test_filling_a_version_pauses_after_each_batch_while_clicks_come(new: Callable[..., Publishing]) -> None:
    class Slow(Index):
        def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
            super().upsert(version, points, step, **known)
            clock.now += 0.1

    publishing = new(index_class=Slow)
    clock, no_clicks = publishing.clock, publishing.rollout.no_clicks
    pauses: list[float] = []

    def wait(timeout: float) -> bool:
        if not no_clicks.is_set():
            pauses.append(timeout)
        return True

    no_clicks.wait = wait  # type: ignore[assignment]

    def fill() -> list[float]:
        pauses.clear()
        publishing.clock.now += 1_000.0
        version = publishing.live or 0
        publishing.until(lambda: publishing.live == version + 1)
        return pauses

    publishing.click(*[f"i{n}" for n in range(12)])
    assert fill() == []
    publishing.progress.clicks_learnt += 12
    assert fill() == pytest.approx([0.0, 0.1 * PAUSE_RATIO, 0.1 * PAUSE_RATIO])
    assert fill() == []  # the newest click is long ago


class Dying(Index):
    """Its process dies, as far as it is concerned, at the third upsert."""

    calls = 0

    def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
        self.calls += 1
        if self.calls == 3:
            raise IndexAwayError("cut off")
        super().upsert(version, points, step, **known)


def test_a_cut_off_publish_is_invisible_and_cleaned_up_at_the_next_start(new: Callable[..., Publishing]) -> None:
    first = new()
    first.click(*[f"i{n}" for n in range(10)])
    first.settle()
    served = first.points()
    second = new(index_class=Dying, progress=Progress(model_version=first.live or 0))
    second.click(*[f"i{n}" for n in range(20)])
    second.until(lambda: second.value("publish_failures_total", kind="full"))
    assert first.collections() == [collection_name(first.alias, version) for version in (1, 2)]
    assert first.collection() == collection_name(first.alias, 1) and first.points() == served
    (first.model_dir / ".v00000002").mkdir()
    third = new()
    third.click(*[f"i{n}" for n in range(15)])
    third.settle()
    assert third.live == 3 and len(third.points()) == 15
    assert third.collections() == [collection_name(first.alias, version) for version in (1, 3)]
    assert sorted(path.name for path in third.model_dir.iterdir()) == ["v00000001", "v00000003"]


def cut_off(name: str) -> type[Index]:
    """An index whose process dies, as far as it is concerned, in this call."""

    class CutOff(Index):
        pass

    def die(self: Index, *values: object, **more: object) -> object:
        raise IndexAwayError("cut off")

    setattr(CutOff, name, die)
    return CutOff


@pytest.mark.parametrize("call", ["create", "upsert", "wait_until_green", "count", "best", "switch"])
def test_cut_off_anywhere_it_leaves_the_served_version_and_the_next_start_cleans_up(
    new: Callable[..., Publishing], call: str
) -> None:
    first = new()
    first.click(*[f"i{n}" for n in range(10)])
    first.settle()
    served = first.points()
    second = new(index_class=cut_off(call), progress=Progress(model_version=1))
    second.click(*[f"i{n}" for n in range(20)])
    second.until(lambda: second.value("publish_failures_total", kind="full"))
    assert first.collection() == collection_name(first.alias, 1) and first.points() == served
    third = new()
    third.click("a", "b")
    third.settle()
    assert third.live is not None and third.points().keys() == {"a", "b"}
    assert third.collections() == [collection_name(first.alias, version) for version in (1, third.live)]
    assert sorted(path.name for path in third.model_dir.iterdir()) == ["v00000001", f"v{third.live:08d}"]


class HalfBlind(Index):
    """Its approximate searches find every second of the best."""

    def best(self, version: int, queries: np.ndarray, limit: int, *, exact: bool) -> list[list[tuple[int, float]]]:
        found = super().best(version, queries, limit, exact=exact)
        return found if exact else [hits[::2] for hits in found]


def test_a_version_that_does_not_find_what_it_holds_does_not_go_live(new: Callable[..., Publishing]) -> None:
    first = new()
    first.click(*[f"i{n}" for n in range(10)])
    first.settle()
    assert first.value("canary_recall_ratio") == 1.0 and first.value("canary_failures_total") == 0
    served = first.points()
    second = new(index_class=HalfBlind, progress=Progress(model_version=1))
    second.click(*[f"i{n}" for n in range(20)])
    second.until(lambda: second.value("canary_failures_total"))
    assert second.value("canary_recall_ratio") == 0.5
    assert second.value("publish_failures_total", kind="full") == 1
    assert first.collection() == collection_name(first.alias, 1) and first.points() == served
    content = new(index_class=HalfBlind, settings=PublishSettings(canary_recall=0.5))
    content.click(*[f"i{n}" for n in range(20)])
    content.settle()
    assert content.live == 3 and content.value("canary_failures_total") == 0


def test_a_version_with_points_missing_does_not_go_live(new: Callable[..., Publishing]) -> None:
    class Lossy(Index):
        def upsert(self, version: int, points: Points, step: int, **known: bool) -> None:
            super().upsert(version, next(points.batches(3)), step, **known)

    publishing = new(index_class=Lossy)
    publishing.click("a", "b", "c", "d")
    publishing.until(lambda: publishing.value("publish_failures_total", kind="full"))
    assert publishing.live is None and not publishing.model_dir.joinpath("v00000001").exists()


def test_numbers_rise_above_checkpoint_directory_and_collections(new: Callable[..., Publishing]) -> None:
    publishing = new(progress=Progress(model_version=4))
    publishing.click("a")
    publishing.model_dir.joinpath("v00000006").mkdir()
    publishing.client.create_collection(
        collection_name(publishing.alias, 8), vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    publishing.settle()
    assert publishing.live == publishing.progress.model_version == 9
    publishing.renew()
    assert publishing.live == 10


@pytest.mark.parametrize("lost", ["alias", "collection"])
def test_a_live_version_that_disappeared_is_published_anew(new: Callable[..., Publishing], lost: str) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    if lost == "collection":
        publishing.client.delete_collection(publishing.collection())
    else:
        action = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=publishing.alias))
        publishing.client.update_collection_aliases([action])
    publishing.click("c")
    publishing.clock.now += SETTINGS.publish_interval_seconds
    publishing.until(lambda: publishing.live == 2)
    assert publishing.points().keys() == {"a", "b", "c"}


def contents(publishing: Publishing, version: int) -> dict[str, models.Record]:
    return publishing.points(collection_name(publishing.alias, version))


def test_while_an_older_version_is_pinned_nothing_is_published_and_then_all_of_it(
    new: Callable[..., Publishing],
) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    publishing.click("b", "c")
    publishing.renew()
    before = {version: contents(publishing, version) for version in (1, 2)}
    switch(publishing.client, publishing.alias, 1, pin=True)
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("pinned_version"))
    publishing.click("a", "d")
    publishing.take(ItemChange("b", gone=True))
    for version in (1, 2):
        publishing.until(lambda v=version: "b" not in contents(publishing, v))
        before[version].pop("b")
    for _ in range(5):
        publishing.clock.now += 100.0
        for _ in range(3):
            publishing.publisher.advance()
        publishing.until(lambda: publishing.publisher._look is None)
    assert publishing.index.named() == Named(1, 1) and len(publishing.collections()) == 2
    assert {version: contents(publishing, version) for version in (1, 2)} == before
    assert publishing.value("index_version") == publishing.value("pinned_version") == 1
    switch(publishing.client, publishing.alias, 2, pin=False)
    publishing.settle()
    publishing.until(lambda: publishing.publisher.idle and publishing.live == 3)
    assert publishing.index.named() == Named(3, None)
    assert publishing.points().keys() == {"a", "c", "d"}
    assert contents(publishing, 2).keys() in ({"a", "c"}, {"a", "c", "d"})  # without or with a delta before 3


def test_what_went_goes_from_every_kept_version_and_what_comes_back_into_the_live_one_alone(
    new: Callable[..., Publishing],
) -> None:
    publishing = new()
    publishing.click("a", "b", "c")
    publishing.settle()
    publishing.renew()
    publishing.take(ItemChange("a", gone=True))
    publishing.settle()
    publishing.until(lambda: contents(publishing, 1).keys() == {"b", "c"})
    publishing.take(ItemChange("a"))
    publishing.settle()
    assert publishing.points().keys() == {"a", "b", "c"} and contents(publishing, 1).keys() == {"b", "c"}
    publishing.take(ItemChange("b", gone=True))
    publishing.clock.now += 1_000.0  # the next version is made at once, before a delta has deleted it in this one
    publishing.publisher._delta_due = publishing.clock.now + 10_000.0
    publishing.until(lambda: publishing.live == 3)
    assert contents(publishing, 3).keys() == {"a", "c"}
    publishing.clock.now += 2.0
    publishing.until(lambda: contents(publishing, 2).keys() == {"a", "c"})


def test_what_went_goes_from_a_pinned_version_of_an_earlier_process_whatever_its_steps(
    new: Callable[..., Publishing],
) -> None:
    first = new()
    first.click("a", "b", "c")
    first.settle()
    for _ in range(5):
        first.click("a", "b", "c")
    first.settle()
    first.publisher.close()
    switch(first.client, first.alias, 1, pin=True)
    second = new(progress=Progress(model_version=1))
    second.click("a", "b", "c")
    second.take(ItemChange("a", gone=True))
    second.until(lambda: first.points().keys() == {"b", "c"})
    second.until(lambda: second.value("pinned_version"))
    assert second.live is None
    second.take(ItemChange("b", gone=True))
    second.publisher.close()
    third = new(progress=second.progress)
    third.model.load_state_dict(second.model.state_dict())  # what it had not told any more is told now
    third.until(lambda: first.points().keys() == {"c"})


def test_deletes_in_older_versions_that_fail_are_counted_and_repeated(
    new: Callable[..., Publishing], monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    publishing.renew()
    delete, failing = publishing.index.delete, [1, 1]

    def fail(version: int, *values: object) -> None:
        if version == 1 and failing:
            failing.pop()
            raise IndexAwayError("away")
        delete(version, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(publishing.index, "delete", fail)
    publishing.take(ItemChange("a", gone=True))
    publishing.settle()
    publishing.until(lambda: publishing.value("publish_failures_total", kind="delete") == 1)
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("publish_failures_total", kind="delete") == 2)
    assert contents(publishing, 1).keys() == {"a", "b"}
    publishing.clock.now += 2.0
    publishing.until(lambda: contents(publishing, 1).keys() == {"b"})
    assert publishing.value("publish_failures_total", kind="delta") == 0


def test_the_live_version_that_is_pinned_goes_on_by_deltas_alone(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    switch(publishing.client, publishing.alias, 1, pin=True)
    publishing.clock.now += 2.0
    publishing.until(lambda: publishing.value("pinned_version"))
    publishing.clock.now += 1_000.0
    publishing.click("b", "c")
    publishing.settle()
    assert publishing.points().keys() == {"a", "b", "c"}
    assert publishing.live == 1 and len(publishing.collections()) == 1


class PinnedMeanwhile(Index):
    """An operator pins version 1 while version 2 is made live."""

    after_the_look = False

    def _raise_if_pinned(self, version: int) -> None:
        if version == 1 or self.named().pinned:
            super()._raise_if_pinned(version)
        elif self.after_the_look:
            super()._raise_if_pinned(version)
            switch(self._client, self.alias, 1, pin=True)
        else:
            switch(self._client, self.alias, 1, pin=True)
            super()._raise_if_pinned(version)


class PinnedAtTheLastMoment(PinnedMeanwhile):
    after_the_look = True


@pytest.mark.parametrize("index_class", [PinnedMeanwhile, PinnedAtTheLastMoment])
def test_a_version_that_is_filled_while_another_is_pinned_does_not_stay_live(
    new: Callable[..., Publishing], index_class: type[Index]
) -> None:
    publishing = new(index_class=index_class)
    publishing.click("a")
    publishing.settle()
    publishing.click("b")
    publishing.clock.now += 100.0
    publishing.until(lambda: publishing.value("pinned_version"))
    publishing.until(lambda: not publishing.publisher._is_publishing)
    assert publishing.index.named() == Named(1, 1)
    assert publishing.value("publish_failures_total", kind="full") == 0


class PinnedAfterTheSwitch(Index):
    """An operator pins version 1 when version 3 is live, and 1 is about to be removed."""

    def switch(self, version: int) -> None:
        super().switch(version)
        if version == 3:
            switch(self._client, self.alias, 1, pin=True)


def test_a_version_that_is_pinned_just_before_its_removal_stays_whole_and_served(
    new: Callable[..., Publishing],
) -> None:
    publishing = new(index_class=PinnedAfterTheSwitch)
    publishing.click("a", "b")
    publishing.settle()
    publishing.renew()
    publishing.renew()
    assert publishing.index.named() == Named(1, 1)
    assert publishing.collection() == collection_name(publishing.alias, 1)
    assert publishing.points().keys() == {"a", "b"}
    assert load_manifest(version_directory(publishing.model_dir, 1)).model_version == 1


def test_a_trainer_that_is_started_while_a_version_is_pinned_waits(new: Callable[..., Publishing]) -> None:
    first = new()
    first.click("a")
    first.settle()
    first.publisher.close()
    switch(first.client, first.alias, 1, pin=True)
    second = new(progress=Progress(model_version=1))
    second.click("b")
    second.until(lambda: second.value("pinned_version"))
    for _ in range(3):
        second.clock.now += 100.0
        second.publisher.advance()
        second.until(lambda: second.publisher._look is None)
    assert second.points().keys() == {"a"} and len(second.collections()) == 1
    switch(second.client, second.alias, 1, pin=False)
    second.settle()
    assert second.live == 2 and second.points().keys() == {"b"}


def test_an_alias_that_was_moved_without_a_pin_is_taken_for_an_accident(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a", "b")
    publishing.settle()
    publishing.renew()
    before = contents(publishing, 1)
    switch(publishing.client, publishing.alias, 1)
    publishing.click("c")
    publishing.settle()
    publishing.until(lambda: publishing.live == 3)
    assert publishing.points().keys() == {"a", "b", "c"}
    assert publishing.index.named() == Named(3, None) and contents(publishing, 1) == before
    assert publishing.collections() == [collection_name(publishing.alias, version) for version in (1, 3)]


def test_a_version_says_how_well_its_model_foresaw_the_clicks(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a")
    publishing.settle()
    assert load_manifest(version_directory(publishing.model_dir, 1)).prequential is None
    evaluation = publishing.model.evaluation = Prequential(window=4)
    scores = np.tile(np.arange(200, dtype=np.float32), (5, 1))
    # Ranks 200 (out of the window), 1, 20, 150, 101; popularity puts every item at the same place but one.
    popularity = -np.arange(200, dtype=np.float32)
    evaluation.observe(scores, popularity, np.array([0, 199, 180, 50, 99]), np.zeros((0, 2), np.int64))
    publishing.renew()
    assert load_manifest(version_directory(publishing.model_dir, 2)).prequential == PrequentialScore(
        clicks=4, recall_at_10=0.25, recall_at_100=0.5, popularity_recall_at_10=0.0, popularity_recall_at_100=0.5
    )


def test_while_the_index_is_away_learning_goes_on_and_all_is_published_later(
    new: Callable[..., Publishing], qdrant_url: str
) -> None:
    target = urlsplit(qdrant_url)
    assert target.hostname is not None and target.port is not None
    with Gate(target.hostname, target.port) as gate:
        publishing = new(url=f"http://127.0.0.1:{gate.port}", attempts=2)
        publishing.click("a", "b")
        publishing.settle()
        gate.shut()
        publishing.click("a", "c")
        for failures in (1, 2, 3):
            publishing.clock.now += 10.0
            publishing.until(lambda n=failures: publishing.value("publish_failures_total", kind="delta") >= n)
            publishing.click("d", f"e{failures}")
        assert publishing.publisher.published_step == 1
        gate.open()
        publishing.clock.now += 30.0

        def idle() -> bool:
            publishing.clock.now += 0.01  # what was under way may fail only now, and is due again later
            return publishing.publisher.idle

        publishing.until(idle)
        assert publishing.points().keys() == {"a", "b", "c", "d", "e1", "e2", "e3"}
        assert publishing.live is not None
        publishing.publisher.close()
        publishing.client.close()


def test_an_index_that_hiccups_once_is_asked_again(new: Callable[..., Publishing], qdrant_url: str) -> None:
    target = urlsplit(qdrant_url)
    assert target.hostname is not None and target.port is not None
    with Gate(target.hostname, target.port) as gate:
        client = new_client(f"http://127.0.0.1:{gate.port}", None, 10)
        retries: list[int] = []
        index = Index(client, "any", attempts=3, on_retry=lambda: (retries.append(1), gate.open())[0])
        gate.shut()
        assert index.named() == Named()
        assert retries == [1]
        client.close()


def test_freshness_runs_from_ingest_to_the_acknowledgement_that_carries_the_click(
    new: Callable[..., Publishing],
) -> None:
    publishing = new()
    publishing.click("a")
    publishing.publisher.freshness.note(publishing.progress.step, hash_ids(["a"] * 3), np.array([990.0, 996.0, 999.9]))
    publishing.settle()

    def observed(edge: str) -> float:
        return publishing.value("click_to_servable_seconds_bucket", le=edge)

    assert publishing.clock.now == 1_002.0
    assert (observed("5.0"), observed("10.0"), observed("+Inf")) == (1, 2, 3)
    publishing.click("b")
    publishing.publisher.freshness.note(publishing.progress.step, hash_ids(["b"]), np.array([1_003.0]))
    publishing.publisher.advance()
    assert observed("+Inf") == 3
    publishing.settle()
    assert publishing.clock.now == 1_004.0 and observed("5.0") == 2
    assert publishing.value("click_to_servable_seconds_sum") == pytest.approx(12 + 6 + 2.1 + 1)


def unlearn(publishing: Publishing, seed: int) -> None:
    """As if much had been learnt: other towers, with the same items."""
    other = Learner(CONFIG, replace(TRAINING, seed=seed), publishing.catalogue.inputs)
    publishing.learner.load_state_dict(other.state_dict())


def test_staleness_is_how_far_the_towers_have_moved_from_what_the_index_holds(new: Callable[..., Publishing]) -> None:
    publishing = new(settings=replace(SETTINGS, full_publish_recall_lost=0.0, first_publish_interval_seconds=60.0))
    publishing.click(*[f"i{n}" for n in range(60)])
    publishing.settle()
    publishing.until(lambda: publishing.value("served_cosine_ratio", of="mean"))
    assert publishing.value("served_cosine_ratio", of="mean") == pytest.approx(1.0, abs=1e-5)
    assert publishing.value("served_recall_lost_ratio") == 0.0
    served = publishing.catalogue.embedding.copy()
    unlearn(publishing, seed=8)
    wanted = (served * publishing.learner.embed_items(publishing.catalogue.inputs_of_rows(np.arange(60)))).sum(1)
    publishing.clock.now += 10.0
    publishing.until(lambda: publishing.value("served_cosine_ratio", of="mean") < 0.99)
    assert publishing.value("served_cosine_ratio", of="mean") == pytest.approx(wanted.mean(), abs=1e-5)
    assert publishing.value("served_cosine_ratio", of="p95") == pytest.approx(np.quantile(wanted, 0.05), abs=1e-5)
    assert publishing.value("served_recall_lost_ratio") > 0.3
    assert publishing.live == 1 and publishing.value("early_publishes_total") == 0


def test_too_much_recall_lost_brings_the_next_version_early(new: Callable[..., Publishing]) -> None:
    settings = replace(SETTINGS, full_publish_recall_lost=0.3, first_publish_interval_seconds=60.0)
    publishing = new(settings=settings)
    publishing.click(*[f"i{n}" for n in range(60)])
    publishing.settle()
    unlearn(publishing, seed=8)
    publishing.clock.now += 10.0
    publishing.until(lambda: publishing.live == 2)
    assert publishing.value("early_publishes_total") == 1
    publishing.clock.now += 10.0
    publishing.until(lambda: publishing.value("served_recall_lost_ratio") < 0.01)
    publishing.until(lambda: publishing.publisher.idle)
    assert publishing.live == 2 and publishing.value("early_publishes_total") == 1
    assert publishing.value("served_cosine_ratio", of="mean") == pytest.approx(1.0, abs=1e-5)


def test_versions_come_in_growing_intervals_and_never_crowd_the_index(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click("a")
    publishing.until(lambda: publishing.live == 1)
    for version, seconds in ((1, 15.0), (2, 30.0), (3, 60.0), (4, 60.0)):
        publishing.clock.now += seconds - 0.001
        for _ in range(3):
            publishing.publisher.advance()
        publishing.until(lambda: publishing.publisher.idle)
        assert publishing.live == version
        publishing.clock.now += 0.001
        publishing.until(lambda v=version: publishing.live == v + 1)


def test_a_version_with_a_graph_has_items_that_are_all_equally_long(new: Callable[..., Publishing]) -> None:
    """After the publish, a delta and a measurement of staleness; and scores are those of a version without."""
    publishing = new(settings=replace(SETTINGS, hnsw_from_items=10, staleness_items=64))
    publishing.click(*[f"i{n}" for n in range(9)])
    publishing.settle()
    assert publishing.publisher._served is not None
    assert publishing.publisher._served.manifest.length_dims == 0
    publishing.click("i9", "i1")
    publishing.renew()
    publishing.click("i2", "i2", "i3")
    publishing.settle()
    collection = publishing.client.get_collection(publishing.collection()).config
    assert collection.hnsw_config.m == 16
    manifest, version = publishing.publisher._served.manifest, publishing.publisher.live
    assert (manifest.length_dims, manifest.dense_dims) == (1, manifest.embedding_dim + manifest.popularity_dims + 1)
    assert version is not None
    vectors = np.array([point.vector[DENSE] for point in publishing.points().values()], np.float32)  # type: ignore[call-overload,index]
    assert vectors.shape == (10, manifest.dense_dims)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), version.length, rtol=1e-4)
    assert vectors[:, -1].max() > 0.1
    assert publishing.value("canary_recall_ratio") == 1.0
    publishing.clock.now += SETTINGS.staleness_interval_seconds
    publishing.until(lambda: publishing.value("served_cosine_ratio", of="mean"))
    assert publishing.value("served_cosine_ratio", of="mean") == pytest.approx(1.0, abs=1e-5)


def test_versions_that_take_long_come_at_once_and_then_twice_as_late(new: Callable[..., Publishing]) -> None:
    begun: list[float] = []

    class Slow(Index):
        def create(self, version: int, size: int, *, hnsw: bool, covisit: bool = False) -> None:
            super().create(version, size, hnsw=hnsw, covisit=covisit)
            begun.append(publishing.clock.now)
            publishing.clock.now += 40.0

    def is_live(version: int) -> bool:
        if publishing.publisher.idle:
            publishing.clock.now += 1.0
        return publishing.live == version

    publishing = new(index_class=Slow)
    publishing.click("a")
    publishing.until(lambda: is_live(5))
    assert np.allclose(np.diff(begun), [40.0, 80.0, 80.0, 80.0], atol=1.001)


def test_a_bug_in_a_publishing_thread_reaches_the_loop(new: Callable[..., Publishing]) -> None:
    class Broken(Index):
        def create(self, version: int, size: int, *, hnsw: bool, covisit: bool = False) -> None:
            raise ZeroDivisionError

    publishing = new(index_class=Broken)
    publishing.click("a")
    with pytest.raises(ZeroDivisionError):
        publishing.until(lambda: False)


def test_closing_stops_what_is_under_way(new: Callable[..., Publishing]) -> None:
    publishing = new()
    publishing.click(*[f"i{n}" for n in range(200)])
    publishing.publisher.advance()
    publishing.publisher.close()
    assert publishing.live is None
