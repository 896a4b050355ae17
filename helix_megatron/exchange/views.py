"""Views in pairs: what a rank sends or receives, and what it comes from or becomes. No communication.

Note [Views in pairs]
    What is sent and what it comes from are two views of the same shape: packing copies one way, the transpose
    the other way, and nothing is copied twice. Even slices have one pair for all ranks (one kernel), uneven
    ones a pair for each.

S sequence, B batch, N query heads of a head group (hq), K its KV heads (hk), D head dimension, d_s(j) that of
slice j. Rank t of the dim group attends with query heads u = t // c of a and positions p = t % c of c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from helix_megatron.exchange.sums import sum_copies
from helix_megatron.partition.layout import HelixLayout, position_chunks

Pieces = Tensor | Sequence[Tensor]
"""One for each rank of the dim group: [m, ...], or m tensors where they differ."""
Pair = tuple[Tensor, Tensor]


# ---- slices of a head ----
def aligned_views(slices: Pieces, whole: Tensor, layout: HelixLayout, of_keys: bool) -> Iterator[Pair]:
    """Pairs (view of slices, view of whole heads) that hold the same dimensions.

    Args:
        slices: [m, ..., d_s], or m of [..., d_s(j)].
        whole: [..., D], in the head's own order.
        of_keys: slices of queries and keys, of whole rotary pairs; otherwise of values and outputs.
    """
    shape = layout.shape
    rotary = shape.rotary_dim if of_keys and not layout.per_slice else 0
    halves = 1 if shape.rotary_interleaved else 2
    if isinstance(slices, Tensor) and layout.is_even:
        m = layout.grid.dim_parallel_size
        if rotary:
            # [..., halves, m, pairs] of whole heads are [m, ..., halves, pairs] of slices
            yield (
                slices[..., : rotary // m].unflatten(-1, (halves, -1)),
                whole[..., :rotary].unflatten(-1, (halves, m, -1)).movedim(-2, 0),
            )
        if rotary < shape.kv_channels:
            rest = whole[..., rotary:].unflatten(-1, (m, -1)).movedim(-2, 0)
            yield slices[..., rotary // m :], rest
        return
    starts = [half * rotary // halves for half in range(halves)] if rotary else []
    rest = rotary
    for j, piece in enumerate(slices):
        done = 0
        for number, start in enumerate(starts):
            pairs = 2 * layout.slice_pairs(j) // halves
            yield piece[..., done : done + pairs], whole[..., start : start + pairs]
            done += pairs
            starts[number] = start + pairs
        more = piece.shape[-1] - done
        yield piece[..., done:], whole[..., rest : rest + more]
        rest += more


def merge_slices(slices: Pieces, layout: HelixLayout, of_keys: bool) -> Tensor:
    """Whole heads [..., D], contiguous, from slices (see aligned_views)."""
    first = slices[0]
    whole = first.new_empty(*first.shape[:-1], layout.shape.kv_channels)
    for part, target in aligned_views(slices, whole, layout, of_keys):
        target.copy_(part)
    return whole


# ---- heads and positions of a head group ----
def dealt_views(pieces: Pieces, whole: Tensor, layout: HelixLayout) -> Iterator[Pair]:
    """Pairs (view of the ranks' query heads and positions, view of all of them).

    Args:
        pieces: [m, S, B, N/a, d], or m of [S_p, B, N/a, d].
        whole: [S, B, N, d].
    """
    a, c = layout.head_parts, layout.position_parts
    heads = whole.unflatten(2, (a, -1)).movedim(2, 0)  # [a, S, B, N/a, d]
    if isinstance(pieces, Tensor) and c == 1:
        yield pieces, heads
        return
    for t, piece in enumerate(pieces):
        done = 0
        for start, stop in position_chunks(whole.shape[0], t % c, c):
            yield piece[done : done + stop - start], heads[t // c, start:stop]
            done += stop - start


def key_views(pieces: Pieces, key: Tensor, layout: HelixLayout) -> Iterator[Pair]:
    """Pairs (view of the KV heads that ranks attend with, view of all of them); a head may be in several.

    Args:
        pieces: [m, S, B, K_t, d], or m of them.
        key: [S, B, K, d], of keys or values.
    """
    x = layout.kv_blocks
    if isinstance(pieces, Tensor) and x is not None:
        blocks = key.unflatten(2, (x, -1)).movedim(2, 0).unsqueeze(1)
        copies = pieces.unflatten(0, (x, -1))
        yield copies, blocks.expand_as(copies)
        return
    for piece, (first, stop) in zip(pieces, layout.kv_ranges, strict=True):
        yield piece, key[:, :, first:stop]


def sum_keys(pieces: Pieces, key: Tensor, layout: HelixLayout) -> None:
    """The transpose of copying key_views: key [S, B, K, d] = the sum of its heads in pieces, in fp32."""
    x = layout.kv_blocks
    if isinstance(pieces, Tensor) and x is not None:
        summed = sum_copies(pieces.unflatten(0, (x, -1)), dim=1)  # [x, S, B, K/x, d]
        key.unflatten(2, (x, -1)).movedim(2, 0).copy_(summed)
        return
    total = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    for piece, (first, stop) in zip(pieces, layout.kv_ranges, strict=True):
        total[:, :, first:stop] += piece
    key.copy_(total)
