"""The query tower of one published version, and the collection that holds this version's items: one immutable pair.

Station: from (user, history, context) to the query, dense and sparse. It does not follow versions (`versions`), and
does not search (`search`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from trainer.contract import (
    CHECKSUM_FILE,
    QUERY_TOWER_FILE,
    Manifest,
    covisit_query,
    covisit_weight,
    load_manifest,
    model_version_of,
    query_vector,
    version_checksum,
    version_directory,
)
from trainer.towers import QueryTower, TowerConfig, load_query_tower, query_inputs

Float32Array = npt.NDArray[np.float32]
UInt64Array = npt.NDArray[np.uint64]
ContextValue = str | int | float | bool | None


class VersionError(Exception):
    """A published version that cannot be served: says which, and why."""


@dataclass(frozen=True)
class Asked:
    """One query in the stream's terms."""

    user_hash: int | None
    """`streams.contract.hash_id` of the user's id; None: nobody in particular."""
    history: UInt64Array
    """[h] item hashes, newest last; may be empty."""
    context: Mapping[str, ContextValue]
    """Features by name; those that the towers do not know are not looked at."""
    popularity: float
    """Factor on the popularity weights, −1 … 2."""


@dataclass(frozen=True)
class Query:
    """What is searched for: score = dense · item + covisit_weight · ln(1 + sparse · item)."""

    dense: list[float]
    """[dense_dims]; empty: co-visitation alone."""
    indices: list[int]
    values: list[float]
    """The sparse query's; both empty: there is none."""
    covisit_weight: float


@dataclass(frozen=True)
class ServedVersion:
    """What an answer is made from. Tower and collection are never exchanged one without the other."""

    collection: str
    manifest: Manifest
    config: TowerConfig
    tower: QueryTower

    def encode(self, asked: Sequence[Asked]) -> list[Query]:
        """The queries in the version's terms: see `trainer.contract`. The tower runs once for all."""
        lengths = [len(one.history) for one in asked]
        names = {name for one in asked for name in one.context}
        inputs = query_inputs(
            self.config,
            np.array([one.user_hash or 0 for one in asked], np.uint64),
            np.concatenate([one.history for one in asked]),
            np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            {name: [one.context.get(name) for one in asked] for name in names},
        )
        if self.config.use_user_id:  # a row of weight 0 is no user
            inputs.users.weights[torch.tensor([one.user_hash is None for one in asked])] = 0
        with torch.inference_mode():
            embeddings = self.tower(inputs).tolist()
        return [self._query(one, embedding) for one, embedding in zip(asked, embeddings, strict=True)]

    def _query(self, asked: Asked, embedding: list[float]) -> Query:
        length = len(asked.history)
        indices, values = covisit_query(self.manifest, asked.history.tolist())
        return Query(
            dense=query_vector(self.manifest, embedding, asked.popularity, length),
            indices=indices,
            values=values,
            covisit_weight=covisit_weight(self.manifest, length) if indices else 0.0,
        )

    def popularity_query(self) -> Query:
        """The query for the most popular items: the popularity part of the score alone, at popularity = 1."""
        return Query(query_vector(self.manifest, [0.0] * self.manifest.embedding_dim), [], [], 0.0)

    def similar(self, item_hashes: Sequence[int], dense: Float32Array, *, embedding: bool, covisitation: bool) -> Query:
        """The query for items like these: their mean direction for the user's embedding, and they, each with the same
        weight, for the user's history. Weights are those of no particular history; popularity has none.

        Args:
            item_hashes: n ≥ 1, distinct.
            dense: float32 [n, dense_dims] the items' vectors.
            embedding: whether embeddings count.
            covisitation: whether co-visitation counts.
        """
        manifest = self.manifest
        mean = dense[:, : manifest.embedding_dim].mean(0)
        mean /= max(float(np.linalg.norm(mean)), 1e-12)
        alike = replace(manifest, covisit_decay=1.0, history_length=len(item_hashes))
        indices, values = covisit_query(alike, item_hashes) if covisitation else ([], [])
        return Query(
            dense=query_vector(manifest, mean.tolist(), popularity=0.0) if embedding else [],
            indices=indices,
            values=values,
            covisit_weight=covisit_weight(manifest) if indices else 0.0,
        )


def load_version(model_dir: Path, alias: str, collection: str) -> ServedVersion:
    """Reads Manifest and query tower of the version whose items are in `collection`. Blocks on the disk.

    Raises:
        VersionError: the collection is not the alias's, or its directory is missing, torn or of another version.
    """
    model_version = model_version_of(alias, collection)
    if model_version is None:
        raise VersionError(f"alias {alias!r} points at {collection!r}, which is no version published under that alias")
    directory = version_directory(model_dir, model_version)
    try:
        checksum = directory / CHECKSUM_FILE
        if checksum.exists() and checksum.read_text() != version_checksum(directory):
            raise ValueError(f"{directory} contradicts its checksum")
        manifest = load_manifest(directory)
        config = TowerConfig.from_dict(manifest.towers)
        tower = load_query_tower(directory / QUERY_TOWER_FILE, config)
    except Exception as error:  # whatever a torn or foreign file raises: it must not end a service that has a version
        raise VersionError(f"version {model_version} cannot be loaded: {error}") from error
    if (manifest.model_version, manifest.collection) != (model_version, collection):
        raise VersionError(
            f"{directory} holds version {manifest.model_version} of {manifest.collection!r}, not {collection!r}: "
            "model_dir belongs to another alias or Qdrant"
        )
    if manifest.embedding_dim != config.embedding_dim:
        raise VersionError(
            f"version {model_version} says embedding_dim {manifest.embedding_dim}, its tower {config.embedding_dim}"
        )
    if config.popularity_dims not in (0, manifest.popularity_dims):
        raise VersionError(
            f"version {model_version} says popularity_dims {manifest.popularity_dims}, its tower "
            f"{config.popularity_dims}"
        )
    tower.eval().requires_grad_(False)
    return ServedVersion(collection, manifest, config, tower)
