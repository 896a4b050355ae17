"""What a core of this host, or a GPU, does in a second: the rates of `helix plan --probe`.

Note [Cold memory]
    A layer works on other weights than the one before it, so operands come from memory and not from the
    caches. What is measured here walks through rings of many bytes; the same tensors again and again would
    seem twice to thrice as fast.

Everything runs in ranks, on torch.cuda.current_device(): a GPU, or the memory of a host in host mode.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What is measured: enough to keep a device busy."""

    rows: int
    width: int
    """A matrix product's [rows, width] and [width, width]."""
    read: int
    """Width of the weights that a single row is multiplied with."""
    heads: int
    positions: int
    narrow: int
    wide: int
    """Attention: heads over positions, of a small and a large dimension."""
    sequences: int
    cached_heads: int
    cached_dim: int
    keys: int
    """A new token's attention over a cache."""
    passed: int
    """Bytes of a tensor that is passed over."""
    ring: int
    """Bytes, more than a device's share of the caches."""
    calls: int
    """Between two looks at the clock."""


HOST = Sizes(256, 512, 2048, 8, 256, 8, 64, 4, 16, 16, 1024, 1 << 20, 64 << 20, 3)
GPU = Sizes(8192, 8192, 8192, 32, 4096, 16, 128, 32, 8, 128, 8192, 256 << 20, 1 << 30, 10)


def seconds_of(once: Callable[[], Any], turns: int, calls: int = HOST.calls) -> float:
    """Lower quartile of the seconds of `once`, the slowest rank's each time."""
    from helix_megatron.plan.trial import slowest_seconds

    def several() -> None:
        for _ in range(calls):
            once()

    return quartile([slowest_seconds(several) / calls for _ in range(turns + 2)][2:])


def quartile(seconds: list[float]) -> float:
    """The lower one: other load can only lengthen what is measured."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def device_rates() -> dict[str, tuple[float, float, float]]:
    """(FLOP/s, bytes/s, launch seconds) of each kind of operation, one rank on each core, fp32."""
    import torch
    import torch.distributed as dist

    from helix_megatron.measure.machine import pin

    pin(int(os.environ["RANK"]))
    dist.init_process_group("nccl")
    torch.set_num_threads(1)
    bench = Bench(HOST, torch.float32)
    found = {
        "gemm": _gemm(bench),
        "fused attention": _fused(bench),
        "unfused attention": _unfused(bench),
        "cached attention": _cached(bench, 1),
        "repeated attention": _cached(bench, 4),
        "pass": _pass(bench),
        "update": _update(bench),
    }
    dist.destroy_process_group()
    return found


def gpu_rates(sizes: Sizes) -> dict[str, tuple[float, float, float]]:
    """The same of the GPUs of all ranks at once, in bf16; matrix products in fp32 too, there as TF32, which
    Transformer Engine uses. The process group is there already."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True
    half, single = Bench(sizes, torch.bfloat16), Bench(sizes, torch.float32)
    gemm, passed, update = _gemm(half), _pass(half), _update(single, fused=True)
    attention, _, started = _fused(half)
    cached, repeated = _cached(half, 1, fused=True), _cached(half, 4)
    several = 4 * gemm[2]  # norms, RoPE, activation, residual
    return {
        "gemm": gemm,
        "gemm fp32": _gemm(single),
        "fused attention": (attention, passed[1], started),  # only its operands pass memory
        "unfused attention": _unfused(half),
        "cached attention": (attention, *cached[1:]),
        "repeated attention": (attention, *repeated[1:]),
        "pass": (passed[0], passed[1], several),
        "update": (update[0], update[1], several),
    }


