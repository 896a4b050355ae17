"""The planner's grid without a search, for `--attention-impl helix` alone, and why.

Every legal grid of a tensor-parallel size does equal work and keeps equal memory (uneven slices: on the mean
of the ranks). They differ in what the m ranks of a dim group exchange: 2 (m - 1) K' d / m elements of K and V
for a token (K' KV heads that a rank attends with, G m / T at most and one at least), and (m - 1)/m H d / T
each of queries and outputs where m does not divide a group's query heads;
with a cache of slices, 2 (m - 1) H / T scores for a token and each key it looks at. All grow with m, and so
does the group. So the rule is: as many head groups as the model allows. Whether another tensor-parallel size
would be better it cannot say; that takes a cluster and a search (`helix plan`).
"""

from __future__ import annotations

from helix_megatron.partition.grid import AttentionShape, HelixGrid, choose_grid, legal_grids
from helix_megatron.partition.layout import HelixLayout


def choose_grid_with_reason(shape: AttentionShape, tp: int) -> tuple[HelixGrid, str]:
    """The grid for `tp` ranks, and the reason in one line.

    Raises:
        HelixConfigError: no n x m grid can split this shape over `tp` ranks.
    """
    grid = choose_grid(shape, tp)
    if grid.dim_parallel_size == 1:
        return (
            grid,
            f"tp = {tp} divides the {shape.num_query_groups} KV heads, nothing is exchanged in attention",
        )
    others = [other for other in legal_grids(shape, tp) if other != grid]
    reason = (
        f"most head groups, so least to exchange: {exchanged_elements(shape, grid):,.0f} elements "
        "a token and layer"
    )
    if others:
        reason += " against " + ", ".join(
            f"{exchanged_elements(shape, other):,.0f} for {other}" for other in others[:3]
        )
    return grid, reason


def exchanged_elements(shape: AttentionShape, grid: HelixGrid) -> float:
    """Elements that a rank receives inside attention for one token, forward, comm type a2a; mean of ranks."""
    n, m = grid.head_parallel_size, grid.dim_parallel_size
    whole = shape.num_attention_heads // n % m == 0  # whole query heads stay where they are
    return sum(HelixLayout(shape, grid, "heads" if whole else "dims").exchanged_elements().values())
