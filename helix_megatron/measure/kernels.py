"""Where a GPU's time goes in one iteration: from the kernels that torch.profiler saw.

        time  ────────────────────────────────────────────────▶
        stream of computing   ████████   ██████████
        stream of NCCL             █████████        ██████
                              └compute ┘└c┘└compute┘└comm┘   └ idle: no kernel runs

    compute         some kernel that is not NCCL's runs
    communication   only kernels of NCCL run: what is not hidden behind computing
    idle            nothing runs: launches, the host, waiting for other ranks outside a collective

NCCL's kernels wait inside for the other ranks, so that waiting is part of communication here. Copies and
memory sets count as computing. Ranges that somebody marked (record_function: every optimizer's step, NCCL's
calls) are shown on the GPU as well, from their first kernel to the last: they are no kernels. Profiling makes
an iteration longer, so one of its own is profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_COMMUNICATION = ("nccl", "rccl")


def profile_iteration(body: Callable[[], Any]) -> tuple[Any, dict[str, float] | None]:
    """Run `body` under torch.profiler: what it returns, and its split in seconds; None without a kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        with torch.profiler.record_function(_ITERATION):
            result = body()
            torch.cuda.synchronize()
    return result, split_time(profile.events())


_ITERATION = "helix iteration"


def split_time(events: Iterable[Any]) -> dict[str, float] | None:
    """Seconds of compute, communication and idle in the iteration; None when no kernel ran in it.

    events: torch.profiler's FunctionEvent, or what has its name, device_type, time_range (microseconds) and
            is_user_annotation.
    """
    on_gpu, whole = [], None
    for event in events:
        here = (event.time_range.start, event.time_range.end)
        if event.device_type == torch.autograd.DeviceType.CPU:
            whole = here if event.name == _ITERATION else whole
        elif is_kernel(event):
            on_gpu.append((event.name, here))
    if whole is None or not on_gpu:
        return None
    computing = _union((span for name, span in on_gpu if not _communicates(name)), whole)
    busy = _union((span for _, span in on_gpu), whole)
    parts = {"compute": computing, "communication": busy - computing, "idle": whole[1] - whole[0] - busy}
    return {name: 1e-6 * microseconds for name, microseconds in parts.items()}


def is_kernel(event: Any) -> bool:
    """Whether an event of torch.profiler, or a mean of several, is a GPU's, and no range that was marked."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def _communicates(kernel: str) -> bool:
    return any(word in kernel.lower() for word in _COMMUNICATION)


def _union(spans: Iterable[tuple[float, float]], whole: tuple[float, float]) -> float:
    """Length of the union of `spans`, inside `whole`."""
    covered, end = 0.0, whole[0]
    for start, stop in sorted(spans):
        start, stop = max(start, end), min(stop, whole[1])
        if stop > start:
            covered, end = covered + stop - start, stop
    return covered
