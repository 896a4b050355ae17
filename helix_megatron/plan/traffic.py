"""Collectives of one step on a rank of a pipeline stage, and the bytes it receives in them.

Bytes are counted as helix_megatron.compare.comm counts them: what the rank has to receive, without any
algorithm's detours. In a group of p:

    all_gather      (p-1)/p of the output        all_reduce   2 (p-1)/p of the tensor
    reduce_scatter  (p-1)/p of the input         recv         the tensor
    all_to_all      all but its own part

Note [Tensor parallelism in a layer]             plain              sequence parallel
    before qkv and fc1      forward              -                  all_gather t h
                            backward             all_reduce t h     all_gather t h, reduce_scatter t h
    after proj and fc2      forward              all_reduce t h     reduce_scatter t h
                            backward             -                  all_gather t h
    attention               Megatron, tp > G: all_gather t (H+2G) d, backward reduce_scatter
                            Helix: see exchange/ and inference/position_cache.py; only inside the dim group

What Megatron's training script adds (broadcasts of the batch, sums of the logged loss) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from helix_megatron.partition.layout import part_length
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.memory import parameters
from helix_megatron.plan.terms import Term, total

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
_SHARES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step.

    Args:
        what: the part of time it belongs to: "all-reduce" (Megatron's tensor parallelism), "exchange" (of
            attention), "gradients" (over data-parallel ranks), "pipeline", "optimizer".
        kind: as in CommMeter.
        group: "tp", "dim", "dp", "pp", "embd" or "world".
        size: ranks of the group.
        calls: times in a step.
        term: bytes received in one call.
        phase: forward and backward are per micro-batch, and calls already count all of them.
    """

    name: str
    what: str
    kind: str
    group: str
    size: int
    calls: int
    term: Term
    phase: str = FORWARD

    @property
    def bytes(self) -> float:
        """Received in one call."""
        return self.term.value


@dataclass
class _List:
    """Collects collectives of one problem; those over one rank are none."""

    problem: Problem
    items: list[Collective] = field(default_factory=list)
    forward_passes: int = 1

    def add(
        self, name: str, what: str, kind: str, group: str, calls: int, factors: Mapping[str, float],
        phase: str = FORWARD,
    ) -> None:  # fmt: skip
        layout = self.problem.layout
        if phase == FORWARD:
            calls *= self.forward_passes
        sizes = {"tp": layout.tp, "dim": layout.m, "dp": layout.dp, "pp": layout.pp, "embd": 2}
        sizes["world"] = (
            layout.world if self.problem.workload.distributed_optimizer else layout.tp * layout.pp
        )
        size = sizes[group]
        if size == 1 or not calls:
            return
        if kind in _SHARES and "(p-1)" not in factors:
            twice = "2(p-1)/p" if kind == "all_reduce" else "(p-1)/p"
            factors = {**factors, twice: _SHARES[kind] * (size - 1) / size}
        self.items.append(Collective(name, what, kind, group, size, calls, Term(name, factors), phase))


def collectives(problem: Problem, stage: int, rank: int = 0) -> list[Collective]:
    """Every collective of a step on a rank of `stage`.

    Args:
        rank: in the tensor-parallel group; it matters where query positions are dealt unevenly.
    """
    found = _List(problem)
    train = problem.workload.kind == "train"
    found.forward_passes = 2 if train and problem.layout.recompute else 1
    _layers(found, train)
    _attention(found, rank, train)
    found.forward_passes = 1
    _ends(found, stage, train)
    _pipeline(found, stage, train)
    if train:
        _gradients(found, stage)
    return found.items


def received(items: list[Collective]) -> dict[str, tuple[int, float]]:
    """(calls, bytes) by kind and size of the group, named as in CommMeter: "all_reduce x8"."""
    sums: dict[str, tuple[int, float]] = {}
    for item in items:
        calls, size = sums.get(key := f"{item.kind} x{item.size}", (0, 0.0))
        sums[key] = (calls + item.calls, size + item.calls * item.bytes)
    return sums


def _layers(found: _List, train: bool) -> None:
    """Megatron's tensor parallelism in the layers of a stage."""
    problem = found.problem
    calls = problem.layers * problem.micro_batches
    hidden = _hidden(problem)
    if not problem.layout.sequence_parallel:
        found.add("outputs of proj and fc2", "all-reduce", "all_reduce", "tp", 2 * calls, hidden)
        if train:
            found.add("input gradients of qkv and fc1", "all-reduce", "all_reduce", "tp", 2 * calls, hidden,
                      BACKWARD)  # fmt: skip
        return
    found.add("inputs of qkv and fc1", "all-reduce", "all_gather", "tp", 2 * calls, hidden)
    found.add("outputs of proj and fc2", "all-reduce", "reduce_scatter", "tp", 2 * calls, hidden)
    if train:
        found.add("inputs again, and output gradients", "all-reduce", "all_gather", "tp", 4 * calls,
                  hidden, BACKWARD)  # fmt: skip
        found.add("input gradients of qkv and fc1", "all-reduce", "reduce_scatter", "tp", 2 * calls, hidden,
                  BACKWARD)  # fmt: skip


