"""What is learnt from clicks, as one thing: towers, catalogue, and the test before each learning.

Station: inside the loop, and inside every replay of clicks that has no Kafka: a micro-batch goes in, all parts have
learnt it, what was foreseen of it comes out. It reads no source, saves nothing and publishes nothing; `step` numbers
come from its caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from streams.contract import MicroBatch
from trainer.catalogue import Catalogue
from trainer.evaluate import Prequential, Ranks
from trainer.item_events import ItemChange
from trainer.rewards import task_rewards
from trainer.settings import TrainerSettings
from trainer.step import Clicks, Learner, StepResult
from trainer.towers import ItemFeatures, QueryInputs, TowerConfig, query_inputs
from trainer.training import TrainingConfig

Stage = Callable[[str], AbstractContextManager[object]]
"""Called with "evaluate", "learn" and "touch": measures the time within."""


@dataclass(frozen=True)
class Learnt:
    """What one micro-batch gave."""

    result: StepResult
    ranks: Ranks | None
    """Of the clicks that were tested, in their order; None: none were."""


@dataclass
class Model:
    """Parts that belong together. Everything that `learn` changes is in the state of its parts."""

    catalogue: Catalogue
    learner: Learner
    evaluation: Prequential | None = None

    def embed_all(self) -> None:
        """Gives every item its embedding: after a load, and whenever all items' embeddings shall be fresh."""
        self.catalogue.embed(np.arange(len(self.catalogue)), self.learner.embed_items)

    def take(self, changes: Sequence[ItemChange], step: int) -> None:
        """Takes item changes: see `Catalogue.take`."""
        self.catalogue.embed(self.catalogue.take(changes, step), self.learner.embed_items)

    def learn(self, batch: MicroBatch, step: int, stage: Stage = lambda name: nullcontext()) -> Learnt:
        """Tests, learns and counts the clicks of a micro-batch, each of them once.

        Args:
            batch: at least one row, none of which was learnt before.
            step: the caller's rising count of changes; what the micro-batch touches is marked with it.
            stage: measures the time of the parts.

        Raises:
            NonFiniteError: the loss or a gradient is not finite.
        """
        query = self._query(batch)
        with stage("evaluate"):
            ranks = self._evaluate(batch, query)
        with stage("learn"):
            rows = self.catalogue.admit(batch.item_hash, batch.item_id, step)
            log_q, histories = np.log(batch.sampling_probability), (batch.history_values, batch.history_offsets)
            rewards = task_rewards(self.learner.config.tasks, batch.reward, batch.context)
            result = self.learner.learn(Clicks(query, batch.item_hash, rewards, log_q, *histories))
        with stage("touch"):
            self.catalogue.count(rows)
            self.catalogue.embed(np.unique(rows), self.learner.embed_items)
        return Learnt(result, ranks)

    def test(self, batch: MicroBatch) -> Ranks | None:
        """What is foreseen of a micro-batch, which is not learnt; None: there is no item yet, or nothing is tested."""
        return self._evaluate(batch, self._query(batch))

    def _query(self, batch: MicroBatch) -> QueryInputs:
        config = self.learner.config
        context = {f.name: batch.context[f.name].to_pylist() for f in config.context if f.name in batch.context}
        return query_inputs(config, batch.user_hash, batch.history_values, batch.history_offsets, context)

    def _evaluate(self, batch: MicroBatch, query: QueryInputs) -> Ranks | None:
        if self.evaluation is None or not self.catalogue.num_items:
            return None
        queries, items = self.learner.embed_queries(query), self.catalogue.embedding
        target, histories = self.catalogue.find(batch.item_hash), self.catalogue.find(batch.history_values)
        popularity, offsets = self.catalogue.popularity(), batch.history_offsets
        return self.evaluation.observe(queries, items, popularity, target, histories, offsets)


def new_model(settings: TrainerSettings) -> Model:
    """A model that has learnt nothing.

    Raises:
        ValueError: what the towers or the training refuse, one a line.
    """
    config, training = TowerConfig.from_dict(settings.towers()), TrainingConfig(**settings.training())
    catalogue = Catalogue(
        ItemFeatures(config),
        embedding_dim=config.embedding_dim,
        half_life_clicks=settings.log_q_half_life_clicks,
        uniform_ratio=settings.uniform_ratio,
        max_items=settings.max_items,
    )
    evaluation = Prequential(
        config.temperature,
        settings.popularity_weight,
        window=settings.evaluation_window_clicks,
        exclude_history=settings.exclude_history,
        rows_per_batch=settings.evaluation_rows,
        seed=settings.seed,
    ) if settings.evaluation_rows else None  # fmt: skip
    learner = Learner(config, training, catalogue.inputs, lambda: (catalogue.item_hash, catalogue.popularity()))
    return Model(catalogue, learner, evaluation)
