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
        partial = [_partial_scores(query[part.rows, 0], pages, part) for part in parts]
        summed = all_reduce_sum(torch.cat([scores.flatten() for scores in partial]), group)
        pieces = summed.split([scores.numel() for scores in partial])
        for part, scores, like in zip(parts, pieces, partial, strict=True):
            out[part.rows, 0] = _output(scores.view_as(like), pages, part).to(out.dtype)
    return out


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


def _of_request(cache: Tensor, table: Tensor, part: _Part) -> Tensor:
    """[last - first, K, d_s] of a request's pages, in fp32."""
    block = cache.shape[1]
    begin, end = part.first // block, -(-part.last // block)
    rows = cache[table[part.request, begin:end].long()].flatten(0, 1)
    return rows[part.first - begin * block : part.last - begin * block].float()


def _partial_scores(query: Tensor, pages: SlicedPages, part: _Part) -> Tensor:
    """[rows, N, d_s] to this rank's part of the scores, [K, N/K, rows, last - first] fp32."""
    key = _of_request(pages.keys, pages.requests.table, part)
    scaled = (query.float() * pages.attention.softmax_scale).unflatten(1, (key.shape[1], -1))
    return torch.einsum("skrd,lkd->krsl", scaled, key)


def _output(scores: Tensor, pages: SlicedPages, part: _Part) -> Tensor:
    """Summed scores [K, N/K, rows, last - first] to this rank's slice of the output, [rows, N, d_s]."""
    positions = torch.arange(part.first, part.last, device=scores.device)
    own = torch.arange(part.position, part.last, device=scores.device)[:, None]
    hidden = positions > own
    if pages.attention.left is not None:
        hidden |= positions < own - pages.attention.left
    probs = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    value = _of_request(pages.values, pages.requests.table, part)
    return torch.einsum("krsl,lkd->skrd", probs, value).flatten(1, 2)
