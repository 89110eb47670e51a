"""CORE: learning — clicks in, one optimizer step or several, all or nothing each.

Station: the loop gives it the rows of a micro-batch that were not learnt yet; its towers' embeddings go into the index.
The loop calls `Learner.learn`, which cuts a micro-batch into steps; `Learner.step` is one of them. It reads no stream,
holds no catalogue (it asks `item_inputs` for the inputs of an item) and sets no thread count: the process does, once,
at its start, with `torch.set_num_threads` (1 is the fastest for steps of this size).

Where it departs from the paper: see there; besides, negatives from recent clicks join those of the batch (cross-batch
negative sampling), items of the row's history are no negatives, and rows and dense layers have learning rates of their
own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.columns import Changes
from trainer.features import Bags, Float32Array, Int64Array, ItemInputs, QueryInputs, TowerConfig, UInt64Array, ranges
from trainer.negatives import candidate_mask
from trainer.towers import Tables, build_towers
from trainer.training import Candidates, TrainingConfig, batch_loss

_EPSILON = 1e-10


LogFrequencies = Callable[[UInt64Array], Float32Array]
"""uint64 [n] hashes of items → float32 [n, P] logs of their shares of the clicks, as the half-lives see them."""
KnownItems = tuple[UInt64Array, Float32Array]
"""The catalogue's items: uint64 [M] their hashes, float32 [M] log of their shares of the clicks, −inf: not served."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is not finite, or the gradient's square overflows; nothing was changed."""


@dataclass(frozen=True)
class Clicks:
    """B clicks to learn from: the rows of a micro-batch."""

    query: QueryInputs
    """[B] what was known before each click."""
    item_hash: UInt64Array
    """[B] the clicked items."""
    reward: Float32Array
    """[B] or, with tasks, [B, T]: ≥ 0, in the order of `TowerConfig.tasks`."""
    log_q: Float32Array
    """[B] log of the items' sampling probabilities, up to a constant."""
    history_values: UInt64Array
    """[h] item hashes of all histories, one after the other."""
    history_offsets: Int64Array
    """[B + 1] click i's history is history_values[history_offsets[i]:history_offsets[i + 1]]."""

    def __len__(self) -> int:
        return len(self.item_hash)

    def take(self, indices: Int64Array) -> Clicks:
        """These clicks, in this order."""
        lengths = np.diff(self.history_offsets)[indices]
        return Clicks(
            query=self.query.take(indices),
            item_hash=self.item_hash[indices],
            reward=self.reward[indices],
            log_q=self.log_q[indices],
            history_values=self.history_values[ranges(self.history_offsets[:-1][indices], lengths)],
            history_offsets=np.concatenate(([0], np.cumsum(lengths))),
        )


@dataclass(frozen=True)
class StepResult:
    """What was learnt: of one step, or of all steps of a micro-batch."""

    loss: float
    """Mean over the rows, from before each step's update."""
    num_rows: int
    num_steps: int = 1
    gradient_norm: float = 0.0
    """Length of the gradient of all that the step changes; of several steps, the longest."""
    weight_norm: float = 0.0
    """Length, after the step, of the longest table row that it changed, or of a layer's weights if longer; of several
    steps, the longest. NaN if any is none."""


