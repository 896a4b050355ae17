"""Which kernel attends over a rank's part of the KV cache: chosen here, once for each kind of cache.

    flash-attn   for single tokens: its decode kernel returns the log-sum-exp. Where it takes the pages
    triton       everything else on a GPU (paged_attention_triton.py)
    torch        PyTorch's fused attention on the CPU (paged_attention.py), plain PyTorch on others

Transformer Engine's attention serves no paged cache with a log-sum-exp. HELIX_PAGED_ATTENTION names a backend
to be used instead of the choice.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_megatron.kernels.paged_attention import Requests, Sight, paged_attention
from helix_megatron.partition.grid import HelixConfigError

logger = logging.getLogger(__name__)

OVERRIDE = "HELIX_PAGED_ATTENTION"
_FLASH_PAGE = 256  # flash-attn 2 wants the tokens of a page to be a multiple of this


@dataclass(frozen=True)
class Choice:
    """What attends, and why.

    Args:
        singles: backend when every request has one new token at most.
        others: backend for prompts, and for steps with both.
        reason: one line.
    """

    singles: str
    others: str
    reason: str


def attend(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, sight: Sight, singles: bool
) -> tuple[Tensor, Tensor]:
    """paged_attention by the chosen backend.

    Args:
        query: [T, N, D].
        keys, values: [pages, page, K, D].
        singles: row r is the only new token of request r; rows past the last request are padding.
    Returns:
        output [T, N, D] in the query's dtype, log-sum-exp [T, N] fp32; 0 and -inf where nothing is seen.
    """
    windowed = sight.left is not None
    choice = choose(query.device.type, query.dtype, keys.shape[1], windowed, os.environ.get(OVERRIDE))
    backend = _BACKENDS[choice.singles if singles else choice.others]
    return backend(query, keys, values, requests, sight)


@functools.cache
def choose(device: str, dtype: torch.dtype, page: int, windowed: bool, override: str | None = None) -> Choice:
    """The backends for a cache of `dtype` on `device` ("cpu", "cuda") with `page` slots of a rank in a page.

    Raises:
        HelixConfigError: the override names no backend.
    """
    if override:
        if override not in _BACKENDS:
            raise HelixConfigError(f"{OVERRIDE}={override}: choose from {', '.join(_BACKENDS)}")
        choice = Choice(override, override, f"{override}, as {OVERRIDE} says")
    else:
        others, why = _without_flash(device)
        obstacle = _against_flash(device, dtype, page, windowed)
        if obstacle:
            choice = Choice(others, others, f"{others} ({why}); not flash-attn: {obstacle}")
        else:
            choice = Choice(
                "flash-attn", others, f"flash-attn for single tokens, {others} for prompts ({why})"
            )
    logger.info("attention over a rank's part of the KV cache: %s", choice.reason)
    return choice


def _without_flash(device: str) -> tuple[str, str]:
    if device != "cuda":
        return "torch", f"the cache is on the {device}"
    if importlib.util.find_spec("triton") is None:
        return "torch", "Triton is not installed"
    return "triton", "the cache is on a GPU"


def _against_flash(device: str, dtype: torch.dtype, page: int, windowed: bool) -> str | None:
    """Why flash-attn cannot serve single tokens; None when it can."""
    obstacles = {
        f"the cache is on the {device}": device != "cuda",
        "flash-attn is not installed": importlib.util.find_spec("flash_attn") is None,
        f"flash-attn does not compute in {dtype}": dtype not in (torch.float16, torch.bfloat16),
        # a rank's share of a window differs from request to request
        "flash-attn has one window for all requests": windowed,
        f"flash-attn wants pages of a multiple of {_FLASH_PAGE} tokens, a rank's have {page}": page
        % _FLASH_PAGE,
    }
    return next((reason for reason, true in obstacles.items() if true), None)


def flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, sight: Sight
) -> tuple[Tensor, Tensor]:
    """flash-attn's decode kernel: row r is the last token of request r and sees all that the rank keeps."""
    from flash_attn import flash_attn_with_kvcache

    kept = sight.last(requests.lengths - 1)
    rows = len(kept)
    out, lse = flash_attn_with_kvcache(
        q=query[:rows, None],
        k_cache=keys,
        v_cache=values,
        cache_seqlens=kept.to(torch.int32),
        block_table=requests.table,
        softmax_scale=sight.softmax_scale,
        causal=False,
        return_softmax_lse=True,
    )  # [rows, 1, N, D], [rows, N, 1]
    empty = (kept == 0)[:, None]
    outs = torch.zeros_like(query)
    outs[:rows] = out[:, 0].masked_fill(empty.unsqueeze(-1), 0.0)
    lses = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    lses[:rows] = lse[:, :, 0].masked_fill(empty, float("-inf"))  # the kernel says +inf
    return outs, lses


def triton_attention(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, sight: Sight
) -> tuple[Tensor, Tensor]:
    """The project's own kernel; Triton is imported when it is first needed."""
    from helix_megatron.kernels import paged_attention_triton

    return paged_attention_triton.paged_attention(query, keys, values, requests, sight)


_BACKENDS = {"torch": paged_attention, "triton": triton_attention, "flash-attn": flash_attention}
