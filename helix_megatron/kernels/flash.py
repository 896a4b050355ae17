"""FlashAttention's decode kernels over a rank's pages: found, asked, and not trusted blindly.

FlashAttention 3   `flash_attn_3`, `flashattn_hopper` or `flash_attn_interface`; pages of any size; SM 8 and 9
FlashAttention 2   `flash_attn`; pages of a multiple of 256; it waits for the device in every call with pages
FlashAttention 4   not used: with split KV, which single tokens want, it stops with an assertion on SM 9.0

Both see a request's keys as one range from its first slot on, which holds for single tokens without a window.
Before its first use a kernel computes a small case of which the answer is known; one that is wrong, or fails,
is left out by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_megatron.kernels.merge import plain_attention, write_partials
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.measure.machine import installed_version
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave

logger = logging.getLogger(__name__)

_TOLERANCE = 3e-2  # of half precision, for outputs of size 1


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
            256,
            (8, 9, 10, 11, 12),
            True,
        ),
    )
}


@functools.cache
def find(name: str) -> tuple[Callable | None, str]:
    """A generation's decode kernel and how to call it in a message; or None and why it cannot be used.

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
        missing = [word for word in flash.needs if word not in inspect.signature(kernel).parameters]
        if missing:
            reasons.append(f"{module} is of another age: its kernel has no {' and no '.join(missing)}")
            continue
        version = installed_version(*flash.distributions) or getattr(found, "__version__", "of some version")
        return kernel, f"{name} {version} ({module})"
    return None, "; ".join(reasons) or f"{name} is not installed"


def attend(
    name: str, query: Tensor, keys: Tensor, values: Tensor, requests: Requests, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """paged_attention for single tokens: row r is request r's last, and sees all that the rank keeps of it.

    What nobody wrote of a page in use must be finite: FlashAttention 3 may read it, with a weight of 0.
    """
    empty = _of_step(requests, visible)[1]
    out, lse = _attend_rows(name, query, keys, values, requests, visible)
    rows = len(out)
    out = out.masked_fill(empty[:rows, None], 0.0)
    lse = lse.masked_fill(empty[:rows], float("-inf"))  # a kernel may say +inf
    if rows == len(query):
        return out, lse
    outs, lses = torch.zeros_like(query), lse.new_full(query.shape[:2], float("-inf"))
    outs[:rows], lses[:rows] = out, lse
    return outs, lses


def attend_into(
    name: str,
    outs: Tensor,
    lses: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    visible: VisibleSlots,
) -> None:
    """attend, written to the pieces that merge.write_partials has: the kernel has no way to be told."""
    out, lse = _attend_rows(name, query, keys, values, requests, visible)
    write_partials(out, lse, outs, lses, _of_step(requests, visible)[0][: len(out)])


def _attend_rows(
    name: str, query: Tensor, keys: Tensor, values: Tensor, requests: Requests, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """What the kernel says of the rows that a request may have, [rows, N, D] and [rows, N]; anything of those
    that see nothing."""
    kernel, reason = find(name)
    if kernel is None:
        raise HelixConfigError(reason)
    kept, _, table = _of_step(requests, visible)
    rows = min(len(kept), len(query))
    options = dict(pack_gqa=query.shape[1] != keys.shape[2]) if name == "flash-attn-3" else {}
    out, lse, *_ = kernel(
        q=query[:rows, None],
        k_cache=keys,
        v_cache=values,
        cache_seqlens=kept[:rows],
        softmax_scale=visible.softmax_scale,
        causal=False,
        return_softmax_lse=True,
        **{FLASH[name].table: table[:rows]},
        **options,
    )  # [rows, 1, N, D], [rows, N, 1]
    return out[:, 0], lse[:, :, 0]


def _of_step(requests: Requests, visible: VisibleSlots) -> tuple[Tensor, Tensor, Tensor]:
    """[rows] slots kept, [rows, 1] whether there are none, and the table; int32, for all layers of a step."""
    given = requests.for_kernels()

    def make() -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.empty_like(given.lengths)
        return kept, torch.empty(len(kept), 1, dtype=torch.bool, device=kept.device), given.table

    def fill(made: tuple[Tensor, Tensor, Tensor]) -> None:
        kept, empty, _ = made
        kept.copy_(visible.last(given.lengths - 1))
        torch.eq(kept[:, None], 0, out=empty)

    return requests.keep(("flash", visible.interleave, visible.rank), make, fill)


def _known_case(dtype: torch.dtype, page: int, dim: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Query, keys, values, lengths and table of a decode step on the host; its outputs and log-sum-exps.

    Three requests with 6 query heads over 2 KV heads, on scattered pages: one ends in its third page, one in
    its first, one has nothing. What nobody wrote is large, and finite: a kernel may read it with weight 0.
    """
    generator = torch.Generator().manual_seed(1)
    lengths, table = [2 * page + min(3, page), min(5, page), 0], [[4, 1, 3], [2, 0, 0], [0, 0, 0]]
    keys, values = torch.full((2, 5, page, 2, dim), 100.0, dtype=dtype)
    query = torch.randn(3, 6, dim, generator=generator).to(dtype)
    outs, lses = torch.zeros(3, 6, dim), torch.full((3, 6), float("-inf"))
    for row, length in enumerate(lengths[:2]):
        key, value = torch.randn(2, length, 2, dim, generator=generator).to(dtype)
        for cache, written in ((keys, key), (values, value)):
            for start in range(0, length, page):
                piece = written[start : start + page]
                cache[table[row][start // page], : len(piece)] = piece
        out, lse = plain_attention(
            query[row, None, None], key[:, None], value[:, None], None, softmax_scale=dim**-0.5
        )
        outs[row], lses[row] = out[0, 0].float(), lse[0, 0]
    integers = (torch.tensor(given, dtype=torch.int32) for given in (lengths, table))
    return (query, keys, values, *integers), outs, lses


@functools.cache
def known_case_error(name: str, device: str, dtype: torch.dtype, page: int, dim: int) -> str | None:
    """What is wrong with a kernel, by a small case of a known answer; None when it is right. Asked once."""
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise HelixConfigError(
            f"{name} is used for the first time while a CUDA graph is captured, and cannot be compared with "
            "a known answer there; call helix_megatron.kernels.backend.warm_up before"
        )
    label = find(name)[1]
    with torch.device("cpu"):
        given, outs, lses = _known_case(dtype, page, dim)
    on = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    query, keys, values, lengths, table = (x.to(on) for x in given)
    requests = Requests(torch.arange(4, dtype=torch.int32, device=on), lengths, table)
    try:
        out, lse = attend(
            name, query, keys, values, requests, VisibleSlots(dim**-0.5, None, KvInterleave(1, 1), 0)
        )
        out, lse = out.float().cpu(), lse.float().cpu()
    except Exception as error:  # whatever a foreign kernel fails with
        fault = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        near = functools.partial(torch.allclose, rtol=_TOLERANCE, atol=_TOLERANCE)
        if near(out, outs) and near(lse, lses):
            return None
        fault = "computes a wrong answer of a small known case"
    logger.warning("%s %s: it is not used", label, fault)
    return f"{label} {fault}"
