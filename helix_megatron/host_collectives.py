"""Host mode: small all-reduces and all-gathers among the processes of one machine, in one round.

Note [Messages are what costs]
    Ranks of host mode share a few cores, so a collective costs what its messages take of them (about 0.1 ms
    each), hardly what its bytes take. Gloo passes pieces around a ring of p ranks:

                    gloo: messages a rank     here: messages a rank    bytes received here, of n
        all-reduce  2 (p-1), one by one       p-1, at once             (p-1) n   (ring: 2 (p-1)/p n)
        all-gather  p-1, one by one           p-1, at once             (p-1) n   (the same)

    Every rank sends its tensor to every other one (an all-to-all of equal pieces) and adds up what it has got
    in the order of the ranks: all of them compute the same sum. Above LIMIT_BYTES bytes matter, and gloo's
    ring is left to do it.

Everybody's collectives go this way, Megatron's own as well as Helix's. All ranks must call alike, as ever;
here that includes `async_op`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import ProcessGroup, ReduceOp

LIMIT_BYTES = 2**16
_COMBINED = {
    ReduceOp.SUM: lambda pieces: pieces.sum(dim=0),
    ReduceOp.MAX: lambda pieces: pieces.amax(dim=0),
    ReduceOp.MIN: lambda pieces: pieces.amin(dim=0),
}


def patch_collectives() -> None:
    """Wrap torch's ProcessGroup, through which Python's collectives pass."""
    methods = vars(ProcessGroup)
    assert "all_gather_single" in methods or "_allgather_base" in methods, "torch renamed it once more"
    swap = methods["alltoall_base"]
    wrappers = {"allreduce": _all_reduce, "all_gather_single": _all_gather, "_allgather_base": _all_gather}
    for name, wrapper in wrappers.items():
        if name in methods:  # torch renamed one
            setattr(ProcessGroup, name, wrapper(methods[name], swap))


def _small(group: Any, tensor: torch.Tensor) -> bool:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return False  # torch would refuse to write to it here, and does not know what gloo writes to
    return group.size() > 1 and 0 < tensor.nbytes <= LIMIT_BYTES


def _all_reduce(original: Callable, swap: Callable) -> Callable:
    @functools.wraps(original)
    def allreduce(group: Any, tensors: Any, *rest: Any, **named: Any) -> Any:
        if named or len(rest) != 1 or not hasattr(rest[0], "reduceOp") or isinstance(tensors, torch.Tensor):
            return original(group, tensors, *rest, **named)  # a form that Python's collectives do not use
        tensor, options = tensors[0], rest[0]
        combine = next((c for op, c in _COMBINED.items() if options.reduceOp == op), None)
        later = getattr(options, "asyncOp", True)  # the sum is made here, not when somebody waits
        if later or combine is None or len(tensors) > 1 or not _small(group, tensor):
            return original(group, tensors, options)
        with torch.no_grad():
            pieces = tensor.reshape(-1).repeat(group.size())
            received = torch.empty_like(pieces)
            swap(group, received, pieces, [], []).wait()
            # `data`: a version that autograd does not count, as in gloo
            tensor.data.copy_(combine(received.view(group.size(), *tensor.shape)))
        return None

    return allreduce


def _all_gather(original: Callable, swap: Callable) -> Callable:
    @functools.wraps(original)
    def all_gather(group: Any, output: torch.Tensor, source: torch.Tensor, *options: Any) -> Any:
        if not _small(group, source) or not output.is_contiguous():
            return original(group, output, source, *options)
        with torch.no_grad():
            pieces = source.reshape(-1).repeat(group.size())
        return swap(group, output.view(-1), pieces, [], [])

    return all_gather
