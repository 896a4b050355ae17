"""`HelixParallelSelfAttention`: Megatron's SelfAttention on slices of heads.

Note [What is Megatron's and what is ours]
    A derived TransformerConfig with H*m heads, G*m KV heads and d/m channels (a rank's own d_s where slices
    are uneven) makes Megatron's own
    SelfAttention project, split, rotate and cache SLICES: its modules (ColumnParallelLinear,
    TELayerNormColumnParallelLinear, RowParallelLinear ...) are untouched, so fp8, sequence parallelism,
    wgrad fusion and communication overlap keep working. We change four things:
      1. which rows and columns of the standard weights a rank initialises (layout.py);
      2. the RoPE table is indexed by the slice's dimensions;
      3. QK-norm sums its squares over the dim group (qk_norm.py);
      4. the core attention exchanges slices (core_attention.py); per-slice softmax needs none, there the
         derived model IS the model.
    Inference with a cache of positions takes a way of its own from the projections on (inference/).
    With m = 1 the class is SelfAttention, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import deprecate_inference_params
from torch import Tensor

from helix_megatron import compat
from helix_megatron.checkpoint.layout import standard_layout
from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.inference import contexts
from helix_megatron.megatron.core_attention import HelixCoreAttention
from helix_megatron.megatron.gradient_range import keep_in_range
from helix_megatron.megatron.process_groups import get_helix_groups
from helix_megatron.megatron.qk_norm import slice_norm
from helix_megatron.megatron.sliced_linear import Slices, mark
from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.derived import derived_config, plan_for
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import HelixLayout


class HelixParallelSelfAttention(SelfAttention):
    """Self-attention split over n head groups and m slices of the head dimension.

    Args:
        config: the model's TransformerConfig, with its true H, G and d.
        submodules: those of the layer spec, unchanged.
        helix: the user's settings.
        helix_groups: process groups of the grid; the registered ones by default.
        (others): as in Megatron's SelfAttention.

    Raises:
        HelixConfigError: the grid does not fit, or the model uses a feature that cannot work when heads
            are sliced; the message names it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        *,
        helix: HelixConfig,
        helix_groups: HelixGroups | None = None,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        plan = plan_for(helix, config, pg_collection.tp.size())
        layer = {
            "layer_number": layer_number,
            "attn_mask_type": attn_mask_type,
            "cp_comm_type": cp_comm_type,
            "pg_collection": pg_collection,
        }
        newer = {"pp_layer_offset": pp_layer_offset, "name": name}
        layer |= {argument: newer[argument] for argument in compat.megatron().layer_arguments}
        if plan.is_megatron:
            super().__init__(config, submodules, **layer)
            self.helix_plan = plan
            return
        refuse_unsupported(config, plan)
        groups = helix_groups if helix_groups is not None else get_helix_groups()
        if groups.grid != plan.grid:
            raise HelixConfigError(
                f"the layer needs grid {plan.grid}, but the process groups are those of {groups.grid}"
            )
        super().__init__(
            derived_config(config, plan, plan.layout.slice_dims(groups.dim_rank)),
            _slice_submodules(submodules, config, plan, groups),
            **layer,
        )
        self.helix_plan, self.helix_groups = plan, groups
        if plan.adaptive_grad_scaling:
            self._scale_gradients()
        layout, dim_rank = plan.layout, groups.dim_rank
        self._whole_query_heads = layout.query_placement == "heads"
        rotary_dims = torch.from_numpy(layout.rotary_dims(dim_rank))
        self.register_buffer("_rotary_dims", rotary_dims.to(torch.cuda.current_device()), persistent=False)

    def _scale_gradients(self) -> None:
        config = self.config
        layer_scaling = self.layer_number if config.apply_query_key_layer_scaling else 1
        scale = config.softmax_scale or config.kv_channels**-0.5
        keep_in_range(self.core_attention, scale, config.attention_dropout, layer_scaling)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's, [s, b, h] -> [s, b, h]; RoPE tables are cut to this rank's slice on the way."""
        if not self.helix_plan.is_megatron:
            inference_context = deprecate_inference_params(
                inference_context, kwargs.pop("inference_params", None)
            )
            if inference_context is not None and inference_context.is_dynamic_batching():
                contexts.check_dynamic(inference_context, self.helix_plan)
            if rotary_pos_emb is not None:
                q_emb, k_emb = (
                    rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
                )
                k_slice = self._slice_rope(k_emb)
                if self._whole_query_heads:
                    rotary_pos_emb = (q_emb, k_slice)
                else:
                    rotary_pos_emb = (k_slice if q_emb is k_emb else self._slice_rope(q_emb), k_slice)
            cache = self.helix_plan.kv_cache
            if inference_context is not None and (
                cache == "sequence" or (cache == "dim" and inference_context.is_dynamic_batching())
            ):
                return contexts.forward_with_shards(
                    self, hidden_states, attention_mask, inference_context, rotary_pos_emb, *args, **kwargs
                )
            gated = _setting(self.config, "attention_output_gate")
            if inference_context is not None and cache == "dim" and gated:
                raise NotImplementedError(
                    f"Helix grid {self.helix_plan.grid}: inference with an output gate "
                    "(--attention-output-gate) was never checked with sliced heads; use a grid with m = 1"
                )
        return super().forward(
            hidden_states,
            attention_mask,
            key_value_states,
            inference_context,
            rotary_pos_emb,
            *args,
            **kwargs,
        )

    def _slice_rope(self, emb: Tensor | None) -> Tensor | None:
        """Columns of a RoPE table [s, 1, 1, rotary_dim] that belong to this rank's slice.

        Megatron hands the same table to every layer and step, and it is as long as the longest sequence: the
        slice is made once and kept with the table (several models may share one).
        """
        if emb is None:
            return None
        expected = self.helix_plan.layout.shape.rotary_dim
        if emb.shape[-1] != expected:
            raise HelixConfigError(
                f"RoPE rotates {emb.shape[-1]} dimensions of each head, but Helix was configured for "
                f"{expected}; set HelixConfig.rotary_percent to the model's rotary_percent (0 without RoPE)"
            )
        if not hasattr(emb, "helix_slices"):
            emb.helix_slices = {}
        key = (self.helix_plan.layout, self.helix_groups.dim_rank, torch.is_inference_mode_enabled())
        if key not in emb.helix_slices:
            emb.helix_slices[key] = emb.index_select(-1, self._rotary_dims)
        return emb.helix_slices[key]

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """Query, key and value of this rank.

        Returns:
            query [s, b, hq, d_s] ("dims") or [s, b, hq/m, d] ("heads"); key and value [s, b, hk, d_s]; with
            `output_gate` the gate too, shaped as the query.
        """
        if self.helix_plan.is_megatron or not self._whole_query_heads:
            return super().get_query_key_value_tensors(
                hidden_states, key_value_states, output_gate, split_qkv
            )
        layout = self.helix_plan.layout
        mixed_qkv, _ = self.linear_qkv(hidden_states)
        heads = layout.query_heads // layout.grid.dim_parallel_size
        kv = layout.kv_heads * layout.slice_dims(self.helix_groups.dim_rank)
        queries = heads * layout.shape.kv_channels
        gate = None
        if output_gate:
            query, gate, key, value = mixed_qkv.split([queries, queries, kv, kv], dim=-1)
        else:
            query, key, value = mixed_qkv.split([queries, kv, kv], dim=-1)
        query = query.unflatten(-1, (heads, -1))
        key, value = key.unflatten(-1, (layout.kv_heads, -1)), value.unflatten(-1, (layout.kv_heads, -1))
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return (query, key, value) if gate is None else (query, key, value, gate.unflatten(-1, (heads, -1)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's standard layout, whatever the grid; see checkpoint/layout.py.

        Per-slice softmax is another model, that of `derived_config`: its standard layout is that model's.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.helix_plan.is_megatron or self.helix_plan.layout.per_slice:
            return state
        layout, rank = self.helix_plan.layout, self.pg_collection.tp.rank()
        rows, columns = layout.qkv_rows(rank), layout.proj_columns(rank)
        all_rows, all_columns = len(layout.qkv_permutation()), len(layout.proj_permutation())
        for name, local, whole, dim in (
            ("linear_qkv.weight", rows, all_rows, 0),
            ("linear_qkv.bias", rows, all_rows, 0),
            ("linear_proj.weight", columns, all_columns, 1),
        ):
            key = prefix + name
            if key in state:
                state[key] = standard_layout(state[key], local, whole, dim, len(sharded_offsets))
        return state


def _setting(config: Any, name: str, default: Any = False) -> Any:
    found = getattr(config, name, default)
    return default if found is None else found


def refuse_unsupported(config: Any, plan: HelixPlan) -> None:
    """Refuse, by name, what would be computed wrong with sliced heads.

    Args:
        config: a TransformerConfig, or Megatron's parsed arguments, which use the same names.
    """
    per_slice = plan.layout.per_slice
    value = partial(_setting, config)
    softmax_type = value("softmax_type", "vanilla")
    graphs = value("cuda_graph_impl", "none")
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
        f"CUDA graphs (--cuda-graph-impl {graphs})": graphs != "none",
        "fused QKV RoPE (--fused-single-qkv-rope)": value("fused_single_qkv_rope"),
        "flash decode (--flash-decode)": value("flash_decode"),
        "test mode (--test-mode)": value("test_mode"),
        "an experimental attention variant (--experimental-attention-variant)": value(
            "experimental_attention_variant"
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
    for feature, used in reasons.items():
        if used:
            raise HelixConfigError(
                f"Helix grid {plan.grid} does not support {feature}: heads are sliced (m > 1). "
                "Turn it off, or choose a grid with m = 1"
            )
    _refuse_fp8_shapes(value, plan)


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


def _slice_submodules(
    submodules: SelfAttentionSubmodules, config: TransformerConfig, plan: HelixPlan, groups: HelixGroups
) -> SelfAttentionSubmodules:
    """The spec's submodules, built for slices instead of heads."""
    layout, tp = plan.layout, plan.grid.size
    rank = groups.head_rank * plan.grid.dim_parallel_size + groups.dim_rank
    rows, columns = Slices(layout, rank, 0, config), Slices(layout, rank, 1, config)
    changes: dict[str, Any] = {
        "linear_qkv": _sliced(submodules.linear_qkv, rows, tp),
        "linear_proj": _sliced(submodules.linear_proj, columns, tp),
    }
    if not layout.per_slice:

        def core_attention(*, config: TransformerConfig, **kwargs: Any) -> HelixCoreAttention:
            del config  # the derived one: whole heads need the model's own
            return HelixCoreAttention(submodules.core_attention, model_config, plan, groups, **kwargs)

        model_config = config
        changes["core_attention"] = core_attention
        norms = _norm_builders(submodules, config)
        for name, builder in norms.items():
            whole = name == "q_layernorm" and layout.query_placement == "heads"
            changes[name] = partial(_build_qk_norm, builder, layout, None if whole else groups)
    changes = {name: compat.as_class(builder) for name, builder in changes.items()}
    return dataclasses.replace(submodules, **changes)


