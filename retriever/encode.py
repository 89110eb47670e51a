"""The query tower of one published version, and the collection that holds this version's items: one immutable pair.

Station: from (user, history, context) to the query, dense and sparse. It does not follow versions (`versions`), and
does not search (`search`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from trainer.contract import (
    QUERY_TOWER_FILE,
    Manifest,
    covisit_query,
    covisit_weight,
    load_manifest,
    model_version_of,
    query_vector,
    version_directory,
)
from trainer.towers import QueryTower, TowerConfig, load_query_tower, query_inputs

UInt64Array = npt.NDArray[np.uint64]
ContextValue = str | int | float | bool | None


class VersionError(Exception):
    """A published version that cannot be served: says which, and why."""


@dataclass(frozen=True)
class Query:
    """What is searched for: score = dense · item + covisit_weight · ln(1 + sparse · item)."""

    dense: list[float]
    """[embedding_dim + popularity_dims]"""
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

    def encode(
        self,
        user_hash: int | None,
        history: UInt64Array,
        context: Mapping[str, ContextValue],
        popularity: float,
    ) -> Query:
        """The query in the version's terms: see `trainer.contract`.

        Args:
            user_hash: `streams.contract.hash_id` of the user's id; None: nobody in particular.
            history: uint64 [h] item hashes, newest last; may be empty.
            context: features by name; those that the towers do not know are not looked at.
            popularity: factor on the popularity weights, −1 … 2.
        """
        inputs = query_inputs(
            self.config,
            np.array([user_hash or 0], np.uint64),
            history,
            np.array([0, len(history)], np.int64),
            {name: [value] for name, value in context.items()},
        )
        if user_hash is None:  # a row of weight 0 is no user; without `use_user_id` there is none anyway
            inputs.users.weights.zero_()
        with torch.inference_mode():
            embedding = self.tower(inputs)[0]
        length = len(history)
        indices, values = covisit_query(self.manifest, history.tolist())
        return Query(
            dense=query_vector(self.manifest, embedding.tolist(), popularity, length),
            indices=indices,
            values=values,
            covisit_weight=covisit_weight(self.manifest, length) if indices else 0.0,
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
    tower.eval().requires_grad_(False)
    return ServedVersion(collection, manifest, config, tower)
