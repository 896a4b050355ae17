"""What a rank computes in one micro-batch: matrix products, attention, passes over memory.

    matrix product    2 t rows columns FLOP; it reads the weights and moves its input and output
    attention         4 d FLOP for each pair of a query and a key it looks at: with a fused core only the
                      causal half of them; in decode the whole cache is read, and Megatron's unfused core
                      writes and reads KV heads once for each of their query heads
                      On a host a fused core takes its time over the scores too, if d is small
    norm, pass        norms, activation, residual: nothing but memory traffic
    packing           RoPE, splitting and packing q, k and v: memory traffic in many small kernels
    update            Adam

On a host, and in decode, norms and RoPE are counted with the passes.

Note [What packing costs]
    How often a kernel reads or writes a rank's share of q, k and v in a forward pass, and how many kernels
    there are, comes from profiles of five layouts on an H200 (benchmarks/results/h200, RoPE not fused):
        RoPE, splits           16 times, 16 kernels     fused RoPE: assumed 4 times, 8 kernels
        Megatron, tp > G       + 3 times the QKV of all ranks, which it gathers and cuts, 7 kernels
        Helix, heads           + 1.3 times, 2 + 0.8 m kernels
        Helix, dims            + 7.6 times, 9 kernels

Note [The last tiles]
    A fused core deals tiles of 128 queries to the multiprocessors (132 of an H100), the late ones with all
    keys before them. About one tile on each is the time in which others have nothing left to do, so few heads
    take longer than their FLOP: busy = tokens x heads / (tokens x heads + 132 x 128).

A backward pass costs twice the products, 2.5 times fused attention (its scores are made again), twice the
rest. Symbols as in memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from helix_megatron.models.shape import MLP, SHARED_EXPERT
from helix_megatron.plan.hardware import Rate
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.parameters import dense_parameters, expert_parameters, parameters
from helix_megatron.plan.terms import Term, total

GEMM, PASS, UPDATE, NORM, PACKING = "gemm", "pass", "update", "norm", "packing"
FUSED, UNFUSED = "fused attention", "unfused attention"
CACHED, REPEATED = "cached attention", "repeated attention"
_MEMORY = dict.fromkeys((PASS, NORM, PACKING), 2.0)
_BACKWARD = {**_MEMORY, GEMM: 2.0, FUSED: 2.5, UNFUSED: 2.0, CACHED: 0.0, REPEATED: 0.0}


_LAST_ROWS = 132 * 128  # Note [The last tiles]


@dataclass(frozen=True)
class Operation:
    """Equal operations of a forward pass of one micro-batch.

    Args:
        kind: which of the device's rates holds.
        calls: how many.
        flops: of one.
        bytes: that one moves to and from memory.
        launches: kernels that one is made of.
        busy: share of the device that computes, on average.
    """

    name: str
    kind: str
    calls: int
    flops: Term
    bytes: Term
    launches: float = 1.0
    busy: float = 1.0

    def seconds(self, rate: Rate) -> float:
        """Of one forward pass of one."""
        return rate.seconds(self.flops.value / self.busy, self.bytes.value, self.launches)

    @property
    def backward(self) -> float:
        """Cost of the backward pass in forward passes."""
        return _BACKWARD[self.kind]


def operations(problem: Problem, stage: int) -> list[Operation]:
    """Forward pass of a micro-batch on a rank of `stage`."""
    shape, layout = problem.shape, problem.layout
    h, tp = shape.hidden_size, layout.tp
    linear_qkv, linear_proj = _projections(problem)
    found = [
        linear_qkv,
        attention(problem),
        linear_proj,
        *_gdn(problem),
        *(_experts(problem) if shape.num_moe_experts else _mlp(problem, "linear_", shape.ffn_hidden_size)),
        *_passes(problem),
    ]
    if stage == layout.pp - 1:
        tokens = problem.tokens if problem.workload.kind == "train" else layout.micro_batch
        found.append(_gemm(problem, "output layer", 1, h, shape.padded_vocab_size(tp) / tp, tokens))
    return found


def attention_layer(problem: Problem, rope_fusion: bool) -> dict[str, list[Operation]]:
    """The operations of attention alone, its input's norm included, by the classes that a profile shows."""
    return {
        "gemm": list(_projections(problem)),
        "attention": [attention(problem)],
        "norm": [_norms(problem, 1)],
        "packing": [_packing(problem, rope_fusion)],
    }


def _gemm(
    problem: Problem, name: str, calls: int, inner: float, columns: float, tokens: int | None = None
) -> Operation:
    t = problem.tokens if tokens is None else tokens
    flops = Term(name, {"2": 2, "t": t, "inner": inner, "columns": columns})
    moved = {"weights, input, output": inner * columns + t * (inner + columns)}
    return Operation(name, GEMM, calls, flops, Term(name, {**moved, "bytes": problem.workload.element}))


