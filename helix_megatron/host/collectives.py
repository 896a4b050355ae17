"""Host mode: collectives among the processes of one machine, through memory that they share.

Note [Why not gloo's]
    Ranks of host mode share a few cores, and gloo's messages over TCP cost each of them 0.1 ms of a core. An
    all-reduce of 4 kB takes 3.8 ms among 8 ranks on two cores, and 0.25 ms in shared memory
    (shared_memory.py); 1 MiB takes 21 ms and 2.5 ms. GPUs of one node do not go through TCP either.

    collective       what a rank shows        what it reads
    all_reduce       its tensor               all tensors, added up in the order of the ranks
    all_gather       its tensor               all tensors
    reduce_scatter   its tensor               its own part of all tensors, added up likewise
    all_to_all       its pieces, their sizes  the piece for it in all of them
    barrier          nothing                  nothing

Larger tensors go in several rounds. A collective is done when the call returns, with `async_op` too (there is
nothing to overlap with on shared cores). Only those are here in which every rank waits for every other one
anyway: broadcasts, sends and object collectives stay gloo's, and so does all of it between machines.

Everybody's collectives go this way, Megatron's own as well as Helix's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from helix_megatron.host.shared_memory import KINDS, SLOT_BYTES, SharedMemoryGroup, connect

_BARRIER, _ALL_REDUCE, _ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL = range(5)
_COMBINED = {
    ReduceOp.SUM: lambda pieces: pieces.sum(dim=0),
    ReduceOp.AVG: lambda pieces: pieces.sum(dim=0) / len(pieces),
    ReduceOp.MAX: lambda pieces: pieces.amax(dim=0),
    ReduceOp.MIN: lambda pieces: pieces.amin(dim=0),
}
_shared_groups: WeakKeyDictionary[ProcessGroup, SharedMemoryGroup | None] = WeakKeyDictionary()


def patch_collectives() -> None:
    """Wrap torch's ProcessGroup, through which Python's collectives pass."""
    methods = vars(ProcessGroup)
    wrappers = {
        "allreduce": _all_reduce,
        "_allgather_base": _all_gather,
        "all_gather_single": _all_gather,
        "_reduce_scatter_base": _reduce_scatter,
        "reduce_scatter_single": _reduce_scatter,
        "alltoall_base": _all_to_all,
        "all_to_all_single": _all_to_all,
        "barrier": _barrier,
    }
    for name, collective in wrappers.items():
        if name in methods:  # torch renamed some
            setattr(ProcessGroup, name, _wrapped(methods[name], collective))


def _wrapped(original: Callable, collective: Callable) -> Callable:
    @functools.wraps(original)
    def call(group: Any, *args: Any, **named: Any) -> Any:
        shared = None if named or group.size() == 1 else _shared_group(group)
        if shared is None:
            return original(group, *args, **named)
        with torch.no_grad():
            done = collective(shared, *args)
        if not done:
            return original(group, *args)
        return _finished() if getattr(args[-1], "asyncOp", True) else None

    return call


def _finished() -> Any:
    """A handle of what is done already, for those who wait for it."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(future)


def _shared_group(group: ProcessGroup) -> SharedMemoryGroup | None:
    """The group's shared memory, made with its first collective; None where it has none."""
    try:
        return _shared_groups[group]
    except KeyError:
        pass
    if torch.distributed.get_backend(group) == "fake":  # nobody else is there
        _shared_groups[group] = None
        return None

    def agree(vector: list[int]) -> list[list[int]]:
        everybody = [torch.empty(len(vector), dtype=torch.int64) for _ in range(group.size())]
        group.allgather([everybody], [torch.tensor(vector)]).wait()
        return [one.tolist() for one in everybody]

    limit_s = float(os.environ.get("HELIX_HOST_TIMEOUT_S", "300"))
    with torch.inference_mode(False):  # memory that may be written to from any mode
        shared = _shared_groups[group] = connect(group.rank(), group.size(), agree, limit_s)
    return shared


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _write(tensor: Tensor, values: Tensor) -> None:
    """Put values into a tensor, unnoticed by autograd's versions, as gloo does."""
    values = values.view(tensor.shape)
    if not tensor.is_inference():
        tensor.data.copy_(values)
    elif torch.is_inference_mode_enabled():
        tensor.copy_(values)
    else:
        with torch.inference_mode():
            tensor.copy_(values)


