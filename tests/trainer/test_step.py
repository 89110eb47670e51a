"""One step by value, all or nothing, again and again the same; and what many of them learn."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streams.contract import UInt64Array, hash_ids
from trainer.loss import in_batch_softmax_loss
from trainer.negatives import candidate_mask
from trainer.rewards import Task
from trainer.step import Clicks, KnownItems, Learner, NonFiniteError
from trainer.towers import Feature, ItemFeatures, ItemInputs, TowerConfig, encode_item_features, query_inputs
from trainer.training import Candidates, TrainingConfig, batch_loss

CONFIG = TowerConfig(
    embedding_dim=8,
    row_dim=8,
    item_rows=256,
    user_rows=32,
    feature_rows=64,
    use_user_id=True,
    context=(Feature("device", "categorical"), Feature("seed", "item"), Feature("hour", "number")),
    item=(Feature("brand", "categorical"), Feature("tags", "multi"), Feature("price", "number")),
)
ITEM_IDS = [f"item {number}" for number in range(60)]
ITEM_HASH = hash_ids(ITEM_IDS)
BATCH_ALONE = TrainingConfig(recent_negatives=0, seed=1)


class Items:
    """Sixty items with features; remembers what it was asked for."""

    def __init__(self, config: TowerConfig) -> None:
        self.store = ItemFeatures(config)
        self.store.append(len(ITEM_IDS))
        for number in range(0, len(ITEM_IDS), 2):
            plain = {"brand": f"b{number % 5}", "tags": ["t", f"t{number % 3}"], "price": float(number)}
            self.store.replace(number, encode_item_features(config, plain))
        self.index = {int(item_hash): number for number, item_hash in enumerate(ITEM_HASH)}
        self.asked: list[UInt64Array] = []

    def __call__(self, item_hash: UInt64Array) -> ItemInputs:
        self.asked.append(item_hash)
        return self.store.gather(item_hash, np.array([self.index.get(value, -1) for value in item_hash.tolist()]))


def learner(config: TowerConfig = CONFIG, training: TrainingConfig = BATCH_ALONE) -> Learner:
    return Learner(config, training, Items(config), known_items)


def known_items() -> KnownItems:
    """The second half of the items, the last three of which are not served any more."""
    log_q = np.linspace(-3, -9, 30).astype(np.float32)
    log_q[-3:] = -np.inf
    return ITEM_HASH[30:], log_q


VARIANTS = {
    "plain": TrainingConfig(rows_per_step=8, recent_negatives=20, recent_window=50, seed=3),
    "corrected": TrainingConfig(rows_per_step=8, recent_negatives=20, recent_window=50, correction="logq", seed=3),
    "refined": TrainingConfig(rows_per_step=8, recent_negatives=5, recent_window=50, correction="refined", seed=3),
    "mixed": TrainingConfig(rows_per_step=8, recent_negatives=0, uniform_negatives=9, correction="mixed", seed=3),
    "random": TrainingConfig(rows_per_step=8, chosen_negatives=4, correction="mixed", uniform_negatives=5, seed=3),
    "hardest": TrainingConfig(rows_per_step=8, chosen_negatives=4, choice="hardest", seed=3),
    "semi-hard": TrainingConfig(rows_per_step=8, chosen_negatives=4, choice="semi-hard", seed=3),
    "gbce": TrainingConfig(rows_per_step=8, uniform_negatives=9, loss="gbce", seed=3),
}
TWO_TASKS = dataclasses.replace(CONFIG, tasks=(Task("reward", 1.0), Task("watch_share", 0.5)))


def clicks(seed: int, num_clicks: int = 20, config: TowerConfig = CONFIG) -> Clicks:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 30, num_clicks)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    history = ITEM_HASH[random.integers(0, 60, offsets[-1])]
    context = {
        "device": random.choice(["tv", "phone"], num_clicks).tolist(),
        "seed": random.choice([*ITEM_IDS, None], num_clicks).tolist(),  # type: ignore[list-item]
        "hour": random.choice([1.0, 2.0, math.nan], num_clicks).tolist(),
    }
    item = np.minimum(random.geometric(0.1, num_clicks), 60) - 1
    return Clicks(
        query=query_inputs(
            config, hash_ids([f"u{n}" for n in random.integers(0, 9, num_clicks)]), history, offsets, context
        ),
        item_hash=ITEM_HASH[item],
        reward=random.choice([0.0, 1.0, 2.0], (num_clicks, max(len(config.tasks), 1))).astype(np.float32),
        log_q=np.log(0.9**item * 0.1).astype(np.float32),
        history_values=history,
        history_offsets=offsets,
    )


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("correction", ["none", "logq"])
@pytest.mark.parametrize("hidden", [(), (12,)])
def test_steps_are_those_of_torchs_adagrad_on_whole_tables(correction: str, hidden: tuple[int, ...]) -> None:
    config = dataclasses.replace(CONFIG, hidden=hidden)
    training = dataclasses.replace(BATCH_ALONE, correction=correction)  # type: ignore[arg-type]
    ours, theirs = learner(config, training), learner(config, training)
    tables = theirs.query_tower.tables
    for table in (tables.items, tables.features, tables.users):
        table.requires_grad_()
    layers = [*theirs.query_tower.parameters(), *theirs.item_tower.parameters()]
    optimizer = torch.optim.Adagrad(
        [
            {"params": [tables.items, tables.features], "lr": training.row_learning_rate},
            {"params": [tables.users], "lr": training.user_learning_rate},
            {"params": layers, "lr": training.dense_learning_rate},
        ]
    )
    for seed in range(4):
        batch = clicks(seed, config=config)
        result = ours.step(batch)
        item = theirs.item_inputs(batch.item_hash)
        loss = in_batch_softmax_loss(
            theirs.query_tower(batch.query) @ theirs.item_tower(item).T / config.temperature,
            torch.from_numpy(batch.reward[:, 0]),
            torch.from_numpy(batch.log_q) if correction == "logq" else None,
            candidate_mask(batch.item_hash, len(batch), batch.history_values, batch.history_offsets),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.query_tower.scale.observe(batch.query.numbers)
        theirs.item_tower.scale.observe(item.numbers)
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert (result.num_rows, result.num_steps) == (20, 1)
    for name, weights in ours.state_dict().items():
        if name.startswith(("tables.", "query.", "item.")):
            expected = theirs.state_dict()[name].detach()
            # An Adagrad step divides by the gradient's size, so that a coordinate of nearly no gradient is nearly free.
            assert (weights - expected).abs().max() < 2e-3, name
            assert (weights - expected).abs().mean() < 1e-6, name


def test_logits_have_the_leaning_times_the_log_frequencies_of_the_candidates() -> None:
    config = dataclasses.replace(CONFIG, popularity_dims=2)
    ours, theirs = learner(config), learner(config)
    frequencies = {
        int(key): row for key, row in zip(ITEM_HASH, np.random.default_rng(3).normal(size=(60, 2)), strict=True)
    }

    def log_frequencies(item_hash: UInt64Array) -> np.ndarray:
        return np.array([frequencies[key] for key in item_hash.tolist()], np.float32)

    with torch.no_grad():
        for one in (ours, theirs):
            for parameter in one.query_tower.leaning.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    batch = clicks(2, config=config)
    answer, item = theirs.query_tower(batch.query), theirs.item_tower(theirs.item_inputs(batch.item_hash))
    loss = in_batch_softmax_loss(
        answer[:, :8] @ item.T / config.temperature
        + answer[:, 8:] @ torch.from_numpy(log_frequencies(batch.item_hash)).T,
        torch.from_numpy(batch.reward[:, 0]),
        None,
        candidate_mask(batch.item_hash, len(batch), batch.history_values, batch.history_offsets),
    )
    assert ours.step(batch, log_frequencies=log_frequencies).loss == pytest.approx(loss.item(), rel=1e-5)
    moved = [p for name, p in ours.query_tower.named_parameters() if name.startswith("leaning")]
    start = [p for name, p in theirs.query_tower.named_parameters() if name.startswith("leaning")]
    assert all(not torch.equal(one, other) for one, other in zip(moved, start, strict=True))
    with pytest.raises(ValueError, match="2 popularity_dims need the items' log frequencies"):
        ours.learn(batch)


def test_who_leans_to_the_long_tail_is_told_from_who_leans_to_what_all_click() -> None:
    """Two kinds of users, told apart by their last click; one clicks the popular half of the items, the other not."""
    config = TowerConfig(embedding_dim=4, row_dim=4, item_rows=256, popularity_dims=1)
    store = ItemFeatures(config)
    model = Learner(config, BATCH_ALONE, lambda item_hash: store.gather(item_hash, np.full(len(item_hash), -1)))
    popularity = {int(key): np.float32(-2.0 if number < 30 else -6.0) for number, key in enumerate(ITEM_HASH)}

    def log_frequencies(item_hash: UInt64Array) -> np.ndarray:
        return np.array([[popularity[key]] for key in item_hash.tolist()], np.float32)

    random, told = np.random.default_rng(4), hash_ids(["of the one", "of the other"])
    for _ in range(100):
        kind = random.integers(2, size=32)
        item = ITEM_HASH[30 * kind + random.integers(30, size=32)]
        history, offsets = told[kind], np.arange(33)
        query = query_inputs(config, None, history, offsets)
        model.learn(
            Clicks(query, item, np.ones(32, np.float32), np.zeros(32, np.float32), history, offsets), log_frequencies
        )
    leaning = model.embed_queries(query_inputs(config, None, told, np.arange(3)))[:, 4]
    assert leaning[0] > 0.3
    assert leaning[1] < -0.3


def test_only_rows_that_the_step_looks_up_move() -> None:
    model, batch = learner(), clicks(0)
    before = copied(model.state_dict())
    model.step(batch)
    item = model.item_inputs(batch.item_hash)
    looked_up = {
        "tables.items": torch.cat([batch.query.items.rows, item.items.rows]),
        "tables.features": torch.cat([batch.query.features.rows, item.features.rows]),
        "tables.users": batch.query.users.rows,
    }
    for name, rows in looked_up.items():
        moved = (model.state_dict()[name] != before[name]).any(1)
        assert moved.any()
        assert set(moved.nonzero().ravel().tolist()) <= set(rows.tolist())


def test_the_longest_row_that_a_step_changed_is_told() -> None:
    model, batch = learner(), clicks(0)
    row = int(batch.query.items.rows[0])
    model.state_dict()["tables.items"][row] *= 50
    untouched = int(np.setdiff1d(np.arange(64), np.concatenate([batch.query.users.rows.numpy()]))[0])
    model.state_dict()["tables.users"][untouched] = 1e9
    result = model.step(batch)
    assert result.weight_norm == pytest.approx(float(model.state_dict()["tables.items"][row].norm()), rel=1e-6)


def test_a_history_item_moves_its_item_embedding_though_it_was_no_candidate() -> None:
    config = TowerConfig(embedding_dim=8, row_dim=8, item_rows=256)
    model = learner(config)
    history, offsets = ITEM_HASH[[0, 0]], np.array([0, 1, 2])
    batch = Clicks(
        query=query_inputs(config, None, history, offsets),
        item_hash=ITEM_HASH[[1, 2]],
        reward=np.ones(2, np.float32),
        log_q=np.zeros(2, np.float32),
        history_values=history,
        history_offsets=offsets,
    )
    before = model.embed_items(model.item_inputs(ITEM_HASH[:4]))
    row = model.state_dict()["tables.items"][int(ITEM_HASH[0]) & 255].clone()
    model.step(batch)
    after = model.embed_items(model.item_inputs(ITEM_HASH[:4]))
    assert not torch.equal(model.state_dict()["tables.items"][int(ITEM_HASH[0]) & 255], row)
    shared = [place for place in range(4) if int(ITEM_HASH[place]) & 255 == int(ITEM_HASH[0]) & 255]
    assert shared == [0]
    assert np.abs(after[0] - before[0]).max() > 0.01


def test_negatives_are_the_batch_and_draws_from_the_newest_clicks() -> None:
    model = learner(training=TrainingConfig(recent_negatives=50, recent_window=30, seed=2))
    items = model.item_inputs
    assert isinstance(items, Items)
    model.step(clicks(0))
    assert items.asked[-1].tolist() == clicks(0).item_hash.tolist()  # nothing is recent yet
    seen = clicks(0).item_hash
    for seed in (1, 2, 3, 4):
        model.step(clicks(seed))
        asked, own = items.asked[-1], clicks(seed).item_hash
        assert asked[:20].tolist() == own.tolist()
        assert len(asked) == 70
        assert set(asked[20:].tolist()) <= set(seen[-30:].tolist())
        assert len(set(asked[20:].tolist())) > 0.5 * len(set(seen[-30:].tolist()))
        seen = np.concatenate([seen, own])


def test_a_drawn_negative_brings_the_log_q_that_it_had_when_it_was_clicked() -> None:
    """The loss of a corrected step, recomputed from what the catalogue was asked for and from the clicks before it."""
    model = learner(training=TrainingConfig(recent_negatives=15, correction="logq", mask_history=False, seed=4))
    first, second = clicks(0), clicks(1)
    model.step(first)
    towers = learner()
    for name, tensor in towers.state_dict().items():
        if name.startswith(("tables.", "query.", "item.")):
            tensor.copy_(model.state_dict()[name])
    loss = model.step(second).loss
    asked = model.item_inputs.asked[-1]  # type: ignore[attr-defined]
    log_q_of = dict(zip(first.item_hash.tolist(), first.log_q.tolist(), strict=True))
    log_q = torch.tensor([*second.log_q.tolist(), *(log_q_of[value] for value in asked[20:].tolist())])
    query, item = towers.query_tower(second.query), towers.item_tower(towers.item_inputs(asked))
    expected = in_batch_softmax_loss(
        query @ item.T / CONFIG.temperature, torch.from_numpy(second.reward[:, 0]), log_q, candidate_mask(asked, 20)
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_uniform_negatives_are_drawn_from_the_items_that_are_served() -> None:
    model = learner(training=TrainingConfig(recent_negatives=0, uniform_negatives=500, seed=2))
    model.step(clicks(0))
    asked = model.item_inputs.asked[-1]  # type: ignore[attr-defined]
    assert asked[:20].tolist() == clicks(0).item_hash.tolist()
    assert len(asked) == 520
    assert set(asked[20:].tolist()) == set(ITEM_HASH[30:57].tolist())
    times = np.unique(asked[20:], return_counts=True)[1]
    assert abs(times - 500 / 27).max() < 5 * math.sqrt(500 / 27)


def test_an_item_drawn_from_the_catalogue_brings_the_log_q_that_it_has_there() -> None:
    """The loss of a mixed step, recomputed from what the catalogue was asked for, and told apart from a wrong one."""
    model = learner(training=TrainingConfig(recent_negatives=0, uniform_negatives=15, correction="mixed", seed=4))
    towers, batch = learner(), clicks(1)
    for name, tensor in towers.state_dict().items():
        if name.startswith(("tables.", "query.", "item.")):
            tensor.copy_(model.state_dict()[name])
    loss = model.step(batch).loss
    asked = model.item_inputs.asked[-1]  # type: ignore[attr-defined]
    log_q_of = dict(zip(ITEM_HASH[30:].tolist(), known_items()[1].tolist(), strict=True))
    log_q = torch.tensor([*batch.log_q.tolist(), *(log_q_of[value] for value in asked[20:].tolist())])
    logits = towers.query_tower(batch.query) @ towers.item_tower(towers.item_inputs(asked)).T / CONFIG.temperature
    mask = candidate_mask(asked, 20, batch.history_values, batch.history_offsets)
    expected, wrong = (
        batch_loss(
            model.training,
            logits,
            torch.from_numpy(batch.reward[:, 0]),
            Candidates(values, mask, num_uniform=15, num_items=27),
            np.random.default_rng(0),
        ).item()
        for values in (log_q, log_q.flip(0))
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss != pytest.approx(wrong, rel=1e-3)


def test_a_catalogue_that_is_empty_gives_no_uniform_negatives() -> None:
    training = TrainingConfig(recent_negatives=0, uniform_negatives=15, correction="refined", seed=4)
    nothing = (np.zeros(0, np.uint64), np.zeros(0, np.float32))
    model = Learner(CONFIG, training, Items(CONFIG), lambda: nothing)
    model.step(clicks(0))
    assert len(model.item_inputs.asked[-1]) == 20  # type: ignore[attr-defined]


@pytest.mark.parametrize("training", [TrainingConfig(uniform_negatives=1), TrainingConfig(loss="gbce")])
def test_what_needs_a_catalogue_is_refused_without_one(training: TrainingConfig) -> None:
    with pytest.raises(ValueError, match="need a catalogue"):
        Learner(CONFIG, training, Items(CONFIG))


def test_with_one_task_of_weight_one_the_first_loss_is_that_without_tasks() -> None:
    config = dataclasses.replace(CONFIG, tasks=(Task("reward", 1.0),))
    batch = clicks(0)
    assert learner(config).step(batch).loss == pytest.approx(learner().step(batch).loss, rel=1e-6)
    assert learner(config).embed_queries(batch.query) == pytest.approx(learner().embed_queries(batch.query), abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_of_several_tasks_is_the_weighted_sum_of_theirs(variant: str) -> None:
    """Before anything is learnt all heads are alike, so each task's loss is that of its rewards without tasks."""
    batch = clicks(0, config=TWO_TASKS)
    losses = [
        learner(training=VARIANTS[variant]).step(dataclasses.replace(batch, reward=batch.reward[:, [place]])).loss
        for place in (0, 1)
    ]
    second = 0.5 * losses[1]
    if (
        variant == "random"
    ):  # each task draws for itself: what the second one draws is seen where the first has no reward
        without_first = dataclasses.replace(batch, reward=batch.reward * np.array([0, 1], np.float32))
        second = learner(TWO_TASKS, VARIANTS[variant]).step(without_first).loss
        assert 0 < second != pytest.approx(0.5 * losses[1], rel=1e-3)
    together = learner(TWO_TASKS, VARIANTS[variant]).step(batch).loss
    assert together == pytest.approx(losses[0] + second, rel=1e-5)


