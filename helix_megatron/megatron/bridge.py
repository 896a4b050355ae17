"""Helix for a Megatron-Bridge user: one line between the provider and the model.

    bridge = AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 16
    with_helix(provider)                                   # <- this one
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)

Note [Loading weights into slices]
    Bridge merges q, k and v into Megatron's standard `linear_qkv` and gives TP rank r the r-th contiguous
    chunk. A rank of Helix holds other rows (layout.py), so the merged weight is permuted before it is cut,
    and put back in order after it is gathered; `linear_proj` likewise by columns. Without that the load would
    run and mean nothing, so linear layers of sliced heads carry a class whose name Bridge does not know
    (sliced_linear.py): a Bridge that was not told stops with that name, which says what to call.

The only file that touches Megatron-Bridge.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from helix_megatron.megatron import integrate
from helix_megatron.megatron.replacements import Replacements
from helix_megatron.megatron.sliced_linear import slices_of
from helix_megatron.megatron.specs import with_helix_attention
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.derived import plan_for, slices_for
from helix_megatron.partition.grid import HelixConfigError

SUPPORTED = "0.6"

_taught, _registered = Replacements(), Replacements()


def with_helix(provider: Any, helix: HelixConfig | None = None) -> Any:
    """Give a Megatron-Bridge provider Helix attention, and Bridge the way to load and export its weights.

    Call it after the parallel sizes are set and before `finalize()` or `initialize_model_parallel()`.

    Args:
        provider: a GPT or hybrid model's provider, as `AutoBridge.to_megatron_provider()` returns it.
        helix: settings; the share of a head that RoPE rotates is taken from the provider.
    Returns:
        the provider.

    Raises:
        HelixConfigError: another Bridge, per-slice softmax, or a model whose attention Helix does not split.
    """
    import megatron.bridge

    version = megatron.bridge.__version__
    if not version.startswith(SUPPORTED + "."):
        raise HelixConfigError(
            f"megatron-bridge {version} is not supported by this Helix, which knows {SUPPORTED}.x; "
            f"pip install 'megatron-bridge=={SUPPORTED}.*', or convert with `helix convert`"
        )
    helix = helix if helix is not None else HelixConfig()
    if helix.softmax != "exact":
        raise HelixConfigError(
            "per-slice softmax was given for a Megatron-Bridge model, but Hugging Face weights are those of "
            "ordinary attention; leave --helix-softmax at exact"
        )
    if getattr(provider, "multi_latent_attention", False):
        m = slices_for(helix, provider, provider.tensor_model_parallel_size)
        if m == 1:
            return provider
        raise HelixConfigError(
            f"{type(provider).__name__} has multi-latent attention, which Helix does not slice (m = {m}); "
            "leave Helix out, or use a tensor-parallel size with m = 1"
        )
    has_rope = provider.position_embedding_type in ("rope", "yarn", "mrope")
    helix = replace(helix, rotary_percent=provider.rotary_percent if has_rope else 0.0)
    if provider.kv_channels is None:
        provider.kv_channels = provider.hidden_size // provider.num_attention_heads
    if provider.num_query_groups is None:
        provider.num_query_groups = provider.num_attention_heads
    plan = plan_for(helix, provider, provider.tensor_model_parallel_size)
    if not plan.layout.is_even:
        sizes = ", ".join(map(str, plan.layout.all_slice_dims))
        raise HelixConfigError(
            f"Helix grid {plan.grid} has slices of {sizes} dimensions, but Megatron-Bridge deals every "
            "weight out in equal parts; use a grid whose m divides the head dimension and its rotary pairs, "
            "without slice weights, or convert with `helix convert`"
        )
    integrate.enable(helix, plan.grid)
    if plan.is_megatron:  # attention of another kind stays as it is
        helix = replace(helix, head_parallel_size=plan.grid.head_parallel_size, dim_parallel_size=1)
    for name in ("transformer_layer_spec", "hybrid_stack_spec"):  # without its own, a hybrid model has
        if getattr(provider, name, None) is not None:  # Megatron's stack, which enable() has changed
            setattr(provider, name, _with_helix_spec(getattr(provider, name), helix))
    _teach()
    return provider


def register(helix: HelixConfig) -> None:
    """Have every GPT or hybrid provider take Helix attention when it is finalized. Idempotent."""
    from megatron.bridge.models import transformer_config

    def with_attention(original: Callable) -> Callable:
        @functools.wraps(original)
        def finalize(self: Any) -> None:
            if hasattr(self, "transformer_layer_spec") or hasattr(self, "hybrid_stack_spec"):
                with_helix(self, helix)
            original(self)

        finalize.helix = helix
        return finalize

    if getattr(transformer_config.TransformerConfig.finalize, "helix", None) == helix:
        return
    _registered.restore()  # of other settings
    _registered.replace(transformer_config.TransformerConfig, "finalize", with_attention)


def _with_helix_spec(spec: Any, helix: HelixConfig) -> Any:
    """A layer spec, or the function that makes one, with Helix attention."""
    if getattr(spec, "helix", None) == helix:
        return spec
    if not inspect.isroutine(spec) and not isinstance(spec, functools.partial):
        return with_helix_attention(spec, helix)

    @functools.wraps(spec)  # Bridge asks for its signature
    def helix_layer_spec(*args: Any, **kwargs: Any) -> Any:
        return with_helix_attention(spec(*args, **kwargs), helix)

    helix_layer_spec.helix = helix
    return helix_layer_spec


@dataclass(frozen=True)
class _Sliced:
    """A parallelism type, as Bridge's AutoMapping passes it between pipeline ranks: which rows, of what."""

    order: tuple[int, ...]
    dim: int


