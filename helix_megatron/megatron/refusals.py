"""What would be computed wrong, or not at all, with sliced heads: refused by name before a layer is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from helix_megatron import compat
from helix_megatron.partition.config import HelixPlan
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.tensor_sizes import LINEAR_ATTENTION


def setting(config: Any, name: str, default: Any = False) -> Any:
    found = getattr(config, name, default)
    return default if found is None else found


def refuse_unsupported(config: Any, plan: HelixPlan) -> None:
    """Refuse, by name, what would be computed wrong with sliced heads.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments, which use the same names.
    """
    per_slice = plan.layout.per_slice
    value = partial(setting, config)
    softmax_type = value("softmax_type", "vanilla")
    packed = value("sft") or value("dataloader_inter_document_masking")
    packs = "packed sequences (--sft, --dataloader-inter-document-masking)"
    reasons = {
        "multi-latent attention (--multi-latent-attention)": value("multi_latent_attention"),
        "context parallelism (--context-parallel-size > 1) with per-slice softmax or --helix-comm-type "
        "all_reduce": value("context_parallel_size", 1) > 1 and plan.comm_type != "a2a",
        "the attention output gate (--attention-output-gate) with per-slice softmax": per_slice
        and value("attention_output_gate"),
        "QK clipping (--qk-clip)": value("qk_clip"),
        f"softmax type {softmax_type!r} (--softmax-type) with --helix-comm-type all_reduce": (
            softmax_type != "vanilla" and plan.comm_type == "all_reduce"
        ),
        f"softmax type {softmax_type!r} (--softmax-type) where m does not divide the query heads of a group "
        "(ranks that share a head would each train its sink)": (
            softmax_type == "learnable" and plan.comm_type == "a2a" and plan.layout.position_parts > 1
        ),
        f"softmax type {softmax_type!r} (--softmax-type) with --helix-adaptive-grad-scaling (which would "
        "scale the gradient of a sink)": plan.adaptive_grad_scaling and softmax_type == "learnable",
        **({} if value("cuda_graph_impl") == "local" else _ungraphed(value, plan, packed)),
        "layers made for inference alone (--transformer-impl inference_optimized)": (
            value("transformer_impl") == "inference_optimized"
        ),
        "fused QKV RoPE (--fused-single-qkv-rope)": value("fused_single_qkv_rope"),
        "flash decode (--flash-decode)": value("flash_decode"),
        "test mode (--test-mode)": value("test_mode"),
        "residual streams beside each other (--enable-mhc-connections), which were never tried": value(
            "enable_mhc_connections"
        ),
        "an experimental attention variant (--experimental-attention-variant)": (
            value("experimental_attention_variant") not in (False, *LINEAR_ATTENTION)
        ),
        f"{packs} with --helix-comm-type all_reduce": packed and plan.comm_type == "all_reduce",
        f"{packs} with --context-parallel-size > 1": packed and value("context_parallel_size", 1) > 1,
        f"{packs} where m does not divide the query heads of a group": (
            packed and plan.comm_type == "a2a" and plan.layout.position_parts > 1
        ),
        f"{packs} with per-slice softmax and local layers (--transformer-impl local), whose core has none": (
            packed and per_slice and value("transformer_impl") == "local"
        ),
        "weights sharded over more ranks than tensor parallelism has (--tensor-parallel-num-weight-shards, "
        "gtp_weight_remat_size)": value("gtp_weight_remat_size", 1) > 1,
        "per-slice softmax with muP attention scaling (--use-mup)": per_slice and value("use_mup"),
    }
    _refuse(reasons, plan)
    modules = value("recompute_modules", None) or ["core_attn"]
    selective = value("recompute_granularity", None) == "selective" and "core_attn" in modules
    if plan.recompute_exchange and not (selective and plan.comm_type == "a2a"):
        raise HelixConfigError(
            "--helix-recompute-exchange was given without what it changes, --recompute-granularity selective "
            f"(of core_attn) with --helix-comm-type a2a, which is {plan.comm_type} here; leave it out"
        )
    _refuse_fp8_shapes(value, plan)


def refuse_graphs_of_training(config: Any, plan: HelixPlan, packed: bool = False) -> None:
    """Refuse training steps that cannot be captured; Megatron's local graphs serve inference too."""
    value = partial(setting, config)
    packed = packed or value("sft") or value("dataloader_inter_document_masking")
    _refuse(_ungraphed(value, plan, packed), plan)


