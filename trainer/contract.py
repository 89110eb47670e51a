"""PUBLIC: what crosses the border of `trainer` — names in Qdrant, payload keys, the dense vector, the Manifest.

Station: the words that trainer and retriever have in common. It loads no torch and no Qdrant client.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import xxhash

DENSE = "dense"
"""Named vector of every item, distance Dot: [item embedding of length 1 ‖ log-frequency dimensions / scale ‖ what it
lacks in length, where the version has a graph]."""
COVISIT = "covisit"
"""Named sparse vector of every item, by `covisit_index` of another item: how much more often than by chance the two
were clicked near each other. Versions without co-visitation have none."""

ITEM_ID = "item_id"
"""Payload key: the caller's item id."""
STEP = "step"
"""Payload key: the trainer's step that the vector is from; a delta overwrites only smaller ones."""
EVENT_TIME = "event_time"
"""Payload key of the canary's point alone: event time of the newest canary click that is behind it."""

MANIFEST_VERSION = 1
HNSW_EF = 512
"""Candidates that a search through a graph looks at, unless the retriever's settings say otherwise."""


class ManifestError(ValueError):
    """A model version's directory that is torn, foreign or of another format."""


def collection_name(alias: str, model_version: int) -> str:
    """Qdrant collection of one model version; readers find it through the alias."""
    return f"{alias}__v{model_version}"


def pinned_alias(alias: str) -> str:
    """Alias of the version that an operator holds live; where there is none, no version is held."""
    return f"{alias}__pinned"


def model_version_of(alias: str, collection: str) -> int | None:
    """The model version in a collection's name, or None where the collection is not of this alias."""
    stem, _, number = collection.rpartition("__v")
    return int(number) if stem == alias and number.isdecimal() else None


class PrequentialScore(msgspec.Struct, frozen=True, kw_only=True):
    """How well the newest clicks were foreseen, each before it was learnt, when a version was made."""

    clicks: int
    """Tested clicks that the recalls are over: up to evaluation_window_clicks."""
    recall_at_10: float
    recall_at_100: float
    popularity_recall_at_10: float
    """Of live popularity alone."""
    popularity_recall_at_100: float


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a published model version is. Written last, so that a version without one is no version."""

    format: int = MANIFEST_VERSION
    model_version: int
    collection: str
    embedding_dim: int
    """Dimensions of the deep embedding."""
    popularity_dims: int
    """Log-frequency dimensions behind it."""
    length_dims: int = 0
    """1: one more dimension behind these, which makes all items equally long. Graphs find the nearest items, and of
    equally long ones these are those of the largest product (Bachrach et al., RecSys 2014). The query's is 0."""
    popularity_scale: float
    """Item side divided by it, query side multiplied, so that their range is the embedding's own."""
    popularity_weights: list[float]
    """[popularity_dims] weights of the log-frequency dimensions at popularity = 1."""
    popularity_slopes: list[float] = []
    """[popularity_dims] added to the weights times `log_history`; empty: zeros."""
    temperature: float
    """The query side's embedding is divided by it."""
    embedding_weight: float = 1.0
    """Weight of cosine / temperature …"""
    embedding_slope: float = 0.0
    """… and what is added to it times `log_history`."""
    covisit_weight: float = 0.0
    """Weight of ln(1 + co-visitation) …"""
    covisit_slope: float = 0.0
    """… and what is added to it times `log_history`. Both 0: the version has no co-visitation."""
    covisit_scale: float = 0.0
    """Factor of the query side's sparse values."""
    covisit_decay: float = 1.0
    """Weight of a history item relative to the next newer one in them."""
    history_length: int = 20
    """Newest history items that count for `log_history` and co-visitation."""
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
    prequential: PrequentialScore | None = None
    """None: no click had been tested."""

    @property
    def dense_dims(self) -> int:
        """Dimensions of the dense vector."""
        return self.embedding_dim + self.popularity_dims + self.length_dims


MANIFEST_FILE = "manifest.json"
QUERY_TOWER_FILE = "query_tower.safetensors"
CHECKSUM_FILE = "checksum"


