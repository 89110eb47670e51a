"""Records of the items topic, good and bad."""

from __future__ import annotations

import json

import pytest

from streams.contract import ContractError, ItemEvent, encode_event
from trainer.item_events import MAX_PAYLOAD_BYTES, ItemChange, decode_item_change


def test_what_a_producer_encodes_is_what_arrives() -> None:
    features = {"brand": "x", "tags": ["a", 1, None], "price": 2.5, "new": True}
    event = ItemEvent("a", features, {"title": "Ä", "stock": {"berlin": 3}})  # type: ignore[arg-type]
    change = decode_item_change(b"a", encode_event(event))
    assert change == ItemChange("a", features, change.payload)  # type: ignore[arg-type]
    assert json.loads(change.payload) == {"title": "Ä", "stock": {"berlin": 3}}


def test_features_and_payload_may_be_left_out_and_a_number_is_an_id() -> None:
    assert decode_item_change(None, b'{"item_id": 17, "unknown": []}') == ItemChange("17")


def test_a_record_without_a_value_is_a_tombstone_of_its_key() -> None:
    assert decode_item_change("ä".encode(), None) == ItemChange("ä", gone=True)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (None, None, "item id as its key"),
        (b"\xff", None, "not an item event"),
        (b"", None, "1 … 512 bytes"),
        (b"a", b"", "not an item event"),
        (b"a", b"\xff", "not an item event"),
        (b"a", b"[]", "not an item event"),
        (b"a", b"{}", "item_id"),
        (b"a", b'{"item_id": ""}', "1 … 512 bytes, not 0"),
        (b"a", b'{"item_id": "' + b"x" * 513 + b'"}', "not 513"),
        (b"a", b'{"item_id": null}', "item_id"),
        (b"a", b'{"item_id": "a", "features": {"b": {"c": 1}}}', "features"),
        (b"a", b'{"item_id": "a", "features": {"b": 1e999}}', "not an item event"),
        (b"a", b'{"item_id": "a", "payload": [1]}', "not an item event"),
        (b"a", b'{"item_id": "a", "payload": {"n": NaN}}', "not an item event"),
        (b"a", b'{"item_id": "a", "payload": {"n": ' + b"[" * 20 + b"]" * 20 + b"}}", "16 deep"),
        (b"a", b'{"item_id": "a", "payload": {"n": ' + b"[" * 9_999 + b"]" * 9_999 + b"}}", "recursion"),
        (b"a", b'{"item_id": "a", "payload": {"n": "' + b"x" * MAX_PAYLOAD_BYTES + b'"}}', "16384 bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_breaks_the_contract_says_how(key: bytes | None, value: bytes | None, says: str) -> None:
    with pytest.raises(ContractError, match=says):
        decode_item_change(key, value)
