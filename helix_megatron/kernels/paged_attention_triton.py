"""paged_attention.py as Triton kernels: decode, prompts and both at once, over one rank's pages, with LSE.

The work is dealt to programs in equal shares (Notes in triton_plan.py), decoding requests and prompts each in
a launch; what several programs did of a tile is merged by one kernel (triton_merge.py): two launches for
decoding, three for a mixed step, and one or two for the plan, once for all layers. A token has its range
of slots (Note [A token sees a range of slots] in paged_attention.py); where all tokens of a tile see a whole
step it needs no mask, at the ends slots are compared.

T new tokens, N query heads, K KV heads, R = N/K, D head dimension; 64-bit numbers only where a page begins.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_megatron.kernels import triton_merge
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots, step_of_zeros
from helix_megatron.kernels.triton_merge import (
    merge_block,
    merge_programs_kernel,
    of_pieces,
    out_offsets,
    store_lse,
)
from helix_megatron.kernels.triton_plan import count, holder, plan_kernel, share_of
from helix_megatron.kernels.triton_tiles import SMALLEST_SHARED, Tile, tile_shape
from helix_megatron.partition.grid import HelixConfigError

_LOG2_E = 1.4426950408889634
_OF_INTERPRETER = 8  # programs a KV head, where there is no device to fill


@triton.jit
def _attend_slots(
    q, top, total, acc, keys, values, pages, low, high, first, last, least, most, scale,
    keys_p, keys_s, values_p, values_s,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, PAGED: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # slots low ... high - 1, whole steps; a row sees first ... last - 1, all together least ... most - 1
    dim = tl.arange(0, D_PAD)
    real = (dim < D)[None, :]
    within = tl.arange(0, SLOTS)
    page = tl.load(pages + low // PAGE, mask=low < high, other=0)
    for start in tl.range(low, high, SLOTS, num_stages=STAGES):
        slot = start + within
        kept = (slot >= least) & (slot < most)
        if PAGED:  # the number of the next step's page is under way while this one is computed
            follows = start + SLOTS
            following = tl.load(pages + follows // PAGE, mask=follows < high, other=0)
            base = tl.cast(start % PAGE, tl.int64)
            k_at = keys + page.to(tl.int64) * keys_p + base * keys_s + (within * keys_s)[:, None]
            v_at = values + page.to(tl.int64) * values_p + base * values_s + (within * values_s)[:, None]
            page = following
        else:
            numbers = tl.load(pages + slot // PAGE, mask=kept, other=0).to(tl.int64)
            base = (slot % PAGE).to(tl.int64)
            k_at = keys + (numbers * keys_p + base * keys_s)[:, None]
            v_at = values + (numbers * values_p + base * values_s)[:, None]
        if MASKED:
            k = tl.load(k_at + dim[None, :], mask=kept[:, None] & real, other=0.0)
            v = tl.load(v_at + dim[None, :], mask=kept[:, None] & real, other=0.0)
        elif D == D_PAD:
            k = tl.load(k_at + dim[None, :])
            v = tl.load(v_at + dim[None, :])
        else:
            k = tl.load(k_at + dim[None, :], mask=real, other=0.0)
            v = tl.load(v_at + dim[None, :], mask=real, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # in units of log 2
        if MASKED:
            seen = (slot[None, :] >= first[:, None]) & (slot[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        greater = tl.maximum(top, tl.max(scores, axis=1))
        finite = greater
        if MASKED:
            finite = tl.where(greater == float("-inf"), 0.0, greater)
        probs = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(probs, axis=1)
        acc = acc * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        top = greater
    return top, total, acc


@triton.jit(  # integers come from slices of Megatron's bookkeeping, aligned as it happens
    do_not_specialize=["rank", "left", "tiles", "out_piece", "lse_piece", "table_r"],
    do_not_specialize_on_alignment=["starts", "owners", "ends", "lengths", "table"],
)
def attention_kernel(
    query, keys, values, out, lse, parts, logs, starts, owners, ends, lengths, table,
    scale, rank, left, tiles, out_piece, lse_piece,
    query_t, query_n, keys_p, keys_s, keys_k, values_p, values_s, values_k, table_r,
    N: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, RANKS: tl.constexpr,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, TOKENS: tl.constexpr, R_PAD: tl.constexpr,
    D_PAD: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr, LEAST: tl.constexpr,
    PAGED: tl.constexpr, UPCAST: tl.constexpr, OF_N: tl.constexpr, OF_D: tl.constexpr,
    COPIES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program, kv_head = tl.program_id(0), tl.program_id(1)
    steps = tl.load(starts + tiles)
    share = share_of(steps, tl.num_programs(0), LEAST)
    step = program * share
    final = tl.minimum(step + share, steps)
    row = tl.arange(0, TOKENS * R_PAD)
    head, dim = row % R_PAD, tl.arange(0, D_PAD)
    heads = kv_head * R + head
    while step < final:
        tile = holder(starts, tiles, step)
        start_of_tile, stop_of_tile = tl.load(starts + tile), tl.load(starts + tile + 1)
        request = tl.load(owners + tile)
        begin, end = tl.load(ends + request), tl.load(ends + request + 1)
        begin_of_tile = begin + (tile - begin // TOKENS - request) * TOKENS
        past = tl.load(lengths + request) - end
        # rows of the tile: the R heads of a token after each other
        token = begin_of_tile + row // R_PAD
        there = (token < end) & (head < R)
        least = 0  # slots that one of the tokens sees, and those that all see
        least_of_all = 0
        first = row * 0
        if WINDOW:
            first = count(tl.maximum(token + past - left, 0), rank, RANKS, SIZE)
            least = count(tl.maximum(begin_of_tile + past - left, 0), rank, RANKS, SIZE)
        last = tl.where(there, count(token + past + 1, rank, RANKS, SIZE), 0)
        end_of_tile = tl.minimum(begin_of_tile + TOKENS, end)
        most = count(end_of_tile + past, rank, RANKS, SIZE)
        seen_by_all = count(begin_of_tile + past + 1, rank, RANKS, SIZE) // SLOTS * SLOTS
        if WINDOW:
            hidden = count(tl.maximum(end_of_tile - 1 + past - left, 0), rank, RANKS, SIZE)
            least_of_all = tl.cdiv(hidden, SLOTS) * SLOTS
        until = tl.minimum(stop_of_tile, final)
        low = (least // SLOTS + step - start_of_tile) * SLOTS
        high = (least // SLOTS + until - start_of_tile) * SLOTS
        mask = there[:, None] & (dim < D)[None, :]
        q = tl.load(
            query + token[:, None].to(tl.int64) * query_t + heads[:, None] * query_n + dim[None, :],
            mask=mask, other=0.0,
        )  # fmt: skip
        if UPCAST:
            q = q.to(tl.float32)
        top = tl.full([TOKENS * R_PAD], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS * R_PAD], tl.float32)
        acc = tl.zeros([TOKENS * R_PAD, D_PAD], tl.float32)
        k, v = keys + kv_head * keys_k, values + kv_head * values_k
        pages = table + request.to(tl.int64) * table_r
        if WINDOW:
            top, total, acc = _attend_slots(
                q, top, total, acc, k, v, pages, low, tl.minimum(high, least_of_all), first, last,
                least, most, scale, keys_p, keys_s, values_p, values_s,
                D, D_PAD, PAGE, SLOTS, PAGED, True, 1, UPCAST,
            )  # fmt: skip
            low = tl.maximum(low, least_of_all)
        top, total, acc = _attend_slots(
            q, top, total, acc, k, v, pages, low, tl.minimum(high, seen_by_all), first, last, least, most,
            scale, keys_p, keys_s, values_p, values_s, D, D_PAD, PAGE, SLOTS, PAGED, False, STAGES, UPCAST,
        )  # fmt: skip
        top, total, acc = _attend_slots(
            q, top, total, acc, k, v, pages, tl.maximum(low, seen_by_all), high, first, last, least, most,
            scale, keys_p, keys_s, values_p, values_s, D, D_PAD, PAGE, SLOTS, PAGED, True, 1, UPCAST,
        )  # fmt: skip
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        log = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
        if (step == start_of_tile) & (until == stop_of_tile):
            store_lse(lse, lse_piece, token, heads, log, there, OF_N, COPIES)
            offsets = out_offsets(out_piece, token[:, None], heads[:, None], dim[None, :], OF_N, OF_D, UNIT)
            tl.store(out + offsets, acc, mask=mask)
        else:
            place = 2 * program + (step > program * share).to(tl.int32)
            to = (place * tl.num_programs(1) + kv_head).to(tl.int64) * (TOKENS * R_PAD) + row
            tl.store(logs + to, log, mask=there)
            tl.store(parts + to[:, None] * D + dim[None, :], acc, mask=mask)
        step = until


INTERPRETED = not isinstance(attention_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET is set


@dataclass(frozen=True)
class _Launch:
    """One launch of attention_kernel: over requests of few new tokens, or of many.

    Args:
        tile: of its programs.
        tiles: how many there may be.
        starts, owners: the plan.
    """

    tile: Tile
    tiles: int
    starts: Tensor
    owners: Tensor


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: bool = False,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """attend_into memory of its own: output [T, N, D] in the query's dtype, log-sum-exp [T, N] fp32."""
    outs = torch.empty(1, *query.shape, dtype=query.dtype, device=query.device)
    lses = torch.empty(1, *query.shape[:2], dtype=torch.float32, device=query.device)
    attend_into(outs, lses, query, keys, values, requests, visible, singles, programs)
    return outs[0], lses[0]


