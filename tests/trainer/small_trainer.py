"""A small trainer for tests: real parts, tiny tables, no Kafka; a publisher of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams.contract import MicroBatch
from tests.trainer.list_source import ListSource
from trainer.catalogue import Catalogue
from trainer.checkpoint import Checkpoints
from trainer.covisit import Covisit
from trainer.evaluate import Prequential
from trainer.freshness import Freshness
from trainer.guard import Guard
from trainer.item_events import ItemChange
from trainer.loop import Loop
from trainer.metrics import Metrics
from trainer.model import Model
from trainer.progress import Progress
from trainer.score import ServedScore
from trainer.step import Learner
from trainer.towers import Feature, ItemFeatures, TowerConfig
from trainer.training import TrainingConfig

CONFIG = TowerConfig(
    embedding_dim=8,
    row_dim=8,
    item_rows=512,
    user_rows=64,
    feature_rows=64,
    use_user_id=True,
    popularity_dims=2,
    context=(Feature("device", "categorical"),),
    item=(Feature("brand", "categorical"), Feature("price", "number")),
)
TRAINING = TrainingConfig(rows_per_step=8, recent_negatives=8, recent_window=40, seed=3)
IDENTITY = {"towers": CONFIG.to_dict(), "seed": 3}


class SilentPublisher:
    """Publishes nothing; counts how often it was asked."""

    def __init__(self, metrics: Metrics) -> None:
        self.freshness = Freshness(metrics)
        self.num_advances = 0

    def without_canary(self, batch: MicroBatch) -> MicroBatch | None:
        return batch

    def advance(self, num_waiting: int = 0) -> None:
        self.num_advances += 1

    def close(self) -> None:
        pass


@dataclass
class Trainer:
    """The parts of one trainer, as a checkpoint in `directory` had them, or new."""

    directory: Path
    entries: Iterable[MicroBatch | list[ItemChange]] = ()
    interval: float = 1e9
    evaluate: bool = True
    max_items: int = 1_000
    admit_clicks: int = 1
    expire_clicks: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    guard: Guard | None = None

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.directory, IDENTITY, self.metrics, interval_seconds=self.interval)
        self.catalogue = Catalogue(
            ItemFeatures(CONFIG),
            embedding_dim=CONFIG.embedding_dim,
            half_life_clicks=100,
            further_half_lives=[20.0],
            max_items=self.max_items,
            admit_clicks=self.admit_clicks,
            expire_clicks=self.expire_clicks,
        )
        self.learner = Learner(CONFIG, TRAINING, self.catalogue.inputs)
        self.evaluation = Prequential() if self.evaluate else None
        self.model = Model(
            self.catalogue,
            self.learner,
            self.evaluation,
            ServedScore(2),
            Covisit(8, window=3, history_length=CONFIG.history_length),
            tested_rows=8,
            refresh_clicks=5,
        )
        self.progress = self.checkpoints.restore(self.model) or Progress()
        self.source: Any = ListSource(self.entries)
        self.publisher: Any = SilentPublisher(self.metrics)

    def run(self, stop: threading.Event | None = None) -> None:
        """The loop, to the end of the entries."""
        self.loop().run(stop or threading.Event())
        self.checkpoints.close()

    def loop(self) -> Loop:
        """The loop of these parts."""
        return Loop(
            self.source,
            self.model,
            self.checkpoints,
            self.publisher,
            self.progress,
            self.metrics,
            self.guard or Guard(self.metrics),
        )

    def value(self, name: str, **labels: str) -> float:
        """A metric's value, by its name without the stem."""
        found = self.metrics.registry.get_sample_value(f"streamtower_trainer_{name}", labels)
        assert found is not None, name
        return found
