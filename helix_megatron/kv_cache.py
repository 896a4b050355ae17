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
    Neither depends on the context's length.

S new positions, B batch, N query heads of the head group (hq), K its KV heads (hk), D head dimension,
m ranks, d_s = D/m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange import gather_tokens, swap_pieces
from helix_megatron.kv_layout import KvInterleave
from helix_megatron.layout import HelixLayout
from helix_megatron.merge import merge_partials
from helix_megatron.paged_attention import Requests, Sight, paged_attention
from helix_megatron.slices import merge_key_slices, merge_value_slices

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def attend_with_shards(
    query: Tensor, key: Tensor, value: Tensor, layout: HelixLayout, group: dist.ProcessGroup, attend: Attend
) -> Tensor:
    """Attention of new tokens over a cache whose positions are spread over the dim group.

    Two collectives over `group`, see the note above; no backward is meant.

    Args:
        query: [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement; rotated.
        key, value: [S, B, K, d_s], the key rotated.
        attend: keeps and attends: (query [S, B, N, D], key, value [S, B, K, D]) to this rank's partial output
            [S, B, N, D] and its log-sum-exp [S, B, N] fp32.
    Returns:
        [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement.
    """
    whole = whole_tokens(query, key, value, layout, group)
    return combine_partials(*attend(*whole), layout, group)


def whole_tokens(
    query: Tensor, key: Tensor, value: Tensor, layout: HelixLayout, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """One collective over `group`: attend_with_shards' shapes to [S, B, N, D], [S, B, K, D], [S, B, K, D].

    Received: (m-1) S B (N + 2K) d_s elements, for either placement.
    """
    queries, keys, values = gather_tokens([query, key, value], group)  # [m, *shape]
    if layout.query_placement == "heads":
        query = queries.movedim(0, 2).flatten(2, 3)  # rank j's heads come j-th
    else:
        query = merge_key_slices(queries, layout)
    return query, merge_key_slices(keys, layout), merge_value_slices(values)


def combine_partials(out: Tensor, lse: Tensor, layout: HelixLayout, group: dist.ProcessGroup) -> Tensor:
    """All-to-all over `group`: a rank receives its share of all partial outputs, and merges them in fp32.

    Args:
        out: [S, B, N, D], this rank's partial output.
        lse: [S, B, N] fp32. Its bits travel as elements of out's dtype.
    Returns:
        [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement, in out's dtype.
        Received: (m-1) times the returned size and its log-sum-exps.
    """
    m = group.size()
    bits = lse.unsqueeze(-1).contiguous().view(out.dtype)  # [S, B, N, 1 or 2]
    if layout.query_placement == "heads":
        outs, bits = (x.unflatten(2, (m, -1)).movedim(2, 0) for x in (out, bits))
    else:
        outs, bits = out.unflatten(-1, (m, -1)).movedim(-2, 0), bits.expand(m, *bits.shape)
    received = swap_pieces(torch.cat([outs, bits], dim=-1), group)  # [m, S, B, ...]
    outs, bits = received.split([outs.shape[-1], bits.shape[-1]], dim=-1)
    lses = bits.contiguous().view(torch.float32).squeeze(-1)
    return merge_partials(outs, lses)[0].to(out.dtype)


@dataclass(frozen=True)
class Attention:
    """What attention over a shard needs to know besides the tokens.

    Args:
        softmax_scale: of the scores.
        left: how many positions before its own a query sees; None for all.
    """

    softmax_scale: float
    left: int | None = None

    def over(self, interleave: KvInterleave, rank: int) -> Sight:
        """What a token sees of the positions that `rank` keeps."""
        return Sight(self.softmax_scale, self.left, interleave, rank)


@dataclass(frozen=True)
class SequenceShard:
    """This rank's part of a cache in which all sequences of a batch have the same length.

    Args:
        keys, values: [slots, B, K, D]; slots as kv_layout.py has them.
        interleave: how positions are dealt.
        rank: this rank in its dim group.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int

    def attend(
        self, attention: Attention, start: int, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep the new positions start ... start + S - 1 that are this rank's; attend over all it keeps.

        Args, returns: as `attend` of attend_with_shards.
        """
        new, batch = query.shape[:2]
        stop = start + new
        first, last = self.interleave.count(self.rank, start), self.interleave.count(self.rank, stop)
        own = self.interleave.position(self.rank, torch.arange(first, last, device=query.device)) - start
        self.keys[first:last] = key[own]
        self.values[first:last] = value[own]
        requests = Requests(  # one page each
            torch.arange(0, (batch + 1) * new, new, device=query.device),
            torch.full((batch,), stop, device=query.device),
            torch.arange(batch, device=query.device)[:, None],
        )
        out, lse = paged_attention(
            query.transpose(0, 1).flatten(0, 1),
            self.keys.transpose(0, 1),
            self.values.transpose(0, 1),
            requests,
            attention.over(self.interleave, self.rank),
        )
        return out.unflatten(0, (batch, new)).transpose(0, 1), lse.unflatten(0, (batch, new)).transpose(0, 1)


@dataclass(frozen=True)
class PagedShard:
    """This rank's part of a paged cache; block table and block numbers are those of the whole cache.

    Args:
        keys, values: [blocks, B/m, K, D] for logical blocks of B tokens.
        interleave: how positions are dealt; whole cycles fill a block.
        rank: this rank in its dim group.
        spare_block: a block that belongs to no sequence; it takes the tokens of other ranks.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int
    spare_block: int

    def keep(self, blocks: Tensor, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep those of the new tokens that are this rank's, without asking the device how many they are.

        Args:
            blocks, places: [tokens] logical block of each token and its place in there, 0 ... B-1.
            key, value: [tokens, K, D].
        """
        own = self.interleave.owner(places) == self.rank
        blocks = torch.where(own, blocks, self.spare_block).long()
        slots = torch.where(own, self.interleave.slot(places), 0).long()
        self.keys[blocks, slots] = key
        self.values[blocks, slots] = value

    def attend(
        self, attention: Attention, query: Tensor, query_ends: Tensor, lengths: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of packed requests, each over its own pages. Tokens past the last request give 0, -inf.

        Args:
            query: [tokens, 1, N, D].
            query_ends: [requests + 1] cumulative numbers of new tokens.
            lengths: [requests] tokens of each request, the new ones included; these are its last.
            table: [requests, blocks] logical blocks of each request.
        """
        requests = Requests(query_ends, lengths, table)
        sight = attention.over(self.interleave, self.rank)
        out, lse = paged_attention(query[:, 0], self.keys, self.values, requests, sight)
        return out[:, None], lse[:, None]
