"""Collectives of one step on a rank of a pipeline stage, and the bytes it receives in them.

Bytes are counted as CommMeter counts them: what the rank has to receive, without any algorithm's detours. In
a group of p:

    all_gather      (p-1)/p of the output        all_reduce   2 (p-1)/p of the tensor
    reduce_scatter  (p-1)/p of the input         recv         the tensor
    all_to_all      all but its own part

Note [Tensor parallelism in a layer]             plain              sequence parallel
    before qkv and fc1      forward              -                  all_gather t h
                            backward             all_reduce t h     all_gather t h, reduce_scatter t h
    after proj and fc2      forward              all_reduce t h     reduce_scatter t h
                            backward             -                  all_gather t h
    attention               Megatron, tp > G: all_gather t (H+2G) d, backward reduce_scatter
                            Helix: as its exchanges and KV caches do; only inside the dim group

What Megatron's training script adds (broadcasts of the batch, sums of the logged loss) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from helix_megatron.partition.layout import part_length
from helix_megatron.plan.layout import Problem
from helix_megatron.plan.parameters import dense_parameters, expert_parameters
from helix_megatron.plan.terms import Term, total

FORWARD, BACKWARD, STEP = "forward", "backward", "step"
_ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
_PARTS = {"tp": "all-reduce", "dim": "exchange", "dp": "gradients", "embd": "gradients", "pp": "pipeline",
          "world": "optimizer", "edp": "gradients", "ep": "experts", "etp": "experts",
          "etp ep": "experts", "etp ep pp": "optimizer"}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a step.

    Args:
        part: of a step's time: "all-reduce" (Megatron's tensor parallelism), "exchange" (of attention),
            "experts" (tokens to and from them), "gradients" (over data-parallel ranks), "pipeline",
            "optimizer".
        kind: as in CommMeter.
        group: "tp", "dim", "dp", "pp", "embd", "world", or of experts "ep", "etp", "etp ep", "etp ep pp",
            "edp".
        size: ranks of the group.
        calls: times in a step.
        term: bytes received in one call.
        phase: forward and backward are per micro-batch, and calls already count all of them.
    """

    name: str
    part: str
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


def collectives(problem: Problem, stage: int, rank: int = 0) -> list[Collective]:
    """Every collective of a step on a rank of `stage`.

    Args:
        rank: in the tensor-parallel group; it matters where query positions are dealt unevenly.
    """
    return _Step(problem, stage, rank % problem.layout.m).items


def received_by_kind(items: list[Collective]) -> dict[str, tuple[int, float]]:
    """(calls, bytes) by kind and size of the group, named as in CommMeter: "all_reduce x8"."""
    sums: dict[str, tuple[int, float]] = {}
    for item in items:
        calls, size = sums.get(key := f"{item.kind} x{item.size}", (0, 0.0))
        sums[key] = (calls + item.calls, size + item.calls * item.bytes)
    return sums


