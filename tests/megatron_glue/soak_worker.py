"""What a rank does in soak.py: random layers against float64, judged by Megatron's own rounding.

Note [When is a layer equal?]
    Every rank compares what it holds of the output and of every gradient, queries, gates, keys and values
    apart. The error of a tensor is the root mean square of its entries' errors. It may be at most FACTOR
    times that of Megatron's own layer on one rank, in the same dtype against the same float64 formula, plus a
    few units of rounding (UNITS, of the whole tensor's root mean square). QK norms are judged by the QKV
    weight's at least: with one position, or equal keys, their gradient is 0, a sum of terms that cancel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from helix_megatron.check.layer import MASK_TYPES, sinks_of
from helix_megatron.check.reference import Case, attention, normalise
from helix_megatron.exchange.slices import select_positions
from helix_megatron.megatron import integrate, process_groups
from helix_megatron.partition.config import HelixPlan
from helix_megatron.partition.derived import slices_for
from helix_megatron.partition.grid import HelixConfigError
from tests.megatron_glue.layer_worker import (
    Groups,
    TEDotProductAttention,
    make_config,
    start,
)
from tests.megatron_glue.soak_draw import EXPERTS, FFN, Job

FACTOR = 4.0
UNITS = 16.0
TOP_K = 2
CHUNK = 60  # jobs whose expectations are shared out together
ATTENTION = ("hidden", "qkv_weight", "qkv_bias", "proj_weight", "q_norm", "k_norm", "sinks")
BLOCK = ("input_norm", "mlp_norm", "router", "fc1", "fc2")


# ---- the formula ----
def draw_tensors(job: Job) -> None:
    """Weights, input and loss of a job into its case, numbers of its dtype."""
    case = job.case
    case.draw()
    generator = torch.Generator().manual_seed(case.seed + 2)
    experts = EXPERTS if job.block == "moe" else 1
    h = case.hidden
    sizes = {"input_norm": (h,), "mlp_norm": (h,), "router": (EXPERTS, h), "fc1": (experts, FFN, h)}
    for name, size in {**sizes, "fc2": (experts, h, FFN)}.items():
        drawn = torch.randn(size, generator=generator).double()
        case.tensors[name] = 1 + 0.2 * drawn if "norm" in name else drawn * size[-1] ** -0.5
    if job.off_by_one:
        case.tensors["sinks"].zero_()
    if job.half:
        for name in set(case.tensors) - {"loss"}:
            case.tensors[name] = case.tensors[name].bfloat16().double()


def formula(job: Job, slices: int) -> dict[str, Tensor]:
    """Output and gradients in float64, as reference() of a whole layer."""
    case = job.case
    names = ATTENTION + (BLOCK if job.block else ())
    t = {name: case.tensors[name].clone().requires_grad_() for name in names}
    if job.block is None:
        out = attention(case, t, slices)
    else:
        kind = layer_norm(case)
        normed = normalise(t["hidden"], t["input_norm"], kind)
        middle = t["hidden"] + attention(case, {**t, "hidden": normed}, slices)
        x = normalise(middle, t["mlp_norm"], kind)
        each = torch.einsum("sbh,efh->sbef", x, t["fc1"])
        each = torch.einsum("sbef,ehf->sbeh", torch.nn.functional.gelu(each), t["fc2"])
        if job.block == "moe":
            best = (x @ t["router"].T).topk(TOP_K)
            shares = torch.zeros_like(each[..., 0]).scatter(-1, best.indices, best.values.softmax(-1))
            each = each * shares[..., None]
        out = middle + each.sum(2)
    (out * case.tensors["loss"]).sum().backward()
    return {"output": out.detach(), **{name: x.grad for name, x in t.items() if x.grad is not None}}


def layer_norm(case: Case) -> str:
    return "LayerNorm" if case.qk_norm == "LayerNorm" else "RMSNorm"


# ---- Megatron's layer and Helix's ----
def build(job: Job, tp: int, cp: int, pgs: ProcessGroupCollection, groups=None) -> torch.nn.Module:
    """A layer on these process groups; Helix's where integration is enabled."""
    case, flags = job.case, dict(job.overrides)
    if tp == 1:
        flags.pop("sequence_parallel", None)
    flags |= dict(context_parallel_size=cp, ffn_hidden_size=FFN)
    if job.half:
        flags |= dict(params_dtype=torch.bfloat16, bf16=True)
    if job.block == "moe":
        flags |= dict(num_moe_experts=EXPERTS, moe_router_topk=TOP_K, moe_router_load_balancing_type="none")
    config = make_config(case, tp, **flags)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm, normalization="RMSNorm",
    )  # fmt: skip
    attn = spec.submodules.self_attention
    attn.params = {"attn_mask_type": AttnMaskType[MASK_TYPES[case.mask]]}
    if groups is not None:
        attn.params["helix_groups"] = groups
    exact = job.helix.softmax == "exact" and slices_for(job.helix, config, tp) > 1
    if job.te_core and exact:  # else Megatron itself calls it, with views
        attn.submodules.core_attention = TEDotProductAttention
    return build_module(attn if job.block is None else spec, config=config, layer_number=1, pg_collection=pgs)


