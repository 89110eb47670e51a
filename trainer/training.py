"""CORE: how the towers learn — the configuration, and the one loss that it makes of a step's logits.

Station: between `step`, which gathers candidates and takes the gradient, and the formulas of `loss` and `negatives`.

Why the default loss has no logQ correction. Negatives come from clicks, so in the optimum the uncorrected logit is
s(u, i) = log p(i | u) − log q(i) + c(u): the affinity without the popularity. The corrected logit s − log q is fitted
to log p(i | u), so its s already holds the popularity, as slow as the towers are. The served score adds the *live*
log q with weight 1 to the plain logit: ⟨f, g⟩ / τ + log q = log p(i | u) + c(u). Subtracting log q in training and
adding it at serving would cancel; so `correction="none"` with popularity weight 1 *is* the corrected estimate, and its
log q can be fast while the towers are slow. Every other correction belongs to a popularity weight of 0, "logq" being
the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from trainer.loss import gbce_loss, in_batch_softmax_loss, sampled_softmax_loss
from trainer.negatives import Choice, choose_negatives, log_expected_count, negatives_of, refined_log_count

Loss = Literal["softmax", "gbce"]
Correction = Literal["none", "logq", "refined", "mixed"]
"""none: no correction. logq: log q is subtracted from all logits, the positive's too (the paper). refined: from the
negatives' alone, given that they are not the positive (Khrylchenko et al. 2025). mixed: likewise, by the counts that
were expected of negatives from clicks and from the catalogue together (Yang et al. 2020)."""


@dataclass(frozen=True)
class TrainingConfig:
    """How the towers learn.

    Raises:
        ValueError: on construction; the message lists every problem, one a line.
    """

    loss: Loss = "softmax"
    """softmax: the clicked item among its negatives; gbce: each against none (Petrov and Macdonald 2023)."""
    gbce_calibration: float = 0.75
    """gBCE's t, 0 … 1: 0 is plain binary cross-entropy, 1 gives calibrated probabilities."""
    correction: Correction = "none"
    """What is subtracted from the logits in training; the module's docstring says when."""
    rows_per_step: int = 64
    """Most clicks of one optimizer step, at least 1; a micro-batch is shuffled and cut into steps of equal size."""
    recent_negatives: int = 192
    """Further negatives of a step, drawn from the recent clicks of earlier steps (cross-batch negative sampling, Wang
    et al., SIGIR 2021, with embeddings made anew instead of kept); 0 = those of the step alone."""
    recent_window: int = 10_000
    """How many of the newest clicks count as recent, at least 1."""
    uniform_negatives: int = 0
    """Further negatives of a step, drawn uniformly from the catalogue: without them an item without clicks is never a
    negative."""
    chosen_negatives: int = 0
    """Negatives of each click that count, out of all candidates of the step; 0 = all."""
    choice: Choice = "random"
    """Which ones count, if not all: random, hardest or semi-hard."""
    mask_history: bool = True
    """Whether items of a row's history are no negatives of it: right where they are not served to it again."""
    row_learning_rate: float = 0.1
    """Adagrad's, for the rows of items and features; > 0."""
    user_learning_rate: float = 0.03
    """Adagrad's, for the rows of users, > 0: a fast one makes a user's row out of its last click."""
    dense_learning_rate: float = 0.02
    """Adagrad's, for the layers; > 0."""
    seed: int = 0
    """First weights, the order within micro-batches and the drawn negatives follow from it, ≥ 0."""

    def __post_init__(self) -> None:
        least = {"rows_per_step": 1, "recent_negatives": 0, "recent_window": 1, "uniform_negatives": 0}
        problems = [
            f"{name} must be an integer of at least {low}, not {getattr(self, name)!r}"
            for name, low in (least | {"chosen_negatives": 0, "seed": 0}).items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low
        ]
        problems += [
            f"{name} must be a finite number above 0, not {getattr(self, name)!r}"
            for name in ("row_learning_rate", "user_learning_rate", "dense_learning_rate")
            if not (isinstance(getattr(self, name), (int, float)) and 0 < getattr(self, name) < math.inf)
        ]
        problems += [
            f"{name} must be one of {', '.join(get_args(words))}, not {getattr(self, name)!r}"
            for name, words in (("loss", Loss), ("correction", Correction), ("choice", Choice))
            if getattr(self, name) not in get_args(words)
        ]
        if not (isinstance(self.gbce_calibration, (int, float)) and 0 <= self.gbce_calibration <= 1):
            problems.append(f"gbce_calibration must be a number of 0 … 1, not {self.gbce_calibration!r}")
        if self.loss == "gbce" and self.correction != "none":
            problems.append(f"correction must be none with the loss gbce, not {self.correction!r}")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def needs_catalogue(self) -> bool:
        """Whether a step has to know the items of the catalogue, beyond those that it meets."""
        return self.uniform_negatives > 0 or self.loss == "gbce"


@dataclass(frozen=True)
class Candidates:
    """What a step knows of its N candidates: B clicked items, then those from recent clicks, then uniform ones."""

    log_q_N: Tensor
    """float32 [N] log of their shares of the clicks."""
    mask_BN: Tensor
    """bool [B, N] see `negatives`."""
    num_uniform: int = 0
    num_items: int = 1
    """Items in the catalogue, where the training `needs_catalogue`."""


def batch_loss(
    training: TrainingConfig, logits_BN: Tensor, reward_B: Tensor, candidates: Candidates, random: np.random.Generator
) -> Tensor:
    """The loss of a step that the configuration asks for: a scalar.

    Args:
        training: says which.
        logits_BN: float [B, N] cosine / temperature.
        reward_B: float [B] ≥ 0.
        candidates: what is known of the columns.
        random: drawn from for negatives chosen at random alone.
    """
    log_q_N, mask_BN = candidates.log_q_N, candidates.mask_BN
    kept_B = None
    if training.chosen_negatives:
        chosen_BN = choose_negatives(logits_BN, mask_BN, training.chosen_negatives, training.choice, random)
        if training.choice == "random":
            # Fewer draws, so fewer copies to be expected; the hardest stand for themselves, whatever was left out.
            after_B, before_B = (negatives_of(mask).sum(1).clamp(min=1).double() for mask in (chosen_BN, mask_BN))
            kept_B = (after_B / before_B).to(logits_BN.dtype)
    else:
        chosen_BN = mask_BN
    if training.loss == "gbce":
        return gbce_loss(logits_BN, reward_B, candidates.num_items, training.gbce_calibration, chosen_BN)
    if training.correction == "none":
        return in_batch_softmax_loss(logits_BN, reward_B, None, chosen_BN)

    num_others, num_uniform = logits_BN.shape[1] - 1, candidates.num_uniform
    log_count_N = log_expected_count(log_q_N, num_others - num_uniform, num_uniform, candidates.num_items)
    if training.correction == "logq":
        return in_batch_softmax_loss(logits_BN, reward_B, log_count_N if num_uniform else log_q_N, chosen_BN)
    log_count = log_count_N
    if training.correction == "refined":
        log_count = refined_log_count(log_count_N - math.log(max(num_others, 1)), mask_BN)
    if kept_B is not None:
        log_count = log_count + kept_B.log()[:, None]
    return sampled_softmax_loss(logits_BN, reward_B, log_count, chosen_BN)
