"""Records of topic `items` → item changes; what breaks the contract is an error that says how.

Station: between the source, which reads the records, and the catalogue, which takes the changes. It knows no Kafka.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from streams.contract import MAX_ID_BYTES, ContractError, Scalar

MAX_PAYLOAD_BYTES = 16_384
"""Of one item, as JSON: one payload that the index refuses would hold up the publishing of all items."""
MAX_PAYLOAD_DEPTH = 16


@dataclass(frozen=True)
class ItemChange:
    """An item's new features and payload, or that it is gone."""

    item_id: str
    features: dict[str, Scalar | list[Scalar]] = field(default_factory=dict)
    payload: bytes = b"{}"
    """A JSON object."""
    gone: bool = False


class _ItemRecord(msgspec.Struct):
    item_id: str | int
    features: dict[str, str | int | float | bool | list[str | int | float | bool | None] | None] = {}
    payload: msgspec.Raw = msgspec.Raw(b"{}")


_item_decoder = msgspec.json.Decoder(_ItemRecord)
_object_decoder = msgspec.json.Decoder(dict[str, Any])


def decode_item_change(key: bytes | None, value: bytes | None) -> ItemChange:
    """The item event in a record of `items`.

    Raises:
        ContractError: it breaks the contract: says how.
    """
    try:
        if value is None:
            if key is None:
                raise ContractError("a tombstone needs the item id as its key")
            return ItemChange(_checked_id(key.decode()), gone=True)
        value.decode()  # msgspec skips what it does not read, whatever bytes that has
        record = _item_decoder.decode(value)
        payload = bytes(record.payload)
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ContractError(f"a payload has at most {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}")
        if _depth(_object_decoder.decode(payload)) > MAX_PAYLOAD_DEPTH:
            raise ContractError(f"a payload is nested at most {MAX_PAYLOAD_DEPTH} deep")
        return ItemChange(_checked_id(str(record.item_id)), record.features, payload)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ContractError(f"not an item event: {error}") from error


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _checked_id(item_id: str) -> str:
    if not 0 < len(item_id.encode()) <= MAX_ID_BYTES:
        raise ContractError(f"an item id has 1 … {MAX_ID_BYTES} bytes, not {len(item_id.encode())}")
    return item_id
