"""CORE: which candidates are a click's negatives, and how often each was to be expected among them.

Station: between the candidates that a step has gathered and `loss`. It gathers none (`step` does) and has no weights.

Shapes: B clicks, N ≥ B candidates, of which number i is click i's own item, its positive, for i < B; h history items in
all. A mask is bool [B, N], True where candidate j is no negative of click i, and False at [i, i].
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.features import Int64Array, UInt64Array

Choice = Literal["random", "hardest", "semi-hard"]
"""random: each negative is as likely as the other. hardest: the highest logits. semi-hard: the highest logits below the
positive's and, where these are too few, then the lowest above it."""

_MOST_PROBABLE = 1 - 1e-6
"""An item's share of the clicks, if it is the positive: at 1 there would be no other item to draw."""


def candidate_mask(
    item_hash_N: UInt64Array,
    num_clicks: int,
    history_values: UInt64Array | None = None,
    history_offsets: Int64Array | None = None,
) -> Tensor:
    """Which candidates are no negatives of which click: bool [B, N].

    True where candidate j is an accidental hit (a copy of click i's own item other than the positive itself) or, if
    histories are given, an item of click i's history. Column i of row i, the positive, is never masked.

    Args:
        item_hash_N: uint64 [N] the candidates; the first `num_clicks` are the clicks' own items.
        num_clicks: B.
        history_values: uint64 [h] item hashes of all histories, one after the other.
        history_offsets: int64 [B + 1] click i's history is history_values[history_offsets[i]:history_offsets[i + 1]].
    """
    distinct, position = np.unique(item_hash_N, return_inverse=True)
    clicks = np.arange(num_clicks)
    masked = np.zeros((num_clicks, len(distinct)), dtype=bool)
    masked[clicks, position[:num_clicks]] = True
    if history_values is not None and history_offsets is not None and len(history_values):
        place = np.minimum(np.searchsorted(distinct, history_values), len(distinct) - 1)
        found = distinct[place] == history_values
        masked[np.repeat(clicks, np.diff(history_offsets))[found], place[found]] = True
    mask = masked[:, position]
    mask[clicks, clicks] = False
    return torch.from_numpy(mask)


def negatives_of(mask_BN: Tensor) -> Tensor:
    """Where candidate j counts as a negative of click i: bool [B, N], the mask's opposite without the positives."""
    negative_BN = ~mask_BN
    negative_BN.fill_diagonal_(False)
    return negative_BN


@torch.no_grad()  # type: ignore[untyped-decorator]
def choose_negatives(
    logits_BN: Tensor, mask_BN: Tensor, num_chosen: int, choice: Choice, random: np.random.Generator
) -> Tensor:
    """A mask that leaves each click `num_chosen` of its negatives, or all of them where it has no more.

    Args:
        logits_BN: float [B, N] cosine / temperature, without any correction: hard is what the model takes for liked.
        mask_BN: bool [B, N].
        num_chosen: k ≥ 1.
        choice: which.
        random: draws for the choice at random; not touched by the others.
    """
    if choice == "random":
        key_BN = torch.from_numpy(random.random(tuple(logits_BN.shape)))
    else:
        key_BN = logits_BN.double()
        if choice == "semi-hard":
            above_BN = key_BN - key_BN.diagonal()[:, None]
            near_BN = 1 / (1 + above_BN.abs())
            key_BN = torch.where(above_BN < 0, near_BN, near_BN - 1)
    key_BN = key_BN.masked_fill(~negatives_of(mask_BN), -torch.inf)
    best = key_BN.topk(min(num_chosen, key_BN.shape[1]), dim=1).indices
    chosen_BN = torch.zeros_like(mask_BN).scatter_(1, best, True)
    left_out_BN = mask_BN | ~chosen_BN
    left_out_BN.fill_diagonal_(False)
    return left_out_BN


def log_expected_count(log_q_N: Tensor, num_from_clicks: int, num_uniform: int, num_items: int) -> Tensor:
    """Log of how many copies of each candidate are expected among mixed negatives: [N] (Yang et al., WWW 2020).

    log(C · q_j + U / M): C negatives are drawn from the clicks, where item j has the share q_j, and U uniformly from M
    items. With the positive left out of its own negatives, Σ over the negatives of exp(f_j) / count_j has the mean
    Σ exp(f_j) over all other items.

    Args:
        log_q_N: float [N] log of the candidates' shares of the clicks, at their true scale.
        num_from_clicks: C ≥ 0.
        num_uniform: U ≥ 0.
        num_items: M ≥ 1.
    """
    if num_from_clicks == 0:
        return torch.full_like(log_q_N, _log(num_uniform / num_items))
    from_clicks_N = log_q_N + math.log(num_from_clicks)
    if num_uniform == 0:
        return from_clicks_N
    return torch.logaddexp(from_clicks_N, torch.full_like(log_q_N, _log(num_uniform / num_items)))


def refined_log_count(log_q_N: Tensor, mask_BN: Tensor) -> Tensor:
    """Log of how many copies of each candidate are expected, given how many negatives a click has: [B, N].

    log(n_i · q_j / (1 − q(p_i))): the n_i negatives of click i are draws from q that are not its positive p_i
    (Khrylchenko et al., RecSys 2025, Q'). The masked items of a history take a little more of the whole than the
    positive alone; that is left out, as it is the same for all negatives of a click.

    Args:
        log_q_N: float [N] log of the probability with which a draw gives this candidate, at its true scale.
        mask_BN: bool [B, N].
    """
    num_negatives_B = negatives_of(mask_BN).sum(1).clamp(min=1).to(log_q_N.dtype)
    positive_B = log_q_N[: len(mask_BN)].exp().clamp(max=_MOST_PROBABLE)
    return log_q_N + (num_negatives_B.log() - torch.log1p(-positive_B))[:, None]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