def _projections(problem: Problem) -> tuple[Operation, Operation]:
    shape, tp, layers = problem.shape, problem.layout.tp, problem.attention_layers
    heads = shape.num_attention_heads * shape.kv_channels / tp
    return (
        _gemm(problem, "linear_qkv", layers, shape.hidden_size, problem.qkv_width / tp),
        _gemm(problem, "linear_proj", layers, heads, shape.hidden_size),
    )


def _mlp(problem: Problem, name: str, width: int) -> list[Operation]:
    """A dense MLP or a shared expert of `width`, by its two products."""
    h, f, up = problem.shape.hidden_size, width / problem.layout.tp, (2 if problem.shape.gated else 1)
    return [
        _gemm(problem, f"{name}fc1", problem.layers, h, up * f),
        _gemm(problem, f"{name}fc2", problem.layers, f, h),
    ]


def _experts(problem: Problem) -> list[Operation]:
    """Router, products of the experts of a rank, their permutations and activation; and a shared expert.

    Balanced routing: as many experts have work, and so are read, as there are, or as tokens go to them.
    """
    shape, layout, e = problem.shape, problem.layout, problem.workload.element
    h, f, up = shape.hidden_size, shape.moe_ffn_hidden_size / layout.etp, (2 if shape.gated else 1)
    rows, local = problem.expert_tokens, shape.num_moe_experts // layout.ep
    read = min(local, rows)

    def product(name: str, inner: float, columns: float) -> Operation:
        flops = Term(name, {"2": 2, "tokens of experts": rows, "inner": inner, "columns": columns})
        moved = {"weights, input, output": read * inner * columns + rows * (inner + columns), "bytes": e}
        launches = 1 if problem.workload.fused else local
        return Operation(name, GEMM, problem.layers, flops, Term(name, moved), launches)

    moved = {"tokens of experts": rows, "elements read and written": 6 * h + 2 * up * f, "bytes": e}
    name = "permutations, activation"
    shared = shape.moe_shared_expert_intermediate_size
    return [
        _gemm(problem, "router", problem.layers, h, shape.num_moe_experts, problem.own_tokens),
        product("experts' fc1", h, up * f),
        product("experts' fc2", f, h),
        Operation(name, PASS, problem.layers, Term(name, {"0": 0}), Term(name, moved)),
        *(_mlp(problem, "shared expert's ", shared) if shared else []),
    ]


def _gdn(problem: Problem) -> list[Operation]:
    """Gated delta nets: projections, convolution, and the rule.

    Assumed: chunks of 64 positions, at the rate of fused attention. In decode it reads and writes the states.
    """
    shape, tp, work = problem.shape, problem.layout.tp, problem.workload
    layers = problem.layers - problem.attention_layers
    if not layers:
        return []
    keys, values = shape.gdn_widths
    heads, dk, dv = shape.linear_num_value_heads / tp, shape.linear_key_head_dim, shape.linear_value_head_dim
    columns = (2 * keys + 2 * values) / tp + 2 * heads
    t, name = {"t": problem.tokens}, "gated delta rule"
    if work.kind == "decode":
        state = {**t, "heads": heads, "state read and written": 2 * dk * dv, "fp32": 4}
        rule = Operation(name, PASS, layers, Term(name, {"0": 0}), Term(name, state))
    else:
        flops = {**t, "heads": heads, "FLOP of a head": 6 * dk * dv + 2 * 64 * (2 * dk + dv)}
        moved = {**t, "q, k, v, output": (2 * keys + 2 * values) / tp, "bytes": work.element}
        rule = Operation(name, FUSED, layers, Term(name, flops), Term(name, moved))
    convolved = {**t, "elements read and written": 4 * (2 * keys + values) / tp, "bytes": work.element}
    return [
        _gemm(problem, "GDN in_proj", layers, shape.hidden_size, columns),
        Operation("GDN conv1d, gates", PASS, layers, Term("conv1d", {"0": 0}), Term("conv1d", convolved)),
        rule,
        _gemm(problem, "GDN out_proj", layers, values / tp, shape.hidden_size),
    ]


def _attended(problem: Problem, keys: float, most: float) -> float:
    """Of `keys`, those that a layer looks at, on average over layers; one with a window `most` of them."""
    full = problem.shape.full_attention_share
    return keys if full == 1 else full * keys + (1 - full) * min(keys, most)


