"""Attention over a part of the keys, and the combination of such parts. Pure torch, no communication.

For one query, with scores x_p of the keys p in part j:

    lse_j = log sum_p exp(x_p)          out_j = sum_p exp(x_p - lse_j) v_p
    out   = sum_j w_j out_j / sum_j w_j,   w_j = exp(lse_j - max_j lse_j)

An empty part has out_j = 0 and lse_j = -inf, hence weight 0. When all parts are empty so is the result.
An attention sink, a logit per head of which nothing is read, is one more part: output 0, the logit its lse.

S queries, L keys, B batch, N query heads, K KV heads (K divides N), D head dimension.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from helix_megatron.kernels.new_tokens import OfHeads

_SCORE_BYTES = 256 * 2**20  # scores that exist at a time


_OLDEST_TRITON = (3, 3)


@functools.cache
def triton_obstacle() -> str:
    """Why kernels cannot be Triton's; empty when they can.

    3.2, which torch 2.6 brings, ends the process where a while loop of Hopper's has tensor cores in it.
    """
    try:
        import triton.language
    except ImportError:
        return "Triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        return f"Triton {triton.__version__} cannot compile these kernels; 3.3 or newer comes with torch 2.7"
    return ""


def runs_triton(device: torch.device) -> bool:
    """Whether small kernels are Triton's there: on a GPU where it can be, or under its interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return not triton_obstacle()


