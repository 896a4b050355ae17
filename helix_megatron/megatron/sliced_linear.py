"""The linear layers around sliced heads, marked: no tool may take a rank's rows for a contiguous chunk.

Megatron's module keeps its code and gets a subclass of its own class whose name no converter knows; its
parameters get a `partition_dim` that says no number.

Note [A partition_dim that is no number]
    `tensor_model_parallel` says that every rank holds entries of its own, and stays True: norms and clipping
    are right with that. `partition_dim` and `partition_stride` say that rank r holds the r-th chunk, which
    sliced heads are not. Megatron copies the two from tensor to tensor; a tool that goes on to use them (a
    resharder, an optimizer of whole matrices, FSDP, what concatenates the ranks' parts) compares, indexes or
    converts, and each of these raises.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import HelixLayout, Indices

NAME = "HelixSlicedLinear (heads are sliced: call helix_megatron.with_helix before building the model)"


@dataclass(frozen=True)
class Slices:
    """What a rank's part of a marked layer is part of.

    Args:
        layout: of the attention layer.
        rank: tensor-parallel.
        dim: the tensor-parallel dimension: 0, rows of `linear_qkv`; 1, columns of `linear_proj`.
        config: the model's TransformerConfig, with its true heads.
    """

    layout: HelixLayout
    rank: int
    dim: int
    config: Any

    @functools.cached_property
    def own(self) -> Indices:
        """Standard rows (dim 0) or columns (dim 1) of this rank."""
        return self.layout.held(self.dim, self.rank)

    @functools.cached_property
    def permutation(self) -> Indices:
        """Those of all ranks one after another."""
        return self.layout.qkv_permutation() if self.dim == 0 else self.layout.proj_permutation()


class SlicedDimension:
    """Stands where a number would say which dimension, or in which stride, chunks are cut; see the Note.

    Args:
        layout: of the attention layer.
        dim: as in Slices.
    """

    def __init__(self, layout: HelixLayout, dim: int):
        self.layout, self.dim = layout, dim

    def __repr__(self) -> str:
        return f"SlicedDimension({self.layout.grid}, dim={self.dim})"

    def _no_number(self, *_: Any) -> Any:
        what = "rows of linear_qkv" if self.dim == 0 else "columns of linear_proj"
        raise HelixConfigError(
            f"the {what} on a rank of Helix grid {self.layout.grid} are slices of heads, no contiguous "
            "chunk; what reads partition_dim or partition_stride here would scramble the heads. Resharding "
            "between models (megatron.core.resharding) is served with Megatron core 0.19 on ranks that have "
            "called helix_megatron.integrate.teach_tools(), as enable() and the layer specs do. Otherwise "
            "go by a torch_dist checkpoint, which every layout reads, or use a grid with m = 1"
        )

    __int__ = __index__ = __bool__ = __float__ = _no_number
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _no_number
    __hash__ = object.__hash__


@functools.cache
def _marked_class(cls: type) -> type:
    return type(NAME, (cls,), {"__module__": __name__, "__doc__": cls.__doc__})


def mark(module: torch.nn.Module, slices: Slices) -> torch.nn.Module:
    """The same module, told apart from one whose ranks hold contiguous chunks."""
    module.__class__ = _marked_class(type(module))
    module.helix_slices = slices
    mark_parameters(module)
    return module


def mark_parameters(module: torch.nn.Module) -> None:
    """Mark the sliced parameters of a marked module: anew, where others have taken their place."""
    slices = module.helix_slices
    dimension = SlicedDimension(slices.layout, slices.dim)
    for name in ("weight", "bias")[: 2 - slices.dim]:  # the bias of linear_proj is whole on every rank
        parameter = getattr(module, name, None)
        if isinstance(parameter, torch.nn.Parameter):
            parameter.tensor_model_parallel = True
            parameter.partition_dim = parameter.partition_stride = dimension


def slices_of(module: Any) -> Slices | None:
    """What `mark` was given; None for any other module."""
    return getattr(module, "helix_slices", None)


def anything_marked() -> bool:
    """Whether this process has ever built a marked layer."""
    return _marked_class.cache_info().currsize > 0
