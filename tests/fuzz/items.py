"""Item events: bytes → item change → encoded features, held against a reading by hand."""

from __future__ import annotations

import json
import math
from typing import Any

from streams.contract import ContractError
from tests.fuzz.mutator import JSON_WORDS
from tests.fuzz.strict_json import Refused, Undecided, id_of, is_number, read, typed
from trainer.features import encode_item_features
from trainer.item_events import decode_item_change
from trainer.towers import Feature, TowerConfig

CONFIG = TowerConfig(
    embedding_dim=8, row_dim=8, item_rows=64, user_rows=64, feature_rows=64,
    item=(
        Feature("brand", "categorical"), Feature("tags", "multi"), Feature("title", "text"), Feature("price", "number"),
        Feature("like", "item"),
    ),
)  # fmt: skip


def _json(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


CORPUS = (
    _json(item_id="shoe"),
    _json(item_id=7, features={"brand": "Ärmel", "tags": ["a", 1, None, True, 2.5], "price": 9.75}),
    _json(item_id="i", features={"title": "Two Words", "like": "shoe", "brand": None}, payload={"n": [1, {"a": "é"}]}),
    b' {"payload": {"a":{"b":[[1e300,-0.0]]},"a":2} ,"item_id": "i", "other":[1,"x"], "features":{"price":12} } ',
    _json(item_id="i", payload={"text": "x" * 16_300}),
    b'{"item_id":"i","payload":{"a":' + b"[" * 14 + b"]" * 14 + b"}}",
)
WORDS = (*JSON_WORDS, b'"item_id":', b'"features":', b'"payload":', b'"price":', b'"tags":', b'"brand":', b"x" * 200)


def check(data: bytes) -> bool:
    """Whether the input is accepted as an item event.

    Raises:
        AssertionError: it is accepted and is none, or as another one; or it is one and is refused.
    """
    _check_tombstone(data)
    try:
        change = decode_item_change(None, data)
    except ContractError:
        change = None
    try:
        item_id, features, payload = _reading(data)
    except Undecided:
        return change is not None
    except Refused as error:
        assert change is None, f"accepted, but {error or error.__cause__!r}"
        return False
    if change is None:
        assert _is_at_a_bound(data), "refused"
        return False
    assert change.item_id == item_id and not change.gone
    assert typed(change.features) == typed(features)
    assert len(change.payload) <= 16_384 and typed(read(change.payload)) == typed(payload)
    encoded = encode_item_features(CONFIG, change.features)
    assert all(math.isnan(number) or abs(number) <= 1e30 for number in encoded.numbers)
    assert all(0 <= row < 64 for rows in (*encoded.tokens, *encoded.references) for row in rows)
    return True


def _check_tombstone(key: bytes) -> None:
    try:
        change = decode_item_change(key, None)
    except ContractError:
        change = None
    try:
        wanted = id_of(key.decode())
    except (Refused, UnicodeDecodeError):
        assert change is None, "a tombstone of no id"
    else:
        assert change is not None and (change.item_id, change.gone) == (wanted, True)


def _reading(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    item = read(data)
    if not isinstance(item, dict):
        raise Refused("no object")
    features, payload = item.get("features", {}), item.get("payload", {})
    if not isinstance(features, dict) or not isinstance(payload, dict):
        raise Refused("features and payload are objects")
    for value in features.values():
        for inner in value if isinstance(value, list) else [value]:
            if not (inner is None or isinstance(inner, bool | str) or is_number(inner)):
                raise Refused("features are flat")
    if _depth(payload) > 16 or not _finite(payload):
        raise Refused("payload")
    return id_of(item.get("item_id")), features, payload


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _finite(value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return not isinstance(value, int | float) or isinstance(value, bool) or is_number(value)
    return all(map(_finite, inner))


def _is_at_a_bound(data: bytes) -> bool:
    """Refusals that a value alone does not explain: the payload's bytes, a field of a wrong type that comes twice."""
    doubled = False

    def look(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal doubled
        doubled |= len(dict(pairs)) < len(pairs)
        return dict(pairs)

    json.loads(data, object_pairs_hook=look, parse_int=float)
    return doubled or len(data) > 16_384
