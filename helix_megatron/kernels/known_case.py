"""FlashAttention's kernels are not trusted blindly: each computes small cases whose answers are known.

One that is wrong, or fails, is left out by name, and the next takes its place.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_megatron.kernels import flash
from helix_megatron.kernels.merge import plain_attention
from helix_megatron.kernels.paged_attention import Requests, VisibleSlots
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.kv_layout import KvInterleave

logger = logging.getLogger(__name__)

_TOLERANCE = 3e-2  # of half precision, for outputs of size 1
_HEADS, _KV_HEADS = 6, 2


@dataclass(frozen=True)
class _Case:
    """What FlashAttention is given on the host, and the answer in fp32.

    Args:
        query, keys, values, requests, visible, new: as flash.attend.
        out, lse: [T, N, D] and [T, N].
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    requests: Requests
    visible: VisibleSlots
    new: tuple[Tensor, Tensor] | None
    out: Tensor
    lse: Tensor


class _Pages:
    """A rank's scattered pages. What nobody wrote is large and finite: it may be read with weight 0."""

    def __init__(self, numbers: list[list[int]], page: int, dim: int, dtype: torch.dtype):
        self.table = torch.tensor(numbers, dtype=torch.int32)
        self.keys, self.values = torch.full((2, 6, page, _KV_HEADS, dim), 100.0, dtype=dtype)

    def write(self, request: int, key: Tensor, value: Tensor) -> None:
        """[slots, K, D] of a request."""
        page = self.keys.shape[1]
        for cache, written in ((self.keys, key), (self.values, value)):
            for number, start in zip(self.table[request].tolist(), range(0, len(key), page)):
                piece = written[start : start + page]
                cache[number, : len(piece)] = piece


def _singles(dtype: torch.dtype, page: int, dim: int) -> _Case:
    """A decode step: one request ends in its third page, one in its first, one has nothing."""
    generator = torch.Generator().manual_seed(1)
    lengths = [2 * page + min(3, page), min(5, page), 0]
    pages = _Pages([[4, 1, 3], [2, 0, 0], [0, 0, 0]], page, dim, dtype)
    query = torch.randn(3, _HEADS, dim, generator=generator).to(dtype)
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], float("-inf"))
    for row, length in enumerate(lengths[:2]):
        key, value = torch.randn(2, length, _KV_HEADS, dim, generator=generator).to(dtype)
        pages.write(row, key, value)
        out[row : row + 1], lse[row : row + 1] = _answer(query[row : row + 1], key, value, None)
    ends = torch.arange(4, dtype=torch.int32)
    requests = Requests(ends, torch.tensor(lengths, dtype=torch.int32), pages.table)
    visible = VisibleSlots(dim**-0.5, None, KvInterleave(1, 1), 0)
    return _Case(query, pages.keys, pages.values, requests, visible, None, out, lse)


def _several(dtype: torch.dtype, page: int, dim: int) -> _Case:
    """A step with history on the second of two ranks, which adds the new keys for heads 3 to 5.

    Requests of five, three and one new token, of which this rank keeps a page and a part of another, nothing,
    and a part of a page; one that is padding, and a row that belongs to none. Positions are dealt by pages.
    """
    generator = torch.Generator().manual_seed(2)
    some, new = min(3, page), [5, 3, 1, 0]
    before, kept = [3 * page + some, some, page + some, 0], [page + some, 0, some]
    pages = _Pages([[4, 1], [3, 0], [2, 0], [0, 0]], page, dim, dtype)
    rows = sum(new) + 1
    query = torch.randn(rows, _HEADS, dim, generator=generator).to(dtype)
    key, value = torch.randn(2, rows, _KV_HEADS, dim, generator=generator).to(dtype)
    ends = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    out, lse = torch.zeros(query.shape), torch.full(query.shape[:2], float("-inf"))
    for request, (slots, count) in enumerate(zip(kept, new)):
        own = slice(int(ends[request]), int(ends[request + 1]))
        cached = torch.randn(2, slots, _KV_HEADS, dim, generator=generator).to(dtype)
        pages.write(request, *cached)
        seen = torch.ones(count, slots + count).tril(slots).bool()
        both = (torch.cat(x) for x in zip(cached, (key[own], value[own])))
        whole, without = _answer(query[own], *both, seen), _answer(query[own], *cached, None)
        for answer, (of_all, of_cached) in zip((out, lse), zip(whole, without)):
            answer[own] = torch.cat([of_cached[:, :3], of_all[:, 3:]], dim=1)
    lengths = torch.tensor([a + b for a, b in zip(before, new)], dtype=torch.int32)
    requests = Requests(ends, lengths, pages.table, longest=max(new))
    visible = VisibleSlots(dim**-0.5, None, KvInterleave(2, page), 1)
    return _Case(query, pages.keys, pages.values, requests, visible, (key, value), out, lse)


def _answer(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """[S, N, D] over [L, K, D], `seen` [S, L]: output and log-sum-exp in fp32."""
    if not len(key):
        return torch.zeros(query.shape), torch.full(query.shape[:2], float("-inf"))
    mask = None if seen is None else seen[None]
    scale = query.shape[-1] ** -0.5
    out, lse = plain_attention(query[:, None].float(), key[:, None], value[:, None], mask, scale)
    return out[:, 0], lse[:, 0]


@functools.cache
def known_case_error(
    name: str, device: str, dtype: torch.dtype, page: int, dim: int, several: bool = False
) -> str | None:
    """What is wrong with FlashAttention `name`; None when its answers are right. Asked once.

    Args:
        several: it is its kernels for several new tokens of a request that are asked.
    """
    if device == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise HelixConfigError(
            f"{name} is used for the first time while a CUDA graph is captured, and cannot be compared with "
            "a known answer there; call helix_megatron.kernels.backend.warm_up before"
        )
    label = flash.find(name)[1]
    with torch.device("cpu"):
        case = (_several if several else _singles)(dtype, page, dim)
    on = device if device != "cuda" or torch.cuda.is_available() else "cpu"
    query, keys, values = (x.to(on) for x in (case.query, case.keys, case.values))
    requests = Requests(*(x.to(on) for x in case.requests.tensors), longest=case.requests.longest)
    new = None if case.new is None else (case.new[0].to(on), case.new[1].to(on))
    try:
        found = flash.attend(name, query, keys, values, requests, case.visible, new)
        out, lse = (x.float().cpu() for x in found or ())
    except Exception as error:  # whatever a foreign kernel fails with
        fault = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        near = functools.partial(torch.allclose, rtol=_TOLERANCE, atol=_TOLERANCE)
        if near(out, case.out) and near(lse, case.lse):
            return None
        fault = "computes a wrong answer of a small known case"
    fault += " with several new tokens of a request" if several else ""
    logger.warning("%s %s: it is not used", label, fault)
    return f"{label} {fault}"
