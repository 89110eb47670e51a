"""What the towers make of their inputs, by value; which weights they share; how they are stored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streams.contract import hash_id, hash_ids
from trainer.contract import log_history
from trainer.rewards import Task
from trainer.towers import (
    Feature,
    ItemFeatures,
    ItemInputs,
    QueryInputs,
    TowerConfig,
    build_towers,
    encode_item_features,
    load_query_tower,
    query_inputs,
    save_query_tower,
)

LINEAR = TowerConfig(embedding_dim=6, row_dim=4, item_rows=64, user_rows=16, feature_rows=32, history_decay=0.5)
FULL = dataclasses.replace(
    LINEAR,
    use_user_id=True,
    context=(Feature("device", "categorical"), Feature("hour", "number"), Feature("seed", "item")),
    item=(Feature("brand", "categorical"), Feature("tags", "multi"), Feature("price", "number")),
    hidden=(8,),
)
TASKS = dataclasses.replace(FULL, tasks=(Task("reward", 1.0), Task("purchase", 3.0)))
LEANING = dataclasses.replace(FULL, popularity_dims=3, use_history_length=True)
CONFIGS = pytest.mark.parametrize("config", [LINEAR, FULL], ids=["linear", "full"])


def queries(config: TowerConfig, histories: list[list[str]], **context: list[str | float | None]) -> QueryInputs:
    values = hash_ids([item for history in histories for item in history])
    offsets = np.cumsum([0, *map(len, histories)])
    return query_inputs(config, hash_ids([f"user {row}" for row in range(len(histories))]), values, offsets, context)


def items(config: TowerConfig, item_ids: list[str], features: list[dict[str, object]] | None = None) -> ItemInputs:
    store = ItemFeatures(config)
    store.append(len(item_ids))
    for index, plain in enumerate(features or []):
        store.replace(index, encode_item_features(config, plain))  # type: ignore[arg-type]
    return store.gather(hash_ids(item_ids), np.arange(len(item_ids)))


def row(config: TowerConfig, table: Tensor, item_id: str) -> Tensor:
    return table[hash_id(item_id) & (config.item_rows - 1)]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


@CONFIGS
def test_every_embedding_has_length_one_for_ids_never_seen_and_for_nothing_known(config: TowerConfig) -> None:
    query, item = build_towers(config, seed=1)
    embedding_BD = query(queries(config, [["a", "b"], [], ["never seen before"] * 30]))
    embedding_ND = item(items(config, ["a", "never seen before"], [{"brand": "x", "tags": ["y", "z"], "price": 3}, {}]))
    assert embedding_BD.shape == (3, 6)
    assert embedding_ND.shape == (2, 6)
    torch.testing.assert_close(torch.cat([embedding_BD, embedding_ND]).norm(dim=1), torch.ones(5))


def test_a_linear_query_is_the_decayed_mean_of_its_history_rows_times_the_layer() -> None:
    tower, _ = build_towers(LINEAR, seed=2)
    (layer,) = tower.layers
    embedding_BD = tower(queries(LINEAR, [["old", "new"], []]))
    table = tower.tables.items
    pooled = (0.5 * row(LINEAR, table, "old") + row(LINEAR, table, "new")) / 1.5
    torch.testing.assert_close(embedding_BD[0], unit(layer.weight @ pooled + layer.bias))
    torch.testing.assert_close(embedding_BD[1], unit(layer.bias))


def test_a_full_query_lays_history_seed_context_user_and_numbers_side_by_side() -> None:
    tower, _ = build_towers(FULL, seed=3)
    tower.tables.users.normal_(generator=torch.Generator().manual_seed(0))
    tower.scale.observe(torch.tensor([[2.0], [6.0]]))
    inputs = queries(FULL, [["a"], ["a"]], device=["tv", None], hour=[5.0, None], seed=["b", None])
    nothing = torch.zeros(4)
    device = tower.tables.features[int(inputs.features.rows[0])]
    users = tower.tables.users[inputs.users.rows]
    expected = [
        torch.cat(
            [
                row(FULL, tower.tables.items, "a"),
                row(FULL, tower.tables.items, "b"),
                device,
                users[0],
                torch.tensor([0.5, 1.0]),
            ]
        ),
        torch.cat([row(FULL, tower.tables.items, "a"), nothing, nothing, users[1], torch.tensor([0.0, 0.0])]),
    ]
    first, last = tower.layers
    for embedding, side_by_side in zip(tower(inputs), expected, strict=True):
        hidden = torch.relu(first.weight @ side_by_side + first.bias)
        torch.testing.assert_close(embedding, unit(last.weight @ hidden + last.bias))


def test_an_item_lays_its_row_its_features_and_numbers_side_by_side() -> None:
    _, tower = build_towers(FULL, seed=4)
    tower.scale.observe(torch.tensor([[2.0], [6.0]]))
    inputs = items(FULL, ["a"], [{"brand": "x", "tags": ["y", "z"], "price": 8}])
    brand, *tags = tower.tables.features[inputs.features.rows]
    own = row(FULL, tower.tables.items, "a")
    side_by_side = torch.cat([own, brand, (tags[0] + tags[1]) / 2, torch.tensor([2.0, 1.0])])
    first, last = tower.layers
    hidden = torch.relu(first.weight @ side_by_side + first.bias)
    torch.testing.assert_close(tower(inputs)[0], unit(last.weight @ hidden + last.bias))


def test_history_seed_and_candidates_are_the_same_rows() -> None:
    config = dataclasses.replace(LINEAR, context=(Feature("seed", "item"),))
    query, item = build_towers(config, seed=5)

    def embeddings() -> list[Tensor]:
        history, seed = queries(config, [["a"]]), queries(config, [[]], seed=["a"])
        return [query(history).detach(), query(seed).detach(), item(items(config, ["a"])).detach()]

    before = embeddings()
    row(config, item.tables.items, "a").add_(1.0)
    assert all(not torch.allclose(old, new) for old, new in zip(before, embeddings(), strict=True))
    assert query.tables.items.data_ptr() == item.tables.items.data_ptr()


def test_numbers_are_standardised_by_all_values_seen() -> None:
    random = np.random.default_rng(0)
    values = random.normal(1e6, 1e3, (500, 2)).astype(np.float32)
    values[random.random(values.shape) < 0.3] = np.nan
    _, tower = build_towers(dataclasses.replace(LINEAR, item=(Feature("a", "number"), Feature("b", "number"))))
    for part in np.split(values, [1, 7, 8, 300]):
        tower.scale.observe(torch.from_numpy(part))
    exact = values.astype(np.float64)
    mean, deviation = np.nanmean(exact, axis=0), np.nanstd(exact, axis=0)
    expected = np.nan_to_num(np.clip((exact - mean) / deviation, -4, 4))
    scaled, there = tower.scale(torch.from_numpy(values)).numpy().reshape(-1, 2, 2).swapaxes(0, 1)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    np.testing.assert_array_equal(there, ~np.isnan(values))


def test_a_number_far_off_is_cut_at_four_deviations_and_the_first_counts_as_the_mean() -> None:
    _, tower = build_towers(dataclasses.replace(LINEAR, item=(Feature("a", "number"),)))
    assert tower.scale(torch.tensor([[5.0]])).tolist() == [[0.0, 1.0]]
    tower.scale.observe(torch.tensor([[0.0], [1.0]]))
    assert tower.scale(torch.tensor([[1e30], [-1e30]])).tolist() == [[4.0, 1.0], [-4.0, 1.0]]


@CONFIGS
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(config: TowerConfig) -> None:
    first, second, other = (build_towers(config, seed)[0] for seed in (7, 7, 8))
    inputs = queries(config, [["a", "b"], []])
    assert torch.equal(first(inputs), second(inputs))
    assert not torch.allclose(first(inputs), other(inputs))


def test_the_weighted_mean_of_the_tasks_scores_is_one_inner_product() -> None:
    query, item = build_towers(TASKS, seed=3)
    query.requires_grad_(False)
    item.requires_grad_(False)
    query.heads.normal_(generator=torch.Generator().manual_seed(0))
    inputs = queries(TASKS, [["a", "b"], [], ["c"]], device=["tv", None, "tv"], hour=[0.3, None, 1.0], seed=["c"] * 3)
    items = item(ItemFeatures(TASKS).gather(hash_ids(["a", "x"]), np.array([-1, -1])))
    embedding, leaning = query.embed_tasks(inputs, query.tables)
    assert leaning.shape == (3, 0)
    torch.testing.assert_close(embedding.norm(dim=2), torch.ones(2, 3))
    served = query(inputs) @ items.T
    for row in range(3):
        for place in range(2):
            by_task = [float(embedding[task, row] @ items[place]) for task in (0, 1)]
            assert served[row, place].item() == pytest.approx((by_task[0] + 3 * by_task[1]) / 4, abs=1e-6)
    assert abs(served - embedding[0] @ items.T).max() > 0.01


@pytest.mark.parametrize("tasks", [(), TASKS.tasks], ids=["one", "tasks"])
def test_behind_the_embedding_is_the_leaning_linear_in_what_is_known_of_the_user_and_0_at_first(
    tasks: tuple[Task, ...],
) -> None:
    config = dataclasses.replace(LEANING, tasks=tasks)
    tower, _ = build_towers(config, seed=3)
    without, _ = build_towers(dataclasses.replace(config, popularity_dims=0), seed=3)
    without.requires_grad_(False)
    tower.scale.observe(torch.tensor([[2.0], [6.0]]))
    without.scale.observe(torch.tensor([[2.0], [6.0]]))
    inputs = queries(config, [["a"], []], device=["tv", None], hour=[5.0, None], seed=["b", None])
    assert torch.equal(tower(inputs), torch.cat([without(inputs), torch.zeros(2, 3)], dim=1))
    tower.requires_grad_(False)
    assert not tower.layers[0].weight[:, -1].any()
    tower.layers[0].weight[:, -1] = without.layers[0].weight[:, -1] = 0.7
    for parameter in tower.leaning.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    table, device = tower.tables.items, tower.tables.features[int(inputs.features.rows[0])]
    user = torch.zeros(4)
    known = torch.cat(
        [row(config, table, "a"), row(config, table, "b"), device, user, torch.tensor([0.5, 1.0, 0.3 * log_history(1)])]
    )
    torch.testing.assert_close(tower(inputs)[0, 6:], tower.leaning.weight @ known + tower.leaning.bias)
    nothing = 0.3 * log_history(0) * tower.leaning.weight[:, -1]
    torch.testing.assert_close(tower(inputs)[1, 6:], nothing + tower.leaning.bias)
    first, last = tower.layers
    if not tasks:
        embedding = unit(last.weight @ torch.relu(first.weight @ known + first.bias) + last.bias)
        torch.testing.assert_close(tower(inputs)[0, :6], embedding)
    assert torch.equal(tower(inputs)[:, :6], without(inputs))


@pytest.mark.parametrize("config", [LINEAR, FULL, TASKS, LEANING], ids=["linear", "full", "tasks", "leaning"])
def test_a_stored_query_tower_gives_the_same_bits(config: TowerConfig, tmp_path: Path) -> None:
    tower, _ = build_towers(config, seed=9)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.startswith("leaning"):
                parameter.normal_()
    tower.tables.users.normal_()
    tower.scale.observe(torch.rand(4, tower.scale.count.numel()))
    save_query_tower(tmp_path / "tower.safetensors", tower)
    loaded = load_query_tower(tmp_path / "tower.safetensors", config)
    inputs = queries(config, [["a", "b"], []], device=["tv", None], hour=[0.3, None], seed=["c", None])
    assert torch.equal(loaded(inputs), tower(inputs))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"item_rows": 128},
        {"row_dim": 8},
        {"embedding_dim": 3},
        {"hidden": ()},
        {"use_user_id": False},
        {"context": ()},
        {"tasks": (Task("reward", 1.0),)},
        {"popularity_dims": 2},
        {"use_history_length": True},
    ],
)
def test_a_query_tower_of_another_configuration_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    save_query_tower(tmp_path / "tower.safetensors", build_towers(FULL)[0])
    with pytest.raises(ValueError, match="holds no query tower of this configuration"):
        load_query_tower(tmp_path / "tower.safetensors", dataclasses.replace(FULL, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 7, 1000])
def test_a_torn_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "tower.safetensors"
    save_query_tower(path, build_towers(FULL)[0])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="holds no query tower"):
        load_query_tower(path, FULL)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_query_tower(tmp_path / "nowhere", FULL)


def test_a_user_who_never_clicked_is_as_good_as_none() -> None:
    tower, _ = build_towers(FULL, seed=10)
    history, offsets = hash_ids(["a", "b"]), np.array([0, 2])
    somebody, nobody = (query_inputs(FULL, user, history, offsets) for user in (hash_ids(["new"]), None))
    torch.testing.assert_close(tower(somebody), tower(nobody))
