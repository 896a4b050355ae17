"""Helix's command-line flags, in Megatron's own parser, and what they must satisfy."""

from __future__ import annotations

import argparse

from helix_megatron.checkpoint.compatibility import names_default_layers
from helix_megatron.partition.config import (
    COMM_TYPES,
    CORE_ATTENTIONS,
    KV_CACHES,
    QUERY_PLACEMENTS,
    SOFTMAX_KINDS,
    HelixConfig,
    parse_weights,
)
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.tensor_sizes import LINEAR_ATTENTION


def add_helix_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the Helix group; Megatron's own flags are reused unchanged."""
    group = parser.add_argument_group(title="helix")
    group.add_argument(
        "--attention-impl",
        choices=["megatron", "helix"],
        default="megatron",
        help="Whose tensor-parallel self-attention to use. With helix and no other flag the grid is chosen.",
    )
    group.add_argument(
        "--helix-head-parallel-size",
        type=int,
        default=None,
        metavar="N",
        help="Head groups (first level). Must divide the query groups; N*M is the tensor-parallel size.",
    )
    group.add_argument(
        "--helix-dim-parallel-size",
        type=int,
        default=None,
        metavar="M",
        help="Slices of each head's dimension (second level). M=1 is Megatron's own attention.",
    )
    group.add_argument(
        "--helix-slice-weights",
        nargs="+",
        default=None,
        metavar="W,W,...",
        help="M positive numbers, sizes of the slices in proportion, for devices of unequal speed: 2,1,1. "
        "Default: as equal as whole rotary pairs allow.",
    )
    group.add_argument(
        "--helix-softmax",
        choices=SOFTMAX_KINDS,
        default="exact",
        help="exact: ordinary attention. per-slice: softmax inside each slice, another model "
        "(H*M heads of dimension d/M).",
    )
    group.add_argument(
        "--helix-comm-type",
        choices=COMM_TYPES,
        default="auto",
        help="How slices meet: a2a gathers K and V and exchanges queries (auto); all_reduce sums partial "
        "scores and needs memory quadratic in the sequence.",
    )
    group.add_argument(
        "--helix-query-placement",
        choices=QUERY_PLACEMENTS,
        default="auto",
        help="dims: query heads are sliced. heads: every rank holds whole query heads (M must divide the "
        "query heads of a group). auto: heads where possible.",
    )
    group.add_argument(
        "--helix-core-attention",
        choices=CORE_ATTENTIONS,
        default="auto",
        help="Attention on whole heads. spec: the layer spec's core. auto: likewise, but PyTorch's fused "
        "scaled_dot_product_attention in place of Megatron's unfused local core.",
    )
    group.add_argument(
        "--helix-kv-cache",
        choices=KV_CACHES,
        default="auto",
        help="Inference: sequence caches whole heads of 1/M of the positions on each rank; dim caches slices "
        "of all positions and sums scores over the whole context in every step. auto: sequence; in host "
        "mode dim where --helix-context-length says that contexts are short.",
    )
    group.add_argument(
        "--helix-context-length",
        type=int,
        metavar="TOKENS",
        help="Inference: tokens of the longest request, prompt and answer, for --helix-kv-cache auto. helix "
        "generate and helix serve know it.",
    )
    group.add_argument(
        "--helix-kv-interleave-size",
        type=int,
        default=32,
        metavar="TOKENS",
        help="Consecutive positions that one rank keeps in a sequence cache before the next rank's turn.",
    )
    group.add_argument(
        "--helix-overlap-chunks",
        type=int,
        default=1,
        metavar="PARTS",
        help="Inference with a sequence cache: parts of a step's tokens; the exchange of one part runs while "
        "the next part attends. 1 does not overlap.",
    )
    group.add_argument(
        "--helix-no-overlap-exchange",
        action="store_true",
        help="Training with whole query heads: wait for K and V before the query is normed and rotated, and "
        "for their gradients before the query's. The numbers are the same.",
    )
    group.add_argument(
        "--helix-recompute-exchange",
        action="store_true",
        help="With --recompute-granularity selective: keep slices and exchange them again in the backward, "
        "in place of keeping the whole heads that attention is given. Less memory, more to move.",
    )
    group.add_argument(
        "--helix-hierarchical-allreduce",
        action="store_true",
        help="Reduce over the tensor-parallel group level by level (dim group, head groups, dim group), for "
        "grids that span nodes. The overlap with weight gradients is lost.",
    )
    group.add_argument(
        "--helix-adaptive-grad-scaling",
        action="store_true",
        help="Per-slice softmax in fp16: a power of two scales the gradient while it passes the attention "
        "core, so that small numbers are not lost there. Changes nothing in exact mode, bf16 or fp32.",
    )
    group.add_argument(
        "--helix-no-verify-checkpoint",
        action="store_true",
        help="Load checkpoints without comparing the checksums of their shards.",
    )
    group.add_argument(
        "--helix-host-mode",
        action="store_true",
        help="Run Megatron on host memory with gloo, on a machine without a GPU. Refused where a GPU is.",
    )
    return parser


