"""PUBLIC: the two towers — QueryTower and ItemTower — which share the rows of items and features.

Station: between inputs (`features`, `item_features`, whose public names are also found here) and embeddings. The
trainer learns them; the retriever runs the query tower of a published version. It reads no stream, no index and no
settings, and imports no `streams`. Nothing here learns: `step` does.

Where it departs from the paper: the towers may be linear (`TowerConfig.hidden = ()`, the default: they are the better
ones on every data set measured); the history is a decayed mean; users, items and feature values have hashed rows.

Shapes: B queries, N items, D `embedding_dim`, R `row_dim`, S bags per input.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.contract import LOG_HISTORY_SHIFT
from trainer.features import (
    Bags,
    EncodedItem,
    Feature,
    FeatureKind,
    ItemInputs,
    QueryInputs,
    TowerConfig,
    encode_item_features,
    query_inputs,
)
from trainer.item_features import ItemFeatures

__all__ = [
    "Bags",
    "EncodedItem",
    "Feature",
    "FeatureKind",
    "ItemFeatures",
    "ItemInputs",
    "ItemTower",
    "QueryInputs",
    "QueryTower",
    "Tables",
    "TowerConfig",
    "build_towers",
    "encode_item_features",
    "load_query_tower",
    "query_inputs",
    "save_query_tower",
]

HISTORY_SCALE = 0.3
"""Of `log_history` beside the rows, which are small."""
ROW_STD = 0.1
"""Rows of items and features start as N(0, ROW_STD²); those of users at 0, so that a new user is no noise."""


@dataclass(frozen=True)
class Tables:
    """The weights that bags look up: [rows, R] each. A table that the configuration has no use for has no rows."""

    items: Tensor
    features: Tensor
    users: Tensor


class NumberScale(nn.Module):  # type: ignore[misc]
    """Standardises number features by the mean and variance of the values seen so far (Welford, merged by batch)."""

    def __init__(self, num_numbers: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(num_numbers, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(num_numbers, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(num_numbers, dtype=torch.float64))

    def observe(self, numbers: Tensor) -> None:
        """Counts a batch [n, numbers] into mean and variance; NaN is missing."""
        if numbers.numel() == 0:
            return
        values = numbers.double()
        there = ~torch.isnan(values)
        count = there.sum(0)
        mean = torch.where(there, values, 0.0).sum(0) / count.clamp(min=1)
        squares = torch.where(there, (values - mean) ** 2, 0.0).sum(0)
        total = (self.count + count).clamp(min=1)
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count += count

    def forward(self, numbers: Tensor) -> Tensor:
        """[n, numbers] → float32 [n, 2 · numbers]: standard deviations from the mean, within ±4 and 0 where missing;
        then 1 where there is a value, 0 where missing."""
        there = ~torch.isnan(numbers)
        deviation = (self.squares / self.count.clamp(min=1)).sqrt()
        scaled = ((numbers.double() - self.mean) / deviation.clamp(min=1e-6)).clamp(-4, 4)
        known = there & (self.count > 0)
        return torch.cat([torch.where(known, scaled, 0.0).float(), there.float()], dim=1)


class _Tower(nn.Module):  # type: ignore[misc]
    """Rows and numbers side by side → hidden ReLU layers → a linear layer → length 1."""

    def __init__(
        self, config: TowerConfig, features: tuple[Feature, ...], with_user: bool, with_length: bool = False
    ) -> None:
        super().__init__()
        num_numbers = sum(feature.kind == "number" for feature in features)
        num_slots = 1 + len(features) - num_numbers + with_user
        self.scale = NumberScale(num_numbers)
        sizes = [num_slots * config.row_dim + 2 * num_numbers + with_length, *config.hidden, config.embedding_dim]
        self.layers = nn.ModuleList(nn.Linear(size, next_size) for size, next_size in pairwise(sizes))

    def _pooled(self, bags: list[tuple[Bags, Tensor]], numbers: Tensor) -> Tensor:
        pooled = [_pool(bag, table, len(numbers)) for bag, table in bags if bag.num_bags]
        if numbers.shape[1]:
            pooled.append(self.scale(numbers))
        return torch.cat(pooled, dim=1) if len(pooled) > 1 else pooled[0]

    def _embed(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = F.relu(layer(hidden))
        return F.normalize(self.layers[-1](hidden), dim=1)


class ItemTower(_Tower):
    """Item id rows, feature rows and numbers → item embedding."""

    def __init__(self, config: TowerConfig, tables: Tables) -> None:
        super().__init__(config, config.item, with_user=False)
        self.tables = tables

    def forward(self, inputs: ItemInputs, tables: Tables | None = None) -> Tensor:
        """Item embeddings of length 1: float32 [N, D].

        Args:
            inputs: N items.
            tables: looked up instead of the tower's own, by a learner that has gathered the rows it needs.
        """
        tables = self.tables if tables is None else tables
        bags = [(inputs.items, tables.items), (inputs.features, tables.features)]
        return self._embed(self._pooled(bags, inputs.numbers))


class QueryTower(_Tower):
    """Decayed mean of history rows, context rows and numbers, user rows where configured, the history's length → query
    embedding.

    With tasks each has a head, a linear layer that starts as the identity; its output of length 1 is the query
    embedding of that task. The item embeddings are the same for all, so that the weighted mean of the tasks' scores is
    one inner product, with the weighted mean of their query embeddings.

    With `popularity_dims` it also says which items the user leans to, by how popular they are: one weight for each of
    the items' log frequencies, linear in what the layers start from, 0 at first. They are the same for all tasks.
    """

    def __init__(self, config: TowerConfig, tables: Tables) -> None:
        super().__init__(config, config.context, config.use_user_id, config.use_history_length)
        self.config = config
        self.tables = tables
        if config.popularity_dims:
            self.leaning = nn.Linear(self.layers[0].in_features, config.popularity_dims)
        if config.tasks:
            self.heads = nn.Parameter(torch.eye(config.embedding_dim).repeat(len(config.tasks), 1, 1))

    def forward(self, inputs: QueryInputs, tables: Tables | None = None) -> Tensor:
        """Query embeddings of length 1, then the weights of log frequencies: float32 [B, D + `popularity_dims`].

        With tasks the embedding is their weighted mean, of length at most 1.

        Args:
            inputs: B queries; one about whom nothing is known has the embedding that the last layer's bias makes.
            tables: looked up instead of the tower's own, by a learner that has gathered the rows it needs.
        """
        tables = self.tables if tables is None else tables
        embedding_TBD, leaning_BP = self.embed_tasks(inputs, tables)
        embedding_BD = embedding_TBD[0]
        if self.config.tasks:
            total = sum(task.weight for task in self.config.tasks)
            shares = torch.tensor([task.weight / total for task in self.config.tasks])
            embedding_BD = torch.einsum("t,tbd->bd", shares, embedding_TBD)
        return torch.cat([embedding_BD, leaning_BP], dim=1)

    def embed_tasks(self, inputs: QueryInputs, tables: Tables) -> tuple[Tensor, Tensor]:
        """Query embeddings of length 1 for each task: float32 [T, B, D], without tasks [1, B, D]; and the weights of
        log frequencies: float32 [B, P]."""
        bags = [(inputs.items, tables.items), (inputs.features, tables.features), (inputs.users, tables.users)]
        pooled = self._pooled(bags, inputs.numbers)
        if self.config.use_history_length:
            lengths_B = inputs.items.offsets.diff()[:: inputs.items.num_bags]
            known_B = HISTORY_SCALE * (torch.log1p(lengths_B.float()) - LOG_HISTORY_SHIFT)
            pooled = torch.cat([pooled, known_B[:, None]], dim=1)
        leaning_BP = self.leaning(pooled) if self.config.popularity_dims else pooled.new_empty(len(pooled), 0)
        embedding_BD = self._embed(pooled)
        if not self.config.tasks:
            return embedding_BD[None], leaning_BP
        return F.normalize(embedding_BD @ self.heads.mT, dim=2), leaning_BP


def build_towers(config: TowerConfig, seed: int = 0) -> tuple[QueryTower, ItemTower]:
    """New towers over the same tables; the same configuration and seed give the same weights."""
    generator = torch.Generator().manual_seed(seed)

    def table(num_rows: int) -> Tensor:
        return torch.empty(num_rows, config.row_dim).normal_(0, ROW_STD, generator=generator)

    tables = Tables(
        items=table(config.item_rows),
        features=table(config.feature_rows if _has_tokens(config.context + config.item) else 0),
        users=torch.zeros(config.user_rows if config.use_user_id else 0, config.row_dim),
    )
    query, item = QueryTower(config, tables), ItemTower(config, tables)
    for layer in (*query.layers, *item.layers):
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    # What is the same for all users of equally long histories would only add noise at first.
    if config.use_history_length:
        nn.init.zeros_(query.layers[0].weight[:, -1])
    if config.popularity_dims:
        for parameter in query.leaning.parameters():
            nn.init.zeros_(parameter)
    return query, item


def save_query_tower(path: str | os.PathLike[str], tower: QueryTower) -> None:
    """Writes the query tower's weights with the tables that it looks up, as safetensors. Not atomic, not synced.

    Raises:
        OSError: it cannot be written; a part of it may be there.
    """
    tables = {"tables.items": tower.tables.items, "tables.users": tower.tables.users}
    if _has_tokens(tower.config.context):
        tables["tables.features"] = tower.tables.features
    try:
        save_file({**tower.state_dict(), **tables}, os.fspath(path))
    except SafetensorError as error:  # safetensors' own word for a full disk
        raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error


def load_query_tower(path: str | os.PathLike[str], config: TowerConfig) -> QueryTower:
    """The query tower that `save_query_tower` wrote: the same inputs give the same embeddings, bit for bit.

    Raises:
        ValueError: the file is torn, or of another configuration.
        OSError: it cannot be read.
    """
    try:
        weights = load_file(os.fspath(path))
        no_rows = torch.empty(0, config.row_dim)
        tables = Tables(
            items=weights.pop("tables.items"),
            features=weights.pop("tables.features", no_rows),
            users=weights.pop("tables.users"),
        )
        wanted = (
            config.item_rows,
            config.feature_rows if _has_tokens(config.context) else 0,
            config.user_rows if config.use_user_id else 0,
        )
        for table, num_rows in zip((tables.items, tables.features, tables.users), wanted, strict=True):
            if table.shape != (num_rows, config.row_dim):
                raise ValueError(f"a table is {tuple(table.shape)} and should be {(num_rows, config.row_dim)}")
        with torch.device("meta"):
            tower = QueryTower(config, tables)
        tower.load_state_dict(weights, assign=True)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} holds no query tower of this configuration: {error}") from error
    tower.requires_grad_(False)
    return tower


def _has_tokens(features: tuple[Feature, ...]) -> bool:
    return any(feature.kind in ("categorical", "multi", "text") for feature in features)


def _pool(bags: Bags, table: Tensor, num_inputs: int) -> Tensor:
    """Weighted sums of rows, slots side by side: [n, S · R]."""
    sums = F.embedding_bag(
        bags.rows, table, bags.offsets, mode="sum", per_sample_weights=bags.weights, include_last_offset=True
    )
    return sums.view(num_inputs, -1)
