"""CORE: the loss of a batch of clicks against sampled items; free functions of tensors.

Station: between the towers' embeddings and the gradient. It draws no negatives and holds no state: `step` does.

The paper's order is cosine → divide by the temperature → subtract log p → mask. Three more of its points that other
code gets wrong: the positive's logit is corrected too; the divisor is B, not the sum of the rewards; a row of reward 0
adds no loss, while its item stays a negative of the other rows.

Shapes: B clicks, N ≥ B candidates, of which number i is click i's own item for i < B; h history items in all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.features import Int64Array, UInt64Array


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
    num_clicks, num_candidates = logits_BN.shape
    if num_candidates < num_clicks:
        raise ValueError(f"logits are {tuple(logits_BN.shape)}; every click needs its own item among the candidates")
    if reward_B.shape != (num_clicks,):
        raise ValueError(f"rewards are {tuple(reward_B.shape)} and should be {(num_clicks,)}")
    if log_q_N is not None:
        if log_q_N.shape != (num_candidates,):
            raise ValueError(f"log q is {tuple(log_q_N.shape)} and should be {(num_candidates,)}")
        logits_BN = logits_BN - log_q_N
    if mask_BN is not None:
        if mask_BN.shape != logits_BN.shape:
            raise ValueError(f"the mask is {tuple(mask_BN.shape)} and the logits are {tuple(logits_BN.shape)}")
        logits_BN = logits_BN.masked_fill(mask_BN, -torch.inf)
    targets = torch.arange(num_clicks)
    return (reward_B * F.cross_entropy(logits_BN, targets, reduction="none")).sum() / num_clicks


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
