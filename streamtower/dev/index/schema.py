"""The JSON bodies of the requests, as types that msgspec checks while it parses.

Station: first thing behind HTTP. Unknown fields are ignored except in filters, as a Qdrant server does. Nothing here
knows the engine; what is only known with the collection at hand (vector names and sizes) is checked in `updates`.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from streamtower.dev.index.errors import format_error, invalid

PointId = Annotated[int, Meta(ge=0)] | str
Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
DenseVector = list[float]


class SparseVector(Struct):
    indices: list[Natural]
    values: list[float]


NamedVectors = dict[str, DenseVector | SparseVector]


# Filters


class Filter(Struct, forbid_unknown_fields=True):
    must: list[Condition] | Condition | None = None
    should: list[Condition] | Condition | None = None
    must_not: list[Condition] | Condition | None = None
    min_should: MinShould | None = None


class MinShould(Struct):
    conditions: list[Condition]
    min_count: Natural


class Condition(Filter, forbid_unknown_fields=True):
    """Any one of Qdrant's conditions, told apart by the fields that are set; a filter is one too."""

    key: str | None = None
    match: Match | None = None
    range: Range | None = None
    geo_bounding_box: GeoBox | None = None
    geo_radius: GeoRadius | None = None
    values_count: ValuesCount | None = None
    is_empty: bool | Key | None = None
    is_null: bool | Key | None = None
    has_id: list[PointId] | None = None
    has_vector: str | None = None
    nested: Nested | None = None


class Match(Struct, omit_defaults=True):
    value: bool | int | str | None = None
    any: list[int | str] | None = None
    except_: list[int | str] | None = field(name="except", default=None)
    text: str | None = None
    text_any: str | None = None
    phrase: str | None = None


class Range(Struct):
    gt: float | str | None = None
    gte: float | str | None = None
    lt: float | str | None = None
    lte: float | str | None = None


class ValuesCount(Struct):
    gt: Natural | None = None
    gte: Natural | None = None
    lt: Natural | None = None
    lte: Natural | None = None


class GeoPoint(Struct):
    lon: float
    lat: float


class GeoBox(Struct):
    top_left: GeoPoint
    bottom_right: GeoPoint


class GeoRadius(Struct):
    center: GeoPoint
    radius: float


class Key(Struct):
    key: str


class Nested(Struct):
    key: str
    filter: Filter


# Updates


class Point(Struct):
    id: PointId
    vector: DenseVector | NamedVectors
    payload: dict[str, Any] | None = None


class PointsBatch(Struct):
    ids: list[PointId]
    vectors: list[DenseVector] | dict[str, list[DenseVector | SparseVector]]
    payloads: list[dict[str, Any] | None] | None = None


class Upsert(Struct):
    points: list[Point] | None = None
    batch: PointsBatch | None = None
    update_filter: Filter | None = None
    update_mode: Literal["upsert", "insert_only", "update_only"] | None = None


class PointVectors(Struct):
    id: PointId
    vector: DenseVector | NamedVectors


class UpdateVectors(Struct):
    points: list[PointVectors]
    update_filter: Filter | None = None


class Selection(Struct):
    """Which points: by id or by filter."""

    points: list[PointId] | None = None
    filter: Filter | None = None


class DeleteVectors(Selection, kw_only=True):
    vector: list[str]


class SetPayload(Selection, kw_only=True):
    payload: dict[str, Any]
    key: str | None = None


class DeletePayload(Selection, kw_only=True):
    keys: list[str]


class Operations(Struct):
    operations: list[dict[str, msgspec.Raw]]


# Searches


class PayloadSelector(Struct):
    include: list[str] | None = None
    exclude: list[str] | None = None


WithPayload = bool | list[str] | PayloadSelector | None
WithVector = bool | list[str] | None


