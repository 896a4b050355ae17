"""What the arguments of a run mean: its plan, what cannot be beside sliced heads, what all ranks share."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import yaml

from helix_megatron.checkpoint.compatibility import names_default_layers
from helix_megatron.exchange.groups import agree
from helix_megatron.megatron.arguments import refuse_other_models
from helix_megatron.megatron.userbuffers import refuse_userbuffers
from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.derived import slices_for
from helix_megatron.partition.grid import HelixConfigError, legal_grids
from helix_megatron.partition.tensor_sizes import refuse_indivisible

_store: Any = None  # rank 0 serves the rendezvous store as long as this lives


def _kv_heads(args: Namespace) -> int:
    """As TransformerConfig sees them: without --group-query-attention every query head has its own."""
    shared = args.group_query_attention and not args.multi_latent_attention
    return args.num_query_groups if shared else args.num_attention_heads


def slices_from_args(helix: HelixConfig, args: Namespace) -> int:
    """m by arguments that Megatron has not validated; 1 where they do not say enough."""
    if not args.num_attention_heads or not (args.kv_channels or args.hidden_size):
        return 1
    shape = Namespace(**{**vars(args), "num_query_groups": _kv_heads(args)})
    return slices_for(helix, shape, args.tensor_model_parallel_size)


def plan_from_args(helix: HelixConfig, args: Namespace) -> HelixPlan:
    """Settled choices for Megatron's validated arguments.

    Raises:
        HelixConfigError: the settings cannot work; the message names them and the way out.
    """
    from helix_megatron.host.mode import host_mode_enabled
    from helix_megatron.megatron.masks import te_is_unfused
    from helix_megatron.megatron.refusals import refuse_graphs_of_training, refuse_unsupported

    plan = helix.resolve(
        args.num_attention_heads,
        _kv_heads(args),
        args.kv_channels,
        args.tensor_model_parallel_size,
        args.rotary_interleaved,
        getattr(args, "attention_output_gate", False),
    )
    refuse_other_models(args, plan.grid.dim_parallel_size)
    own_sizes = args.heterogeneous_layers_config_encoded_json or not names_default_layers(args.spec)
    if not own_sizes:
        even = plan.layout.per_slice
        refuse_indivisible(args, lambda tp: bool(legal_grids(plan.layout.shape, tp, even)))
    if plan.is_megatron:
        return plan
    refuse_unsupported(args, plan)
    if getattr(args, "train_iters", None) or getattr(args, "train_samples", None):
        refuse_graphs_of_training(args, plan)
    saves = bool(args.save or args.load or args.pretrained_checkpoint)
    by_level = args.helix_hierarchical_allreduce
    hybrid = args.hybrid_layer_pattern is not None  # whose layers are Transformer Engine's
    te_layers = hybrid or args.transformer_impl == "transformer_engine"
    unfused = args.attention_backend.name == "unfused" or te_is_unfused(args.params_dtype)
    unsafe = {
        "--reset-attention-mask in half precision with --helix-comm-type all_reduce and --transformer-impl "
        "transformer_engine, whose flash and fused kernels ignore that mask where its unfused one obeys it "
        "(say --attention-backend unfused, or use a2a)": (
            args.reset_attention_mask
            and plan.comm_type == "all_reduce"
            and te_layers
            and not unfused
        ),
        "--helix-hierarchical-allreduce with FP8 or FP4 (--fp8-format, --fp4-format), whose tensors "
        "Transformer Engine's layers gather in parts of their own": by_level
        and bool(args.fp8 or args.fp4),
        "--helix-hierarchical-allreduce with --use-transformer-engine-op-fuser or --symmetric-ar-type, whose "
        "layers reduce in other ways": by_level
        and any(getattr(args, f, None) for f in ("use_transformer_engine_op_fuser", "symmetric_ar_type")),
        "--helix-hierarchical-allreduce with --tp-comm-overlap, which overlaps the flat collectives": (
            by_level and args.tp_comm_overlap
        ),
        f"--cuda-graph-impl {args.cuda_graph_impl} in host mode, which has no GPU to record on": (
            host_mode_enabled() and args.cuda_graph_impl != "none"
        ),
        f"--ckpt-format {args.ckpt_format} (slices mean nothing to another layout; use torch_dist)": (
            saves and args.ckpt_format != "torch_dist"
        ),
        f"--ckpt-convert-format {args.ckpt_convert_format} (slices mean nothing to another layout; convert "
        "with --attention-impl megatron)": args.ckpt_convert_format not in (None, "torch_dist"),
        "--non-persistent-ckpt-type local (use global)": args.non_persistent_ckpt_type == "local",
        f"--optimizer {args.optimizer}, which treats the QKV weight as whole heads (use adam)": (
            args.optimizer not in ("adam", "sgd", "lion")
        ),
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
    }
    for what, used in unsafe.items():
        if used:
            raise HelixConfigError(f"Helix grid {plan.grid} slices heads (m > 1) and does not support {what}")
    if args.tp_comm_overlap:
        _refuse_overlap(args)
    return plan


def _refuse_overlap(args: Namespace) -> None:
    """Shapes of `--tp-comm-overlap`, as Megatron makes its buffers."""
    layers = {}
    if args.tp_comm_overlap_cfg is not None:
        with open(args.tp_comm_overlap_cfg, encoding="utf-8") as file:
            layers = yaml.safe_load(file) or {}
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    refuse_userbuffers(tokens, args.hidden_size, args.tensor_model_parallel_size, layers)


def agree_with_other_ranks(args: Namespace, plan: HelixPlan | None) -> None:
    """Compare the run's settings with the other ranks', through the rendezvous store.

    Raises:
        HelixConfigError: they differ.
    """
    global _store
    if args.world_size <= 1 or "MASTER_ADDR" not in os.environ:
        return
    from torch.distributed import rendezvous

    names = (
        "attention_impl helix_softmax tensor_model_parallel_size pipeline_model_parallel_size "
        "context_parallel_size num_layers hybrid_layer_pattern hidden_size num_attention_heads "
        "num_query_groups kv_channels seq_length micro_batch_size global_batch_size world_size"
    ).split()
    settings = {name: getattr(args, name, None) for name in names}
    settings["helix hierarchical all-reduce"] = args.helix_hierarchical_allreduce
    if plan is not None:
        settings["helix grid"] = str(plan.grid)
        settings["helix slices"] = ", ".join(map(str, plan.layout.all_slice_dims))
        settings["helix comm type"] = plan.comm_type
        settings["helix query placement"] = plan.layout.query_placement
        settings["helix KV cache"] = f"{plan.kv_cache}, interleave size {plan.kv_interleave_size}"
        settings["helix adaptive gradient scaling"] = plan.adaptive_grad_scaling
        settings["helix overlap"] = f"chunks {plan.overlap_chunks}, exchange {plan.overlap_exchange}"
        settings["helix exchange again"] = plan.recompute_exchange
    _store, rank, world_size = next(iter(rendezvous("env://")))
    agree(settings, _store, rank, world_size)
