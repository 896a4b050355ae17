"""What a CUDA graph does to a computation, without a GPU: it is recorded once, and replayed with new inputs.

A graph keeps kernels and their addresses. What Python computed while it was recorded is frozen, and nothing
may wait for the device or copy to it from Python's own memory. Recording refuses all of that; replaying runs
the recorded kernels (and collectives) again, on the tensors of then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

_COLLECTIVES = (
    "allreduce", "_allgather_base", "all_gather_single", "_reduce_scatter_base", "reduce_scatter_single",
    "alltoall_base", "all_to_all_single",
)  # fmt: skip
_TO_HOST = ("tolist", "numpy", "cpu", "__array__")  # which no operation shows on a CPU
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class NotCapturable(Exception):
    """What a CUDA graph could not hold."""


class Capture(TorchDispatchMode):
    """The operations of this process while `recording()` is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []  # (function, arguments, named arguments, outputs to be filled again)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record from here on, from nothing."""
        self.steps = []
        with ExitStack() as patches:
            for name in _TO_HOST:
                patches.enter_context(mock.patch.object(torch.Tensor, name, _refusing(name)))
            for name in (name for name in _COLLECTIVES if name in vars(ProcessGroup)):
                recorded = self._recorded(vars(ProcessGroup)[name])
                patches.enter_context(mock.patch.object(ProcessGroup, name, recorded))
            patches.enter_context(self)
            yield

    def replay(self) -> None:
        """Run everything again; the same tensors are read and written."""
        with torch.no_grad():
            for function, args, kwargs, outputs in self.steps:
                found = function(*args, **kwargs)
                if hasattr(found, "wait"):
                    found.wait()
                for old, new in zip(outputs, _tensors(found), strict=False):
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse(func, args)
        out = func(*args, **kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in aliases)
        if func.overloadpacket.__name__ not in _ALLOCATIONS and not views:
            outputs = [] if func._schema.is_mutable else _tensors(out)
            self.steps.append(_held((func, args, kwargs, outputs)))
        return out

    def _recorded(self, original: Any) -> Any:
        def collective(group: Any, *args: Any) -> Any:
            with _disable_current_modes():
                work = original(group, *args)
                self.steps.append(_held((original, (group, *args), {}, [])))
            return work

        return collective


def _refuse(func: Any, args: Any) -> None:
    name = func.overloadpacket.__name__
    by_mask = name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    if by_mask or (tags and not name.startswith("index")):
        raise NotCapturable(f"{name} asks the device for values")
    if name == "lift_fresh":
        raise NotCapturable("a tensor made of Python's own numbers is copied to the device")
    if func.namespace == "c10d":
        raise NotCapturable(f"{name} is recorded nowhere")


def _refusing(name: str) -> Any:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise NotCapturable(f"{name}() waits for the device")

    return method


def _held(step: tuple) -> tuple:
    """The same memory in tensors of our own: Transformer Engine empties those that it needs no more."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, step)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [found for found in values if isinstance(found, torch.Tensor)]