def attend_into(
    outs: Tensor,
    lses: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: bool = False,
    programs: int | None = None,
) -> None:
    """Attention of every new token over the slots it sees. Rows that belong to no request give 0 and -inf.

    No value is asked of the device. The plan is kept in `requests`, for the other layers of the step: when
    their tensors are filled anew for the next step, Requests.refill makes it anew, where it is.

    Args:
        outs, lses: pieces as of_pieces has them, in the query's dtype and in fp32, written; each is
            contiguous, and they are a multiple of 16 bytes apart.
        query: [T, N, D].
        keys, values: [pages, page, K, D]; the last dimension contiguous.
        singles: no request has more than one new token.
        programs: that share the work; None to fill the device.
    """
    tokens, heads, dim = query.shape
    page, kv_heads = keys.shape[1:3]
    query, keys, values = (_dense_last(x) for x in (query, keys, values))
    if not tokens:
        return
    if not len(requests.lengths):
        outs.zero_(), lses.fill_(float("-inf"))
        return
    to, pieces = of_pieces(outs, lses, heads, dim)
    ratio, dims = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    padded = triton.next_power_of_2(ratio)
    size = max(query.element_size(), keys.element_size())
    tiles = _tiles(padded, dims, size, page, singles, _shared_bytes(query.device))
    _check_strides(keys, values, tiles[0].slots)
    plan, launches, given = _plan(requests, visible, tokens, tiles, padded)
    programs = programs or _programs(query.device, kv_heads)
    rows = [2 * programs * kv_heads * launch.tile.rows for launch in launches]
    parts = torch.empty(sum(rows), dim, dtype=torch.float32, device=query.device)
    logs = torch.empty(sum(rows), dtype=torch.float32, device=query.device)
    for launch, part, log in zip(launches, parts.split(rows), logs.split(rows), strict=True):
        tile = launch.tile
        attention_kernel[(programs, kv_heads)](
            query, keys, values, outs, lses, part, log, launch.starts, launch.owners, given.query_ends,
            given.lengths, given.table, visible.softmax_scale * _LOG2_E, visible.rank, visible.left or 0,
            launch.tiles, *to,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], given.table.stride(0),
            N=heads, R=ratio, D=dim, PAGE=page, RANKS=visible.interleave.ranks, SIZE=visible.interleave.size,
            WINDOW=visible.left is not None, TOKENS=tile.rows // padded, R_PAD=padded, D_PAD=dims,
            SLOTS=tile.slots, STAGES=tile.stages, LEAST=tile.least, PAGED=tile.paged,
            UPCAST=INTERPRETED,  # the interpreter cannot multiply bf16
            **pieces, num_warps=tile.warps,
        )  # fmt: skip
    few, many = launches[0], launches[-1]
    block = merge_block(tokens * heads, dim)
    merge_programs_kernel[(tokens * heads, triton.cdiv(dim, block["DIMS"]))](
        parts, logs, plan, given.query_ends, outs, lses, len(given.lengths), programs, few.tiles,
        many.tiles, *to, N=heads, R=ratio, R_PAD=padded, D=dim, FEW=few.tile.rows // padded,
        MANY=many.tile.rows // padded if len(launches) > 1 else 0,
        LEAST_FEW=few.tile.least, LEAST_MANY=many.tile.least, **pieces, **block,
    )  # fmt: skip


