"""The linear layers around sliced heads, marked: no tool may take a rank's rows for a contiguous chunk.

Megatron's module keeps its code and gets a subclass of its own class whose name no converter knows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from helix_megatron.partition.layout import Indices

NAME = "HelixSlicedLinear (heads are sliced: call helix_megatron.with_helix before building the model)"


@dataclass(frozen=True)
class Slices:
    """What a rank's part of a marked layer is part of.

    Args:
        permutation: standard rows (dim 0) or columns (dim 1) of all ranks one after another.
        own: those of this rank.
        dim: the tensor-parallel dimension.
        config: the model's TransformerConfig, with its true heads.
    """

    permutation: Indices
    own: Indices
    dim: int
    config: Any


@functools.cache
def _marked_class(cls: type) -> type:
    return type(NAME, (cls,), {"__module__": __name__, "__doc__": cls.__doc__})


def mark(module: torch.nn.Module, slices: Slices) -> torch.nn.Module:
    """The same module, told apart from one whose ranks hold contiguous chunks."""
    module.__class__ = _marked_class(type(module))
    module.helix_slices = slices
    return module


def slices_of(module: Any) -> Slices | None:
    """What `mark` was given; None for any other module."""
    return getattr(module, "helix_slices", None)
