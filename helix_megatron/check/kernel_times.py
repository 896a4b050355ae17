"""The operations of a step counted, its seconds, and its kernels by class.

Note [Classes of kernels]
    gemm        matrix products of linear_qkv and linear_proj
    attention   the fused or flash core, by the names of its kernels (an unfused core's products are gemm); in
                a decode step Helix's own kernels over the cache too, with the merge of their programs
    norm        of the layer's input, forward and backward
    packing     everything else: RoPE, splitting and packing q, k and v, copies, small kernels, the merge of
                what ranks send
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

import torch

from helix_megatron.measure.kernels import is_kernel

_NO_KERNEL = {
    f"aten::{name}"
    for name in """view _unsafe_view as_strided _reshape_alias alias detach lift_fresh empty empty_strided
    empty_like resolve_conj resolve_neg unfold set_ result_type""".split()
}


def count_operations(step: Callable[[], None]) -> int:
    """Operators of one step that compute or copy: about what a GPU would launch."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(
        event.name.startswith("aten::") and event.name not in _NO_KERNEL and not event.cpu_children
        for event in profile.events()
    )


def measure_seconds(step: Callable[[], None], turns: int = 10) -> float:
    """Median seconds of one step, host time included."""
    for _ in range(3):
        step()
    found = []
    for _ in range(turns):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def profile_kernels(step: Callable[[], None], steps: int = 3) -> list[tuple[str, float, int]]:
    """(name, microseconds, launches) of the kernels of one step, by torch.profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return [
        (event.key, event.self_device_time_total / steps, event.count // steps)
        for event in profile.key_averages()
        if is_kernel(event)
    ]


_ATTENTION = ("attn", "flash", "fmha", "sdpa", "attention_kernel", "merge_programs_kernel")
_GEMM = ("gemm", "gemv", "cutlass", "nvjet", "cublas", "xmma", "splitkreduce")


def classify_kernel(kernel: str) -> str:
    """See Note [Classes of kernels]."""
    name = kernel.lower()
    if any(word in name for word in _ATTENTION):
        return "attention"
    if any(word in name for word in _GEMM):
        return "gemm"
    return "norm" if "norm" in name else "packing"


def sum_by_class(kernels: list[tuple[str, float, int]]) -> dict[str, tuple[float, int]]:
    """Microseconds and launches of each class."""
    seconds: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for name, us, count in kernels:
        seconds[classify_kernel(name)] += us  # type: ignore[assignment]
        launches[classify_kernel(name)] += count
    return {
        name: (round(seconds[name], 1), launches[name]) for name in ("gemm", "attention", "norm", "packing")
    }
