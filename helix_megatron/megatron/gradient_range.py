"""Adaptive gradient scaling: the backward pass of per-slice attention in the middle of fp16's range.

Note [What is scaled, and why the step is the same]
    Per-slice softmax of slice j, with d_s dimensions: scores Z = Q K^T / sqrt(d_s), P = softmax(Z), O = P V.
    Its backward makes, in half precision,
        dP = dO V^T                  a sum over d_s dimensions: sqrt(d_s/d) of a whole head's
        dS = P (dP - rowsum(P dP))   of L keys each has about 1/L of it: where fp16 underflows first
        dQ = dS K / sqrt(d_s)        the factor is sqrt(d/d_s) of a whole head's, so dQ and dK are as large
        dK = dS^T Q / sqrt(d_s)      as a whole head's; only dP and dS are smaller, and their range is lost
    So dO is multiplied by a power of two, c, and dQ, dK and dV by 1/c when they leave the core. Powers of two
    are exact, hence nothing changes but what fp16 would have rounded, flushed to zero or overflowed: the
    optimizer's step is that of the loss. Multiplying dQ and dK by sqrt(d_s/d) and leaving them so would not
    be: it is another descent direction.
    c is the largest power of two, 2^-15 to 2^15, with which no number of the backward can pass 2^15, by
        |dP| <= d_s |dO| |V|, |dS| <= 2 |dP|, |dV| <= r S |dO|,
        |dQ| <= 2 |dP| |K| scale, |dK| <= 2 r S |dP| |Q| scale
    (|.| largest entry; S queries; r query heads per KV head; the dropout p divides by 1 - p). It is each
    rank's own, from its slice; nothing is exchanged, and nothing waits for the device. Infinite and NaN
    gradients pass unscaled, for the loss scaler to find. bf16 and fp32 have the range: they are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 2.0**15  # of fp16's 65,504
MOST = 15  # |log2 c|: c and 1/c are exact in fp16


def keep_in_range(
    core: torch.nn.Module, scale: float, dropout: float = 0.0, coefficient: float = 1.0
) -> None:
    """Have the backward of an attention core run with scaled gradients, for fp16 inputs.

    Args:
        core: any core attention of Megatron's, forward(query [S, B, N, d_s], key [L, B, K, d_s], value, ...);
            without a batch dimension for packed sequences. No parameter of it may need a gradient.
        scale: what its scores are multiplied by.
        dropout: probability of its dropout.
        coefficient: what its softmax multiplies scores by (--apply-query-key-layer-scaling).
    """

    def before(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        query, key, value, *rest = args
        if query.dtype is not torch.float16 or not torch.is_grad_enabled():
            return None
        bound = _bound(query, key, value, scale, coefficient) / (1 - dropout)
        pair = _Pair(bound)
        pairs.append(pair)
        return (*_Leave.apply(query, key, value, pair), *rest), kwargs

    def after(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return _Enter.apply(output, pairs.pop()) if pairs else None

    pairs: list[_Pair] = []
    core.register_forward_pre_hook(before, with_kwargs=True)
    core.register_forward_hook(after)


class _Pair:
    """One pass through a core: the bound from its inputs, and 1/c from its backward."""

    def __init__(self, bound: Tensor):
        self.bound, self.inverse = bound, None


class _Enter(torch.autograd.Function):
    """The core's output as it is; backward multiplies its gradient by c."""

    @staticmethod
    def forward(ctx, output: Tensor, pair: _Pair) -> Tensor:
        ctx.pair = pair
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        factor = power_of_two(grad.abs().amax().float() * ctx.pair.bound)
        ctx.pair.inverse = 1 / factor
        return grad * factor, None


class _Leave(torch.autograd.Function):
    """The core's inputs as they are; backward multiplies their gradients by 1/c."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, pair: _Pair):
        ctx.pair = pair
        return query.view_as(query), key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return *(grad * ctx.pair.inverse for grad in grads), None


def _bound(query: Tensor, key: Tensor, value: Tensor, scale: float, coefficient: float) -> Tensor:
    """Largest number that the backward can make of a gradient of 1: float32, no dimension."""
    with torch.no_grad():
        q, k, v = (x.abs().amax().float() for x in (query, key, value))
        sums = query.shape[0] * (query.shape[-2] / key.shape[-2])  # of S queries and r heads
        probs = query.shape[-1] * v  # |dP|
        scores = 2 * probs
        one = torch.ones_like(v)
        terms = (probs, scores * coefficient, sums * one, scores * k * scale, sums * scores * q * scale)
        return torch.stack(terms).amax()


def power_of_two(largest: Tensor) -> Tensor:
    """c for a backward whose numbers are at most `largest` without it; 1 where that is 0, inf or NaN."""
    exponent = torch.log2(LARGEST / largest).floor().clamp(-MOST, MOST)
    usable = torch.isfinite(largest) & (largest > 0)
    return torch.where(usable, torch.ldexp(torch.ones_like(exponent), exponent), 1.0)
