"""Reductions of Megatron's own layers level by level over the grid."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from helix_megatron.exchange import levels
from helix_megatron.megatron.process_groups import get_helix_groups


def reduce_by_level(replace: Callable[..., None]) -> None:
    """Have the tensor-parallel collectives of Megatron's own layers run level by level (exchange/levels.py).

    They are those of mappings.py, and of the linear layer's autograd function, which has its own all-gather
    and reduce-scatter, and an overlapped all-reduce that is left to mappings.py instead.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, mappings

    def in_tensor_parallel_group(group: Any) -> bool:
        return group is parallel_state.get_tensor_model_parallel_group()

    def reduce(original: Callable) -> Callable:
        @functools.wraps(original)
        def _reduce(input_: Any, group: Any) -> Any:
            if not in_tensor_parallel_group(group):
                return original(input_, group)
            return levels.all_reduce(input_, get_helix_groups())

        return _reduce

    def by_level(function: Callable) -> Callable:
        def wrap(original: Callable) -> Callable:
            @functools.wraps(original)
            def collective(output: Any, source: Any, group: Any = None, async_op: bool = False) -> Any:
                if not in_tensor_parallel_group(group):
                    return original(output, source, group=group, async_op=async_op)
                return function(output, source, get_helix_groups())

            return collective

        return wrap

    def without_overlap(original: Callable) -> Callable:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if self.allreduce_dgrad and in_tensor_parallel_group(self.tp_group):
                self.allreduce_dgrad = False  # its input then goes through mappings.py instead

        return __init__

    replace(mappings, "_reduce", reduce)
    for module in (mappings, layers):
        replace(module, "dist_all_gather_func", by_level(levels.all_gather))
        replace(module, "dist_reduce_scatter_func", by_level(levels.reduce_scatter))
    replace(layers.ColumnParallelLinear, "__init__", without_overlap)