def merge_partials(outs: Tensor, lses: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint parts of the keys.

    Args:
        outs: [parts, ..., N, D], any floating type; 0 where a part is empty.
        lses: [parts, ..., N] fp32; -inf where a part is empty.
        sinks: [N], any floating type, counted here once whatever the number of parts; None for none.
    Returns:
        output [..., N, D] fp32 and log-sum-exp [..., N] fp32 over all parts and the sink.
    """
    top = lses.amax(dim=0)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    finite = top.masked_fill(top.isneginf(), 0.0)  # all parts empty: exp(-inf) = 0
    weights = torch.exp(lses - finite)
    total = weights.sum(dim=0)
    if sinks is not None:
        total = total + torch.exp(sinks - finite)
    shares = weights / total.masked_fill(total == 0, 1.0)
    out = (outs.float() * shares.unsqueeze(-1)).sum(dim=0)
    return out, top + torch.log(total)  # -inf + -inf when all are empty


def write_partials(
    out: Tensor,
    lse: Tensor,
    outs: Tensor,
    lses: Tensor,
    parts: Tensor | None = None,
    more: OfHeads | None = None,
) -> None:
    """Partial outputs to the pieces that the ranks of a dim group are sent, combine_partials' other end. One
    kernel on a GPU.

    Args:
        out: [rows, N, D]; rows up to T, those behind them are padding: 0, and -inf.
        lse: [rows, N] fp32, of any strides.
        outs, lses: [m, T, N', D'] and [m, T, N'], written: whole heads of each (N' = N/m), or slices of all
            heads (D' = D/m), with the log-sum-exps of all.
        parts: [T] uint8, what is there for a token: 2 all that is given, 1 `more` alone, 0 nothing. What is
            not there may hold anything. None: `out` is there for its rows.
        more: with `parts`, a part of some heads over other keys, merged into theirs.
    """
    if runs_triton(outs.device):
        from helix_megatron.kernels import triton_merge

        triton_merge.write_partials(out, lse, outs, lses, parts, more)
        return
    rows = len(out)
    if parts is not None:
        out, lse = _joined(out, lse, parts, more)
    elif rows < outs.shape[1]:
        outs[:, rows:].zero_(), lses[:, rows:].fill_(float("-inf"))
        outs, lses = outs[:, :rows], lses[:, :rows]
    if outs.shape[2] < out.shape[1]:
        outs.copy_(out.unflatten(1, (len(outs), -1)).movedim(1, 0))
        lses.copy_(lse.unflatten(1, (len(outs), -1)).movedim(1, 0))
    else:
        outs.copy_(out.unflatten(2, (len(outs), -1)).movedim(2, 0))
        lses.copy_(lse.expand_as(lses))


def _joined(out: Tensor, lse: Tensor, parts: Tensor, more: OfHeads | None) -> tuple[Tensor, Tensor]:
    """write_partials' parts as one: [T, N, D] and [T, N]; 0 and -inf where there are none."""
    missing = len(parts) - len(out)
    out, lse = (torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x for x in (out, lse))
    out, lse = _only_where(parts > 1, out, lse)
    if more is None:
        return out, lse
    heads = slice(more.first, more.first + more.out.shape[1])
    added, added_lse = _only_where(parts > 0, more.out, more.lse)
    merged, lse[:, heads] = merge_partials(
        torch.stack([out[:, heads], added]), torch.stack([lse[:, heads], added_lse])
    )
    out[:, heads] = merged.to(out.dtype)
    return out, lse


def _only_where(there: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Copies that are empty parts elsewhere."""
    absent = ~there[:, None]
    return out.masked_fill(absent[..., None], 0.0), lse.masked_fill(absent, float("-inf"))


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, whose sum counts a sink too.

    Args:
        scores: [..., L] fp32.
        sinks: broadcast to [..., 1]; None for none.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = sinks.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]


def combine_partials(
    outs: Tensor, lses: Tensor, dtype: torch.dtype, sinks: Tensor | None = None
) -> Tensor:
    """merge_partials' output in the layer's dtype: what the ranks of a dim group sent. One kernel on a GPU.

    Args:
        outs: [m, T, N, D], a strided view of what arrived.
        lses: [m, T, N] fp32, the like: they may lie in a block of their own behind the outputs of each rank.
        sinks: [N] contiguous, as merge_partials.
    Returns:
        [T, N, D] contiguous: flattened to [T, N*D] it is what linear_proj reads.
    """
    if runs_triton(outs.device):
        from helix_megatron.kernels import triton_merge

        return triton_merge.combine_partials(outs, lses, dtype, sinks=sinks)[0]
    return merge_partials(outs, lses, sinks)[0].to(dtype)


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the keys given, with what merge_partials needs. Sums are in fp32.

    On the CPU it is PyTorch's fused attention, which reads keys and values once, where they are. On another
    device it is the formula, in fp32; there a kernel is used where one can be (backend.py).

    Args:
        query: [S, B, N, D].
        key, value: [L, B, K, D], of any strides; L may be 0.
        visible: [S, L] or [B, S, L] bool, True where a query sees a key; a row may be all False.
            None: every query sees every key.
    Returns:
        output [S, B, N, D] in the query's dtype and log-sum-exp [S, B, N] fp32.
    """
    s, b, heads, _ = query.shape
    if not key.shape[0] or not s:
        return torch.zeros_like(query), query.new_full((s, b, heads), float("-inf"), dtype=torch.float32)
    if visible is not None and visible.dim() == 2:
        visible = visible.expand(b, -1, -1)
    if query.device.type == "cpu":
        return _fused_on_cpu(query, key, value, visible, softmax_scale)
    return plain_attention(query, key, value, visible, softmax_scale)


def _fused_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    s, b = query.shape[:2]
    length, kv_heads = key.shape[0], key.shape[2]
    # One new token: the query heads of a KV head are the rows of one product, its keys are read once.
    rows = query.unflatten(2, (kv_heads, -1))[0] if s == 1 else query.permute(1, 2, 0, 3)
    bias = None
    if visible is not None:
        bias = torch.zeros(b, s, length, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
        bias = bias.unsqueeze(1).expand(-1, -1, rows.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), attn_mask=bias, scale=softmax_scale
    )  # [B, N, S, D] and [B, N, S], or [B, K, N/K, D] and [B, K, N/K]
    if s == 1:
        out, lse = out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)
    out, lse = out.permute(2, 0, 1, 3), lse.permute(2, 0, 1).float()
    if visible is not None:
        nothing = ~visible.any(dim=-1).T  # the kernel says 0
        lse = lse.masked_fill(nothing.unsqueeze(-1), float("-inf"))
    return out, lse


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """partial_attention in plain torch and fp32, on any device; `visible` is [B, S, L] or None."""
    b, heads, length, kv_heads = *query.shape[1:3], key.shape[0], key.shape[2]
    rows = max(1, _SCORE_BYTES // (4 * b * heads * length))
    key, value = key.float(), value.float()
    outs, lses = [], []
    for start in range(0, query.shape[0], rows):
        part = query[start : start + rows]
        scaled = (part.float() * softmax_scale).unflatten(2, (kv_heads, -1))
        scores = torch.einsum("sbkrd,lbkd->sbkrl", scaled, key)
        if visible is not None:
            seen = visible[:, start : start + rows].transpose(0, 1)
            scores = scores.masked_fill(~seen[:, :, None, None, :], float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        probs = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1))
        outs.append(torch.einsum("sbkrl,lbkd->sbkrd", probs, value).flatten(2, 3).to(query.dtype))
        lses.append(lse.flatten(2, 3))
    return torch.cat(outs), torch.cat(lses)
