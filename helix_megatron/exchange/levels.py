"""Reductions of a tensor-parallel group level by level over the n x m grid, for grids that span nodes.

Rank r = i*m + j. The dim group (fixed i) is the fast level, the head group (fixed j) the slow one. Of N
elements in T = n*m ranks, a rank receives over the slow level:

    collective                                                    by level           flat, from other groups
    all-reduce      reduce-scatter dim, all-reduce head,          2 (n-1)/n N/m      2 (n-1)/n N
                    all-gather dim
    reduce-scatter  reduce-scatter dim, reduce-scatter head       (n-1)/n N/m        (n-1)/n N
    all-gather      all-gather head, all-gather dim               (n-1)/n N/m        (n-1)/n N

(N: the whole tensor; chunk r belongs to rank r. "Flat": nothing was summed or shared before it crossed, and
by level is 1/m of that.) A flat ring does sum on its way. Where it visits group after group, n of its T hops
cross, (T-1)/T N each, and by level is (T-m)/(T-1) of that: 2/3 on a 2x2 grid, never less than a half. Where
it changes groups at every hop, by level is (n-1)/(T-1). tests/exchange/test_levels.py counts all three.
The results are those of the flat collectives to rounding: sums are taken in another order. These replace
collectives inside Megatron's own autograd functions, whose backward they serve as well as their forward.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.groups import HelixGroups


class CompletedWork:
    """The handle of a collective that is over."""

    def wait(self, *_: object) -> bool:
        return True


def all_reduce(tensor: Tensor, groups: HelixGroups) -> Tensor:
    """Sum over the tensor-parallel group, in place for a contiguous tensor of any shape; returns the sum."""
    m = groups.grid.dim_parallel_size
    tensor = tensor.contiguous()
    flat = tensor.view(-1)
    padding = -flat.numel() % m
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    share = flat.new_empty(flat.numel() // m)
    dist.reduce_scatter_tensor(share, flat, group=groups.dim_group)
    dist.all_reduce(share, group=groups.head_group)
    out = torch.empty_like(flat)
    dist.all_gather_into_tensor(out, share, group=groups.dim_group)
    tensor.view(-1).copy_(out[: tensor.numel()])
    return tensor


def reduce_scatter(output: Tensor, source: Tensor, groups: HelixGroups) -> CompletedWork:
    """output [s/T, ...] = this rank's chunk of the sum of source [s, ...] over the tensor-parallel group."""
    n, m = groups.grid.head_parallel_size, groups.grid.dim_parallel_size
    chunks = source.reshape(n, m, -1).transpose(0, 1).contiguous()  # [m, n, c]: rank j's chunks together
    share = chunks.new_empty(n * chunks.shape[-1])
    dist.reduce_scatter_tensor(share, chunks.view(-1), group=groups.dim_group)
    own = share.new_empty(chunks.shape[-1])
    dist.reduce_scatter_tensor(own, share, group=groups.head_group)
    output.copy_(own.view(output.shape))
    return CompletedWork()


def all_gather(output: Tensor, source: Tensor, groups: HelixGroups) -> CompletedWork:
    """output [s, ...] = source [s/T, ...] of all ranks of the tensor-parallel group, in rank order."""
    n, m = groups.grid.head_parallel_size, groups.grid.dim_parallel_size
    share = source.new_empty(n * source.numel())
    dist.all_gather_into_tensor(share, source.contiguous().view(-1), group=groups.head_group)
    out = source.new_empty(m * share.numel())
    dist.all_gather_into_tensor(out, share, group=groups.dim_group)
    output.copy_(out.view(m, n, -1).transpose(0, 1).reshape(output.shape))
    return CompletedWork()
