"""What is planned: the work to be done, and one way to lay it out over the ranks.

Pure arithmetic. Ranks are numbered as Megatron numbers them: tensor-parallel neighbours first, then data,
then pipeline; inside a tensor-parallel group r = i m + j (see helix_megatron.partition.grid).

    group       ranks   distance between neighbours
    dim         m       1
    head        n       m
    tensor      tp      1
    data        dp      tp
    pipeline    pp      tp dp

Experts have groups of their own over the same tp dp ranks of a stage; edp = tp dp / (etp ep):

    expert tensor      etp     1        each expert's matrices
    expert             ep      etp      the experts
    expert data        edp     etp ep   replicas of the same experts
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError, HelixGrid, even_slices
from helix_megatron.partition.layout import HelixLayout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
KINDS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """What a step has to do."""

    kind: str
    """"train": forward, backward and optimizer. "prefill": prompts of `length`. "decode": one token for every
    sequence, each with `length` positions cached."""
    batch: int
    """Sequences in a step, over all replicas."""
    length: int
    """Positions of a sequence."""
    dtype: str = "bf16"
    """Of parameters and activations."""
    distributed_optimizer: bool = False
    """Optimizer state spread over data-parallel ranks."""
    fused: bool = True
    """Transformer Engine's layers and flash attention. False: Megatron's unfused local layers (host)."""
    micro_batch: int | None = None
    """Sequences of a micro-batch in training, where it is given and not chosen."""
    cuda_graph: bool = True
    """Decode steps are replayed from CUDA graphs (--cuda-graph-impl local); False: eager."""

    @property
    def element(self) -> int:
        """Bytes of a parameter or an activation."""
        return ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out. `helix` False is Megatron's own attention, whatever tp is."""

    tp: int
    pp: int = 1
    dp: int = 1
    helix: bool = False
    grid: HelixGrid | None = None
    """n x m with Helix."""
    comm_type: str = "none"
    """"a2a" or "all_reduce" when heads are sliced."""
    placement: str = "none"
    """"dims" or "heads" when heads are sliced."""
    kv_cache: str = "none"
    """"sequence" or "dim" when heads are sliced."""
    micro_batch: int = 1
    """Sequences of a micro-batch of one replica. In decode: all of the replica's."""
    sequence_parallel: bool = False
    recompute: bool = False
    """Full recompute: only the inputs of layers are kept for the backward pass."""
    ep: int = 1
    """Expert-parallel size."""
    etp: int = 1
    """Tensor-parallel size of an expert."""

    @property
    def edp(self) -> int:
        """Replicas of the same experts."""
        return self.tp * self.dp // (self.ep * self.etp)

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def m(self) -> int:
        return self.grid.dim_parallel_size if self.grid else 1

    @property
    def n(self) -> int:
        """Head groups; Megatron's own attention splits by heads alone."""
        return self.grid.head_parallel_size if self.grid else self.tp

    @property
    def sliced(self) -> bool:
        return self.m > 1

    def helix_config(self, shape: ModelShape) -> HelixConfig | None:
        """The settings that give this layout; None for Megatron's own attention."""
        if not self.helix or self.grid is None:
            return None
        rotary = shape.rotary_percent if shape.position_embedding_type == "rope" else 0.0
        if not self.sliced:
            return HelixConfig(self.n, self.m, rotary_percent=rotary)
        return HelixConfig(self.n, self.m, comm_type=self.comm_type, query_placement=self.placement,
                           kv_cache=self.kv_cache, rotary_percent=rotary)  # fmt: skip

    def describe(self, workload: Workload | None = None) -> str:
        """One short line; with the work, also what it depends on: the cache, or micro-batches."""
        text = f"tp={self.tp} pp={self.pp} dp={self.dp}"
        if self.ep > 1 or self.etp > 1:
            text += f" ep={self.ep} etp={self.etp}"
        if self.helix:
            text += f", Helix {self.grid}"
            if self.sliced:
                text += f" {self.comm_type} {self.placement}"
                text += f", cache {self.kv_cache}" if workload and workload.kind != "train" else ""
        if workload and workload.kind == "train":
            text += f", micro-batch {self.micro_batch}" + (", recompute" if self.recompute else "")
        return text

    def flags(self, workload: Workload, experts: bool = False) -> dict[str, Any]:
        """Megatron's flags of the layout, `--name` to value; `experts`: whether the model has any."""
        flags: dict[str, Any] = {
            "--tensor-model-parallel-size": self.tp,
            "--pipeline-model-parallel-size": self.pp,
            "--attention-impl": "helix" if self.helix else "megatron",
        }
        if experts:
            flags |= {"--expert-model-parallel-size": self.ep, "--expert-tensor-parallel-size": self.etp}
        if self.helix:
            flags |= {"--helix-head-parallel-size": self.n, "--helix-dim-parallel-size": self.m}
        if self.sliced:
            flags |= {"--helix-comm-type": self.comm_type, "--helix-query-placement": self.placement}
            if workload.kind != "train":
                flags["--helix-kv-cache"] = self.kv_cache
        if workload.kind == "train":
            flags |= {"--micro-batch-size": self.micro_batch, "--global-batch-size": workload.batch,
                      "--seq-length": workload.length}  # fmt: skip
        if workload.kind == "decode" and workload.cuda_graph and workload.fused and self.kv_cache != "dim":
            flags["--cuda-graph-impl"] = "local"
        switches = {
            "--sequence-parallel": self.sequence_parallel,
            "--use-distributed-optimizer": workload.kind == "train" and workload.distributed_optimizer,
            f"--{workload.dtype}": workload.dtype != "fp32",
        }
        flags |= {name: True for name, on in switches.items() if on}
        if self.recompute:
            flags |= {"--recompute-granularity": "full", "--recompute-method": "uniform",
                      "--recompute-num-layers": 1}  # fmt: skip
        return flags


