"""The store of item features holds what it was given, whatever came and went in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import hash_id
from trainer.columns import Ragged
from trainer.towers import Bags, Feature, ItemFeatures, ItemInputs, TowerConfig, encode_item_features

CONFIG = TowerConfig(
    item_rows=64,
    feature_rows=128,
    item=(
        Feature("brand", "categorical"),
        Feature("sequel_of", "item"),
        Feature("price", "number"),
        Feature("tags", "multi"),
    ),
)
Plain = dict[str, object]


def reference(items: list[tuple[int, Plain]]) -> ItemInputs:
    """The inputs of these items (hash, features), one after the other."""
    rows, lengths, weights = ([], []), ([], []), ([], [])  # type: ignore[var-annotated]
    numbers = []
    for item_hash, features in items:
        encoded = encode_item_features(CONFIG, features)  # type: ignore[arg-type]
        sides = [[item_hash & (CONFIG.item_rows - 1)], *encoded.references], encoded.tokens
        for side, slots in enumerate(sides):
            for slot in slots:
                rows[side].extend(slot)
                lengths[side].append(len(slot))
                weights[side].extend(1 / len(slot) for _ in slot)
        numbers.append(encoded.numbers)
    bags = [
        Bags(
            torch.tensor(rows[side], dtype=torch.int64),
            torch.tensor(np.cumsum([0, *lengths[side]])),
            torch.tensor(weights[side], dtype=torch.float32),
            num_bags=2,
        )
        for side in (0, 1)
    ]
    return ItemInputs(bags[0], bags[1], torch.tensor(numbers, dtype=torch.float32).reshape(len(items), 1))


def assert_same(came: ItemInputs, expected: ItemInputs) -> None:
    torch.testing.assert_close(came.numbers, expected.numbers, rtol=0, atol=0, equal_nan=True)
    for name in ("items", "features"):
        own, other = getattr(came, name), getattr(expected, name)
        assert own.num_bags == other.num_bags
        for field in ("rows", "offsets", "weights"):
            torch.testing.assert_close(getattr(own, field), getattr(other, field), rtol=0, atol=0)


plain = st.fixed_dictionaries(
    {},
    optional={
        "brand": st.text(max_size=3),
        "sequel_of": st.text(max_size=3),
        "price": st.none() | st.integers(0, 9),
        "tags": st.lists(st.text(max_size=2), max_size=4),
    },
)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 4)),
        st.tuples(st.just("replace"), st.integers(0, 10**6), plain),
        st.tuples(st.just("keep"), st.randoms(use_true_random=False)),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(changes=changes, randomness=st.randoms(use_true_random=False))
def test_gathered_items_have_the_features_given_last(changes: list[tuple], randomness: object) -> None:  # type: ignore[type-arg]
    store, model = ItemFeatures(CONFIG), []  # type: ignore[var-annotated]
    for change in changes:
        if change[0] == "append":
            store.append(change[1])
            model += [(hash_id(f"{len(model)} {place}"), {}) for place in range(change[1])]
        elif change[0] == "replace" and model:
            index = change[1] % len(model)
            store.replace(index, encode_item_features(CONFIG, change[2]))
            model[index] = (model[index][0], change[2])
        elif change[0] == "keep":
            kept = [index for index in range(len(model)) if change[1].random() < 0.7]
            change[1].shuffle(kept)
            store.keep(np.array(kept, dtype=np.int64))
            model = [model[index] for index in kept]
    assert len(store) == len(model)
    order = list(range(-1, len(model))) * 2
    randomness.shuffle(order)  # type: ignore[attr-defined]
    expected = [model[index] if index >= 0 else (77, {}) for index in order]
    hashes = np.array([item_hash for item_hash, _ in expected], dtype=np.uint64)
    came = store.gather(hashes, np.array(order, dtype=np.int64))
    assert_same(came, reference(expected))
    again = ItemFeatures(CONFIG)
    again.load_state_dict(store.state_dict())
    assert_same(again.gather(hashes, np.array(order, dtype=np.int64)), came)
    again.append(1)
    assert_same(again.gather(hashes, np.array(order, dtype=np.int64)), came)


def test_taken_items_are_the_items_gathered_in_that_order() -> None:
    store = ItemFeatures(CONFIG)
    store.append(3)
    store.replace(1, encode_item_features(CONFIG, {"brand": "x", "tags": ["a", "b", "c"], "price": 2}))
    store.replace(2, encode_item_features(CONFIG, {"sequel_of": "y", "tags": ["d"]}))
    hashes = np.array([11, 22, 33], dtype=np.uint64)
    order = np.array([2, 0, 2, 1])
    assert_same(store.gather(hashes, np.arange(3)).take(order), store.gather(hashes[order], order))


def test_features_replaced_again_and_again_do_not_pile_up() -> None:
    store = ItemFeatures(CONFIG)
    store.append(10)
    for turn in range(5_000):
        store.replace(turn % 10, encode_item_features(CONFIG, {"tags": ["a", "b", "c"]}))
    values = store.state_dict()["values"]
    assert isinstance(values, Ragged) and len(values.take(np.arange(10)).values) == 30
    assert len(store._arena) < 200


def test_an_item_that_is_not_there_cannot_be_given_features() -> None:
    with pytest.raises(IndexError, match="item 0 of 0"):
        ItemFeatures(CONFIG).replace(0, encode_item_features(CONFIG, {}))


def test_the_state_of_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="another configuration"):
        ItemFeatures(CONFIG).load_state_dict(ItemFeatures(TowerConfig()).state_dict())
