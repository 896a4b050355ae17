"""How the Triton kernel deals a step's work to its programs, from lengths that only the device knows.

Note [Equal shares]                 3 tiles of 5, 0 and 7 steps, 4 programs: shares of 3 steps
    steps      0  1  2 | 3  4    5 | 6  7  8 | 9 10 11
    tile       0  0  0 | 0  0    2 | 2  2  2 | 2  2  2
    program       0    |     1     |    2    |    3
    A tile is some new tokens of one request (Note [Tiles]), a step is a block of SLOTS of the slots that they
    see, aligned so that a page holds whole steps. All steps of all tiles stand in one line, which is cut into
    equal shares, one a program: all programs have as much to read, whatever the lengths. What is not there
    (padding, finished requests, empty shards) has no steps and costs nothing. The number of programs comes
    from the device; the host knows no other number of the plan, so it needs no answer of the device, and a
    CUDA graph may hold it.

    A tile that one program does alone is written out by it. Of others every program keeps its part: it has
    two at most, the tile that its share begins in (place 2p) and the one that it ends in (place 2p + 1). Part
    k of a tile is program p + k's, p being the first; only part 0 can be at an odd place. triton_merge.py
    merges them.

Note [Tiles]
    Tokens are packed without a list of tiles: request i gets the tiles from ends[i] // TOKENS + i on, which
    leaves one empty tile a request at most. Requests of few new tokens (decoding ones) and of many (prompts)
    have tiles of their own size, and launches of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from helix_megatron.partition.kv_layout import KvInterleave


@triton.jit
def count(length, rank, RANKS: tl.constexpr, SIZE: tl.constexpr):
    # KvInterleave.count
    rest = length % (RANKS * SIZE) - rank * SIZE
    return length // (RANKS * SIZE) * SIZE + tl.minimum(tl.maximum(rest, 0), SIZE)


@triton.jit
def share_of(total, programs, LEAST: tl.constexpr):
    # steps of a program
    return tl.maximum(tl.cdiv(total, programs), LEAST)


@triton.jit
def holder(bounds, number, value):
    # the last i in 0 ... number - 1 with bounds[i] <= value, for ascending bounds of which bounds[0] is one
    found = value * 0
    for at in range(1, number, 256):
        i = at + tl.arange(0, 256)
        bound = tl.load(bounds + i, mask=i < number, other=0)
        found += tl.sum(((i < number) & (bound <= value)).to(tl.int32))
    return found


@triton.jit(
    do_not_specialize=["rank", "left", "requests", "tiles", "rounds"],
    do_not_specialize_on_alignment=["ends", "lengths", "starts", "owners"],
)
def plan_kernel(
    ends, lengths, starts, owners, rank, left, requests, tiles, rounds,
    RANKS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # starts [tiles + 1]: where each tile's steps begin; owners [tiles]: its request. One program.
    total = requests * 0
    tl.store(starts, total)
    for at in range(0, tiles, BLOCK):
        tile = at + tl.arange(0, BLOCK)
        there = tile < tiles
        low = tile * 0  # by bisection: the last request whose first tile is not after this one
        high = low + requests
        for _ in range(rounds):
            middle = (low + high) // 2
            before = tl.load(ends + middle) // TOKENS + middle <= tile
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        begin, end = tl.load(ends + low), tl.load(ends + low + 1)
        token = begin + (tile - begin // TOKENS - low) * TOKENS
        if MANY:  # noqa: SIM108
            there = there & (end - begin > FEW)
        else:
            there = there & (end - begin <= FEW)
        there = there & (token < end)
        past = tl.load(lengths + low) - end  # position of a token, less the token
        stop = count(tl.minimum(token + TOKENS, end) + past, rank, RANKS, SIZE)
        if WINDOW:
            start = count(tl.maximum(token + past - left, 0), rank, RANKS, SIZE)
            there = there & (stop > start)
            steps = tl.where(there, tl.cdiv(stop, SLOTS) - start // SLOTS, 0)
        else:
            steps = tl.where(there, tl.cdiv(stop, SLOTS), 0)
        tl.store(starts + 1 + tile, total + tl.cumsum(steps, axis=0), mask=tile < tiles)
        tl.store(owners + tile, low, mask=tile < tiles)
        total += tl.sum(steps, axis=0)


@triton.jit(
    do_not_specialize=["rank", "spare", "tokens"],
    do_not_specialize_on_alignment=["of_tokens", "places", "blocks", "slots"],
)
def place_kernel(
    of_tokens, places, blocks, slots, rank, spare, tokens,
    RANKS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    place = tl.load(places + token, mask=there, other=0)
    own = place // SIZE % RANKS == rank  # KvInterleave.owner, slot
    slot = place // (RANKS * SIZE) * SIZE + place % SIZE
    block = tl.load(of_tokens + token, mask=there, other=0).to(tl.int64)
    tl.store(blocks + token, tl.where(own, block, spare), mask=there)
    tl.store(slots + token, tl.where(own, slot, 0).to(tl.int64), mask=there)


def place_tokens(
    blocks: Tensor,
    slots: Tensor,
    of_tokens: Tensor,
    places: Tensor,
    interleave: KvInterleave,
    rank: int,
    spare_block: int,
) -> None:
    """placement.place_tokens by one kernel."""
    if len(blocks):
        place_kernel[(triton.cdiv(len(blocks), 256),)](
            of_tokens, places, blocks, slots, rank, spare_block, len(blocks),
            RANKS=interleave.ranks, SIZE=interleave.size, BLOCK=256,
        )  # fmt: skip
