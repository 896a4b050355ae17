"""The derived configuration: slices of heads as heads of their own.

Pure attribute arithmetic on whatever has the names of Megatron's TransformerConfig.
"""

from __future__ import annotations

import copy
from typing import Any

from helix_megatron.partition.config import HelixConfig, HelixPlan
from helix_megatron.partition.grid import AttentionShape, HelixConfigError, check_grid


def slices_for(helix: HelixConfig, config: Any, tp_size: int) -> int:
    """m for a Megatron configuration on `tp_size` ranks, of any attention, whatever its positions.

    On one rank nothing is sliced: a process may hold other models (a teacher, a draft, an encoder) beside
    the one whose grid was asked for.
    """
    heads = config.num_attention_heads
    if tp_size == 1 or not heads:
        return 1
    # Multi-latent attention has keys and values for every head.
    groups = heads if getattr(config, "multi_latent_attention", False) else config.num_query_groups or heads
    channels = config.kv_channels or config.hidden_size // heads
    sizes = helix.head_parallel_size, helix.dim_parallel_size
    even = helix.softmax == "per-slice"
    try:
        grid = check_grid(AttentionShape(heads, groups, channels), tp_size, *sizes, even=even)
    except HelixConfigError:  # nor with RoPE, whose numbers belong into the message
        rotary = int(channels * helix.rotary_percent)
        grid = check_grid(AttentionShape(heads, groups, channels, rotary), tp_size, *sizes, even=even)
    return grid.dim_parallel_size


def plan_for(helix: HelixConfig, config: Any, tp_size: int) -> HelixPlan:
    """Settle the Helix choices for a Megatron configuration on `tp_size` ranks.

    Where nothing is sliced, what was asked of slices is of no concern.
    """
    if slices_for(helix, config, tp_size) == 1:
        helix = HelixConfig(tp_size, 1, softmax=helix.softmax, core_attention=helix.core_attention)
    return helix.resolve(
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
        tp_size,
        config.rotary_interleaved,
        bool(getattr(config, "attention_output_gate", False)),
    )


def derived_config(config: Any, plan: HelixPlan, channels: int) -> Any:
    """The configuration whose heads are this model's slices: H*m heads, G*m KV heads of `channels`, d/m.

    Where slices are uneven every rank has its own, as if all were as long as its slice: Megatron's modules
    divide what they are told by T, and only their local sizes are real.
    """
    m = plan.grid.dim_parallel_size
    derived = copy.copy(config)
    derived.num_attention_heads = config.num_attention_heads * m
    derived.num_query_groups = config.num_query_groups * m
    derived.kv_channels = channels
    return derived
