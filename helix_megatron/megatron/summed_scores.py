"""Attention by partial scores of slices, summed over the dim group in fp32. Needs memory for all scores.

S sequence, L keys, B batch, N query heads (hq), K KV heads (hk) of the head group, d_s dimensions of a slice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from helix_megatron.exchange.collectives import all_reduce_sum
from helix_megatron.exchange.groups import HelixGroups, seed_of_dim_group
from helix_megatron.kernels.merge import softmax_with_sinks

DIM_GROUP_RNG = "helix-dim-group-rng"


def attend_by_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    softmax_scale: float,
    dropout: Callable[[Tensor], Tensor] | None,
    group: dist.ProcessGroup,
    sinks: Tensor | None = None,
) -> Tensor:
    """One all-reduce over `group`, of B N S L fp32 scores, and of N sinks where there are any.

    Args:
        query: [S, B, N, d_s].
        key, value: [L, B, K, d_s].
        hidden: True where a query must not look, broadcast to [B, N, S, L]; or None.
        dropout: of the probabilities; the ranks of a dim group hold the same ones and drop the same of them.
        sinks: [N] fp32, a summand of the sinks of all heads (share_of_sinks); None for none.
    Returns:
        [S, B, N, d_s].
    """
    kv_heads = key.shape[2]
    scaled = (query.float() * softmax_scale).unflatten(2, (kv_heads, -1))
    scores = torch.einsum("sbkrd,lbkd->bkrsl", scaled, key.float()).flatten(1, 2)  # [B, N, S, L]
    if sinks is None:
        scores = all_reduce_sum(scores, group)
    else:
        summed = all_reduce_sum(torch.cat([scores.flatten(), sinks]), group)
        scores, sinks = summed[: -len(sinks)].view_as(scores), summed[-len(sinks) :, None, None]
    if hidden is not None:
        scores = scores.masked_fill(hidden, -10000.0)  # Megatron's value for a forbidden position
    probs = softmax_with_sinks(scores, sinks)
    if dropout is not None:
        with tensor_parallel.get_cuda_rng_tracker().fork(DIM_GROUP_RNG):
            probs = dropout(probs)
    out = torch.einsum("bkrsl,lbkd->bkrsd", probs.unflatten(1, (kv_heads, -1)), value.float())
    return out.permute(3, 0, 1, 2, 4).flatten(2, 3).to(value.dtype)  # it is moved, not the probabilities


def add_dim_group_rng(groups: HelixGroups) -> None:
    """Add to Megatron's tracker a random stream that the ranks of a dim group share."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    if DIM_GROUP_RNG in tracker.get_states():
        return
    tracker.add(DIM_GROUP_RNG, seed_of_dim_group(torch.cuda.initial_seed(), groups.head_rank))