@dataclass(frozen=True)
class Bench:
    """Sizes in one dtype, on this rank's device."""

    sizes: Sizes
    dtype: Any

    def randn(self, *shape: int) -> Any:
        import torch

        return torch.randn(*shape, dtype=self.dtype, device=torch.cuda.current_device())

    def ones(self, *shape: int) -> Any:
        import torch

        return torch.ones(*shape, dtype=self.dtype, device=torch.cuda.current_device())

    def seconds(self, once: Callable[[], Any], turns: int = 7) -> float:
        return seconds_of(once, turns, self.sizes.calls)

    def ring(self, make: Callable[[], Any], size: int) -> Callable[[], Any]:
        """The next of as many equal things of `size` bytes as fill the ring."""
        things = cycle([make() for _ in range(max(1, self.sizes.ring // size))])
        return lambda: next(things)


def _gemm(bench: Bench) -> tuple[float, float, float]:
    e = bench.dtype.itemsize

    def seconds(t: int, inner: int, columns: int) -> float:
        a = bench.randn(t, inner)
        weight = bench.ring(lambda: bench.randn(columns, inner), e * inner * columns)
        return bench.seconds(lambda: a @ weight().t())

    t, width, read = bench.sizes.rows, bench.sizes.width, bench.sizes.read
    least = bench.randn(1, 8)
    launch = bench.seconds(lambda: least @ least.t())
    flops = 2 * t * width * width / max(seconds(t, width, width) - launch, 1e-7)
    return flops, e * read * read / max(seconds(1, read, read) - launch, 1e-7), launch


def _unfused(bench: Bench) -> tuple[float, float, float]:
    import torch

    def seconds(heads: int, s: int, d: int) -> float:
        q, k, v = (bench.randn(heads, s, d) for _ in range(3))
        mask = torch.triu(torch.ones(s, s, dtype=torch.bool, device=q.device), 1)
        return bench.seconds(
            lambda: torch.bmm(torch.softmax(torch.bmm(q, k.mT).masked_fill(mask, -1e4), -1), v)
        )

    return _attention(bench, seconds, passes=6, causal=1.0)


def _fused(bench: Bench) -> tuple[float, float, float]:
    from torch.nn.functional import scaled_dot_product_attention

    def seconds(heads: int, s: int, d: int) -> float:
        q, k, v = (bench.randn(1, heads, s, d) for _ in range(3))
        return bench.seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))

    return _attention(bench, seconds, passes=1, causal=0.5)


def _attention(
    bench: Bench, seconds: Callable[[int, int, int], float], passes: int, causal: float
) -> tuple[float, float, float]:
    """Bytes of scores from narrow heads, FLOP from wide ones; the longer time holds for those between."""
    sizes = bench.sizes
    heads, s, launch = sizes.heads, sizes.positions, seconds(1, 2, 8)
    pairs = causal * heads * s * s
    narrow, wide = (max(seconds(heads, s, d) - launch, 1e-7) for d in (sizes.narrow, sizes.wide))
    return 4 * sizes.wide * pairs / wide, passes * 4 * pairs / narrow, launch


def _cached(bench: Bench, times: int, fused: bool = False) -> tuple[float, float, float]:
    """A token of some sequences over their cache, whose heads are repeated `times` times first."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    sizes, e = bench.sizes, bench.dtype.itemsize
    b, heads, d = sizes.sequences, sizes.cached_heads, sizes.cached_dim

    def seconds(keys: int) -> float:
        if fused:
            query = bench.randn(b, heads, 1, d)
            whole = bench.ring(lambda: bench.randn(2, b, heads, keys, d), 2 * e * keys * b * heads * d)
            return bench.seconds(lambda: scaled_dot_product_attention(query, *whole()))
        q = bench.randn(b * heads, 1, d)
        shape = (2, keys, b, heads // times, d)
        cache = bench.ring(lambda: bench.randn(*shape), 2 * e * keys * b * heads // times * d)

        def once() -> None:
            kv = cache()
            if times > 1:
                kv = kv.repeat_interleave(times, dim=3)
            k, v = kv.view(2, keys, b * heads, d).transpose(1, 2)
            torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)

        return bench.seconds(once)

    keys, launch = sizes.keys, seconds(2)
    one = e * keys * b * heads * d  # bytes of keys of all heads
    moved = 2 * one if times == 1 else 2 * (2 * one + one // times)
    return 1e12, moved / max(seconds(keys) - launch, 1e-7), launch


def _pass(bench: Bench) -> tuple[float, float, float]:
    import torch

    size = bench.sizes.passed
    x, out = (bench.ring(lambda: bench.ones(size // bench.dtype.itemsize), size) for _ in range(2))
    return 1e12, 2 * size / bench.seconds(lambda: torch.mul(x(), 1.5, out=out()), 21), 0.0


def _update(bench: Bench, fused: bool = False) -> tuple[float, float, float]:
    """Adam: 28 bytes of an element of fp32 (compute.py)."""
    import torch

    weights = [
        torch.nn.Parameter(bench.ones(512, 512)) for _ in range(bench.sizes.ring // 4 // (512 * 512 * 4))
    ]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam = torch.optim.Adam(weights, decoupled_weight_decay=True, fused=fused or None)
    return 1e12, 28 * sum(weight.numel() for weight in weights) / bench.seconds(adam.step, 5), 0.0
