"""CUDA graphs on the host: what a rank launches is recorded, and replayed with what its memory holds then.

As a CUDA graph has them, launches are operations of torch, Triton kernels and collectives, with addresses and
numbers of the recording; Python does not run again. Views and allocations are no launches. Triton runs under
its interpreter, which is a stand-in for a kernel on the device: one launch each.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from helix_megatron.measure.comm import _METHODS
from helix_megatron.measure.operations import _ALLOCATIONS, _is_view

_ASKS = (  # what waits for a device, or has a shape that only the device knows
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "masked_scatter",
    "unique_dim", "_unique2", "unique_consecutive", "lift_fresh", "repeat_interleave", "bincount",
)  # fmt: skip
_INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
_TO_HOST = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")


class WaitsForDeviceError(AssertionError):
    """What a CUDA graph cannot hold."""


class HostGraph(TorchDispatchMode):
    """`with graph.recording(): ...`, then `graph.replay()`.

    Args:
        opaque: (owner, name) of functions that stand for one kernel each, e.g. a fused one.
    """

    def __init__(self, opaque: tuple[tuple[Any, str], ...] = ()) -> None:
        super().__init__()
        self._opaque = opaque
        self._launches: list[Callable[[], None]] = []
        self.names: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    @contextlib.contextmanager
    def recording(self) -> Iterator[HostGraph]:
        """Record what is launched, which runs as well. Raises WaitsForDeviceError at what no graph holds."""
        _remember()
        with contextlib.ExitStack() as patches:
            patch = lambda *given: patches.enter_context(mock.patch.object(*given))  # noqa: E731
            group = torch.distributed.ProcessGroup
            for name in (name for name in _METHODS if name in vars(group)):
                patch(group, name, self._collective(name, vars(group)[name]))
            for name in _TO_HOST:
                patch(torch.Tensor, name, _refuse(f"Tensor.{name}"))
            for name in ("tensor", "as_tensor", "from_numpy"):
                patch(torch, name, _refuse(f"torch.{name}"))
            for owner, name in self._opaque:
                patch(owner, name, self._kernel(name, getattr(owner, name)))
            with contextlib.suppress(ImportError):
                from triton.runtime import interpreter

                run = interpreter.GridExecutor.__call__

                def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
                    self._add(executor.fn.__name__, lambda: run(executor, *args, **kwargs))

                patch(interpreter.GridExecutor, "__call__", launch)
            with self:
                yield self

    def replay(self) -> None:
        for launch in self._launches:
            launch()

    @property
    def launches(self) -> int:
        """Kernels, collectives not among them."""
        return sum(self.names.values())

    def _add(self, name: str, launch: Callable[[], Any], counts: Counter[str] | None = None) -> Any:
        (self.names if counts is None else counts)[name] += 1
        self._launches.append(launch)
        with _as_python_may():
            return launch()

    def _collective(self, name: str, original: Callable) -> Callable:
        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return original(group, *args, **kwargs)

            def launch() -> Any:
                work = original(group, *args, **kwargs)
                if work is not None:
                    work.wait()
                return work

            return self._add(_METHODS[name][0], launch, self.collectives)

        return call

    def _kernel(self, name: str, function: Callable) -> Callable:
        """One launch, whatever it does on the host."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with _as_python_may():
                found = function(*args, **kwargs)

            def launch() -> None:
                _into(found, function(*args, **kwargs))

            self.names[name] += 1
            self._launches.append(launch)
            return found

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(x.dtype is torch.bool for x in _tensors(args[1]))
        if name in _ASKS or by_mask:
            raise WaitsForDeviceError(str(func))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # inference mode does not take it apart
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if name in _ALLOCATIONS or _is_view(func, name) or not any(x.numel() for x in _tensors(out, args)):
            return out
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)

        def launch() -> None:
            again = func(*args, **kwargs)
            if not written:
                _into(out, again)

        self.names[name] += 1
        self._launches.append(launch)
        return out


def _tensors(*values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _into(old: Any, new: Any) -> None:
    for mine, theirs in zip(_tensors(old), _tensors(new), strict=True):
        mine.copy_(theirs)


@contextlib.contextmanager
def _as_python_may() -> Iterator[None]:
    """Inside of what is one launch nothing is recorded, or refused."""
    with _disable_current_modes(), contextlib.ExitStack() as stack:
        for name in _TO_HOST:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _ORIGINALS[name]))
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(mock.patch.object(torch, name, _ORIGINALS[name]))
        yield


_ORIGINALS: dict[str, Any] = {}


def _remember() -> None:
    """As host mode has left them."""
    for name in _TO_HOST:
        _ORIGINALS[name] = getattr(torch.Tensor, name)
    for name in ("tensor", "as_tensor", "from_numpy"):
        _ORIGINALS[name] = getattr(torch, name)


def _refuse(name: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise WaitsForDeviceError(name)

    return call


@contextlib.contextmanager
def in_place_of_cuda_graphs(opaque: tuple[tuple[Any, str], ...]) -> Iterator[list[HostGraph]]:
    """Megatron captures and replays HostGraphs where it would CUDA graphs; those captured are listed."""
    from megatron.core.transformer import cuda_graphs

    captured: list[HostGraph] = []

    class Graph(HostGraph):
        def __init__(self) -> None:
            super().__init__(opaque)
            captured.append(self)

        def register_generator_state(self, generator: torch.Generator) -> None:
            """Nothing draws."""

    def graph(of: HostGraph, **how: Any) -> Any:
        return of.recording()

    with contextlib.ExitStack() as patches:
        given = dict(CUDAGraph=Graph, graph=graph, graph_pool_handle=lambda: (0, 1))
        for name, value in given.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, value))
        safe = mock.patch.object(cuda_graphs, "_ensure_generator_state_is_cudagraph_safe", lambda one: one)
        patches.enter_context(safe)
        yield captured
