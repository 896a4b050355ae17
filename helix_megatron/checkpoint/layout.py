"""Distributed checkpoints in Megatron's standard layout, as if Helix were off.

A rank's rows of `linear_qkv` (columns of `linear_proj`) are scattered over the standard tensor. Each run
of consecutive rows is written as one piece of that global tensor, and the pieces are put together in local
order on load; so a checkpoint does not know the grid: Helix n x m, Helix n' x m' and vanilla Megatron at any
TP read each other's, optimizer state included (Megatron derives its sharding from the model's).

    d = 8, rotate-half RoPE, m = 2:     global rows of k:  0 1 | 2 3 | 4 5 | 6 7     of v:  0 1 2 3 | 4 5 6 7
                                        slice 0            ^^^         ^^^                  ^^^^^^^
                                        slice 1                  ^^^         ^^^                      ^^^^^^^
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from helix_megatron.partition.layout import Indices, contiguous_runs


def standard_layout(
    sharded: ShardedTensor, indices: Indices, whole: int, dim: int, prepended: int
) -> ShardedTensorFactory:
    """Re-describe a rank's tensor as pieces of the standard tensor.

    The pieces have several sizes, an "irregular grid" in Megatron's words; such tensors carry the layer axes
    themselves, with size 1.

    Args:
        sharded: as Megatron describes it: the rank's contiguous chunk along `dim`.
        indices: where each local row (dim 0) or column (dim 1) stands in the standard tensor.
        whole: how many of these the standard tensor has.
        dim: the tensor-parallel dimension of the local tensor.
        prepended: number of layer axes in front of the local tensor's own.
    """
    runs = contiguous_runs(indices)
    global_shape = list(sharded.global_shape)
    global_shape[dim + prepended] = whole  # Megatron's is T times the local size, and slices may be uneven

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        assert flattened_range is None, "flattened shards of sliced heads do not exist"
        pieces = []
        for (start, _), local in zip(runs, tensor.split([n for _, n in runs], dim=dim), strict=True):
            local = local[(None,) * prepended].contiguous()
            offset = list(sharded.global_offset)
            offset[dim + prepended] = start
            pieces.append(
                ShardedTensor(
                    key,
                    local,
                    local.dtype,
                    tuple(local.shape),
                    tuple(global_shape),
                    tuple(offset),
                    axis_fragmentations=None,
                    replica_id=replica_id,
                )
            )
        return pieces

    @torch.no_grad()
    def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
        axes = pieces[0].ndim - sharded.data.ndim  # of a GPT's layers too, see accept_pieces
        pieces = [piece[(0,) * axes] for piece in pieces]
        return _joined_in_place(pieces) if dim == 0 and _adjacent(pieces) else torch.cat(pieces, dim=dim)

    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, sharded.replica_id)


def accept_pieces(original: Callable) -> Callable:
    """Megatron's `_prepend_gpt_layer_axis`, taught such pieces.

    It gives a hybrid model's tensors the layer axis that they have in a GPT's checkpoint, and supposes a
    regular grid.
    """

    @wraps(original)
    def _prepend_gpt_layer_axis(entry: Any, layer: int, layers: int) -> Any:
        if not isinstance(entry, ShardedTensor) or entry.axis_fragmentations is not None:
            return original(entry, layer, layers)
        entry.data = entry.data[None]
        entry.local_shape = (1, *entry.local_shape)
        entry.global_shape = (layers, *entry.global_shape)
        entry.global_offset = (layer, *entry.global_offset)
        return entry

    return _prepend_gpt_layer_axis


def _adjacent(pieces: list[torch.Tensor]) -> bool:
    """Whether the pieces are one after another in one storage: rows loaded in place into the parameter."""
    return all(
        a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in pairwise(pieces)
    )


def _joined_in_place(pieces: list[torch.Tensor]) -> torch.Tensor:
    """The tensor whose consecutive rows the pieces are, without a copy."""
    rows, first = sum(piece.shape[0] for piece in pieces), pieces[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())