def version_directory(model_dir: str | os.PathLike[str], model_version: int) -> Path:
    """Where one model version's Manifest and query tower lie."""
    return Path(model_dir) / f"v{model_version:08d}"


def version_checksum(directory: Path) -> str:
    """xxh3-128 of a version's two files; beside them, in `CHECKSUM_FILE`, unless the version is of an older trainer.

    Raises:
        OSError: one is missing or cannot be read.
    """
    digest = xxhash.xxh3_128((directory / MANIFEST_FILE).read_bytes())
    digest.update((directory / QUERY_TOWER_FILE).read_bytes())
    return digest.hexdigest()


def load_manifest(directory: Path) -> Manifest:
    """The Manifest in a version's directory.

    Raises:
        ManifestError: it is missing, torn, or of a format that this code does not know.
    """
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (OSError, RecursionError, msgspec.DecodeError) as error:
        raise ManifestError(f"no Manifest in {directory}: {error}") from error
    if manifest.format != MANIFEST_VERSION:
        raise ManifestError(f"{directory} has Manifest format {manifest.format}; this code reads {MANIFEST_VERSION}")
    return manifest


LOG_HISTORY_SHIFT = 1.5


def log_history(num_items: int) -> float:
    """ln(1 + number of history items) − 1.5: what weights may depend on. Near 0 for four items."""
    return math.log1p(num_items) - LOG_HISTORY_SHIFT


def query_vector(
    manifest: Manifest, query_embedding: list[float], popularity: float = 1.0, history_length: int | None = None
) -> list[float]:
    """The dense query: [a · query embedding / temperature ‖ popularity · (weights + a · leaning) · scale ‖ 0 for the
    length]. Dot item = its share of the score; the rest is `covisit_weight` · ln(1 + `covisit_query` · item).

    Args:
        manifest: of the version that made the embedding.
        query_embedding: what its query tower gives: the embedding [embedding_dim], of length 1, and behind it the
            user's leaning [popularity_dims], weights that are the user's own; nothing behind it: a leaning of 0.
        popularity: factor on the popularity weights.
        history_length: items of the user's history; None: weights without `log_history`.
    """
    known = _log_history(manifest, history_length)
    towers = manifest.embedding_weight + manifest.embedding_slope * known
    none = [0.0] * len(manifest.popularity_weights)
    leaning = query_embedding[manifest.embedding_dim :] or none
    slopes = manifest.popularity_slopes or none
    weights = [
        weight + slope * known + towers * own
        for weight, slope, own in zip(manifest.popularity_weights, slopes, leaning, strict=True)
    ]
    embedding = [value * towers / manifest.temperature for value in query_embedding[: manifest.embedding_dim]]
    popular = [popularity * weight * manifest.popularity_scale for weight in weights]
    return embedding + popular + [0.0] * manifest.length_dims


def covisit_weight(manifest: Manifest, history_length: int | None = None) -> float:
    """b of the score for a user with so many history items; 0 where the version has no co-visitation."""
    return manifest.covisit_weight + manifest.covisit_slope * _log_history(manifest, history_length)


def covisit_index(item_hash: int) -> int:
    """Index of an item in sparse vectors: the low 32 bits of its hash."""
    return item_hash & 0xFFFFFFFF


def covisit_query(manifest: Manifest, history: Sequence[int]) -> tuple[list[int], list[float]]:
    """The sparse query of a history of item hashes, newest last: indices, distinct, and values. Both empty where the
    version has no co-visitation or the history is empty."""
    if not (manifest.covisit_weight or manifest.covisit_slope):
        return [], []
    newest = list(reversed(history[-manifest.history_length :]))
    weights = [manifest.covisit_decay**age for age in range(len(newest))]
    factor = manifest.covisit_scale / math.fsum(weights) if weights else 0.0
    query: dict[int, float] = {}
    for item_hash, weight in zip(newest, weights, strict=True):
        index = covisit_index(item_hash)
        query[index] = query.get(index, 0.0) + factor * weight
    return list(query), list(query.values())


def _log_history(manifest: Manifest, history_length: int | None) -> float:
    return 0.0 if history_length is None else log_history(min(history_length, manifest.history_length))
