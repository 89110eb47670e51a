"""Update requests → operations of the engine, checked whole before the first point is touched.

Station: between `schema` and the engine's `update`. The engine stores the points before the first bad one, and writes
even the bad ones to its log, so nothing goes to it that has not been checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import qdrant_edge as edge

from streamtower.dev.index import schema
from streamtower.dev.index.errors import ApiError, format_error, invalid, wrong_input
from streamtower.dev.index.filters import filter_of, point_id
from streamtower.dev.index.queries import sparse_vector
from streamtower.dev.index.storage import Collection

MAX_NESTING = 100
"""Levels of a payload's objects and arrays."""
_NESTED = (dict, list)
_MODES = {
    "upsert": edge.UpdateMode.Upsert,
    "insert_only": edge.UpdateMode.InsertOnly,
    "update_only": edge.UpdateMode.UpdateOnly,
}
_INDEXES: dict[str, tuple[Any, Any]] = {
    "keyword": (edge.PayloadSchemaType.Keyword, edge.KeywordIndexParams),
    "integer": (edge.PayloadSchemaType.Integer, edge.IntegerIndexParams),
    "float": (edge.PayloadSchemaType.Float, edge.FloatIndexParams),
    "geo": (edge.PayloadSchemaType.Geo, edge.GeoIndexParams),
    "text": (edge.PayloadSchemaType.Text, edge.TextIndexParams),
    "bool": (edge.PayloadSchemaType.Bool, edge.BoolIndexParams),
    "datetime": (edge.PayloadSchemaType.Datetime, edge.DatetimeIndexParams),
    "uuid": (edge.PayloadSchemaType.Uuid, edge.UuidIndexParams),
}
INDEX_PARAMS = (
    "is_tenant", "is_principal", "lookup", "range", "on_disk", "enable_hnsw",
    "min_token_len", "max_token_len", "lowercase", "ascii_folding", "phrase_matching",
)  # fmt: skip
_TOKENIZERS = {
    "prefix": edge.TokenizerType.Prefix,
    "whitespace": edge.TokenizerType.Whitespace,
    "word": edge.TokenizerType.Word,
    "multilingual": edge.TokenizerType.Multilingual,
}


def operation(name: str, body: bytes | Any, collection: Collection) -> edge.UpdateOperation:
    """The operation `name` (as in a batch of operations) with this JSON body.

    Raises:
        ApiError: 400 or 422.
        ValueError: the engine does not accept a key or a time.
    """
    if name not in _OPERATIONS:
        raise format_error(f"unknown operation `{name}`, expected one of {', '.join(_OPERATIONS)}")
    body_type, translate = _OPERATIONS[name]
    return translate(schema.decode(body, body_type), collection)


def create_index(body: schema.CreateIndex) -> edge.UpdateOperation:
    """An index on a payload field; raises as `operation` does."""
    given = {"type": body.field_schema} if isinstance(body.field_schema, str) else dict(body.field_schema)
    kind = given.pop("type", None)
    if kind not in _INDEXES:
        raise _no_index()
    plain, params_type = _INDEXES[kind]
    params = {name: value for name, value in given.items() if value is not None}
    if not params:
        return edge.UpdateOperation.create_field_index(body.field_name, plain)
    if "tokenizer" in params:
        if params["tokenizer"] not in _TOKENIZERS:
            raise _no_index()
        params["tokenizer"] = _TOKENIZERS[params["tokenizer"]]
    try:
        return edge.UpdateOperation.create_field_index(body.field_name, params_type(**params))
    except TypeError:
        raise _no_index() from None


def _no_index() -> ApiError:
    return format_error("data did not match any variant of untagged enum PayloadFieldSchema")


def _upsert(body: schema.Upsert, collection: Collection) -> edge.UpdateOperation:
    if body.points is not None:
        points = [_point(point.id, point.vector, point.payload, collection) for point in body.points]
    elif body.batch is not None:
        points = _batch(body.batch, collection)
    else:
        raise format_error("data did not match any variant of untagged enum PointInsertOperations")
    if not points:
        raise ApiError(400, "Bad request: Empty update request")
    mode = body.update_mode and _MODES[body.update_mode]
    return edge.UpdateOperation.upsert_points(points, filter_of(body.update_filter), mode)


def _batch(batch: schema.PointsBatch, collection: Collection) -> list[edge.Point]:
    ids = [point_id(id) for id in batch.ids]
    count = len(ids)
    vectors: Any
    if isinstance(batch.vectors, dict):
        for name, column in batch.vectors.items():
            if len(column) != count:
                raise _lengths(f"vectors.{name}", len(column), count)
        columns = [_column(name, column, collection) for name, column in batch.vectors.items()]
        vectors = [dict(zip(batch.vectors, row, strict=True)) for row in zip(*columns, strict=True)] or [{}] * count
    else:
        if len(batch.vectors) != count:
            raise _lengths("vectors", len(batch.vectors), count)
        vectors = _column("", batch.vectors, collection)
    payloads: list[Any] = [None] * count if batch.payloads is None else batch.payloads
    if len(payloads) != count:
        raise _lengths("payloads", len(payloads), count)
    for payload in payloads:
        _check_nesting(payload)
    return list(map(edge.Point, ids, vectors, payloads))