def _hidden(problem: Problem) -> dict[str, float]:
    return {"t": problem.tokens, "h": problem.shape.hidden_size, "bytes": problem.workload.element}


def _attention(found: _List, rank: int, train: bool) -> None:
    """What attention exchanges; see exchange/ and inference/position_cache.py."""
    problem = found.problem
    shape, layout = problem.shape, problem.layout
    calls = problem.layers * problem.micro_batches
    if problem.gathers_qkv:
        elements = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
        mixed = {"t": problem.tokens, "(H+2G)d": elements, "bytes": problem.workload.element}
        found.add("mixed QKV", "exchange", "all_gather", "tp", calls, mixed)
        if train:
            found.add("gradient of the mixed QKV", "exchange", "reduce_scatter", "tp", calls, mixed, BACKWARD)
    if not layout.sliced:
        return
    if shape.qk_layernorm:
        _qk_norm(found, calls, train)
    work = problem.workload
    if work.kind != "train" and layout.kv_cache == "sequence":
        _sequence_cache(found, calls)
    elif layout.comm_type == "all_reduce" or work.kind == "decode":
        _summed_scores(found, calls, train)
    else:
        _whole_heads(found, calls, rank % layout.m, train)


def _qk_norm(found: _List, calls: int, train: bool) -> None:
    problem = found.problem
    moments = 2 if problem.shape.normalization == "LayerNorm" else 1
    sliced = {"keys": problem.heads.kv_heads}
    if problem.layout.placement == "dims":
        sliced["queries"] = problem.heads.query_heads
    for name, heads in sliced.items():
        size = {"t": problem.tokens, "heads": heads, "fp32": 4}
        found.add(f"QK norm of {name}", "exchange", "all_reduce", "dim", moments * calls, size)
        if train:
            found.add(f"QK norm of {name}", "exchange", "all_reduce", "dim", moments * calls, size, BACKWARD)


def _sequence_cache(found: _List, calls: int) -> None:
    problem, heads = found.problem, found.problem.heads
    m, e = problem.layout.m, problem.workload.element
    lse = 4 / e  # an fp32 log-sum-exp travels as elements of the model's dtype
    tokens = {"(p-1)": m - 1, "t": problem.tokens, "bytes": e}
    new = (heads.query_heads + 2 * heads.kv_heads) * heads.slice_dim
    found.add("new q, k, v", "exchange", "all_gather", "dim", calls, {**tokens, "(hq+2hk)d/m": new})
    if problem.layout.placement == "heads":
        partial = heads.query_heads / m * (problem.shape.kv_channels + lse)
        found.add(
            "partial outputs", "exchange", "all_to_all", "dim", calls, {**tokens, "hq/m(d+lse)": partial}
        )
    else:
        partial = heads.query_heads * (heads.slice_dim + lse)
        found.add(
            "partial outputs", "exchange", "all_to_all", "dim", calls, {**tokens, "hq(d/m+lse)": partial}
        )


