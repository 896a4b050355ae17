"""Launches of a decode step on GPUs: small kernels, and the host that starts them.

Note [What a decode step takes besides reading its cache]
    measured   one H200, an attention layer of 16 heads of 128 at TP = 8, hidden 1024, batch 1 and 8, at
               revision 1d654cf (benchmarks/results/h200/decode_step_h200.json): `sequence` had 81 launches,
               1.85 ms of wall time eager, 23 us a launch; with short contexts 120 us of GPU time, 1.5 us a
               kernel. `dim`: 46 launches. FlashAttention 3 in a CUDA graph (kernel_h200.json): 16 us beside
               its bytes
    counted    on the host, collectives apart: a `sequence` layer has 14 launches today, with QK norm 20 at
               most (tests/inference/test_graphs.py)
    assumed    launches of Megatron's own attention and of the rest of a layer; the same constants elsewhere

    graph    kernels follow one another: what an exchange has besides Megatron's is added to a layer
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
ATTENTION = {"none": 11, "sequence": 14, "dim": 46}
"""Launches of an attention layer by its cache: Megatron's own ("none") assumed, counted, measured."""
QK_NORM = 6
"""Further launches of a `sequence` layer with QK norm; counted."""
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
    return _of_attention(problem) - ATTENTION["none"]


def all_launches(problem: Problem) -> int:
    """Of a stage's layers."""
    attention = problem.attention_layers * _of_attention(problem)
    return attention + (2 * problem.layers - problem.attention_layers) * REST


def _of_attention(problem: Problem) -> int:
    normed = problem.layout.kv_cache == "sequence" and problem.shape.qk_layernorm
    return ATTENTION[problem.layout.kv_cache] + normed * QK_NORM
