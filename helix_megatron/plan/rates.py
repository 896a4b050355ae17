"""What a core of this host does in a second: the rates of `helix plan --probe`.

Note [Cold memory]
    A layer works on other weights than the one before it, so operands come from memory and not from the
    caches. What is measured here walks through rings of RING bytes; the same tensors again and again would
    seem twice to thrice as fast.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

RING = 64 << 20  # bytes, more than a core's share of the caches


def seconds_of(once: Callable[[], Any], turns: int) -> float:
    """Lower quartile of the seconds of `once`, the slowest rank's each time."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(turns + 2):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(3):
            once()
        elapsed = torch.tensor([(time.perf_counter() - start) / 3], dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        seconds.append(elapsed.item())
    return quartile(seconds[2:])


def quartile(seconds: list[float]) -> float:
    """The lower one: other load can only lengthen what is measured."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def device_rates() -> dict[str, tuple[float, float, float]]:
    """(FLOP/s, bytes/s, launch seconds) of each kind of operation, one rank on each core, fp32."""
    import torch
    import torch.distributed as dist

    from helix_megatron.compare.measure import pin

    pin(int(os.environ["RANK"]))
    dist.init_process_group("nccl")
    torch.set_num_threads(1)
    found = {
        "gemm": _gemm(),
        "fused attention": _fused(),
        "unfused attention": _unfused(),
        "cached attention": _cached(1),
        "repeated attention": _cached(4),
        "pass": _pass(),
        "update": _update(),
    }
    dist.destroy_process_group()
    return found


def _ring(make: Callable[[], Any], size: int) -> Callable[[], Any]:
    """The next of as many equal things of `size` bytes as fill the ring."""
    things = cycle([make() for _ in range(max(1, RING // size))])
    return lambda: next(things)


def _gemm() -> tuple[float, float, float]:
    import torch

    def seconds(t: int, inner: int, columns: int) -> float:
        a = torch.randn(t, inner)
        weight = _ring(lambda: torch.randn(columns, inner), 4 * inner * columns)
        return seconds_of(lambda: a @ weight().t(), 7)

    t, width = 256, 512
    least = torch.randn(1, 8)
    launch = seconds_of(lambda: least @ least.t(), 7)
    flops = 2 * t * width * width / max(seconds(t, width, width) - launch, 1e-7)
    return flops, 4 * 2048 * 2048 / max(seconds(1, 2048, 2048) - launch, 1e-7), launch


def _unfused() -> tuple[float, float, float]:
    import torch

    def seconds(heads: int, s: int, d: int) -> float:
        q, k, v = (torch.randn(heads, s, d) for _ in range(3))
        mask = torch.triu(torch.ones(s, s, dtype=torch.bool), 1)
        return seconds_of(
            lambda: torch.bmm(torch.softmax(torch.bmm(q, k.mT).masked_fill(mask, -1e4), -1), v), 7
        )

    return _attention(seconds, passes=6, causal=1.0)


def _fused() -> tuple[float, float, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def seconds(heads: int, s: int, d: int) -> float:
        q, k, v = (torch.randn(1, heads, s, d) for _ in range(3))
        return seconds_of(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), 7)

    return _attention(seconds, passes=1, causal=0.5)


def _attention(
    seconds: Callable[[int, int, int], float], passes: int, causal: float
) -> tuple[float, float, float]:
    """Bytes of scores from narrow heads, FLOP from wide ones; the longer time holds for those between."""
    heads, s, launch = 8, 256, seconds(1, 2, 8)
    pairs = causal * heads * s * s
    narrow, wide = (max(seconds(heads, s, d) - launch, 1e-7) for d in (8, 64))
    return 4 * 64 * pairs / wide, passes * 4 * pairs / narrow, launch


def _cached(times: int) -> tuple[float, float, float]:
    """A token of 4 sequences over their cache, whose heads are repeated `times` times first."""
    import torch

    b, heads, d = 4, 16, 16

    def seconds(keys: int) -> float:
        q = torch.randn(b * heads, 1, d)
        cache = _ring(lambda: torch.randn(2, keys, b, heads // times, d), 8 * keys * b * heads // times * d)

        def once() -> None:
            kv = cache()
            if times > 1:
                kv = kv.repeat_interleave(times, dim=3)
            k, v = kv.view(2, keys, b * heads, d).transpose(1, 2)
            torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)

        return seconds_of(once, 7)

    keys, launch = 1024, seconds(2)
    one = 4 * keys * b * heads * d  # bytes of keys of all heads
    moved = 2 * one if times == 1 else 2 * (2 * one + one // times)
    return 1e12, moved / max(seconds(keys) - launch, 1e-7), launch


def _pass() -> tuple[float, float, float]:
    import torch

    size = 1 << 20
    x, out = (_ring(lambda: torch.ones(size // 4), size) for _ in range(2))
    return 1e12, 2 * size / seconds_of(lambda: torch.mul(x(), 1.5, out=out()), 21), 0.0


def _update() -> tuple[float, float, float]:
    """Adam: 28 bytes of an element of fp32 (compute.py)."""
    import torch

    weights = [torch.nn.Parameter(torch.ones(512, 512)) for _ in range(RING // 4 // (512 * 512 * 4))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    seconds = seconds_of(torch.optim.Adam(weights, decoupled_weight_decay=True).step, 5)
    return 1e12, 28 * sum(weight.numel() for weight in weights) / seconds, 0.0
