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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sum(tensors: Any) -> int:
    """Bytes of a tensor or of all tensors in nested lists; other things have none."""
    if isinstance(tensors, torch.Tensor):
        return _size(tensors)
    return sum(map(_sum, tensors)) if isinstance(tensors, list | tuple) else 0


def _first(tensors: Any, *_: Any) -> int:
    return _sum(tensors)


def _second(_output: Any, source: Any, *_: Any) -> int:
    return _sum(source)


def _nothing(*_: Any) -> int:
    return 0


def _even(group: Any, kind: str, payload: int, *_: Any) -> float:
    return payload * bus_factor(kind, group.size())


def _broadcast(group: Any, _kind: str, payload: int, _tensors: Any, options: Any, *_: Any) -> float:
    root = getattr(options, "rootRank", options)
    return 0.0 if group.rank() == root else payload


def _to_root(group: Any, _kind: str, payload: int, _tensors: Any, options: Any, *_: Any) -> float:
    root = getattr(options, "rootRank", options)
    return payload * (group.size() - 1) if group.rank() == root else 0.0


def _split(
    group: Any, kind: str, payload: int, _output: Any, _input: Any, output_splits: Any = (), *_: Any
) -> float:
    splits = list(output_splits)
    if not splits:
        return _even(group, kind, payload)
    return payload * (1 - splits[group.rank()] / max(1, sum(splits)))


def _sent(*_: Any) -> float:
    return 0.0


_ALL_REDUCE = ("all_reduce", _first, _even)
_ALL_GATHER = ("all_gather", _first, _even)
_REDUCE_SCATTER = ("reduce_scatter", _second, _even)
# ProcessGroup method → (name in the report, payload of the arguments, bytes received by this rank). torch
# renamed some over time.
_METHODS: dict[str, tuple[str, Callable[..., int], Callable[..., float]]] = {
    "allreduce": _ALL_REDUCE,
    "allreduce_coalesced": _ALL_REDUCE,
    "allgather": _ALL_GATHER,
    "_allgather_base": _ALL_GATHER,
    "all_gather_single": _ALL_GATHER,
    "allgather_coalesced": _ALL_GATHER,
    "allgather_into_tensor_coalesced": _ALL_GATHER,
    "all_gather_single_coalesced": _ALL_GATHER,
    "reduce_scatter": _REDUCE_SCATTER,
    "_reduce_scatter_base": _REDUCE_SCATTER,
    "reduce_scatter_single": _REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": _REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": _REDUCE_SCATTER,
    "alltoall": ("all_to_all", _first, _even),
    "alltoall_base": ("all_to_all", _first, _split),
    "all_to_all_single": ("all_to_all", _first, _split),
    "broadcast": ("broadcast", _first, _broadcast),
    "reduce": ("reduce", _first, _to_root),
    "send": ("send", _first, _sent),
    "recv": ("recv", _first, _even),
    "barrier": ("barrier", _nothing, _sent),
}
_POINT_TO_POINT = ("send", "recv")


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
        group_class = torch.distributed.ProcessGroup
        work_class = torch._C._distributed_c10d.Work
        # The entries of the class itself: what getattr returns would no longer bind `self` when put back.
        kept = {name: vars(group_class)[name] for name in _METHODS if name in vars(group_class)}
        wait = vars(work_class)["wait"]
        try:
            for name, original in kept.items():
                setattr(group_class, name, self._counted(name, original, blocking))
            work_class.wait = self._timed_wait(wait)
            yield self
        finally:
            work_class.wait = wait
            for name, original in kept.items():
                setattr(group_class, name, original)
            self._pending = {}

    def _counted(self, method: str, original: Callable[..., Any], blocking: bool) -> Callable[..., Any]:
        kind, payload_of, received = _METHODS[method]
        blocking = blocking and method not in _POINT_TO_POINT

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            # A method that calls another one is one collective; a group of one rank has none.
            if self._depth or group.size() == 1:
                return original(group, *args, **kwargs)
            tally = self.tallies.setdefault(f"{kind} x{group.size()}", Tally())
            tally.calls += 1
            given = (*args, *kwargs.values())
            payload = payload_of(*given)
            tally.payload += payload
            tally.bytes += received(group, kind, payload, *given)
            tally.largest = max(tally.largest, _sum(args))
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