def test_rewards_that_do_not_fit_the_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="a click has 1 rewards"):
        learner(TWO_TASKS).step(clicks(0))
    with pytest.raises(ValueError, match="a click has 2 rewards"):
        learner().step(clicks(0, config=TWO_TASKS))


def test_heads_learn_rewards_that_contradict_each_other_and_the_weights_choose_between_them() -> None:
    """Users of taste t click items of t and of t + 4; the former are watched to the end, the latter bought."""
    random = np.random.default_rng(0)
    hashes = hash_ids([f"planted {number}" for number in range(NUM_TASTES * ITEMS_PER_TASTE)])
    inputs = ItemFeatures(TowerConfig(item_rows=2**12))

    def own_taste_first(watched: float, bought: float) -> float:
        tasks = (Task("watched", watched), Task("bought", bought))
        config = TowerConfig(embedding_dim=16, row_dim=16, item_rows=2**12, tasks=tasks)
        training = TrainingConfig(recent_window=2_000)
        model = Learner(config, training, lambda item_hash: inputs.gather(item_hash, np.full(len(item_hash), -1)))
        for _ in range(30):
            batch, items = planted(random, 256, config)
            other = random.random(256) < 0.5
            item = (items[:, 5] + other * (NUM_TASTES // 2) * ITEMS_PER_TASTE) % len(hashes)
            reward = np.stack([~other, other], axis=1).astype(np.float32)
            model.learn(dataclasses.replace(batch, item_hash=hashes[item], reward=reward))
        test, items = planted(random, 500, config)
        scores = model.embed_queries(test.query) @ model.embed_items(model.item_inputs(hashes)).T
        scores[np.arange(500)[:, None], items[:, :5]] = -np.inf
        best = np.argsort(-scores, axis=1)[:, : ITEMS_PER_TASTE - 5]
        return float((best // ITEMS_PER_TASTE == items[:, :1] // ITEMS_PER_TASTE).mean())

    assert own_taste_first(1.0, 0.05) > 0.9
    assert own_taste_first(0.05, 1.0) < 0.1


def test_clicks_of_reward_zero_move_nothing() -> None:
    model = learner()
    before = copied(model.state_dict())
    result = model.step(dataclasses.replace(clicks(0), reward=np.zeros(20, np.float32)))
    assert result.loss == 0.0
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name.startswith("tables.")
    )


@pytest.mark.parametrize("reward", [math.inf, math.nan, 1e30])
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_no_bit(reward: float) -> None:
    """1e30: loss and gradient are finite, but Adagrad's sum of its squares would not be."""
    model = learner(training=TrainingConfig(recent_negatives=30, recent_window=50))
    for seed in range(3):
        model.step(clicks(seed))
    before = copied(model.state_dict())
    bad = clicks(3)
    bad.reward[0] = reward
    with pytest.raises(NonFiniteError, match="step 3"):
        model.step(bad)
    assert_same_bits(model.state_dict(), before)
    untroubled = learner(training=model.training)
    untroubled.load_state_dict(before)
    model.step(clicks(4))
    untroubled.step(clicks(4))
    assert_same_bits(model.state_dict(), untroubled.state_dict())


def test_a_weight_that_is_not_finite_stops_the_step() -> None:
    model = learner()
    model.state_dict()["query.layers.0.weight"][0, 0] = math.nan
    before = copied(model.state_dict())
    with pytest.raises(NonFiniteError):
        model.step(clicks(0))
    assert torch.equal(model.state_dict()["tables.items"], before["tables.items"])


def test_a_micro_batch_is_cut_into_steps_of_equal_size() -> None:
    model = learner(training=TrainingConfig(rows_per_step=16, recent_negatives=0, seed=5))
    result = model.learn(clicks(0, num_clicks=50))
    items = model.item_inputs
    assert isinstance(items, Items)
    assert (result.num_rows, result.num_steps, model.num_steps) == (50, 4, 4)
    assert [len(asked) for asked in items.asked] == [13, 13, 12, 12]
    learnt = np.concatenate(items.asked)
    assert sorted(learnt.tolist()) == sorted(clicks(0, num_clicks=50).item_hash.tolist())
    assert learnt.tolist() != clicks(0, num_clicks=50).item_hash.tolist()


def test_the_loss_of_a_micro_batch_is_the_mean_over_its_rows() -> None:
    training = TrainingConfig(rows_per_step=16, recent_negatives=0, seed=5)
    whole, cut = learner(training=training), learner(training=training)
    batch = clicks(0, num_clicks=50)
    result = whole.learn(batch)
    order = np.random.default_rng([5, 0, 1]).permutation(50)
    losses = [cut.step(batch.take(rows)).loss * len(rows) for rows in np.split(order, [13, 26, 38])]
    assert result.loss == pytest.approx(sum(losses) / 50)
    assert_same_bits(whole.state_dict(), cut.state_dict())


def test_taken_clicks_keep_their_own_histories() -> None:
    batch = clicks(0)
    taken = batch.take(np.array([7, 2, 7]))
    for place, row in enumerate([7, 2, 7]):
        own = batch.history_values[batch.history_offsets[row] : batch.history_offsets[row + 1]]
        came = taken.history_values[taken.history_offsets[place] : taken.history_offsets[place + 1]]
        assert came.tolist() == own.tolist()
        assert taken.item_hash[place] == batch.item_hash[row]


def test_no_clicks_are_refused() -> None:
    with pytest.raises(ValueError, match="no clicks"):
        learner().learn(clicks(0, num_clicks=0))


def test_the_same_seed_learns_the_same_bits_and_another_seed_others() -> None:
    models = [learner(training=TrainingConfig(rows_per_step=8, recent_window=50, seed=seed)) for seed in (1, 1, 2)]
    for seed in range(4):
        for model in models:
            model.learn(clicks(seed))
    assert_same_bits(models[0].state_dict(), models[1].state_dict())
    assert not torch.equal(models[0].state_dict()["tables.items"], models[2].state_dict()["tables.items"])


@pytest.mark.parametrize("config", [CONFIG, TWO_TASKS], ids=["one task", "two tasks"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_batches", [0, 1, 5])
def test_learning_goes_on_from_a_stored_state_as_if_never_interrupted(
    num_batches: int, variant: str, config: TowerConfig, tmp_path: Path
) -> None:
    training = VARIANTS[variant]
    straight = learner(config, training)
    for seed in range(num_batches):
        straight.learn(clicks(seed, config=config))
    save_file(straight.state_dict(), tmp_path / "state")
    resumed = learner(config, training)
    resumed.learn(clicks(99, config=config))
    resumed.load_state_dict(load_file(tmp_path / "state"))
    for seed in range(num_batches, num_batches + 3):
        assert straight.learn(clicks(seed, config=config)) == resumed.learn(clicks(seed, config=config))
    assert_same_bits(straight.state_dict(), resumed.state_dict())
    query = clicks(7).query
    assert straight.embed_queries(query).tobytes() == resumed.embed_queries(query).tobytes()


def test_the_state_of_another_configuration_is_refused_and_changes_nothing() -> None:
    model = learner()
    model.learn(clicks(0))
    before = copied(model.state_dict())
    others = [
        learner(dataclasses.replace(CONFIG, item_rows=128)),
        learner(dataclasses.replace(CONFIG, hidden=(4,))),
        learner(TWO_TASKS),
        learner(training=dataclasses.replace(BATCH_ALONE, recent_window=10)),
    ]
    for other in others:
        other.learn(clicks(1, config=other.config))
        with pytest.raises(ValueError, match="another configuration"):
            model.load_state_dict(other.state_dict())
        assert_same_bits(model.state_dict(), before)


NUM_TASTES, ITEMS_PER_TASTE = 8, 20


def planted(random: np.random.Generator, num_clicks: int, config: TowerConfig) -> tuple[Clicks, np.ndarray]:
    """Each click has one of eight tastes; its history are five items of that taste, its item another one. Popularity
    within a taste falls geometrically, and is the same for all tastes."""
    taste = random.integers(0, NUM_TASTES, num_clicks)
    share = 0.9 ** np.arange(ITEMS_PER_TASTE)
    orders = np.array([random.choice(ITEMS_PER_TASTE, 6, replace=False, p=share / share.sum()) for _ in taste])
    items = taste[:, None] * ITEMS_PER_TASTE + orders
    hashes = hash_ids([f"planted {number}" for number in range(NUM_TASTES * ITEMS_PER_TASTE)])
    history, offsets = hashes[items[:, :5].ravel()], 5 * np.arange(num_clicks + 1)
    log_q = np.log(share / share.sum() / NUM_TASTES)[orders[:, 5]].astype(np.float32)
    query = query_inputs(config, None, history, offsets)
    return Clicks(query, hashes[items[:, 5]], np.ones(num_clicks, np.float32), log_q, history, offsets), items


@pytest.mark.parametrize(
    ("config", "training", "popularity_weight"),
    [
        (TowerConfig(embedding_dim=16, row_dim=16, item_rows=2**12), TrainingConfig(recent_window=2_000), 1.0),
        (
            TowerConfig(embedding_dim=16, row_dim=16, item_rows=2**12, hidden=(32,), history_decay=1.0),
            TrainingConfig(correction="logq", recent_negatives=0, mask_history=False),
            0.0,
        ),
    ],
    ids=["default", "paper"],
)
def test_a_planted_taste_is_learnt(config: TowerConfig, training: TrainingConfig, popularity_weight: float) -> None:
    random = np.random.default_rng(0)
    hashes = hash_ids([f"planted {number}" for number in range(NUM_TASTES * ITEMS_PER_TASTE)])
    model = Learner(
        config, training, lambda item_hash: ItemFeatures(config).gather(item_hash, np.full(len(item_hash), -1))
    )
    losses = [model.learn(planted(random, 256, config)[0]).loss for _ in range(40)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])

    test, items = planted(random, 1_000, config)
    own_taste = np.arange(len(hashes)) // ITEMS_PER_TASTE == items[:, :1] // ITEMS_PER_TASTE
    log_q = np.tile(0.9 ** np.arange(ITEMS_PER_TASTE), NUM_TASTES)
    log_q = np.log(log_q / log_q.sum())

    def best(scores: np.ndarray, k: int) -> np.ndarray:
        scores[np.arange(len(items))[:, None], items[:, :5]] = -np.inf
        return np.argsort(-scores, axis=1)[:, :k]

    # All 15 items that are left of the own taste come before the 140 of the others; by chance .097 of them would.
    affinity = model.embed_queries(test.query) @ model.embed_items(model.item_inputs(hashes)).T / config.temperature
    assert np.take_along_axis(own_taste, best(affinity.copy(), ITEMS_PER_TASTE - 5), 1).mean() > 0.95
    # The served score ranks them by popularity, nearly as well as the distribution that the clicks were drawn from.
    served, exact = affinity + popularity_weight * log_q, np.where(own_taste, log_q, -np.inf)
    recall, best_recall = ((best(scores, 5) == items[:, 5:]).any(1).mean() for scores in (served, exact))
    assert recall > best_recall - 0.04
