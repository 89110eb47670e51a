"""Small versions, published by hand through the contracts, and what a right answer from them is (plain numpy)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from qdrant_client import QdrantClient, models

from streams.contract import hash_id, hash_ids
from trainer.contract import (
    COVISIT,
    DENSE,
    ITEM_ID,
    MANIFEST_FILE,
    QUERY_TOWER_FILE,
    STEP,
    Manifest,
    collection_name,
    version_directory,
)
from trainer.towers import Feature, QueryTower, TowerConfig, build_towers, query_inputs, save_query_tower

CONFIG = TowerConfig(
    embedding_dim=8,
    row_dim=8,
    item_rows=2**12,
    user_rows=2**10,
    feature_rows=2**10,
    history_length=5,
    use_user_id=True,
    popularity_dims=1,
    use_history_length=True,
    context=(Feature("device", "categorical"), Feature("hour", "number"), Feature("watching", "item")),
)
POPULARITY_SCALE = 20.0
POPULARITY_WEIGHT = 1.2
WEIGHTS: dict[str, Any] = {
    "popularity_weights": [POPULARITY_WEIGHT],
    "popularity_slopes": [0.1],
    "embedding_weight": 0.7,
    "embedding_slope": 0.2,
    "covisit_weight": 0.6,
    "covisit_slope": -0.1,
    "covisit_scale": 0.3,
    "covisit_decay": 0.8,
}


@dataclass(frozen=True)
class Published:
    """A version as it was published: everything that a right answer can be computed from."""

    manifest: Manifest
    tower: QueryTower
    config: TowerConfig
    item_ids: list[str]
    vectors: np.ndarray
    """float32 [n, embedding_dim + 1]"""
    covisits: np.ndarray
    """float32 [n, n] item, partner: 0 where they were never clicked together."""

    def scores(
        self,
        *,
        user_id: str | None = None,
        history: Sequence[str] = (),
        context: Mapping[str, str | float] | None = None,
        popularity: float = 1.0,
        covisit_weighed: bool = True,
    ) -> dict[str, float]:
        """Item id → score: a · cosine / temperature + popularity · (w + a · leaning) · log-frequency +
        b · ln(1 + covisit), from the formula's parts."""
        inputs = query_inputs(
            self.config,
            np.array([hash_id(user_id or "nobody")], np.uint64),
            hash_ids(history),
            np.array([0, len(history)], np.int64),
            {name: [value] for name, value in (context or {}).items()},
        )
        if user_id is None:
            inputs.users.weights.zero_()
        with torch.no_grad():
            query = self.tower(inputs)[0].numpy().astype(np.float64)
        dim = self.config.embedding_dim
        newest = list(history)[::-1][: self.config.history_length]
        known = np.log(1 + len(newest)) - 1.5
        towers = 0.7 + 0.2 * known
        affinity = towers * self.vectors[:, :dim] @ query[:dim] / self.config.temperature
        leaning = query[dim] if self.config.popularity_dims else 0.0
        log_frequency = self.vectors[:, dim] * POPULARITY_SCALE
        weights = 0.8 ** np.arange(len(newest)) / (0.8 ** np.arange(len(newest))).sum()
        covisit = np.zeros(len(self.item_ids))
        for item, weight in zip(newest, weights, strict=True):
            if item in self.item_ids:
                covisit += 0.3 * weight * self.covisits[:, self.item_ids.index(item)]
        score = affinity + popularity * (POPULARITY_WEIGHT + 0.1 * known + towers * leaning) * log_frequency
        if covisit_weighed:
            score += (0.6 - 0.1 * known) * np.log1p(covisit)
        return dict(zip(self.item_ids, score.tolist(), strict=True))

    def best(self, k: int, *, without: Sequence[str] = (), **query: object) -> list[tuple[str, float]]:
        """The k items of the highest score, best first."""
        scores = self.scores(**query)  # type: ignore[arg-type]
        left = [(item, score) for item, score in scores.items() if item not in without]
        return sorted(left, key=lambda pair: -pair[1])[:k]


