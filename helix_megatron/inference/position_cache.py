"""Inference with a KV cache whose positions are spread over the dim group (no knowledge of Megatron).

Note [A step with a cache sharded by sequence]
    1. ONE all-gather hands every rank the new tokens' queries, keys and values, as whole heads.
    2. A rank keeps the keys and values of its own positions (kv_layout.py) and attends over what it keeps,
       for all query heads of the head group.
    3. ONE all-to-all hands every rank its share of the m partial outputs: slice j of all heads ("dims"), or
       its whole heads ("heads"). Their log-sum-exps travel along, so they combine exactly (merge.py).
    Prompts and single tokens take the same way. Positions are absolute, so a key at p is visible to a query
    at p or later (and inside its sliding window), however the rank's part of the sequence looks.

    received per rank     elements of the model's dtype, for t new tokens
    all-gather            (m-1) t (hq + 2 hk) d_s
    all-to-all            (m-1) t hq (d_s + e), with "heads" (m-1) t hq/m (d + e); e = 1 fp32 log-sum-exp,
                          2 elements in half precision
    Neither depends on the context's length. Uneven slices: D - d_s for (m-1) d_s in the first, d_s its own.

S new positions, B batch, N query heads of the head group (hq), K its KV heads (hk), D head dimension,
m ranks, d_s = D/m.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import AsyncAllToAll, gather_tokens, gather_uneven
from helix_megatron.exchange.slices import slice_shapes
from helix_megatron.exchange.views import merge_slices
from helix_megatron.kernels.backend import attend
from helix_megatron.kernels.merge import merge_partials
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave
from helix_megatron.partition.layout import HelixLayout


class Step(Protocol):
    """What a rank does, between the two exchanges, with the new tokens of one layer and step."""

    dim: int
    """Where independent rows are: 0 the packed tokens of requests, 1 the sequences of a batch."""

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """Keep those of the new tokens' [S, B, K, D] that are this rank's."""

    def attend(self, query: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Attention of rows start ... stop - 1 along `dim`, given by `query`, over all that the rank keeps.

        Returns: partial output, shaped as `query`, and its log-sum-exp [S, B, N] fp32.
        """