def compute(
    layer: torch.nn.Module, job: Job, pgs: ProcessGroupCollection, rows: Any, columns: Any
) -> dict[str, tuple[Tensor, tuple]]:
    """Forward and backward with this rank's weights: {name: (what it found, an index of what that is)}.

    Args:
        rows, columns: those of the standard weights that this rank holds.
    """
    case, dtype = job.case, torch.bfloat16 if job.half else torch.float32
    attn = layer if job.block is None else layer.self_attention
    tp, rank = pgs.tp.size(), pgs.tp.rank()
    own_heads = slice(rank * case.heads // tp, (rank + 1) * case.heads // tp)
    weights = {
        "qkv_weight": (attn.linear_qkv.weight, (rows,)),
        "proj_weight": (attn.linear_proj.weight, (slice(None), columns)),
    }
    partial = []  # every rank of the tensor-parallel group has a part of the sum
    if case.bias:
        weights["qkv_bias"] = attn.linear_qkv.bias, (rows,)
    if case.sinks and not job.off_by_one:
        weights["sinks"] = sinks_of(attn), (own_heads,)
    if case.qk_norm in ("RMSNorm", "LayerNorm"):
        weights |= {"q_norm": (attn.q_layernorm.weight, ()), "k_norm": (attn.k_layernorm.weight, ())}
        partial += ["q_norm", "k_norm"]
    if job.block is not None:
        weights |= block_weights(layer, job, tp, rank)
        partial += ["input_norm", "mlp_norm", "router"] if job.sequence_parallel else []
    with torch.no_grad():
        for name, (weight, index) in weights.items():
            weight.copy_(case.tensors[name.split(".")[0]][index].to(dtype))

    positions = select_positions(torch.arange(case.seq), pgs.cp.rank(), pgs.cp.size())
    share = positions.chunk(tp)[rank] if job.sequence_parallel and tp > 1 else positions
    mask, table = case.attention_mask(), case.rope_table()
    mask = None if mask is None else mask[:, :, positions]
    table = None if table is None else table[positions]
    hidden = case.tensors["hidden"][share].to(dtype).requires_grad_()
    ends = torch.tensor([*accumulate(case.documents, initial=0)], dtype=torch.int32)
    packed = None
    if case.documents:
        longest = max(case.documents)
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)

    def forward(x: Tensor) -> Tensor:
        if tp > 1 or packed is None:
            return layer(x, mask, rotary_pos_emb=table, packed_seq_params=packed)[0]
        pieces = x.split(case.documents)  # Megatron's local core does not know packed sequences
        tables = [None if table is None else table[: len(piece)] for piece in pieces]
        return torch.cat([layer(p, mask, rotary_pos_emb=t)[0] for p, t in zip(pieces, tables, strict=True)])

    full = job.recompute == "full"
    out = tensor_parallel.checkpoint(forward, False, hidden) if full else forward(hidden)
    (out.double() * case.tensors["loss"][share]).sum().backward()
    found = {"output": (out.detach(), (share,)), "hidden": (hidden.grad, (share,))}
    for name, (weight, index) in weights.items():
        grad = weight.grad.double()
        for group in (pgs.cp, pgs.tp if name in partial else None):
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(grad, group=group)
        found[name] = grad, index
    return found


