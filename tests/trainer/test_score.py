"""The served score by value, and its weights on clicks that were drawn from known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.score import ServedScore


def features(num_rows: int, num_items: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, num_items)).astype(np.float32)
    popularity = random.normal(size=(num_items, 2)).astype(np.float32)
    covisit = (np.exp(random.normal(size=(num_rows, num_items)) + 1) * (random.random(logits.shape) < 0.5)).astype("f4")
    return logits, popularity, covisit, random.integers(0, 21, num_rows)


def test_the_score_is_the_formula_by_value() -> None:
    score = ServedScore(2, covisit_scale=0.3)
    score.weights = np.array([[0.9, 0.1], [0.8, -0.2], [0.3, 0.4], [0.5, 0.2]])
    logits, popularity, covisit, length = features(3, 5, 0)
    given = score.combine(logits, popularity, covisit, length)
    for i in range(3):
        known = math.log(1 + length[i]) - 1.5
        a, w0, w1, b = (first + slope * known for first, slope in score.weights)
        for j in range(5):
            wanted = a * logits[i, j] + w0 * popularity[j, 0] + w1 * popularity[j, 1]
            wanted += b * math.log(1 + 0.3 * covisit[i, j])
            assert given[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_first_weights_that_stay_are_the_plain_score_and_others_begin_near_popularity() -> None:
    still = ServedScore(2, popularity_weight=0.7, covisit_weight=0.4, adapts=False)
    assert still.weights.tolist() == [[1, 0], [0.7, 0], [0, 0], [0.4, 0]]
    assert ServedScore(2).weights.tolist() == [[0.3, 0], [1, 0], [0, 0], [0.5, 0]]


def clicked(score: ServedScore, true: np.ndarray, num_batches: int, gone: int = 0) -> None:
    """Batches of 16 clicks, each on an item drawn by the score with the true weights."""
    random = np.random.default_rng(7)
    teacher = ServedScore(2)
    teacher.weights = true
    for seed in range(num_batches):
        logits, popularity, covisit, length = features(16, 50, seed)
        chances = teacher.combine(logits, popularity, covisit, length).astype(np.float64)
        noise = random.gumbel(size=chances.shape)
        target = np.argmax(chances + noise, axis=1)
        scores = score.combine(logits, popularity, covisit, length)
        scores[:, :gone] = -np.inf
        score.learn(logits, popularity, covisit, length, scores, target)


def test_the_weights_that_made_the_clicks_are_found() -> None:
    true = np.array([[0.6, 0.3], [0.9, -0.2], [0.2, 0.1], [1.1, 0.25]])
    score = ServedScore(2)
    clicked(score, true, 400)
    np.testing.assert_allclose(score.weights, true, atol=0.06)


def test_weights_that_do_not_adapt_and_a_part_that_is_off_stay() -> None:
    still, without = ServedScore(2, adapts=False), ServedScore(2, covisit_weight=0.0)
    before = still.weights.copy()
    clicked(still, np.ones((4, 2)), 3)
    clicked(without, np.ones((4, 2)), 3)
    np.testing.assert_array_equal(still.weights, before)
    assert without.weights[-1].tolist() == [0, 0] and without.weights[1, 0] != 1


def test_a_click_whose_item_is_no_candidate_teaches_nothing() -> None:
    score = ServedScore(2)
    logits, popularity, covisit, length = features(2, 50, 1)
    scores = score.combine(logits, popularity, covisit, length)
    scores[0, 3] = -np.inf
    before = score.weights.copy()
    score.learn(logits, popularity, covisit, length, scores, np.array([3, -1]))
    np.testing.assert_array_equal(score.weights, before)


def test_a_resumed_score_learns_on_as_if_it_had_never_stopped() -> None:
    whole, first, second = ServedScore(2), ServedScore(2), ServedScore(2)
    clicked(whole, np.ones((4, 2)), 4)
    clicked(first, np.ones((4, 2)), 4)
    second.load_state_dict(first.state_dict())
    for score in (whole, second):
        clicked(score, np.ones((4, 2)), 2)
    np.testing.assert_array_equal(whole.weights, second.weights)
    with pytest.raises(ValueError, match="should be"):
        ServedScore(3).load_state_dict(first.state_dict())
