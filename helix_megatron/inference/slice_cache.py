"""Inference with a paged KV cache of slices: every rank of the dim group keeps d/m of every position.

Note [A step with a cache sharded by dimension]
    1. A rank keeps its slice of the new tokens' keys and values, in the pages that Megatron names.
    2. Its slices of query and keys give partial scores of every new token with every position it may see.
       ONE all-reduce over the dim group sums them, in fp32.
    3. All ranks then hold the same scores, hence the same softmax; times their slice of the values it is
       their slice of the output, which is what linear_proj takes.
    The all-reduce has hq scores for every pair of a new token and a position: as traffic grows with the
    context, this serves short ones. The scores of a long prompt (s^2) would not fit in memory, so a step with
    more than SCORE_BYTES of them works in parts, each with an all-reduce of its own. Steps that only decode
    are one part up to 16 million scores, e.g. 9 heads, 8 requests and 233,000 positions each.

T packed new tokens of all requests, N query heads of the head group (hq), K its KV heads (hk), m ranks,
d_s = D/m, B positions of a block, L positions of a request.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange.collectives import all_reduce_sum
from helix_megatron.inference.position_cache import Attention
from helix_megatron.kernels.merge import softmax_with_sinks
from helix_megatron.kernels.paged_attention import Requests

SCORE_BYTES = 2**26  # fp32 scores of a part; about four times as much exists while it is computed


@dataclass(frozen=True)
class SlicedPages:
    """One layer's pages of this rank, and the new tokens of a step.

    Args:
        keys, values: [blocks, B, K, d_s].
        attention: of the layer.
        blocks, places: [tokens] where each new token is kept.
        requests: whose tokens they are; tokens past the last request are padding.
    """

    keys: Tensor
    values: Tensor
    attention: Attention
    blocks: Tensor
    places: Tensor
    requests: Requests


@dataclass(frozen=True)
class _Part:
    """Consecutive new tokens of one request: rows of the query, and the positions that they see."""

    request: int
    rows: slice
    position: int  # of the first row
    first: int  # position that the first row sees
    last: int  # one past the position of the last row


def attend_over_slices(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: SlicedPages,
    group: dist.ProcessGroup,
    sinks: Tensor | None = None,
) -> Tensor:
    """Keep the new tokens and attend over everything their requests have.

    Collectives over `group`, for each SCORE_BYTES of scores: one all-reduce of N * (pairs of a new token and
    a position) fp32, and of N sinks where there are any, received 2 (m-1)/m of that; no backward is meant.

    Args:
        query: [T, 1, N, d_s], rotated.
        key, value: [T, 1, K, d_s], the key rotated.
        sinks: [N] fp32, a summand of the sinks of all heads (share_of_sinks); None for none.
    Returns:
        [T, 1, N, d_s]; 0 for padding.
    """
    tokens, requests = len(pages.blocks), pages.requests
    pages.keys[pages.blocks, pages.places] = key[:tokens, 0]
    pages.values[pages.blocks, pages.places] = value[:tokens, 0]
    out = torch.zeros_like(query)
    how = (pages.attention.left, query.shape[2], pages.keys.shape[1], SCORE_BYTES)
    for batch in requests.keep(how, list, functools.partial(_deal, requests, how)):
        partial = [work.scores(query[work.rows, 0], pages) for work in batch]
        flat = [scores.flatten() for scores in partial]
        if sinks is not None:
            flat.append(sinks)
        summed = all_reduce_sum(torch.cat(flat) if len(flat) > 1 else flat[0], group)
        *pieces, last = summed.split([scores.numel() for scores in flat])
        of_heads = last.view(pages.keys.shape[2], -1) if sinks is not None else None  # [K, N/K]
        if sinks is None:
            pieces.append(last)
        for work, like, scores in zip(batch, partial, pieces, strict=True):
            out[work.rows, 0] = work.output(scores.view_as(like), pages, of_heads).to(out.dtype)
    return out


def _deal(requests: Requests, how: tuple, batches: list[list[_Singles | _Prompt]]) -> None:
    """The step's work in parts; the same for every layer, and asked of the device."""
    batches[:] = (
        [_attention_work(alike, requests, how[2]) for alike in _group_by_length(parts)]
        for parts in _batches(requests, *how[:2])
    )


def _is_single_token(part: _Part) -> bool:
    return part.rows.stop - part.rows.start == 1


def _group_by_length(parts: list[_Part]) -> list[list[_Part]]:
    """Single new tokens that see about as much (at most twice) together, prompts each on its own."""
    found: dict[int, list[_Part]] = {}
    for number, part in enumerate(parts):
        group = (part.last - part.first).bit_length() if _is_single_token(part) else -number
        found.setdefault(group, []).append(part)
    return list(found.values())


def _attention_work(parts: list[_Part], requests: Requests, block: int) -> _Singles | _Prompt:
    if _is_single_token(parts[0]):
        return _Singles(parts, requests, block)
    return _Prompt(parts[0], requests, block)


