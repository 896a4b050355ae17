"""What a core of this host, or a GPU, does in a second: the rates of `helix plan --probe`.

Note [Cold memory]
    A layer works on other weights than the one before it, so operands come from memory and not from the
    caches. What is measured here walks through rings of many bytes; the same tensors again and again would
    seem twice to thrice as fast.

Everything runs in ranks, on torch.cuda.current_device(): a GPU, or the memory of a host in host mode.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from helix_megatron.plan.trial import slowest_seconds

Reached = tuple[float, float, float]
"""FLOP/s, bytes/s, launch seconds."""


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


def time_operation(once: Callable[[], Any], turns: int, calls: int) -> float:
    """Lower quartile of the seconds of `once`, the slowest rank's each time."""

    def several() -> None:
        for _ in range(calls):
            once()

    return lower_quartile([slowest_seconds(several) / calls for _ in range(turns + 2)][2:])


def lower_quartile(seconds: list[float]) -> float:
    """Of times: other load can only lengthen what is measured."""
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def host_rates() -> dict[str, Reached]:
    """Of each kind of operation, one rank on each core, fp32."""
    torch.set_num_threads(1)
    bench = Bench(HOST, torch.float32)
    return {
        "gemm": bench.gemm(),
        "fused attention": bench.fused_attention(),
        "unfused attention": bench.unfused_attention(),
        "cached attention": bench.cached_attention(1),
        "repeated attention": bench.cached_attention(4),
        "pass": bench.memory_pass(),
        "update": bench.adam(),
    }


def gpu_rates(sizes: Sizes) -> dict[str, Reached]:
    """The same of the GPUs of all ranks at once, in bf16; matrix products in fp32 too, there as TF32, which
    Transformer Engine uses."""
    torch.backends.cuda.matmul.allow_tf32 = True
    half, single = Bench(sizes, torch.bfloat16), Bench(sizes, torch.float32)
    gemm, passed, update = half.gemm(), half.memory_pass(), single.adam(fused=True)
    attention, _, started = half.fused_attention()
    cached, repeated = half.cached_attention(1, fused=True), half.cached_attention(4)
    several = 4 * gemm[2]  # norms, RoPE, activation, residual
    return {
        "gemm": gemm,
        "gemm fp32": single.gemm(),
        "fused attention": (attention, passed[1], started),  # only its operands pass memory
        "unfused attention": half.unfused_attention(),
        "cached attention": (attention, *cached[1:]),
        "repeated attention": (attention, *repeated[1:]),
        "pass": (passed[0], passed[1], several),
        "norm": (passed[0], passed[1], gemm[2]),
        "packing": (passed[0], passed[1], gemm[2]),
        "update": (update[0], update[1], several),
    }


@dataclass(frozen=True)
class Bench:
    """Operations of these sizes in one dtype, on this rank's device."""

    sizes: Sizes
    dtype: torch.dtype

    def gemm(self) -> Reached:
        t, width, read, e = self.sizes.rows, self.sizes.width, self.sizes.read, self.dtype.itemsize

        def seconds(rows: int, width: int) -> float:
            a = self._randn(rows, width)
            weight = self._ring(lambda: self._randn(width, width), e * width * width)
            return self._seconds(lambda: a @ weight().t())

        least = self._randn(1, 8)
        launch = self._seconds(lambda: least @ least.t())
        flops = 2 * t * width * width / max(seconds(t, width) - launch, 1e-7)
        return flops, e * read * read / max(seconds(1, read) - launch, 1e-7), launch

    def unfused_attention(self) -> Reached:
        def seconds(heads: int, s: int, d: int) -> float:
            q, k, v = (self._randn(heads, s, d) for _ in range(3))
            mask = torch.triu(torch.ones(s, s, dtype=torch.bool, device=q.device), 1)
            return self._seconds(
                lambda: torch.bmm(torch.softmax(torch.bmm(q, k.mT).masked_fill(mask, -1e4), -1), v)
            )

        return self._attention(seconds, passes=6, causal=1.0)

    def fused_attention(self) -> Reached:
        def seconds(heads: int, s: int, d: int) -> float:
            q, k, v = (self._randn(1, heads, s, d) for _ in range(3))
            return self._seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))

        return self._attention(seconds, passes=1, causal=0.5)

    def _attention(self, seconds: Callable[[int, int, int], float], passes: int, causal: float) -> Reached:
        """Bytes of scores from narrow heads, FLOP from wide ones; the longer time holds for those between."""
        sizes = self.sizes
        heads, s, launch = sizes.heads, sizes.positions, seconds(1, 2, 8)
        pairs = causal * heads * s * s
        narrow, wide = (max(seconds(heads, s, d) - launch, 1e-7) for d in (sizes.narrow, sizes.wide))
        return 4 * sizes.wide * pairs / wide, passes * 4 * pairs / narrow, launch

    def cached_attention(self, times: int, fused: bool = False) -> Reached:
        """A token of some sequences over their cache, whose heads are repeated `times` times first."""
        sizes, e = self.sizes, self.dtype.itemsize
        b, heads, d = sizes.sequences, sizes.cached_heads, sizes.cached_dim

        def seconds(keys: int) -> float:
            shape = (2, b, heads, keys, d) if fused else (2, keys, b, heads // times, d)
            cache = self._ring(lambda: self._randn(*shape), 2 * e * keys * b * heads // times * d)
            q = self._randn(b, heads, 1, d) if fused else self._randn(b * heads, 1, d)

            def once() -> None:
                kv = cache()
                if fused:
                    scaled_dot_product_attention(q, *kv)
                    return
                if times > 1:
                    kv = kv.repeat_interleave(times, dim=3)
                k, v = kv.view(2, keys, b * heads, d).transpose(1, 2)
                torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)

            return self._seconds(once)

        keys, launch = sizes.keys, seconds(2)
        one = e * keys * b * heads * d  # bytes of keys of all heads
        moved = 2 * one if times == 1 else 2 * (2 * one + one // times)
        return 1e12, moved / max(seconds(keys) - launch, 1e-7), launch

    def memory_pass(self) -> Reached:
        size = self.sizes.passed
        x, out = (self._ring(lambda: self._ones(size // self.dtype.itemsize), size) for _ in range(2))
        return 1e12, 2 * size / self._seconds(lambda: torch.mul(x(), 1.5, out=out()), 21), 0.0

    def adam(self, fused: bool = False) -> Reached:
        """28 bytes of an element of fp32 (compute.py)."""
        count = self.sizes.ring // 4 // (512 * 512 * 4)
        weights = [torch.nn.Parameter(self._ones(512, 512)) for _ in range(count)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        adam = torch.optim.Adam(weights, decoupled_weight_decay=True, fused=fused or None)
        return 1e12, 28 * sum(weight.numel() for weight in weights) / self._seconds(adam.step, 5), 0.0

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=torch.cuda.current_device())

    def _ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=self.dtype, device=torch.cuda.current_device())

    def _seconds(self, once: Callable[[], Any], turns: int = 7) -> float:
        return time_operation(once, turns, self.sizes.calls)

    def _ring(self, make: Callable[[], Any], size: int) -> Callable[[], Any]:
        """The next of as many equal things of `size` bytes as fill the ring."""
        things = cycle([make() for _ in range(max(1, self.sizes.ring // size))])
        return lambda: next(things)