def attend_with_shards(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: HelixLayout,
    group: dist.ProcessGroup,
    step: Step,
    chunks: int = 1,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens over a cache whose positions are spread over the dim group.

    Collectives over `group`: one, and then one for each chunk; no backward is meant. A chunk's exchange runs
    while the next chunk attends. All ranks cut the tokens alike, so they start the exchanges in one order.

    Args:
        query: [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement; rotated.
        key, value: [S, B, K, d_s], the key rotated.
        step: keeps, and attends over what this rank keeps.
        chunks: into how many parts the rows are cut, at most one a row.
        sinks: of the query heads that this rank attends with in training, as HelixCoreAttention.sinks.
    Returns:
        [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement.
    """
    query, key, value, sinks = gather_new_tokens(query, key, value, layout, group, sinks)
    step.write_new_tokens(key, value)
    rows = query.shape[step.dim]
    chunks = max(1, min(chunks, rows))
    bounds = [rows * chunk // chunks for chunk in range(chunks + 1)]
    on_their_way = []
    for start, stop in pairwise(bounds):
        partial = step.attend(query.narrow(step.dim, start, stop - start), start, stop)
        on_their_way.append(send_partials(*partial, layout, group))
    outs = [receive_partials(*sent, query.dtype, sinks) for sent in on_their_way]
    return outs[0] if chunks == 1 else torch.cat(outs, dim=step.dim)


def gather_new_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: HelixLayout,
    group: dist.ProcessGroup,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One collective over `group`: attend_with_shards' shapes to [S, B, N, D], [S, B, K, D], [S, B, K, D].

    Received: (m-1) S B (N + 2K) d_s elements, for either placement, and the others' sinks with "dims".

    Returns:
        those three, and the sinks of the heads whose output this rank receives: N with "dims", its own N/m
        with "heads". The bits of fp32 sinks travel as elements of the query's dtype.
    """
    whole_heads = layout.query_placement == "heads"
    tensors = [query, key, value]
    if sinks is not None and not whole_heads:
        tensors.append(sinks.detach().float().view(query.dtype))
    if layout.is_even:
        queries, keys, values, *of_ranks = gather_tokens(tensors, group)  # [m, *shape]
    else:
        same = [[tuple(x.shape)] * group.size() for x in tensors]
        q_shapes = same[0] if whole_heads else slice_shapes(query, layout)
        kv_shapes = slice_shapes(key, layout)
        queries, keys, values, *of_ranks = gather_uneven(
            tensors, [q_shapes, kv_shapes, kv_shapes, *same[3:]], group
        )
    if of_ranks:  # c neighbours have the same heads
        own = torch.cat(list(of_ranks[0])[:: layout.position_parts])
        sinks = own.view(torch.float32)
    if whole_heads and layout.is_even:
        query = queries.movedim(0, 2).flatten(2, 3)  # rank j's heads come j-th
    elif whole_heads:
        query = torch.cat(queries, dim=2)
    else:
        query = merge_slices(queries, layout, of_keys=True)
    return query, merge_slices(keys, layout, True), merge_slices(values, layout, False), sinks


def send_partials(
    out: Tensor, lse: Tensor, layout: HelixLayout, group: dist.ProcessGroup
) -> tuple[AsyncAllToAll, int]:
    """Start the all-to-all over `group` that gives a rank its share of all partial outputs.

    Args:
        out: [S, B, N, D], this rank's partial output.
        lse: [S, B, N] fp32. Its bits travel as elements of out's dtype.
    Returns:
        for receive_partials: the pieces under way, and how many of their last elements are log-sum-exps.
        Received: (m-1) times the returned size and its log-sum-exps.
    """
    m = group.size()
    bits = lse.unsqueeze(-1).contiguous().view(out.dtype)  # [S, B, N, 1 or 2]
    if layout.query_placement == "heads":
        outs, bits = (x.unflatten(2, (m, -1)).movedim(2, 0) for x in (out, bits))
    elif layout.is_even:
        outs, bits = out.unflatten(-1, (m, -1)).movedim(-2, 0), bits.expand(m, *bits.shape)
    else:
        pieces = [torch.cat([piece, bits], dim=-1) for piece in out.split(layout.all_slice_dims, dim=-1)]
        return AsyncAllToAll(pieces, group), bits.shape[-1]
    return AsyncAllToAll(torch.cat([outs, bits], dim=-1), group), bits.shape[-1]


def receive_partials(
    pieces: AsyncAllToAll, lse_elements: int, dtype: torch.dtype, sinks: Tensor | None = None
) -> Tensor:
    """Wait for what send_partials started, merge it, and the sinks of these heads, in fp32: [S, B, N, d_s] or
    [S, B, N/m, D] in `dtype`."""
    received = pieces.wait()  # [m, S, B, ...]
    outs, bits = received.split([received.shape[-1] - lse_elements, lse_elements], dim=-1)
    lses = bits.contiguous().view(torch.float32).squeeze(-1)
    return merge_partials(outs, lses, sinks)[0].to(dtype)


@dataclass(frozen=True)
class Attention:
    """What attention over a shard needs to know besides the tokens.

    Args:
        softmax_scale: of the scores.
        left: how many positions before its own a query sees; None for all.
    """

    softmax_scale: float
    left: int | None = None

    def over(self, interleave: KvInterleave, rank: int) -> VisibleSlots:
        """What a token sees of the positions that `rank` keeps."""
        return VisibleSlots(self.softmax_scale, self.left, interleave, rank)


@dataclass(frozen=True)
class SequenceStep:
    """New positions start ... start + S - 1 of a batch of sequences of equal length, and this rank's part.

    Args:
        keys, values: [slots, B, K, D]; slots as kv_layout.py has them.
        interleave: how positions are dealt.
        rank: this rank in its dim group.
        attention: of the layer.
        start: positions that are cached already.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int
    attention: Attention
    start: int
    dim = 1

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """As Step."""
        first = self.interleave.count(self.rank, self.start)
        last = self.interleave.count(self.rank, self.start + key.shape[0])
        slots = torch.arange(first, last, device=key.device)
        own = self.interleave.position(self.rank, slots) - self.start
        self.keys[first:last] = key[own]
        self.values[first:last] = value[own]

    def attend(self, query: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """As Step; the rows are sequences."""
        new, batch = query.shape[:2]
        integers = dict(dtype=torch.int32, device=query.device)
        requests = Requests(  # of one page each
            torch.arange(0, (batch + 1) * new, new, **integers),
            torch.full((batch,), self.start + new, **integers),
            torch.arange(start, stop, **integers)[:, None],
        )
        out, lse = attend(
            query.transpose(0, 1).flatten(0, 1),
            self.keys.transpose(0, 1),
            self.values.transpose(0, 1),
            requests,
            self.attention.over(self.interleave, self.rank),
            singles=new == 1,
        )
        return out.unflatten(0, (batch, new)).transpose(0, 1), lse.unflatten(0, (batch, new)).transpose(0, 1)


def local_slots(
    interleave: KvInterleave, rank: int, blocks: Tensor, places: Tensor, spare_block: int
) -> tuple[Tensor, Tensor]:
    """Where `rank` keeps new tokens, without asking the device how many of them are its own.

    Args:
        blocks, places: [tokens] logical block of each and its place in there, 0 ... B-1.
        spare_block: a block that belongs to no sequence; it takes the tokens of other ranks.
    Returns:
        [tokens] block and slot in there.
    """
    own = interleave.owner(places) == rank
    return torch.where(own, blocks, spare_block).long(), torch.where(own, interleave.slot(places), 0).long()


@dataclass(frozen=True)
class PagedStep:
    """New tokens of packed requests, and this rank's part of a paged cache.

    Block table and block numbers are those of the whole cache.

    Args:
        keys, values: [blocks, B/m, K, D] for logical blocks of B tokens.
        interleave: how positions are dealt; whole cycles fill a block.
        rank: this rank in its dim group.
        attention: of the layer.
        blocks, slots: [tokens] where each new token is kept, as local_slots says.
        requests: whose tokens they are; tokens past the last request are padding.
        singles: row r is the only new token of request r.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int
    attention: Attention
    blocks: Tensor
    slots: Tensor
    requests: Requests
    singles: bool
    dim = 0

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """As Step, key and value [tokens, 1, K, D]."""
        tokens = len(self.blocks)
        self.keys[self.blocks, self.slots] = key[:tokens, 0]
        self.values[self.blocks, self.slots] = value[:tokens, 0]

    def attend(self, query: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """As Step; the rows are tokens, query [tokens, 1, N, D]."""
        cut = self.requests.single_rows if self.singles else self.requests.rows
        requests = cut(start, stop)
        visible = self.attention.over(self.interleave, self.rank)
        out, lse = attend(query[:, 0], self.keys, self.values, requests, visible, self.singles)
        return out[:, None], lse[:, None]
