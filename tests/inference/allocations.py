"""Tensors that operations make, as torch dispatches them: what a step needs besides what it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """`with Allocations() as made: ...`; then `made.largest(torch.float32)`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in given:
                self.made.append((tensor.numel(), func.overloadpacket.__name__, tensor.dtype))
        return out

    def largest(self, *dtypes: torch.dtype) -> tuple[int, str]:
        """Elements of the largest tensor of these dtypes, or of all, and the operation that made it."""
        found = [(numel, name) for numel, name, dtype in self.made if dtype in dtypes or not dtypes]
        return max(found, default=(0, ""))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