@dataclass(frozen=True)
class Problem:
    """One layout of one model doing one kind of work: what every prediction is about."""

    shape: ModelShape
    layout: Layout
    workload: Workload

    def __post_init__(self) -> None:
        reason = illegal_reason(self.shape, self.layout, self.workload)
        if reason:
            raise HelixConfigError(f"{self.layout.describe()} cannot run {self.shape.name}: {reason}")

    @property
    def replica_batch(self) -> int:
        """Sequences of one data-parallel replica."""
        return -(-self.workload.batch // self.layout.dp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one replica in a step."""
        return -(-self.replica_batch // self.layout.micro_batch)

    @property
    def layers(self) -> int:
        """Transformer layers of a pipeline stage."""
        return self.shape.num_layers // self.layout.pp

    @property
    def attention_layers(self) -> int:
        """Of these, layers with attention; the others are gated delta nets."""
        return self.shape.num_attention_layers // self.layout.pp

    @property
    def tokens(self) -> int:
        """New tokens of a micro-batch in one forward pass."""
        return self.layout.micro_batch * (1 if self.workload.kind == "decode" else self.workload.length)

    @property
    def own_tokens(self) -> int:
        """Of these, those that a rank keeps between layers: 1/tp with sequence parallelism."""
        return -(-self.tokens // self.layout.tp) if self.layout.sequence_parallel else self.tokens

    @property
    def expert_tokens(self) -> int:
        """Tokens of all experts of a rank, counted once for each expert; routing is taken to be balanced."""
        return self.own_tokens * self.shape.moe_router_topk * self.layout.etp

    @property
    def qkv_width(self) -> int:
        """Columns of the QKV projection over all ranks, (H + 2G) d, and of an output gate."""
        return self.shape.qkv_width

    @cached_property
    def heads(self) -> HelixLayout:
        """Heads and slices of a rank; only when sliced."""
        assert self.layout.grid is not None
        return HelixLayout(self.shape.attention, self.layout.grid, self.layout.placement)

    @property
    def gathers_qkv(self) -> bool:
        """Megatron with more ranks than KV heads: it gathers the mixed QKV and duplicates KV heads."""
        return not self.layout.sliced and self.layout.tp > self.shape.num_query_groups


def indivisible_reason(shape: ModelShape, tp: int) -> str | None:
    """Which size that Megatron deals evenly, attention's apart, `tp` ranks do not divide; None where all."""
    for what, size in shape.divided_sizes:
        if size % tp:
            return f"tensor-parallel size {tp} does not divide {what.format(size)}"
    if shape.padded_vocab_size(tp) % tp:
        return f"tensor-parallel size {tp} does not divide the padded vocabulary of {shape.vocab_size}"
    return None


def indivisible_experts_reason(shape: ModelShape, layout: Layout) -> str | None:
    """Why the experts' groups are not possible; None where they are, and without experts."""
    ep, etp, ranks = layout.ep, layout.etp, layout.tp * layout.dp
    if ranks % (ep * etp):
        return f"expert parallelism {ep} x {etp} does not divide {ranks} ranks of a stage"
    if shape.num_moe_experts % ep or (ep > 1 and not shape.num_moe_experts):
        return f"{ep} expert-parallel ranks do not divide {shape.num_moe_experts} experts"
    if shape.moe_ffn_hidden_size % etp or (etp > 1 and not shape.num_moe_experts):
        return f"{etp} ranks of an expert do not divide its {shape.moe_ffn_hidden_size}"
    if shape.add_bias_linear and etp > 1:
        return "experts with biases have no tensor parallelism in Megatron"
    return None


def illegal_reason(shape: ModelShape, layout: Layout, workload: Workload) -> str | None:
    """Why this layout cannot do this work, from arithmetic alone (memory apart); None when it can."""
    tp, heads, groups = layout.tp, shape.num_attention_heads, shape.num_query_groups
    if shape.num_layers % layout.pp:
        return f"{layout.pp} pipeline stages do not divide {shape.num_layers} layers"
    if shape.num_layers // layout.pp % shape.layer_period:
        return (f"stages of {shape.num_layers // layout.pp} layers are unlike one another, where kinds of "
                f"layers repeat every {shape.layer_period}; that is not modelled")  # fmt: skip
    if reason := indivisible_reason(shape, tp) or indivisible_experts_reason(shape, layout):
        return reason
    if shape.num_moe_experts and tp > 1 and not layout.sequence_parallel and workload.kind == "train":
        return "experts beside tensor parallelism need sequence parallelism in training"
    if layout.sequence_parallel and workload.kind != "decode" and workload.length % tp:
        return f"sequence parallelism: tp = {tp} does not divide {workload.length} positions"
    replica, rest = divmod(workload.batch, layout.dp)
    if rest:
        return f"{layout.dp} replicas do not divide a batch of {workload.batch}"
    if replica % layout.micro_batch:
        return f"micro-batches of {layout.micro_batch} do not divide a replica's {replica}"
    if layout.grid is not None and layout.grid.size != tp:
        return f"grid {layout.grid} has not {tp} ranks"
    if not layout.sliced:
        if heads % tp:
            return f"tensor-parallel size {tp} does not divide {heads} heads"
        if max(tp, groups) % min(tp, groups):
            return f"tensor-parallel size {tp} and {groups} KV heads do not divide one another"
        return None
    if not even_slices(shape.attention, layout.m):
        return f"grid {layout.grid} has slices of unequal size, which are not modelled"
    return None
