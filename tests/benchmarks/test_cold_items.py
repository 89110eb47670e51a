"""What counts as cold, when an item is announced; on made data: texts alone place an item that nobody clicked."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks import cold_items
from benchmarks.cold_items import _announced, _earlier, _foresee_among_new
from streams.contract import MicroBatch, hash_ids
from trainer.item_events import ItemChange
from trainer.model import Model, new_model
from trainer.settings import TrainerSettings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark and the trainer learn: two threads that wait for each other take many times as long on a busy
    machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TASTES = 4
ITEMS_OF_A_TASTE = 30
HISTORY = 4


def item_id(taste: int, number: int) -> str:
    return f"{taste}-{number}"


def made_batch(random: np.random.Generator, first_offset: int, new_item: tuple[int, int] | None = None) -> MicroBatch:
    """64 clicks of users who keep to a taste, on items of that taste but its last; or all on one item."""
    users, items, histories = [], [], []
    for row in range(64):
        taste = int(random.integers(TASTES)) if new_item is None else new_item[0]
        numbers = random.choice(ITEMS_OF_A_TASTE - 1, HISTORY + 1, replace=False)
        users.append(f"user-{taste}-{row}-{first_offset}")
        items.append(item_id(taste, int(numbers[-1])) if new_item is None else item_id(*new_item))
        histories.append([item_id(taste, int(number)) for number in numbers[:-1]])
    n = len(users)
    return MicroBatch(
        partition=0,
        first_offset=first_offset,
        next_offset=first_offset + n,
        offset=np.arange(first_offset, first_offset + n),
        user_id=pa.array(users),
        item_id=pa.array(items),
        user_hash=hash_ids(users),
        item_hash=hash_ids(items),
        history_values=hash_ids([item for history in histories for item in history]),
        history_offsets=np.arange(n + 1, dtype=np.int64) * HISTORY,
        reward=np.ones(n, np.float32),
        event_time=np.full(n, float(first_offset)),
        ingest_time=np.full(n, float(first_offset)),
        sampling_probability=np.full(n, 1 / (TASTES * ITEMS_OF_A_TASTE), np.float32),
    )


def taught(features: str, seed: int = 2) -> Model:
    """A model that has learnt the tastes; the last item of each was announced, and has no click."""
    settings = TrainerSettings(features=features, max_items=1_000, evaluation_rows=64, seed=seed)
    model, random = new_model(settings), np.random.default_rng(1)
    model.take(
        [
            ItemChange(item_id(taste, number), {"text": f"word{taste} word{taste}b {number}"})
            for taste in range(TASTES)
            for number in range(ITEMS_OF_A_TASTE)
        ],
        0,
    )
    for number in range(60):
        model.learn(made_batch(random, 64 * number), number + 1)
    model.catalogue.embed(np.arange(len(model.catalogue)), model.learner.embed_items)
    return model


def ranks_of_new_items(model: Model) -> np.ndarray:
    """[taste of the new item, taste of the user, 64 users] at popularity 0."""
    ranks = np.empty((TASTES, TASTES, 64))
    for user in range(TASTES):
        for item in range(TASTES):
            batch = made_batch(np.random.default_rng(2), 10**6, new_item=(user, 0))  # the same users for each item
            clicked = hash_ids([item_id(item, ITEMS_OF_A_TASTE - 1)] * 64)
            tested = model.test(dataclasses.replace(batch, item_hash=clicked), popularity=0.0)
            assert tested is not None
            ranks[item, user] = tested.rank
    return ranks


def test_a_new_item_is_a_candidate_for_fitting_users_before_its_first_click_because_of_its_text() -> None:
    own = np.arange(TASTES)
    with_texts = ranks_of_new_items(taught(json.dumps({"item": [{"name": "text", "kind": "text"}]})))
    # Of the four new items, that of the user's taste comes first; and among the best 30 of all 120.
    assert np.mean(with_texts.argmin(0) == own[:, None]) > 0.95
    assert np.mean(with_texts[own, own] <= ITEMS_OF_A_TASTE) > 0.95
    # Without them, new items are as random as their rows: one of the four is right by chance.
    ids_alone = [ranks_of_new_items(taught("", seed)) for seed in range(3)]
    assert np.mean([ranks.argmin(0) == own[:, None] for ranks in ids_alone]) < 0.5


def test_new_items_are_ranked_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four new items, that of the user's taste is first; the others are not gone afterwards."""
    monkeypatch.setattr(cold_items, "K", 1)
    model = taught(json.dumps({"item": [{"name": "text", "kind": "text"}]}))
    new = hash_ids([item_id(taste, ITEMS_OF_A_TASTE - 1) for taste in range(TASTES)])
    earlier = Counter(dict.fromkeys(set(model.catalogue.item_hash.tolist()) - set(new.tolist()), 1))
    batch = made_batch(np.random.default_rng(2), 10**6, new_item=(1, ITEMS_OF_A_TASTE - 1))
    ranks: dict[str, list[np.ndarray]] = {}
    before = model.test(batch)
    _foresee_among_new(model, batch, ranks, earlier)
    after = model.test(batch)
    assert np.mean(ranks["among_new"][0]) > 0.95
    assert set(ranks["among_new_random"][0].tolist()) == {1 / TASTES}
    assert before is not None and after is not None
    np.testing.assert_array_equal(after.rank, before.rank)
    assert model.catalogue.num_deleted == 0


def test_earlier_clicks_are_those_before_the_row() -> None:
    batch = made_batch(np.random.default_rng(0), 0, new_item=(1, 3))
    assert _earlier(batch, Counter()) == list(range(64))
    assert _earlier(batch, Counter({int(batch.item_hash[0]): 10})) == list(range(10, 74))


def test_items_are_announced_once_when_their_time_has_come() -> None:
    changes = {key: ItemChange(str(key)) for key in (7, 8, 9)}
    waiting = [(30.0, 9), (20.0, 8), (10.0, 7)]
    assert [change.item_id for change in _announced(waiting, 10.0, changes)] == []
    assert [change.item_id for change in _announced(waiting, 25.0, changes)] == ["7", "8"]
    assert [change.item_id for change in _announced(waiting, 99.0, changes)] == ["9"]
