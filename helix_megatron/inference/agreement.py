"""Ranks of a dim group agree on the kernel for several new tokens of a request (no knowledge of Megatron).

Parts of the two ways do not fit together: one has what a rank keeps of the new keys, for all heads, the other
all new keys, for a share of the heads (kernels/new_tokens.py). A kernel that one rank alone has, or has found
wrong, is taken by none. Single tokens need no agreement: every kernel computes the same part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from helix_megatron.kernels.flash import FLASH
from helix_megatron.kernels.selection import choose_for


@dataclass(frozen=True)
class SeveralTokens:
    """What decides which kernel attends for several new tokens of a request, the same on all ranks.

    Args:
        device, dtype, shape: of the cache; the shape is that of a page, [page, K, D].
        windowed, flash_version: as selection.choose.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    windowed: bool
    flash_version: int | None

    @classmethod
    def of(cls, keys: Tensor, left: int | None, flash_version: int | None) -> SeveralTokens:
        """For a cache [pages, page, K, D], and a window of so many positions."""
        return cls(keys.device, keys.dtype, keys.shape[1:], left is not None, flash_version)

    def choice(self) -> str | None:
        """This rank's."""
        keys = torch.empty(0, *self.shape, dtype=self.dtype, device=self.device)
        return choose_for(keys, self.dtype, self.windowed, self.flash_version).several


@functools.cache
def all_choose_alike(group: dist.ProcessGroup, kind: SeveralTokens) -> bool:
    """Whether every rank of `group` has found the same FlashAttention, and found it right. Asked once.

    One all-reduce of two integers.
    """
    number = ["", *FLASH].index(kind.choice() or "")
    least = torch.tensor([number, -number], dtype=torch.int32, device=kind.device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    low, high = least.tolist()
    return low == -high > 0