def _combination(options: Any, tensor: Tensor) -> Callable[[Tensor], Tensor] | None:
    """[ranks, n] pieces to their sum (or the like) [n]; None for what is left to gloo."""
    if options.reduceOp == ReduceOp.AVG and not tensor.is_floating_point():
        return None
    return next((combine for op, combine in _COMBINED.items() if options.reduceOp == op), None)


def _all_reduce(shared: SharedMemoryGroup, tensors: Any, options: Any) -> bool:
    combine = None if isinstance(tensors, Tensor) or len(tensors) > 1 else _combination(options, tensors[0])
    if combine is None:
        return False
    mine, size = _flat(tensors[0]), tensors[0].element_size()
    kind = mine.nbytes * KINDS + _ALL_REDUCE
    sums = []
    for part in mine.split(SLOT_BYTES // size):
        slots, _ = shared.swap(part, kind)
        sums.append(combine(slots[:, : part.numel()]))
    _write(tensors[0], (sums[0] if len(sums) == 1 else torch.cat(sums)).to(mine.dtype))
    return True


def _all_gather(shared: SharedMemoryGroup, output: Tensor, source: Tensor, _options: Any = None) -> bool:
    mine = _flat(source)
    kind = mine.nbytes * KINDS + _ALL_GATHER
    parts = [
        shared.swap(part, kind)[0][:, : part.numel()].clone()
        for part in mine.split(SLOT_BYTES // source.element_size())
    ]
    _write(output, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return True


def _reduce_scatter(shared: SharedMemoryGroup, output: Tensor, source: Tensor, options: Any) -> bool:
    combine = _combination(options, source)
    if combine is None:
        return False
    pieces = _flat(source).view(shared.ranks, -1)
    kind = pieces.nbytes * KINDS + _REDUCE_SCATTER
    sums = []
    for part in pieces.split(SLOT_BYTES // source.element_size() // shared.ranks, dim=1):
        slots, _ = shared.swap(part.reshape(-1), kind)
        width = part.shape[1]
        own = slots[:, shared.rank * width : (shared.rank + 1) * width]
        sums.append(combine(own))
    _write(output, (sums[0] if len(sums) == 1 else torch.cat(sums)).to(output.dtype))
    return True


def _all_to_all(
    shared: SharedMemoryGroup,
    output: Tensor,
    source: Tensor,
    receive: list[int],
    send: list[int],
    _options: Any = None,
) -> bool:
    if not output.is_contiguous() or output.dtype != source.dtype:
        return False
    mine = _flat(source).view(torch.uint8)
    row = source.nbytes // max(1, source.shape[0])
    sizes = [rows * row for rows in send] or [mine.numel() // shared.ranks] * shared.ranks
    pieces: list[list[Tensor]] = [[] for _ in range(shared.ranks)]
    first, rounds = 0, 1
    while first < rounds:
        window = range(first * SLOT_BYTES, (first + 1) * SLOT_BYTES)
        slots, table = shared.swap(mine[window.start : window.stop], _ALL_TO_ALL, sizes)
        first += 1
        rounds = max(1, -(-int(table.sum(axis=1).max()) // SLOT_BYTES))
        starts = table[:, : shared.rank].sum(axis=1)
        for other, (start, length) in enumerate(zip(starts.tolist(), table[:, shared.rank].tolist())):
            low, high = max(start, window.start), min(start + length, window.stop)
            if low < high:
                pieces[other].append(slots[other, low - window.start : high - window.start].clone())
    lengths = [sum(part.numel() for part in parts) for parts in pieces]
    row = output.nbytes // max(1, output.shape[0])
    expected = [rows * row for rows in receive] or [output.nbytes // shared.ranks] * shared.ranks
    if lengths != expected:
        raise RuntimeError(f"host mode: an all-to-all brought {lengths} bytes, but {expected} were expected")
    if output.numel():
        _write(output, torch.cat([part for parts in pieces for part in parts]).view(output.dtype))
    return True


def _barrier(shared: SharedMemoryGroup, _options: Any = None) -> bool:
    shared.swap(torch.empty(0, dtype=torch.uint8), _BARRIER)
    return True
