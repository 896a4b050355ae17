"""Megatron layer specs with Helix attention, for code that builds models itself.

Training through Megatron's arguments needs none of this: integrate.py swaps the class that Megatron's
spec functions use.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.megatron import integrate
from helix_megatron.megatron.self_attention import HelixParallelSelfAttention
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError


def with_helix_attention(
    spec: ModuleSpec, helix: HelixConfig, helix_groups: HelixGroups | None = None
) -> ModuleSpec:
    """A copy of a transformer layer spec whose self-attention is Helix's.

    Args:
        spec: a layer spec with `submodules.self_attention`, local or Transformer Engine.
        helix: settings.
        helix_groups: process groups; the registered ones by default.

    Raises:
        HelixConfigError: the spec's self-attention is not Megatron's SelfAttention (MLA, say), nor m = 1.
    """
    attention = getattr(spec.submodules, "self_attention", None)
    module = getattr(attention, "module", attention)
    if not (isinstance(module, type) and issubclass(module, SelfAttention)):
        if helix.dim_parallel_size == 1:
            return spec
        raise HelixConfigError(f"Helix replaces Megatron's SelfAttention; this layer spec has {module!r}")
    integrate.teach_tools()
    params: dict[str, Any] = {**attention.params, "helix": helix, "helix_groups": helix_groups}
    helix_attention = ModuleSpec(
        module=HelixParallelSelfAttention, params=params, submodules=attention.submodules
    )
    result = copy.copy(spec)
    result.submodules = dataclasses.replace(spec.submodules, self_attention=helix_attention)
    return result


def get_helix_layer_local_spec(
    helix: HelixConfig, helix_groups: HelixGroups | None = None, **kwargs: Any
) -> ModuleSpec:
    """Megatron's `get_gpt_layer_local_spec(**kwargs)` with Helix attention."""
    return with_helix_attention(get_gpt_layer_local_spec(**kwargs), helix, helix_groups)


def get_helix_layer_with_transformer_engine_spec(
    helix: HelixConfig, helix_groups: HelixGroups | None = None, **kwargs: Any
) -> ModuleSpec:
    """Megatron's `get_gpt_layer_with_transformer_engine_spec(**kwargs)` with Helix attention."""
    return with_helix_attention(get_gpt_layer_with_transformer_engine_spec(**kwargs), helix, helix_groups)
