"""What a rank computes in one micro-batch: matrix products, attention, passes over memory.

    matrix product    2 t rows columns FLOP; it reads the weights and moves its input and output
    attention         4 d FLOP for each pair of a query and a key it looks at: with a fused core only the
                      causal half of them; in decode the whole cache is read, and Megatron's unfused core
                      writes and reads KV heads once for each of their query heads
                      On a host a fused core takes its time over the scores too, if d is small
    pass              norms, RoPE, activation, residual: nothing but memory traffic
    update            Adam

A backward pass costs twice the products, 2.5 times fused attention (its scores are made again), twice the
rest. Symbols as in memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.plan.layout import Problem
from helix_megatron.plan.memory import parameters
from helix_megatron.plan.terms import Term, total

GEMM, PASS, UPDATE = "gemm", "pass", "update"
FUSED, UNFUSED = "fused attention", "unfused attention"
CACHED, REPEATED = "cached attention", "repeated attention"
_BACKWARD = {GEMM: 2.0, FUSED: 2.5, UNFUSED: 2.0, CACHED: 0.0, REPEATED: 0.0, PASS: 2.0}


@dataclass(frozen=True)
class Operation:
    """Equal operations of a forward pass of one micro-batch.

    Args:
        kind: which of the device's rates holds.
        calls: how many.
        flops: of one.
        bytes: that one moves to and from memory.
    """

    name: str
    kind: str
    calls: int
    flops: Term
    bytes: Term

    @property
    def backward(self) -> float:
        """Cost of the backward pass in forward passes."""
        return _BACKWARD[self.kind]


def operations(problem: Problem, stage: int) -> list[Operation]:
    """Forward pass of a micro-batch on a rank of `stage`."""
    shape, layout = problem.shape, problem.layout
    h, tp, layers, e = shape.hidden_size, layout.tp, problem.layers, problem.workload.element
    heads, f = shape.num_attention_heads * shape.kv_channels / tp, shape.ffn_hidden_size / tp

    def gemm(name: str, calls: int, inner: float, columns: float, t: int = problem.tokens) -> Operation:
        flops = Term(name, {"2": 2, "t": t, "inner": inner, "columns": columns})
        moved = Term(name, {"weights, input, output": inner * columns + t * (inner + columns), "bytes": e})
        return Operation(name, GEMM, calls, flops, moved)

    found = [
        gemm("linear_qkv", layers, h, problem.qkv_width / tp),
        attention(problem),
        gemm("linear_proj", layers, heads, h),
        gemm("linear_fc1", layers, h, (2 if shape.swiglu else 1) * f),
        gemm("linear_fc2", layers, f, h),
        _passes(problem),
    ]
    if stage == layout.pp - 1:
        tokens = problem.tokens if problem.workload.kind == "train" else layout.micro_batch
        found.append(gemm("output layer", 1, h, shape.padded_vocab_size(tp) / tp, tokens))
    return found


def attention(problem: Problem) -> Operation:
    """The attention core of all layers, on whole heads or slices of them."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    b, d, e, s = layout.micro_batch, shape.kv_channels, work.element, work.length
    heads = shape.num_attention_heads / layout.tp

    def made(kind: str, pairs: dict[str, float], moved: dict[str, float]) -> Operation:
        flops = Term("attention", {"4": 4, "d": d, **pairs})
        return Operation("attention", kind, problem.layers, flops, Term("attention", moved))

    if work.kind == "decode":
        kv: float = max(1, shape.num_query_groups // layout.tp)
        if layout.sliced:
            kv = problem.heads.kv_heads / layout.m
        repeated = not layout.sliced and not work.fused and heads > kv
        read = {"heads, repeated": kv + 2 * heads} if repeated else {"heads": kv}
        cache = {"K and V": 2, "b": b, "keys": s + 1, **read, "d": d, "bytes": e}
        return made(REPEATED if repeated else CACHED, {"b": b, "H/tp": heads, "keys": s + 1}, cache)
    sums = layout.sliced and layout.comm_type == "all_reduce" and work.kind == "train"
    pairs = {"b": b, "H/tp": heads, "queries": s}
    if not sums and (work.fused or layout.sliced):
        skipped = work.fused or work.kind == "train"  # on a host, prompts in a cache of slices are masked
        pairs["keys"] = s / 2 if skipped else s
        if work.fused:
            return made(FUSED, pairs, {"t": problem.tokens, "q, k, v, output": 4 * heads * d, "bytes": e})
        return made(FUSED, pairs, {**pairs, "fp32": 4})  # a core is as busy with the scores, in its caches
    pairs["keys"] = s
    copies = layout.m if sums else 1  # every rank of the dim group has all scores of the head group
    return made(UNFUSED, pairs, {"passes over scores": 6 * copies, **pairs, "fp32": 4})


def _passes(problem: Problem) -> Operation:
    """Norms, residuals, RoPE and activation of a layer: how often their tensors are read and written."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    own = 1 / layout.tp if layout.sequence_parallel else 1.0
    hidden = (8 if work.fused else 16) * own * shape.hidden_size
    heads = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels / layout.tp
    mlp = (2 if shape.swiglu else 1) * shape.ffn_hidden_size / layout.tp
    elements = hidden + (2 if work.fused else 6) * heads + (2 if work.fused else 4) * mlp
    moved = {"t": problem.tokens, "elements read and written": elements, "bytes": work.element}
    nothing, name = Term("passes", {"0": 0}), "norms, RoPE, activation"
    return Operation(name, PASS, problem.layers, nothing, Term("passes", moved))


def optimizer_bytes(problem: Problem, stage: int) -> tuple[Term, Term]:
    """Memory traffic of a step's end: (passes, Adam's update).

    passes    norm of the gradients, clipping, zeroing: 4 + 8 + 4 bytes of an element in fp32
    update    gradient, moments and weights read, all but the gradient written
    """
    work = problem.workload
    per_element = 28 if work.dtype == "fp32" else 34  # fp32 weights beside the half-precision ones
    share = {"1/dp": 1 / problem.layout.dp} if work.distributed_optimizer else {}
    elements = {"elements": total(parameters(problem, stage)), **share}
    passes = Term("norm, clipping, zeroing", {**elements, "bytes moved": 16})
    return passes, Term("update", {**elements, "bytes moved": per_element})


def accumulation_bytes(problem: Problem, stage: int) -> Term:
    """Memory traffic of adding a micro-batch's gradients to the fp32 sums; fused layers' products do it."""
    moved = 0 if problem.workload.fused else problem.workload.element + 8
    return Term("accumulation", {"elements": total(parameters(problem, stage)), "bytes moved": moved})


def flops_of_step(problem: Problem) -> float:
    """Floating-point operations of a whole step over all ranks: the model's, recomputation apart."""
    train, layout = problem.workload.kind == "train", problem.layout

    def of_stage(stage: int) -> float:
        return sum(
            operation.calls * operation.flops.value * (1 + (operation.backward if train else 0))
            for operation in operations(problem, stage)
        )

    stages = of_stage(layout.pp - 1) + (layout.pp - 1) * (of_stage(0) if layout.pp > 1 else 0)
    return stages * problem.micro_batches * layout.tp * layout.dp