def _whole_heads(found: _List, calls: int, dim_rank: int, train: bool) -> None:
    """Comm type a2a."""
    problem, heads = found.problem, found.problem.heads
    m, e, b = problem.layout.m, problem.workload.element, problem.layout.micro_batch
    keys = {"(p-1)": m - 1, "t": problem.tokens, "2 hk d/m": 2 * heads.kv_heads * heads.slice_dim, "bytes": e}
    found.add("K and V slices", "exchange", "all_gather", "dim", calls, keys)
    if train:
        found.add("gradients of K and V", "exchange", "all_to_all", "dim", calls, keys, BACKWARD)
    if problem.layout.placement == "heads":
        return
    a, c, s = heads.head_parts, heads.position_parts, problem.workload.length
    per_head = {"hq/a": heads.query_heads // a, "d/m": heads.slice_dim, "bytes": e}
    own = part_length(s, dim_rank % c, c)  # positions of this rank, received from every other rank
    others = a * s - own  # positions of this rank's slices, over all parts but its own
    queries = {"positions from others": (m - 1) * own * b, **per_head}
    outputs = {"positions from others": others * b, **per_head}
    for name, factors in (("queries", queries), ("output slices", outputs)):
        found.add(name, "exchange", "all_to_all", "dim", calls, {"(p-1)": 1, **factors})
    if train:  # each gradient travels its exchange's way back
        for name, factors in (("gradients of queries", outputs), ("gradients of output slices", queries)):
            found.add(name, "exchange", "all_to_all", "dim", calls, {"(p-1)": 1, **factors}, BACKWARD)


def _summed_scores(found: _List, calls: int, train: bool) -> None:
    """Comm type all_reduce (and a cache of slices)."""
    problem, heads = found.problem, found.problem.heads
    work, layout = problem.workload, problem.layout
    keys = work.length + (1 if work.kind == "decode" else 0)
    scores = {"t": problem.tokens, "hq": heads.query_heads, "keys": keys, "fp32": 4}
    passes = [FORWARD, BACKWARD] if train else [FORWARD]
    for phase in passes:
        found.add("partial scores", "exchange", "all_reduce", "dim", calls, scores, phase)
        if layout.placement == "heads":
            per_head = heads.query_heads // layout.m * heads.slice_dim
            pieces = {"(p-1)": layout.m - 1, "t": problem.tokens, "hq/m d/m": per_head, "bytes": work.element}
            for name in ("query slices", "whole outputs"):
                found.add(name, "exchange", "all_to_all", "dim", calls, pieces, phase)


def _ends(found: _List, stage: int, train: bool) -> None:
    """Embedding on the first stage; output layer and loss, or logits, on the last."""
    problem = found.problem
    layout, calls = problem.layout, problem.micro_batches
    hidden = _hidden(problem)
    if stage == 0:
        kind = "reduce_scatter" if layout.sequence_parallel else "all_reduce"
        found.add("embedding", "all-reduce", kind, "tp", calls, hidden)
        if train and layout.sequence_parallel:
            found.add("gradient of the embedding", "all-reduce", "all_gather", "tp", calls, hidden, BACKWARD)
    if stage != layout.pp - 1:
        return
    if not train:
        logits = {
            "sequences": layout.micro_batch,
            "V": problem.shape.padded_vocab_size(layout.tp),
            "bytes": problem.workload.element,
        }
        found.add("logits of the last token", "all-reduce", "all_gather", "tp", calls, logits)
        return
    found.add("maximum, target and sum of the softmax", "all-reduce", "all_reduce", "tp", 3 * calls,
              {"t": problem.tokens, "fp32": 4})  # fmt: skip
    if layout.sequence_parallel:
        found.add("input of the output layer", "all-reduce", "all_gather", "tp", calls, hidden)
        found.add(
            "input of the output layer again", "all-reduce", "all_gather", "tp", calls, hidden, BACKWARD
        )
        kind = "reduce_scatter"
    else:
        kind = "all_reduce"
    found.add("input gradient of the output layer", "all-reduce", kind, "tp", calls, hidden, BACKWARD)


def _pipeline(found: _List, stage: int, train: bool) -> None:
    problem = found.problem
    calls, hidden = problem.micro_batches, _hidden(problem)
    if problem.layout.sequence_parallel:
        hidden = {**hidden, "1/tp": 1 / problem.layout.tp}
    if stage > 0:
        found.add("hidden states of the stage before", "pipeline", "recv", "pp", calls, hidden)
    if train and stage < problem.layout.pp - 1:
        found.add("gradients of the stage after", "pipeline", "recv", "pp", calls, hidden, BACKWARD)


def _gradients(found: _List, stage: int) -> None:
    """Once in a step: gradients over replicas, those that tensor parallelism leaves to sum, their norm."""
    problem = found.problem
    shape, layout, work = problem.shape, problem.layout, problem.workload
    gradient = 2 if work.dtype == "fp16" else 4
    elements = total(parameters(problem, stage))
    tied = shape.tied_embeddings and layout.pp > 1 and stage in (0, layout.pp - 1)
    embedding = shape.padded_vocab_size(layout.tp) // layout.tp * shape.hidden_size
    if work.distributed_optimizer:
        # Megatron keeps a tied embedding that two stages share in a buffer of its own.
        for buffer in [elements - embedding, embedding] if tied else [elements]:
            size = {"elements": buffer, "bytes": gradient}
            found.add("gradients", "gradients", "reduce_scatter", "dp", 1, size, STEP)
            size = {"elements": buffer, "bytes": work.element}
            found.add("updated weights", "gradients", "all_gather", "dp", 1, size, STEP)
    else:
        size = {"elements": elements, "bytes": gradient}
        found.add("gradients", "gradients", "all_reduce", "dp", 1, size, STEP)
    replicated = _summed_over_tp(problem, stage)
    if replicated:
        found.add("gradients of norms and biases", "all-reduce", "all_reduce", "tp", 1,
                  {"elements": replicated, "bytes": gradient}, STEP)  # fmt: skip
    if tied:
        size = {"elements": embedding, "bytes": gradient}
        found.add("gradients of the tied embedding", "gradients", "all_reduce", "embd", 1, size, STEP)
    found.add("norm of the gradients", "optimizer", "all_reduce", "world", 1, {"fp32": 4}, STEP)


def _summed_over_tp(problem: Problem, stage: int) -> float:
    """Elements of the replicated parameters whose gradients differ between tensor-parallel ranks."""
    shape, layout = problem.shape, problem.layout
    norm = 2 if shape.normalization == "LayerNorm" else 1
    count = 0
    if layout.sequence_parallel:
        count += problem.layers * 2 * norm * shape.hidden_size
        if shape.add_bias_linear:
            count += problem.layers * 2 * shape.hidden_size
        if stage == layout.pp - 1:
            count += norm * shape.hidden_size
    if shape.qk_layernorm:
        count += problem.layers * 2 * norm * shape.kv_channels
    return count
