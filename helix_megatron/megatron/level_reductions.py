"""Reductions of Megatron's own layers, and Transformer Engine's, level by level over the grid."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from helix_megatron.exchange import levels
from helix_megatron.megatron.process_groups import get_helix_groups
from helix_megatron.partition.grid import HelixConfigError

Replace = Callable[..., None]
_TE = "transformer_engine.pytorch.module"
_TE_NAMES = ("allreduce", "reduce_scatter_along_first_dim", "gather_along_first_dim")
_TE_MODULES = {"linear": _TE_NAMES, "layernorm_linear": _TE_NAMES, "layernorm_mlp": _TE_NAMES,
               "base": _TE_NAMES[2:]}  # fmt: skip
"""Modules of Transformer Engine's layers, and the collectives that each has imported by name."""


def reduce_by_level(replace: Replace) -> None:
    """Have the tensor-parallel collectives of the layers run level by level (exchange/levels.py).

    Raises:
        HelixConfigError: Transformer Engine is there, but its layers reduce in another way than Helix knows.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    _of_megatrons_layers(replace)
    if HAVE_TE:
        _of_transformer_engines(replace)


def in_tensor_parallel_group(group: Any) -> bool:
    """Whether Helix's grid is that of this group."""
    from megatron.core import parallel_state

    return group is parallel_state.get_tensor_model_parallel_group()


def _of_megatrons_layers(replace: Replace) -> None:
    """Those of mappings.py, and of the linear layer's autograd function, which has its own all-gather and
    reduce-scatter, and an overlapped all-reduce that is left to mappings.py instead.
    """
    from megatron.core.tensor_parallel import layers, mappings

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


def _of_transformer_engines(replace: Replace) -> None:
    """Those of Transformer Engine's linear layers. What is given back is complete, with nothing to wait for.

    Quantised tensors are gathered in several parts that only Transformer Engine knows; they are refused.
    """

    def all_reduce(original: Callable) -> Callable:
        @functools.wraps(original)
        def allreduce(inp: Tensor, tp_group: Any = None, async_op: bool = False) -> tuple[Tensor, Any]:
            if not in_tensor_parallel_group(tp_group):
                return original(inp, tp_group, async_op)
            return levels.all_reduce(inp, get_helix_groups()), None

        return allreduce

    def reduce_scatter(original: Callable) -> Callable:
        @functools.wraps(original)
        def reduce_scatter_along_first_dim(
            inp: Tensor, tp_group: Any, async_op: bool = False, output: Tensor | None = None
        ) -> tuple[Tensor, Any]:
            if not in_tensor_parallel_group(tp_group):
                return original(inp, tp_group, async_op, output)
            if output is None:
                output = inp.new_empty(inp.shape[0] // tp_group.size(), *inp.shape[1:])
            levels.reduce_scatter(output, inp, get_helix_groups())
            return output, None

        return reduce_scatter_along_first_dim

    def all_gather(original: Callable) -> Callable:
        @functools.wraps(original)
        def gather_along_first_dim(
            inp: Tensor, process_group: Any, async_op: bool = False, quantizer: Any = None, **more: Any
        ) -> tuple[Tensor, Any]:
            if not in_tensor_parallel_group(process_group):
                return original(inp, process_group, async_op, quantizer, **more)
            if quantizer is not None or any(more.values()) or type(inp) is not Tensor:
                raise NotImplementedError(
                    "--helix-hierarchical-allreduce does not gather quantised tensors of Transformer "
                    "Engine's layers (FP8, FP4); leave one of the two out"
                )
            out = inp.new_empty(inp.shape[0] * process_group.size(), *inp.shape[1:])
            levels.all_gather(out, inp, get_helix_groups())
            return out, None

        return gather_along_first_dim

    wrappers = dict(zip(_TE_NAMES, (all_reduce, reduce_scatter, all_gather), strict=True))
    for module, names in _TE_MODULES.items():
        found = importlib.import_module(f"{_TE}.{module}")
        for name in names:
            if not hasattr(found, name):
                raise HelixConfigError(
                    f"--helix-hierarchical-allreduce: the installed Transformer Engine has no {name} in "
                    f"{_TE}.{module}, so its layers cannot be made to reduce by level; 2.20 can"
                )
            replace(found, name, wrappers[name])
