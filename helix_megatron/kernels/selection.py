"""Which kernel attends over a rank's part of the KV cache: chosen here, once for each kind of cache.

    flash-attn-3, flash-attn-2   without a window (flash.py), as Megatron prefers them: single tokens; several
                                 of a request, whose new keys are at hand, outside of CUDA graphs
    triton                       everything else on a GPU (paged_attention_triton.py)
    torch                        PyTorch's fused attention on the CPU (paged_attention.py), plain on others

Transformer Engine's attention serves no paged cache with a log-sum-exp. HELIX_PAGED_ATTENTION names a backend
to be used instead of the choice; flash-attn stands for the newer of the two that is installed.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from helix_megatron.kernels import flash
from helix_megatron.kernels.flash import FLASH
from helix_megatron.kernels.known_case import known_case_error
from helix_megatron.kernels.merge import triton_obstacle
from helix_megatron.partition.grid import HelixConfigError

logger = logging.getLogger(__name__)

OVERRIDE = "HELIX_PAGED_ATTENTION"
NAMES = ("torch", "triton", *FLASH, "flash-attn")


@dataclass(frozen=True)
class Choice:
    """What attends, and why.

    Args:
        singles: backend when every request has one new token at most.
        several: the FlashAttention that attends over what is cached and what is new apart, for requests of
            several new tokens; None for none.
        others: backend for what is left.
        reason: one line.
    """

    singles: str
    several: str | None
    others: str
    reason: str


def choose_for(
    keys: Tensor, dtype: torch.dtype, windowed: bool, flash_version: int | None = None, graph: bool = False
) -> Choice:
    """`choose` for a cache [pages, page, K, D] and queries of `dtype`, as HELIX_PAGED_ATTENTION says."""
    device, on_gpu = keys.device, keys.device.type == "cuda"
    return choose(
        device.type,
        dtype,
        keys.shape[1],
        windowed,
        os.environ.get(OVERRIDE),
        dim=keys.shape[-1],
        major=_major(device) if on_gpu else None,
        flash_version=flash_version,
        graph=graph or (on_gpu and torch.cuda.is_current_stream_capturing()),
    )


@functools.cache
def choose(
    device: str,
    dtype: torch.dtype,
    page: int,
    windowed: bool,
    override: str | None = None,
    dim: int = 128,
    major: int | None = None,
    flash_version: int | None = None,
    graph: bool = False,
    compare: bool = True,
) -> Choice:
    """The backends for a cache of `dtype` on `device` ("cpu", "cuda") with `page` slots of a rank in a page.

    Args:
        windowed: a token sees a sliding window.
        override: a backend's name.
        dim: D.
        major: of the GPU's compute capability; None is like one that every kernel is made for.
        flash_version: the FlashAttention to take, 2 or 3; None for the newest.
        graph: a CUDA graph is being captured.
        compare: FlashAttention's kernels with a known answer, and log what is chosen.

    Raises:
        HelixConfigError: the override names no backend, or a FlashAttention that cannot be imported; or what
            is chosen waits for the device, which a CUDA graph cannot.
    """
    kind, apart = (device, dtype, page, dim), not (windowed or graph)  # in a graph, single rows may change
    if override:
        choice = _overridden(override, kind, apart, compare)
    else:
        others, why = _without_flash(device)
        taken, obstacles = None, []
        for name in FLASH if device == "cuda" else ():
            obstacle = _obstacle(name, dtype, page, windowed, dim, major, flash_version, graph)
            if not obstacle and compare:
                obstacle = known_case_error(name, *kind)
            if not obstacle:
                taken = name
                break
            obstacles.append(obstacle)
        not_those = "".join(f"; {obstacle}" for obstacle in [*obstacles, *_about_version_4(flash_version)])
        if taken:
            several, remark = _several(taken, kind, apart, compare)
            label = flash.find(taken)[1]
            reason = f"{label} for single tokens, {others} for prompts ({why}){remark}{not_those}"
            choice = Choice(taken, several, others, reason)
        else:
            choice = Choice(others, None, others, f"{others} ({why}){not_those}")
    if graph and device == "cuda":
        _refuse_in_graph(choice)
    if compare:
        logger.info("attention over a rank's part of the KV cache: %s", choice.reason)
    return choice


def _refuse_in_graph(choice: Choice) -> None:
    for name in (choice.singles, choice.others):
        if name == "torch" or (name in FLASH and FLASH[name].waits):
            raise HelixConfigError(
                f"CUDA graphs (--cuda-graph-impl local) cannot hold attention by {name}, which waits for the "
                f"device ({choice.reason}); install Triton 3.3 or newer, or leave {OVERRIDE} or graphs out"
            )


_Kind = tuple[str, torch.dtype, int, int]
"""Device, dtype, page and head dimension of a cache."""


def _several(name: str, kind: _Kind, apart: bool, compare: bool) -> tuple[str | None, str]:
    """FlashAttention `name` if it takes several new tokens of a request too; and a remark.

    Args:
        apart: cached and new keys may be.
    """
    if not apart:
        return None, ""
    kernel, reason = flash.find_varlen(name)
    fault = known_case_error(name, *kind, several=True) if kernel and compare else None
    if kernel is None or fault:
        return None, f"; not {name} for several tokens of a request: {fault or reason}"
    return name, f"; {name} for {FLASH[name].several} or more tokens of a request that has others before them"


def _overridden(override: str, kind: _Kind, apart: bool, compare: bool) -> Choice:
    if override not in NAMES:
        raise HelixConfigError(f"{OVERRIDE}={override}: choose from {', '.join(NAMES)}")
    if override == "triton" and triton_obstacle():
        raise HelixConfigError(f"{OVERRIDE}={override}: {triton_obstacle()}")
    if override in ("torch", "triton"):
        return Choice(override, None, override, f"{override}, as {OVERRIDE} says")
    reasons = []
    for name in FLASH if override == "flash-attn" else (override,):
        kernel, reason = flash.find(name)
        fault: str | None = reason
        if kernel is not None:
            fault = known_case_error(name, *kind) if compare else None
        if not fault:
            others = _without_flash(kind[0])[0]
            several, remark = _several(name, kind, apart, compare)
            why = f"{reason} for single tokens, as {OVERRIDE} says, {others} for prompts{remark}"
            return Choice(name, several, others, why)
        reasons.append(fault)
    raise HelixConfigError(f"{OVERRIDE}={override}: {'; '.join(reasons)}")


def _without_flash(device: str) -> tuple[str, str]:
    if device != "cuda":
        return "torch", f"the cache is on the {device}"
    obstacle = triton_obstacle()
    return ("torch", obstacle) if obstacle else ("triton", "the cache is on a GPU")


def _obstacle(
    name: str,
    dtype: torch.dtype,
    page: int,
    windowed: bool,
    dim: int,
    major: int | None,
    version: int | None,
    graph: bool,
) -> str | None:
    """Why FlashAttention `name` cannot serve single tokens; None when it can."""
    kind = FLASH[name]
    asked_for_other = version in (2, 3) and version != kind.version
    kernel, reason = (None, "") if asked_for_other else flash.find(name)
    obstacles = {
        f"not {name}: --flash-attention-version is {version}": asked_for_other,
        f"not {name}: {reason}": kernel is None,
        f"not {name}: it does not compute in {dtype}": dtype not in (torch.float16, torch.bfloat16),
        # a rank's share of a window differs from request to request
        f"not {name}: it has one window for all requests": windowed,
        f"not {name}: it takes heads of a multiple of 8 up to 256, these are of {dim}": dim % 8 or dim > 256,
        f"not {name}: it wants pages of a multiple of {kind.page} tokens, a rank's have {page}": page
        % kind.page,
        f"not {name}: it has no kernels for compute capability {major}": major not in (None, *kind.majors),
        f"not {name}: it waits for the device, which a CUDA graph cannot": graph and kind.waits,
    }
    return next((reason for reason, true in obstacles.items() if true), None)


def _about_version_4(version: int | None) -> list[str]:
    if version != 4 and flash.installed_version("flash-attn-4") is None:
        return []
    return ["not FlashAttention 4: with split KV, which single tokens want, it does not run on SM 9.0"]


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