@dataclass
class Publisher:
    """Does what the trainer does at a full publish, in little."""

    client: QdrantClient
    alias: str
    model_dir: Path
    kept: list[str] = field(default_factory=list)

    def publish(
        self,
        model_version: int,
        *,
        num_items: int = 60,
        config: TowerConfig = CONFIG,
        item_stem: str = "item",
        switch: bool = True,
        length: float = 0.0,
    ) -> Published:
        """Writes tower and Manifest, fills the collection, and switches the alias to it.

        `length`: of all vectors, as in a version with a graph; 0: each has its own.
        """
        random = np.random.default_rng(model_version)
        tower, _ = build_towers(config, seed=model_version)
        tower.tables.users.normal_(generator=torch.Generator().manual_seed(model_version))  # as if they had been learnt
        if config.popularity_dims:
            torch.nn.init.normal_(tower.leaning.bias, generator=torch.Generator().manual_seed(model_version))
            torch.nn.init.normal_(tower.leaning.weight, generator=torch.Generator().manual_seed(model_version))
        item_ids = [f"{item_stem}-{number}" for number in range(num_items)]
        embeddings = random.normal(size=(num_items, config.embedding_dim))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        log_frequency = -5 * random.random((num_items, 1))
        vectors = np.hstack([embeddings, log_frequency / POPULARITY_SCALE]).astype(np.float32)
        covisits = np.where(random.random((num_items, num_items)) < 0.2, 20 * random.random((num_items, num_items)), 0)
        np.fill_diagonal(covisits, 0)
        lacking = np.sqrt(length**2 - (vectors**2).sum(1, keepdims=True)) if length else vectors[:, :0]
        sent = np.hstack([vectors, lacking]).astype(np.float32)
        collection = collection_name(self.alias, model_version)
        manifest = Manifest(
            model_version=model_version,
            collection=collection,
            embedding_dim=config.embedding_dim,
            popularity_dims=1,
            length_dims=int(length > 0),
            popularity_scale=POPULARITY_SCALE,
            **WEIGHTS,
            history_length=config.history_length,
            temperature=config.temperature,
            towers=config.to_dict(),
            num_items=num_items,
            step=100 * model_version,
            source_offsets={0: 10 * model_version},
            settings_hash="by hand",
            created_at=time.time(),
        )
        self.write(manifest, tower)
        self.client.create_collection(
            collection,
            vectors_config={DENSE: models.VectorParams(size=sent.shape[1], distance=models.Distance.DOT)},
            sparse_vectors_config={COVISIT: models.SparseVectorParams()},
        )
        self.client.create_payload_index(collection, STEP, models.PayloadSchemaType.INTEGER)
        self.client.upsert(
            collection,
            [
                models.PointStruct(
                    id=hash_id(item),
                    vector={
                        DENSE: vector.tolist(),
                        COVISIT: models.SparseVector(
                            indices=[
                                hash_id(item_ids[other]) & 0xFFFFFFFF for other in np.flatnonzero(covisits[number])
                            ],
                            values=covisits[number][covisits[number] > 0].tolist(),
                        ),
                    },
                    payload={
                        ITEM_ID: item,
                        STEP: manifest.step,
                        "parity": "even" if number % 2 == 0 else "odd",
                        "n": number,
                    },
                )
                for number, (item, vector) in enumerate(zip(item_ids, sent, strict=True))
            ],
            wait=True,
        )
        if switch:
            self.switch_to(model_version)
        return Published(manifest, tower, config, item_ids, vectors, covisits)

    def write(self, manifest: Manifest, tower: QueryTower) -> Path:
        """The version's directory, the Manifest last."""
        directory = version_directory(self.model_dir, manifest.model_version)
        directory.mkdir(parents=True, exist_ok=True)
        save_query_tower(directory / QUERY_TOWER_FILE, tower)
        (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
        return directory

    def switch_to(self, model_version: int) -> None:
        """Points the alias at the version, atomically."""
        create = models.CreateAliasOperation(
            create_alias=models.CreateAlias(
                collection_name=collection_name(self.alias, model_version), alias_name=self.alias
            )
        )
        delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self.alias))
        self.client.update_collection_aliases([delete, create])

    def remove(self, model_version: int) -> None:
        """Deletes the version's collection."""
        self.client.delete_collection(collection_name(self.alias, model_version))
