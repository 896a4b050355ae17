"""Sums of half-precision copies that are rounded once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def rounds_once(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.sum of this type accumulates in fp32 on this device; asked of the device, once.

    1 and four times a quarter of its spacing: every partial sum in half precision rounds back to 1.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    step = torch.finfo(dtype).eps / 4
    addends = torch.tensor([1.0, step, step, step, step], dtype=torch.float32)
    wanted = addends.sum(dim=0).to(dtype)
    columns = addends.to(device=device, dtype=dtype)[:, None].expand(5, 64).contiguous()
    return bool((columns.sum(dim=0).cpu() == wanted).all())


def sum_copies(copies: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, of one or more copies, accumulated in fp32 and rounded once to the type of `copies`."""
    if copies.shape[dim] == 1:
        return copies.squeeze(dim)
    if rounds_once(copies.device, copies.dtype):
        return copies.sum(dim=dim)
    return copies.sum(dim=dim, dtype=torch.float32).to(copies.dtype)
