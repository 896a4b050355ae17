"""The derived configuration: slices of heads as heads of their own.

Pure attribute arithmetic on whatever has the names of Megatron's TransformerConfig.
"""

from __future__ import annotations

import copy
from typing import Any

from helix_megatron.partition.config import HelixConfig, HelixPlan


def plan_for(helix: HelixConfig, config: Any, tp_size: int) -> HelixPlan:
    """Settle the Helix choices for a Megatron configuration on `tp_size` ranks."""
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
