"""A collection's configuration: what the engine gets of it, what is kept and shown, what changes.

Station: beside `storage`. A configuration is the body of the call that created the collection, with later changes
merged in.
"""

from __future__ import annotations

from typing import Any

import qdrant_edge as edge

from streamtower.dev.index import schema
from streamtower.dev.index.errors import invalid, refused, wrong_input

MAX_VECTOR_SIZE = 65536
_DISTANCES = {
    "Cosine": edge.Distance.Cosine,
    "Dot": edge.Distance.Dot,
    "Euclid": edge.Distance.Euclid,
    "Manhattan": edge.Distance.Manhattan,
}
_DATATYPES = {
    "float32": edge.VectorStorageDatatype.Float32,
    "float16": edge.VectorStorageDatatype.Float16,
    "uint8": edge.VectorStorageDatatype.Uint8,
}
# What a new collection shows on a server, for the settings that the call did not give.
_PARAMS = {"shard_number": 1, "replication_factor": 1, "write_consistency_factor": 1, "on_disk_payload": True}
_HNSW = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000, "max_indexing_threads": 0, "on_disk": False}
_OPTIMIZERS = {
    "deleted_threshold": 0.2,
    "vacuum_min_vector_number": 1000,
    "default_segment_number": 0,
    "max_segment_size": None,
    "memmap_threshold": None,
    "indexing_threshold": 10000,
    "flush_interval_sec": 5,
    "max_optimization_threads": None,
    "prevent_unoptimized": None,
}
_WAL = {"wal_capacity_mb": 32, "wal_segments_ahead": 0, "wal_retain_closed": 1}


def dense_vectors(vectors: dict[str, Any] | None) -> dict[str, schema.VectorParams]:
    """The dense vectors of a collection by name; a single unnamed one has the name "".

    Raises:
        ApiError: 400 or 422.
    """
    vectors = vectors or {}
    if "size" in vectors and not isinstance(vectors["size"], dict):
        vectors = {"": vectors}
    params = {name: schema.convert(value, schema.VectorParams) for name, value in vectors.items()}
    for one in params.values():
        if one.size > MAX_VECTOR_SIZE:
            raise invalid(f"vectors.?.size: value {one.size} invalid, must be from 1 to {MAX_VECTOR_SIZE}")
        if one.multivector_config is not None:
            raise refused("multivectors")
    return params


def engine_config(body: schema.CreateCollection) -> edge.EdgeConfig:
    """What the engine is told: the vectors and where they lie. Settings of indexes are not: see `storage`.

    Raises:
        ApiError: 400 or 422.
    """
    if body.sharding_method not in (None, "auto"):
        raise refused("custom sharding")
    if body.init_from is not None:
        raise refused("init_from")
    if not body.vectors and not body.sparse_vectors:
        raise refused("a collection without vectors")
    vectors = {
        name: edge.EdgeVectorParams(
            size=params.size,
            distance=_DISTANCES[params.distance],
            on_disk=params.on_disk,
            datatype=params.datatype and _DATATYPES[params.datatype],
        )
        for name, params in dense_vectors(body.vectors).items()
    }
    return edge.EdgeConfig(
        vectors=vectors,
        sparse_vectors={name: _sparse_params(params) for name, params in (body.sparse_vectors or {}).items()},
        on_disk_payload=body.on_disk_payload,
        # No graph, and no segments but the one that is written to: exact search, and updates in place.
        hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=100, full_scan_threshold=10000),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=0),
        wal_enabled=True,
    )


def _sparse_params(params: schema.SparseVectorParams) -> edge.EdgeSparseVectorParams:
    index = params.index or schema.SparseIndexParams()
    return edge.EdgeSparseVectorParams(
        full_scan_threshold=index.full_scan_threshold,
        on_disk=index.on_disk,
        datatype=index.datatype and _DATATYPES[index.datatype],
        modifier=edge.Modifier.Idf if params.modifier == "idf" else None,
    )


def changed(config: dict[str, Any], changes: schema.ChangeCollection) -> dict[str, Any]:
    """The configuration with new settings merged in.

    Raises:
        ApiError: 400: settings for a vector that is not there.
    """
    config = dict(config)
    for part in ("hnsw_config", "optimizers_config", "params", "quantization_config"):
        settings = getattr(changes, part)
        if isinstance(settings, dict):
            config[part] = (config.get(part) or {}) | settings
        elif settings is not None:  # quantization_config: "Disabled"
            config[part] = None
    for part in ("vectors", "sparse_vectors"):
        for vector, settings in (getattr(changes, part) or {}).items():
            config[part] = _changed_vector(config.get(part) or {}, vector, settings)
    return config


def _changed_vector(vectors: dict[str, Any], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of all vectors, with new settings for one of them; what points depend on stays."""
    fixed = {"size", "distance", "datatype", "multivector_config"}
    changed = {field: value for field, value in settings.items() if field not in fixed}
    if not name and isinstance(vectors.get("size"), int):
        return vectors | changed
    if name not in vectors:
        raise wrong_input(f"Not existing vector name error: {name}")
    return vectors | {name: vectors[name] | changed}


def shown(config: dict[str, Any]) -> dict[str, Any]:
    """What a server would show of this configuration: what was given, and its defaults for the rest."""
    params = {"vectors": _given(config.get("vectors") or {})} | _PARAMS
    params |= _given({name: config.get(name) for name in (*_PARAMS, "sparse_vectors")})
    return {
        "params": params | (config.get("params") or {}),
        "hnsw_config": _HNSW | (config.get("hnsw_config") or {}),
        "optimizer_config": _OPTIMIZERS | (config.get("optimizers_config") or {}),
        "wal_config": _WAL | (config.get("wal_config") or {}),
        "quantization_config": config.get("quantization_config"),
    }


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, down to the last level, without those that are null."""
    return {
        name: _given(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value is not None
    }
