"""Whose turn it is: new items first, then traffic × staleness; what is left over keeps its place; the measured rate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import hash_ids
from tests.trainer.small_trainer import CONFIG
from trainer.catalogue import Catalogue
from trainer.item_events import ItemChange
from trainer.towers import ItemFeatures
from trainer.waiting import PublishRate, Turn, give_back, take_turn


def catalogue_of(*clicks: str, max_items: int = 1_000) -> Catalogue:
    """Each click at a step of its own, from 1; nothing published."""
    catalogue = Catalogue(ItemFeatures(CONFIG), embedding_dim=CONFIG.embedding_dim, max_items=max_items)
    for step, item in enumerate(clicks, 1):
        click(catalogue, step, item)
    return catalogue


def click(catalogue: Catalogue, step: int, *items: str) -> None:
    catalogue.count(catalogue.admit(hash_ids(items), items, step))


def ids(catalogue: Catalogue, turn: Turn) -> list[str]:
    return [catalogue.item_id(row) for row in turn.rows.tolist()]


def left(turn: Turn) -> list[int]:
    return turn.left.tolist()


def test_items_that_were_published_as_they_are_wait_no_more() -> None:
    catalogue = catalogue_of("a", "b")
    assert sorted(ids(catalogue, take_turn(catalogue, 2, 10))) == ["a", "b"]
    assert ids(catalogue, take_turn(catalogue, 2, 10)) == []
    click(catalogue, 3, "b")
    assert ids(catalogue, take_turn(catalogue, 3, 10)) == ["b"]


def test_new_items_go_first_however_little_they_are_clicked() -> None:
    catalogue = catalogue_of(*["hit"] * 50)
    take_turn(catalogue, 50, 10)
    click(catalogue, 51, *["hit"] * 50)
    catalogue.take([ItemChange("unclicked"), ItemChange("another")], 52)
    turn = take_turn(catalogue, 52, 2)
    assert sorted(ids(catalogue, turn)) == ["another", "unclicked"]
    assert left(turn) == hash_ids(["hit"]).tolist()


def test_an_item_that_comes_back_is_new() -> None:
    catalogue = catalogue_of("a", "b")
    take_turn(catalogue, 2, 10)
    catalogue.take([ItemChange("a", gone=True)], 3)
    catalogue.take([ItemChange("a")], 4)
    click(catalogue, 5, "b", "b")
    assert ids(catalogue, take_turn(catalogue, 5, 10)) == ["a", "b"]


def test_of_the_known_ones_traffic_times_staleness_decides() -> None:
    catalogue = catalogue_of("often", "seldom")
    take_turn(catalogue, 2, 10)
    click(catalogue, 3, *["often"] * 6, *["seldom"] * 2)
    # Equally stale: 7 clicks against 3.
    assert ids(catalogue, take_turn(catalogue, 3, 1)) == ["often"]
    # seldom is served as of step 2, often as of step 3: 3 · (s − 2 + 1) against about 7 · (s − 3 + 1).
    click(catalogue, 4, "often", "seldom")  # 4 · 3 against 8 · 2
    assert ids(catalogue, take_turn(catalogue, 4, 1)) == ["often"]
    click(catalogue, 5, "often")  # 4 · 4 against 9 · 2
    assert ids(catalogue, take_turn(catalogue, 5, 1)) == ["often"]
    click(catalogue, 6, "often")  # 4 · 5 against 10 · 2: the first click counts a little less
    assert ids(catalogue, take_turn(catalogue, 6, 1)) == ["seldom"]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefghij"), max_size=12), min_size=1, max_size=15), st.integers(1, 4))
def test_every_items_turn_comes_and_nothing_is_taken_twice(clicks: list[list[str]], limit: int) -> None:
    catalogue = catalogue_of()
    sent: dict[str, int] = {}
    last = {}
    for step, items in enumerate(clicks, 1):
        if items:
            click(catalogue, step, *items)
            last.update(dict.fromkeys(items, step))
        turn = take_turn(catalogue, step, limit)
        assert len(turn.rows) <= limit
        waiting = {item for item, when in last.items() if sent.get(item, 0) < when}
        assert {*ids(catalogue, turn)} | {i for i in waiting if hash_ids([i])[0] in turn.left} == waiting
        new = {item for item in waiting if item not in sent}
        assert len(new.intersection(ids(catalogue, turn))) == min(len(new), limit)
        sent.update(dict.fromkeys(ids(catalogue, turn), step))
    for step in range(len(clicks) + 1, len(clicks) + 11):
        sent.update(dict.fromkeys(ids(catalogue, take_turn(catalogue, step, limit)), step))
    assert all(sent[item] >= when for item, when in last.items())


def test_what_was_not_acknowledged_waits_again_where_it_was() -> None:
    catalogue = catalogue_of("a", "b")
    take_turn(catalogue, 2, 10)
    click(catalogue, 3, "a", "new")
    turn = take_turn(catalogue, 3, 10)
    before = dict(zip(ids(catalogue, turn), turn.published_before.tolist(), strict=True))
    assert before == {"new": -1, "a": 2}
    give_back(catalogue, turn)
    again = take_turn(catalogue, 3, 10)
    assert ids(catalogue, again) == ["new", "a"]
    np.testing.assert_array_equal(again.published_before, turn.published_before)


def test_an_item_that_was_dropped_meanwhile_is_new_when_it_is_given_back() -> None:
    catalogue = catalogue_of(*[f"i{n}" for n in range(16)], max_items=16)
    take_turn(catalogue, 16, 100)
    click(catalogue, 17, "i0")
    turn = take_turn(catalogue, 17, 100)
    for step, item in enumerate([f"j{n}" for n in range(16)], 18):
        click(catalogue, step, item)
    assert catalogue.find(hash_ids(["i0"]))[0] == -1
    click(catalogue, 40, "i0")
    give_back(catalogue, turn)
    assert catalogue.published[catalogue.find(hash_ids(["i0"]))[0]] == -1


def test_the_limit_is_what_fits_an_interval_at_the_measured_rate() -> None:
    rate = PublishRate(2.0, 500)
    assert rate.limit == 500
    rate.observe(4_000, 1.0)
    assert rate.points_per_second == 4_000 and rate.limit == 8_000
    rate.observe(8_000, 4.0)
    assert rate.points_per_second == pytest.approx(4_000 - 0.3 * 2_000) and rate.limit == 6_800
    rate.observe(10, 1.0)
    assert rate.limit == 6_800
    rate.observe(100, 0.01)
    assert rate.limit == 20_000
    for _ in range(50):
        rate.observe(1_000, 10.0)
    assert rate.limit == 500