def _norm_builders(submodules: SelfAttentionSubmodules, config: TransformerConfig) -> dict[str, Any]:
    """Builders of the QK norms that Megatron's SelfAttention would use; empty without QK-norm."""
    if not (config.qk_layernorm or config.qk_l2_norm):
        return {}
    if config.qk_l2_norm:
        from megatron.core.transformer.torch_norm import L2Norm as default
    else:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        default = None
        if HAVE_TE:
            from megatron.core.extensions.transformer_engine import TENorm as default
    builders = {name: getattr(submodules, name) or default for name in ("q_layernorm", "k_layernorm")}
    empty = [name for name, builder in builders.items() if builder is IdentityOp]
    if empty:
        flag = "--qk-l2-norm" if config.qk_l2_norm else "--qk-layernorm"
        raise HelixConfigError(
            f"{flag} was given, but the layer spec has no norm in {' and '.join(empty)} (Megatron's training "
            f"loop puts no L2 norm into its local spec), so that Megatron would compute none; use "
            f"--transformer-impl transformer_engine or another spec, or leave {flag} out"
        )
    missing = [name for name, builder in builders.items() if builder is None]
    if missing:
        raise HelixConfigError(
            f"qk_layernorm needs Transformer Engine, or {' and '.join(missing)} set in the layer spec"
        )
    return builders


