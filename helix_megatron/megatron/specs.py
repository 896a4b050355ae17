"""Megatron layer specs with Helix attention: by name for `--spec`, or for code that builds models itself.

    --spec helix_megatron.megatron.specs gpt_layer_spec       Megatron's own layers, Helix's where it is on
    provider.transformer_layer_spec = gpt_layer_spec          the same in Megatron-Bridge, before with_helix
    with_helix_attention(spec, HelixConfig(4, 2))             a copy of any layer, block or hybrid stack spec

Training through Megatron's arguments needs none of this: integrate.py swaps the class in the specs that
Megatron uses by default. `--spec` is for scripts that must be given one.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec

from helix_megatron import compat
from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.megatron import integrate
from helix_megatron.megatron.self_attention import HelixParallelSelfAttention
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError

if compat.megatron().hybrid:  # Megatron looks `--spec` up in a module's own names, and takes no function here
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as hybrid_stack_spec

# Settings of a model whose layers are others than those of get_gpt_decoder_block_spec.
_OTHER_LAYERS = {
    "heterogeneous_block_specs": "--heterogeneous-layers-config-path",
    "restore_modelopt_state": "a ModelOpt state",
    "use_transformer_engine_op_fuser": "--use-transformer-engine-op-fuser",
    "use_transformer_engine_full_layer_spec": "Transformer Engine's full layer spec",
    "experimental_attention_variant": "--experimental-attention-variant",
}


def gpt_layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """The layers that Megatron builds for a GPT by itself, dense or with experts; Helix's where it is on.

    Helix is on after `integrate.enable`, `--attention-impl helix` or `with_helix(provider)`.

    Args:
        config: a TransformerConfig, a Megatron-Bridge provider, or megatron.training's GPTModelConfig.
        vp_stage: the virtual pipeline stage.

    Raises:
        HelixConfigError: a model whose layers are of another kind.
    """
    for name, what in _OTHER_LAYERS.items():
        if getattr(config, name, None):
            raise HelixConfigError(
                f"gpt_layer_spec makes Megatron's ordinary GPT layers, not those of {what}; leave it out"
            )
    transformer = getattr(config, "transformer", config)
    return get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=transformer.transformer_impl == "transformer_engine",
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )


def with_helix_attention(spec: Any, helix: HelixConfig, helix_groups: HelixGroups | None = None) -> Any:
    """A copy of a spec whose self-attention is Helix's.

    Args:
        spec: a layer spec with `submodules.self_attention`, local or Transformer Engine; a block of those
            (TransformerBlockSubmodules); or a hybrid stack, of which the attention layers become Helix's.
            Layers of linear attention (gated delta nets) stay as they are.
        helix: settings.
        helix_groups: process groups; the registered ones by default.

    Raises:
        HelixConfigError: the spec's self-attention is not Megatron's SelfAttention (MLA, say), nor m = 1.
    """
    if hasattr(spec, "layer_specs"):
        layers = [with_helix_attention(layer, helix, helix_groups) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    if hasattr(spec.submodules, "attention_layer"):
        layer = with_helix_attention(spec.submodules.attention_layer, helix, helix_groups)
        return _with_submodules(spec, attention_layer=layer)
    attention = getattr(spec.submodules, "self_attention", None)
    module = getattr(attention, "module", attention)
    if str(getattr(module, "__module__", None)).startswith("megatron.core.ssm."):
        return spec
    ours = isinstance(module, type) and issubclass(module, HelixParallelSelfAttention)
    if module is not SelfAttention and not ours:  # what a subclass of it adds would be lost
        if helix.dim_parallel_size == 1:
            return spec
        raise HelixConfigError(f"Helix replaces Megatron's SelfAttention; this layer spec has {module!r}")
    integrate.teach_tools()
    params: dict[str, Any] = {**attention.params, "helix": helix, "helix_groups": helix_groups}
    helix_attention = ModuleSpec(
        module=HelixParallelSelfAttention, params=params, submodules=attention.submodules
    )
    return _with_submodules(spec, self_attention=helix_attention)


def _with_submodules(spec: ModuleSpec, **changes: Any) -> ModuleSpec:
    result = copy.copy(spec)
    result.submodules = dataclasses.replace(spec.submodules, **changes)
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
