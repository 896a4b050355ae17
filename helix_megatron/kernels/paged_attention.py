"""Attention of packed new tokens over what one rank keeps of a paged KV cache, with log-sum-exp. Pure torch.

Note [A token sees a range of slots]                m = 2 ranks, blocks of 3, rank 1, window left = 5
    position   0  1  2 | 3  4  5 | 6  7  8 | 9 10 11 | 12 13 ...
    rank 1's             0  1  2             3  4  5                slots
    A rank's slots grow with the position, so those of the positions 0 ... p are a prefix of them, and those a
    sliding window hides are a prefix of that. The token at p sees slots
        count(p - left) ... count(p + 1) - 1           p = 10: slots 2 ... 4, positions 5, 9 and 10
    and no mask of tokens times keys is ever needed to say so. Kernels take these two numbers per token
    (paged_attention_triton.py); here they say which pages are read, and only where the ranges of a block of
    tokens differ is there a mask, as wide as the difference.

T new tokens of all requests, N query heads, K KV heads (K divides N), D head dimension; in a page of the
cache, `page` slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from helix_megatron.kernels.merge import merge_partials, partial_attention
from helix_megatron.partition.kv_layout import KvInterleave

_ROWS = 256  # tokens of a prompt that are attended at a time
_COPY_BYTES = 2**20  # scattered pages are copied in pieces of this size: they stay in a core's cache
_SMALL_BYTES = 2**18  # single tokens that see less than this are batched


@dataclass(frozen=True)
class VisibleSlots:
    """Which slots of this rank a token sees, and how scores are scaled.

    Args:
        softmax_scale: of the scores.
        left: how many positions before its own a token sees; None for all.
        interleave: how positions are dealt to the ranks.
        rank: this rank in its dim group.
    """

    softmax_scale: float
    left: int | None
    interleave: KvInterleave
    rank: int

    def first(self, position):
        """First slot that a token at `position` (integers of any shape) sees."""
        if self.left is None:
            return position * 0
        before = position - self.left
        before = before.clamp(min=0) if isinstance(before, Tensor) else max(0, before)
        return self.interleave.count(self.rank, before)

    def last(self, position):
        """One past the last slot that a token at `position` sees."""
        return self.interleave.count(self.rank, position + 1)


Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Requests:
    """Where the new tokens of packed requests are, and their pages.

    A CUDA graph of a layer reads these tensors and what is kept beside them where they are: before a replay
    they are given the step's values and `refill` is called.

    Args:
        query_ends: [requests + 1] cumulative numbers of new tokens; they are the last of their request.
        lengths: [requests] tokens of each request, the new ones included; 0 for padding.
        table: [requests, pages] numbers of each request's pages, in order of its slots.
        longest: no request has more new tokens; None where the host does not know.
    """

    query_ends: Tensor
    lengths: Tensor
    table: Tensor
    longest: int | None = None
    _kept: dict[Any, tuple[Any, Callable[[Any], None]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def keep(self, key: Any, make: Callable[[], Kept], fill: Callable[[Kept], None]) -> Kept:
        """What all layers of a step need: the first that asks has it made and filled, others find it.

        Args:
            key: of what depends on more than the requests.
            make: allocates tensors.
            fill: puts into them what the requests say; asks the device for nothing.
        """
        if key not in self._kept:
            with torch.inference_mode(False):  # to be filled again in any mode
                made = make()
            fill(made)
            self._kept[key] = made, fill
        return self._kept[key][0]

    def refill(self) -> None:
        """The tensors have been given the values of another step: so is what was kept, where it is."""
        vars(self).pop("host_ends_and_lengths", None)
        for made, fill in self._kept.values():
            fill(made)

    @functools.cached_property
    def host_ends_and_lengths(self) -> tuple[list[int], list[int]]:
        """query_ends and lengths; a device is waited for once, not for every layer."""
        return self.query_ends.tolist(), self.lengths.tolist()

    def for_kernels(self) -> Requests:
        """The same in int32, contiguous but for the distance of the table's rows: what kernels take."""

        def make() -> Requests:
            ends, lengths = (_as_int32(x, x.dim() == 1) for x in (self.query_ends, self.lengths))
            return Requests(ends, lengths, _as_int32(self.table, self.table.stride(-1) == 1))

        def fill(given: Requests) -> None:
            for mine, theirs in zip(given.tensors, self.tensors, strict=True):
                if mine is not theirs:
                    mine.copy_(theirs)

        return self.keep("for kernels", make, fill)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """query_ends, lengths, table."""
        return self.query_ends, self.lengths, self.table

    def rows(self, start: int, stop: int, without: int = 0) -> Requests:
        """The same for new tokens start ... stop - 1 alone; what comes later is not there yet.

        Args:
            without: so many requests at the beginning, which end before `start`, are left out.
        """
        query_ends, all_lengths = self.query_ends[without:], self.lengths[without:]

        def make() -> Requests:
            longest = None if self.longest is None else min(self.longest, stop - start)
            made = (torch.empty_like(x) for x in (query_ends, all_lengths))
            return Requests(*made, self.table[without:], longest)

        def fill(part: Requests) -> None:
            ends = query_ends.clamp(start, stop)
            torch.sub(ends, start, out=part.query_ends)
            torch.sub(all_lengths, (query_ends - ends).clamp_(min=0)[1:], out=part.lengths)
            part.refill()

        return self.keep(("rows", start, stop, without), make, fill)

    def single_rows(self, start: int, stop: int) -> Requests:
        """rows(start, stop) where row r is the only new token of request r."""
        if start == 0 and stop >= len(self.lengths):
            return self
        own = slice(start, stop)

        def make() -> Requests:
            ends = torch.empty_like(self.query_ends[start : stop + 1])
            return Requests(ends, self.lengths[own], self.table[own])

        def fill(part: Requests) -> None:
            torch.sub(self.query_ends[start : stop + 1], start, out=part.query_ends)
            part.refill()

        return self.keep(("single rows", start, stop), make, fill)


