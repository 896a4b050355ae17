"""Megatron's submodules of an attention layer, built for slices of heads in place of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from helix_megatron import compat
from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.megatron.core_attention import HelixCoreAttention
from helix_megatron.megatron.qk_norm import slice_norm
from helix_megatron.megatron.sliced_linear import Slices, mark
from helix_megatron.partition.config import HelixPlan
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import HelixLayout


def slice_submodules(
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
