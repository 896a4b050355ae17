"""Attention over a part of the keys, and the combination of such parts. Pure torch, no communication.

For one query, with scores x_p of the keys p in part j:

    lse_j = log sum_p exp(x_p)          out_j = sum_p exp(x_p - lse_j) v_p
    out   = sum_j w_j out_j / sum_j w_j,   w_j = exp(lse_j - max_j lse_j)

An empty part has out_j = 0 and lse_j = -inf, hence weight 0. When all parts are empty so is the result.

S queries, L keys, B batch, N query heads, K KV heads (K divides N), D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORE_BYTES = 256 * 2**20  # scores that exist at a time


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint parts of the keys.

    Args:
        outs: [parts, ..., D], any floating type; 0 where a part is empty.
        lses: [parts, ...] fp32; -inf where a part is empty.
    Returns:
        output [..., D] fp32 and log-sum-exp [...] fp32 over all parts.
    """
    top = lses.amax(dim=0)
    weights = torch.exp(lses - top.masked_fill(top.isneginf(), 0.0))  # all parts empty: exp(-inf) = 0
    total = weights.sum(dim=0)
    shares = weights / total.masked_fill(total == 0, 1.0)
    out = (outs.float() * shares.unsqueeze(-1)).sum(dim=0)
    return out, top + torch.log(total)  # -inf + -inf when all are empty


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys given, with what merge_partials needs. Computed in fp32.

    Args:
        query: [S, B, N, D].
        key, value: [L, B, K, D]; L may be 0.
        visible: [S, L] bool, True where a query sees a key; a row may be all False.
    Returns:
        output [S, B, N, D] in the query's dtype and log-sum-exp [S, B, N] fp32.
    """
    s, b, heads, _ = query.shape
    length, kv_heads = key.shape[0], key.shape[2]
    if not length or not s:
        return torch.zeros_like(query), query.new_full((s, b, heads), float("-inf"), dtype=torch.float32)
    rows = max(1, _SCORE_BYTES // (4 * b * heads * length))
    key, value = key.float(), value.float()
    outs, lses = [], []
    for part, seen in zip(query.split(rows), visible.split(rows), strict=True):
        scaled = (part.float() * softmax_scale).unflatten(2, (kv_heads, -1))
        scores = torch.einsum("sbkrd,lbkd->sbkrl", scaled, key)
        scores = scores.masked_fill(~seen[:, None, None, None, :], float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        probs = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
        outs.append(torch.einsum("sbkrl,lbkd->sbkrd", probs, value).flatten(2, 3).to(query.dtype))
        lses.append(lse.flatten(2, 3))
    return torch.cat(outs), torch.cat(lses)
