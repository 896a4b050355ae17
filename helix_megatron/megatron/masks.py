"""What a mask tensor means beside a mask type: to Megatron's local core, and to Transformer Engine's.

Note [Masks and Transformer Engine]
    type causal          local core      unfused             flash, cuDNN's fused kernels
    tensor given         the tensor      causal and tensor   causal alone
    window               the window      all of them         causal and window
    Megatron builds GPT layers as causal and hands them the tensor (--reset-attention-mask: documents). Helix
    gives every call of a core its rows of the tensor under a causal type, so each kernel does with them what
    it does without Helix. Summed scores have no such kernel: there the tensor counts where Transformer
    Engine is sure to be unfused, and is refused elsewhere unless it says no more than causal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from helix_megatron.megatron.sdpa import CAUSAL_TYPES, bottom_right_causal_mask


def rows_of_chunk(
    mask: Tensor, chunk: tuple[int, int], shares: Sequence[tuple[int, int]], keys: int
) -> Tensor:
    """Rows of a mask for positions `chunk` of the sequence, and its first `keys` columns; a view.

    Args:
        mask: [B or 1, 1, S or 1, L]; its S rows are the positions of `shares`, one share after another.
        chunk: (start, stop), within one share.
    """
    mask = mask[..., :keys]
    if mask.shape[2] == 1:
        return mask
    start, stop = chunk
    first = sum(max(0, min(end, start) - begin) for begin, end in shares)
    return mask[:, :, first : first + stop - start]


def te_is_unfused(dtype: torch.dtype) -> bool:
    """Can Transformer Engine only take its unfused kernel? Its others are for half precision."""
    others = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN")  # --attention-backend sets them
    return dtype not in (torch.float16, torch.bfloat16) or all(os.environ.get(n, "1") == "0" for n in others)


def hidden_from_scores(
    mask: Tensor | None,
    mask_type: AttnMaskType,
    window: tuple[int, int] | None,
    shape: tuple[int, int],
    device: torch.device,
    te: torch.dtype | None,
) -> Tensor | None:
    """Where whole scores [.., S, L] of summed slices are hidden.

    Args:
        shape: (S, L).
        te: None for the local core's meaning of a mask; else Transformer Engine's for tensors of this dtype.

    Raises:
        NotImplementedError: Transformer Engine may ignore the mask, or it is a padding mask.
    """
    s, length = shape
    own = None
    if window is not None:
        seen = torch.ones(s, length, dtype=torch.bool, device=device).triu(length - s - window[0])
        own = ~seen.tril(length - s + window[1])
    elif mask_type in CAUSAL_TYPES and s > 1 and (te is not None or mask is None):
        own = bottom_right_causal_mask(s, length, device)
    if mask is None:
        return own
    if te is None:
        return mask if window is None else own
    if mask_type in (AttnMaskType.padding, AttnMaskType.padding_causal):
        raise NotImplementedError(
            "Helix: Transformer Engine's padding masks are not served by summed scores (m > 1); use "
            "--helix-comm-type a2a"
        )
    if mask_type is AttnMaskType.no_mask and window is None:
        return None
    if mask_type is not AttnMaskType.arbitrary and not te_is_unfused(te):
        if not _adds_nothing(mask, own, window):
            raise NotImplementedError(
                f"Helix: a mask of more than the causal one (--reset-attention-mask) with summed scores in "
                f"{te}: Transformer Engine's flash and fused kernels ignore it, its unfused one does not; "
                "say which with --attention-backend unfused, or use --helix-comm-type a2a"
            )
        return own
    return mask if own is None else own | mask


def _adds_nothing(mask: Tensor, own: Tensor | None, window: tuple[int, int] | None) -> bool:
    """Does `own` hide all that the mask does? Megatron hands one tensor to every layer: asked once of it."""
    if not hasattr(mask, "helix_adds_nothing"):
        mask.helix_adds_nothing = {}
    known = mask.helix_adds_nothing
    if window not in known:
        known[window] = not bool((mask if own is None else mask & ~own).any())
    return known[window]
