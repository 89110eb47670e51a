"""The catalogue against a slow reference that keeps every click."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import hash_id, hash_ids
from tests.fuzz.checkpoints import plain
from trainer.catalogue import Catalogue
from trainer.item_events import ItemChange
from trainer.towers import Feature, ItemFeatures, TowerConfig

CONFIG = TowerConfig(embedding_dim=4, row_dim=4, item=(Feature("brand", "categorical"), Feature("price", "number")))


def new_catalogue(**values: float) -> Catalogue:
    return Catalogue(ItemFeatures(CONFIG), embedding_dim=4, **values)  # type: ignore[arg-type]


def click(catalogue: Catalogue, item_ids: list[str], step: int) -> np.ndarray:
    rows = catalogue.admit(hash_ids(item_ids), item_ids, step)
    catalogue.count(rows)
    return rows


def change(item_id: str, brand: str = "x", payload: bytes = b"{}") -> ItemChange:
    return ItemChange(item_id, {"brand": brand, "price": 2.0}, payload)


def gone(item_id: str) -> ItemChange:
    return ItemChange(item_id, gone=True)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=8), st.floats(0.5, 50))
def test_log_q_is_the_share_of_clicks_decayed_by_half_each_half_life(
    batches: list[list[int]], half_life: float
) -> None:
    catalogue = new_catalogue(half_life_clicks=half_life, uniform_ratio=1e-12)
    for step, batch in enumerate(batches):
        click(catalogue, [str(item) for item in batch], step)
    clicks = [item for batch in batches for item in batch]
    weight = dict.fromkeys(clicks, 0.0)
    for age, item in enumerate(reversed(clicks)):
        weight[item] += 0.5 ** (age / half_life)
    total = sum(0.5 ** (age / half_life) for age in range(len(clicks)))
    rows = catalogue.find(hash_ids([str(item) for item in weight]))
    floor = math.log(1e-12 / len(weight))
    wanted = [max(math.log(share / total) if share else -math.inf, floor) for share in weight.values()]
    np.testing.assert_allclose(catalogue.log_q(rows), wanted, rtol=1e-9, atol=1e-9)
    assert catalogue.num_clicks[rows].tolist() == [clicks.count(item) for item in weight]


def test_untouched_items_fall_together_and_keep_their_log_count() -> None:
    catalogue = new_catalogue(half_life_clicks=10, uniform_ratio=1e-9)
    click(catalogue, ["a", "b", "b"], 1)
    before = catalogue.log_counts(catalogue.find(hash_ids(["a", "b"])))
    click(catalogue, ["c"] * 40, 2)
    np.testing.assert_array_equal(catalogue.log_counts(catalogue.find(hash_ids(["a", "b"]))), before)


def test_log_counts_stay_exact_after_a_billion_clicks() -> None:
    catalogue = new_catalogue(half_life_clicks=5_000)
    catalogue.clicks_counted = 10**9
    click(catalogue, ["a", "b", "a", "a"], 1)
    rows = catalogue.find(hash_ids(["a", "b"]))
    difference = catalogue.log_counts(rows[:1]) - catalogue.log_counts(rows[1:])
    rate = math.log(2) / 5_000
    wanted = math.log(math.exp(-3 * rate) + math.exp(-rate) + 1) + 2 * rate
    assert difference[0] == pytest.approx(wanted, abs=1e-9)


def test_an_item_without_clicks_has_the_uniform_share() -> None:
    catalogue = new_catalogue(uniform_ratio=0.02)
    catalogue.take([change("a"), change("b"), change("c"), change("d")], 1)
    np.testing.assert_allclose(catalogue.log_q(), math.log(0.02 / 4))
    click(catalogue, ["a"] * 100, 2)
    np.testing.assert_allclose(catalogue.log_q(catalogue.find(hash_ids(["b", "a"]))), [math.log(0.005), 0.0])


def test_items_are_found_by_hash_and_unknown_ones_are_minus_one() -> None:
    catalogue = new_catalogue()
    rows = click(catalogue, ["a", "b", "a"], 7)
    assert rows.tolist() == [0, 1, 0]
    assert catalogue.find(hash_ids(["b", "nobody", "a"])).tolist() == [1, -1, 0]
    assert [catalogue.item_id(row) for row in range(len(catalogue))] == ["a", "b"]
    assert catalogue.touched.tolist() == catalogue.added.tolist() == [7, 7]


def test_features_reach_the_item_tower_and_the_last_of_several_changes_counts() -> None:
    catalogue = new_catalogue()
    catalogue.take([change("a", "old", b'{"n": 1}'), change("b", "y"), change("a", "new", b'{"n": 2}')], 1)
    other = new_catalogue()
    other.take([change("a", "new")], 1)
    mine, theirs = catalogue.inputs(hash_ids(["a"])), other.inputs(hash_ids(["a"]))
    assert mine.features.rows.tolist() == theirs.features.rows.tolist()
    assert catalogue.inputs(hash_ids(["b"])).features.rows.tolist() != theirs.features.rows.tolist()
    assert catalogue.payload(0) == b'{"n": 2}'
    assert catalogue.inputs(hash_ids(["nobody"])).features.rows.tolist() == []


def test_a_gone_item_is_not_brought_back_by_a_click_but_by_an_item_event() -> None:
    catalogue = new_catalogue()
    click(catalogue, ["a", "b"], 1)
    catalogue.take([gone("a"), gone("never known")], 2)
    assert (catalogue.num_items, len(catalogue)) == (1, 3)
    assert catalogue.gone == {hash_id("a"): 2, hash_id("never known"): 2}
    click(catalogue, ["a", "never known"], 3)
    assert catalogue.deleted.tolist() == [True, False, True]
    assert catalogue.popularity()[0] == -np.inf and np.isfinite(catalogue.popularity()[1])
    assert catalogue.gone == {hash_id("a"): 2, hash_id("never known"): 2}
    catalogue.take([change("a"), change("never known")], 4)
    assert catalogue.num_items == 3 and not catalogue.deleted.any() and catalogue.gone == {}
    assert catalogue.added.tolist() == [4, 1, 4]


@pytest.mark.parametrize("admit_clicks", [1, 2])
def test_clicks_that_are_read_after_their_items_tombstone_do_not_bring_it_in(admit_clicks: int) -> None:
    catalogue = new_catalogue(admit_clicks=admit_clicks)
    catalogue.take([gone("a"), gone("b"), change("b"), gone("b")], 1)  # as a new trainer reads a compacted topic
    for step in (2, 3, 4):
        clicks(catalogue, ["a", "b", "c"], step)
    assert (catalogue.num_items, catalogue.num_deleted) == (1, 2)
    assert not catalogue.deleted[catalogue.find(hash_ids(["c"]))].any()


def test_tombstones_of_items_that_were_never_known_take_the_room_that_is_left_and_drop_nothing() -> None:
    catalogue = new_catalogue(max_items=32)
    click(catalogue, [f"i{n}" for n in range(30)], 1)
    rows = catalogue.take([gone(f"unknown {n}") for n in range(9)] + [gone("i3"), change("i4")], 2)
    assert [catalogue.item_id(row) for row in rows] == ["i4"]
    assert (len(catalogue), catalogue.num_items, catalogue.num_deleted, catalogue.num_dropped) == (32, 29, 3, 0)
    catalogue.take([gone("unknown 8")], 3)
    assert len(catalogue) == 32
    click(catalogue, ["new"], 4)
    assert catalogue.num_items == 30 and catalogue.num_dropped == 2


def test_after_a_restart_all_that_is_deleted_has_gone_in_the_order_of_its_steps() -> None:
    catalogue, again = new_catalogue(), new_catalogue()
    click(catalogue, ["a", "b", "c"], 1)
    catalogue.take([gone("b")], 2)
    catalogue.take([gone("a")], 3)
    catalogue.gone.forget(3)
    assert catalogue.gone == {}
    again.load_state_dict(catalogue.state_dict())
    assert list(again.gone.items()) == [(hash_id("b"), 2), (hash_id("a"), 3)]


def test_of_what_went_no_more_is_remembered_than_there_may_be_items() -> None:
    catalogue = new_catalogue(max_items=16)
    for step in range(100):
        catalogue.take([change(f"i{step}")], step)
        catalogue.take([gone(f"i{step}")], step)
    assert catalogue.gone == {hash_id(f"i{step}"): step for step in range(84, 100)}


def test_a_full_catalogue_drops_gone_items_first_and_then_those_untouched_for_longest() -> None:
    catalogue = new_catalogue(max_items=32)
    for step in range(32):
        rows = click(catalogue, [f"i{step}"], step)
        catalogue.embeddings.set(rows, np.full((1, 4), step, np.float32))
    catalogue.take([change("i9", "brand of nine", b'{"nine": 9}')], 33)
    click(catalogue, ["i0"], 34)
    catalogue.take([gone("i5")], 35)
    click(catalogue, ["new"], 36)
    assert len(catalogue) == 31
    known = {catalogue.item_id(row) for row in range(len(catalogue))}
    assert known == {f"i{n}" for n in range(32)} - {"i5", "i1"} | {"new"}
    assert catalogue.gone == {hash_id("i5"): 35, hash_id("i1"): 36}
    assert (catalogue.num_dropped, catalogue.num_deleted) == (2, 0)
    row = int(catalogue.find(hash_ids(["i9"]))[0])
    assert catalogue.item_id(row) == "i9" and catalogue.payload(row) == b'{"nine": 9}'
    np.testing.assert_array_equal(catalogue.embedding[row], np.full(4, 9))
    other = new_catalogue()
    other.take([change("i9", "brand of nine")], 1)
    wanted = other.inputs(hash_ids(["i9"])).features.rows.tolist()
    assert catalogue.inputs(hash_ids(["i9"])).features.rows.tolist() == wanted
    click(catalogue, ["i1"], 37)
    assert hash_id("i1") not in catalogue.gone
    assert catalogue.num_clicks[catalogue.find(hash_ids(["i1"]))].tolist() == [1]


def clicks(catalogue: Catalogue, item_ids: list[str], step: int) -> list[int]:
    """As the model does for the clicks of a part."""
    before = catalogue.clicks_counted
    rows = catalogue.admit_clicked(hash_ids(item_ids), pa.array(item_ids, pa.string()), step)
    catalogue.count(rows[rows >= 0])
    found = [catalogue.item_id(row) if row >= 0 else "" for row in rows.tolist()]
    catalogue.expire(before, step)
    return found


def test_an_unknown_item_is_admitted_with_its_third_click_and_by_an_item_event_at_once() -> None:
    catalogue = new_catalogue(admit_clicks=3)
    assert clicks(catalogue, ["a", "b", "a"], 1) == ["", "", ""]
    assert len(catalogue) == 0 and catalogue.clicks_counted == 0 and len(catalogue.admission) == 2
    catalogue.take([change("b")], 2)
    assert clicks(catalogue, ["b", "a", "c"], 3) == ["b", "a", ""]
    assert len(catalogue.admission) == 1
    assert catalogue.num_clicks.tolist() == [1, 1] and catalogue.clicks_counted == 2
    catalogue.take([gone("a")], 4)
    assert clicks(catalogue, ["a"], 5) == ["a"] and catalogue.deleted.tolist() == [False, True]


def test_items_without_a_click_or_change_for_so_many_clicks_expire_and_are_gone() -> None:
    catalogue = new_catalogue(expire_clicks=32)
    stays: list[np.ndarray] = []
    catalogue.on_keep = stays.append
    clicks(catalogue, ["old"], 1)
    catalogue.take([change("new features"), change("tombstone")], 2)
    catalogue.take([gone("tombstone")], 2)
    for step in range(3, 34):  # the last of these is the 32nd click
        assert len(catalogue) == (3 if step == 3 else 4)
        clicks(catalogue, ["hot"], step)
    assert [catalogue.item_id(row) for row in range(len(catalogue))] == ["new features", "tombstone", "hot"]
    assert catalogue.gone == {hash_id("old"): 33, hash_id("tombstone"): 2} and catalogue.num_expired == 1
    clicks(catalogue, ["hot", "hot"], 34)
    assert [catalogue.item_id(row) for row in range(len(catalogue))] == ["hot"]
    assert catalogue.gone == {hash_id("old"): 33, hash_id("tombstone"): 2, hash_id("new features"): 34}
    assert [kept.tolist() for kept in stays] == [[1, 2, 3], [2]]
    assert clicks(catalogue, ["old"], 35) == ["old"] and hash_id("old") not in catalogue.gone
    assert (catalogue.num_expired, catalogue.num_deleted, catalogue.num_items) == (3, 0, 2)


def test_the_items_of_the_micro_batch_at_hand_are_never_dropped() -> None:
    catalogue = new_catalogue(max_items=16)
    for step in range(16):
        click(catalogue, [f"i{step}"], step)
    rows = click(catalogue, ["i0", "new1", "new2", "i0"], 16)
    assert [catalogue.item_id(row) for row in rows] == ["i0", "new1", "new2", "i0"]
    assert catalogue.num_clicks[rows[0]] == 3
    assert len(catalogue) <= 16


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), max_size=30), st.integers(7, 20))
def test_whatever_happens_rows_ids_and_hashes_agree(batches: list[list[int]], max_items: int) -> None:
    catalogue = new_catalogue(max_items=max_items)
    for step, batch in enumerate(batches):
        ids = [f"i{item}" for item in batch]
        if step % 3 == 2:
            catalogue.take([gone(item) if int(item[1:]) % 2 else change(item) for item in ids], step)
        else:
            rows = click(catalogue, ids, step)
            assert [catalogue.item_id(row) for row in rows] == ids
        assert len(catalogue) <= max_items
        known = [catalogue.item_id(row) for row in range(len(catalogue))]
        assert catalogue.item_hash.tolist() == [hash_id(item) for item in known]
        assert catalogue.find(catalogue.item_hash).tolist() == list(range(len(catalogue)))
        assert len(catalogue.features) == len(catalogue)
        assert catalogue.num_deleted == int(catalogue.deleted.sum())
        assert not {hash_id(i) for i, d in zip(known, catalogue.deleted, strict=True) if not d} & catalogue.gone.keys()


def test_a_saved_catalogue_goes_on_as_if_never_interrupted() -> None:
    one = new_catalogue(max_items=20)
    for step in range(12):
        click(one, [f"i{step % 7}", f"j{step}"], step)
    one.take([change("i1", "b", b'{"k": [1]}'), gone("i2")], 12)
    two = new_catalogue(max_items=20)
    two.load_state_dict(one.state_dict())
    for catalogue in (one, two):
        click(catalogue, ["i1", "brand new", "j3"], 13)
        for step in range(14, 20):
            click(catalogue, [f"k{step}", "i1"], step)
    states = [{name: plain(column) for name, column in catalogue.state_dict().items()} for catalogue in (one, two)]
    assert states[0] == states[1]


def test_embeddings_are_made_in_parts_and_kept_by_row() -> None:
    catalogue = new_catalogue()
    click(catalogue, [f"i{n}" for n in range(5)], 1)
    asked: list[int] = []

    def embed(inputs: object) -> np.ndarray:
        asked.append(len(inputs))  # type: ignore[arg-type]
        return np.arange(4 * len(inputs), dtype=np.float32).reshape(-1, 4)  # type: ignore[arg-type]

    catalogue.embed(np.array([3, 1]), embed)
    np.testing.assert_array_equal(catalogue.embedding[[3, 1]], np.arange(8).reshape(2, 4))
    catalogue.embed(np.array([], dtype=np.int64), embed)
    assert asked == [2]
