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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.exchange import all_reduce_sum
from helix_megatron.kv_cache import Attention
from helix_megatron.paged_attention import Requests

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
    query: Tensor, key: Tensor, value: Tensor, pages: SlicedPages, group: dist.ProcessGroup
) -> Tensor:
    """Keep the new tokens and attend over everything their requests have.

    Collectives over `group`, for each SCORE_BYTES of scores: one all-reduce of N * (pairs of a new token and
    a position) fp32, received 2 (m-1)/m of that; no backward is meant.

    Args:
        query: [T, 1, N, d_s], rotated.
        key, value: [T, 1, K, d_s], the key rotated.
    Returns:
        [T, 1, N, d_s]; 0 for padding.
    """
    tokens = len(pages.blocks)
    pages.keys[pages.blocks, pages.places] = key[:tokens, 0]
    pages.values[pages.blocks, pages.places] = value[:tokens, 0]
    out = torch.zeros_like(query)
    for parts in _batches(pages.requests, pages.attention.left, query.shape[2]):
        work = [
            _Singles(pages, group_of_parts, query.device)
            if group_of_parts[0].rows.stop - group_of_parts[0].rows.start == 1
            else _Prompt(pages, group_of_parts[0])
            for group_of_parts in _alike(parts)
        ]
        partial = [one.scores(query[one.rows, 0]) for one in work]
        summed = all_reduce_sum(torch.cat(partial) if len(partial) > 1 else partial[0], group)
        for one, scores in zip(work, summed.split([scores.numel() for scores in partial]), strict=True):
            out[one.rows, 0] = one.output(scores).to(out.dtype)
    return out


def _alike(parts: list[_Part]) -> list[list[_Part]]:
    """Single new tokens that see about as much (at most twice) together, prompts each on its own."""
    found: dict[int, list[_Part]] = {}
    for number, part in enumerate(parts):
        single = part.rows.stop - part.rows.start == 1
        found.setdefault((part.last - part.first).bit_length() if single else -1 - number, []).append(part)
    return list(found.values())


def _batches(requests: Requests, left: int | None, heads: int) -> Iterator[list[_Part]]:
    """All new tokens in parts, together as many as SCORE_BYTES allow."""
    limit = SCORE_BYTES // (4 * heads)
    batch: list[_Part] = []
    room = limit
    ends, lengths = requests.on_host
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
        pages: of the layer.
        parts: theirs.
        device: where the work is done.
    """

    def __init__(self, pages: SlicedPages, parts: list[_Part], device: torch.device):
        self._pages, block = pages, pages.keys.shape[1]
        self.rows = [part.rows.start for part in parts]
        begins = [part.first // block for part in parts]
        count = max(-(-part.last // block) - begin for part, begin in zip(parts, begins, strict=True))
        requests, begins, firsts, lasts = (
            torch.tensor(column, device=device)[:, None]
            for column in zip(
                *((part.request, begin, part.first, part.last) for part, begin in zip(parts, begins)),
                strict=True,
            )
        )
        blocks = torch.minimum(begins + torch.arange(count, device=device), (lasts - 1) // block)
        self._blocks = pages.requests.table[requests, blocks].long()  # [R, blocks]
        positions = begins * block + torch.arange(count * block, device=device)
        self._seen = ((positions >= firsts) & (positions < lasts))[:, None, None]  # [R, 1, 1, L]

    def _all(self, cache: Tensor) -> Tensor:
        return cache[self._blocks].flatten(1, 2).float()  # [R, L, K, d_s]

    def scores(self, query: Tensor) -> Tensor:
        """[R, N, d_s] to this rank's part of the scores of what is seen, flat, fp32."""
        key = self._all(self._pages.keys)
        scaled = (query.float() * self._pages.attention.softmax_scale).unflatten(1, (key.shape[2], -1))
        scores = torch.einsum("rkgd,rlkd->rkgl", scaled, key)
        self._shape = scores.shape
        return scores.masked_select(self._seen)

    def output(self, scores: Tensor) -> Tensor:
        """Summed scores to this rank's slice of the output, [R, N, d_s]."""
        whole = scores.new_full(self._shape, float("-inf")).masked_scatter(self._seen, scores)
        probs = torch.softmax(whole, dim=-1)
        value = self._all(self._pages.values)  # what is not seen may be memory that nobody wrote: no number
        value.masked_fill_(~self._seen[:, 0, 0, :, None, None], 0.0)
        return torch.einsum("rkgl,rlkd->rkgd", probs, value).flatten(1, 2)


class _Prompt:
    """Several new tokens of one request.

    Args:
        pages: of the layer.
        part: theirs.
    """

    def __init__(self, pages: SlicedPages, part: _Part):
        self._pages, self._part, self.rows = pages, part, part.rows

    def _all(self, cache: Tensor) -> Tensor:
        """[last - first, K, d_s] of the request's pages, in fp32."""
        part, block = self._part, cache.shape[1]
        begin, end = part.first // block, -(-part.last // block)
        rows = cache[self._pages.requests.table[part.request, begin:end].long()].flatten(0, 1)
        return rows[part.first - begin * block : part.last - begin * block].float()

    def scores(self, query: Tensor) -> Tensor:
        """[rows, N, d_s] to this rank's part of the scores, [K, N/K, rows, last - first] flat, fp32."""
        key = self._all(self._pages.keys)
        scaled = (query.float() * self._pages.attention.softmax_scale).unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("skrd,lkd->krsl", scaled, key)
        self._shape = scores.shape
        return scores.flatten()

    def output(self, scores: Tensor) -> Tensor:
        """Summed scores to this rank's slice of the output, [rows, N, d_s]."""
        part, left = self._part, self._pages.attention.left
        positions = torch.arange(part.first, part.last, device=scores.device)
        own = torch.arange(part.position, part.last, device=scores.device)[:, None]
        hidden = positions > own
        if left is not None:
            hidden |= positions < own - left
        probs = torch.softmax(scores.view(self._shape).masked_fill(hidden, float("-inf")), dim=-1)
        return torch.einsum("krsl,lkd->skrd", probs, self._all(self._pages.values)).flatten(1, 2)
