"""The REST calls: each takes a request and gives the `result` of its answer.

Station: between `app`, which speaks HTTP, and the engine. All of it runs in one thread (see `storage`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import qdrant_edge as edge
import structlog

from streamtower.dev.index import configuration, queries, schema, updates
from streamtower.dev.index.errors import ApiError, format_error, from_engine, not_found, refused
from streamtower.dev.index.filters import filter_of, point_id
from streamtower.dev.index.storage import Collection, Storage

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Request:
    """A call: the parts of its path, its query parameters, its body."""

    path: Mapping[str, str]
    parameters: Mapping[str, str]
    body: bytes

    @property
    def wait(self) -> bool:
        """Whether the caller waits for the update to be done."""
        value = self.parameters.get("wait", "false")
        if value not in ("true", "false"):
            raise ApiError(
                400, f"Deserialize error in query parameters: invalid value: string `{value}`, expected a boolean"
            )
        return value == "true"

    def check_parameters(self) -> None:
        """Checks what every call may carry; timeouts need no more, because nothing waits here."""
        timeout = self.parameters.get("timeout")
        if timeout is not None and not (timeout.isdecimal() and int(timeout) > 0):
            raise ApiError(
                400,
                f"Deserialize error in query parameters: invalid value: integer `{timeout}`, expected a nonzero u64",
            )


Call = Callable[[Storage, Request], Any]


# Collections and aliases


def collections(storage: Storage, request: Request) -> Any:
    return {"collections": [{"name": name} for name in storage.names]}


def collection_exists(storage: Storage, request: Request) -> Any:
    return {"exists": storage.exists(request.path["name"])}


def create_collection(storage: Storage, request: Request) -> Any:
    storage.create(request.path["name"], request.body)
    return True


def change_collection(storage: Storage, request: Request) -> Any:
    storage.change(request.path["name"], request.body)
    return True


def delete_collection(storage: Storage, request: Request) -> Any:
    return storage.delete(request.path["name"])


def collection_info(storage: Storage, request: Request) -> Any:
    collection = storage.collection(request.path["name"])
    info = collection.shard.info()
    return {
        "status": "green",
        "optimizer_status": "ok",
        "indexed_vectors_count": info.indexed_vectors_count,
        "points_count": info.points_count,
        "segments_count": info.segments_count,
        "config": configuration.shown(collection.config),
        "payload_schema": {name: _payload_index(index) for name, index in info.payload_schema.items()},
        "update_queue": {"length": 0},
    }


def _payload_index(index: edge.PayloadIndexInfo) -> dict[str, Any]:
    kind = repr(index.data_type).rpartition(".")[2].lower()
    shown: dict[str, Any] = {"data_type": kind, "points": index.points}
    if index.params is not None:
        params = {name: getattr(index.params, name, None) for name in updates.INDEX_PARAMS}
        shown["params"] = {"type": kind} | {name: value for name, value in params.items() if value is not None}
    return shown


def aliases(storage: Storage, request: Request) -> Any:
    name = request.path.get("name")
    if name is not None:
        storage.collection(name)
    return {
        "aliases": [
            {"alias_name": alias, "collection_name": target}
            for alias, target in storage.aliases.items()
            if name in (None, target)
        ]
    }


def change_aliases(storage: Storage, request: Request) -> Any:
    storage.change_aliases(schema.decode(request.body, schema.AliasActions).actions)
    return True


# Updates


def update(name: str) -> Call:
    """The call that does the operation `name` on points."""

    def call(storage: Storage, request: Request) -> Any:
        collection = storage.collection(request.path["name"])
        return _apply(collection, updates.operation(name, request.body, collection), request.wait)

    return call


def update_batch(storage: Storage, request: Request) -> Any:
    collection = storage.collection(request.path["name"])
    operations = []
    for entry in schema.decode(request.body, schema.Operations).operations:
        if len(entry) != 1:
            raise format_error("data did not match any variant of untagged enum UpdateOperation")
        ((name, body),) = entry.items()
        operations.append(updates.operation(name, body, collection))
    return [_apply(collection, operation, request.wait) for operation in operations]


def create_index(storage: Storage, request: Request) -> Any:
    collection = storage.collection(request.path["name"])
    operation = updates.create_index(schema.decode(request.body, schema.CreateIndex))
    return _apply(collection, operation, request.wait)


def delete_index(storage: Storage, request: Request) -> Any:
    collection = storage.collection(request.path["name"])
    return _apply(collection, edge.UpdateOperation.delete_field_index(request.path["field"]), request.wait)


def _apply(collection: Collection, operation: edge.UpdateOperation, wait: bool) -> dict[str, Any]:
    """Done at once either way; who does not wait does not hear of points that are missing, as on a server."""
    try:
        number = collection.update(operation)
    except Exception as error:
        if wait:
            raise
        log.warning("an update that nobody waits for failed", collection=collection.name, error=str(error))
        number = collection.num_operations
    return {"operation_id": number, "status": "completed" if wait else "acknowledged"}


# Reading


def query(storage: Storage, request: Request) -> Any:
    body = schema.decode(request.body, schema.Query)
    collection = storage.collection(request.path["name"])
    engine_request = queries.query_request(body, collection)
    try:
        points = collection.shard.query(engine_request)
    except Exception as error:
        raise from_engine(error, formula=queries.has_formula(body)) from None
    return {"points": [_scored(point) for point in points]}


def query_batch(storage: Storage, request: Request) -> Any:
    bodies = schema.decode(request.body, schema.QueryBatch).searches
    collection = storage.collection(request.path["name"])
    engine_request = edge.QueryBatchRequest([queries.query_request(body, collection) for body in bodies])
    try:
        answers = collection.shard.query_batch(engine_request)
    except Exception as error:
        raise from_engine(error, formula=any(map(queries.has_formula, bodies))) from None
    return [{"points": [_scored(point) for point in points]} for points in answers]


def scroll(storage: Storage, request: Request) -> Any:
    body = schema.decode(request.body, schema.Scroll)
    collection = storage.collection(request.path["name"])
    points, offset = collection.shard.scroll(
        edge.ScrollRequest(
            offset=None if body.offset is None else point_id(body.offset),
            limit=schema.limit_of(body.limit),
            filter=filter_of(body.filter),
            with_payload=_payload_unless_told(body.with_payload),
            with_vector=body.with_vector,
            order_by=None if body.order_by is None else queries.order_by(body.order_by),
        )
    )
    return {"points": [_record(point) for point in points], "next_page_offset": None if offset is None else _id(offset)}


def count(storage: Storage, request: Request) -> Any:
    body = schema.decode(request.body, schema.Count)
    collection = storage.collection(request.path["name"])
    return {"count": collection.shard.count(edge.CountRequest(exact=True, filter=filter_of(body.filter)))}


def retrieve(storage: Storage, request: Request) -> Any:
    body = schema.decode(request.body, schema.Retrieve)
    collection = storage.collection(request.path["name"])
    ids: list[Any] = [point_id(id) for id in body.ids]
    points = collection.shard.retrieve(ids, _payload_unless_told(body.with_payload), body.with_vector)
    return [_record(point) for point in points]


def retrieve_one(storage: Storage, request: Request) -> Any:
    collection = storage.collection(request.path["name"])
    text = request.path["id"]
    id = point_id(int(text) if text.isdecimal() else text)
    points = collection.shard.retrieve([id], True, True)
    if not points:
        raise not_found(f"Point with id {id} does not exists!")
    return _record(points[0])


def _payload_unless_told(source: schema.WithPayload) -> Any:
    return True if source is None else queries.payload_selector(source)


def _scored(point: edge.ScoredPoint) -> dict[str, Any]:
    return {"id": _id(point.id), "version": point.version, "score": point.score} | _content(point)


def _record(point: edge.Record) -> dict[str, Any]:
    return {"id": _id(point.id)} | _content(point)


def _id(id: Any) -> int | str:
    return id if isinstance(id, int) else str(id)


def _content(point: edge.ScoredPoint | edge.Record) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if (payload := point.payload) is not None:
        content["payload"] = payload
    if (vector := point.vector) is not None:
        content["vector"] = (
            {name: _vector(one) for name, one in vector.items()} if isinstance(vector, dict) else _vector(vector)
        )
    if (value := point.order_value) is not None:
        content["order_value"] = value
    return content


def _vector(vector: Any) -> Any:
    if isinstance(vector, edge.SparseVector):
        return {"indices": vector.indices, "values": vector.values}
    return vector


def refuse(feature: str) -> Call:
    """The answer to a call that a Qdrant server does and this endpoint does not."""

    def call(storage: Storage, request: Request) -> Any:
        raise refused(feature)

    return call


_COLLECTION = "/collections/{name}"
CALLS: list[tuple[str, str, Call]] = [
    ("POST", f"{_COLLECTION}/points/query", query),
    ("PUT", f"{_COLLECTION}/points", update("upsert")),
    ("POST", f"{_COLLECTION}/points", retrieve),
    ("POST", f"{_COLLECTION}/points/query/batch", query_batch),
    ("POST", f"{_COLLECTION}/points/scroll", scroll),
    ("POST", f"{_COLLECTION}/points/count", count),
    ("POST", f"{_COLLECTION}/points/delete", update("delete")),
    ("POST", f"{_COLLECTION}/points/payload", update("set_payload")),
    ("PUT", f"{_COLLECTION}/points/payload", update("overwrite_payload")),
    ("POST", f"{_COLLECTION}/points/payload/delete", update("delete_payload")),
    ("POST", f"{_COLLECTION}/points/payload/clear", update("clear_payload")),
    ("PUT", f"{_COLLECTION}/points/vectors", update("update_vectors")),
    ("POST", f"{_COLLECTION}/points/vectors/delete", update("delete_vectors")),
    ("POST", f"{_COLLECTION}/points/batch", update_batch),
    ("GET", f"{_COLLECTION}/points/{{id}}", retrieve_one),
    ("PUT", f"{_COLLECTION}/index", create_index),
    ("DELETE", f"{_COLLECTION}/index/{{field}}", delete_index),
    ("GET", "/aliases", aliases),
    ("POST", "/collections/aliases", change_aliases),
    ("GET", f"{_COLLECTION}/aliases", aliases),
    ("GET", f"{_COLLECTION}/exists", collection_exists),
    ("GET", "/collections", collections),
    ("GET", _COLLECTION, collection_info),
    ("PUT", _COLLECTION, create_collection),
    ("PATCH", _COLLECTION, change_collection),
    ("DELETE", _COLLECTION, delete_collection),
    ("POST", f"{_COLLECTION}/points/query/groups", refuse("grouped queries")),
    ("POST", f"{_COLLECTION}/points/search/matrix/pairs", refuse("distance matrices")),
    ("POST", f"{_COLLECTION}/points/search/matrix/offsets", refuse("distance matrices")),
    ("POST", f"{_COLLECTION}/facet", refuse("facets")),
    ("PUT", f"{_COLLECTION}/vectors/{{vector}}", refuse("new vector names in an existing collection")),
    ("DELETE", f"{_COLLECTION}/vectors/{{vector}}", refuse("removing a vector name from an existing collection")),
    ("GET", f"{_COLLECTION}/snapshots", refuse("snapshots")),
    ("POST", f"{_COLLECTION}/snapshots", refuse("snapshots")),
    ("PUT", f"{_COLLECTION}/snapshots/recover", refuse("snapshots")),
    ("GET", "/snapshots", refuse("snapshots")),
    ("POST", "/snapshots", refuse("snapshots")),
    ("GET", f"{_COLLECTION}/cluster", refuse("clusters")),
    ("POST", f"{_COLLECTION}/cluster", refuse("clusters")),
    ("GET", "/cluster", refuse("clusters")),
    ("PUT", f"{_COLLECTION}/shards", refuse("shard keys")),
    ("POST", f"{_COLLECTION}/shards/delete", refuse("shard keys")),
    ("GET", "/telemetry", refuse("telemetry")),
]


def encode(result: Any, seconds: float) -> bytes:
    """The body of an answer."""
    return msgspec.json.encode({"result": result, "status": "ok", "time": seconds})
