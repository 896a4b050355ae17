"""Counts what torch dispatches on one rank: operations, and the bytes that they read and write.

Counted are kernels: views, allocations and collectives (`comm.py` counts those) are not. A tensor that is
expanded over a dimension is read once. The counts are of the code, not of the device: a fused kernel is one
operation that reads its inputs and writes its outputs; what caches save is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX, ATTENTION, OTHER = "matrix products", "attention", "the rest"
_MATRIX = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "dot", "mv", "addmv")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
_VIEWS = ("_unsafe_view", "detach", "alias", "lift_fresh", "_reshape_alias")  # whatever their schema says
_OVERWRITE = ("copy_", "fill_", "zero_", "set_", "normal_", "uniform_")  # what is written is not read


@dataclass
class Operations:
    """Kernels of one kind."""

    count: int = 0
    read: int = 0
    """Bytes."""
    written: int = 0
    """Bytes."""


class OperationMeter(TorchDispatchMode):
    """Tallies of this process while `counting()` is entered: `tallies["the rest"].read`."""

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[str, Operations] = {}

    @contextmanager
    def counting(self) -> Iterator[OperationMeter]:
        """Count from here on, from nothing."""
        self.tallies = {kind: Operations() for kind in (MATRIX, ATTENTION, OTHER)}
        with self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "c10d" and name not in _ALLOCATIONS and not _is_view(func, name):
            self._add(name, func._schema, args, kwargs, out)
        return out

    def _add(self, name: str, schema: Any, args: Any, kwargs: Any, out: Any) -> None:
        attention = "attention" in name
        tally = self.tallies[MATRIX if name in _MATRIX else ATTENTION if attention else OTHER]
        tally.count += 1
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        targets = list(_tensors(given[name] for name in written if name in given))
        shapes_alone = name.endswith("_like") or name.startswith("new_")
        for argument in schema.arguments if not shapes_alone else ():
            value = given.get(argument.name)
            overwritten = argument.name in written and (argument.kwarg_only or name in _OVERWRITE)
            if not overwritten:
                tally.read += sum(map(touched_bytes, _tensors([value])))
        results = targets if written else list(_tensors([out]))
        tally.written += sum(map(touched_bytes, results))

    @property
    def total(self) -> Operations:
        """Of all kinds."""
        kinds = self.tallies.values()
        return Operations(
            sum(k.count for k in kinds), sum(k.read for k in kinds), sum(k.written for k in kinds)
        )

    def as_json(self) -> dict[str, dict[str, int]]:
        """{"the rest": {"count": …, "read": …, "written": …}, …}"""
        return {kind: dict(vars(tally)) for kind, tally in self.tallies.items()}


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, those that an expanded dimension repeats counted once."""
    sizes = (n if stride else min(n, 1) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return prod(sizes) * tensor.element_size()


def _is_view(func: Any, name: str) -> bool:
    returns = [value.alias_info for value in func._schema.returns]
    return name in _VIEWS or any(alias is not None and not alias.is_write for alias in returns)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
