"""Megatron's tools that read a rank's weights where heads are sliced: served, or refused by name.

A tool that asks a parameter how it is cut (partition_dim) is stopped by the answer (sliced_linear.py), known
to us or not. Three need more: the planner of Megatron's resharding is taught, and two that ask no parameter
are refused: optimizers of whole matrices (Muon), which find the QKV weight by its name, and the export to
TensorRT-LLM, which gets bare tensors.

Of Megatron's other readers: gradient clipping, norms and zero counts ask whether a rank's entries are its own
(tensor_model_parallel, still True); element-wise optimizers and their copies pass the marks on; distributed
checkpoints go by layout.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from helix_megatron import compat
from helix_megatron.megatron.sliced_linear import SlicedDimension, anything_marked, mark_parameters, slices_of
from helix_megatron.partition import resharding
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import HelixLayout


def teach(replace: Callable[[Any, str, Callable], None]) -> None:
    """Put this module's wrappers into Megatron.

    Args:
        replace: (object, attribute, wrapper) as in integrate.py, which can undo it.
    """
    from megatron.core.export.trtllm.trtllm_weights_converter import (
        distributed_trtllm_model_weights_converter as trtllm,
    )

    megatron = compat.megatron()
    if megatron.resharding:
        from megatron.core.resharding import planner, refit

        replace(planner, "extract_param_metadata", describe_sliced)
        replace(planner, "_extract_module_metadata", marked_again)
        replace(planner, "_determine_source_ranks_for_dst_param", plan_sliced)
        replace(refit, "_get_config_tuple", with_layouts)
    module, builder = megatron.matrix_optimizer
    replace(importlib.import_module(module), builder, whole_matrices_refused)
    replace(trtllm.DistributedTRTLLMModelWeightsConverter, "convert", whole_heads_refused)


# ---- resharding ----
def _layout(metadata: Any) -> HelixLayout | None:
    sliced = metadata.partition_dim
    return sliced.layout if isinstance(sliced, SlicedDimension) else None


def describe_sliced(original: Callable) -> Callable:
    """`extract_param_metadata`: a sliced parameter's metadata says how it is sliced, wherever it is sent."""

    @functools.wraps(original)
    def extract_param_metadata(param: Any, param_name: str, *args: Any, **kwargs: Any) -> Any:
        if ".core_attention.core." in f".{param_name}":
            raise HelixConfigError(
                f"{param_name}: resharding of what attention itself learns (--softmax-type learnable) is not "
                "supported between models with sliced heads (m > 1); go by a torch_dist checkpoint"
            )
        sliced = getattr(param, "partition_dim", None)
        if not isinstance(sliced, SlicedDimension):
            return original(param, param_name, *args, **kwargs)
        plain = param.detach()
        plain.__dict__.update(vars(param), partition_dim=sliced.dim, partition_stride=1)
        metadata = original(plain, param_name, *args, **kwargs)
        metadata.partition_dim = metadata.partition_stride = sliced  # a planner that does not know it stops
        return metadata

    return extract_param_metadata


def marked_again(original: Callable) -> Callable:
    """`_extract_module_metadata`: parameters that have taken the place of marked ones are marked, too."""

    @functools.wraps(original)
    def _extract_module_metadata(module: Any, *args: Any, **kwargs: Any) -> Any:
        for linear in [] if module is None else module.modules():
            if slices_of(linear) is not None:
                mark_parameters(linear)
        return original(module, *args, **kwargs)

    return _extract_module_metadata


def plan_sliced(original: Callable) -> Callable:
    """`_determine_source_ranks_for_dst_param`: what a rank receives of one parameter, from whom."""

    @functools.wraps(original)
    def _determine_source_ranks_for_dst_param(
        param_name: str, src_metadata: Any, dst_metadata: Any, my_global_rank: int
    ) -> list[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        layouts = source, destination = _layout(src_metadata), _layout(dst_metadata)
        if source is None and destination is None:
            return original(param_name, src_metadata, dst_metadata, my_global_rank)
        _refuse_other_model(param_name, *layouts)
        sliced = (dst_metadata if destination is not None else src_metadata).partition_dim
        dim = sliced.dim
        if sliced.layout.per_slice:  # that of the derived model, contiguous
            both = [
                dataclasses.replace(metadata, partition_dim=dim, partition_stride=1)
                for metadata in (src_metadata, dst_metadata)
            ]
            return original(param_name, *both, my_global_rank)
        whole = sum(resharding.sizes(sliced.layout, dim))
        for metadata in (src_metadata, dst_metadata):
            _check_shape(param_name, metadata, dim, whole)
        source_ranks, ranks = (m.tensor_parallel_group_ranks for m in (src_metadata, dst_metadata))
        if my_global_rank not in ranks:
            return []
        tp = len(source_ranks), len(ranks)
        return [
            (
                source_ranks[run.source],
                _part(src_metadata.shape, dim, run.start, run.length),
                _part(dst_metadata.shape, dim, run.destination_start, run.length),
            )
            for run in resharding.plan(source, destination, dim, tp, whole, ranks.index(my_global_rank))
        ]

    return _determine_source_ranks_for_dst_param


def _part(shape: Sequence[int], dim: int, start: int, length: int) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) if d == dim else slice(None) for d in range(len(shape)))