class Prefetch(Struct):
    query: Any = None
    prefetch: list[Prefetch] | Prefetch | None = None
    using: str | None = None
    filter: Filter | None = None
    params: dict[str, Any] | None = None
    score_threshold: float | None = None
    limit: Natural | None = None
    lookup_from: Any = None


class Query(Prefetch):
    offset: Natural | None = None
    with_payload: WithPayload = None
    with_vector: WithVector = None


class QueryBatch(Struct):
    searches: list[Query]


class OrderBy(Struct):
    key: str
    direction: Literal["asc", "desc"] | None = None
    start_from: int | float | str | None = None


class Scroll(Struct):
    offset: PointId | None = None
    limit: Natural | None = None
    filter: Filter | None = None
    with_payload: WithPayload = None
    with_vector: WithVector = None
    order_by: OrderBy | str | None = None


class Count(Struct):
    filter: Filter | None = None
    exact: bool | None = None


class Retrieve(Struct):
    ids: list[PointId]
    with_payload: WithPayload = None
    with_vector: WithVector = None


# Collections and aliases


class VectorParams(Struct):
    size: Positive
    distance: Literal["Cosine", "Dot", "Euclid", "Manhattan"]
    on_disk: bool | None = None
    datatype: Literal["float32", "float16", "uint8"] | None = None
    hnsw_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    multivector_config: dict[str, Any] | None = None


class SparseIndexParams(Struct):
    full_scan_threshold: Natural | None = None
    on_disk: bool | None = None
    datatype: Literal["float32", "float16", "uint8"] | None = None


class SparseVectorParams(Struct):
    index: SparseIndexParams | None = None
    modifier: Literal["none", "idf"] | None = None


class ChangeCollection(Struct):
    """Settings that are kept and shown, and have no effect here: see `storage`."""

    vectors: dict[str, dict[str, Any]] | None = None
    sparse_vectors: dict[str, dict[str, Any]] | None = None
    hnsw_config: dict[str, Any] | None = None
    optimizers_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | Literal["Disabled"] | None = None
    params: dict[str, Any] | None = None


class CreateCollection(Struct):
    vectors: dict[str, Any] | None = None
    hnsw_config: dict[str, Any] | None = None
    optimizers_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    sparse_vectors: dict[str, SparseVectorParams] | None = None
    shard_number: Positive | None = None
    replication_factor: Positive | None = None
    write_consistency_factor: Positive | None = None
    on_disk_payload: bool | None = None
    wal_config: dict[str, Any] | None = None
    sharding_method: str | None = None
    init_from: Any = None


class CreateIndex(Struct):
    field_name: str
    field_schema: str | dict[str, Any]


class CreateAlias(Struct):
    collection_name: str
    alias_name: str


class DeleteAlias(Struct):
    alias_name: str


class RenameAlias(Struct):
    old_alias_name: str
    new_alias_name: str


class AliasAction(Struct):
    create_alias: CreateAlias | None = None
    delete_alias: DeleteAlias | None = None
    rename_alias: RenameAlias | None = None


class AliasActions(Struct):
    actions: list[AliasAction]


BodyT = TypeVar("BodyT")


@functools.cache
def _decoder(body_type: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type)


def decode(body: bytes | msgspec.Raw, body_type: type[BodyT]) -> BodyT:
    """The body as `body_type`.

    Raises:
        ApiError: 400: not JSON, or not of this form.
    """
    hashable: Any = body_type
    try:
        decoded: BodyT = _decoder(hashable).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise format_error(str(error)) from None
    return decoded


def convert(value: Any, target: type[BodyT]) -> BodyT:
    """A part that was parsed as plain JSON, checked as `target`; raises as `decode` does."""
    try:
        return msgspec.convert(value, target)
    except msgspec.ValidationError as error:
        raise format_error(str(error)) from None


def limit_of(limit: int | None, default: int = 10) -> int:
    """The limit, which may be left out but not be 0."""
    if limit == 0:
        raise invalid("internal.limit: value 0 invalid, must be 1 or larger")
    return default if limit is None else limit