def block_weights(layer: torch.nn.Module, job: Job, tp: int, rank: int) -> dict[str, tuple[Tensor, tuple]]:
    """What a Transformer layer has besides its attention, and which part of it this rank holds."""
    own = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
    weights = {
        "input_norm": (layer.input_layernorm.weight, ()),
        "mlp_norm": (layer.pre_mlp_layernorm.weight, ()),
    }
    experts = [layer.mlp]
    if job.block == "moe":
        weights["router"] = layer.mlp.router.weight, ()
        experts = layer.mlp.experts.local_experts
    for number, expert in enumerate(experts):
        weights[f"fc1.{number}"] = expert.linear_fc1.weight, (number, own)
        weights[f"fc2.{number}"] = expert.linear_fc2.weight, (number, slice(None), own)
    return weights


# ---- errors ----
def parts_of(case: Case, name: str, index: tuple) -> dict[str, Tensor | slice]:
    """Queries, gates, keys and values in rows of the QKV weight; other tensors are whole."""
    if name not in ("qkv_weight", "qkv_bias"):
        return {name: slice(None)}
    ratio = case.heads // case.groups
    kinds = ["query"] * ratio + ["gate"] * (ratio if case.gate else 0) + ["key", "value"]
    number = torch.tensor([sorted(set(kinds)).index(kind) for kind in kinds])
    of_rows = number.repeat_interleave(case.dim).repeat(case.groups)[index[0]]
    return {f"{name} of {kind}": of_rows == k for k, kind in enumerate(sorted(set(kinds)))}


def name_of(part: str) -> str:
    """The tensor to which a kind of row or an expert belongs."""
    return part.split(" ")[0].split(".")[0]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if torch.isfinite(x).all() else float("inf")


