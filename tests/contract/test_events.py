"""Names, ids and events: what other languages must compute alike is pinned by value."""

from __future__ import annotations

import json

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import ClickEvent, ItemEvent, Topics, encode_event, hash_id, hash_ids


def test_the_hash_of_an_id_never_changes() -> None:
    """Point ids in Qdrant and rows of the towers depend on it."""
    ids = ["", "item 1", "böb", "日本"]
    assert [hash_id(text) for text in ids] == [
        0x52A2D296AA031B06,
        0xABD16C4349FA5D63,
        0xD134EE91AFE0CAA6,
        0xF8035712F86957C2,
    ]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_many_ids_are_hashed_as_one(texts: list[str]) -> None:
    hashes = hash_ids(texts)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [hash_id(text) for text in texts]


def test_a_click_is_written_without_what_is_default() -> None:
    assert json.loads(encode_event(ClickEvent("u", "i", 5.0))) == {"user_id": "u", "item_id": "i", "event_time": 5.0}
    click = ClickEvent("u", "i", 5.0, event_id="e", reward=2.0, context={"hour": 7, "new": True}, session_id="s")
    assert msgspec.json.decode(encode_event(click), type=ClickEvent) == click


def test_an_item_is_written_with_features_and_payload() -> None:
    item = ItemEvent("i", features={"tags": ["a", "b"], "price": 3.5}, payload={"title": {"en": "Shoe"}})
    assert json.loads(encode_event(item)) == {
        "item_id": "i",
        "features": {"tags": ["a", "b"], "price": 3.5},
        "payload": {"title": {"en": "Shoe"}},
    }


def test_a_prefix_keeps_the_topics_of_two_streamtowers_apart() -> None:
    plain, prefixed = Topics(), Topics("shop-")
    assert (plain.clicks, plain.items, plain.dead_letters, plain.micro_batches) == (
        "clicks",
        "items",
        "clicks-dead-letter",
        "micro-batches",
    )
    assert prefixed.micro_batches == "shop-micro-batches"
