"""Parts of attention merged by one Triton kernel: those of a kernel's programs, those of a dim group, and
what other libraries' kernels have computed, on its way to that group.

The mathematics is merge.merge_partials: weights exp(lse_j - max lse) in fp32, natural logarithms; parts that
are all empty give 0 and -inf. A sink is where the sums of a dim group start: maximum its logit, total 1.

T tokens, N query heads, D head dimension, m parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helix_megatron.kernels.new_tokens import OfHeads
from helix_megatron.kernels.triton_plan import holder

MANY_ROWS = 4096  # of tokens times heads: their merge fills the device anyway


@triton.jit
def _merged(outs, lses, top, total, number, out_p, lse_p, out_late, lse_late, dim, D: tl.constexpr,
            PARTS: tl.constexpr, DIMS: tl.constexpr):  # fmt: skip
    # part k at outs + k * out_p + dim and lses + k * lse_p, part 0 further on by out_late and lse_late
    # top, total [1]: -inf and 0; with a sink its logit and 1
    acc = tl.zeros([DIMS], tl.float32)
    for at in range(0, number, PARTS):
        part = at + tl.arange(0, PARTS)
        there = part < number
        late = (part == 0).to(tl.int64)
        place = part.to(tl.int64)
        lse = tl.load(lses + place * lse_p + late * lse_late, mask=there, other=float("-inf"))
        out = tl.load(
            outs + (place * out_p + late * out_late)[:, None] + dim[None, :],
            mask=there[:, None] & (dim < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        greater = tl.maximum(top, tl.max(lse, axis=0))
        finite = tl.where(greater == float("-inf"), 0.0, greater)
        weight = tl.exp(lse - tl.sum(finite, axis=0))
        shrink = tl.exp(top - finite)
        total = total * shrink + tl.sum(weight, axis=0)
        acc = acc * shrink + tl.sum(weight[:, None] * out, axis=0)
        top = greater
    some = total > 0
    log = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    return acc / tl.where(some, total, 1.0), log


@triton.jit(do_not_specialize=["number", "out_piece", "lse_piece"])  # pieces grow with the step
def combine_kernel(
    outs, lses, sinks, out, lse, number, out_piece, out_t, out_n, lse_piece, lse_t, lse_n,
    N: tl.constexpr, D: tl.constexpr, WITH_SINKS: tl.constexpr, WITH_LSE: tl.constexpr, PARTS: tl.constexpr,
    DIMS: tl.constexpr, UNIT: tl.constexpr, LSE_UNIT: tl.constexpr,
):  # fmt: skip
    # piece k at outs + k * out_piece * UNIT and lses + k * lse_piece * LSE_UNIT
    token, head = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    top, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    if WITH_SINKS:
        top, total = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32), total + 1
    merged, log = _merged(
        outs + token * out_t + head * out_n, lses + token * lse_t + head * lse_n, top, total, number,
        out_piece.to(tl.int64) * UNIT, lse_piece.to(tl.int64) * LSE_UNIT, 0, 0, dim, D, PARTS, DIMS,
    )  # fmt: skip
    row = token * N + head
    tl.store(out + row * D + dim, merged, mask=dim < D)
    if WITH_LSE:
        one = tl.arange(0, 1)
        tl.store(lse + row + one, log, mask=tl.program_id(1) + one == 0)


@triton.jit
def store_lse(lse, lse_piece, token, head, log, mask, OF_N: tl.constexpr, COPIES: tl.constexpr):
    # pieces [T, OF_N], lse_piece times 16 bytes apart; each of COPIES gets it
    apart = lse_piece.to(tl.int64) * 4
    to = (head // OF_N) * apart + token.to(tl.int64) * OF_N + head % OF_N
    for copy in tl.static_range(COPIES):
        tl.store(lse + to + copy * apart, log, mask=mask)


@triton.jit
def out_offsets(
    out_piece, token, head, dim, OF_N: tl.constexpr, OF_D: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    # in pieces [T, OF_N, OF_D], out_piece times 16 bytes apart; UNIT elements are 16 bytes
    piece = (head // OF_N + dim // OF_D).to(tl.int64) * out_piece * UNIT
    return piece + (token.to(tl.int64) * OF_N + head % OF_N) * OF_D + dim % OF_D


@triton.jit(
    do_not_specialize=["requests", "programs", "tiles_few", "tiles_many", "out_piece", "lse_piece"],
    do_not_specialize_on_alignment=["plan", "ends"],
)
def merge_programs_kernel(
    parts, logs, plan, ends, out, lse, requests, programs, tiles_few, tiles_many, out_piece, lse_piece,
    N: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, D: tl.constexpr, FEW: tl.constexpr,
    MANY: tl.constexpr, LEAST_FEW: tl.constexpr, LEAST_MANY: tl.constexpr, PARTS: tl.constexpr,
    DIMS: tl.constexpr, OF_N: tl.constexpr, OF_D: tl.constexpr, COPIES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # MANY: tokens of a prompt's tile, 0 without prompts. parts [2P, K, rows, D] of few, then of many
    token, head = tl.program_id(0) // N, tl.program_id(0) % N
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    request = holder(ends, requests, token)
    begin, end = tl.load(ends + request), tl.load(ends + request + 1)
    many = (MANY > 0) & (end - begin > FEW)
    tokens = tl.where(many, MANY, FEW)
    starts = plan + tl.where(many, 2 * tiles_few + 1, 0)
    total = tl.load(starts + tl.where(many, tiles_many, tiles_few))
    share = tl.maximum(tl.cdiv(total, programs), tl.where(many, LEAST_MANY, LEAST_FEW))
    tile = begin // tokens + request + (token - begin) // tokens
    mine = token < end  # else a row that belongs to no request
    start, stop = tl.load(starts + tile, mask=mine, other=0), tl.load(starts + tile + 1, mask=mine, other=0)
    part = start // share
    number = tl.where(start < stop, (stop - 1) // share - part + 1, 0)
    late = (start > part * share).to(tl.int32)
    if number != 1:  # a program alone has written its rows itself
        rows = (N // R) * tokens * R_PAD  # of a place
        row = (head // R) * tokens * R_PAD + (token - begin) % tokens * R_PAD + head % R
        at = (2 * part).to(tl.int64) * rows + row + tl.where(many, 2 * programs * (N // R) * FEW * R_PAD, 0)
        top, sums = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
        merged, log = _merged(
            parts + at * D, logs + at, top, sums, number, 2 * rows * D, 2 * rows, late * rows * D,
            late * rows, dim, D, PARTS, DIMS,
        )  # fmt: skip
        one = tl.arange(0, 1)
        to = out_offsets(out_piece, token + dim * 0, head, dim, OF_N, OF_D, UNIT)
        tl.store(out + to, merged, mask=dim < D)
        store_lse(lse, lse_piece, token + one, head, log, tl.program_id(1) + one == 0, OF_N, COPIES)


@triton.jit(
    do_not_specialize=["rows", "first", "out_piece", "lse_piece", "lse_t", "lse_n", "more_lse_n"],
    do_not_specialize_on_alignment=["parts", "lses"],  # of rows behind single tokens too
)
def pack_kernel(
    out, lse, more, more_lse, parts, outs, lses, rows, first, out_piece, lse_piece, out_t, out_n, lse_t,
    lse_n, more_t, more_n, more_lse_t, more_lse_n,
    N: tl.constexpr, D: tl.constexpr, WITH_PARTS: tl.constexpr, MORE: tl.constexpr, DIMS: tl.constexpr,
    OF_N: tl.constexpr, OF_D: tl.constexpr, COPIES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    # MORE: heads of the part that is merged into those from `first` on, 0 without
    token, head = (tl.program_id(0) // N).to(tl.int64), tl.program_id(0) % N
    dim, one = tl.arange(0, DIMS), tl.arange(0, 1)
    there = token + one < rows
    if WITH_PARTS:
        part = tl.load(parts + token + one).to(tl.int32)
        there = there & (part > 1)
    log = tl.load(lse + token * lse_t + head * lse_n + one, mask=there, other=float("-inf"))
    acc = tl.load(out + token * out_t + head * out_n + dim, mask=there & (dim < D), other=0.0).to(tl.float32)
    if MORE > 0:
        mine = (head >= first) & (head < first + MORE) & (part > 0)
        of_more = head - first
        log_more = tl.load(
            more_lse + token * more_lse_t + of_more * more_lse_n + one, mask=mine, other=float("-inf")
        )
        added = tl.load(
            more + token * more_t + of_more * more_n + dim, mask=mine & (dim < D), other=0.0
        ).to(tl.float32)  # fmt: skip
        top = tl.maximum(log, log_more)
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight, weight_more = tl.exp(log - finite), tl.exp(log_more - finite)
        total = weight + weight_more
        some = total > 0
        acc = (acc * weight + added * weight_more) / tl.where(some, total, 1.0)
        log = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    to = out_offsets(out_piece, token + dim * 0, head, dim, OF_N, OF_D, UNIT)
    tl.store(outs + to, acc, mask=dim < D)
    store_lse(lses, lse_piece, token + one, head, log, one == 0, OF_N, COPIES)


def write_partials(
    out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor, parts: Tensor | None, more: OfHeads | None
) -> None:
    """merge.write_partials by one kernel; pieces as of_pieces wants them."""
    tokens, (heads, dim) = outs.shape[1], out.shape[1:]
    if not tokens:
        return
    to, pieces = of_pieces(outs, lses, heads, dim)
    out = out if out.stride(-1) == 1 else out.contiguous()
    first, added, added_lse = more or OfHeads(0, out, lse)
    assert added.stride(-1) == 1
    pack_kernel[(tokens * heads,)](
        out, lse, added, added_lse, lse if parts is None else parts, outs, lses, len(out), first, *to,
        *out.stride()[:2], *lse.stride(), *added.stride()[:2], *added_lse.stride(), N=heads, D=dim,
        WITH_PARTS=parts is not None, MORE=added.shape[1] if more else 0, DIMS=triton.next_power_of_2(dim),
        **pieces, num_warps=1,
    )  # fmt: skip


def merge_block(rows: int, dim: int) -> dict[str, int]:
    """Parts and dimensions that a program takes at a time: of a few rows many parts, by several programs."""
    dims = triton.next_power_of_2(dim)
    return dict(PARTS=128, DIMS=min(32, dims)) if rows < MANY_ROWS else dict(PARTS=16, DIMS=dims)


def combine_partials(
    outs: Tensor, lses: Tensor, dtype: torch.dtype, with_lse: bool = False, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """merge.combine_partials by one kernel."""
    number, tokens, heads, dim = outs.shape
    if outs.stride(-1) != 1:
        outs = outs.contiguous()
    (out_piece, unit), (lse_piece, lse_unit) = (_apart(x) for x in (outs, lses))
    out = torch.empty(tokens, heads, dim, dtype=dtype, device=outs.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=outs.device) if with_lse else None
    if out.numel():
        dims = min(128, triton.next_power_of_2(dim))
        combine_kernel[(tokens * heads, triton.cdiv(dim, dims))](
            outs, lses, lses if sinks is None else sinks, out, lse if with_lse else lses, number,
            out_piece, *outs.stride()[1:3], lse_piece, *lses.stride()[1:], N=heads, D=dim,
            WITH_SINKS=sinks is not None, WITH_LSE=with_lse, PARTS=min(16, triton.next_power_of_2(number)),
            DIMS=dims, UNIT=unit, LSE_UNIT=lse_unit, num_warps=1,
        )  # fmt: skip
    return out, lse


def _apart(pieces: Tensor) -> tuple[int, int]:
    """How far pieces are apart, and the elements that this counts: those of 16 bytes, where it is whole."""
    unit = 16 // pieces.element_size()
    return (pieces.stride(0) // unit, unit) if pieces.stride(0) % unit == 0 else (pieces.stride(0), 1)


def of_pieces(outs: Tensor, lses: Tensor, heads: int, dim: int) -> tuple[tuple[int, int], dict[str, int]]:
    """How far the pieces of outputs and of log-sum-exps are apart, in 16 bytes, and what one of them has.

    Args:
        outs, lses: [pieces, T, N', D'] and [pieces, T, N'] fp32, what is written: whole heads (N' = N/pieces,
            D' = D), or slices of all heads (N' = N, D' = D/pieces), whose log-sum-exps every piece has.
        heads, dim: N, D.
    """
    pieces, _, of_n, of_d = outs.shape
    apart = [x.stride(0) * x.element_size() if pieces > 1 else 0 for x in (outs, lses)]
    assert outs[0].is_contiguous() and lses[0].is_contiguous() and not any(x % 16 for x in apart)
    assert (of_n * pieces, of_d) == (heads, dim) or (of_n, of_d * pieces) == (heads, dim)
    constants = dict(OF_N=of_n, OF_D=of_d, COPIES=1 if of_n < heads else pieces)
    return (apart[0] // 16, apart[1] // 16), constants | dict(UNIT=16 // outs.element_size())
