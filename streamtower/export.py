"""Writes a published version into a directory that other vector tools can read.

Station: behind the index; for `streamtower export`. It reads, and changes nothing.

The directory gets `items.parquet`, `query_tower.safetensors` and, last, `manifest.json`: one without it is not whole.
A version that is live changes while it is read; each item has its own `step`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from streamtower.qdrant import NotThereError, QdrantAwayError
from streamtower.versions import PublishedVersions, Version, VersionsError
from trainer.contract import (
    COVISIT,
    DENSE,
    ITEM_ID,
    MANIFEST_FILE,
    QUERY_TOWER_FILE,
    STEP,
    Manifest,
    version_directory,
)

ITEMS_FILE = "items.parquet"
PAGE_ITEMS = 1_000


def export(
    client: QdrantClient, versions: PublishedVersions, model_dir: Path, directory: Path, number: int | None
) -> tuple[Version, int]:
    """Exports a version; None: the live one. Returns it, and the number of its items.

    Args:
        client: of Qdrant.
        versions: in that Qdrant.
        model_dir: of the published versions.
        directory: new, or empty.
        number: of the version.

    Raises:
        VersionsError: there is no such version, or it is not whole, or not any more; or the directory is not empty.
        QdrantAwayError: Qdrant does not answer.
        OSError: the disk does not take it. Whatever is raised, no file is left.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise VersionsError(f"{directory} is not an empty directory, so that no two versions mix")
    found = versions.all()
    chosen = [version for version in found if (version.is_live if number is None else version.number == number)]
    if not chosen or not chosen[0].is_whole:
        whole = ", ".join(str(version.number) for version in found if version.is_whole) or "none"
        what = "no whole version is live" if number is None else f"there is no whole version {number}"
        raise VersionsError(f"{what}; whole versions are: {whole}")
    version = chosen[0]
    manifest = version.manifest
    assert manifest is not None
    source = version_directory(model_dir, version.number)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        num_items = _write_items(client, manifest, directory / ITEMS_FILE)
        for name in (QUERY_TOWER_FILE, MANIFEST_FILE):
            shutil.copyfile(source / name, directory / name)
    except BaseException as error:
        for name in (ITEMS_FILE, QUERY_TOWER_FILE, MANIFEST_FILE):  # so that the command can be given again
            (directory / name).unlink(missing_ok=True)
        if isinstance(error, NotThereError) or (isinstance(error, FileNotFoundError) and not source.exists()):
            raise VersionsError(f"version {version.number} was removed while it was exported; try another") from error
        raise
    return version, num_items


def _write_items(client: QdrantClient, manifest: Manifest, path: Path) -> int:
    """Writes all items of a version; returns how many. Raises QdrantAwayError, NotThereError and OSError."""
    schema = _schema(manifest.dense_dims)
    num_items, offset = 0, None
    with pq.ParquetWriter(path, schema) as writer:
        while True:
            try:
                records, offset = client.scroll(
                    manifest.collection, limit=PAGE_ITEMS, offset=offset, with_payload=True, with_vectors=True
                )
            except (ResponseHandlingException, ResourceExhaustedResponse, UnexpectedResponse) as error:
                if getattr(error, "status_code", None) == 404:
                    raise NotThereError(f"there is no {manifest.collection}") from error
                raise QdrantAwayError(f"Qdrant does not answer: {error}") from error
            # The canary has no vectors, and is no item.
            items = [record for record in records if isinstance(record.vector, dict) and DENSE in record.vector]
            if items:
                writer.write_table(_table(items, schema))
            num_items += len(items)
            if offset is None:
                return num_items


def _schema(size: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("item_hash", pa.uint64(), nullable=False),
            pa.field("step", pa.int64(), nullable=False),
            pa.field("dense", pa.list_(pa.float32(), size), nullable=False),
            pa.field("covisit_indices", pa.list_(pa.uint32()), nullable=False),
            pa.field("covisit_values", pa.list_(pa.float32()), nullable=False),
            pa.field("payload", pa.string(), nullable=False),
        ]
    )


def _table(records: list[models.Record], schema: pa.Schema) -> pa.Table:
    payloads: list[dict[str, Any]] = [dict(record.payload or {}) for record in records]
    vectors: list[dict[str, Any]] = [dict(record.vector) for record in records]  # type: ignore[arg-type]
    sparse = [vector.get(COVISIT) for vector in vectors]
    dense = np.array([vector[DENSE] for vector in vectors], np.float32)
    columns: dict[str, list[Any] | pa.Array] = {
        "item_id": [payload.pop(ITEM_ID) for payload in payloads],
        "item_hash": [record.id for record in records],
        "step": [payload.pop(STEP) for payload in payloads],
        "dense": pa.FixedSizeListArray.from_arrays(dense.ravel(), dense.shape[1]),
        "covisit_indices": [vector.indices if vector else [] for vector in sparse],
        "covisit_values": [vector.values if vector else [] for vector in sparse],
        "payload": [json.dumps(payload, ensure_ascii=False) for payload in payloads],
    }
    return pa.table(columns, schema=schema)
