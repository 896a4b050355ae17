"""Whole heads from slices before attention, slices from whole heads after it: one collective each way.

Shapes: S sequence, B batch, N query heads of a head group (hq), K its KV heads (hk), D head dimension, m
slices, d_s(j) dimensions of slice j. Rank t of the dim group attends with query heads u = t // c of a and
with query positions p = t % c of c (HelixLayout.head_parts, position_parts; with "heads" placement its own
heads, all positions), and with the K_t KV heads that those query heads look at.

    exchange            a rank sends to rank t                            and receives, elements
    before, "heads"     [S B K_t d_s] of K and of V                       2 S B K_t (D - d_s)
    before, "dims"      the same, and [S_p B N/a d_s] of Q, in one        + S_p B N/a (D - d_s)
    after, "dims"       [S_p B N/a d_s(t)] of the output                  (m-1)/m S B N d_s
    after, "heads"      nothing                                           0

The backward of each is its transpose: an all-to-all of gradients, those of K and V summed over the ranks that
share a KV head. Where every rank needs the same K and V, the forward is an all-gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.views import (
    Pair,
    Pieces,
    aligned_views,
    dealt_views,
    key_views,
    merge_slices,
    sum_keys,
)
from helix_megatron.partition.layout import HelixLayout, part_length


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """Who sends what to whom around one attention layer.

    Args:
        layout: shape, grid and placement.
        group: the dim group.
        overlap: K and V travel beside what is computed until they are needed, where they go without queries.
    """

    layout: HelixLayout
    group: dist.ProcessGroup
    overlap: bool = True

    @property
    def gathers(self) -> bool:
        """Every rank needs the same of this rank: the exchange before attention is an all-gather."""
        return self.layout.query_placement == "heads" and self.layout.kv_blocks == 1 and self.layout.is_even

    def _shapes(self, s: int, b: int, queries: bool, keys: bool, receive: bool) -> list[list[torch.Size]]:
        """Shapes of the pieces to (or from) each rank: [Q, K, V], [Q] or [K, V]."""
        layout, me = self.layout, self.group.rank()
        shapes = []
        for other in range(layout.grid.dim_parallel_size):
            holder, d_s = (me, layout.slice_dims(other)) if receive else (other, layout.slice_dims(me))
            of_rank = []
            if queries:
                c = layout.position_parts
                positions = part_length(s, holder % c, c)
                of_rank.append((positions, b, layout.query_heads // layout.head_parts, d_s))
            if keys:
                first, stop = layout.kv_ranges[holder]
                of_rank += [(s, b, stop - first, d_s)] * 2
            shapes.append([torch.Size(shape) for shape in of_rank])
        return shapes


@dataclass
class _Transfer:
    """A collective under way: what must live until `wait`.

    Memory that is freed after that goes to what the current stream computes next, behind the collective.
    """

    work: Any
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """What arrived; on a GPU, the current stream waits for it."""
        if self.work is not None:
            self.work.wait()
        return self.received


def _transfer(
    send: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup, overlap: bool
) -> _Transfer:
    """An all-to-all of `sent` elements for `received` elements."""
    out = send.new_empty(sum(received))
    even = len({*sent, *received}) == 1
    sizes = () if even else (list(received), list(sent))
    work = dist.all_to_all_single(out, send, *sizes, group=group, async_op=overlap)
    return _Transfer(work, send, out)


def _sizes(shapes: list[list[torch.Size]]) -> list[int]:
    return [sum(map(math.prod, of_rank)) for of_rank in shapes]


def _views(flat: Tensor, shapes: list[list[torch.Size]]) -> list[Pieces]:
    """For each tensor, its piece of every rank: views of a buffer of the ranks one after another."""
    if all(of_rank == shapes[0] for of_rank in shapes):
        columns = flat.view(len(shapes), -1).split([math.prod(shape) for shape in shapes[0]], dim=1)
        return [column.unflatten(1, shape) for column, shape in zip(columns, shapes[0], strict=True)]
    pieces = iter(flat.split([math.prod(shape) for of_rank in shapes for shape in of_rank]))
    by_rank = [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]
    return [list(of_tensor) for of_tensor in zip(*by_rank, strict=True)]


def _write(pairs: Iterator[Pair]) -> None:
    for target, source in pairs:
        target.copy_(source)


def _read(pairs: Iterator[Pair]) -> None:
    for source, target in pairs:
        target.copy_(source)


# ---- before attention ----
@dataclass
class _Pending:
    """What the two halves of an exchange share; autograd sees an empty token between them."""

    exchange: HeadExchange
    s: int
    b: int
    queries: bool
    forward: _Transfer | None = None
    backward: _Transfer | None = None

    @property
    def overlap(self) -> bool:
        """Whether something is computed meanwhile; otherwise a GPU needs no second stream."""
        return self.exchange.overlap and not self.queries

    def shapes(self, receive: bool) -> list[list[torch.Size]]:
        return self.exchange._shapes(self.s, self.b, self.queries, True, receive)


class _Start(torch.autograd.Function):
    """Slices set out; backward: their gradients have come back."""

    @staticmethod
    def forward(ctx, pending: _Pending, query: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        exchange, ctx.pending = pending.exchange, pending
        shapes, layout, group = pending.shapes(receive=False), exchange.layout, exchange.group
        if exchange.gathers:
            send = key.new_empty(2, *key.shape)
            send[0].copy_(key)
            send[1].copy_(value)
            out = send.new_empty(group.size() * send.numel())
            work = dist.all_gather_into_tensor(out, send.view(-1), group=group, async_op=pending.overlap)
            pending.forward = _Transfer(work, send, out)
            return key.new_empty(0)
        send = key.new_empty(sum(_sizes(shapes)))
        *queries, keys, values = _views(send, shapes)
        if query is not None:
            _write(dealt_views(queries[0], query, layout))
        _write(key_views(keys, key, layout))
        _write(key_views(values, value, layout))
        received = _sizes(pending.shapes(receive=True))
        pending.forward = _transfer(send, _sizes(shapes), received, group, pending.overlap)
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, token: Tensor):
        pending: _Pending = ctx.pending
        exchange, shapes = pending.exchange, pending.shapes(receive=False)
        assert pending.backward is not None
        received, pending.backward = pending.backward.wait(), None
        *queries, keys, values = _views(received, shapes)
        layout, d_s = exchange.layout, exchange.layout.slice_dims(exchange.group.rank())
        query = None
        if pending.queries:
            query = received.new_empty(pending.s, pending.b, layout.query_heads, d_s)
            _read(dealt_views(queries[0], query, layout))
        key, value = (received.new_empty(pending.s, pending.b, layout.kv_heads, d_s) for _ in range(2))
        sum_keys(keys, key, layout)
        sum_keys(values, value, layout)
        return None, query, key, value


class _Finish(torch.autograd.Function):
    """Whole heads have arrived; backward: their gradients set out."""

    @staticmethod
    def forward(ctx, pending: _Pending, token: Tensor) -> tuple[Tensor, ...]:
        ctx.pending = pending
        assert pending.forward is not None
        received, pending.forward = pending.forward.wait(), None
        *queries, keys, values = _views(received, pending.shapes(receive=True))
        layout = pending.exchange.layout
        merged = [merge_slices(pieces, layout, of_keys=True) for pieces in (*queries, keys)]
        return (*merged, merge_slices(values, layout, of_keys=False))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        pending: _Pending = ctx.pending
        exchange, shapes = pending.exchange, pending.shapes(receive=True)
        send = grads[0].new_empty(sum(_sizes(shapes)))
        for number, (pieces, grad) in enumerate(zip(_views(send, shapes), grads, strict=True)):
            of_keys = number < len(grads) - 1
            _write(aligned_views(pieces, grad, exchange.layout, of_keys))
        received = _sizes(pending.shapes(receive=False))
        pending.backward = _transfer(send, _sizes(shapes), received, exchange.group, pending.overlap)
        return None, grads[0].new_empty(0)


class WholeHeads:
    """Whole heads on their way to this rank. What is computed before `wait` runs beside the collective.

    Args:
        exchange: who sends what.
        query: [S, B, N, d_s], slice j of every query head; None with "heads" placement.
        key, value: [S, B, K, d_s].
    """

    def __init__(self, exchange: HeadExchange, query: Tensor | None, key: Tensor, value: Tensor):
        s, b = key.shape[:2]
        self._pending = _Pending(exchange, s, b, query is not None)
        self._token = _Start.apply(self._pending, query, key, value)

    def wait(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """query [S_p, B, N/a, D] or None; key and value [S, B, K_t, D]; contiguous."""
        found = _Finish.apply(self._pending, self._token)
        return found if self._pending.queries else (None, *found)


# ---- after attention ----
class _ToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: HeadExchange, out: Tensor, length: int) -> Tensor:
        ctx.exchange, ctx.length, (_, b, *_) = exchange, length, out.shape
        layout, group = exchange.layout, exchange.group
        # As many as the query's exchange receives are sent here, and the other way round.
        shapes = exchange._shapes(length, b, True, False, receive=True)
        back = exchange._shapes(length, b, True, False, receive=False)
        send = out.new_empty(sum(_sizes(shapes)))
        _write(aligned_views(_views(send, shapes)[0], out, layout, of_keys=False))
        received = _transfer(send, _sizes(shapes), _sizes(back), group, overlap=False).wait()
        slices = out.new_empty(length, b, layout.query_heads, layout.slice_dims(group.rank()))
        _read(dealt_views(_views(received, back)[0], slices, layout))
        return slices

    @staticmethod
    def backward(ctx, grad: Tensor):
        exchange, length, b = ctx.exchange, ctx.length, grad.shape[1]
        layout, group = exchange.layout, exchange.group
        shapes = exchange._shapes(length, b, True, False, receive=False)
        back = exchange._shapes(length, b, True, False, receive=True)
        send = grad.new_empty(sum(_sizes(shapes)))
        _write(dealt_views(_views(send, shapes)[0], grad, layout))
        received = _transfer(send, _sizes(shapes), _sizes(back), group, overlap=False).wait()
        return None, merge_slices(_views(received, back)[0], layout, of_keys=False), None


def output_slices(exchange: HeadExchange, out: Tensor, length: int) -> Tensor:
    """Whole heads of some heads and positions -> slice j of all heads and positions ("dims" placement).

    Args:
        out: [S_p, B, N/a, D].
        length: S.
    Returns:
        [S, B, N, d_s].
    """
    return _ToSlices.apply(exchange, out, length)
