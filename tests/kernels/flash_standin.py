"""FlashAttention's packages on the host: their signatures, what they demand, and their odd corners.

A row of no request, and a request without keys, are left with NaN, log-sum-exps without keys with +inf. What
is computed is the formula of host/kernels.py. The real kernels take a longest sequence on trust: here a wrong
one is an error.
"""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from helix_megatron.host import kernels as host_kernels

HALF = (torch.float16, torch.bfloat16)


def _demand(strict: bool, q, k, v, integers: dict) -> None:
    heads, kv_heads = q.shape[-2], k.shape[-2]
    assert heads % kv_heads == 0, "number of heads in key/value must divide number of heads in query"
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "input tensor must have contiguous last dimension"
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    for name, tensor in integers.items():
        assert tensor.dtype is torch.int32, f"{name} must have dtype int32"
        fits = tensor.stride(-1) == 1 if tensor.dim() > 1 else tensor.is_contiguous()
        assert fits, f"{name} must be contiguous"
    if strict:
        assert q.dtype in HALF, "FlashAttention only supports fp16 and bf16"
        assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8"


def _sequences(q, ends, keys_of: Callable, scale, causal):
    """[T, N, D] to the output and the log-sum-exp [N, T]."""
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], len(q)), torch.nan)
    with _disable_current_modes():  # one kernel, whatever it takes here
        bounds = ends.tolist()
        for number, (begin, end) in enumerate(pairwise(bounds)):
            key, value = keys_of(number)
            if end > begin and len(key):
                found = host_kernels.attend(q[begin:end], key, value, scale, causal)
                out[begin:end], lse[:, begin:end] = found
            elif end > begin:
                lse[:, begin:end] = torch.inf
    return out, lse


def _pages(cache, table, length):
    return cache[table[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def third(strict: bool = True, calls: list | None = None) -> SimpleNamespace:
    """FlashAttention 3; `calls` are told the kernel, the heads and the rows of each."""
    seen = [] if calls is None else calls

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None, cu_seqlens_q=None,
        max_seqlen_q=None, softmax_scale=None, causal=False, window_size=(-1, -1), num_splits=0,
        pack_gqa=None, return_softmax_lse=False,
    ):  # fmt: skip
        integers = dict(cache_seqlens=cache_seqlens, page_table=page_table)
        integers |= {} if cu_seqlens_q is None else dict(cu_seqlens_q=cu_seqlens_q)
        _demand(strict, q, k_cache, v_cache, integers)
        assert pack_gqa is (q.shape[-2] != k_cache.shape[-2]) and return_softmax_lse and not causal
        batch = len(page_table)
        seen.append(("decode" if cu_seqlens_q is None else "cached", q.shape[-2], len(q)))
        if cu_seqlens_q is None:
            ends, rows = torch.arange(0, q[..., 0, 0].numel() + 1, q.shape[1]), q.flatten(0, 1)
        else:
            ends, rows = cu_seqlens_q, q
            assert max_seqlen_q >= int(ends.diff().max()), "max_seqlen_q"
        assert len(ends) == batch + 1 == len(cache_seqlens) + 1
        lengths = cache_seqlens.tolist()
        out, lse = _sequences(
            rows, ends, lambda b: [_pages(x, page_table[b], lengths[b]) for x in (k_cache, v_cache)],
            softmax_scale, False,
        )  # fmt: skip
        if cu_seqlens_q is None:
            out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
        return out, lse, torch.tensor([]), torch.tensor([])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), num_splits=1, pack_gqa=None,
        return_attn_probs=False,
    ):  # fmt: skip
        seen.append(("new", q.shape[1], len(q)))
        return _varlen(
            strict, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
        )

    return SimpleNamespace(
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
        __version__="3.0.0",
    )


def _varlen(strict, q, k, v, q_ends, k_ends, longest_q, longest_k, scale, causal, table=None):
    integers = dict(cu_seqlens_q=q_ends, cu_seqlens_k=k_ends) | ({} if table is None else dict(table=table))
    _demand(strict, q, k, v, integers)
    assert len(q_ends) == len(k_ends) > 1, "batch size must be positive"
    assert longest_q >= int(q_ends.diff().max()) and longest_k >= int(k_ends.diff().max()), "longest"
    bounds, lengths = k_ends.tolist(), k_ends.diff().tolist()
    if table is None:
        assert int(q_ends[-1]) <= len(q) and int(k_ends[-1]) <= len(k)
        keys_of = lambda b: [x[bounds[b] : bounds[b + 1]] for x in (k, v)]  # noqa: E731
    else:
        assert len(table) == len(q_ends) - 1
        keys_of = lambda b: [_pages(x, table[b], lengths[b]) for x in (k, v)]  # noqa: E731
    return _sequences(q, q_ends, keys_of, scale, causal)


def second(strict: bool = True, calls: list | None = None) -> SimpleNamespace:
    """FlashAttention 2."""
    seen = [] if calls is None else calls

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=None, block_table=None, softmax_scale=None, causal=False,
        return_softmax_lse=False,
    ):  # fmt: skip
        _demand(strict, q, k_cache, v_cache, dict(cache_seqlens=cache_seqlens, block_table=block_table))
        assert not strict or k_cache.shape[1] % 256 == 0, "block size must be divisible by 256"
        seen.append(("decode", q.shape[2], len(q)))
        out, lse = host_kernels.flash_attn_with_kvcache(
            q=q, k_cache=k_cache, v_cache=v_cache, cache_seqlens=cache_seqlens, block_table=block_table,
            softmax_scale=softmax_scale, return_softmax_lse=True,
        )  # fmt: skip
        empty = lse.isneginf()
        out = out.masked_fill(empty.transpose(1, 2).unsqueeze(-1), torch.nan)
        return (out, lse.masked_fill(empty, torch.inf)) if return_softmax_lse else out

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        paged = block_table is not None
        assert not (strict and paged) or k.shape[1] % 256 == 0, "block size must be divisible by 256"
        assert max_seqlen_q > 1 or len(q) == len(cu_seqlens_q) - 1, "q is reshaped to the batch"
        seen.append(("cached" if paged else "new", q.shape[1], len(q)))
        out, lse = _varlen(
            strict, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
            block_table,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out

    return SimpleNamespace(
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
        __version__="2.8.9",
    )