class Learner:
    """Towers with their optimizer and the recent clicks; the same clicks after the same seed give the same bits."""

    def __init__(
        self,
        config: TowerConfig,
        training: TrainingConfig,
        item_inputs: Callable[[UInt64Array], ItemInputs],
        known_items: Callable[[], KnownItems] | None = None,
    ) -> None:
        """New towers.

        Args:
            config: shape of the towers.
            training: how they learn.
            item_inputs: the catalogue's answer for item hashes uint64 [n]: the inputs of n items, in this order. It
                must answer for any hash: an item that it does not know (any more) has its id alone, which is what
                `ItemFeatures.gather` gives for index −1.
            known_items: the catalogue's items; asked once for each micro-batch, and only if the training needs them.

        Raises:
            ValueError: the training needs the catalogue's items and has no way to them.
        """
        if training.needs_catalogue and known_items is None:
            raise ValueError("uniform_negatives and the loss gbce need a catalogue")
        self._known_items = known_items
        self.config = config
        self.training = training
        self.item_inputs = item_inputs
        self.query_tower, self.item_tower = build_towers(config, training.seed)
        self.num_steps = 0
        self._tables: Tables = self.query_tower.tables
        self._parameters: dict[str, Tensor] = {
            f"{name}.{key}": parameter
            for name, tower in (("query", self.query_tower), ("item", self.item_tower))
            for key, parameter in tower.named_parameters()
        }
        self._weights = {f"tables.{key}": table for key, table in vars(self._tables).items()} | self._parameters
        self._squares = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in self._weights.items()}
        self._changed = {name: Changes(name) for name in self._weights if name.startswith("tables.")}
        self._recent_hash = np.zeros(training.recent_window, dtype=np.uint64)
        self._recent_log_q = np.zeros(training.recent_window, dtype=np.float32)
        self._num_recent = 0

    def learn(self, clicks: Clicks, log_frequencies: LogFrequencies | None = None) -> StepResult:
        """Shuffles the clicks of a micro-batch, cuts them into steps of equal size and takes the steps.

        Args:
            clicks: at least one.
            log_frequencies: from before these clicks: with their own counts in them, they would tell what was clicked.
                Needed where the query tower gives weights for them.

        Raises:
            NonFiniteError: by a step; the steps before it have been taken.
            ValueError: there are no clicks.
        """
        order = np.random.default_rng([self.training.seed, self.num_steps, 1]).permutation(len(clicks))
        num_steps = -(-len(clicks) // self.training.rows_per_step)
        if num_steps == 0:
            raise ValueError("there are no clicks to learn from")
        known = self._ask_catalogue()
        results = [self.step(clicks.take(rows), known, log_frequencies) for rows in np.array_split(order, num_steps)]
        loss = sum(result.loss * result.num_rows for result in results) / len(clicks)
        return StepResult(
            loss,
            len(clicks),
            num_steps,
            max(result.gradient_norm for result in results),
            float(np.max([result.weight_norm for result in results])),
        )

    def step(
        self, clicks: Clicks, known: KnownItems | None = None, log_frequencies: LogFrequencies | None = None
    ) -> StepResult:
        """One optimizer step on all of these clicks.

        Args:
            clicks: at least one.
            known: the catalogue's items, where they are at hand already.
            log_frequencies: as for `learn`.

        Raises:
            NonFiniteError: before any change.
            ValueError: the rewards are not one for each task, or log frequencies are needed and missing.
        """
        training = self.training
        reward_BT = torch.tensor(clicks.reward).reshape(len(clicks), -1)
        if reward_BT.shape[1] != max(len(self.config.tasks), 1):
            raise ValueError(f"a click has {reward_BT.shape[1]} rewards; the tasks are {self.config.tasks}")
        random = np.random.default_rng([training.seed, self.num_steps])
        size = min(self._num_recent, training.recent_window)
        drawn = random.integers(size, size=training.recent_negatives) if size else np.zeros(0, dtype=np.int64)
        known_hash, known_log_q = self._ask_catalogue() if known is None else known
        num_uniform = training.uniform_negatives if len(known_hash) else 0
        uniform = random.integers(max(len(known_hash), 1), size=num_uniform)
        item_hash = np.concatenate([clicks.item_hash, self._recent_hash[drawn], known_hash[uniform]])
        log_q = np.concatenate([clicks.log_q, self._recent_log_q[drawn], known_log_q[uniform]])
        histories = (clicks.history_values, clicks.history_offsets) if training.mask_history else ()
        candidates = Candidates(
            log_q_N=torch.from_numpy(log_q),
            mask_BN=candidate_mask(item_hash, len(clicks), *histories),
            num_uniform=num_uniform,
            num_items=max(len(known_hash), 1),
        )
        item = self.item_inputs(item_hash)
        frequencies_NP = None
        if self.config.popularity_dims:
            if log_frequencies is None:
                raise ValueError(f"{self.config.popularity_dims} popularity_dims need the items' log frequencies")
            frequencies_NP = torch.from_numpy(log_frequencies(item_hash))

        # Autograd sees only the rows that the step looks up, each once: their gradients are dense and small.
        gathered = _gather(self._tables, clicks.query, item)
        item_embedding = self.item_tower(gathered.item, gathered.tables)
        embedding_TBD, leaning_BP = self.query_tower.embed_tasks(gathered.query, gathered.tables)
        leaning_BN = 0.0 if frequencies_NP is None else leaning_BP @ frequencies_NP.T
        losses = [
            batch_loss(
                training,
                query_BD @ item_embedding.T / self.config.temperature + leaning_BN,
                reward_B,
                candidates,
                random,
            )
            for query_BD, reward_B in zip(embedding_TBD, reward_BT.T, strict=True)
        ]
        if self.config.tasks:
            losses = [task.weight * loss for task, loss in zip(self.config.tasks, losses, strict=True)]
        loss = torch.stack(losses).sum()
        learnt = {f"tables.{key}": getattr(gathered.tables, key) for key in gathered.rows} | self._parameters
        gradients = dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values())), strict=True))
        squares = {name: gradient.square() for name, gradient in gradients.items()}
        norms = [square.sum().item() for square in squares.values()]
        if not (math.isfinite(loss.item()) and all(map(math.isfinite, norms))):
            raise NonFiniteError(
                f"step {self.num_steps}: the loss is {loss.item()} and its gradient is or becomes non-finite; "
                f"rewards are within {clicks.reward.min()} … {clicks.reward.max()}"
            )

        lengths: list[Tensor] = []
        for name, gradient in gradients.items():
            rows = gathered.rows.get(name.removeprefix("tables."))
            weights, sums = self._weights[name], self._squares[name]
            if rows is None:
                _adagrad(weights, sums, gradient, squares[name], self._rate(name))
                lengths.append(torch.linalg.vector_norm(weights.detach()))
            else:
                few_weights, few_sums = learnt[name].detach(), sums.index_select(0, rows)
                _adagrad(few_weights, few_sums, gradient, squares[name], self._rate(name))
                weights.index_copy_(0, rows, few_weights)
                sums.index_copy_(0, rows, few_sums)
                self._changed[name].mark(rows.numpy())
                lengths.append(torch.linalg.vector_norm(few_weights, dim=1).max())
        self.query_tower.scale.observe(clicks.query.numbers)
        self.item_tower.scale.observe(item.numbers[: len(clicks)])
        self._remember(clicks)
        self.num_steps += 1
        return StepResult(
            loss.item(),
            len(clicks),
            gradient_norm=math.sqrt(math.fsum(norms)),
            weight_norm=torch.stack(lengths).max().item(),
        )

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def embed_queries(self, query: QueryInputs) -> Float32Array:
        """What the query tower gives: embeddings of length 1, then weights of log frequencies: float32 [B, D + P]."""
        return self.query_tower(query).numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def embed_items(self, item: ItemInputs) -> Float32Array:
        """Item embeddings of length 1: float32 [N, D]."""
        return self.item_tower(item).numpy()  # type: ignore[no-any-return]

    @property
    def changes(self) -> dict[str, Changes]:
        """Name in the state → which rows have changed: of the tables and their sums of squares."""
        return self._changed | {f"squares.{name}": changed for name, changed in self._changed.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a step depends on, flat: the learner's own tensors, to be written or copied before the next step."""
        recent = min(self._num_recent, self.training.recent_window)
        return {
            **{name: weight.detach() for name, weight in self._weights.items()},
            **{f"squares.{name}": square for name, square in self._squares.items()},
            **self._scales(),
            "recent.item_hash": torch.from_numpy(self._recent_hash.view(np.int64))[:recent],
            "recent.log_q": torch.from_numpy(self._recent_log_q)[:recent],
            "num_recent": torch.tensor(self._num_recent),
            "num_steps": torch.tensor(self.num_steps),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave; learning goes on as if never interrupted.

        Raises:
            ValueError: the state is of another configuration; nothing was changed.
        """
        own = self.state_dict()
        problems = [f"{name} is missing" for name in own.keys() - state.keys()]
        problems += [f"{name} is unknown" for name in state.keys() - own.keys()]
        problems += [
            f"{name} is {tuple(state[name].shape)} and should be {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and not name.startswith("recent.") and state[name].shape != tensor.shape
        ]
        if not problems:
            num_recent = int(state["num_recent"])
            recent = min(num_recent, self.training.recent_window)
            if len(state["recent.item_hash"]) != recent:
                problems.append("recent_window is another one")
        if problems:
            raise ValueError("this learner's state is of another configuration: " + "; ".join(sorted(problems)))
        for name, tensor in own.items():
            if not name.startswith(("recent.", "num_")):
                tensor.copy_(state[name])
        for name, changed in self._changed.items():
            changed.take(len(self._weights[name]))
        self._recent_hash[:recent] = state["recent.item_hash"].numpy().view(np.uint64)
        self._recent_log_q[:recent] = state["recent.log_q"].numpy()
        self._num_recent, self.num_steps = num_recent, int(state["num_steps"])

    def _scales(self) -> dict[str, Tensor]:
        towers = (("query", self.query_tower), ("item", self.item_tower))
        return {f"{name}.{key}": buffer for name, tower in towers for key, buffer in tower.named_buffers()}

    def _rate(self, name: str) -> float:
        if name == "tables.users":
            return self.training.user_learning_rate
        return self.training.row_learning_rate if name.startswith("tables.") else self.training.dense_learning_rate

    def _ask_catalogue(self) -> KnownItems:
        if self._known_items is None or not self.training.needs_catalogue:
            return np.zeros(0, np.uint64), np.zeros(0, np.float32)
        item_hash, log_q = self._known_items()
        there = np.isfinite(log_q)
        return item_hash[there], log_q[there]

    def _remember(self, clicks: Clicks) -> None:
        newest = np.arange(len(clicks))[-self.training.recent_window :]
        places = (self._num_recent + newest) % self.training.recent_window
        self._recent_hash[places] = clicks.item_hash[newest]
        self._recent_log_q[places] = clicks.log_q[newest]
        self._num_recent += len(clicks)


@dataclass(frozen=True)
class _Gathered:
    """Inputs whose row numbers point into small tables of the rows that occur, each once."""

    query: QueryInputs
    item: ItemInputs
    tables: Tables
    rows: dict[str, Tensor]
    """Table name → int64 [u] the rows that the small table holds; tables of which no row occurs are left out."""


def _gather(tables: Tables, query: QueryInputs, item: ItemInputs) -> _Gathered:
    distinct: dict[str, Tensor] = {}
    small: dict[str, Tensor] = {}
    places: dict[str, list[Bags]] = {}
    uses = {"items": [query.items, item.items], "features": [query.features, item.features], "users": [query.users]}
    for name, bags in uses.items():
        table = getattr(tables, name)
        rows, inverse = torch.unique(torch.cat([bag.rows for bag in bags]), return_inverse=True)
        small[name] = table.index_select(0, rows)
        if len(rows):
            small[name].requires_grad_()
            distinct[name] = rows
        parts = inverse.split([len(bag.rows) for bag in bags])
        places[name] = [dataclasses.replace(bag, rows=part) for bag, part in zip(bags, parts, strict=True)]
    query_items, item_items = places["items"]
    query_features, item_features = places["features"]
    return _Gathered(
        query=QueryInputs(query_items, query_features, query.numbers, places["users"][0]),
        item=ItemInputs(item_items, item_features, item.numbers),
        tables=Tables(**small),
        rows=distinct,
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _adagrad(weights: Tensor, sums: Tensor, gradient: Tensor, square: Tensor, rate: float) -> None:
    """Adagrad (Duchi et al. 2011) in place: sums += gradient²; weights −= rate · gradient / (√sums + 1e-10)."""
    sums += square
    weights.addcdiv_(gradient, sums.sqrt().add_(_EPSILON), value=-rate)
