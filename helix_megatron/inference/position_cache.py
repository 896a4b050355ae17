"""Inference with a KV cache whose positions are spread over the dim group (no knowledge of Megatron).

Note [A step with a cache sharded by sequence]
    1. ONE all-gather hands every rank the new tokens' queries, keys and values, as whole heads, which are
       normed and rotated there: as one rank would, with its kernels.
    2. A rank keeps the keys and values of its own positions (kv_layout.py) and attends over what it keeps,
       for all query heads of the head group. Where FlashAttention does that for several new tokens of a
       request, it is what was kept before, and what is new for a share of the heads (kernels/new_tokens.py).
    3. ONE all-to-all hands every rank its share of the m partial outputs: slice j of all heads ("dims"), or
       its whole heads ("heads"). Their log-sum-exps travel along (partial_exchange.py), so one kernel
       combines them exactly (merge.py).
    Single tokens, several of a request and prompts with history take this way; whole prompts have another
    where they can (prompts.py). Positions are absolute, so a key at p is visible to a query at p or later
    (and inside its sliding window), however the rank's part of the sequence looks. An attention sink counts
    once: in the merge of a rank's own heads, with "dims" in the part of the rank whose core has it.

    received per rank     elements of the model's dtype, for t new tokens
    all-gather            (m-1) t (hq + 2 hk) d_s
    all-to-all            (m-1) t hq (d_s + e), with "heads" (m-1) t hq/m (d + e); e = 1 fp32 log-sum-exp,
                          2 elements in half precision; outputs and log-sum-exps padded to 16 bytes
    Neither depends on the context's length. Uneven slices: D - d_s for (m-1) d_s in the first, d_s its own.

S new positions, B batch, N query heads of the head group (hq), K its KV heads (hk), D head dimension,
m ranks, d_s = D/m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import gather_tokens, gather_uneven
from helix_megatron.exchange.slices import first_head_of_sinks, slice_shapes
from helix_megatron.exchange.views import Pieces, aligned_views
from helix_megatron.inference.agreement import SeveralTokens, all_choose_alike
from helix_megatron.inference.partial_exchange import PartialExchange, Views
from helix_megatron.kernels.backend import attend
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.kv_layout import KvInterleave
from helix_megatron.partition.layout import HelixLayout

Heads = tuple[Tensor, Tensor]
"""Keys and values."""


class Step(Protocol):
    """What a rank does, between the two exchanges, with the new tokens of one layer and step."""

    dim: int
    """Where independent rows are: 0 the packed tokens of requests, 1 the sequences of a batch."""

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """Keep those of the new tokens' [S, B, K, D] that are this rank's."""

    def several(self) -> SeveralTokens | None:
        """What decides on the kernel for requests of several new tokens; None without any, or a choice."""

    def attend(
        self, query: Tensor, start: int, stop: int, into: Views | None = None, new: Heads | None = None
    ) -> Views | None:
        """This rank's part of the attention of rows start ... stop - 1 along `dim`, given by `query`.

        It is the part over all that the rank keeps. Given the rows' `new` keys and values [S, B, K, D], which
        are kept already, it is what backend.attend makes of them.

        Returns: partial output, shaped as `query`, and its log-sum-exp [S, B, N] fp32; or None, when it has
            put them `into` the pieces that travel.
        """


@dataclass(frozen=True)
class Prepare:
    """What becomes of whole heads before they are kept and attended with: norm and rotation.

    Args:
        function: [query and key in one tensor [S, B, N + K, D]], or [query, key], to query and key.
        together: they are wanted in one tensor.
    """

    function: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]
    together: bool


def attend_with_shards(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: HelixLayout,
    group: dist.ProcessGroup,
    prepare: Prepare,
    step: Step,
    chunks: int = 1,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens over a cache whose positions are spread over the dim group.

    Collectives over `group`: one, and then one for each chunk; once the agreement on a kernel. No backward is
    meant. A chunk's exchange runs while the next chunk attends. All ranks cut the tokens alike, so they start
    the exchanges in one order.

    Args:
        query: [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement; neither normed nor rotated.
        key, value: [S, B, K, d_s], the like.
        prepare: whole heads.
        step: keeps, and attends over what this rank keeps.
        chunks: into how many parts the rows are cut, at most one a row.
        sinks: of the query heads that this rank attends with in training, as HelixCoreAttention.sinks.
    Returns:
        [S, B, N, d_s], or [S, B, N/m, D] with "heads" placement.
    """
    heads, value = gather_new_tokens(query, key, value, layout, group, prepare.together)
    query, key = prepare.function(heads)
    step.write_new_tokens(key, value)
    rows, several = query.shape[step.dim], step.several()
    apart = several is not None and all_choose_alike(group, several)
    chunks = max(1, min(chunks, rows))
    bounds = [rows * chunk // chunks for chunk in range(chunks + 1)]
    on_their_way, receives_own_heads = [], layout.query_placement == "heads"
    for start, stop in pairwise(bounds):
        part, *new = (x.narrow(step.dim, start, stop - start) for x in (query, key, value))
        exchange = PartialExchange(tuple(part.shape[:2]), part, layout, group, async_op=chunks > 1)
        adds = sinks is not None and not receives_own_heads
        into = None if adds else exchange.target
        partial = step.attend(part, start, stop, into, (new[0], new[1]) if apart else None)
        if adds and partial is not None:
            _add_own_sinks(*partial, sinks, layout, group.rank())
        exchange.send(partial)
        on_their_way.append(exchange)
    outs = [exchange.merged(sinks if receives_own_heads else None) for exchange in on_their_way]
    return outs[0] if chunks == 1 else torch.cat(outs, dim=step.dim)


def gather_new_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: HelixLayout,
    group: dist.ProcessGroup,
    together: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """One collective over `group`: attend_with_shards' shapes to whole heads.

    Received: (m-1) S B (N + 2K) d_s elements, for either placement.

    Returns:
        [query [S, B, N, D], key [S, B, K, D]], or `together` [[S, B, N + K, D]]; and value [S, B, K, D].
    """
    (s, b), n, k, dim = key.shape[:2], layout.query_heads, layout.kv_heads, layout.shape.kv_channels
    heads = [key.new_empty(s, b, n + k, dim)] if together else [key.new_empty(s, b, x, dim) for x in (n, k)]
    whole = heads[0].split([n, k], dim=2) if together else heads
    whole_value = key.new_empty(s, b, k, dim)
    if layout.is_even and layout.query_placement == "dims":
        gathered = gather_tokens(torch.cat([query, key, value], dim=2), group)  # [m, S, B, N + 2K, d_s]
        *slices, values = gathered.split([n + k, k] if together else [n, k, k], dim=3)
        _join(zip(slices, heads, strict=True), layout, True)
    else:
        queries, keys, values = _gather(query, key, value, layout, group)
        if layout.query_placement == "dims":
            _join([(queries, whole[0])], layout, True)
        else:  # rank j's heads come j-th
            by_rank = whole[0].unflatten(2, (group.size(), -1)).movedim(2, 0)
            if isinstance(queries, Tensor):
                by_rank.copy_(queries)
            else:
                torch._foreach_copy_(list(by_rank), list(queries))
        _join([(keys, whole[1])], layout, True)
    _join([(values, whole_value)], layout, False)
    return heads, whole_value


def _add_own_sinks(out: Tensor, lse: Tensor, sinks: Tensor, layout: HelixLayout, rank: int) -> None:
    """Count the sinks of some heads in this rank's part, in place; those of others in another rank's.

    Args:
        out, lse: [S, B, N, D], [S, B, N] fp32.
        sinks: of the heads that this rank attends with in training.
    """
    first = first_head_of_sinks(len(sinks), layout, rank)
    if first is not None:
        own, own_lse = out.narrow(2, first, len(sinks)), lse.narrow(2, first, len(sinks))
        sinks = sinks.float()
        own.mul_(torch.sigmoid(own_lse - sinks).unsqueeze(-1))  # exp(lse) / (exp(lse) + exp(sink))
        torch.logaddexp(own_lse, sinks, out=own_lse)


def _gather(
    query: Tensor, key: Tensor, value: Tensor, layout: HelixLayout, group: dist.ProcessGroup
) -> list[Pieces]:
    """Queries, keys and values of every rank: [m, ...], or m tensors where slices are uneven."""
    if layout.is_even:
        packed = torch.cat([x.flatten(2) for x in (query, key, value)], dim=-1)
        columns = gather_tokens(packed, group).split([x[0, 0].numel() for x in (query, key, value)], dim=-1)
        return [x.unflatten(-1, y.shape[2:]) for x, y in zip(columns, (query, key, value), strict=True)]
    whole_heads = layout.query_placement == "heads"
    q_shapes = [tuple(query.shape)] * group.size() if whole_heads else slice_shapes(query, layout)
    kv_shapes = slice_shapes(key, layout)
    return list(gather_uneven([query, key, value], [q_shapes, kv_shapes, kv_shapes], group))


def _join(pairs: Iterable[tuple[Pieces, Tensor]], layout: HelixLayout, of_keys: bool) -> None:
    """Slices into the whole heads beside them."""
    for slices, whole in pairs:
        for source, target in aligned_views(slices, whole, layout, of_keys):
            if source.numel():
                target.copy_(source)


@dataclass(frozen=True)
class Attention:
    """What attention over a shard needs to know besides the tokens.

    Args:
        softmax_scale: of the scores.
        left: how many positions before its own a query sees; None for all.
        flash_version: the FlashAttention to take; None for the newest.
    """

    softmax_scale: float
    left: int | None = None
    flash_version: int | None = None

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
        requests: of the layers of this step, by their sequences (start, stop); what one layer makes, others
            find here.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int
    attention: Attention
    start: int
    requests: dict[tuple[int, int], Requests] = field(default_factory=dict)
    dim = 1

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """As Step."""
        first = self.interleave.count(self.rank, self.start)
        last = self.interleave.count(self.rank, self.start + key.shape[0])
        if last == first:
            return
        if len(key) > 1:
            slots = torch.arange(first, last, device=key.device)
            own = self.interleave.position(self.rank, slots) - self.start
            key, value = key[own], value[own]
        self.keys[first:last] = key
        self.values[first:last] = value

    def several(self) -> SeveralTokens | None:
        """None: ranks have different numbers of slots, and Megatron's static context is on its way out."""
        return None

    def attend(
        self, query: Tensor, start: int, stop: int, into: Views | None = None, new: Heads | None = None
    ) -> Views | None:
        """As Step; the rows are sequences."""
        assert new is None
        count, batch = query.shape[:2]
        single = count == 1
        partial = attend(
            query.transpose(0, 1).flatten(0, 1),
            self.keys.transpose(0, 1),
            self.values.transpose(0, 1),
            self._requests(count, start, stop, query.device),
            self.attention.over(self.interleave, self.rank),
            singles=batch if single else 0,
            flash_version=self.attention.flash_version,
            into=into if single else None,  # else tokens of a sequence come after each other here
        )
        if partial is None:
            return None
        out, lse = (x.unflatten(0, (batch, count)).transpose(0, 1) for x in partial)
        return out, lse

    def _requests(self, new: int, start: int, stop: int, device: torch.device) -> Requests:
        """Sequences start ... stop - 1, of one page each; made by the first layer of a step."""
        length = self.start + new
        if (start, stop) not in self.requests:
            integers = dict(dtype=torch.int32, device=device)
            self.requests[start, stop] = Requests(
                torch.arange(0, (stop - start + 1) * new, new, **integers),
                torch.full((stop - start,), length, **integers),
                torch.arange(start, stop, **integers)[:, None],
            )
        return self.requests[start, stop]


@dataclass(frozen=True)
class PagedStep:
    """New tokens of packed requests, and this rank's part of a paged cache.

    Block table and block numbers are those of the whole cache.

    Args:
        keys, values: [blocks, B/m, K, D] for logical blocks of B tokens.
        interleave: how positions are dealt; whole cycles fill a block.
        rank: this rank in its dim group.
        attention: of the layer.
        blocks, slots: [tokens] where each new token is kept, int64: what is another rank's, in a spare block.
        requests: whose tokens they are; tokens past the last request are padding.
        singles: of so many tokens at the beginning, r is the only new one of request r, or padding past all.
        graph: the step is captured in a CUDA graph, or may be.
    """

    keys: Tensor
    values: Tensor
    interleave: KvInterleave
    rank: int
    attention: Attention
    blocks: Tensor
    slots: Tensor
    requests: Requests
    singles: int
    graph: bool = False
    dim = 0

    def write_new_tokens(self, key: Tensor, value: Tensor) -> None:
        """As Step, key and value [tokens, 1, K, D]."""
        tokens = len(self.blocks)
        self.keys[self.blocks, self.slots] = key[:tokens, 0]
        self.values[self.blocks, self.slots] = value[:tokens, 0]

    def several(self) -> SeveralTokens | None:
        """As Step."""
        known = not self.graph and self.requests.longest is not None
        if not known or self.singles >= len(self.blocks):
            return None
        return SeveralTokens.of(self.keys, self.attention.left, self.attention.flash_version)

    def attend(
        self, query: Tensor, start: int, stop: int, into: Views | None = None, new: Heads | None = None
    ) -> Views | None:
        """As Step; the rows are tokens, query [tokens, 1, N, D]."""
        singles = min(max(self.singles - start, 0), stop - start)
        if singles == stop - start:
            requests = self.requests.single_rows(start, stop)
        else:
            requests = self.requests.rows(start, stop, without=min(start, self.singles))
        visible = self.attention.over(self.interleave, self.rank)
        new = None if new is None else (new[0][:, 0], new[1][:, 0])
        partial = attend(
            query[:, 0], self.keys, self.values, requests, visible, singles, self.attention.flash_version,
            self.graph, into, new,
        )  # fmt: skip
        return None if partial is None else (partial[0][:, None], partial[1][:, None])
