"""A rank's share of what the new tokens of a step see of each other. Pure torch.

Note [Cached and new keys apart]          m = 2 ranks, 4 query heads, one request of 6 cached and 3 new tokens
                       keys    cached, rank 0's   cached, rank 1's   new
    rank 0 attends     heads   0 1 2 3                               0 1
    rank 1 attends     heads                      0 1 2 3            2 3
    All that was cached before the step is visible to every new token: a rank's part of it needs no mask, so
    kernels that know no mask of dealt positions serve it. Among themselves the new tokens are causal, and
    every rank has their keys and values of all heads in hand, as they were gathered to be kept. Each rank
    adds that part for its share of the query heads, merged by log-sum-exp into what it sends of those; for
    the other heads it sends the cached part alone. So every key counts once for every head, nothing more is
    sent, and a rank computes as much as with its own positions: t^2/2 keys times N/m heads for t^2/(2m)
    keys times N. Shares differ by a head where m does not divide N; with N < m some ranks have none.

T new tokens, N query heads, K KV heads (K divides N), D head dimension, m ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OfHeads(NamedTuple):
    """Attention of some query heads over keys of their own.

    Args:
        first: of the heads, which are consecutive.
        out: [T, n, D].
        lse: [T, n] fp32, of any strides.
    """

    first: int
    out: Tensor
    lse: Tensor


def share_of_heads(heads: int, ranks: int, rank: int) -> range:
    """The query heads whose new keys `rank` attends over: consecutive ones, all ranks' make all heads."""
    return range(heads * rank // ranks, heads * (rank + 1) // ranks)


def kv_heads_for(tensor: Tensor, share: range, ratio: int) -> Tensor:
    """Keys or values [T, K, D] for the query heads of a share: [T, K', D], K' dividing their number.

    A view where each KV head serves equally many of them; else (a share that begins or ends inside of a KV
    head's `ratio` query heads and has others beside it) a copy, a KV head for each query head.
    """
    serving = [head // ratio for head in share]
    counts = {serving.count(kv_head) for kv_head in serving}
    if len(counts) == 1:
        return tensor[:, serving[0] : serving[-1] + 1]
    return torch.stack([tensor[:, kv_head] for kv_head in serving], dim=1)
