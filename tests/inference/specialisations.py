"""What Triton would compile, while its interpreter runs: one kernel for each type, constant and alignment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def recorded() -> Iterator[set[tuple]]:
    """The keys of all launches, by Triton's own code, as for a GPU of compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target, run = CUDABackend(GPUTarget("cuda", 90, 32)), interpreter.InterpretedFunction.run
    binders: dict[Any, Any] = {}
    keys: set[tuple] = set()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kernel not in binders:
            compiled = JITFunction(kernel.fn, **kernel.kwargs)
            binders[kernel] = create_function_from_signature(compiled.signature, compiled.params, target)
        _, kinds, options = binders[kernel](*args, **kwargs)
        keys.add((kernel.fn.__name__, *kinds, *sorted(options.items())))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(interpreter.InterpretedFunction, "run", launch):
        yield keys
