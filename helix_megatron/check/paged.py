"""Requests over one rank's part of a paged KV cache, drawn, and their attention in float64.

The formula knows positions only: which rank owns one, which the window shows. Memory that no token was
written to is NaN. Tests of the kernels use it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_megatron.kernels.paged_attention import Requests

Kept = list[tuple[list[int], Tensor, Tensor]]
"""Of every request: the positions that the rank keeps, their keys and their values."""


def draw(
    lengths: list[int],
    new: list[int],
    ranks: int,
    size: int,
    rank: int,
    heads: tuple[int, int],
    dim: int,
    order: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    cycles: int = 1,
    unwritten: float = torch.nan,
) -> tuple[Tensor, Tensor, Tensor, Requests, Kept]:
    """Requests of `lengths` tokens, the last `new` of them new, in the pages of one rank.

    Args:
        ranks, size, rank: `size` consecutive positions belong to one of `ranks` ranks; this is `rank`.
        heads: query heads, KV heads.
        order: of the pages in memory, "in order" or "scattered".
        cycles: a page holds so many times `size` slots.
        unwritten: what memory holds that no token was written to; FlashAttention reads it, with weight 0.
    Returns:
        query, keys, values, requests, and for every request the positions kept and their keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    page, (n, k) = size * cycles, heads
    counts = [-(-length // (page * ranks)) for length in lengths]
    total = sum(counts) + 2
    numbers = torch.arange(1, total - 1)
    if order == "scattered":
        numbers = numbers[torch.randperm(len(numbers), generator=generator)]
    table = torch.full((len(lengths), max([*counts, 1]) + 1), -1, dtype=torch.int32)
    keys, values = torch.full((2, total, page, k, dim), unwritten, dtype=dtype)
    kept, used = [], 0
    for request, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[request, :count] = numbers[used : used + count]
        used += count
        positions = [p for p in range(length) if p // size % ranks == rank]
        key, value = torch.randn(2, len(positions), k, dim, generator=generator).to(dtype)
        for slot in range(len(positions)):
            where = int(table[request, slot // page]), slot % page
            keys[where], values[where] = key[slot], value[slot]
        kept.append((positions, key, value))
    ends = torch.tensor([0, *new]).cumsum(0).int()
    query = torch.randn(int(ends[-1]) + 2, n, dim, generator=generator).to(dtype)  # two rows of padding
    return query, keys, values, Requests(ends, torch.tensor(lengths, dtype=torch.int32), table), kept


def expected(
    query: Tensor, requests: Requests, kept: Kept, scale: float, left: int | None
) -> tuple[Tensor, Tensor]:
    """float64: a token sees the kept positions up to its own, and not further back than `left`."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float64)
    ends, lengths = requests.query_ends.tolist(), requests.lengths.tolist()
    for request, (positions, key, value) in enumerate(kept):
        for row in range(ends[request], ends[request + 1]):
            own = lengths[request] - (ends[request + 1] - row)
            seen = [i for i, p in enumerate(positions) if p <= own and (left is None or p >= own - left)]
            if not seen:
                continue
            ratio = query.shape[1] // key.shape[1]
            k, v = (x[seen].double().repeat_interleave(ratio, dim=1) for x in (key, value))
            scores = torch.einsum("nd,lnd->nl", query[row].double(), k) * scale
            lse[row] = scores.logsumexp(-1)
            out[row] = torch.einsum("nl,lnd->nd", scores.softmax(-1), v)
    return out, lse