def _build_qk_norm(
    builder: Any,
    layout: HelixLayout,
    groups: HelixGroups | None,
    *,
    hidden_size: int,
    config: Any,
    eps: float,
) -> torch.nn.Module:
    """A QK norm over whole heads (groups None) or over slices of them."""
    del hidden_size  # of a slice; the norm is over the whole head
    norm = builder(hidden_size=layout.shape.kv_channels, config=config, eps=eps)
    if groups is None:
        return norm
    dims = layout.key_dims(groups.dim_rank)
    return slice_norm(norm, config, dims, layout.shape.kv_channels, groups.dim_group)


def _sliced(builder: Callable, slices: Slices, tp: int) -> Callable:
    """Wrap a linear layer's builder: it is marked, and a rank initialises ITS rows of the master weight.

    Megatron divides a layer's size by T, so it is told T times what this rank holds (the whole layer, where
    slices are even). With `--use-cpu-initialization` it draws the whole master weight on every rank and keeps
    the rank's contiguous chunk. Here the true master is drawn, and that chunk is made the rows (dim 0) or
    columns (dim 1) of this rank's slices: the model is the same at every grid. A local draw (GPU
    initialisation) is left alone, its entries are independent.
    """
    held, dim, rank = len(slices.own), slices.dim, slices.rank

    def build(*args: Any, init_method: Callable[[Tensor], Any], **kwargs: Any) -> torch.nn.Module:
        def init(weight: Tensor) -> Any:
            if weight.shape[dim] != held * tp:
                return init_method(weight)
            shape = list(weight.shape)
            shape[dim] = len(slices.permutation)
            master = weight.new_empty(shape)
            result = init_method(master)
            with torch.no_grad():
                index = torch.from_numpy(slices.own).to(weight.device)
                weight.narrow(dim, rank * held, held).copy_(master.index_select(dim, index))
            return result

        sizes = list(args[:2])  # of the input and of the output
        sizes[1 - dim] = held * tp
        return mark(builder(*sizes, *args[2:], init_method=init, **kwargs), slices)

    return build
