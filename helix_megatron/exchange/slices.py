"""Whole heads from slices and slices from whole heads, over the dim group (no knowledge of Megatron).

S sequence, B batch, N query heads of the head group (hq), K KV heads (hk), D head dimension, d_s = D/m.
Where slices are uneven d_s is the rank's own, and slices of all ranks are a list of m tensors, not [m, ...].
Rank t of the dim group works, in attention, on part u = t // c of the query heads and part p = t % c of
the query positions (c = 1 whenever m divides hq; see HelixLayout.head_parts and position_parts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import all_to_all, gather_slices, gather_uneven
from helix_megatron.partition.layout import HelixLayout, part_length, position_chunks

Slices = Tensor | Sequence[Tensor]


def merge_key_slices(slices: Slices, layout: HelixLayout) -> Tensor:
    """[m, ..., d_s] query or key slices -> [..., D] in the head's own order, contiguous.

    One copy: rotary slices hold complete pairs, so they interleave with the slices of the partner half.
    """
    m, shape = layout.grid.dim_parallel_size, layout.shape
    if layout.per_slice or not shape.rotary_dim:
        return merge_value_slices(slices)
    if not isinstance(slices, Tensor):
        return _merge_uneven_keys(slices, layout)
    rotary, rest = slices.split([shape.rotary_dim // m, (shape.kv_channels - shape.rotary_dim) // m], dim=-1)
    halves = 1 if shape.rotary_interleaved else 2
    # [m, ..., halves * pairs] -> [..., halves, m, pairs] -> [..., rotary_dim]
    merged = rotary.unflatten(-1, (halves, -1)).movedim(0, -2).flatten(-3)
    return torch.cat([merged, merge_value_slices(rest)], dim=-1) if rest.shape[-1] else merged


def _merge_uneven_keys(slices: Sequence[Tensor], layout: HelixLayout) -> Tensor:
    """All first halves of the pairs, all second halves, the rest; in one copy."""
    halves = 1 if layout.shape.rotary_interleaved else 2
    parts = []
    for j, piece in enumerate(slices):
        half = 2 * layout.slice_pairs(j) // halves
        parts.append(piece.split([*[half] * halves, piece.shape[-1] - half * halves], dim=-1))
    return torch.cat([part for column in zip(*parts, strict=True) for part in column], dim=-1)


def merge_value_slices(slices: Slices) -> Tensor:
    """[m, ..., d_s] value or output slices -> [..., D], contiguous."""
    if not isinstance(slices, Tensor):
        return torch.cat(list(slices), dim=-1)
    return slices.movedim(0, -2).flatten(-2)


def _together(received: list[Tensor], layout: HelixLayout) -> Slices:
    return torch.stack(received) if layout.is_even else received


def slice_shapes(own: Tensor, layout: HelixLayout) -> list[tuple[int, ...]]:
    """Shape, on every rank of the dim group, of slices that are [..., d_s] here."""
    return [(*own.shape[:-1], d_s) for d_s in layout.all_slice_dims]


def gather_keys_values(
    key: Tensor, value: Tensor, kv_heads: slice, layout: HelixLayout, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Whole K and V of the head group's heads in `kv_heads`, from slices: one collective.

    Args:
        key, value: [S, B, K, d_s].
    Returns:
        [S, B, len(kv_heads), D] each.
    """
    if layout.is_even:
        keys, values = gather_slices([key, value], group)  # [m, S, B, K, d_s]
        return (
            merge_key_slices(keys[:, :, :, kv_heads], layout),
            merge_value_slices(values[:, :, :, kv_heads]),
        )
    everyones = gather_uneven([key, value], [slice_shapes(key, layout)] * 2, group)
    some_keys, some_values = ([piece[:, :, kv_heads] for piece in pieces] for pieces in everyones)
    return merge_key_slices(some_keys, layout), merge_value_slices(some_values)


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


def whole_queries(query: Tensor, layout: HelixLayout, group: dist.ProcessGroup) -> Tensor:
    """Query slices of all heads and positions -> whole heads of some heads and positions.

    Args:
        query: [S, B, N, d_s], slice j of every head of the group.
    Returns:
        [S_p, B, N/a, D], heads of part u and positions of part p of this rank.
    """
    a, c = layout.head_parts, layout.position_parts
    s, b, n, _ = query.shape
    pieces = [
        select_positions(heads, p, c) for heads in query.chunk(a, dim=2) for p in range(c)
    ]  # piece t = u c + p
    own = part_length(s, group.rank() % c, c)
    shapes = [(own, b, n // a, d_s) for d_s in layout.all_slice_dims]
    return merge_key_slices(_together(all_to_all(pieces, shapes, group), layout), layout)


def output_slices(out: Tensor, length: int, layout: HelixLayout, group: dist.ProcessGroup) -> Tensor:
    """Whole heads of some heads and positions -> slice j of all heads and positions.

    Args:
        out: [S_p, B, N/a, D].
        length: S.
    Returns:
        [S, B, N, d_s].
    """
    a, c = layout.head_parts, layout.position_parts
    _, b, heads, _ = out.shape
    own = layout.slice_dims(group.rank())
    shapes = [(part_length(length, p, c), b, heads, own) for _ in range(a) for p in range(c)]
    received = all_to_all(out.split(layout.all_slice_dims, dim=-1), shapes, group)
    parts = [restore_positions(received[u * c : (u + 1) * c], length) for u in range(a)]
    return torch.cat(parts, dim=2)


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
    return merge_value_slices(all_to_all(out.chunk(m, dim=2), shapes, group))