def _as_int32(tensor: Tensor, fits: bool) -> Tensor:
    """The tensor itself where it is of that kind, else memory for a copy."""
    if tensor.dtype is torch.int32 and fits and (tensor.dim() > 1 or tensor.is_contiguous()):
        return tensor
    return torch.empty(tensor.shape, dtype=torch.int32, device=tensor.device)


def step_of_zeros(
    new: list[int],
    keys: Tensor,
    heads: int,
    dtype: torch.dtype,
    piece: tuple[int, int] | None,
    row: int | None = None,
) -> tuple[Tensor, Requests, tuple[Tensor, Tensor]]:
    """What a kernel is warmed up with: requests of `new` tokens each, all on a cache's first page.

    Args:
        keys: [pages, page, K, D].
        piece: heads and dimensions of a piece; None for all heads.
        row: heads from a token's first to the next token's; None for N.
    Returns:
        query [T, N, D], requests, and outputs and log-sum-exps to be written, as merge.write_partials has
        them.
    """
    tokens, device, integers = sum(new), keys.device, dict(dtype=torch.int32, device=keys.device)
    ends = torch.tensor([0, *new], **integers).cumsum(0, dtype=torch.int32)
    table = torch.zeros(len(new), max(new) // keys.shape[1] + 1, **integers)
    requests = Requests(ends, torch.tensor(new, **integers), table, longest=max(new))
    query = torch.zeros(tokens, row or heads, keys.shape[-1], dtype=dtype, device=device)[:, :heads]
    of_n, of_d = piece or query.shape[1:]
    pieces = query[0].numel() // (of_n * of_d)
    outs = torch.empty(pieces, tokens, of_n, of_d, dtype=dtype, device=device)
    lses = torch.empty(pieces, -(-tokens * of_n // 4) * 4, dtype=torch.float32, device=device)
    return query, requests, (outs, lses[:, : tokens * of_n].unflatten(1, (-1, of_n)))


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """Attention of every new token over the slots it sees. Rows that belong to no request give 0 and -inf.

    Args:
        query: [T, N, D].
        keys, values: [pages, page, K, D], of any strides.
    Returns:
        output [T, N, D] in the query's dtype, log-sum-exp [T, N] fp32.
    """
    out = torch.zeros_like(query)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    slot_bytes = 2 * keys.shape[2] * keys.shape[3] * keys.element_size()
    small = []  # (slots, row, request, first, last)
    ends, lengths = requests.host_ends_and_lengths
    for request, length in enumerate(lengths):
        begin, end = ends[request : request + 2]
        if end == begin + 1:
            first, last = visible.first(length - 1), visible.last(length - 1)
            if last <= first:
                continue
            if (last - first) * slot_bytes <= _SMALL_BYTES:
                small.append((last - first, begin, request, first, last))
                continue
        for row in range(begin, end, _ROWS):
            stop = min(row + _ROWS, end)
            position = length - (end - row)
            out[row:stop], lse[row:stop] = _one_request(
                query[row:stop], keys, values, requests.table[request], position, visible
            )
    for batch in _batches(sorted(small), max(1, _COPY_BYTES // slot_bytes)):
        rows = [row for _, row, *_ in batch]
        out[rows], lse[rows] = _small_requests(query[rows], keys, values, requests.table, batch, visible)
    return out, lse


def _one_request(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, position: int, visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """Consecutive tokens of one request, the first at `position`: [S, N, D] to [S, N, D] and [S, N]."""
    final = position + query.shape[0] - 1
    first, last = visible.first(position), visible.last(final)
    inner_first, inner_last = visible.first(final), visible.last(position)  # what all of the tokens see
    if inner_last > inner_first:
        ranges = [(inner_first, inner_last, False), (first, inner_first, True), (inner_last, last, True)]
    else:
        ranges = [(first, last, True)]
    parts = []
    for start, stop, differ in ranges:
        for slot, key, value in _slots(keys, values, table, start, stop):
            mask = None
            if differ:
                positions = torch.arange(position, final + 1, device=query.device)[:, None]
                slots = torch.arange(slot, slot + len(key), device=query.device)
                mask = (slots >= visible.first(positions)) & (slots < visible.last(positions))
            parts.append(
                partial_attention(query[:, None], key[:, None], value[:, None], mask, visible.softmax_scale)
            )
    if not parts:
        return torch.zeros_like(query), query.new_full(query.shape[:2], float("-inf"), dtype=torch.float32)
    if len(parts) == 1:
        return parts[0][0][:, 0], parts[0][1][:, 0]
    out, lse = merge_partials(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))
    return out[:, 0].to(query.dtype), lse[:, 0]


def _slots(
    keys: Tensor, values: Tensor, table: Tensor, start: int, stop: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first slot, keys [slots, K, D], values) of a request's slots start ... stop - 1.

    Where the pages follow each other in memory these are views of the cache; otherwise copies, piece by
    piece into the same memory: use one before asking for the next.
    """
    if stop <= start:
        return
    page = keys.shape[1]
    begin, end = start // page, -(-stop // page)
    pages = table[begin:end].long()
    step = end - begin
    head = int(pages[0])
    scattered = step > 1 and not torch.equal(pages, torch.arange(head, head + step, device=pages.device))
    if scattered:
        page_bytes = 2 * keys[0].numel() * keys.element_size()
        step = min(step, max(1, _COPY_BYTES // page_bytes))
        buffers = [torch.empty_like(keys[:step]) for _ in range(2)]
    for index in range(0, end - begin, step):
        numbers = pages[index : index + step]
        if scattered:
            pieces = [buffer[: len(numbers)] for buffer in buffers]
            for cache, piece in zip((keys, values), pieces, strict=True):
                torch.index_select(cache, 0, numbers, out=piece)
        else:
            pieces = [cache[head : head + step] for cache in (keys, values)]
        slot = (begin + index) * page
        low, high = max(start, slot), min(stop, slot + len(numbers) * page)
        key, value = (piece.flatten(0, 1)[low - slot : high - slot] for piece in pieces)
        yield low, key, value


def _batches(items: list[tuple], slots: int) -> Iterator[list[tuple]]:
    """Cut a list, sorted by the slots seen, so that a batch padded to its longest has at most `slots`."""
    batch: list[tuple] = []
    for item in items:
        if batch and (len(batch) + 1) * item[0] > slots:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _small_requests(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor, batch: list[tuple], visible: VisibleSlots
) -> tuple[Tensor, Tensor]:
    """Single tokens of several requests at once: [R, N, D] to [R, N, D] and [R, N].

    What is beyond a request's last slot may be memory that nobody wrote: its last slot is read instead.
    """
    page, longest = keys.shape[1], batch[-1][0]
    numbers, firsts, lasts = (
        torch.tensor(column, device=query.device)[:, None] for column in list(zip(*batch, strict=True))[2:]
    )
    slots = firsts + torch.arange(longest, device=query.device)  # [R, longest]
    mask = slots < lasts
    slots = torch.minimum(slots, lasts - 1)
    pages = table[numbers, slots // page].long()
    key, value = (cache[pages, slots % page].transpose(0, 1) for cache in (keys, values))
    if batch[0][0] == longest:
        out, lse = partial_attention(query[None], key, value, None, visible.softmax_scale)
    else:
        out, lse = partial_attention(query[None], key, value, mask[:, None], visible.softmax_scale)
    return out[0], lse[0]