def _column(name: str, column: Sequence[schema.DenseVector | schema.SparseVector], collection: Collection) -> list[Any]:
    """One vector of each of many points, checked against what the collection has."""
    if set(map(type, column)) == {list} and set(map(len, column)) == {collection.vector_sizes.get(name)}:  # type: ignore[arg-type]
        return list(column)
    return [_vector(name, vector, collection) for vector in column]


def _lengths(what: str, count: int, expected: int) -> ApiError:
    return invalid(f"batch: Validation error: number of {what} ({count}) and of ids ({expected}) must be equal")


def _point(id: int | str, vector: Any, payload: dict[str, Any] | None, collection: Collection) -> edge.Point:
    _check_nesting(payload)
    return edge.Point(point_id(id), _vectors(vector, collection), payload)


def _check_nesting(value: Any, levels: int = MAX_NESTING) -> None:
    """The engine stores deeper payloads, but cannot read them again, and then scrolling fails for good."""
    if levels == 0:
        raise format_error("recursion limit exceeded")
    if value:
        for entry in value.values() if isinstance(value, dict) else value:
            if isinstance(entry, _NESTED):
                _check_nesting(entry, levels - 1)


def _vectors(source: schema.DenseVector | schema.NamedVectors, collection: Collection) -> Any:
    """A point's vectors, each checked against what the collection has."""
    if isinstance(source, list):
        return _vector("", source, collection)
    return {name: _vector(name, vector, collection) for name, vector in source.items()}


def _vector(name: str, vector: schema.DenseVector | schema.SparseVector, collection: Collection) -> Any:
    if isinstance(vector, list):
        _check_dense(name, vector, collection)
        return vector
    if name in collection.sparse_vectors:
        return sparse_vector(vector, "vector.?")
    if name in collection.vector_sizes:
        raise wrong_input("Wrong usage of sparse vectors")
    raise wrong_input(f"Not existing vector name error: {name}")


def _check_dense(name: str, vector: list[float], collection: Collection) -> None:
    size = collection.vector_sizes.get(name)
    if size is None:
        if name in collection.sparse_vectors:
            raise wrong_input("Wrong usage of sparse vectors")
        raise wrong_input(f"Not existing vector name error: {name}")
    if len(vector) != size:
        raise wrong_input(f"Vector dimension error: expected dim: {size}, got {len(vector)} for vector '{name}'")


def _update_vectors(body: schema.UpdateVectors, collection: Collection) -> edge.UpdateOperation:
    points = [edge.PointVectors(point_id(point.id), _vectors(point.vector, collection)) for point in body.points]
    if not points:
        raise ApiError(400, "Bad request: Empty update request")
    return edge.UpdateOperation.update_vectors(points, filter_of(body.update_filter))


def _by_selection(
    by_ids: Callable[..., edge.UpdateOperation], by_filter: Callable[..., edge.UpdateOperation], *fields: str
) -> Callable[[Any, Collection], edge.UpdateOperation]:
    """An operation that the engine has in two forms: for points by id, and by filter; `fields` of the body follow."""

    def translate(body: schema.Selection, collection: Collection) -> edge.UpdateOperation:
        if isinstance(body, schema.SetPayload):
            _check_nesting(body.payload)
        arguments = [getattr(body, name) for name in fields]
        if body.points is not None:
            return by_ids([point_id(id) for id in body.points], *arguments)
        if body.filter is not None:
            return by_filter(filter_of(body.filter), *arguments)
        raise invalid("internal: Validation error: Either list of point ids or filter must be provided")

    return translate


def _delete_vectors(body: schema.DeleteVectors, collection: Collection) -> edge.UpdateOperation:
    for name in body.vector:
        if name not in collection.vector_sizes and name not in collection.sparse_vectors:
            raise wrong_input(f"Not existing vector name error: {name}")
    return _by_selection(edge.UpdateOperation.delete_vectors, edge.UpdateOperation.delete_vectors_by_filter, "vector")(
        body, collection
    )


_Update = edge.UpdateOperation
_OPERATIONS: dict[str, tuple[type[Any], Callable[[Any, Collection], edge.UpdateOperation]]] = {
    "upsert": (schema.Upsert, _upsert),
    "update_vectors": (schema.UpdateVectors, _update_vectors),
    "delete_vectors": (schema.DeleteVectors, _delete_vectors),
    "delete": (schema.Selection, _by_selection(_Update.delete_points, _Update.delete_points_by_filter)),
    "set_payload": (
        schema.SetPayload,
        _by_selection(_Update.set_payload, _Update.set_payload_by_filter, "payload", "key"),
    ),
    "overwrite_payload": (
        schema.SetPayload,
        _by_selection(_Update.overwrite_payload, _Update.overwrite_payload_by_filter, "payload", "key"),
    ),
    "delete_payload": (
        schema.DeletePayload,
        _by_selection(_Update.delete_payload, _Update.delete_payload_by_filter, "keys"),
    ),
    "clear_payload": (schema.Selection, _by_selection(_Update.clear_payload, _Update.clear_payload_by_filter)),
}
