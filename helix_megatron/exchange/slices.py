"""Positions, KV heads and sinks that ranks share; slices of whole query heads where scores are summed.

S sequence, B batch, N query heads of the head group (hq), K KV heads (hk), D head dimension, d_s = D/m.
Where slices are uneven d_s is the rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import all_to_all
from helix_megatron.exchange.views import merge_slices
from helix_megatron.partition.layout import HelixLayout, position_chunks


def slice_shapes(own: Tensor, layout: HelixLayout) -> list[tuple[int, ...]]:
    """Shape, on every rank of the dim group, of slices that are [..., d_s] here."""
    return [(*own.shape[:-1], d_s) for d_s in layout.all_slice_dims]


def select_positions(tensor: Tensor, part: int, parts: int, dim: int = 0) -> Tensor:
    """The positions of one zigzag part along `dim`."""
    chunks = position_chunks(tensor.shape[dim], part, parts)
    if len(chunks) == 1:
        return tensor
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in chunks], dim=dim)


def restore_positions(parts: list[Tensor], length: int) -> Tensor:
    """Inverse of select_positions over dim 0, given all parts in order."""
    if len(parts) == 1:
        return parts[0]
    first, second = [], []
    for p, tensor in enumerate(parts):
        (start, stop), _ = position_chunks(length, p, len(parts))
        head, tail = tensor.split([stop - start, tensor.shape[0] - (stop - start)])
        first.append(head)
        second.append(tail)
    return torch.cat(first + second[::-1])


def repeat_heads(tensor: Tensor, repeats: Sequence[int]) -> Tensor:
    """Head k of [S, B, K, D] `repeats[k]` times in a row: [S, B, sum of repeats, D].

    Nothing is asked of the device. The backward sums the copies of each head in fp32 and in one order, as
    attention kernels sum the query heads of a group.
    """
    heads = tensor.split(1, dim=2)
    return torch.cat([head.expand(-1, -1, n, -1) for head, n in zip(heads, repeats, strict=True)], dim=2)


def share_of_sinks(sinks: Tensor, layout: HelixLayout, rank: int) -> Tensor:
    """What a rank adds to the sinks of all heads: the sum over the dim group has each head's once.

    Args:
        sinks: of the query heads that this rank attends with, as HelixCoreAttention.sinks.
        rank: this one in its dim group.
    Returns:
        [N] fp32.
    """
    share = sinks.new_zeros(layout.query_heads, dtype=torch.float32)
    first = first_head_of_sinks(len(sinks), layout, rank)
    if first is not None:
        share.narrow(0, first, len(sinks)).copy_(sinks)
    return share


def first_head_of_sinks(number: int, layout: HelixLayout, rank: int) -> int | None:
    """The first of the `number` heads whose sinks this rank of a dim group counts; None: another does."""
    ranks = 1 if layout.query_placement == "heads" else layout.position_parts  # that have the same heads
    return rank // ranks * number if rank % ranks == 0 else None


def query_slices(query: Tensor, layout: HelixLayout, group: dist.ProcessGroup) -> Tensor:
    """Whole heads of one rank each -> slice j of all heads ("heads" placement, all-reduce attention).

    Args:
        query: [S, B, N/m, D].
    Returns:
        [S, B, N, d_s].
    """
    m = layout.grid.dim_parallel_size
    s, b, heads, _ = query.shape
    index = [torch.as_tensor(layout.key_dims(j), device=query.device) for j in range(m)]
    pieces = [query.index_select(-1, dims) for dims in index]
    received = all_to_all(pieces, [(s, b, heads, layout.slice_dims(group.rank()))] * m, group)
    return torch.cat(received, dim=2)


def whole_outputs(out: Tensor, layout: HelixLayout, group: dist.ProcessGroup) -> Tensor:
    """Slice j of all heads -> whole heads of this rank ("heads" placement, all-reduce attention).

    Args:
        out: [S, B, N, d_s].
    Returns:
        [S, B, N/m, D].
    """
    m = group.size()
    s, b, heads, _ = out.shape
    shapes = [(s, b, heads // m, d_s) for d_s in layout.all_slice_dims]
    received = all_to_all(out.chunk(m, dim=2), shapes, group)
    return merge_slices(received, layout, of_keys=False)
