"""What is learnt from clicks, as one thing: towers, catalogue, co-visitation, the weights of the served score, and the
test before each learning.

Station: inside the loop, and inside every replay of clicks that has no Kafka: a micro-batch goes in, all parts have
learnt it, what was foreseen of it comes out. It reads no source, saves nothing and publishes nothing; `step` numbers
come from its caller.

A micro-batch is gone through in parts of `refresh_clicks` clicks: each is scored with the counts (popularity,
co-visitation) and weights from before it, and then counted. The towers learn the micro-batch as a whole after that.

Shapes: B clicks of a part that are scored, N known items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from streams.contract import MicroBatch
from trainer.catalogue import Catalogue
from trainer.columns import Changes, Column
from trainer.covisit import Covisit
from trainer.evaluate import Prequential, Ranks, excluded_pairs
from trainer.features import Float32Array, bag_offsets, ranges
from trainer.item_events import ItemChange
from trainer.leaning import PopularityBefore
from trainer.rewards import task_rewards
from trainer.score import ServedScore
from trainer.settings import TrainerSettings
from trainer.step import Clicks, Learner, StepResult
from trainer.towers import ItemFeatures, QueryInputs, TowerConfig, query_inputs
from trainer.training import TrainingConfig

COVISIT_DECAY = 0.9
"""Weight of a history item relative to the next newer one, in co-visitation scores."""
WEIGHED_ROWS = 16
"""Clicks of each micro-batch that the weights of the score learn from."""
MOST_ITEMS = 1 << 14
"""Of more items, not every micro-batch is weighed and tested, but one in items / `MOST_ITEMS` by chance, so that a
large catalogue does not hold up learning: many clicks of one micro-batch share a pass over all items."""
MOST_SCORES = WEIGHED_ROWS * MOST_ITEMS
"""Clicks × items of a micro-batch: `WEIGHED_ROWS` clicks are tested at most if it would be more."""
RENEWED_PER_CLICK = 1
"""Items that were not clicked and have their embeddings made anew, in turn, for each click."""

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
    """What is learnt does not depend on it."""
    score: ServedScore = field(default_factory=lambda: ServedScore(1, covisit_weight=0.0, adapts=False))
    """Of as many popularity features as the catalogue has half-lives."""
    covisit: Covisit | None = None
    exclude_history: bool = True
    """Whether items of a click's history are no candidates. A click on one of them is then a miss."""
    tested_rows: int | None = None
    """Most clicks of a micro-batch that are tested, drawn at random, but see `MOST_ITEMS`; None: all of them."""
    refresh_clicks: int = 64

    def __post_init__(self) -> None:
        if self.covisit is not None:
            self.catalogue.on_keep = self.covisit.keep

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
        query, frequencies = self._query(batch), None
        if self.learner.config.popularity_dims:
            frequencies = PopularityBefore(self.catalogue, batch.item_hash)
        weighed, tested = self._drawn(len(batch))
        ranks: list[Ranks] = []
        for start in range(0, len(batch), self.refresh_clicks):
            part = slice(start, min(start + self.refresh_clicks, len(batch)))
            with stage("evaluate"):
                ranks += self._foresee(batch, query, part, weighed, tested)
            with stage("touch"):
                self._count(batch, part, step)
        with stage("learn"):
            log_q, histories = np.log(batch.sampling_probability), (batch.history_values, batch.history_offsets)
            rewards = task_rewards(self.learner.config.tasks, batch.reward, batch.context)
            result = self.learner.learn(Clicks(query, batch.item_hash, rewards, log_q, *histories), frequencies)
        with stage("touch"):
            rows = np.unique(self.catalogue.find(batch.item_hash))
            in_turn = self.catalogue.embeddings.take_turn(RENEWED_PER_CLICK * len(batch))
            self.catalogue.embed(np.union1d(rows[rows >= 0], in_turn), self.learner.embed_items)
        return Learnt(result, _joined(ranks))

    def test(self, batch: MicroBatch, popularity: float = 1.0) -> Ranks | None:
        """What is foreseen of a micro-batch, which is not learnt, by requests with this factor on popularity; None:
        there is no item yet, or nothing is tested."""
        nothing = np.zeros(len(batch), np.bool_)
        _, tested = self._drawn(len(batch))
        return _joined(self._foresee(batch, self._query(batch), slice(0, len(batch)), nothing, tested, popularity))

    @property
    def changes(self) -> dict[str, Changes]:
        """Name in the state → which rows have changed since a checkpoint took them, of the columns of tables."""
        return {
            f"{stem}.{name}": change
            for stem, part in (("learner", self.learner), ("catalogue", self.catalogue), ("covisit", self.covisit))
            if part is not None
            for name, change in part.changes.items()
        }

    def state_dict(self) -> dict[str, Column]:
        """All that is needed to go on, by name; the parts' own columns, to be copied before anything changes."""
        parts: dict[str, Mapping[str, Column]] = {
            "learner": {name: tensor.numpy() for name, tensor in self.learner.state_dict().items()},
            "catalogue": self.catalogue.state_dict(),
            "score": self.score.state_dict(),
            "covisit": {} if self.covisit is None else self.covisit.state_dict(),
            # Always there, so that checkpoints with and without it are of the same columns.
            "evaluation": (self.evaluation or Prequential(window=1)).state_dict(),
        }
        return {f"{stem}.{name}": column for stem, part in parts.items() for name, column in part.items()}

    def load_state_dict(self, state: dict[str, Column]) -> None:
        """Takes over what `state_dict` gave, into a model that has learnt nothing.

        Raises:
            ValueError: it is of another configuration.
        """
        parts: dict[str, dict[str, Any]] = {
            name: {} for name in ("learner", "catalogue", "score", "covisit", "evaluation")
        }
        for key, column in state.items():
            stem, _, name = key.partition(".")
            parts[stem][name] = column
        self.learner.load_state_dict({name: torch.from_numpy(array) for name, array in parts["learner"].items()})
        self.catalogue.load_state_dict(parts["catalogue"])
        self.score.load_state_dict(parts["score"])
        if self.covisit is not None and parts["covisit"]:
            self.covisit.load_state_dict(parts["covisit"])
        if self.evaluation is not None:
            self.evaluation.load_state_dict(parts["evaluation"])

    def _query(self, batch: MicroBatch) -> QueryInputs:
        config = self.learner.config
        context = {f.name: batch.context[f.name].to_pylist() for f in config.context if f.name in batch.context}
        return query_inputs(config, batch.user_hash, batch.history_values, batch.history_offsets, context)

    def _drawn(self, num_rows: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which rows the weights learn from, and which are tested; the first does not depend on the second.

        As many as can be come from one part, drawn at random: a part in which nothing is drawn costs no pass over all
        items. Of a large catalogue most micro-batches have none.
        """
        random = np.random.default_rng([self.learner.training.seed, self.learner.num_steps, 2])
        of_part = np.arange(num_rows) // self.refresh_clicks
        elsewhere = of_part != of_part[random.integers(num_rows)]
        place = np.empty(num_rows, np.int64)
        place[np.lexsort((random.random(num_rows), elsewhere))] = np.arange(num_rows)
        num_items = max(1, len(self.catalogue))
        most = max(WEIGHED_ROWS, MOST_SCORES // num_items) if random.random() * num_items < MOST_ITEMS else 0
        tested_rows = num_rows if self.tested_rows is None else min(self.tested_rows, most)
        weighed = place < (min(WEIGHED_ROWS, most) if self.score.adapts else 0)
        return weighed, place < (tested_rows if self.evaluation is not None else 0)

    def _foresee(
        self,
        batch: MicroBatch,
        query: QueryInputs,
        part: slice,
        weighed: npt.NDArray[np.bool_],
        tested: npt.NDArray[np.bool_],
        factor: float = 1.0,
    ) -> list[Ranks]:
        """Scores the drawn clicks of a part; their ranks if they are tested; the weights have learnt from them."""
        rows = part.start + np.flatnonzero((weighed | tested)[part])
        catalogue = self.catalogue
        if not len(rows) or not catalogue.num_items:
            if self.evaluation is None or not (num_tested := np.count_nonzero(tested[part])):
                return []
            nothing, unknown = np.zeros((num_tested, 0), np.float32), np.full(num_tested, -1)
            return [self.evaluation.observe(nothing, nothing[0], unknown, np.zeros((0, 2), np.int64))]
        lengths = np.diff(batch.history_offsets)[rows]
        histories = catalogue.find(batch.history_values[ranges(batch.history_offsets[rows], lengths)])
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        target = catalogue.find(batch.item_hash[rows])
        excluded = excluded_pairs(histories, offsets) if self.exclude_history else np.zeros((0, 2), np.int64)
        popularity = catalogue.popularity_features()
        alone = np.where(catalogue.deleted, np.float32(-np.inf), popularity[:, 0])
        if factor != 1:
            popularity *= np.float32(factor)
        logits = self._logits(query.take(rows), popularity)
        covisit = self.covisit.scores(histories, offsets, len(catalogue)) if self.covisit is not None else None
        known = np.minimum(lengths, self.learner.config.history_length)
        scores = self.score.combine(logits, popularity, covisit, known)
        if catalogue.num_deleted:
            scores[:, catalogue.deleted] = -np.inf
        scores[excluded[:, 0], excluded[:, 1]] = -np.inf
        ranks = []
        if self.evaluation is not None and (of := tested[rows]).any():
            places = np.cumsum(of) - 1
            pairs = excluded[of[excluded[:, 0]]]
            pairs = np.stack([places[pairs[:, 0]], pairs[:, 1]], axis=1)
            ranks.append(self.evaluation.observe(_rows(scores, of), alone, target[of], pairs))
        if (of := weighed[rows]).any():
            some = None if covisit is None else _rows(covisit, of)
            self.score.learn(_rows(logits, of), popularity, some, known[of], _rows(scores, of), target[of])
        return ranks

    def _logits(self, query: QueryInputs, popularity: Float32Array) -> Float32Array:
        """What the towers say of all items: float32 [B, N]."""
        config = self.learner.config
        answer = torch.from_numpy(self.learner.embed_queries(query))
        embedding, leaning = answer.split([config.embedding_dim, config.popularity_dims], dim=1)
        logits = (embedding / config.temperature) @ torch.from_numpy(self.catalogue.embedding).T
        if config.popularity_dims:
            logits.addmm_(leaning, torch.from_numpy(popularity).T)
        return logits.numpy()  # type: ignore[no-any-return]

    def _count(self, batch: MicroBatch, part: slice, step: int) -> None:
        catalogue, counted_before = self.catalogue, self.catalogue.clicks_counted
        rows = catalogue.admit_clicked(batch.item_hash[part], batch.item_id[part], step)
        of_clicks = part.start + np.flatnonzero(rows >= 0)
        rows = rows[rows >= 0]
        catalogue.count(rows)
        if self.covisit is not None:
            lengths = np.diff(batch.history_offsets)[of_clicks]
            histories = catalogue.find(batch.history_values[ranges(batch.history_offsets[of_clicks], lengths)])
            self.covisit.extend(len(catalogue))
            self.covisit.count(rows, histories, bag_offsets(lengths))
        catalogue.expire(counted_before, step)


def _rows(array: Float32Array, which: npt.NDArray[np.bool_]) -> Float32Array:
    """These rows; the array itself where they are all."""
    return array if which.all() else array[which]


def _joined(ranks: list[Ranks]) -> Ranks | None:
    if not ranks:
        return None
    names = ("rank", "popularity_rank", "best")
    return Ranks(**{name: np.concatenate([getattr(part, name) for part in ranks]) for name in names})


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
        further_half_lives=settings.further_half_lives_clicks,
        uniform_ratio=settings.uniform_ratio,
        max_items=settings.max_items,
        admit_clicks=settings.admit_clicks,
        expire_clicks=settings.expire_clicks,
    )
    evaluation = Prequential(window=settings.evaluation_window_clicks) if settings.evaluation_rows else None
    learner = Learner(config, training, catalogue.inputs, lambda: (catalogue.item_hash, catalogue.popularity()))
    score = ServedScore(
        1 + len(settings.further_half_lives_clicks),
        popularity_weight=settings.popularity_weight,
        covisit_weight=settings.covisit_weight if settings.covisit else 0.0,
        covisit_scale=settings.covisit_scale,
        adapts=settings.adapt_weights,
    )
    covisit = Covisit(
        settings.covisit_partners,
        window=settings.covisit_window,
        half_life_clicks=settings.covisit_half_life_clicks or math.inf,
        history_length=config.history_length,
        history_decay=COVISIT_DECAY,
    ) if settings.covisit else None  # fmt: skip
    return Model(
        catalogue,
        learner,
        evaluation,
        score,
        covisit,
        exclude_history=settings.exclude_history,
        tested_rows=settings.evaluation_rows,
        refresh_clicks=settings.refresh_clicks,
    )
