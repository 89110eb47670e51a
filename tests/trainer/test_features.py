"""Ids and values become rows and numbers: stable, total, and ragged where they have to be."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import HASH_SEED, hash_id, hash_ids
from trainer.features import FEATURE_HASH_SEED, ID_HASH_SEED, MAX_WORDS
from trainer.towers import Bags, Feature, TowerConfig, encode_item_features, query_inputs

CONFIG = TowerConfig(
    item_rows=64,
    user_rows=16,
    feature_rows=128,
    history_length=3,
    history_decay=0.5,
    use_user_id=True,
    context=(
        Feature("device", "categorical"),
        Feature("hour", "number"),
        Feature("seed", "item"),
        Feature("query", "text"),
    ),
    item=(
        Feature("brand", "categorical"),
        Feature("tags", "multi"),
        Feature("title", "text"),
        Feature("price", "number"),
        Feature("sequel_of", "item"),
    ),
)
NO_HISTORY = np.zeros(0, dtype=np.uint64)


def bag(bags: Bags, row: int, slot: int) -> list[tuple[int, float]]:
    number = row * bags.num_bags + slot
    span = slice(int(bags.offsets[number]), int(bags.offsets[number + 1]))
    weights = [round(weight, 6) for weight in bags.weights[span].tolist()]
    return list(zip(bags.rows[span].tolist(), weights, strict=True))


def feature_row(name: str, value: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{name}\x1f{value}".encode(), FEATURE_HASH_SEED) & (CONFIG.feature_rows - 1)


def item_row(item_id: str) -> int:
    return hash_id(item_id) & (CONFIG.item_rows - 1)


def test_references_to_items_are_hashed_as_the_contract_hashes_ids() -> None:
    assert ID_HASH_SEED == HASH_SEED


def test_a_history_is_its_newest_items_each_weighing_half_of_the_next_newer_one() -> None:
    history = hash_ids(["a", "b", "c", "d", "e"])
    inputs = query_inputs(CONFIG, hash_ids(["u", "v", "w"]), history, np.array([0, 4, 4, 5]))
    assert bag(inputs.items, 0, 0) == [
        (item_row("b"), round(1 / 7, 6)),
        (item_row("c"), round(2 / 7, 6)),
        (item_row("d"), round(4 / 7, 6)),
    ]
    assert bag(inputs.items, 1, 0) == []
    assert bag(inputs.items, 2, 0) == [(item_row("e"), 1.0)]
    assert [bag(inputs.users, row, 0) for row in range(3)] == [[(hash_id(user) & 15, 1.0)] for user in "uvw"]


def test_a_decay_of_one_is_the_mean() -> None:
    config = dataclasses.replace(CONFIG, history_decay=1.0)
    inputs = query_inputs(config, hash_ids(["u"]), hash_ids(["a", "b"]), np.array([0, 2]))
    assert bag(inputs.items, 0, 0) == [(item_row("a"), 0.5), (item_row("b"), 0.5)]


def test_a_query_of_nobody_has_no_user_row() -> None:
    inputs = query_inputs(CONFIG, None, NO_HISTORY, np.array([0, 0, 0]))
    assert len(inputs) == 2
    assert bag(inputs.users, 0, 0) == bag(inputs.users, 1, 0) == []


def test_context_values_become_rows_and_numbers_and_missing_ones_empty_bags() -> None:
    context = {
        "device": ["phone", None, ""],
        "hour": [7.0, math.nan, None],
        "seed": ["x", None, 3.0],
        "query": ["Red SHOES, red!", None, ""],
        "unheard": ["of", "it", "!"],
    }
    inputs = query_inputs(CONFIG, hash_ids(["u", "v", "w"]), NO_HISTORY, np.zeros(4, np.int64), context)
    assert bag(inputs.features, 0, 0) == [(feature_row("device", "phone"), 1.0)]
    third = round(1 / 3, 6)
    assert bag(inputs.features, 0, 1) == [(feature_row("query", word), third) for word in ("red", "shoes", "red")]
    assert [bag(inputs.features, row, slot) for row in (1, 2) for slot in (0, 1)] == [[]] * 4
    assert [bag(inputs.items, row, 1) for row in range(3)] == [[(item_row("x"), 1.0)], [], [(item_row("3"), 1.0)]]
    assert inputs.numbers.shape == (3, 1)
    assert inputs.numbers[0, 0] == 7.0
    assert torch.isnan(inputs.numbers[1:]).all()


def test_a_context_column_that_is_not_there_counts_as_missing() -> None:
    arguments = (CONFIG, hash_ids(["u"]), NO_HISTORY, np.array([0, 0]))
    absent, empty = query_inputs(*arguments), query_inputs(*arguments, {"device": [None], "hour": [None]})
    assert bag(absent.features, 0, 0) == bag(empty.features, 0, 0) == []
    assert torch.isnan(absent.numbers).all()


def test_item_features_of_every_kind_are_encoded() -> None:
    features = {"brand": "Acme", "tags": ["a", "b"], "title": "Two Words", "price": 3, "sequel_of": "first"}
    item = encode_item_features(CONFIG, features)
    assert item.tokens == [
        [feature_row("brand", "Acme")],
        [feature_row("tags", "a"), feature_row("tags", "b")],
        [feature_row("title", "two"), feature_row("title", "words")],
    ]
    assert item.references == [[item_row("first")]]
    assert item.numbers == [3.0]


@pytest.mark.parametrize("same", [(3, 3.0, "3"), (True, "true"), (False, "false"), (0.5, "0.5"), (None, "", math.nan)])
def test_a_value_has_the_same_row_however_it_is_written(same: tuple[object, ...]) -> None:
    assert len({str(encode_item_features(CONFIG, {"brand": value}).tokens) for value in same}) == 1  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3.0), ("4.5", 4.5), (True, 1.0), ("many", None), (None, None), (math.inf, None), (10**400, None), ([1], None)],
)
def test_what_is_no_finite_number_is_missing(value: object, number: float | None) -> None:
    (came,) = encode_item_features(CONFIG, {"price": value}).numbers  # type: ignore[dict-item]
    assert math.isnan(came) if number is None else came == number


def test_the_length_of_a_text_is_bounded() -> None:
    tokens = encode_item_features(CONFIG, {"title": "word " * 1000}).tokens
    assert [len(rows) for rows in tokens] == [0, 0, MAX_WORDS]


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.text(alphabet=st.characters(categories=["Cs"]))
)


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from([f.name for f in CONFIG.item]), st.one_of(values, st.lists(values))))
def test_no_value_of_an_item_event_is_beyond_encoding(values: dict[str, object]) -> None:
    item = encode_item_features(CONFIG, values)  # type: ignore[arg-type]
    assert all(0 <= row < CONFIG.feature_rows for rows in item.tokens for row in rows)
    assert all(0 <= row < CONFIG.item_rows for rows in item.references for row in rows)
    assert all(math.isnan(number) or math.isfinite(np.float32(number)) for number in item.numbers)


@settings(deadline=None)
@given(data=st.data())
def test_taken_queries_are_the_queries_encoded_alone(data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(
                st.text(), st.lists(st.text(max_size=2), max_size=5), st.none() | st.text(), st.none() | st.floats()
            ),
            min_size=1,
            max_size=5,
        )
    )
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))

    def encode(chosen: list[tuple[str, list[str], str | None, float | None]]):  # type: ignore[no-untyped-def]
        history = hash_ids([item for row in chosen for item in row[1]])
        context = {
            "device": [row[2] for row in chosen],
            "seed": [row[2] for row in chosen],
            "hour": [row[3] for row in chosen],
        }
        offsets = np.cumsum([0, *(len(row[1]) for row in chosen)])
        return query_inputs(CONFIG, hash_ids([row[0] for row in chosen]), history, offsets, context)

    taken, alone = encode(rows).take(np.array(order, dtype=np.int64)), encode([rows[place] for place in order])
    torch.testing.assert_close(taken.numbers, alone.numbers, rtol=0, atol=0, equal_nan=True)
    for name in ("items", "features", "users"):
        for field in ("rows", "offsets", "weights"):
            assert torch.equal(getattr(getattr(taken, name), field), getattr(getattr(alone, name), field))


def test_a_configuration_goes_through_plain_data_unchanged() -> None:
    assert TowerConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    assert TowerConfig.from_dict({}) == TowerConfig()


def test_a_configuration_says_all_that_is_wrong_with_it_at_once() -> None:
    wrong = {
        "embedding_dim": 0,
        "item_rows": 1000,
        "user_rows": "many",
        "history_decay": 1.5,
        "temperature": 0,
        "use_user_id": 1,
        "hidden": [64, 0],
        "context": [{"name": "a", "kind": "categorical"}, {"name": "a", "kind": "text"}, {"name": "", "kind": "text"}],
        "item": [{"name": "b", "kind": "picture"}, {"name": "c"}, "d"],
        "colour": "red",
    }
    with pytest.raises(ValueError) as caught:
        TowerConfig.from_dict(wrong)
    expected = [
        "embedding_dim must be an integer of 1 … 4096, not 0",
        "item_rows must be a power of two, 2 … 2^31, not 1000",
        "user_rows must be a power of two, 2 … 2^31, not 'many'",
        "history_decay must be a number in (0, 1], not 1.5",
        "temperature must be a number in (0, 10], not 0",
        "use_user_id must be true or false, not 1",
        "hidden must hold sizes of at least 1, not [64, 0]",
        "context: the feature 'a' is listed 2 times",
        "context: a feature's name must be a text that is not empty, not ''",
        "item: feature 'b' has kind 'picture'; kinds are categorical, multi, text, number, item",
        "item: a feature has a name and a kind, not {'name': 'c'}",
        "item: a feature has a name and a kind, not 'd'",
        "'colour' is no setting of the towers",
    ]
    assert sorted(str(caught.value).splitlines()) == sorted(expected)


@pytest.mark.parametrize("name", ["context", "item", "hidden"])
def test_a_list_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a list, not 'x'"):
        TowerConfig.from_dict({name: "x"})