def errors(case: Case, found: dict, expected: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square of |found - expected|, for each tensor or kind of row."""
    result = {}
    for label, (value, index) in found.items():
        name = label.split(".")[0]
        difference = value.double() - expected[name][index]
        for part, chosen in parts_of(case, name, index).items():
            if difference[chosen].numel():
                result[part + label.removeprefix(name)] = rms(difference[chosen])
    return result


def of_megatron(job: Job, expected: dict, alone: ProcessGroupCollection, slices: int) -> dict[str, float]:
    """Errors of Megatron's own layer on one rank."""
    case, rows, columns = job.case, slice(None), slice(None)
    if slices > 1:  # H*m heads of d/m
        plan = resolve(replace(job, helix=replace(job.helix, hierarchical_allreduce=False)))
        rows, columns = plan.layout.qkv_permutation(), plan.layout.proj_permutation()
        smaller = replace(
            case, heads=case.heads * slices, groups=case.groups * slices, dim=case.dim // slices
        )
        job = replace(job, case=smaller)
    layer = build(job, 1, 1, alone)
    job = replace(job, recompute=None)
    return errors(case, compute(layer, job, alone, rows, columns), expected)


def limits(job: Job, expected: dict[str, Tensor], megatron: dict[str, float]) -> dict[str, float]:
    """What the errors of Helix may be."""
    eps = torch.finfo(torch.bfloat16 if job.half else torch.float32).eps
    scale = {part: rms(expected[name_of(part)]) for part in megatron}
    for norm in scale.keys() & {"q_norm", "k_norm"}:
        scale[norm] = max(scale[norm], rms(expected["qkv_weight"]))
    return {part: FACTOR * error + UNITS * eps * scale[part] for part, error in megatron.items()}


# ---- a rank ----
def resolve(job: Job) -> HelixPlan:
    case = job.case
    return job.helix.resolve(case.heads, case.groups, case.dim, job.tp, case.interleaved, case.gate)


def expectations(
    jobs: list[Job], plans: dict[int, Any], alone: ProcessGroupCollection
) -> dict[int, dict[str, dict]]:
    """{number: {"formula", "limits"}}; the ranks of the world share them out."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = {}
    for job in jobs[rank::world]:
        plan = plans[job.number]
        if isinstance(plan, HelixConfigError):
            continue
        slices = plan.grid.dim_parallel_size if plan.layout.per_slice else 1
        draw_tensors(job)
        expected = formula(job, slices)
        own[job.number] = {
            "formula": expected,
            "limits": limits(job, expected, of_megatron(job, expected, alone, slices)),
        }
    everyones = [None] * world
    torch.distributed.all_gather_object(everyones, own)
    return {number: found for share in everyones for number, found in share.items()}


@contextlib.contextmanager
def helix_on(job: Job, groups: Any) -> Iterator[None]:
    """Helix in Megatron's specs, and the groups that its hierarchical reductions use."""
    process_groups._registered = groups
    integrate.enable(job.helix)
    try:
        yield
    finally:
        integrate.disable()


def outcome(job: Job, plan: HelixPlan, groups: Any, known: dict) -> dict:
    """{"grid", "error" and "of": the largest as a share of its limit, "relative": to the tensor's scale}."""
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    rank = pgs.tp.rank()
    draw_tensors(job)
    with helix_on(job, groups):
        layer = build(job, job.tp, job.cp, pgs, groups)
        rows, columns = plan.layout.qkv_rows(rank), plan.layout.proj_columns(rank)
        found = errors(job.case, compute(layer, job, pgs, rows, columns), known["formula"])
    shares = {part: error / max(known["limits"][part], 1e-30) for part, error in found.items()}
    worst = max(shares, key=lambda part: shares[part] if shares[part] == shares[part] else float("inf"))
    grid = f"{plan.grid}" if plan.layout.is_even else f"{plan.grid} uneven"
    scale = rms(known["formula"][name_of(worst)]) or 1.0
    return {"grid": grid, "error": shares[worst], "of": worst, "relative": found[worst] / scale}


def rank_outcomes(tp: int, cp: int, jobs: list[Job]) -> list[dict]:
    """For each job what outcome() says, or "refused": why; and "threads" of this process.

    The groups of every grid are made once, at first: gloo keeps threads for each that is made.
    """
    start(tp, cp)
    ones = [torch.distributed.new_group([rank]) for rank in range(tp * cp)]
    alone = ProcessGroupCollection()
    for name in dataclasses.fields(ProcessGroupCollection):
        setattr(alone, name.name, ones[torch.distributed.get_rank()])
    groups, found, plans = Groups(), [], {}
    for job in jobs:
        try:
            plans[job.number] = resolve(job)
        except HelixConfigError as refusal:
            plans[job.number] = refusal
    for grid in dict.fromkeys(plan.grid for plan in plans.values() if isinstance(plan, HelixPlan)):
        if grid.dim_parallel_size > 1:
            groups.of(grid)
    for first in range(0, len(jobs), CHUNK):
        some = jobs[first : first + CHUNK]
        known = expectations(some, plans, alone)
        for job in some:
            plan = plans[job.number]
            try:
                if isinstance(plan, HelixConfigError):
                    raise plan
                whole = plan.grid.dim_parallel_size == 1
                found.append(outcome(job, plan, None if whole else groups.of(plan.grid), known[job.number]))
            except (HelixConfigError, NotImplementedError) as refusal:
                if isinstance(refusal, NotImplementedError) and "packed sequences" not in str(refusal):
                    raise
                found.append({"refused": str(refusal)})
            job.case.tensors.clear()
            found[-1]["threads"] = len(os.listdir("/proc/self/task"))
    return found
