"""FlashAttention over a rank's pages: found, and given what it asks for.

FlashAttention 3   `flash_attn_3`, `flashattn_hopper` or `flash_attn_interface`; pages of any size; SM 8 and 9
FlashAttention 2   `flash_attn`; pages of a multiple of 256; its decode kernel waits for the device in every
                   call with pages, and that for several tokens does not split the keys of a request
FlashAttention 4   not used: with split KV, which single tokens want, it stops with an assertion on SM 9.0

Both see a request's keys as one range from its first slot on, which holds without a window for single tokens,
and for what was cached before the step (Note [Cached and new keys apart] in new_tokens.py). Before its first
use a kernel computes a small case of which the answer is known (known_case.py).

T new tokens, N query heads, K KV heads (K divides N), D head dimension.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helix_megatron.kernels.merge import write_partials
from helix_megatron.kernels.new_tokens import OfHeads, kv_heads_for, share_of_heads
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.measure.machine import installed_version
from helix_megatron.partition.grid import HelixConfigError


@dataclass(frozen=True)
class Flash:
    """One generation.

    Args:
        name: in choices and messages.
        version: as --flash-attention-version counts.
        modules: that may have flash_attn_with_kvcache; the first that has it counts.
        distributions: whose version is told.
        table: what it calls the block table.
        needs: parameters without which a kernel is too old.
        varlen_needs: the same of flash_attn_varlen_func.
        several: new tokens of a request from which on its kernels are better at several than our own.
        page: of which the tokens of a page must be a multiple.
        majors: of the compute capabilities that it is made for.
        waits: it asks the device for a value.
    """

    name: str
    version: int
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    table: str
    needs: tuple[str, ...]
    varlen_needs: tuple[str, ...]
    several: int
    page: int
    majors: tuple[int, ...]
    waits: bool


FLASH = {
    flash.name: flash
    for flash in (
        Flash(
            "flash-attn-3",
            3,
            (
                "flash_attn_3.flash_attn_interface",
                "flashattn_hopper.flash_attn_interface",
                "flash_attn_interface",
            ),
            ("flash-attn-3", "flashattn-hopper"),
            "page_table",
            ("cache_seqlens", "page_table", "pack_gqa", "return_softmax_lse"),
            ("return_attn_probs",),
            2,
            1,
            (8, 9),
            False,
        ),
        Flash(
            "flash-attn-2",
            2,
            ("flash_attn",),
            ("flash-attn",),
            "block_table",
            ("cache_seqlens", "block_table", "return_softmax_lse"),
            ("block_table", "return_attn_probs"),
            64,  # rows of its tiles; with fewer, few programs would read many keys
            256,
            (8, 9, 10, 11, 12),
            True,
        ),
    )
}


@functools.cache
def _installed(name: str) -> tuple[Any, str]:
    """A generation's module and how to call it in a message; or None and why it cannot be used.

    The function itself is asked for: a package alone may be another generation's (FlashAttention 4 is a
    folder in `flash_attn`, and has none).
    """
    flash, reasons = FLASH[name], []
    for module in flash.modules:
        try:
            found = importlib.import_module(module)
            kernel = found.flash_attn_with_kvcache
        except Exception as error:  # a library built for another torch fails with anything
            absent = isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0])
            if not absent:
                why = " ".join(str(error).split())
                reasons.append(f"flash_attn_with_kvcache of {module} cannot be imported: {why}")
            continue
        missing = _missing(kernel, flash.needs)
        if missing:
            reasons.append(f"{module} is of another age: its kernel has no {missing}")
            continue
        version = installed_version(*flash.distributions) or getattr(found, "__version__", "of some version")
        return found, f"{name} {version} ({module})"
    return None, "; ".join(reasons) or f"{name} is not installed"


def _missing(kernel: Callable, needs: tuple[str, ...]) -> str:
    parameters = inspect.signature(kernel).parameters
    return " and no ".join(word for word in needs if word not in parameters)


def find(name: str) -> tuple[Callable | None, str]:
    """A generation's decode kernel and how to call it in a message; or None and why it cannot be used."""
    module, reason = _installed(name)
    return (None if module is None else module.flash_attn_with_kvcache), reason