def _plan(
    requests: Requests, visible: VisibleSlots, tokens: int, tiles: tuple[Tile, ...], padded: int
) -> tuple[Tensor, list[_Launch], Requests]:
    """Who does what, worked out by a step's first layer: the plan, its launches, the requests in int32."""
    given, number = requests.for_kernels(), len(requests.lengths)

    def make() -> tuple[Tensor, list[_Launch]]:
        numbers = [tokens // (tile.rows // padded) + number for tile in tiles]
        plan = torch.empty(sum(2 * n + 1 for n in numbers), dtype=torch.int32, device=given.lengths.device)
        launches, at = [], 0
        for tile, n in zip(tiles, numbers, strict=True):
            starts, owners = plan[at : at + n + 1], plan[at + n + 1 : at + 2 * n + 1]
            launches.append(_Launch(tile, n, starts, owners))
            at += 2 * n + 1
        return plan, launches

    def fill(made: tuple[Tensor, list[_Launch]]) -> None:
        for launch in made[1]:
            plan_kernel[(1,)](
                given.query_ends, given.lengths, launch.starts, launch.owners, visible.rank,
                visible.left or 0, number, launch.tiles, number.bit_length(),
                RANKS=visible.interleave.ranks, SIZE=visible.interleave.size,
                WINDOW=visible.left is not None, TOKENS=launch.tile.rows // padded, SLOTS=launch.tile.slots,
                FEW=tiles[0].rows // padded, MANY=launch is not made[1][0], BLOCK=256,
            )  # fmt: skip

    key = ("plan", visible.interleave, visible.rank, visible.left, tokens, tiles, padded)
    return *requests.keep(key, make, fill), given


@functools.cache
def _tiles(ratio: int, dim: int, itemsize: int, page: int, singles: bool, shared: int) -> tuple[Tile, ...]:
    """The tiles of requests with few new tokens, and, unless there are single ones only, of those with many.

    Of the former two fit a multiprocessor where the memory allows: one reads while the other computes.
    """
    try:
        few = tile_shape(16, ratio, dim, itemsize, page, shared // 2)
    except HelixConfigError:
        few = tile_shape(16, ratio, dim, itemsize, page, shared)
    return (few,) if singles else (few, tile_shape(64, ratio, dim, itemsize, page, shared))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return SMALLEST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED)


def _programs(device: torch.device, kv_heads: int) -> int:
    """Programs of a KV head: all together two on every multiprocessor."""
    if device.type != "cuda":
        return _OF_INTERPRETER
    return max(1, 2 * torch.cuda.get_device_properties(device).multi_processor_count // kv_heads)


def warm_up(
    keys: Tensor,
    values: Tensor,
    heads: int,
    dtype: torch.dtype,
    visible: VisibleSlots,
    piece: tuple[int, int] | None = None,
    row: int | None = None,
) -> None:
    """Compile what attention over this cache will need, so that no request waits for it.

    Args:
        keys, values: [pages, page, K, D], the cache itself, or one of its layers; read, not written.
        heads: N, query heads of this rank.
        dtype: of the queries.
        visible: of one layer; those with a window and those without are apart.
        piece: N', D' of what attend_into writes; None for paged_attention.
        row: heads from a token's first to the next token's; None for N.
    """
    rows = -(-triton_merge.MANY_ROWS // heads)  # so that both ways of merging are met
    steps = (([1], True), ([1] * rows, True), ([1, 2], False), ([1, rows], False))
    for new, singles in steps:
        query, requests, into = step_of_zeros(new, keys, heads, dtype, piece, row)
        attend_into(*into, query, keys, values, requests, visible, singles)


def _check_strides(keys: Tensor, values: Tensor, slots: int) -> None:
    """Offsets within a step and of a head are 32-bit numbers."""
    farthest = max(slots * x.stride(1) + x.shape[2] * x.stride(2) for x in (keys, values))
    if farthest >= 2**31:
        raise HelixConfigError(
            f"the KV cache's slots are {max(keys.stride(1), values.stride(1))} elements apart: the Triton "
            f"kernel wants {slots} of them within 2^31 elements; serve fewer sequences at a time"
        )


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
