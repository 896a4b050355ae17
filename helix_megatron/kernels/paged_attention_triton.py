"""paged_attention.py as a Triton kernel: decode, prompts and both at once, over one rank's pages, with LSE.

Note [Work of a program]
    program (tile, KV head, split): some tokens of ONE request, all query heads of one KV head, part of the
    slots. Tokens are packed without a list of tiles: request i gets the tiles from ends[i] // TOKENS + i on,
    which leaves one empty tile a request at most and lets a program find its request by bisection. A token
    has its range of slots (see Note [A token sees a range of slots]); the tile reads from the least to the
    greatest and masks by comparing slots, so windows and interleaved positions cost no mask in memory. Splits
    cut a tile's slots when there are too few tiles to fill the device; their parts merge as shards do.

T new tokens, N query heads, K KV heads, R = N/K, D head dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_megatron.kernels.merge import merge_partials
from helix_megatron.kernels.paged_attention import Requests, Sight

_SLOTS = 64  # slots of one step of a program
_INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _count(length, rank, RANKS: tl.constexpr, SIZE: tl.constexpr):
    # KvInterleave.count
    rest = length % (RANKS * SIZE) - rank * SIZE
    return length // (RANKS * SIZE) * SIZE + tl.minimum(tl.maximum(rest, 0), SIZE)


@triton.jit
def _kernel(
    query, keys, values, out, lse, ends, lengths, table,
    scale, rank, left, requests, tokens,
    query_t, query_n, keys_p, keys_s, keys_k, values_p, values_s, values_k, table_r,
    N: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, RANKS: tl.constexpr,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr,
    R_PAD: tl.constexpr, D_PAD: tl.constexpr, SLOTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low, high = 0, requests  # the last request whose first tile is not after this one
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(ends + middle) // TOKENS + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin, end = tl.load(ends + low), tl.load(ends + low + 1)
    begin_of_tile = begin + (tile - begin // TOKENS - low) * TOKENS
    if begin_of_tile < end:
        # rows of the tile: [TOKENS * R_PAD], the R heads of a token after each other
        row = tl.arange(0, TOKENS * R_PAD)
        token, head = begin_of_tile + row // R_PAD, row % R_PAD
        there = (token < end) & (head < R)
        position = tl.load(lengths + low) - (end - token)
        last = tl.where(there, _count(position + 1, rank, RANKS, SIZE), 0)
        if WINDOW:  # noqa: SIM108
            first = _count(tl.maximum(position - left, 0), rank, RANKS, SIZE)
        else:
            first = position * 0
        start = tl.min(tl.where(there, first, 2147483647), axis=0)
        stop = tl.max(last, axis=0)
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), SPLITS), SLOTS) * SLOTS
            start = start + split * share
            stop = tl.minimum(stop, start + share)
        dim = tl.arange(0, D_PAD)
        heads = kv_head * R + head
        q = tl.load(
            query + token[:, None].to(tl.int64) * query_t + heads[:, None] * query_n + dim[None, :],
            mask=there[:, None] & (dim < D)[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            q = q.to(tl.float32)
        top = tl.full([TOKENS * R_PAD], float("-inf"), tl.float32)
        total = tl.zeros([TOKENS * R_PAD], tl.float32)
        acc = tl.zeros([TOKENS * R_PAD, D_PAD], tl.float32)
        for step in range(start, stop, SLOTS):
            slot = step + tl.arange(0, SLOTS)
            kept = slot < stop
            page = tl.load(table + low * table_r + slot // PAGE, mask=kept, other=0).to(tl.int64)
            of_head = kept[:, None] & (dim < D)[None, :]
            place = page * keys_p + (slot % PAGE) * keys_s + kv_head * keys_k
            k = tl.load(keys + place[:, None] + dim[None, :], mask=of_head, other=0.0)
            place = page * values_p + (slot % PAGE) * values_s + kv_head * values_k
            v = tl.load(values + place[:, None] + dim[None, :], mask=of_head, other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # in units of log 2
            seen = (slot[None, :] >= first[:, None]) & (slot[None, :] < last[:, None]) & kept[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            greater = tl.maximum(top, tl.max(scores, axis=1))
            finite = tl.where(greater == float("-inf"), 0.0, greater)
            probs = tl.exp2(scores - finite[:, None])
            shrink = tl.exp2(top - finite)
            total = total * shrink + tl.sum(probs, axis=1)
            acc = acc * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
            top = greater
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        log = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453, float("-inf"))
        to = (split * tokens + token).to(tl.int64) * N + heads
        tl.store(lse + to, log, mask=there)
        tl.store(out + to[:, None] * D + dim[None, :], acc, mask=there[:, None] & (dim < D)[None, :])


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, sight: Sight, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every new token over the slots it sees. Rows that belong to no request give 0 and -inf.

    No value is asked of the device.

    Args:
        query: [T, N, D].
        keys, values: [pages, page, K, D]; the last dimension contiguous.
        splits: parts into which the slots of a tile are cut; None to fill the device.
    Returns:
        output [T, N, D] in the query's dtype, log-sum-exp [T, N] fp32.
    """
    tokens, heads, dim = query.shape
    page, kv_heads = keys.shape[1:3]
    count, ratio = len(requests.lengths), heads // kv_heads
    padded = triton.next_power_of_2(ratio)
    rows = 16 if tokens <= count else 64  # one token a request: the least that a tensor core takes
    per_tile = max(1, rows // padded)
    tiles = tokens // per_tile + count
    if splits is None:
        splits = _splits(tiles * kv_heads, requests.table.shape[1] * page, query.device)
    query, table = _dense_last(query), _dense_last(requests.table)
    keys, values = _dense_last(keys), _dense_last(values)
    dtype = query.dtype if splits == 1 else torch.float32
    out = torch.zeros(splits, tokens, heads, dim, dtype=dtype, device=query.device)
    lse = torch.full((splits, tokens, heads), float("-inf"), dtype=torch.float32, device=query.device)
    if tokens and count:
        _kernel[(tiles, kv_heads, splits)](
            query, keys, values, out, lse, requests.query_ends.contiguous(), requests.lengths.contiguous(),
            table, sight.softmax_scale * 1.4426950408889634, sight.rank, sight.left or 0, count, tokens,
            *query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], table.stride(0),
            N=heads, R=ratio, D=dim, PAGE=page, RANKS=sight.interleave.ranks, SIZE=sight.interleave.size,
            WINDOW=sight.left is not None, SPLITS=splits, TOKENS=per_tile, R_PAD=padded,
            D_PAD=max(16, triton.next_power_of_2(dim)), SLOTS=_SLOTS,
            UPCAST=_INTERPRETED,  # the interpreter cannot multiply bf16
        )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    merged, lse_merged = merge_partials(out, lse)
    return merged.to(query.dtype), lse_merged


def _splits(programs: int, slots: int, device: torch.device) -> int:
    """Enough to give every multiprocessor two programs, each at least four steps where the table is full."""
    if device.type != "cuda" or _INTERPRETED:
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(1, programs)
    return max(1, min(wanted, 16, slots // (4 * _SLOTS)))


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