class _Step:
    """Collects the collectives of a step on one rank; those over one rank are none."""

    def __init__(self, problem: Problem, stage: int, dim_rank: int):
        self.problem, self.stage, self.dim_rank = problem, stage, dim_rank
        shape, layout, work = problem.shape, problem.layout, problem.workload
        self.train, self.e, self.m, self.t = work.kind == "train", work.element, layout.m, problem.tokens
        self.first, self.last = stage == 0, stage == layout.pp - 1
        self.hidden = {"t": self.t, "h": shape.hidden_size, "bytes": self.e}
        world = layout.world if work.distributed_optimizer else layout.tp * layout.pp
        self.sizes = {"tp": layout.tp, "dim": self.m, "dp": layout.dp, "pp": layout.pp, "embd": 2}
        self.sizes["world"] = world
        ep, etp = layout.ep, layout.etp
        self.sizes |= {"ep": ep, "etp": etp, "etp ep": etp * ep, "edp": layout.edp}
        self.sizes["etp ep pp"] = etp * ep * layout.pp
        self.items: list[Collective] = []
        self.calls = problem.layers * problem.micro_batches
        self.forward_passes = 2 if self.train and layout.recompute else 1
        self.add_layers()
        if shape.num_moe_experts:
            self.add_experts()
        self.calls = problem.attention_layers * problem.micro_batches
        self.add_attention()
        self.calls, self.forward_passes = problem.micro_batches, 1
        self.add_ends()
        self.add_pipeline()
        if self.train:
            self.add_gradients()

    def add(
        self, name: str, kind: str, group: str, factors: Mapping[str, float], phase: str = FORWARD,
        times: int = 1, part: str = "",
    ) -> None:  # fmt: skip
        """`times` in a layer or a micro-batch, or in the step; backward only in training."""
        size = self.sizes[group]
        calls = times if phase == STEP else times * self.calls
        if phase == FORWARD:
            calls *= self.forward_passes
        if size == 1 or not calls or 0 in factors.values() or (phase == BACKWARD and not self.train):
            return
        if kind in _ROUNDS and "(p-1)" not in factors:
            share = "2(p-1)/p" if kind == "all_reduce" else "(p-1)/p"
            factors = {**factors, share: _ROUNDS[kind] * (size - 1) / size}
        term = Term(name, factors)
        self.items.append(Collective(name, part or _PARTS[group], kind, group, size, calls, term, phase))

    def add_layers(self) -> None:
        """Megatron's tensor parallelism in the layers of a stage: attention or GDN, MLP or shared expert."""
        shape = self.problem.shape
        parts = 1 if shape.num_moe_experts and not shape.moe_shared_expert_intermediate_size else 2
        if not self.problem.layout.sequence_parallel:
            self.add("outputs of proj and fc2", "all_reduce", "tp", self.hidden, times=parts)
            self.add("input gradients of qkv and fc1", "all_reduce", "tp", self.hidden, BACKWARD, parts)
            return
        self.add("inputs of qkv and fc1", "all_gather", "tp", self.hidden, times=parts)
        self.add("outputs of proj and fc2", "reduce_scatter", "tp", self.hidden, times=parts)
        self.add("inputs again, and output gradients", "all_gather", "tp", self.hidden, BACKWARD, 2 * parts)
        self.add("input gradients of qkv and fc1", "reduce_scatter", "tp", self.hidden, BACKWARD, parts)

    def add_experts(self) -> None:
        """Megatron's all-to-all dispatcher: tokens and their probabilities to the experts, outputs back.

        Over ep each way an all-to-all, over etp an all-gather and a reduce-scatter. Routing is balanced.
        """
        problem, e = self.problem, {"bytes": self.e}
        counts = {"ranks": self.sizes["etp ep"], "experts": problem.shape.num_moe_experts, "int64": 8}
        self.add("tokens of each expert", "all_gather", "etp ep", counts)
        tokens = {"t' topk": problem.own_tokens * problem.shape.moe_router_topk}
        gathered, h = {"t' topk etp": problem.expert_tokens}, {"h": problem.shape.hidden_size}
        for name, width in (("tokens of experts", h), ("probabilities", {})):
            for phase, ways in ((FORWARD, "all_gather"), (BACKWARD, "reduce_scatter")):
                gradient = "gradients of " if phase == BACKWARD else ""
                self.add(gradient + name, "all_to_all", "ep", {**tokens, **width, **e}, phase)
                self.add(gradient + name, ways, "etp", {**gathered, **width, **e}, phase)
        for phase, ways in ((FORWARD, "reduce_scatter"), (BACKWARD, "all_gather")):
            gradient = "gradients of " if phase == BACKWARD else ""
            self.add(gradient + "experts' outputs", ways, "etp", {**gathered, **h, **e}, phase)
            self.add(gradient + "experts' outputs", "all_to_all", "ep", {**tokens, **h, **e}, phase)

    def add_attention(self) -> None:
        """What attention exchanges."""
        shape, layout, work = self.problem.shape, self.problem.layout, self.problem.workload
        if self.problem.gathers_qkv:
            mixed = {"t": self.t, "(H+2G)d": self.problem.qkv_width, "bytes": self.e}
            self.add("mixed QKV", "all_gather", "tp", mixed, part="exchange")
            self.add("gradient of the mixed QKV", "reduce_scatter", "tp", mixed, BACKWARD, part="exchange")
        if not layout.sliced:
            return
        cached = work.kind != "train" and layout.kv_cache == "sequence"
        whole = cached or (work.kind == "train" and layout.comm_type == "a2a")  # before the norm
        if shape.qk_layernorm and not whole:
            self.add_qk_norm()
        if cached and not self.has_prompts_as_in_training():
            self.add_sequence_cache()
        elif not cached and (layout.comm_type == "all_reduce" or work.kind == "decode"):
            self.add_summed_scores()
        else:
            self.add_whole_heads()

    def has_prompts_as_in_training(self) -> bool:
        """Prompts take the core that trains where a rank attends with every KV head of its head group."""
        layout, work, heads = self.problem.layout, self.problem.workload, self.problem.heads
        shape = self.problem.shape
        local = not shape.window_size and shape.softmax_type == "vanilla"  # its core is PyTorch's fused one
        linear = work.fused or local  # in memory
        everyone = set(heads.kv_needed) == {heads.kv_heads}
        return work.kind == "prefill" and layout.comm_type == "a2a" and linear and everyone

    def add_qk_norm(self) -> None:
        heads = self.problem.heads
        moments = 2 if self.problem.shape.normalization == "LayerNorm" else 1
        sliced = {"keys": heads.kv_heads}
        if self.problem.layout.placement == "dims":
            sliced["queries"] = heads.query_heads
        for name, count in sliced.items():
            for phase in (FORWARD, BACKWARD):
                size = {"t": self.t, "heads": count, "fp32": 4}
                self.add(f"QK norm of {name}", "all_reduce", "dim", size, phase, moments)

    def add_sequence_cache(self) -> None:
        heads, lse = self.problem.heads, 4 / self.e  # an fp32 log-sum-exp travels as elements of the dtype
        tokens = {"(p-1)": self.m - 1, "t": self.t, "bytes": self.e}
        new = (heads.query_heads + 2 * heads.kv_heads) * heads.slice_dim
        self.add("new q, k, v", "all_gather", "dim", {**tokens, "(hq+2hk)d/m": new})
        if self.problem.layout.placement == "heads":
            partial = {"hq/m(d+lse)": heads.query_heads / self.m * (self.problem.shape.kv_channels + lse)}
        else:
            partial = {"hq(d/m+lse)": heads.query_heads * (heads.slice_dim + lse)}
        self.add("partial outputs", "all_to_all", "dim", {**tokens, **partial})

    def add_whole_heads(self) -> None:
        """Comm type a2a: one collective before attention, one after it where queries are sliced."""
        heads, b, me = self.problem.heads, self.problem.layout.micro_batch, self.dim_rank
        needed, per_head = heads.kv_needed, 2 * self.t * heads.slice_dim
        keys, others = (self.m - 1) * needed[me] * per_head, (sum(needed) - needed[me]) * per_head
        everything = {"(p-1)": 1, "bytes": self.e}
        if self.problem.layout.placement == "heads":
            gathers = heads.kv_blocks == 1  # everyone needs the same
            received = {**everything, "K and V of the other slices": keys}
            sent = {**everything, "gradients from the other heads": others}
            self.add("K and V", "all_gather" if gathers else "all_to_all", "dim", received)
            self.add("gradients of K and V", "all_to_all", "dim", sent, BACKWARD)
            return
        a, c, s = heads.head_parts, heads.position_parts, self.problem.workload.length
        own = part_length(s, me % c, c)  # positions of this rank, received from every other rank
        rows = b * heads.query_heads // a * heads.slice_dim
        queries = (self.m - 1) * own * rows
        outputs = (a * s - own) * rows  # positions of this rank's slices, over all parts but its own
        self.add("Q, K and V", "all_to_all", "dim", {**everything, "elements": queries + keys})
        self.add("output slices", "all_to_all", "dim", {**everything, "elements": outputs})
        # Each gradient travels its exchange's way back.
        self.add("gradients of Q, K, V", "all_to_all", "dim",
                 {**everything, "elements": outputs + others}, BACKWARD)  # fmt: skip
        self.add("gradients of output slices", "all_to_all", "dim",
                 {**everything, "elements": queries}, BACKWARD)  # fmt: skip

    def add_summed_scores(self) -> None:
        """Comm type all_reduce (and a cache of slices)."""
        heads, work = self.problem.heads, self.problem.workload
        keys = work.length + (1 if work.kind == "decode" else 0)
        scores = {"t": self.t, "hq": heads.query_heads, "keys": keys, "fp32": 4}
        per_head = heads.query_heads // self.m * heads.slice_dim
        pieces = {"(p-1)": self.m - 1, "t": self.t, "hq/m d/m": per_head, "bytes": self.e}
        for phase in (FORWARD, BACKWARD):
            self.add("partial scores", "all_reduce", "dim", scores, phase)
            if self.problem.layout.placement == "heads":
                self.add("query slices", "all_to_all", "dim", pieces, phase)
                self.add("whole outputs", "all_to_all", "dim", pieces, phase)

    def add_ends(self) -> None:
        """Embedding on the first stage; output layer and loss, or logits, on the last."""
        sequence_parallel = self.problem.layout.sequence_parallel
        summed = "reduce_scatter" if sequence_parallel else "all_reduce"
        if self.first:
            self.add("embedding", summed, "tp", self.hidden)
            if sequence_parallel:
                self.add("gradient of the embedding", "all_gather", "tp", self.hidden, BACKWARD)
        if not self.last:
            return
        if not self.train:
            vocabulary = self.problem.shape.padded_vocab_size(self.problem.layout.tp)
            logits = {"sequences": self.problem.layout.micro_batch, "V": vocabulary, "bytes": self.e}
            self.add("logits of the last token", "all_gather", "tp", logits)
            return
        softmax = {"t": self.t, "fp32": 4}
        self.add("maximum, target and sum of the softmax", "all_reduce", "tp", softmax, times=3)
        if sequence_parallel:
            self.add("input of the output layer", "all_gather", "tp", self.hidden)
            self.add("input of the output layer again", "all_gather", "tp", self.hidden, BACKWARD)
        self.add("input gradient of the output layer", summed, "tp", self.hidden, BACKWARD)

    def add_pipeline(self) -> None:
        layout = self.problem.layout
        hidden = {**self.hidden, "1/tp": 1 / layout.tp} if layout.sequence_parallel else self.hidden
        if not self.first:
            self.add("hidden states of the stage before", "recv", "pp", hidden)
        if not self.last:
            self.add("gradients of the stage after", "recv", "pp", hidden, BACKWARD)

    def add_gradients(self) -> None:
        """Once in a step: gradients over replicas, those that tp ranks have to sum, their norm."""
        shape, layout, work = self.problem.shape, self.problem.layout, self.problem.workload
        gradient = {"bytes": 2 if work.dtype == "fp16" else 4}
        elements, experts = total(dense_parameters(self.problem, self.stage)), expert_parameters(self.problem)
        tied = shape.tied_embeddings and layout.pp > 1 and (self.first or self.last)
        embedding = shape.padded_vocab_size(layout.tp) // layout.tp * shape.hidden_size
        if work.distributed_optimizer:
            # Megatron keeps a tied embedding that two stages share in a buffer of its own.
            buffers = [("dp", size) for size in ([elements - embedding, embedding] if tied else [elements])]
            times = 2 if experts else 1  # Megatron's optimizer of experts and the other one both gather all
            for group, buffer in [*buffers, ("edp", total(experts))]:
                weights = {"elements": buffer, "bytes": self.e}
                self.add("gradients", "reduce_scatter", group, {"elements": buffer, **gradient}, STEP)
                self.add("updated weights", "all_gather", group, weights, STEP, times)
        else:
            self.add("gradients", "all_reduce", "dp", {"elements": elements, **gradient}, STEP)
            size = {"elements": total(experts), **gradient}
            self.add("gradients of experts", "all_reduce", "edp", size, STEP)
        if replicated := self.summed_over_tp():
            size = {"elements": replicated, **gradient}
            self.add("gradients of norms and biases", "all_reduce", "tp", size, STEP)
        if tied:
            size = {"elements": embedding, **gradient}
            self.add("gradients of the tied embedding", "all_reduce", "embd", size, STEP)
        self.add("norm of the gradients", "all_reduce", "world", {"fp32": 4}, STEP)
        if experts and not work.distributed_optimizer:
            self.add("norm of the experts' gradients", "all_reduce", "etp ep pp", {"fp32": 4}, STEP)

    def summed_over_tp(self) -> float:
        """Elements of the replicated parameters whose gradients differ between tensor-parallel ranks."""
        shape, layers, attention = self.problem.shape, self.problem.layers, self.problem.attention_layers
        norm = 2 if shape.normalization == "LayerNorm" else 1
        count = attention * 2 * norm * shape.kv_channels if shape.qk_layernorm else 0
        if not self.problem.layout.sequence_parallel:
            return count
        experts = shape.num_moe_experts
        biased = (attention + (0 if experts else layers)) if shape.add_bias_linear else 0
        vectors = layers * 2 * norm + biased + (norm if self.last else 0)
        vectors += layers * (experts + shape.moe_shared_expert_gate)  # the router is not divided
        if shape.add_bias_linear:  # of the router; and those of experts' fc2 count as replicated
            count += layers * experts
            vectors += layers * experts // self.sizes["ep"]
        return count + vectors * shape.hidden_size + (layers - attention) * norm * shape.linear_value_head_dim
