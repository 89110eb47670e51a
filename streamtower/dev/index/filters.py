"""Filters and conditions of a request → those of the engine.

Station: between `schema` and every call that selects points.
"""

from __future__ import annotations

import uuid
from typing import Any
from uuid import UUID

import numpy as np
import qdrant_edge as edge

from streamtower.dev.index import schema
from streamtower.dev.index.errors import ApiError, format_error, invalid

MAX_ID = 2**64 - 1


def point_id(value: int | str) -> int | str:
    """The id, checked: 0 … 2⁶⁴−1, or a UUID.

    Raises:
        ApiError: 400.
    """
    if isinstance(value, int):
        if value <= MAX_ID:
            return value
    else:
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    raise format_error(f"value {value} is not a valid point ID, valid values are either an unsigned integer or a UUID")


def filter_of(source: schema.Filter | None) -> edge.Filter | None:
    """The engine's filter; None stays None.

    Raises:
        ApiError: 400 or 422: a condition that is none.
        ValueError: the engine does not accept a key or a time.
    """
    if source is None:
        return None
    return _filter(source)


def _filter(source: schema.Filter) -> edge.Filter:
    at_least = source.min_should
    return edge.Filter(
        must=_conditions(source.must),
        should=_conditions(source.should),
        must_not=_conditions(source.must_not),
        min_should=None
        if at_least is None
        else edge.MinShould([condition_of(one) for one in at_least.conditions], at_least.min_count),
    )


def without_ids(source: edge.Filter | None, ids: list[int | str]) -> edge.Filter | None:
    """The filter, and not these points."""
    if not ids:
        return source
    return edge.Filter(must=None if source is None else [source], must_not=[edge.HasIdCondition(set(ids))])


def both(one: edge.Filter | None, other: edge.Filter | None) -> edge.Filter | None:
    """What passes both filters."""
    if one is None or other is None:
        return one or other
    return edge.Filter(must=[one, other])


def with_ids(source: edge.Filter | None, ids: set[int | str | UUID]) -> edge.Filter:
    """The filter, and of these points alone."""
    return edge.Filter(must=[*([] if source is None else [source]), edge.HasIdCondition(ids)])


def _conditions(source: list[schema.Condition] | schema.Condition | None) -> list[Any] | None:
    if source is None:
        return None
    return [condition_of(one) for one in (source if isinstance(source, list) else [source])]


def condition_of(source: schema.Condition) -> Any:
    """The engine's condition; raises as `filter_of` does."""
    if source.key is not None:
        return _field_condition(source, source.key)
    if isinstance(source.is_empty, schema.Key):
        return edge.IsEmptyCondition(source.is_empty.key)
    if isinstance(source.is_null, schema.Key):
        return edge.IsNullCondition(source.is_null.key)
    if source.has_id is not None:
        return edge.HasIdCondition({point_id(value) for value in source.has_id})
    if source.has_vector is not None:
        return edge.HasVectorCondition(source.has_vector)
    if source.nested is not None:
        return edge.NestedCondition(source.nested.key, _filter(source.nested.filter))
    return _filter(source)


def _field_condition(source: schema.Condition, key: str) -> Any:
    tests: dict[str, Any] = {
        "match": source.match and _match(source.match),
        "range": source.range and _range(source.range),
        "geo_bounding_box": source.geo_bounding_box
        and edge.GeoBoundingBox(_geo(source.geo_bounding_box.top_left), _geo(source.geo_bounding_box.bottom_right)),
        "geo_radius": source.geo_radius and edge.GeoRadius(_geo(source.geo_radius.center), source.geo_radius.radius),
        "values_count": source.values_count
        and edge.ValuesCount(
            gt=source.values_count.gt,
            gte=source.values_count.gte,
            lt=source.values_count.lt,
            lte=source.values_count.lte,
        ),
        "is_empty": source.is_empty,
        "is_null": source.is_null,
    }
    given = {name: test for name, test in tests.items() if test is not None}
    if not given:
        raise invalid("filter: Validation error: At least one field condition must be specified")
    return edge.FieldCondition(key, **given)


def _geo(source: schema.GeoPoint) -> Any:
    return edge.GeoPoint(source.lon, source.lat)


def _match(source: schema.Match) -> Any:
    if isinstance(source.value, bool):
        # Python's own booleans are integers to the engine's binding, and match nothing.
        return edge.MatchValue(np.bool_(source.value))  # type: ignore[arg-type]
    if source.value is not None:
        return edge.MatchValue(source.value)
    if source.any is not None:
        return edge.MatchAny(_of_one_type(source.any))
    if source.except_ is not None:
        return edge.MatchExcept(_of_one_type(source.except_))
    if source.text is not None:
        return edge.MatchText(source.text)
    if source.text_any is not None:
        return edge.MatchTextAny(source.text_any)
    if source.phrase is not None:
        return edge.MatchPhrase(source.phrase)
    raise _no_such("Match")


def _of_one_type(values: list[int | str]) -> Any:
    if len({type(value) for value in values}) > 1:
        raise _no_such("AnyVariants")
    return values


def _range(source: schema.Range) -> Any:
    bounds = {"gt": source.gt, "gte": source.gte, "lt": source.lt, "lte": source.lte}
    given: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    times = sum(isinstance(bound, str) for bound in given.values())
    if times not in (0, len(given)):
        raise _no_such("RangeInterface")
    return edge.RangeDateTime(**given) if times else edge.RangeFloat(**given)


def _no_such(name: str) -> ApiError:
    return format_error(f"data did not match any variant of untagged enum {name}")