def helix_config_from_args(args: argparse.Namespace) -> HelixConfig | None:
    """The settings in Megatron's parsed arguments; None with `--attention-impl megatron`.

    Raises:
        HelixConfigError: Helix flags without Helix, or values that cannot work.
    """
    if args.attention_impl == "megatron":
        given = {
            "--helix-head-parallel-size": args.helix_head_parallel_size is not None,
            "--helix-dim-parallel-size": args.helix_dim_parallel_size is not None,
            "--helix-slice-weights": args.helix_slice_weights is not None,
            "--helix-softmax": args.helix_softmax != "exact",
            "--helix-comm-type": args.helix_comm_type != "auto",
            "--helix-query-placement": args.helix_query_placement != "auto",
            "--helix-core-attention": args.helix_core_attention != "auto",
            "--helix-kv-cache": args.helix_kv_cache != "auto",
            "--helix-context-length": args.helix_context_length is not None,
            "--helix-kv-interleave-size": args.helix_kv_interleave_size != 32,
            "--helix-overlap-chunks": args.helix_overlap_chunks != 1,
            "--helix-no-overlap-exchange": args.helix_no_overlap_exchange,
            "--helix-recompute-exchange": args.helix_recompute_exchange,
            "--helix-hierarchical-allreduce": args.helix_hierarchical_allreduce,
            "--helix-adaptive-grad-scaling": args.helix_adaptive_grad_scaling,
            "--helix-no-verify-checkpoint": args.helix_no_verify_checkpoint,
        }
        flags = [flag for flag, was_given in given.items() if was_given]
        if flags:
            raise HelixConfigError(
                f"{', '.join(flags)} was given with --attention-impl megatron, which ignores it; "
                "add --attention-impl helix or leave it out"
            )
        return None
    has_rope = args.position_embedding_type in ("rope", "mrope", "yarn")
    weights = args.helix_slice_weights
    return HelixConfig(
        head_parallel_size=args.helix_head_parallel_size,
        dim_parallel_size=args.helix_dim_parallel_size,
        slice_weights=parse_weights(",".join(weights)) if weights is not None else None,
        softmax=args.helix_softmax,
        comm_type=args.helix_comm_type,
        query_placement=args.helix_query_placement,
        core_attention=args.helix_core_attention,
        kv_cache=args.helix_kv_cache,
        context_length=args.helix_context_length,
        host_mode=args.helix_host_mode,
        kv_interleave_size=args.helix_kv_interleave_size,
        overlap_chunks=args.helix_overlap_chunks,
        overlap_exchange=not args.helix_no_overlap_exchange,
        recompute_exchange=args.helix_recompute_exchange,
        hierarchical_allreduce=args.helix_hierarchical_allreduce,
        adaptive_grad_scaling=args.helix_adaptive_grad_scaling,
        rotary_percent=args.rotary_percent if has_rope else 0.0,
    )


def refuse_other_models(args: argparse.Namespace, slices: int) -> None:
    """Refuse models whose heads Helix cannot slice, by their flags. With m = 1 they are Megatron's own.

    Args:
        args: Megatron's arguments, parsed.
        slices: m.
    """
    if slices == 1:
        return
    whole_model = {
        "--multi-latent-attention": args.multi_latent_attention,
        "--experimental-attention-variant": (
            args.experimental_attention_variant not in (None, *LINEAR_ATTENTION)
        ),
        "--spec": not names_default_layers(args.spec),
        "--hybrid-layer-pattern with + or D layers (multi-latent attention)": (
            set("+D") & set(args.hybrid_layer_pattern or args.hybrid_override_pattern or "")
        ),
        "--inference-shards with roles (prefill and decode apart)": (
            "role=" in (getattr(args, "inference_shards", None) or "")
        ),
        "--heterogeneous-layers-config-path": args.heterogeneous_layers_config_path,
        "--heterogeneous-layers-config-encoded-json": args.heterogeneous_layers_config_encoded_json,
    }
    for flag, used in whole_model.items():
        if used:
            way_out = (
                "give helix_megatron.megatron.specs gpt_layer_spec (or hybrid_stack_spec), build your own "
                "layers in a script that wraps them with helix_megatron.with_helix_attention"
                if flag == "--spec"
                else "use --attention-impl megatron"
            )
            raise HelixConfigError(
                f"--attention-impl helix does not support {flag} with sliced heads (here m = {slices}); "
                f"{way_out}, or a grid with m = 1"
            )
    if args.position_embedding_type == "yarn" and args.helix_softmax == "per-slice":
        raise HelixConfigError(
            "per-slice softmax with --position-embedding-type yarn: YaRN's frequencies depend on the head "
            "dimension and cannot be those of a slice; use rope"
        )
