"""Which tensor-parallel sizes a model runs at: Megatron's word beside Helix's grid.

Pure arithmetic. What Megatron says is that of `TransformerConfig` (core 0.19); tests ask it.
"""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.models.popular import PopularModel
from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixConfigError, HelixGrid, choose_grid


@dataclass(frozen=True)
class Support:
    """One model at one tensor-parallel size.

    Args:
        kv_copies: how often Megatron keeps every KV head; 0 where it refuses the layout.
        refusal: Megatron's reason, in its own terms; empty where it runs.
        grid: the grid that Helix takes; None where it refuses too.
        helix_refusal: Helix's reason.
    """

    shape: ModelShape | PopularModel
    tp: int
    kv_copies: int
    refusal: str
    grid: HelixGrid | None
    helix_refusal: str = ""

    @property
    def megatron(self) -> str:
        """Megatron's word in a few words."""
        if self.refusal:
            return f"refuses: {self.refusal}"
        return "runs" if self.kv_copies == 1 else f"runs, {self.kv_copies} copies of K and V"

    @property
    def helix(self) -> str:
        """Helix's word in a few words."""
        if self.grid is None:
            return f"refuses: {self.helix_refusal}"
        return f"{self.grid}" + (" (is Megatron)" if self.grid.dim_parallel_size == 1 else "")


def find_support(shape: ModelShape | PopularModel, tp: int) -> Support:
    """What Megatron and Helix say to `shape` on `tp` tensor-parallel ranks."""
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    wrong = [f"{what.format(size)} do not divide by {tp}" for what, size in shape.divided_sizes if size % tp]
    indivisible = wrong[0] if wrong else ""
    refusal = indivisible
    if heads % tp:
        refusal = f"{heads} heads are not a multiple of {tp}"
    elif groups % tp and tp % groups:
        refusal = f"{groups} KV heads are no multiple or divisor of {tp}"
    copies = 0 if refusal else max(1, tp // groups)
    if indivisible:
        return Support(shape, tp, copies, refusal, None, indivisible)
    try:
        grid = choose_grid(shape.attention, tp)
    except HelixConfigError as error:
        return Support(shape, tp, copies, refusal, None, str(error))
    return Support(shape, tp, copies, refusal, grid)