def attention(problem: Problem) -> Operation:
    """The attention core of all layers, on whole heads or slices of them."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    b, d, e, s = layout.micro_batch, shape.kv_channels, work.element, work.length
    heads = shape.num_attention_heads / layout.tp

    def made(kind: str, pairs: dict[str, float], moved: dict[str, float], busy: float = 1.0) -> Operation:
        flops = Term("attention", {"4": 4, "d": d, **pairs})
        layers = problem.attention_layers
        return Operation("attention", kind, layers, flops, Term("attention", moved), busy=busy)

    if work.kind == "decode":
        kv: float = max(1, shape.num_query_groups // layout.tp)
        if layout.sliced:
            kv = problem.heads.kv_heads / layout.m
        repeated = not layout.sliced and not work.fused and heads > kv
        read = {"heads, repeated": kv + 2 * heads} if repeated else {"heads": kv}
        keys = _attended(problem, s + 1, shape.window_size + 1)
        cache = {"K and V": 2, "b": b, "keys": keys, **read, "d": d, "bytes": e}
        return made(REPEATED if repeated else CACHED, {"b": b, "H/tp": heads, "keys": keys}, cache)
    sums = layout.sliced and layout.comm_type == "all_reduce" and work.kind == "train"
    pairs = {"b": b, "H/tp": heads, "queries": s}
    if not sums and (work.fused or layout.sliced):
        skipped = work.fused or work.kind == "train"  # on a host, prompts in a cache of slices are masked
        pairs["keys"] = _attended(problem, s / 2, shape.window_size + 1) if skipped else s
        if work.fused:
            moved = {"t": problem.tokens, "q, k, v, output": 4 * heads * d, "bytes": e}
            rows = problem.tokens * heads
            return made(FUSED, pairs, moved, busy=rows / (rows + _LAST_ROWS))
        return made(FUSED, pairs, {**pairs, "fp32": 4})  # a core is as busy with the scores, in its caches
    pairs["keys"] = s
    copies = layout.m if sums else 1  # every rank of the dim group has all scores of the head group
    return made(UNFUSED, pairs, {"passes over scores": 6 * copies, **pairs, "fp32": 4})


def _passes(problem: Problem) -> list[Operation]:
    """Norms, residuals, RoPE and activation of a layer: how often their tensors are read and written."""
    shape, layout, work = problem.shape, problem.layout, problem.workload
    own = 1 / layout.tp if layout.sequence_parallel else 1.0
    mlp = (2 if shape.gated else 1) * sum(  # experts have passes of their own
        size for what, size in shape.divided_sizes if what in (MLP, SHARED_EXPERT)
    ) / layout.tp  # fmt: skip
    apart = work.fused and work.kind != "decode"
    hidden = (4 if apart else 8 if work.fused else 16) * own * shape.hidden_size
    heads = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels / layout.tp
    heads *= 0 if apart else 2 if work.fused else 6
    name = "residuals, activation" if apart else "norms, RoPE, activation"
    passes = _moves(problem, name, PASS, hidden + heads + (2 if work.fused else 4) * mlp)
    return [_norms(problem, 2), _packing(problem), passes] if apart else [passes]


def _norms(problem: Problem, count: int) -> Operation:
    """Norms of a layer's hidden states, in one read and one write each."""
    own = 1 / problem.layout.tp if problem.layout.sequence_parallel else 1.0
    moved = 2 * count * own * problem.shape.hidden_size
    return _moves(problem, "norms", NORM, moved, launches=count)


def _packing(problem: Problem, rope_fusion: bool = True) -> Operation:
    """See Note [What packing costs]."""
    layout = problem.layout
    own = problem.qkv_width / layout.tp
    times, launches = (4.0, 8.0) if rope_fusion else (16.0, 16.0)
    gathered = 0.0
    if problem.gathers_qkv:
        gathered, launches = 3.0 * problem.qkv_width, launches + 7
    elif layout.sliced and layout.placement == "heads":
        times, launches = times + 1.3, launches + 2 + 0.8 * layout.m
    elif layout.sliced:
        times, launches = times + 7.6, launches + 9
    moves = _moves(problem, "RoPE, packing", PACKING, times * own + gathered, launches)
    return replace(moves, calls=problem.attention_layers)


def _moves(problem: Problem, name: str, kind: str, elements: float, launches: float = 1.0) -> Operation:
    """Nothing but memory traffic: elements of a token, read and written."""
    moved = {"t": problem.tokens, "elements read and written": elements, "bytes": problem.workload.element}
    return Operation(name, kind, problem.layers, Term(name, {"0": 0}), Term(name, moved), launches)


def optimizer_bytes(problem: Problem, stage: int) -> tuple[Term, Term]:
    """Memory traffic of a step's end: (passes, Adam's update).

    passes    norm of the gradients, clipping, zeroing: 4 + 8 + 4 bytes of an element in fp32
    update    gradient, moments and weights read, all but the gradient written
    """
    work = problem.workload
    per_element = 28 if work.dtype == "fp32" else 34  # fp32 weights beside the half-precision ones
    shares = [1 / problem.layout.dp, 1 / problem.layout.edp] if work.distributed_optimizer else [1.0, 1.0]
    several = [dense_parameters(problem, stage), expert_parameters(problem)]
    mine = sum(total(terms) * share for terms, share in zip(several, shares, strict=True))
    elements = {"elements": mine}
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
