"""Prompts without history: attention as in training, their keys and values kept by position.

Note [A prompt that sees itself alone]
    Nothing that its tokens see is in the cache. So slices become whole heads as in training
    (exchange/heads.py), a rank keeps the keys and values of its positions, and the core that trains attends:
    Transformer Engine's, or PyTorch's, with memory linear in the prompt. A rank's share are query heads (or
    positions) over all keys; the way of single tokens (position_cache.py) gives it all heads over its keys.

    received per rank       prompts                                     single tokens
    before                  2 (m-1) t hk d_s, "dims" + (m-1)/m t hq d_s  (m-1) t (hq + 2 hk) d_s
    after                   "dims" (m-1)/m t hq d_s, "heads" nothing     (m-1) t hq (d_s + e), "heads" /m

    Prompts with history (a chunk that is not the first, a prefix that was cached) go the way of single
    tokens: cores return no log-sum-exp, by which the part over the cache could be merged. FlashAttention
    does, and attends over cached and new keys apart on that way (kernels/new_tokens.py). So do prompts
    whose ranks attend with some of the head group's KV heads, as the cache keeps all of them.

t new tokens, S of a sequence, B batch, N query heads of the head group (hq), K its KV heads (hk), d_s = D/m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from helix_megatron.inference.position_cache import Step
from helix_megatron.kernels.paged_attention import Requests


@dataclass(frozen=True, eq=False)
class Prompts:
    """The whole prompts of a step: consecutive rows of its tokens, behind those of requests with history.

    Args:
        first, stop: their rows.
        host_ends, ends: [prompts + 1] cumulative numbers of their tokens, int32, on host and device.
        longest: of them.
        others: the requests before them.
        singles: so many of those come first and have one new token.
    """

    first: int
    stop: int
    host_ends: Tensor
    ends: Tensor
    longest: int
    others: Requests
    singles: int

    def packed(self, on_host: bool) -> PackedSeqParams | None:
        """For a core; one prompt alone is a sequence like any other."""
        if len(self.host_ends) == 2:
            return None
        ends = self.host_ends if on_host else self.ends
        return PackedSeqParams("thd", ends, ends, max_seqlen_q=self.longest, max_seqlen_kv=self.longest)


def find_prompts(new: list[int], before: list[int], requests: Requests) -> Prompts | None:
    """The whole prompts among a step's requests; None without any, or where one with history comes behind.

    Args:
        new, before: tokens of each request in this step and cached already.
        requests: the same, on the device, and padding behind.
    """
    others = next((number for number, cached in enumerate(before) if not cached), len(before))
    if others == len(before) or any(before[others:]):
        return None
    first, prompts = sum(new[:others]), new[others:]
    host_ends = torch.tensor([0, *prompts], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    ends = requests.query_ends[others : len(new) + 1].to(torch.int32) - first
    tensors = requests.query_ends[: others + 1], requests.lengths[:others], requests.table[:others]
    before_them = Requests(*tensors, longest=max(new[:others], default=0))
    singles = count_singles(new[:others])
    return Prompts(first, first + sum(prompts), host_ends, ends, max(prompts), before_them, singles)


def count_singles(new: list[int]) -> int:
    """How many requests at the beginning have one new token."""
    return next((number for number, count in enumerate(new) if count != 1), len(new))


def attend_among_themselves(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Any,
    step: Step,
    packed: PackedSeqParams | None,
) -> Tensor:
    """Keep the tokens of prompts, and attend.

    Args:
        layer: a HelixParallelSelfAttention.
        query: [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement; neither normed nor rotated.
        key, value: [S, B, K, d_s], the like.
        rows: of RoPE's tables, those of these tokens.
        step: keeps what is this rank's.
        packed: where sequences begin; None for one of S tokens in each of B.
    Returns:
        [S, B, N * d_s], as linear_proj takes it.
    """
    query, key, value = layer.prompt_heads(query, key, value, rows)
    step.write_new_tokens(key, value)
    core = layer.core_attention
    if packed is None:
        return core(query, key, value, None, AttnMaskType.causal)
    query, key, value = (x.squeeze(1) for x in (query, key, value))
    return core(query, key, value, None, AttnMaskType.causal, packed_seq_params=packed).unsqueeze(1)
