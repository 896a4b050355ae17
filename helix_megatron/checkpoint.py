"""Distributed checkpoints in Megatron's standard layout, as if Helix were off.

A rank's rows of `linear_qkv` (columns of `linear_proj`) are scattered over the standard tensor. They are
written as pieces of that global tensor on a regular grid, and merged in local order on load; so a checkpoint
does not know the grid: Helix n x m, Helix n' x m' and vanilla Megatron at any TP read each other's, optimizer
state included (Megatron derives its sharding from the model's).

    d = 8, rotate-half RoPE, m = 2, pieces of 2 rows:     global   q: 0 1 | 2 3 | 4 5 | 6 7   k: ...
                                                          slice 0     ^^^         ^^^
                                                          slice 1           ^^^         ^^^
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from helix_megatron.layout import Indices


def contiguous_runs(indices: Indices) -> list[tuple[int, int]]:
    """(start, length) of the maximal runs of consecutive numbers, in order: 4 5 6 0 1 -> (4, 3), (0, 2)."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    bounds = [0, *breaks.tolist(), len(indices)]
    return [(int(indices[a]), b - a) for a, b in pairwise(bounds)]


def piece_size(permutation: Indices, ranks: int) -> int:
    """Largest u such that every rank's indices are whole pieces [k u, (k+1) u) of the global axis."""
    size = 0
    for local in np.split(permutation, ranks):
        for start, length in contiguous_runs(local):
            size = gcd(size, gcd(start, length))
    return size


def standard_layout(
    sharded: ShardedTensor, indices: Indices, piece: int, dim: int, sharded_offsets: tuple
) -> ShardedTensorFactory:
    """Re-describe a rank's tensor as pieces of the standard tensor.

    Args:
        sharded: as Megatron describes it: the rank's contiguous chunk along `dim`.
        indices: where each local row (dim 0) or column (dim 1) stands in the standard tensor.
        piece: size of a piece, see piece_size.
        dim: the tensor-parallel dimension of the local tensor.
        sharded_offsets: Megatron's offsets of the layer axes in front of it.
    """
    prepended = len(sharded_offsets)
    fragments = sharded.global_shape[dim + prepended] // piece
    starts = indices[::piece] // piece

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        assert flattened_range is None, "flattened shards of sliced heads do not exist"
        return [
            ShardedTensor.from_rank_offsets(
                key,
                local,
                *sharded_offsets,
                (dim + prepended, int(start), fragments),
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )
            for start, local in zip(starts, tensor.split(piece, dim=dim), strict=True)
        ]

    @torch.no_grad()
    def merge(pieces: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(pieces, dim=dim)

    return ShardedTensorFactory(sharded.key, sharded.data, build, merge, sharded.replica_id)