def _refuse(reasons: dict[str, Any], plan: HelixPlan) -> None:
    for feature, used in reasons.items():
        if used:
            raise HelixConfigError(
                f"Helix grid {plan.grid} does not support {feature}: heads are sliced (m > 1). "
                "Turn it off, or choose a grid with m = 1"
            )


def _ungraphed(value: Callable, plan: HelixPlan, packed: bool) -> dict[str, bool]:
    """What stands in the way of CUDA graphs of training steps, by name.

    Layers may be recorded whose forward and backward ask the device for nothing, make nothing of Python's own
    numbers and compute the same when they are replayed (tests/megatron_glue/test_cuda_graphs.py).
    """
    impl, modules = value("cuda_graph_impl", "none"), value("cuda_graph_modules") or []
    names = {getattr(one, "name", one) for one in ([modules] if isinstance(modules, str) else modules)}
    if impl == "none" or (names and not {"attn", "full"} & names):  # of other modules alone
        return {}
    graphs = f"CUDA graphs of training steps (--cuda-graph-impl {impl})"
    return {
        f"{graphs} with megatron-core {compat.version()}, where layers were never recorded; "
        f"{compat.NEWEST} works": not compat.megatron().training,
        f"{graphs} of more than layers; local and transformer_engine are served": impl
        not in ("local", "transformer_engine"),
        f"{graphs} with --helix-comm-type all_reduce, which copies index tables to the device in every pass; "
        "a2a works": plan.comm_type == "all_reduce",
        f"{graphs} with --context-parallel-size > 1, where layers were never recorded": (
            value("context_parallel_size", 1) > 1
        ),
        f"{graphs} with packed sequences, whose lengths change from batch to batch": packed,
        f"{graphs} with --helix-adaptive-grad-scaling, whose hooks Megatron's graphs do not take": (
            plan.adaptive_grad_scaling and plan.layout.per_slice
        ),
    }


def _refuse_fp8_shapes(value: Callable, plan: HelixPlan) -> None:
    """FP8 GEMMs want multiples of 16 (32 with MXFP8, 128 with blocks): say so before the first step."""
    if not (value("fp8") or value("fp4")):
        return
    # The configuration's names, and those of Megatron's arguments.
    flags = ("fp8_param", "fp4_param", "fp8_param_gather", "fp4_param_gather")
    if any(value(flag) for flag in flags):
        raise HelixConfigError(
            f"Helix grid {plan.grid} slices heads (m > 1), which weights kept in FP8 or FP4 "
            "(--fp8-param-gather, --fp4-param-gather) were never run with; leave them in half precision"
        )
    layout = plan.layout
    recipe = value("fp8_recipe", "") if value("fp8") else ""
    recipe = getattr(recipe, "value", recipe)
    multiple = {"mxfp8": 32, "blockwise": 128}.get(recipe, 16)
    why = f"FP8 and FP4 need multiples of {multiple}"
    if recipe == "blockwise":
        why = f"--fp8-recipe blockwise works in blocks of {multiple}, and slices of a part of one never ran"
    for rank in range(plan.grid.dim_parallel_size):  # other head groups hold as much
        parts = {
            "rows of linear_qkv": len(layout.qkv_rows(rank)),
            "columns of linear_proj": len(layout.proj_columns(rank)),
        }
        for name, held in parts.items():
            if held % multiple:
                raise HelixConfigError(
                    f"{why}, but rank {rank} of Helix grid {plan.grid} holds {held} {name} of "
                    f"{layout.shape}; use a smaller tensor-parallel size, another recipe, or no FP8"
                )