def _refuse_other_model(name: str, source: HelixLayout | None, destination: HelixLayout | None) -> None:
    """Refuse what fits by size and is another model: other heads, per-slice softmax for exact attention."""

    def model(layout: HelixLayout | None) -> str:
        if layout is None:  # it has no more to say than that its heads are whole
            return "exact attention"
        if not layout.per_slice and None in (source, destination):
            return "exact attention"
        slices = f"per-slice softmax over {layout.grid.dim_parallel_size} slices" if layout.per_slice else ""
        pairs = ", interleaved" if layout.shape.rotary_interleaved else ""
        gates = ", and output gates" if layout.output_gate else ""
        return f"{slices or 'exact attention'} with {layout.shape}{pairs}{gates}"

    theirs, ours = model(source), model(destination)
    if theirs != ours:
        raise HelixConfigError(
            f"{name}: weights of {theirs} were to be resharded into {ours}, another model, in which they "
            "mean nothing; build both with the same heads, RoPE and softmax"
        )


def _check_shape(name: str, metadata: Any, dim: int, whole: int) -> None:
    ranks, layout = metadata.tensor_parallel_group_ranks, _layout(metadata)
    here = metadata.shape[dim]
    if layout is not None:
        sizes = resharding.sizes(layout, dim)
        fits = len(sizes) == len(ranks) and here == sizes[ranks.index(metadata.owner_rank)]
    else:
        plain = metadata.partition_stride == 1 and metadata.partition_sizes is None
        fits = plain and here * len(ranks) == whole and (metadata.partition_dim == dim or len(ranks) == 1)
    if not fits:
        raise HelixConfigError(
            f"{name}: dimension {dim} is {here} on one of {len(ranks)} tensor-parallel ranks "
            f"({f'Helix grid {layout.grid}' if layout else 'no Helix grid'}), no part of the {whole} that "
            "the other side's heads have; source and destination must be the same model"
        )


def with_layouts(original: Callable) -> Callable:
    """`_get_config_tuple`, the key of kept plans: grids of equal size have plans of their own."""

    @functools.wraps(original)
    def _get_config_tuple(core: Any) -> Any:
        sizes = original(core)
        if core is None:
            return sizes
        if not hasattr(core, "_helix_layouts"):
            found = (slices_of(module) for module in core.modules())
            core._helix_layouts = frozenset(slices.layout for slices in found if slices is not None)
        return (*sizes, core._helix_layouts) if core._helix_layouts else sizes

    return _get_config_tuple


# ---- refused ----
def whole_matrices_refused(original: Callable) -> Callable:
    """The builder of optimizers that orthogonalise the Q, K and V matrices of whole heads."""

    @functools.wraps(original)
    def build(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        found = (slices_of(module) for chunk in model_chunks for module in chunk.modules())
        sliced = next((slices for slices in found if slices is not None), None)
        if sliced is not None:
            raise HelixConfigError(
                f"Helix grid {sliced.layout.grid} slices heads (m > 1) and does not support optimizer "
                f"{config.optimizer!r}, which treats the QKV weight as whole heads; use adam, sgd or lion"
            )
        return original(config, model_chunks, *args, **kwargs)

    return build


def whole_heads_refused(original: Callable) -> Callable:
    """The export of each rank's weights to TensorRT-LLM, which is given tensors and no model."""

    @functools.wraps(original)
    def convert(self: Any, *args: Any, **kwargs: Any) -> Any:
        if anything_marked():
            raise HelixConfigError(
                "the export to TensorRT-LLM takes a rank's QKV weight for whole heads, and this process has "
                "built a model with sliced heads (m > 1); save a torch_dist checkpoint and export that "
                "without Helix"
            )
        return original(self, *args, **kwargs)

    return convert