def find_varlen(name: str) -> tuple[Callable | None, str]:
    """Its kernel for several new tokens of a request, as `find`."""
    module, reason = _installed(name)
    if module is None:
        return None, reason
    kernel = getattr(module, "flash_attn_varlen_func", None)
    missing = "such kernel" if kernel is None else _missing(kernel, FLASH[name].varlen_needs)
    return (None, f"flash_attn_varlen_func of {reason} has no {missing}") if missing else (kernel, reason)


def attend(
    name: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
    new: tuple[Tensor, Tensor] | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """paged_attention without a window; of single tokens, or with the `new` keys apart.

    What nobody wrote of a page in use must be finite: FlashAttention 3 may read it, with a weight of 0.

    Args:
        query: [T, N, D].
        keys, values: [pages, page, K, D].
        requests: without `new`, row r is the only new token of request r; with it, `longest` is known.
        new: keys and values [T, K, D] of the rows. The result is then this rank's part of attention over all
            that is cached and new, as the note in new_tokens.py deals it; without, over all that it keeps.
        into: as merge.write_partials has it.
    Returns:
        output [T, N, D], log-sum-exp [T, N] fp32; None with `into`.
    """
    outs, lses = into or (
        torch.empty(1, *query.shape, dtype=query.dtype, device=query.device),
        torch.empty(1, *query.shape[:2], dtype=torch.float32, device=query.device),
    )
    if not len(query) or not len(requests.lengths):
        outs.zero_(), lses.fill_(float("-inf"))
    elif new is None:
        step = _of_step(requests, visible, len(query), singles=True)
        write_partials(*_single_tokens(name, query, keys, values, step, visible), outs, lses, step.parts)
    else:
        step = _of_step(requests, visible, len(query), singles=False)
        cached = _over_cache(name, query, keys, values, step, visible)
        write_partials(*cached, outs, lses, step.parts, _of_new_tokens(name, query, *new, step, visible))
    return None if into else (outs[0], lses[0])


def _single_tokens(
    name: str, query: Tensor, keys: Tensor, values: Tensor, step: _Step, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """Output [rows, N, D] and log-sum-exp [rows, N] of as many rows as there are requests."""
    rows = min(len(step.kept), len(query))
    out, lse, *_ = _kernel(find, name)(
        q=query[:rows, None],
        k_cache=keys,
        v_cache=values,
        cache_seqlens=step.kept[:rows],
        softmax_scale=visible.softmax_scale,
        causal=False,
        return_softmax_lse=True,
        **{FLASH[name].table: step.table[:rows]},
        **_packing(name, query, keys),
    )  # [rows, 1, N, D], [rows, N, 1]
    return out[:, 0], lse[:, :, 0]


def _over_cache(
    name: str, query: Tensor, keys: Tensor, values: Tensor, step: _Step, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and log-sum-exp [T, N] over what was kept before the step: no mask."""
    options: dict[str, Any] = dict(cu_seqlens_q=step.ends, max_seqlen_q=step.longest, causal=False)
    options |= {"softmax_scale": visible.softmax_scale, FLASH[name].table: step.table}
    if name == "flash-attn-3":
        options |= _packing(name, query, keys)
        out, lse, *_ = _kernel(find, name)(
            q=query, k_cache=keys, v_cache=values, cache_seqlens=step.kept, return_softmax_lse=True, **options
        )
    else:
        out, lse, *_ = _kernel(find_varlen, name)(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_k=step.kept_ends,
            max_seqlen_k=step.table.shape[1] * keys.shape[1],
            return_attn_probs=True,
            **options,
        )
    return out, _by_token(name, lse, query)


def _of_new_tokens(
    name: str, query: Tensor, key: Tensor, value: Tensor, step: _Step, visible: VisibleSlots
) -> OfHeads | None:
    """What the new tokens of a request see of each other, for this rank's share of the heads."""
    heads, kv_heads = query.shape[1], key.shape[1]
    share = share_of_heads(heads, visible.interleave.ranks, visible.rank)
    if not share:
        return None
    query = query[:, share.start : share.stop]
    key, value = (kv_heads_for(x, share, heads // kv_heads) for x in (key, value))
    out, lse, *_ = _kernel(find_varlen, name)(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=step.ends,
        cu_seqlens_k=step.ends,
        max_seqlen_q=step.longest,
        max_seqlen_k=step.longest,
        softmax_scale=visible.softmax_scale,
        causal=True,
        return_attn_probs=True,
    )
    return OfHeads(share.start, out, _by_token(name, lse, query))


def _kernel(finder: Callable, name: str) -> Callable:
    kernel, reason = finder(name)
    if kernel is None:
        raise HelixConfigError(reason)
    return kernel


def _packing(name: str, query: Tensor, keys: Tensor) -> dict[str, bool]:
    """FlashAttention 3 reads a KV head once for its query heads."""
    return dict(pack_gqa=query.shape[1] != keys.shape[2]) if name == "flash-attn-3" else {}


def _by_token(name: str, lse: Tensor, query: Tensor) -> Tensor:
    """[N, T] to [T, N]; before flash-attn 2.6 it was [B, N, longest]."""
    tokens, heads = query.shape[:2]
    if lse.shape != (heads, tokens):
        raise HelixConfigError(
            f"{find(name)[1]} gives log-sum-exps {list(lse.shape)} for {tokens} tokens of {heads} heads, not "
            f"[{heads}, {tokens}]: it is of another age"
        )
    return lse.T


class _Step(NamedTuple):
    """What FlashAttention is told of a step, for all its layers; integers are int32.

    Args:
        kept: [requests] slots that are attended over.
        parts: [T] as write_partials.
        table: [requests, pages].
        ends: [requests + 1] cumulative numbers of new tokens.
        kept_ends: [requests + 1] of slots kept.
        longest: no request has more new tokens; 2 at least, as one is a case of its own in FlashAttention.
    """

    kept: Tensor
    parts: Tensor
    table: Tensor
    ends: Tensor
    kept_ends: Tensor
    longest: int


def _of_step(requests: Requests, visible: VisibleSlots, tokens: int, singles: bool) -> _Step:
    """Made by a step's first layer."""
    given = requests.for_kernels()

    def make() -> _Step:
        device = given.lengths.device
        parts = torch.zeros(tokens, dtype=torch.uint8, device=device)
        kept_ends = torch.zeros_like(given.query_ends)
        longest = max(2, min(requests.longest or 1, tokens))
        return _Step(
            torch.empty_like(given.lengths), parts, given.table, given.query_ends, kept_ends, longest
        )

    def fill_singles(step: _Step) -> None:
        step.kept.copy_(visible.last(given.lengths - 1))
        rows = min(tokens, len(step.kept))
        step.parts[:rows].copy_(step.kept[:rows] > 0).mul_(2)

    def fill_several(step: _Step) -> None:
        before = given.lengths - given.query_ends.diff()
        step.kept.copy_(visible.last(before - 1))
        torch.cumsum(step.kept, 0, dtype=torch.int32, out=step.kept_ends[1:])
        of_requests = torch.cat([(step.kept > 0).to(torch.uint8) + 1, step.parts.new_zeros(1)])
        rows = torch.arange(tokens, dtype=torch.int32, device=step.parts.device)
        torch.index_select(
            of_requests, 0, torch.searchsorted(given.query_ends[1:], rows, right=True), out=step.parts
        )

    key = ("flash", visible.interleave, visible.rank, tokens, singles)
    return requests.keep(key, make, fill_singles if singles else fill_several)