def _teach() -> None:
    """Teach Bridge's weight mappings what sliced linear layers hold. Idempotent."""
    if _taught:
        return
    from megatron.bridge.models.conversion import mapping_registry, param_mapping
    from megatron.bridge.peft import lora, utils

    def model_config(original: Callable) -> Callable:
        @functools.wraps(original)
        def _get_config(self: Any, module: Any) -> Any:
            slices = slices_of(module)  # the layer's own counts slices as heads
            return original(self, module) if slices is None else slices.config

        return _get_config

    def sliced_type(original: Callable) -> Callable:
        @functools.wraps(original)
        def _detect_parallelism_type(self: Any, module: Any) -> Any:
            slices = slices_of(module)
            if slices is None:
                return original(self, module)
            if self.megatron_param.rpartition(".")[2] not in ("weight", "bias"):  # of a norm fused into it
                return "replicated"
            return _Sliced(tuple(slices.permutation.tolist()), slices.dim)

        return _detect_parallelism_type

    def sliced_mapping(original: Callable) -> Callable:
        @functools.wraps(original)
        def _get_or_create_mapping(self: Any, kind: Any) -> Any:
            if not isinstance(kind, _Sliced):
                return original(self, kind)
            return _permuted(original(self, ("column", "row")[kind.dim]), kind)

        return _get_or_create_mapping

    def no_adapters(original: Callable) -> Callable:
        @functools.wraps(original)
        def get_adapter_attributes_from_linear(module: Any, *args: Any, **kwargs: Any) -> Any:
            if slices_of(module) is not None:
                raise HelixConfigError(
                    "an adapter (LoRA and the like) on a linear layer whose heads are sliced (m > 1) would "
                    "be exported in the wrong order; leave linear_qkv and linear_proj out of target_modules, "
                    "or use a grid with m = 1"
                )
            return original(module, *args, **kwargs)

        return get_adapter_attributes_from_linear

    def inner_core(original: Callable) -> Callable:
        @functools.wraps(original)
        def megatron_to_hf_lookup(self: Any, megatron_param_name: str) -> Any:
            name = megatron_param_name.replace(".core_attention.core.", ".core_attention.")  # sinks
            return original(self, name)

        return megatron_to_hf_lookup

    adapters = "get_adapter_attributes_from_linear"
    changes = [
        (param_mapping.MegatronParamMapping, "_get_config", model_config),
        (param_mapping.AutoMapping, "_detect_parallelism_type", sliced_type),
        (param_mapping.AutoMapping, "_get_or_create_mapping", sliced_mapping),
        (mapping_registry.MegatronMappingRegistry, "megatron_to_hf_lookup", inner_core),
        *((module, adapters, no_adapters) for module in (utils, lora) if hasattr(module, adapters)),
    ]
    for target, name, wrap in changes:
        _taught.replace(target, name, wrap)


def forget() -> None:
    """Undo what `with_helix` and `register` did to Megatron-Bridge and to Megatron."""
    _registered.restore()
    _taught.restore()
    integrate.disable()


def _permuted(mapping: Any, kind: _Sliced) -> Any:
    """A column or row parallel mapping that deals out the rows (columns) of slices."""
    order = np.asarray(kind.order)
    inverse = np.argsort(order)
    load, export = mapping.hf_to_megatron, mapping.megatron_to_hf

    def reordered(tensor: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        if tensor.ndim <= kind.dim:  # the bias of a row parallel layer is whole on every rank
            return tensor
        if tensor.shape[kind.dim] != len(index):
            raise HelixConfigError(
                f"{mapping.megatron_param}: dimension {kind.dim} of the whole weight is "
                f"{tensor.shape[kind.dim]}, but the heads of this Helix grid have {len(index)}"
            )
        return tensor.index_select(kind.dim, torch.from_numpy(index).to(tensor.device))

    def hf_to_megatron(hf_weights: torch.Tensor | None, module: Any) -> torch.Tensor:
        return load(None if hf_weights is None else reordered(hf_weights, order), module)

    def megatron_to_hf(weights: torch.Tensor | None, module: Any) -> dict[str, torch.Tensor]:
        return {name: reordered(whole, inverse) for name, whole in export(weights, module).items()}

    def megatron_to_hf_quant(*args: Any, **kwargs: Any) -> Any:
        raise HelixConfigError(
            "exporting quantised weights is not supported when heads are sliced (m > 1); export the weights "
            "unquantised, or save a checkpoint and export it without Helix"
        )

    mapping.hf_to_megatron, mapping.megatron_to_hf = hf_to_megatron, megatron_to_hf
    mapping.megatron_to_hf_quant = megatron_to_hf_quant
    return mapping
