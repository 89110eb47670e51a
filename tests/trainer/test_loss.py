"""The loss against a slow reference by value, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.loss import candidate_mask, in_batch_softmax_loss


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


def slow_mask(items: list[int], num_clicks: int, histories: list[list[int]]) -> np.ndarray:
    mask = np.zeros((num_clicks, len(items)), dtype=bool)
    for i in range(num_clicks):
        for j, item in enumerate(items):
            mask[i, j] = j != i and (item == items[i] or item in histories[i])
    return mask


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


hashes = st.integers(2**63, 2**63 + 6)


@settings(deadline=None)
@given(
    clicks=st.lists(st.tuples(hashes, st.lists(hashes, max_size=5)), min_size=1, max_size=8),
    more=st.lists(hashes, max_size=8),
)
def test_copies_of_the_positive_and_items_of_the_history_are_masked(
    clicks: list[tuple[int, list[int]]], more: list[int]
) -> None:
    items = [item for item, _ in clicks] + more
    histories = [history for _, history in clicks]
    values = np.array([item for history in histories for item in history], dtype=np.uint64)
    offsets = np.cumsum([0, *map(len, histories)])
    candidates = np.array(items, dtype=np.uint64)
    with_histories = candidate_mask(candidates, len(clicks), values, offsets).numpy()
    np.testing.assert_array_equal(with_histories, slow_mask(items, len(clicks), histories))
    accidental_hits = candidate_mask(candidates, len(clicks)).numpy()
    np.testing.assert_array_equal(accidental_hits, slow_mask(items, len(clicks), [[] for _ in clicks]))
