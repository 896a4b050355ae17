"""Counts the collectives of one rank where all of them pass: the methods of torch's ProcessGroup.

Bytes are what the rank has to receive, without any algorithm's detours, for a group of p ranks:

    all_gather      (p-1)/p of the output        all_reduce   2 (p-1)/p of the tensor
    reduce_scatter  (p-1)/p of the input         broadcast    the tensor, on every rank but the source
    all_to_all      all but its own part         recv         the tensor

Seconds are the time that the calling thread spends in starting a collective and in waiting for it. On the
host that is the communication time that the step pays for. On a GPU collectives run beside the caller, so
there a step is counted with `blocking=True`: each collective starts on an idle device and is waited for,
which gives its own duration and hides any overlap (send and receive are counted, but not timed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass
class Tally:
    """What one kind of collective, over groups of one size, has cost this rank."""

    calls: int = 0
    bytes: float = 0.0
    """Received by this rank, as above."""
    payload: float = 0.0
    """The size that nccl-tests divides by the time for its algbw: see `bus_factor`."""
    seconds: float = 0.0
    largest: float = 0.0
    """Bytes of the tensors that the largest single call was given: its communication buffers."""


def bus_factor(kind: str, ranks: int) -> float:
    """busbw / algbw as nccl-tests has it; algbw is payload / seconds.

    payload: all_reduce, broadcast, reduce, send, recv the tensor; all_gather the whole output; reduce_scatter
    the whole input; all_to_all the buffer of one rank.
    """
    if kind == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return (ranks - 1) / ranks
    return 1.0


def _bytes(tensors: Any) -> int:
    """Bytes of a tensor or of all tensors in nested lists; other things have none."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, list | tuple) else 0


def _received(method: str, group: Any, payload: int, given: tuple[Any, ...]) -> float:
    """Bytes that this rank receives in a call with the arguments `given`."""
    kind = _METHODS[method][0]
    if kind in ("send", "barrier"):
        return 0.0
    if kind in ("broadcast", "reduce"):
        at_root = group.rank() == getattr(given[1], "rootRank", given[1])
        if kind == "broadcast":
            return 0.0 if at_root else payload
        return payload * (group.size() - 1) if at_root else 0.0
    splits = list(given[2]) if method in _WITH_SPLITS and len(given) > 2 else []
    if splits:
        return payload * (1 - splits[group.rank()] / max(1, sum(splits)))
    return payload * bus_factor(kind, group.size())


# ProcessGroup method → (name in the report, the argument that is the payload). torch renamed some over time.
_METHODS = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ("all_reduce", 0)),
    **dict.fromkeys(("allgather", "_allgather_base", "all_gather_single"), ("all_gather", 0)),
    **dict.fromkeys(("allgather_coalesced", "allgather_into_tensor_coalesced"), ("all_gather", 0)),
    **dict.fromkeys(("all_gather_single_coalesced",), ("all_gather", 0)),
    **dict.fromkeys(("reduce_scatter", "_reduce_scatter_base"), ("reduce_scatter", 1)),
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_tensor_coalesced"), ("reduce_scatter", 1)),
    **dict.fromkeys(("reduce_scatter_single_coalesced",), ("reduce_scatter", 1)),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single"), ("all_to_all", 0)),
    **{kind: (kind, 0) for kind in ("broadcast", "reduce", "send", "recv")},
    "barrier": ("barrier", None),
}
_WITH_SPLITS = ("alltoall_base", "all_to_all_single")


class CommMeter:
    """Tallies of this process while `counting()` is entered: `tallies["all_reduce x16"]`."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self._depth = 0
        self._pending: dict[int, tuple[Any, Tally]] = {}

    @contextmanager
    def counting(self, blocking: bool = False) -> Iterator[CommMeter]:
        """Count from here on, from nothing; `blocking` as the module's docstring says."""
        self.tallies, self._pending = {}, {}
        group, work = torch.distributed.ProcessGroup, torch._C._distributed_c10d.Work
        with ExitStack() as patches:
            for name in (name for name in _METHODS if name in vars(group)):
                counted = self._counted(name, vars(group)[name], blocking)
                patches.enter_context(mock.patch.object(group, name, counted))
            patches.enter_context(mock.patch.object(work, "wait", self._timed_wait(vars(work)["wait"])))
            yield self
        self._pending = {}

    def _counted(self, method: str, original: Callable[..., Any], blocking: bool) -> Callable[..., Any]:
        kind, where = _METHODS[method]
        blocking = blocking and kind not in ("send", "recv")

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            # A method that calls another one is one collective; a group of one rank has none.
            if self._depth or group.size() == 1:
                return original(group, *args, **kwargs)
            tally = self.tallies.setdefault(f"{kind} x{group.size()}", Tally())
            tally.calls += 1
            given = (*args, *kwargs.values())
            payload = 0 if where is None else _bytes(given[where])
            tally.payload += payload
            tally.bytes += _received(method, group, payload, given)
            tally.largest = max(tally.largest, _bytes(args))
            if blocking:
                torch.cuda.synchronize()
            self._depth += 1
            start = time.perf_counter()
            try:
                work = original(group, *args, **kwargs)
                if blocking and work is not None:
                    work.wait()
                    torch.cuda.synchronize()
            finally:
                self._depth -= 1
                tally.seconds += time.perf_counter() - start
            if work is not None:
                self._pending[id(work)] = (work, tally)  # holding it keeps its id its own
            return work

        return call

    def _timed_wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: Any, *args: Any) -> Any:
            _, tally = self._pending.pop(id(work), (None, None))
            start = time.perf_counter()
            try:
                return original(work, *args)
            finally:
                if tally is not None:
                    tally.seconds += time.perf_counter() - start

        return wait

    @property
    def seconds(self) -> float:
        """In all collectives together."""
        return sum(tally.seconds for tally in self.tallies.values())

    def as_json(self) -> dict[str, dict[str, float]]:
        """{"all_reduce x16": {"calls": …, "bytes": …, "payload": …, "seconds": …, "largest": …}, …}"""
        return {name: dict(vars(tally)) for name, tally in sorted(self.tallies.items())}