def _batches(requests: Requests, left: int | None, heads: int) -> Iterator[list[_Part]]:
    """All new tokens in parts, together as many as SCORE_BYTES allow."""
    limit = SCORE_BYTES // (4 * heads)
    batch: list[_Part] = []
    room = limit
    ends, lengths = requests.host_ends_and_lengths
    for request, length in enumerate(lengths):
        row, end = ends[request : request + 2]
        while row < end:
            position = length - (end - row)
            first = 0 if left is None else max(0, position - left)
            rows = min(end - row, max(1, room // (length - first)))
            pairs = rows * (position + rows - first)
            if batch and pairs > room:
                yield batch
                batch, room = [], limit
                continue
            batch.append(_Part(request, slice(row, row + rows), position, first, position + rows))
            row, room = row + rows, room - pairs
    if batch:
        yield batch


class _Singles:
    """The only new tokens of R requests, together; L positions from the first block on that one sees.

    Args:
        parts: theirs.
        requests: whose pages are read.
        block: B.
    """

    def __init__(self, parts: list[_Part], requests: Requests, block: int):
        device = requests.table.device
        self.rows: list[int] | slice = [part.rows.start for part in parts]
        begins = [part.first // block for part in parts]
        starts = [part.first - begin * block for part, begin in zip(parts, begins, strict=True)]
        stops = [part.last - begin * block for part, begin in zip(parts, begins, strict=True)]
        count = -(-max(stops) // block)
        self._range = slice(min(starts), max(stops))  # of the L positions
        numbers, first_blocks, low, high = (
            torch.tensor(column, device=device)[:, None]
            for column in ([part.request for part in parts], begins, starts, stops)
        )
        own = torch.minimum(torch.arange(count, device=device), (high - 1) // block)
        self._blocks = requests.table[numbers, first_blocks + own].long()  # [R, blocks]
        self._seen = None  # by all of them: nothing in the range is hidden
        if len(set(starts)) > 1 or len(set(stops)) > 1:
            positions = torch.arange(self._range.start, self._range.stop, device=device)
            self._seen = ((positions >= low) & (positions < high))[:, None, None]  # [R, 1, 1, L]
        if len(parts) == 1:
            self.rows = parts[0].rows

    def _all(self, cache: Tensor) -> Tensor:
        return cache[self._blocks].flatten(1, 2)[:, self._range].float()  # [R, L, K, d_s]

    def scores(self, query: Tensor, pages: SlicedPages) -> Tensor:
        """[R, N, d_s] to this rank's part of the scores, fp32: [R, K, N/K, L], or what is seen, flat."""
        key = self._all(pages.keys)
        scaled = (query.float() * pages.attention.softmax_scale).unflatten(1, (key.shape[2], -1))
        scores = torch.einsum("rkgd,rlkd->rkgl", scaled, key)
        if self._seen is None:
            return scores
        self._shape = scores.shape
        return scores.masked_select(self._seen)

    def output(self, scores: Tensor, pages: SlicedPages, sinks: Tensor | None) -> Tensor:
        """Summed scores, and sinks [K, N/K], to this rank's slice of the output, [R, N, d_s]."""
        value = self._all(pages.values)
        if self._seen is not None:  # what is not seen may be memory that nobody wrote: no number
            scores = scores.new_full(self._shape, float("-inf")).masked_scatter(self._seen, scores)
            value = value.masked_fill(~self._seen[:, 0, 0, :, None, None], 0.0)
        probs = softmax_with_sinks(scores, None if sinks is None else sinks[:, :, None])
        return torch.einsum("rkgl,rlkd->rkgd", probs, value).flatten(1, 2)


class _Prompt:
    """Several new tokens of one request.

    Args:
        part: theirs.
        requests: whose pages are read.
        block: B.
    """

    def __init__(self, part: _Part, requests: Requests, block: int):
        self._part, self.rows = part, part.rows
        begin, end = part.first // block, -(-part.last // block)
        self._blocks = requests.table[part.request, begin:end].long()
        self._range = slice(part.first - begin * block, part.last - begin * block)

    def _all(self, cache: Tensor) -> Tensor:
        return cache[self._blocks].flatten(0, 1)[self._range].float()  # [last - first, K, d_s]

    def scores(self, query: Tensor, pages: SlicedPages) -> Tensor:
        """[rows, N, d_s] to this rank's part of the scores, [K, N/K, rows, last - first] fp32."""
        key = self._all(pages.keys)
        scaled = (query.float() * pages.attention.softmax_scale).unflatten(1, (key.shape[1], -1))
        return torch.einsum("skrd,lkd->krsl", scaled, key)

    def output(self, scores: Tensor, pages: SlicedPages, sinks: Tensor | None) -> Tensor:
        """Summed scores, and sinks [K, N/K], to this rank's slice of the output, [rows, N, d_s]."""
        part, left = self._part, pages.attention.left
        positions = torch.arange(part.first, part.last, device=scores.device)
        own = torch.arange(part.position, part.last, device=scores.device)[:, None]
        hidden = positions > own
        if left is not None:
            hidden |= positions < own - left
        scores = scores.masked_fill(hidden, float("-inf"))
        probs = softmax_with_sinks(scores, None if sinks is None else sinks[:, :, None, None])
        return torch.einsum("krsl,lkd->skrd", probs, self._all(pages.values)).flatten(1, 2)
