"""torch versions of the two flash-attn entry points that Megatron's dynamic inference engine calls.

Shapes: B sequences, Q = total query tokens, H query heads, K KV heads (K divides H; query head h reads KV
head h // (H/K)), D head dimension. Paged caches are [blocks, block_size, K, D] with `block_table`
[B, blocks per sequence].

Causal masks are aligned to the bottom right, as in flash-attn ≥ 2.1: with s_q queries and s_k keys, query i
sees the keys up to s_k - s_q + i. `window_size` (left, right) counts from there, -1 is infinite. With s_q = 2
and s_k = 4:

    1 1 1 0
    1 1 1 1

Causal attention over a paged cache, which is what Megatron's engine runs, is the paged attention of the
sharded cache (paged_attention.py) with one rank that keeps everything, so that Megatron and Helix run on the
same kernel. Everything else is the formula.

Scores and sums are in fp32. A query that sees no key gives output 0 and log-sum-exp -inf (flash-attn: +inf).
"""

import torch

from helix_megatron.kernels.paged_attention import Requests, VisibleSlots, paged_attention
from helix_megatron.partition.kv_layout import KvInterleave

__all__ = ["attend", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def attend(q, k, v, softmax_scale, causal, window_size=(-1, -1)):
    """One sequence: q [s_q, H, D], k and v [s_k, K, D] to (output [s_q, H, D], log-sum-exp [H, s_q] fp32)."""
    heads_per_kv = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(heads_per_kv, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * softmax_scale
    s_q, s_k = q.shape[0], k.shape[0]
    last = torch.arange(s_q).unsqueeze(1) + (s_k - s_q)  # position of query i among the keys
    key = torch.arange(s_k)
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(s_q, s_k, dtype=torch.bool)
    if right >= 0:
        hidden |= key > last + right
    if left >= 0:
        hidden |= key < last - left
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if s_k else scores.new_full(scores.shape[:2], float("-inf"))
    weights = torch.exp(scores - lse.unsqueeze(-1).masked_fill(lse.isneginf().unsqueeze(-1), 0))
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype), lse


def _pages(cache, table, length):
    # [blocks, block_size, K, D] and the blocks of one sequence to [length, K, D]
    used = -(-length // cache.shape[1])
    return cache[table[:used].long()].flatten(0, 1)[:length]


def _paged(q, k, v, ends, lengths, table, scale, window_size):
    # q [Q, H, D] to output [Q, H, D] and log-sum-exp [Q, H]
    left = window_size[0] if window_size[0] >= 0 else None
    visible = VisibleSlots(scale, left, KvInterleave(1, 1), 0)
    return paged_attention(q, k, v, Requests(ends, lengths, table), visible)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    """Sequences of different lengths packed in one row.

    q: [Q, H, D]; k, v: packed [total keys, K, D], or a paged cache with `block_table`. cu_seqlens_q and
    cu_seqlens_k: [B + 1] cumulative lengths; queries past cu_seqlens_q[-1] are padding and give 0.
    Returns output [Q, H, D], with `return_attn_probs` the triple (output, log-sum-exp [H, Q] fp32, None).
    Raises NotImplementedError for dropout, softcap and alibi.
    """
    _refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if causal and block_table is not None:
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        output, lse = _paged(q, k, v, cu_seqlens_q, lengths, block_table, scale, window_size)
        return (output, lse.T, None) if return_attn_probs else output
    output = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"))
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        rows = slice(q_ends[b], q_ends[b + 1])
        if rows.start == rows.stop:
            continue
        if block_table is None:
            keys, values = k[k_ends[b] : k_ends[b + 1]], v[k_ends[b] : k_ends[b + 1]]
        else:
            keys, values = (_pages(x, block_table[b], k_ends[b + 1] - k_ends[b]) for x in (k, v))
        output[rows], lse[:, rows] = attend(q[rows], keys, values, scale, causal, window_size)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # fmt: skip
    """A few new queries per sequence against its cache.

    q: [B, s, H, D]; caches: paged with `block_table`, or [B, length, K, D]; cache_seqlens: [B] or an int, how
    many keys they hold (all by default). k, v: [B, s, K, D] are appended first.
    Returns output [B, s, H, D], with `return_softmax_lse` also log-sum-exp [B, H, s] fp32.
    Raises NotImplementedError for rotary embedding, softcap, alibi, batch indices, left padding, and
    appending to a paged cache.
    """
    _refuse(rotary_cos=rotary_cos, softcap=softcap, alibi_slopes=alibi_slopes, cache_leftpad=cache_leftpad,
            cache_batch_idx=cache_batch_idx, paged_k=None if block_table is None else k)  # fmt: skip
    batch, new = q.shape[:2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = k_cache.shape[1] if cache_seqlens is None else cache_seqlens
    lengths = torch.full((batch,), lengths) if isinstance(lengths, int) else lengths
    if causal and block_table is not None:
        ends = torch.arange(0, (batch + 1) * new, new)
        output, lse = _paged(
            q.flatten(0, 1), k_cache, v_cache, ends, lengths, block_table, scale, window_size
        )
        output, lse = output.unflatten(0, (batch, new)), lse.unflatten(0, (batch, new)).transpose(1, 2)
        return (output, lse) if return_softmax_lse else output
    outputs, lses = [], []
    for b, length in enumerate(lengths.tolist()):
        if block_table is not None:
            keys, values = (_pages(x, block_table[b], length) for x in (k_cache, v_cache))
        else:
            if k is not None:
                k_cache[b, length : length + new], v_cache[b, length : length + new] = k[b], v[b]
                length += new
            keys, values = k_cache[b, :length], v_cache[b, :length]
        output, lse = attend(q[b], keys, values, scale, causal, window_size)
        outputs.append(output)
        lses.append(lse)
    return (torch.stack(outputs), torch.stack(lses)) if return_softmax_lse else torch.stack(outputs)


def _refuse(**options):
    given = [name for name, value in options.items() if isinstance(value, torch.Tensor) or value]
    if given:
        raise NotImplementedError(
            f"host mode's flash attention was given {', '.join(given)}, which it does not compute: it does "
            "what Megatron's dynamic inference engine asks for. Switch that off, or run on a GPU."
        )
