"""Launches of a decode step on GPUs: small kernels, and the host that starts them.

Note [What a decode step takes besides reading its cache]
    Measured on one H200, an attention layer of 16 heads of 128 at TP = 8, hidden 1024, batch 1 and 8
    (benchmarks/results/h200/decode_step_h200.json, at revision 1d654cf):

        cache      launches   wall time, eager     GPU time, short contexts
        sequence   81         1.85 ms              120 us: 1.5 us a kernel
        dim        46         1.2 ms               75 us

    so a launch takes 23 us of the host where no CUDA graph is replayed. FlashAttention 3 in a CUDA graph takes
    16 us beside its bytes (kernel_h200.json). Megatron's own attention and the rest of a layer were not
    counted on a GPU: their numbers are assumed, as is that other GPUs have the same constants.

    graph    kernels follow one another: the exchange's own small kernels are added to what a layer computes
    eager    the longer of the device's time and the host's
    A cache of slices (dim) is not captured: it is eager always.
"""

from __future__ import annotations

from helix_megatron.plan.layout import Problem

HOST = 23e-6
"""Seconds of the host for one launch, eager; measured."""
KERNEL = 1.5e-6
"""Seconds of a small kernel; measured."""
FLASH_START = 16e-6
"""Seconds of a flash attention kernel over a cache besides its bytes; measured."""
ATTENTION = {"none": 20, "sequence": 81, "dim": 46}
"""Launches of an attention layer by its cache; Megatron's own ("none") is assumed, the others measured."""
REST = 10
"""Launches of a layer besides attention, and of a gated delta net in its place; assumed."""


def is_replayed(problem: Problem) -> bool:
    """Whether the step is replayed from a CUDA graph."""
    return problem.workload.cuda_graph and problem.layout.kv_cache != "dim"


def has_launches(problem: Problem) -> bool:
    """Whether launches are counted: in decode, with Transformer Engine's layers."""
    return problem.workload.kind == "decode" and problem.workload.fused


def added_kernels(problem: Problem) -> int:
    """Small kernels of an attention layer that Megatron's own has not."""
    return ATTENTION[problem.layout.kv_cache] - ATTENTION["none"]


def all_launches(problem: Problem) -> int:
    """Of a stage's layers."""
    attention = problem.attention_layers * ATTENTION[problem.layout.kv_cache]
    return attention + (2 * problem.layers - problem.attention_layers) * REST
