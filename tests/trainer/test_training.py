"""From the configuration to the loss of a step: every combination against one slow reference by value."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from streams.service import load_settings
from tests.trainer.streams_of_clicks import click_stream
from trainer.model import new_model
from trainer.negatives import choose_negatives, negatives_of
from trainer.rewards import task_rewards
from trainer.settings import TrainerSettings
from trainer.step import Clicks
from trainer.training import Candidates, TrainingConfig, batch_loss

NUM_CLICKS, NUM_CANDIDATES, NUM_UNIFORM, NUM_ITEMS = 5, 14, 4, 60


def example(seed: int, num_uniform: int) -> tuple[Tensor, Tensor, Candidates]:
    random = np.random.default_rng(seed)
    mask = random.random((NUM_CLICKS, NUM_CANDIDATES)) < 0.3
    mask[np.arange(NUM_CLICKS), np.arange(NUM_CLICKS)] = False
    return (
        torch.from_numpy(random.normal(0, 3, (NUM_CLICKS, NUM_CANDIDATES))),
        torch.from_numpy(random.choice([0.0, 1.0, 2.5], NUM_CLICKS)),
        Candidates(
            log_q_N=torch.from_numpy(np.log(random.dirichlet(np.ones(NUM_CANDIDATES)))),
            mask_BN=torch.from_numpy(mask),
            num_uniform=num_uniform,
            num_items=NUM_ITEMS,
        ),
    )


def slow_loss(
    training: TrainingConfig, logits: Tensor, reward: Tensor, candidates: Candidates, chosen: Tensor
) -> float:
    """One click and one candidate after the other; `chosen` is the mask after the choice."""
    share = candidates.log_q_N.exp().tolist()
    drawn = NUM_CANDIDATES - 1
    from_clicks = drawn - candidates.num_uniform
    expected = [from_clicks * share[j] + candidates.num_uniform / NUM_ITEMS for j in range(NUM_CANDIDATES)]
    total = 0.0
    for i in range(NUM_CLICKS):
        before = [j for j in range(NUM_CANDIDATES) if j != i and not candidates.mask_BN[i, j]]
        after = [j for j in range(NUM_CANDIDATES) if j != i and not chosen[i, j]]
        kept = len(after) / len(before) if training.chosen_negatives and training.choice == "random" else 1.0
        positive = float(logits[i, i])
        if training.loss == "gbce":
            beta = 1 - training.gbce_calibration * (1 - min(len(after) / (NUM_ITEMS - 1), 1))
            row = beta * math.log(1 / (1 + math.exp(-positive)))
            row += sum(math.log(1 - 1 / (1 + math.exp(-float(logits[i, j])))) for j in after)
            total += float(reward[i]) * row / (len(after) + 1)
            continue
        weights = {}
        for j in [i, *after]:
            if training.correction == "none":
                weights[j] = 1.0
            elif training.correction == "logq":
                weights[j] = expected[j] if candidates.num_uniform else share[j]
            elif j == i:
                weights[j] = 1.0
            elif training.correction == "mixed":
                weights[j] = expected[j] * kept
            else:
                weights[j] = len(before) * (expected[j] / drawn) / (1 - expected[i] / drawn) * kept
        terms = {j: math.exp(float(logits[i, j])) / weight for j, weight in weights.items()}
        total += float(reward[i]) * math.log(terms[i] / sum(terms.values()))
    return -total / NUM_CLICKS


@pytest.mark.parametrize("num_uniform", [0, NUM_UNIFORM])
@pytest.mark.parametrize("choice", ["all", "random", "hardest", "semi-hard"])
@pytest.mark.parametrize("name", ["none", "logq", "refined", "mixed", "gbce"])
def test_every_combination_is_its_formula_by_value(name: str, choice: str, num_uniform: int) -> None:
    how = {"loss": "gbce"} if name == "gbce" else {"correction": name}
    chosen = {} if choice == "all" else {"choice": choice, "chosen_negatives": 3}
    training = TrainingConfig(**how, **chosen)  # type: ignore[arg-type]
    for seed in range(10):
        logits, reward, candidates = example(seed, num_uniform)
        came = batch_loss(training, logits, reward, candidates, np.random.default_rng(seed))
        mask = candidates.mask_BN
        if chosen:
            mask = choose_negatives(logits, mask, 3, training.choice, np.random.default_rng(seed))
            assert negatives_of(mask).sum() < negatives_of(candidates.mask_BN).sum()
        assert came.item() == pytest.approx(slow_loss(training, logits, reward, candidates, mask), rel=1e-9)


@pytest.mark.parametrize("choice", ["random", "hardest", "semi-hard"])
@pytest.mark.parametrize("name", ["none", "logq", "refined", "mixed", "gbce"])
def test_the_gradient_is_that_of_the_loss_for_every_choice(name: str, choice: str) -> None:
    how = {"loss": "gbce"} if name == "gbce" else {"correction": name}
    training = TrainingConfig(choice=choice, chosen_negatives=3, **how)  # type: ignore[arg-type]
    logits, reward, candidates = example(3, NUM_UNIFORM)
    logits.requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return batch_loss(training, values, reward, candidates, np.random.default_rng(0))

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize(("name", "changes"), [("none", False), ("logq", False), ("refined", True), ("mixed", True)])
def test_only_corrections_of_the_negatives_alone_need_the_true_scale_of_q(name: str, changes: bool) -> None:
    logits, reward, candidates = example(4, 0)
    halved = Candidates(candidates.log_q_N - math.log(2), candidates.mask_BN)
    training = TrainingConfig(correction=name)  # type: ignore[arg-type]
    losses = [
        batch_loss(training, logits, reward, each, np.random.default_rng(0)).item() for each in (candidates, halved)
    ]
    assert (losses[0] != pytest.approx(losses[1], rel=1e-9)) is changes


def test_on_average_refined_and_mixed_correct_alike() -> None:
    """The one counts the negatives that came, the other those that were to be expected."""
    training = [TrainingConfig(correction=name) for name in ("refined", "mixed")]  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(8, 3.0))
    scores = torch.from_numpy(random.normal(0, 1, 8))
    items = np.concatenate([[2], random.choice(8, 4_000, p=share)])
    mask = torch.from_numpy(items == 2)[None]
    mask[0, 0] = False
    candidates = Candidates(torch.from_numpy(np.log(share))[items], mask)
    one = torch.ones(1, dtype=torch.float64)
    losses = [batch_loss(each, scores[items][None], one, candidates, random).item() for each in training]
    full = -torch.log_softmax(scores, 0)[2].item()
    assert losses == pytest.approx([full, full], abs=0.05)


def test_a_configuration_says_all_that_is_wrong_with_it_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        TrainingConfig(
            loss="hinge",  # type: ignore[arg-type]
            gbce_calibration=1.5,
            correction="some",  # type: ignore[arg-type]
            choice="best",  # type: ignore[arg-type]
            rows_per_step=0,
            recent_window=0,
            uniform_negatives=-1,
            chosen_negatives=-1,
            row_learning_rate=math.inf,
            seed=-1,
        )
    assert sorted(line.split()[0] for line in str(caught.value).splitlines()) == [
        "choice",
        "chosen_negatives",
        "correction",
        "gbce_calibration",
        "loss",
        "recent_window",
        "row_learning_rate",
        "rows_per_step",
        "seed",
        "uniform_negatives",
    ]
    with pytest.raises(ValueError, match="correction must be none with the loss gbce"):
        TrainingConfig(loss="gbce", correction="logq")


def test_towers_learn_with_the_log_frequencies_from_before_the_micro_batch() -> None:
    """With the clicks' own counts in them, they would tell which candidates were clicked."""
    settings = load_settings(TrainerSettings, {}, item_rows=1024)
    one, other = new_model(settings), new_model(settings)
    for step, batch in enumerate(click_stream(10), 1):
        catalogue = other.catalogue
        before = {int(key): row for key, row in zip(catalogue.item_hash, catalogue.popularity_features(), strict=True)}
        unknown = np.full(5, np.float32(np.log(settings.uniform_ratio) - np.log(max(catalogue.num_items, 1))))
        other._count(batch, slice(0, len(batch)), step)
        rewards = task_rewards((), batch.reward, batch.context)
        clicks = Clicks(
            other._query(batch), batch.item_hash, rewards, np.log(batch.sampling_probability),
            batch.history_values, batch.history_offsets,
        )  # fmt: skip
        result = other.learner.learn(clicks, partial(_found, before, unknown))
        assert one.learn(batch, step).result == result
    states = [model.learner.state_dict() for model in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["query.leaning.weight"].abs().max() > 0.01


def _found(features: dict[int, np.ndarray], unknown: np.ndarray, asked: np.ndarray) -> np.ndarray:
    return np.array([features.get(key, unknown) for key in asked.tolist()])


@pytest.mark.parametrize(
    "values",
    [
        {"correction": "mixed", "uniform_negatives": 40},
        {"loss": "gbce", "chosen_negatives": 5, "choice": "semi-hard"},
        {"preset": "paper", "hidden": (16,)},
        {"personal_popularity": False},
    ],
    ids=["mixed", "gbce", "paper", "impersonal"],
)
def test_a_model_made_from_settings_learns_with_every_part_in_its_place(values: dict[str, object]) -> None:
    """From the settings to the catalogue's items and back: the loss falls, and the same seed gives the same bits."""
    settings = load_settings(TrainerSettings, {}, item_rows=1024, **values)
    models = [new_model(settings) for _ in range(2)]
    losses = []
    for step, batch in enumerate(click_stream(120), 1):
        results = [model.learn(batch, step).result for model in models]
        assert results[0] == results[1]
        losses.append(results[0].loss)
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[5:15])
    states = [model.learner.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
