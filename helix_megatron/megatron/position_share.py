"""Attention of a share of the query positions: heads alone do not go round, or context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from helix_megatron.exchange.slices import select_positions
from helix_megatron.megatron.masks import rows_of_chunk
from helix_megatron.megatron.sdpa import CAUSAL_TYPES, bottom_right_causal_mask
from helix_megatron.partition.layout import HelixLayout, global_chunks, position_chunks

RunCore = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttnMaskType], Tensor]


@dataclass(frozen=True, eq=False)
class PositionShare:
    """Which positions of the sequence this rank's queries are.

    Args:
        layout: shape and grid.
        part, parts: of the query positions of a dim group.
        cp_group: ranks that hold a zigzag share of the sequence each; None for the whole of it.
        window: sliding window, or None.
        local: the core is Megatron's local one, or PyTorch's in its place; else Transformer Engine's.
        needs_mask: it is never causal by itself.
    """

    layout: HelixLayout
    part: int
    parts: int
    cp_group: dist.ProcessGroup | None
    window: tuple[int, int] | None
    local: bool
    needs_mask: bool

    def attend(
        self,
        run_core: RunCore,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        mask_type: AttnMaskType,
        length: int,
    ) -> Tensor:
        """Attention of this rank's query positions over all keys: [S_p, B, N/a * D].

        Causal positions look at their prefix only, so each zigzag chunk runs on its own with a causal
        mask aligned to the bottom right, and its rows of the tensor (Note [Masks and Transformer Engine]).
        """
        if self.window is not None and self.local:  # it looks at the window alone
            mask, mask_type = None, AttnMaskType.causal
        causal = mask_type in CAUSAL_TYPES
        if not self.local:
            self._refuse_masks(mask, mask_type)
        if not causal or (mask is not None and self.local):
            if mask is not None and mask.shape[2] != 1:
                mask = select_positions(mask, self.part, self.parts, dim=2)
            return _core_or_empty(run_core, query, key, value, mask, mask_type)
        cp = self.cp_group
        owner, owners = (cp.rank(), cp.size()) if cp is not None else (0, 1)
        shares = position_chunks(length * owners, owner, owners)
        chunks = global_chunks(length, self.part, self.parts, owner, owners)
        queries = query.split([stop - start for start, stop in chunks])
        outs = []
        for (start, stop), chunk in zip(chunks, queries, strict=True):
            rows = None
            if mask is not None:
                rows = rows_of_chunk(mask, (start, stop), shares, stop)
            elif self.needs_mask and self.window is None and stop > start:
                rows = bottom_right_causal_mask(stop - start, stop, key.device)
            seen, mask_type = (key[:stop], value[:stop]), AttnMaskType.causal_bottom_right
            outs.append(_core_or_empty(run_core, chunk, *seen, rows, mask_type))
        return torch.cat(outs)

    def _refuse_masks(self, mask: Tensor | None, mask_type: AttnMaskType) -> None:
        """Transformer Engine reads these of a whole sequence, not of some rows of it."""
        padding = mask_type in (AttnMaskType.padding, AttnMaskType.padding_causal)
        reasons = {
            "padding masks": mask is not None and padding,
            f"sliding windows with {mask_type.name} attention": (
                self.window is not None and mask_type not in CAUSAL_TYPES
            ),
        }
        for what, used in reasons.items():
            if used:
                raise NotImplementedError(
                    f"Helix: Transformer Engine's {what} are not supported for a share of the query "
                    f"positions, which grid {self.layout.grid} needs for {self.layout.shape}; use a grid "
                    "whose m divides the query heads of a group"
                )


def _core_or_empty(
    run_core: RunCore,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_type: AttnMaskType,
) -> Tensor:
    if query.shape[0]:
        return run_core(query, key, value, mask, mask_type)
    # No position falls to this rank. Stay in the graph of Q, K and V all the same: the other ranks
    # wait for this rank's part of the backward exchanges.
    ratio = query.shape[2] // key.shape[2]
    scores = torch.einsum("sbnd,lbnd->bnsl", query, key.repeat_interleave(ratio, dim=2))
    out = torch.einsum("bnsl,lbnd->sbnd", scores, value.repeat_interleave(ratio, dim=2))
    return out.flatten(-2)
