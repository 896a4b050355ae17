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
    seconds: float = 0.0


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sum(tensors: Any) -> int:
    return _size(tensors) if isinstance(tensors, torch.Tensor) else sum(_sum(item) for item in tensors)


def _share(group: Any) -> float:
    return (group.size() - 1) / group.size()


def _broadcast(group: Any, tensors: Any, options: Any, *_: Any) -> float:
    root = getattr(options, "rootRank", options)
    return 0.0 if group.rank() == root else _sum(tensors)


def _to_root(group: Any, tensors: Any, options: Any, *_: Any) -> float:
    root = getattr(options, "rootRank", options)
    return _sum(tensors) * (group.size() - 1) if group.rank() == root else 0.0


def _all_to_all(group: Any, output: torch.Tensor, _input: Any, output_splits: Any = (), *_: Any) -> float:
    if not list(output_splits):
        return _size(output) * _share(group)
    splits = list(output_splits)
    return _size(output) * (1 - splits[group.rank()] / max(1, sum(splits)))


def _gathered(group: Any, output: Any, *_: Any) -> float:
    return _sum(output) * _share(group)


def _scattered(group: Any, _output: Any, source: Any, *_: Any) -> float:
    return _sum(source) * _share(group)


def _reduced(group: Any, tensors: Any, *_: Any) -> float:
    return 2 * _sum(tensors) * _share(group)


def _nothing(*_: Any) -> float:
    return 0.0


def _received(_group: Any, tensors: Any, *_: Any) -> float:
    return float(_sum(tensors))


# ProcessGroup method → (name in the report, bytes received by this rank). torch renamed some over time.
_METHODS: dict[str, tuple[str, Callable[..., float]]] = {
    "allreduce": ("all_reduce", _reduced),
    "allreduce_coalesced": ("all_reduce", _reduced),
    "allgather": ("all_gather", _gathered),
    "_allgather_base": ("all_gather", _gathered),
    "all_gather_single": ("all_gather", _gathered),
    "allgather_coalesced": ("all_gather", _gathered),
    "allgather_into_tensor_coalesced": ("all_gather", _gathered),
    "all_gather_single_coalesced": ("all_gather", _gathered),
    "reduce_scatter": ("reduce_scatter", _scattered),
    "_reduce_scatter_base": ("reduce_scatter", _scattered),
    "reduce_scatter_single": ("reduce_scatter", _scattered),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _scattered),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _scattered),
    "alltoall": ("all_to_all", _gathered),
    "alltoall_base": ("all_to_all", _all_to_all),
    "all_to_all_single": ("all_to_all", _all_to_all),
    "broadcast": ("broadcast", _broadcast),
    "reduce": ("reduce", _to_root),
    "send": ("send", _nothing),
    "recv": ("recv", _received),
    "barrier": ("barrier", _nothing),
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
        kind, received = _METHODS[method]
        blocking = blocking and method not in _POINT_TO_POINT

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            # A method that calls another one is one collective; a group of one rank has none.
            if self._depth or group.size() == 1:
                return original(group, *args, **kwargs)
            tally = self.tallies.setdefault(f"{kind} x{group.size()}", Tally())
            tally.calls += 1
            tally.bytes += received(group, *args, *kwargs.values())
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

    def as_json(self) -> dict[str, dict[str, float]]:
        """{"all_reduce x16": {"calls": …, "bytes": …, "seconds": …}, …}"""
        return {name: dict(vars(tally)) for name, tally in sorted(self.tallies.items())}
