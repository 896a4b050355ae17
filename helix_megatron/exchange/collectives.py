"""Communication of Helix attention: every collective of the dim group, with its backward.

Shapes: S sequence, B batch, N query heads of a head group (hq), K its KV heads (hk), K' those that a rank
attends with, D head dimension, m slices, d_s dimensions of a rank's slice (D/m where they are even); [..]
local tensors. "Received" counts elements per rank and layer, forward.

    collective            payload                                    received            backward
    WholeHeads "heads"    K, V slices -> the K' heads needed         2 S B K' (D - d_s)  the same back, summed
    WholeHeads "dims"     likewise, and Q slice -> whole some heads  + S B N/m (D - d_s) the same back, summed
    output_slices         whole some heads -> slice of all heads     (m-1)/m S B N d_s   all-to-all, reversed
    all_reduce_sum        [B N S S] fp32 partial scores              B N S S             all-reduce
    gather_slices         [n] from each rank of a group              (m-1) n             sum of slices (same)
    gather_tokens         new tokens' Q, K, V in inference           (m-1) of them       none (inference)
    gather_uneven         likewise, where slices are uneven          those of the others none (inference)
    AsyncAllToAll         partial outputs, log-sum-exps in inference (m-1) pieces        none (inference)

The first three are in heads.py, ONE collective each way: an all-to-all; where every rank needs the same K
and V of whole query heads, an all-gather. Of gradients of K and V a rank receives those of its slice, from
the ranks that attend with its heads: 2 S B (sum of their K') d_s. Nothing is padded, and nothing is sent that
is not needed.

With context parallelism K and V, whole by then, are gathered over its p ranks as well (gather_slices), for
the K' heads that a rank attends with: 2 (p-1) S B K' D received, S positions of each rank, and as many in
the backward.

Everything but the collective is ordinary torch, so autograd differentiates the packing itself.
Groups are arguments. Payloads are flat and contiguous: a collective into a tensor that keeps permuted
strides would be silently wrong, and gloo insists on flat buffers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.sums import sum_copies


class _AllGather(torch.autograd.Function):
    """[n] on each of m ranks -> [m, n]; backward sums the m gradients of this rank's block in fp32.

    The sum is an all-to-all and a local fp32 sum: as many bytes as a reduce-scatter, but partial sums
    are not rounded to half precision between ranks.
    """

    @staticmethod
    def forward(ctx, flat: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = flat.new_empty(group.size() * flat.numel())
        dist.all_gather_into_tensor(out, flat.contiguous(), group=group)
        return out.view(group.size(), -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        received = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        dist.all_to_all_single(received.view(-1), grad.view(-1), group=ctx.group)
        return sum_copies(received, dim=0), None


class _AllToAll(torch.autograd.Function):
    """Flat all-to-all with uneven pieces; backward is the all-to-all of the gradients back."""

    @staticmethod
    def forward(ctx, flat: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = flat.new_empty(sum(receive))
        dist.all_to_all_single(out, flat.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out = grad.new_empty(sum(ctx.send))
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


class _AllReduceSum(torch.autograd.Function):
    """Sum over the group; every rank goes on with the sum, so the backward is a sum too."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = tensor.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out = grad.contiguous().clone()
        dist.all_reduce(out, group=ctx.group)
        return out, None


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of `tensor` (any shape, fp32) over `group`. Backward: all-reduce."""
    return _AllReduceSum.apply(tensor, group)


def gather_slices(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """All-gather several equally typed tensors in ONE collective.

    Args:
        tensors: local tensors of any shapes.
    Returns:
        for each, [m, *shape]: the tensor of every rank of the group. Backward: summed to each owner.
    """
    sizes = [tensor.numel() for tensor in tensors]
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    gathered = _AllGather.apply(packed, group)  # [m, sum of sizes]
    return [
        part.reshape(group.size(), *tensor.shape)
        for part, tensor in zip(gathered.split(sizes, dim=1), tensors, strict=True)
    ]


def all_to_all(
    pieces: Sequence[Tensor], receive_shapes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Send piece t to rank t of the group, receive one piece from each rank; pieces may differ or be empty.

    Args:
        pieces: m tensors.
        receive_shapes: shape of the piece that comes from each rank.
    Returns:
        m tensors of those shapes. Backward: the gradients travel back.
    """
    send = [piece.numel() for piece in pieces]
    receive = [int(torch.Size(shape).numel()) for shape in receive_shapes]
    packed = torch.cat([piece.reshape(-1) for piece in pieces])
    received = _AllToAll.apply(packed, send, receive, group)
    return [
        part.reshape(tuple(shape))
        for part, shape in zip(received.split(receive), receive_shapes, strict=True)
    ]


def gather_tokens(packed: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather of the few new tokens of an inference step: [m, *shape], rank by rank; has no backward.

    Args:
        packed: of the same shape on every rank.
    """
    gathered = packed.new_empty(group.size(), *packed.shape)
    dist.all_gather_into_tensor(gathered.view(-1), packed.contiguous().view(-1), group=group)
    return gathered


def gather_uneven(
    tensors: Sequence[Tensor], shapes: Sequence[Sequence[Sequence[int]]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """gather_tokens where shapes differ between ranks; has no backward.

    ONE all-to-all that sends the same to everyone: an all-gather would want equal pieces.

    Args:
        tensors: local tensors, equally typed.
        shapes: for each tensor, its shape on every rank of the group.
    Returns:
        for each, the tensor of every rank of the group.
    """
    numbers = [[math.prod(shape) for shape in of_rank] for of_rank in zip(*shapes, strict=True)]
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sizes, m = [sum(of_rank) for of_rank in numbers], group.size()
    gathered = packed.new_empty(sum(sizes))
    dist.all_to_all_single(gathered, packed.repeat(m), sizes, [packed.numel()] * m, group=group)
    pieces = iter(gathered.split([size for of_rank in numbers for size in of_rank]))
    by_rank = [[next(pieces) for _ in tensors] for _ in numbers]
    return [
        [piece.view(tuple(shape)) for piece, shape in zip(of_tensor, of_shape, strict=True)]
        for of_tensor, of_shape in zip(zip(*by_rank, strict=True), shapes, strict=True)
    ]


class AsyncAllToAll:
    """All-to-all under way, one piece for each rank of the group and one from each; no backward.

    It starts here and ends in wait(); on a GPU, what is computed meanwhile runs beside it.

    Args:
        send: the pieces, flat, one after another.
        received: [m, piece], equal pieces for what arrives.
        sizes: of the pieces that are sent, where they differ.
        async_op: False where nothing is computed meanwhile: a GPU needs no second stream then.
    """

    def __init__(
        self,
        send: Tensor,
        received: Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        async_op: bool = True,
    ):
        self._sent, self._received = send, received  # they must live until the exchange has ended
        splits = () if sizes is None else ([received.shape[1]] * group.size(), sizes)
        self._work = dist.all_to_all_single(
            received.view(-1), send.view(-1), *splits, group=group, async_op=async_op
        )

    def wait(self) -> Tensor:
        """What arrived; on a GPU, the current stream waits for it."""
        if self._work is not None:
            self._work.wait()
        return self._received
