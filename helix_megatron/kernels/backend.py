"""Attention of new tokens over a rank's part of the KV cache, by the kernel that was selected (selection.py).

    flash-attn-3, flash-attn-2   flash.py
    triton                       paged_attention_triton.py
    torch                        paged_attention.py: PyTorch's fused attention on the CPU, plain on others
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from helix_megatron.kernels import flash
from helix_megatron.kernels.flash import FLASH
from helix_megatron.kernels.merge import write_partials
from helix_megatron.kernels.paged_attention import (
    Requests,
    VisibleSlots,
    paged_attention,
    step_of_zeros,
)
from helix_megatron.kernels.selection import OVERRIDE, Choice, choose_for
from helix_megatron.partition.grid import HelixConfigError


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: int,
    flash_version: int | None = None,
    graph: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
    new: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """A rank's part of attention by the chosen backend: paged_attention; or, with `new` keys, such that the
    parts of all ranks merge to the same (Note [Cached and new keys apart] in new_tokens.py).

    Args:
        query: [T, N, D].
        keys, values: [pages, page, K, D].
        singles: of so many rows at the beginning, row r is the only new token of request r, or padding past
            the last request.
        flash_version: Megatron's --flash-attention-version.
        graph: a CUDA graph of it is captured, or will be: the same backend is taken before.
        into: where it goes, as merge.write_partials has it; the Triton kernel writes there itself, what
            FlashAttention computes one kernel more.
        new: keys and values [T, K, D] of the rows, which the cache has as well; given where every rank of the
            dim group has the same `several` for this cache: parts of another way do not fit together.
    Returns:
        output [T, N, D] in the query's dtype, log-sum-exp [T, N] fp32; 0 and -inf where nothing is seen.
        None with `into`.
    """
    choice = choose_for(keys, query.dtype, visible.left is not None, flash_version, graph)
    cache, rows = (keys, values), len(query)
    if singles < rows and new is not None and _is_better(choice.several, requests):
        assert choice.several is not None
        outs, lses = into or _one_piece(query)
        if singles:  # they have kernels of their own, which share one long request
            own = requests.single_rows(0, singles)
            first = outs[:, :singles], lses[:, :singles]
            _attend(choice.singles, query[:singles], cache, own, visible, True, first)
        rest = (x[singles:] for x in new)
        flash.attend(
            choice.several, query[singles:], *cache, requests.rows(singles, rows, singles), visible,
            (*rest,), (outs[:, singles:], lses[:, singles:]),
        )  # fmt: skip
        return None if into else (outs[0], lses[0])
    single = singles >= rows
    return _attend(choice.singles if single else choice.others, query, cache, requests, visible, single, into)


def _is_better(several: str | None, requests: Requests) -> bool:
    """Whether a FlashAttention that attends over cached and new keys apart is, for these requests."""
    return several is not None and (requests.longest or 0) >= FLASH[several].several


def _one_piece(query: Tensor) -> tuple[Tensor, Tensor]:
    lses = torch.empty(1, *query.shape[:2], dtype=torch.float32, device=query.device)
    return torch.empty(1, *query.shape, dtype=query.dtype, device=query.device), lses


def _attend(
    name: str,
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    requests: Requests,
    visible: VisibleSlots,
    singles: bool,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """paged_attention by a backend; `singles`: all rows are."""
    if into is not None and name == "triton":
        from helix_megatron.kernels import paged_attention_triton

        paged_attention_triton.attend_into(*into, query, *cache, requests, visible, singles)
        return None
    if into is not None and name in FLASH:
        return flash_attention(name, query, *cache, requests, visible, singles, into)
    found = _BACKENDS[name](query, *cache, requests, visible, singles)
    if into is None:
        return found
    write_partials(*found, *into)
    return None


def warm_up(
    keys: Tensor,
    values: Tensor,
    heads: int,
    dtype: torch.dtype,
    visible: VisibleSlots,
    flash_version: int | None = None,
    graph: bool = False,
    piece: tuple[int, int] | None = None,
    row: int | None = None,
) -> Choice:
    """Choose, compare and compile what attention over this cache will need: no request waits for it, and a
    CUDA graph that is being captured, where neither can be, needs it done.

    Args:
        keys, values: [pages, page, K, D], one layer's cache; read, not written.
        heads: N, query heads of this rank.
        dtype: of the queries.
        visible: of a layer with a window, or of one without: they are apart.
        flash_version: Megatron's --flash-attention-version.
        graph: for steps that CUDA graphs are captured of.
        piece: heads and dimensions of a piece, where attention writes `into` pieces.
        row: heads from a token's first to the next token's, where other heads lie between them.
    """
    choice = choose_for(keys, dtype, visible.left is not None, flash_version, graph)
    for name, new in ((choice.singles, [1]), (choice.several, [3, 1])):
        if name in FLASH:
            query, requests, into = step_of_zeros(new, keys, heads, dtype, piece, row)
            new_key = torch.zeros(len(query), *keys.shape[2:], dtype=keys.dtype, device=keys.device)
            its = (new_key, new_key) if len(new) > 1 else None
            flash.attend(name, query, keys, values, requests, visible, its, into)
    if "triton" in (choice.singles, choice.others):
        from helix_megatron.kernels import paged_attention_triton

        paged_attention_triton.warm_up(keys, values, heads, dtype, visible, piece, row)
    return choice


def triton_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: bool = False,
) -> tuple[Tensor, Tensor]:
    """The project's own kernel; Triton is imported when it is first needed."""
    from helix_megatron.kernels import paged_attention_triton

    return paged_attention_triton.paged_attention(query, keys, values, requests, visible, singles)


def torch_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: bool = False,
) -> tuple[Tensor, Tensor]:
    """paged_attention in torch."""
    return paged_attention(query, keys, values, requests, visible)


def flash_attention(
    name: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    singles: bool = True,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """FlashAttention `name` of single tokens."""
    if not singles or visible.left is not None:  # by the override alone
        raise HelixConfigError(
            f"{OVERRIDE}={name}: it has one window for all requests; leave the choice to Helix"
        )
    return flash.attend(name, query, keys, values, requests, visible, into=into)


_BACKENDS = {"torch": torch_attention, "triton": triton_attention} | {
    name: functools.partial(flash_attention, name) for name in FLASH
}
