"""Which candidates count, and how often each was to be expected: against slow references by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.negatives import (
    Choice,
    candidate_mask,
    choose_negatives,
    log_expected_count,
    negatives_of,
    refined_log_count,
)


def slow_mask(items: list[int], num_clicks: int, histories: list[list[int]]) -> np.ndarray:
    mask = np.zeros((num_clicks, len(items)), dtype=bool)
    for i in range(num_clicks):
        for j, item in enumerate(items):
            mask[i, j] = j != i and (item == items[i] or item in histories[i])
    return mask


def slow_choice(logits: Tensor, mask: Tensor, num_chosen: int, choice: str) -> np.ndarray:
    left_out = np.ones(tuple(mask.shape), dtype=bool)
    for i in range(len(mask)):
        positive = float(logits[i, i])
        negatives = [(float(logits[i, j]), j) for j in range(mask.shape[1]) if j != i and not mask[i, j]]
        ordered = sorted(negatives, reverse=True)
        if choice == "semi-hard":
            below = [pair for pair in ordered if pair[0] < positive]
            ordered = below + sorted(pair for pair in negatives if pair[0] >= positive)
        left_out[i, i] = False
        for _, j in ordered[:num_chosen]:
            left_out[i, j] = False
    return left_out


def example(seed: int, num_clicks: int = 6, num_candidates: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    random = np.random.default_rng(seed)
    mask = random.random((num_clicks, num_candidates)) < 0.4
    mask[np.arange(num_clicks), np.arange(num_clicks)] = False
    return (
        torch.from_numpy(random.normal(0, 5, (num_clicks, num_candidates)).astype(np.float32)),
        torch.from_numpy(mask),
        torch.from_numpy(np.log(random.dirichlet(np.ones(num_candidates)))),
    )


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


@pytest.mark.parametrize("choice", ["hardest", "semi-hard"])
@pytest.mark.parametrize("num_chosen", [1, 3, 20])
@pytest.mark.parametrize("seed", range(20))
def test_the_hardest_and_the_semi_hard_are_those_of_the_definition(choice: Choice, num_chosen: int, seed: int) -> None:
    logits, mask, _ = example(seed)
    chosen = choose_negatives(logits, mask, num_chosen, choice, np.random.default_rng(0))
    np.testing.assert_array_equal(chosen.numpy(), slow_choice(logits, mask, num_chosen, choice))
    moved = choose_negatives(logits - 40.0, mask, num_chosen, choice, np.random.default_rng(1))
    assert torch.equal(chosen, moved)


@pytest.mark.parametrize("choice", ["random", "hardest", "semi-hard"])
def test_a_choice_leaves_k_negatives_or_all_there_are_and_never_brings_a_masked_one_back(choice: Choice) -> None:
    for seed in range(30):
        logits, mask, _ = example(seed)
        chosen = choose_negatives(logits, mask, 3, choice, np.random.default_rng(seed))
        assert torch.equal(negatives_of(chosen).sum(1), negatives_of(mask).sum(1).clamp(max=3))
        assert not torch.any(mask & ~chosen)
        assert not torch.any(chosen.diagonal())


def test_at_random_each_negative_is_as_likely_as_the_other_whatever_its_logit() -> None:
    logits, mask, _ = example(1)
    random = np.random.default_rng(0)
    times = sum(negatives_of(choose_negatives(logits, mask, 2, "random", random)).double() for _ in range(4_000))
    negatives = negatives_of(mask)
    expected = negatives * (2 / negatives.sum(1, keepdim=True)).clamp(max=1)
    assert (times / 4_000 - expected).abs().max() < 4 * math.sqrt(0.25 / 4_000)


def test_a_choice_at_random_follows_from_the_generator() -> None:
    logits, mask, _ = example(2)
    masks = [choose_negatives(logits, mask, 2, "random", np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("from_clicks", "uniform"), [(10, 0), (0, 7), (10, 7)])
def test_the_expected_count_of_mixed_negatives(from_clicks: int, uniform: int) -> None:
    _, _, log_q = example(3)
    counts = log_expected_count(log_q, from_clicks, uniform, 40).exp()
    for j, count in enumerate(counts.tolist()):
        assert count == pytest.approx(from_clicks * math.exp(log_q[j]) + uniform / 40, rel=1e-12)


def test_mixed_negatives_stand_for_the_whole_catalogue_on_average() -> None:
    """The sum over draws of 1 / count is the number of items; its mean over 4,000 sets of draws says so."""
    random = np.random.default_rng(0)
    share = random.dirichlet(np.full(20, 0.5))
    log_count = log_expected_count(torch.from_numpy(np.log(share)), 8, 4, 20).numpy()
    sums = [
        np.exp(-log_count[np.concatenate([random.choice(20, 8, p=share), random.integers(20, size=4)])]).sum()
        for _ in range(4_000)
    ]
    assert abs(np.mean(sums) - 20) < 4 * np.std(sums) / math.sqrt(4_000)


@pytest.mark.parametrize("seed", range(10))
def test_the_refined_count_is_that_of_draws_which_are_not_the_positive(seed: int) -> None:
    _, mask, log_q = example(seed)
    counts = refined_log_count(log_q, mask).exp()
    for i in range(len(mask)):
        num_negatives = sum(not mask[i, j] for j in range(mask.shape[1]) if j != i)
        for j in range(mask.shape[1]):
            expected = max(num_negatives, 1) * math.exp(log_q[j]) / (1 - math.exp(log_q[i]))
            assert counts[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_an_item_that_takes_all_clicks_leaves_its_negatives_finite_counts() -> None:
    log_q = torch.tensor([0.0, -20.0, -20.0])
    assert torch.all(torch.isfinite(refined_log_count(log_q, torch.zeros(1, 3, dtype=torch.bool))))
