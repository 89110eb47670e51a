"""CORE: the loss of a batch of clicks against sampled items; free functions of tensors.

Station: between the towers' embeddings and the gradient. It draws no negatives and holds no state: `step` does;
`negatives` says which candidates count and how many copies of each were to be expected, `training` which loss it is.

The paper's order is cosine → divide by the temperature → subtract log p → mask. Three more of its points that other
code gets wrong: the positive's logit is corrected too; the divisor is B, not the sum of the rewards; a row of reward 0
adds no loss, while its item stays a negative of the other rows.

Later work corrects the negatives alone (`sampled_softmax_loss`): the positive is always in the denominator, so it was
never sampled.

Shapes: B clicks, N ≥ B candidates, of which number i is click i's own item for i < B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.negatives import negatives_of


def in_batch_softmax_loss(
    logits_BN: Tensor, reward_B: Tensor, log_q_N: Tensor | None = None, mask_BN: Tensor | None = None
) -> Tensor:
    """Batch softmax with rewards and logQ correction (Yi et al. 2019, section 4): a scalar.

    L = −(1/B) Σ_i r_i · log softmax_j(s_ij − log q_j)[i], over the candidates j that are not masked in row i.

    Args:
        logits_BN: float [B, N] cosine / temperature of click i's query and candidate j; column i is its own item.
        reward_B: float [B] ≥ 0.
        log_q_N: float [N] log of each candidate's sampling probability, up to a constant, or None: no correction.
        mask_BN: bool [B, N] True where candidate j is not to count as a negative of click i, or None. Never True at
            [i, i].

    Raises:
        ValueError: shapes that contradict each other; the message gives both.
    """
    _check_shapes(logits_BN, reward_B, mask_BN)
    if log_q_N is not None:
        num_candidates = logits_BN.shape[1]
        if log_q_N.shape != (num_candidates,):
            raise ValueError(f"log q is {tuple(log_q_N.shape)} and should be {(num_candidates,)}")
        logits_BN = logits_BN - log_q_N
    return _cross_entropy(logits_BN, reward_B, mask_BN)


def sampled_softmax_loss(
    logits_BN: Tensor, reward_B: Tensor, log_count: Tensor, mask_BN: Tensor | None = None
) -> Tensor:
    """Softmax over sampled negatives, each standing for 1 / (its expected count) items; the positive for itself.

    L = −(1/B) Σ_i r_i · [f_ii − log(exp(f_ii) + Σ_{j ≠ i} exp(f_ij − log count_ij))], over the j not masked in row i.

    With the counts of `negatives.refined_log_count` it has the gradient of the refined logQ correction (Khrylchenko et
    al., RecSys 2025), −sg[1 − P̂] · (f_ii − log Σ_j exp(f_ij − log Q'_j)), in a form that is stable and a cross-entropy
    by value too. With those of `negatives.log_expected_count` it is the loss of mixed negative sampling.

    Args:
        logits_BN: as for `in_batch_softmax_loss`.
        reward_B: float [B] ≥ 0.
        log_count: float [N] or [B, N] log of how many copies of candidate j are expected among click i's negatives.
        mask_BN: as for `in_batch_softmax_loss`.

    Raises:
        ValueError: shapes that contradict each other; the message gives both.
    """
    _check_shapes(logits_BN, reward_B, mask_BN)
    if log_count.shape not in (logits_BN.shape, logits_BN.shape[1:]):
        raise ValueError(f"log counts are {tuple(log_count.shape)} and the logits are {tuple(logits_BN.shape)}")
    positive_BN = torch.eye(*logits_BN.shape, dtype=torch.bool)
    return _cross_entropy(torch.where(positive_BN, logits_BN, logits_BN - log_count), reward_B, mask_BN)


def gbce_loss(
    logits_BN: Tensor, reward_B: Tensor, num_items: int, calibration: float, mask_BN: Tensor | None = None
) -> Tensor:
    """Generalised binary cross-entropy (Petrov and Macdonald, RecSys 2023): a scalar.

    L = −(1/B) Σ_i r_i · [β_i · log σ(s_ii) + Σ_j log(1 − σ(s_ij))] / (k_i + 1), over the k_i negatives j of click i;
    β_i = 1 − t · (1 − α_i), α_i = min(k_i / (M − 1), 1): with a positive so much lighter, the probabilities of few
    sampled negatives are not overconfident. t = 0 is plain binary cross-entropy.

    Args:
        logits_BN: as for `in_batch_softmax_loss`.
        reward_B: float [B] ≥ 0.
        num_items: M ≥ 1, items in the catalogue.
        calibration: t, 0 … 1.
        mask_BN: as for `in_batch_softmax_loss`.

    Raises:
        ValueError: shapes that contradict each other; the message gives both.
    """
    _check_shapes(logits_BN, reward_B, mask_BN)
    negative_BN = negatives_of(torch.zeros_like(logits_BN, dtype=torch.bool) if mask_BN is None else mask_BN)
    num_negatives_B = negative_BN.sum(1).to(logits_BN.dtype)
    sampling_rate_B = (num_negatives_B / max(num_items - 1, 1)).clamp(max=1)
    beta_B = 1 - calibration * (1 - sampling_rate_B)
    negatives_B = F.logsigmoid(-logits_BN).masked_fill(~negative_BN, 0.0).sum(1)
    row_B = (beta_B * F.logsigmoid(logits_BN.diagonal()) + negatives_B) / (num_negatives_B + 1)
    return -(reward_B * row_B).sum() / len(reward_B)


def _cross_entropy(logits_BN: Tensor, reward_B: Tensor, mask_BN: Tensor | None) -> Tensor:
    if mask_BN is not None:
        logits_BN = logits_BN.masked_fill(mask_BN, -torch.inf)
    targets = torch.arange(len(reward_B))
    return (reward_B * F.cross_entropy(logits_BN, targets, reduction="none")).sum() / len(reward_B)


def _check_shapes(logits_BN: Tensor, reward_B: Tensor, mask_BN: Tensor | None) -> None:
    num_clicks, num_candidates = logits_BN.shape
    if num_candidates < num_clicks:
        raise ValueError(f"logits are {tuple(logits_BN.shape)}; every click needs its own item among the candidates")
    if reward_B.shape != (num_clicks,):
        raise ValueError(f"rewards are {tuple(reward_B.shape)} and should be {(num_clicks,)}")
    if mask_BN is not None and mask_BN.shape != logits_BN.shape:
        raise ValueError(f"the mask is {tuple(mask_BN.shape)} and the logits are {tuple(logits_BN.shape)}")
