"""The loss against a slow reference by value, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.loss import gbce_loss, in_batch_softmax_loss, sampled_softmax_loss
from trainer.negatives import log_expected_count, refined_log_count


def slow_loss(logits: Tensor, reward: Tensor, log_q: Tensor | None, mask: Tensor | None) -> float:
    """The paper's formula, one term after the other: correct, then mask, then softmax; divided by B."""
    num_clicks, num_candidates = logits.shape
    total = 0.0
    for i in range(num_clicks):
        corrected = [
            float(logits[i, j]) - (float(log_q[j]) if log_q is not None else 0.0) for j in range(num_candidates)
        ]
        denominator = 0.0
        for j in range(num_candidates):
            if mask is None or not mask[i, j]:
                denominator += math.exp(corrected[j])
        total += float(reward[i]) * (corrected[i] - math.log(denominator))
    return -total / num_clicks


def example(seed: int, num_clicks: int = 5, num_candidates: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = np.random.default_rng(seed)
    mask = random.random((num_clicks, num_candidates)) < 0.3
    mask[np.arange(num_clicks), np.arange(num_clicks)] = False
    return (
        torch.from_numpy(random.normal(0, 5, (num_clicks, num_candidates))),
        torch.from_numpy(random.choice([0.0, 0.5, 1.0, 3.0], num_clicks)),
        torch.from_numpy(np.log(random.dirichlet(np.ones(num_candidates)))),
        torch.from_numpy(mask),
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_papers_formula_by_value(seed: int, corrected: bool, masked: bool) -> None:
    logits, reward, log_q, mask = example(seed)
    arguments = (logits, reward, log_q if corrected else None, mask if masked else None)
    assert in_batch_softmax_loss(*arguments).item() == pytest.approx(slow_loss(*arguments), rel=1e-12)


def test_the_gradient_is_that_of_the_loss() -> None:
    logits, reward, log_q, mask = example(0)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda values: in_batch_softmax_loss(values, reward, log_q, mask), (logits,))


def test_the_gradient_of_a_row_is_reward_times_softmax_minus_one_over_b() -> None:
    logits, reward, log_q, mask = example(1)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(in_batch_softmax_loss(logits, reward, log_q, mask), logits)
    probability = torch.softmax((logits.detach() - log_q).masked_fill(mask, -torch.inf), dim=1)
    expected = reward[:, None] * (probability - torch.eye(*logits.shape)) / len(logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("scale", [1e-6, 0.5, 256.0])
def test_scaling_all_probabilities_changes_neither_loss_nor_gradient(scale: float) -> None:
    logits, reward, log_q, mask = example(2)
    logits.requires_grad_()
    losses = [in_batch_softmax_loss(logits, reward, values, mask) for values in (log_q, log_q + math.log(scale))]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_with_equal_probabilities_the_correction_changes_nothing() -> None:
    logits, reward, log_q, mask = example(3)
    corrected = in_batch_softmax_loss(logits, reward, torch.full_like(log_q, -3.0), mask)
    torch.testing.assert_close(corrected, in_batch_softmax_loss(logits, reward, None, mask))


def test_the_temperature_divides_before_log_q_is_subtracted() -> None:
    """(s − log q) / τ is the known mistake: it corrects 1/τ times too much."""
    logits, reward, log_q, _ = example(4)
    cosines, temperature = logits / 10, 0.05
    right = in_batch_softmax_loss(cosines / temperature, reward, log_q).item()
    assert right == pytest.approx(slow_loss(cosines / temperature, reward, log_q, None), rel=1e-12)
    assert right != pytest.approx(slow_loss((cosines - log_q) / temperature, reward, None, None), rel=1e-3)


def test_log_q_does_not_bring_a_masked_candidate_back() -> None:
    logits, reward, log_q, mask = example(5)
    tiny = log_q.clone()
    column = int(mask.any(0).nonzero()[-1])
    assert column >= len(logits)
    everywhere = mask.clone()
    everywhere[:, column] = True
    tiny[column] = -1e30
    torch.testing.assert_close(
        in_batch_softmax_loss(logits, reward, tiny, everywhere),
        in_batch_softmax_loss(logits, reward, log_q, everywhere),
    )


def test_a_row_of_reward_zero_adds_no_loss_but_its_item_stays_a_negative() -> None:
    logits, _, log_q, _ = example(6)
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    logits.requires_grad_()
    loss = in_batch_softmax_loss(logits, reward, log_q)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.all(gradient[1] == 0)
    assert torch.all(gradient[[0, 2, 3, 4], 1] > 0)
    assert loss.item() == pytest.approx(slow_loss(logits.detach(), reward, log_q, None))


def test_the_divisor_is_the_number_of_rows_not_the_sum_of_rewards() -> None:
    logits, reward, log_q, mask = example(7)
    once = in_batch_softmax_loss(logits, reward, log_q, mask)
    torch.testing.assert_close(in_batch_softmax_loss(logits, 10 * reward, log_q, mask), 10 * once)


def test_a_click_whose_candidates_are_all_masked_costs_nothing() -> None:
    logits, mask = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, dtype=torch.bool)
    mask[[0, 1], [0, 1]] = False
    assert in_batch_softmax_loss(logits, torch.ones(2), None, mask).item() == 0.0


def test_shapes_that_contradict_each_other_are_refused_with_both() -> None:
    logits, reward, log_q, mask = example(8)
    with pytest.raises(ValueError, match=r"\(9, 5\)"):
        in_batch_softmax_loss(logits.T, reward, log_q, mask)
    with pytest.raises(ValueError, match=r"rewards are \(4,\) and should be \(5,\)"):
        in_batch_softmax_loss(logits, reward[:4])
    with pytest.raises(ValueError, match=r"log q is \(8,\) and should be \(9,\)"):
        in_batch_softmax_loss(logits, reward, log_q[:8])
    with pytest.raises(ValueError, match=r"mask is \(5, 8\) and the logits are \(5, 9\)"):
        in_batch_softmax_loss(logits, reward, log_q, mask[:, :8])


def slow_sampled_loss(logits: Tensor, reward: Tensor, log_count: Tensor, mask: Tensor | None) -> float:
    """The positive as it is, every negative divided by its expected count, one term after the other."""
    num_clicks, num_candidates = logits.shape
    total = 0.0
    for i in range(num_clicks):
        denominator = math.exp(float(logits[i, i]))
        for j in range(num_candidates):
            if j != i and (mask is None or not mask[i, j]):
                count = math.exp(float(log_count[i, j] if log_count.ndim == 2 else log_count[j]))
                denominator += math.exp(float(logits[i, j])) / count
        total += float(reward[i]) * (float(logits[i, i]) - math.log(denominator))
    return -total / num_clicks


def slow_gbce(logits: Tensor, reward: Tensor, num_items: int, calibration: float, mask: Tensor | None) -> float:
    """As printed: beta by the sampling rate, sigmoid of each logit, one term after the other."""
    num_clicks, num_candidates = logits.shape
    total = 0.0
    for i in range(num_clicks):
        negatives = [j for j in range(num_candidates) if j != i and (mask is None or not mask[i, j])]
        rate = min(len(negatives) / (num_items - 1), 1.0)
        beta = rate * (calibration * (1 - 1 / rate) + 1 / rate) if rate else 1 - calibration
        row = math.log((1 / (1 + math.exp(-float(logits[i, i])))) ** beta)
        for j in negatives:
            row += math.log(1 - 1 / (1 + math.exp(-float(logits[i, j]))))
        total += float(reward[i]) * row / (len(negatives) + 1)
    return -total / num_clicks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_sampled_softmax_is_its_formula_by_value(seed: int, masked: bool, by_row: bool) -> None:
    logits, reward, log_q, mask = example(seed)
    log_count = refined_log_count(log_q, mask) if by_row else log_expected_count(log_q, 6, 2, 50)
    arguments = (logits, reward, log_count, mask if masked else None)
    assert sampled_softmax_loss(*arguments).item() == pytest.approx(slow_sampled_loss(*arguments), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("num_items", [4, 9, 1_000])
def test_gbce_is_its_formula_by_value(seed: int, masked: bool, calibration: float, num_items: int) -> None:
    logits, reward, _, mask = example(seed)
    arguments = (logits, reward, num_items, calibration, mask if masked else None)
    assert gbce_loss(*arguments).item() == pytest.approx(slow_gbce(*arguments), rel=1e-9)


def test_gbce_without_calibration_is_torchs_binary_cross_entropy() -> None:
    logits, _, _, _ = example(9)
    targets = torch.eye(*logits.shape, dtype=logits.dtype)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(gbce_loss(logits, torch.ones(len(logits), dtype=logits.dtype), 77, 0.0), expected)


@pytest.mark.parametrize("name", ["refined", "mixed", "gbce"])
def test_the_gradients_of_the_other_losses_are_theirs(name: str) -> None:
    logits, reward, log_q, mask = example(10)
    logits.requires_grad_()
    losses = {
        "refined": lambda values: sampled_softmax_loss(values, reward, refined_log_count(log_q, mask), mask),
        "mixed": lambda values: sampled_softmax_loss(values, reward, log_expected_count(log_q, 6, 2, 50), mask),
        "gbce": lambda values: gbce_loss(values, reward, 50, 0.75, mask),
    }
    assert torch.autograd.gradcheck(losses[name], (logits,))


@pytest.mark.parametrize("seed", range(20))
def test_the_refined_correction_has_the_gradient_of_its_literal_form(seed: int) -> None:
    """-sg[1 - P] * log(e^f_p / sum_i e^(f_i - log Q'_i)), P = e^f_p / (e^f_p + mean_i e^(f_i - log Q'_i))."""
    logits, reward, log_q, mask = example(seed)
    logits.requires_grad_()
    literal = torch.zeros((), dtype=logits.dtype)
    for i in range(len(logits)):
        negatives = [j for j in range(logits.shape[1]) if j != i and not mask[i, j]]
        if not negatives:
            continue
        refined_q = log_q[negatives].exp() / (1 - log_q[i].exp())
        terms = (logits[i, negatives] - refined_q.log()).exp()
        foreseen = logits[i, i].exp() / (logits[i, i].exp() + terms.mean())
        literal = literal - reward[i] * (1 - foreseen).detach() * (logits[i, i] - terms.sum().log()) / len(logits)
    stable = sampled_softmax_loss(logits, reward, refined_log_count(log_q, mask), mask)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (stable, literal)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert stable.item() != pytest.approx(literal.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1_000.0])
def test_losses_and_gradients_stay_finite_where_exp_does_not(scale: float) -> None:
    logits, reward, log_q, mask = example(11)
    logits = (logits * scale).float().requires_grad_()
    losses = [
        in_batch_softmax_loss(logits, reward.float(), log_q.float(), mask),
        sampled_softmax_loss(logits, reward.float(), refined_log_count(log_q.float(), mask), mask),
        gbce_loss(logits, reward.float(), 50, 0.75, mask),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.all(torch.isfinite(gradient))


@pytest.mark.parametrize("name", ["none", "logq", "refined", "mixed", "gbce"])
def test_what_is_masked_does_not_matter(name: str) -> None:
    logits, reward, log_q, mask = example(12)

    def loss(values: Tensor) -> Tensor:
        if name == "gbce":
            return gbce_loss(values, reward, 50, 0.75, mask)
        if name in ("none", "logq"):
            return in_batch_softmax_loss(values, reward, log_q if name == "logq" else None, mask)
        counts = refined_log_count(log_q, mask) if name == "refined" else log_expected_count(log_q, 6, 2, 50)
        return sampled_softmax_loss(values, reward, counts, mask)

    assert mask.any()
    assert loss(logits).item() == loss(logits.masked_fill(mask, 99.0)).item()


NUM_ITEMS = 12


def full_softmax_gradient(scores: Tensor, positive: int) -> Tensor:
    return torch.softmax(scores, 0) - torch.nn.functional.one_hot(torch.tensor(positive), NUM_ITEMS)


def sampled_gradient(name: str, scores: Tensor, log_q: Tensor, positive: int, n: int, seed: int) -> Tensor:
    """Gradient with respect to all items' scores, of one click against n negatives drawn as the correction assumes."""
    random = np.random.default_rng(seed)
    num_uniform = n // 2 if name == "mixed" else 0
    drawn = random.choice(NUM_ITEMS, n - num_uniform, p=log_q.exp().numpy())
    candidates = torch.from_numpy(np.concatenate([[positive], drawn, random.integers(NUM_ITEMS, size=num_uniform)]))
    mask = (candidates == positive)[None]
    mask[0, 0] = False
    leaf = scores.clone().requires_grad_()
    logits, one = leaf[candidates][None], torch.ones(1, dtype=scores.dtype)
    if name == "logq":
        loss = in_batch_softmax_loss(logits, one, log_q[candidates])
    elif name == "refined":
        loss = sampled_softmax_loss(logits, one, refined_log_count(log_q[candidates], mask), mask)
    else:
        log_count = log_expected_count(log_q[candidates], n - num_uniform, num_uniform, NUM_ITEMS)
        loss = sampled_softmax_loss(logits, one, log_count, mask)
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", ["logq", "refined", "mixed"])
def test_with_more_and_more_negatives_the_gradient_becomes_that_of_the_full_softmax(name: str) -> None:
    """The error falls as 1 / sqrt(n): a hundred times the negatives, a tenth of the error, and no floor below it."""
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.normal(0, 1.5, NUM_ITEMS))
    log_q = torch.from_numpy(np.log(random.dirichlet(np.full(NUM_ITEMS, 2.0))))
    errors = {}
    for n in (300, 30_000):
        squares = [
            (sampled_gradient(name, scores, log_q, positive, n, seed) - full_softmax_gradient(scores, positive))
            .square()
            .sum()
            for positive in (0, 5, 11)
            for seed in range(10)
        ]
        errors[n] = torch.stack(squares).mean().sqrt().item()
    assert errors[30_000] < 0.01
    assert 5 < errors[300] / errors[30_000] < 20


def test_the_papers_correction_needs_the_copies_of_the_positive_that_are_masked() -> None:
    """With them masked its positive counts 1 / q once and all else n times: it no longer weighs in the denominator."""
    scores = torch.zeros(NUM_ITEMS, dtype=torch.float64, requires_grad=True)
    candidates = torch.arange(NUM_ITEMS).repeat(1_000)
    uniform = torch.full((len(candidates),), -math.log(NUM_ITEMS), dtype=torch.float64)
    mask = (candidates == 0)[None]
    mask[0, 0] = False
    one = torch.ones(1, dtype=torch.float64)
    (copies,) = torch.autograd.grad(in_batch_softmax_loss(scores[candidates][None], one, uniform), scores)
    (masked,) = torch.autograd.grad(in_batch_softmax_loss(scores[candidates][None], one, uniform, mask), scores)
    refined = sampled_softmax_loss(scores[candidates][None], one, refined_log_count(uniform, mask), mask)
    assert copies[0].item() == pytest.approx(-11 / 12)
    assert masked[0].item() == pytest.approx(-11_000 / 11_001)
    assert torch.autograd.grad(refined, scores)[0][0].item() == pytest.approx(-11 / 12)


def test_log_counts_of_another_shape_are_refused_with_both() -> None:
    logits, reward, log_q, _ = example(13)
    with pytest.raises(ValueError, match=r"log counts are \(8,\) and the logits are \(5, 9\)"):
        sampled_softmax_loss(logits, reward, log_q[:8])
    with pytest.raises(ValueError, match=r"rewards are \(4,\)"):
        gbce_loss(logits, reward[:4], 9, 0.5)
