"""Where a rank keeps the new tokens of a step: once a step, by one kernel on a GPU.

T new tokens; a logical block of B positions, of which a rank keeps B/m (partition/kv_layout.py).
"""

from __future__ import annotations

from torch import Tensor

from helix_megatron.kernels.merge import runs_triton
from helix_megatron.partition.kv_layout import KvInterleave


def place_tokens(
    blocks: Tensor,
    slots: Tensor,
    of_tokens: Tensor,
    places: Tensor,
    interleave: KvInterleave,
    rank: int,
    spare_block: int,
) -> None:
    """Block and slot of each new token on this rank, without asking the device how many are its own.

    Args:
        blocks, slots: [T] int64, written; tokens of other ranks go to slot 0 of the spare block.
        of_tokens, places: [T] logical block of each and its place in there, 0 ... B-1.
        spare_block: a block that belongs to no sequence.
    """
    if runs_triton(blocks.device):
        from helix_megatron.kernels import triton_plan

        triton_plan.place_tokens(blocks, slots, of_tokens, places, interleave, rank, spare_block)
        return
    others = interleave.owner(places) != rank
    blocks.copy_(of_tokens).masked_fill_(others, spare_block)
    slots.copy_(interleave.slot(places)).masked_fill_(others, 0)
