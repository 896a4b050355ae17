"""Partial outputs on their way to the ranks that merge them: one all-to-all, no knowledge of Megatron.

Note [A piece]                     what one rank sends to another, 16 bytes aligned throughout
    outputs [T, N', D'] in the model's dtype | padding | log-sum-exps [T, N'] fp32 | padding
    Outputs keep the alignment that vector loads want, log-sum-exps their precision, and both are plain views:
    the kernel that merges reads a piece where it arrived. With "heads" placement a rank is sent its whole
    heads (N' = N/m, D' = D), with "dims" its slice of all of them (N' = N, D' = d_s).

T tokens, S positions of B sequences each (T = S B), N query heads of the head group, D head dimension, m
ranks, d_s dimensions of a slice.
"""

from __future__ import annotations

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import AsyncAllToAll
from helix_megatron.kernels.merge import combine_partials, write_partials
from helix_megatron.partition.layout import HelixLayout

_ALIGNMENT = 16  # bytes

Views = tuple[Tensor, Tensor]
"""Outputs [..., N', D'] and log-sum-exps [..., N'] fp32."""


def piece_elements(tokens: int, heads: int, dim: int, itemsize: int) -> tuple[int, int]:
    """Where the log-sum-exps of a piece begin, and how long it is; elements of `itemsize` bytes."""
    number = tokens * heads
    outs, lses = (-(-size // _ALIGNMENT) * _ALIGNMENT for size in (number * dim * itemsize, 4 * number))
    return outs // itemsize, (outs + lses) // itemsize


def piece_views(pieces: Tensor, rows: tuple[int, ...], heads: int, dim: int) -> Views:
    """Outputs [..., *rows, heads, dim] and log-sum-exps [..., *rows, heads] of pieces [..., elements]."""
    number, itemsize = prod(rows) * heads, pieces.element_size()
    start, _ = piece_elements(prod(rows), heads, dim, itemsize)
    outs = pieces[..., : number * dim].unflatten(-1, (*rows, heads, dim))
    lses = pieces[..., start : start + number * 4 // itemsize].view(torch.float32)
    return outs, lses.unflatten(-1, (*rows, heads))


def piece_shapes(layout: HelixLayout) -> list[tuple[int, int]]:
    """Heads N' and dimensions D' of the piece for each rank of the dim group."""
    m, heads = layout.grid.dim_parallel_size, layout.query_heads
    if layout.query_placement == "heads":
        return [(heads // m, layout.shape.kv_channels)] * m
    return [(heads, d_s) for d_s in layout.all_slice_dims]


class PartialExchange:
    """The all-to-all over `group` that gives a rank its share of all partial outputs; no backward.

    Received: (m-1) pieces.

    Args:
        rows: S, B.
        like: of the model's dtype and on its device.
        async_op: something is computed between send() and merged().
    """

    def __init__(
        self,
        rows: tuple[int, ...],
        like: Tensor,
        layout: HelixLayout,
        group: dist.ProcessGroup,
        async_op: bool,
    ):
        self._work: AsyncAllToAll | None = None
        self._rows, self._layout, self._group, self._dtype = rows, layout, group, like.dtype
        self._async_op = async_op
        m, shapes = group.size(), piece_shapes(layout)
        sizes = [piece_elements(prod(rows), *shape, like.element_size())[1] for shape in shapes]
        self._own = shapes[group.rank()]
        self._received = like.new_empty(m, sizes[group.rank()])
        self._send = like.new_empty(sum(sizes))
        self._sizes = sizes if len(set(shapes)) > 1 else None
        self._shapes = shapes

    @property
    def target(self) -> Views | None:
        """Where attention may put its outputs [m, T, N', D'] and log-sum-exps itself; None: slices differ."""
        if self._sizes is not None:
            return None
        pieces = self._send.view(self._group.size(), -1)
        return piece_views(pieces, (prod(self._rows),), *self._shapes[0])

    def send(self, partial: Views | None) -> None:
        """Put this rank's partial output [*rows, N, D] and its log-sum-exp [*rows, N] under way; None: what
        `target` holds."""
        if partial is not None:
            self._write(partial[0].flatten(0, -3), partial[1].flatten(0, -2))
        self._work = AsyncAllToAll(self._send, self._received, self._group, self._sizes, self._async_op)

    def _write(self, out: Tensor, lse: Tensor) -> None:
        if self.target is not None:
            write_partials(out, lse, *self.target)
            return
        slices = out.split(self._layout.all_slice_dims, dim=-1)
        for piece, shape, own in zip(self._send.split(self._sizes), self._shapes, slices, strict=True):
            outs, lses = piece_views(piece, out.shape[:1], *shape)
            outs.copy_(own)
            lses.copy_(lse)

    def merged(self, sinks: Tensor | None = None) -> Tensor:
        """Wait for what arrives and merge it, with sinks [N']: [*rows, N', D'] contiguous."""
        assert self._work is not None
        outs, lses = piece_views(self._work.wait(), (prod(self._rows),), *self._own)
        return combine_partials(outs, lses, self._dtype, sinks).unflatten(0, self._rows)


def warm_up(like: Tensor, layout: HelixLayout, rank: int, sinks: Tensor | None) -> None:
    """Launch what the exchange does besides its collective, once: a kernel's first use compiles it.

    Args:
        like: of the model's dtype and on its device.
        rank: in the dim group.
        sinks: as `merged` will be given them.
    """
    shapes, m = piece_shapes(layout), layout.grid.dim_parallel_size

    def pieces(*shape: int) -> Views:
        _, size = piece_elements(1, *shape, like.element_size())
        return piece_views(like.new_zeros(m, size), (1,), *shape)

    if len(set(shapes)) == 1:
        out = like.new_zeros(1, layout.query_heads, layout.shape.kv_channels)
        lse = out.new_zeros(out.shape[:2], dtype=torch.float32)
        write_partials(out, lse, *pieces(*shapes[0]))
    combine_partials(*pieces(*shapes[rank]), like.dtype, sinks)
