"""Variants: ways to run one model. Which are the default, and which must have the same losses. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helix_megatron.partition.grid import AttentionShape, HelixConfigError, legal_grids

# What a variant may change without becoming another model.
_LAYOUT_FLAGS = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"),
    *("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"),
    *("--micro-batch-size", "--sequence-parallel", "--use-distributed-optimizer"),
    *("--overlap-grad-reduce", "--overlap-param-gather", "--transformer-impl"),
    *("--recompute-granularity", "--recompute-method", "--recompute-num-layers"),
)
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    name: str
    """Shown in the table; unique."""
    attention_impl: str = "megatron"
    """`megatron` or `helix`."""
    shape: str | None = None
    """Whose heads these are, for the overview: "SmolLM2"."""
    args: dict[str, Any] = field(default_factory=dict)
    """Flags on top of MODEL_ARGS, same form."""
    may_fail: bool = False
    """Its failure is a finding (Megatron refuses this shape, say) and not an error of the comparison."""
    ranks: int | None = None
    """Ranks it runs on; None for the comparison's world_size."""
    family: str | None = None
    """In a scaling study: the variant that this is one size of."""
    slow_down: float = 0.0
    """Each measured iteration sleeps this share of its own time: for the self-check alone."""


def model_key(flags: Mapping[str, Any], attention_impl: str) -> str:
    """Equal for variants that are the same model.

    The per-slice softmax is a model of its own for every number of slices.
    """
    kept = {k: v for k, v in flags.items() if k not in _LAYOUT_FLAGS and not k.startswith("--helix-")}
    grid = per_slice_grid(flags, attention_impl)
    if grid is not None:
        kept["per-slice"] = grid[1]
    return json.dumps(kept, sort_keys=True, default=str)


def per_slice_grid(flags: Mapping[str, Any], attention_impl: str) -> tuple[int, int] | None:
    """(n, m) of a variant with per-slice softmax, as Helix chooses what is not given; None for others."""
    if attention_impl != "helix" or flags.get("--helix-softmax") != "per-slice":
        return None
    tp, shape = flags.get(TP, 1), attention_shape(flags)
    m = flags.get("--helix-dim-parallel-size")
    n = flags.get("--helix-head-parallel-size") or (tp // m if m else None)
    if n is None:
        n = math.gcd(shape.num_query_groups, tp) if shape else tp
    return n, m or max(1, tp // n)


def smaller_heads(flags: Mapping[str, Any], m: int) -> dict[str, Any] | None:
    """Flags of the model that per-slice softmax over m slices is: H m heads of d / m, G m for K and V.

    None when the flags do not say the heads, or m does not divide d.
    """
    shape = attention_shape(flags)
    if shape is None or shape.kv_channels % m:
        return None
    return {
        "--num-attention-heads": shape.num_attention_heads * m,
        "--group-query-attention": True,
        "--num-query-groups": shape.num_query_groups * m,
        "--kv-channels": shape.kv_channels // m,
    }


def attention_shape(flags: Mapping[str, Any]) -> AttentionShape | None:
    """The attention that MODEL_ARGS describe; None when they leave out the heads or the hidden size."""
    heads, hidden = flags.get("--num-attention-heads"), flags.get("--hidden-size")
    if not heads or not (flags.get("--kv-channels") or hidden):
        return None
    channels = flags.get("--kv-channels") or hidden // heads
    groups = flags.get("--num-query-groups", 1) if flags.get("--group-query-attention") else heads
    rope = flags.get("--position-embedding-type", "learned_absolute") == "rope"
    rotary = int(channels * float(flags.get("--rotary-percent", 1.0))) if rope else 0
    interleaved = bool(flags.get("--rotary-interleaved"))
    return AttentionShape(heads, groups, channels, rotary, interleaved)


def default_variants(world_size: int, flags: Mapping[str, Any]) -> tuple[Variant, ...]:
    """What is compared when a file names no variants.

    Megatron as TP=W/2 PP=2 (the paper's baseline), as TP=W and as TP=W/2 DP=2 (the honest ones: the same
    ranks without slicing and without a pipeline), and Helix at every legal grid of W ranks up to m = 8, with
    slices of equal size unless there are none.
    """
    half, found = world_size // 2, []
    if world_size % 2 == 0:
        found.append(Variant(f"Megatron TP={half} PP=2", args={TP: half, PP: 2}, may_fail=True))
    found.append(Variant(f"Megatron TP={world_size}", args={TP: world_size}, may_fail=True))
    if world_size % 2 == 0:
        found.append(Variant(f"Megatron TP={half} DP=2", args={TP: half}, may_fail=True))
    shape = attention_shape(flags)
    if shape is None:
        raise HelixConfigError(
            "without variants the grids follow from the model: MODEL_ARGS needs num-attention-heads and "
            "hidden-size, or name a preset"
        )
    for grid in legal_grids(shape, world_size, even=True) or legal_grids(shape, world_size):
        n, m = grid.head_parallel_size, grid.dim_parallel_size
        if m <= 8:
            args = {TP: world_size, "--helix-head-parallel-size": n, "--helix-dim-parallel-size": m}
            found.append(Variant(f"Helix {grid}", "helix", args))
    return tuple(found)
