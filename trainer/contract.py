"""PUBLIC: what crosses the border of `trainer` — names in Qdrant, payload keys, the dense vector, the Manifest.

Station: the words that trainer and retriever have in common. It loads no torch and no Qdrant client.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

DENSE = "dense"
"""Named vector of every item, distance Dot: [item embedding of length 1 ‖ log-frequency dimensions / scale]."""

ITEM_ID = "item_id"
"""Payload key: the caller's item id."""
STEP = "step"
"""Payload key: the trainer's step that the vector is from; a delta overwrites only smaller ones."""

MANIFEST_VERSION = 1


class ManifestError(ValueError):
    """A model version's directory that is torn, foreign or of another format."""


def collection_name(alias: str, model_version: int) -> str:
    """Qdrant collection of one model version; readers find it through the alias."""
    return f"{alias}__v{model_version}"


def model_version_of(alias: str, collection: str) -> int | None:
    """The model version in a collection's name, or None where the collection is not of this alias."""
    stem, _, number = collection.rpartition("__v")
    return int(number) if stem == alias and number.isdecimal() else None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a published model version is. Written last, so that a version without one is no version."""

    format: int = MANIFEST_VERSION
    model_version: int
    collection: str
    embedding_dim: int
    """Dimensions of the deep embedding."""
    popularity_dims: int
    """Log-frequency dimensions behind it; the dense vector has embedding_dim + popularity_dims."""
    popularity_scale: float
    """Item side divided by it, query side multiplied, so that their range is the embedding's own."""
    popularity_weights: list[float]
    """[popularity_dims] weights of the log-frequency dimensions at popularity = 1."""
    temperature: float
    """The query side's embedding is divided by it."""
    towers: dict[str, object]
    """`trainer.towers.TowerConfig` as plain data: enough to build the towers again."""
    num_items: int
    step: int
    """Optimizer steps behind this version."""
    source_offsets: dict[int, int]
    """Partition of `clicks` → next offset to learn."""
    settings_hash: str
    created_at: float
    """Seconds since the epoch."""


MANIFEST_FILE = "manifest.json"
QUERY_TOWER_FILE = "query_tower.safetensors"


def version_directory(model_dir: str | os.PathLike[str], model_version: int) -> Path:
    """Where one model version's Manifest and query tower lie."""
    return Path(model_dir) / f"v{model_version:08d}"


def load_manifest(directory: Path) -> Manifest:
    """The Manifest in a version's directory.

    Raises:
        ManifestError: it is missing, torn, or of a format that this code does not know.
    """
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ManifestError(f"no Manifest in {directory}: {error}") from error
    if manifest.format != MANIFEST_VERSION:
        raise ManifestError(f"{directory} has Manifest format {manifest.format}; this code reads {MANIFEST_VERSION}")
    return manifest


def query_vector(manifest: Manifest, query_embedding: list[float], popularity: float = 1.0) -> list[float]:
    """The dense query: [query embedding / temperature ‖ popularity · weights · scale]. Dot item = score."""
    scaled = [value / manifest.temperature for value in query_embedding]
    return scaled + [popularity * weight * manifest.popularity_scale for weight in manifest.popularity_weights]
