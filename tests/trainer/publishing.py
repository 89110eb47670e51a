"""A publisher with a catalogue and a learner of its own, driven by hand, for tests on any Qdrant endpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from qdrant_client import QdrantClient, models

from streams.contract import hash_ids
from tests.trainer.small_trainer import CONFIG, TRAINING
from trainer.catalogue import Catalogue
from trainer.covisit import Covisit
from trainer.index import Index, new_client
from trainer.item_events import ItemChange
from trainer.metrics import Metrics
from trainer.model import Model
from trainer.progress import Progress
from trainer.publish import Publisher
from trainer.rollout import PublishSettings, Rollout
from trainer.score import ServedScore
from trainer.step import Learner
from trainer.towers import ItemFeatures
from trainer.versions import Versions

DEADLINE_SECONDS = 60.0
SETTINGS = PublishSettings(publish_batch_points=4, settings_hash="abc")


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Publishing:
    """A publisher with its own catalogue and learner, driven by hand."""

    url: str
    alias: str
    model_dir: Path
    settings: PublishSettings = SETTINGS
    attempts: int = 1
    timeout_seconds: int = 10
    expire_clicks: int = 0
    index_class: type[Index] = Index
    progress: Progress = field(default_factory=Progress)
    metrics: Metrics = field(default_factory=Metrics)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.client: QdrantClient = new_client(self.url, None, self.timeout_seconds)
        stopping = threading.Event()
        self.index = self.index_class(
            self.client,
            self.alias,
            attempts=self.attempts,
            on_retry=self.metrics.qdrant_retries.inc,
            stopping=stopping,
        )
        self.catalogue = Catalogue(
            ItemFeatures(CONFIG),
            embedding_dim=CONFIG.embedding_dim,
            half_life_clicks=100,
            further_half_lives=[10.0],
            expire_clicks=self.expire_clicks,
        )
        self.learner = Learner(CONFIG, TRAINING, self.catalogue.inputs)
        with torch.no_grad():  # as if it had been learnt
            for parameter in self.learner.query_tower.leaning.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        self.rollout = Rollout(self.index, Versions(self.model_dir), self.settings, self.clock, self.clock)
        self.score = ServedScore(2)
        self.score.weights = np.array([[1.3, 0.2], [0.7, -0.1], [0.4, 0.3], [0.9, 0.25]])
        self.covisit = Covisit(8)
        self.model = Model(self.catalogue, self.learner, score=self.score, covisit=self.covisit)
        self.publisher = Publisher(self.rollout, self.model, self.progress, self.metrics, stopping=stopping)

    def click(self, *item_ids: str) -> None:
        self.progress.step += 1
        before = self.catalogue.clicks_counted
        rows = self.catalogue.admit(hash_ids(item_ids), item_ids, self.progress.step)
        self.catalogue.count(rows)
        self.covisit.extend(len(self.catalogue))
        # As if one user had clicked them all.
        offsets = np.cumsum([0, *range(len(rows))])
        self.covisit.count(rows, np.concatenate([rows[:n] for n in range(len(rows))]), offsets)
        self.catalogue.embed(np.unique(rows), self.learner.embed_items)
        self.catalogue.expire(before, self.progress.step)

    def take(self, *changes: ItemChange) -> None:
        self.progress.step += 1
        self.catalogue.embed(self.catalogue.take(changes, self.progress.step), self.learner.embed_items)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "nothing more happens"
            self.publisher.advance()
            time.sleep(0.002)

    def settle(self) -> None:
        """Lets time pass until the live version has all that is known."""
        self.clock.now += SETTINGS.publish_interval_seconds
        self.until(lambda: self.publisher.idle)

    def renew(self) -> None:
        """Lets time pass until the next version is live."""
        before = self.live
        self.clock.now += 1_000.0
        self.until(lambda: self.live != before and self.publisher.idle)

    @property
    def live(self) -> int | None:
        return self.publisher.live.number if self.publisher.live else None

    def collection(self) -> str:
        (name,) = (a.collection_name for a in self.client.get_aliases().aliases if a.alias_name == self.alias)
        return str(name)

    def points(self, collection: str | None = None) -> dict[str, models.Record]:
        records, _ = self.client.scroll(collection or self.collection(), limit=1_000, with_vectors=True)
        return {record.payload["item_id"]: record for record in records if record.payload}

    def collections(self) -> list[str]:
        names = [c.name for c in self.client.get_collections().collections]
        return sorted(name for name in names if name.startswith(self.alias))

    def value(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(f"streamtower_trainer_{name}", labels)
        assert found is not None, name
        return found


@contextmanager
def publishings(url: str, alias: str, model_dir: Path) -> Iterator[Callable[..., Publishing]]:
    """Makes publishers on this endpoint, or another `url`, and closes them at the end."""
    made: list[Publishing] = []

    def make(url: str = url, **values: object) -> Publishing:
        made.append(Publishing(url, alias, model_dir, **values))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for publishing in made:
            publishing.publisher.close()
            publishing.client.close()
