"""The n x m grid of Helix: which grids are legal, and where a rank stands in one.

Pure arithmetic (no torch, no Megatron): see groups.py for the process groups made from a grid.

    T   tensor-parallel size, T = n * m                     tensor_model_parallel_size
    n   head groups (first level)                           head_parallel_size
    m   slices of each head's dimension (second level)      dim_parallel_size
    r   tensor-parallel rank, r = i * m + j; j is the fast axis (neighbours share NVLink)

    example, T = 6 as 3 x 2:      j=0  j=1
                            i=0    0    1     <- one dim group: same heads, different slices
                            i=1    2    3
                            i=2    4    5
                                   ^ one head group (same slice of all heads)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


class HelixConfigError(ValueError):
    """A setting the user gave cannot work; the message says which, why, and what would."""


@dataclass(frozen=True)
class AttentionShape:
    """What Helix must know about an attention layer.

    Args:
        num_attention_heads: H, query heads.
        num_query_groups: G, KV heads; divides H.
        kv_channels: d, dimension of a head.
        rotary_dim: leading dimensions of a head that RoPE rotates; 0 without RoPE.
        rotary_interleaved: RoPE pairs are (2x, 2x+1) instead of (x, x + rotary_dim / 2).
    """

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    rotary_dim: int = 0
    rotary_interleaved: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_query_groups", "kv_channels"):
            if getattr(self, name) < 1:
                raise HelixConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise HelixConfigError(
                f"{self.num_attention_heads} attention heads are not a multiple of "
                f"{self.num_query_groups} query groups"
            )
        if not 0 <= self.rotary_dim <= self.kv_channels or self.rotary_dim % 2:
            raise HelixConfigError(
                f"rotary dimension {self.rotary_dim} must be even and at most kv_channels {self.kv_channels}"
            )

    def __str__(self) -> str:
        rope = f", {self.rotary_dim} of them rotary" if self.rotary_dim else ""
        return (
            f"{self.num_attention_heads} query heads and {self.num_query_groups} KV heads "
            f"of dimension {self.kv_channels}{rope}"
        )


@dataclass(frozen=True)
class HelixGrid:
    """n head groups times m slices of the head dimension, inside one tensor-parallel group."""

    head_parallel_size: int
    dim_parallel_size: int

    @property
    def size(self) -> int:
        """T = n * m, the tensor-parallel size."""
        return self.head_parallel_size * self.dim_parallel_size

    def coordinate(self, rank: int) -> tuple[int, int]:
        """(head_rank i, dim_rank j) of a tensor-parallel rank."""
        return divmod(rank, self.dim_parallel_size)

    def __str__(self) -> str:
        return f"{self.head_parallel_size}x{self.dim_parallel_size}"


def illegal_reason(shape: AttentionShape, tp: int, n: int, m: int) -> str | None:
    """Why an n x m grid cannot split `shape` over `tp` ranks; None when it can."""
    if n < 1 or m < 1:
        return "both sizes must be at least 1"
    if n * m != tp:
        return f"n*m = {n * m}, but the tensor-parallel size is {tp}"
    if shape.num_query_groups % n:
        return f"n = {n} does not divide the {shape.num_query_groups} KV heads"
    if shape.kv_channels % m:
        return f"m = {m} does not divide the head dimension {shape.kv_channels}"
    if (shape.rotary_dim // 2) % m:
        return (
            f"m = {m} does not divide the {shape.rotary_dim // 2} rotary pairs of a head; "
            "a slice must hold whole pairs"
        )
    return None


def legal_grids(shape: AttentionShape, tp: int) -> list[HelixGrid]:
    """Every legal grid for `tp` ranks, most head groups first."""
    return [
        HelixGrid(n, tp // n)
        for n in range(tp, 0, -1)
        if tp % n == 0 and illegal_reason(shape, tp, n, tp // n) is None
    ]


def choose_grid(shape: AttentionShape, tp: int) -> HelixGrid:
    """The default grid: n = gcd(G, T) and m = T / n, so that heads are sliced as little as possible.

    Raises:
        HelixConfigError: no n x m grid can split this shape over `tp` ranks.
    """
    n = gcd(shape.num_query_groups, tp)
    grids = [grid for grid in legal_grids(shape, tp) if grid.head_parallel_size <= n]
    if not grids:
        raise HelixConfigError(
            f"no Helix grid splits {shape} over tensor-parallel size {tp}: "
            f"{illegal_reason(shape, tp, n, tp // n)}; {_sizes_that_work(shape, tp)}"
        )
    return grids[0]


def check_grid(shape: AttentionShape, tp: int, n: int | None, m: int | None) -> HelixGrid:
    """The grid the user asked for (either size may be None), or the default one.

    Raises:
        HelixConfigError: with the numbers, the reason, and the legal grids nearest to the request.
    """
    if n is None and m is None:
        return choose_grid(shape, tp)
    for name, size in (("head", n), ("dim", m)):
        if size is not None and size < 1:
            raise HelixConfigError(f"--helix-{name}-parallel-size {size}: it must be at least 1")
    n_asked = n if n is not None else tp // (m or 1)
    m_asked = m if m is not None else tp // (n or 1)
    reason = illegal_reason(shape, tp, n_asked, m_asked)
    if reason is None:
        return HelixGrid(n_asked, m_asked)
    grids = sorted(legal_grids(shape, tp), key=lambda g: abs(g.head_parallel_size - n_asked))
    way_out = (
        "legal grids: " + ", ".join(f"n={g.head_parallel_size} m={g.dim_parallel_size}" for g in grids)
        if grids
        else _sizes_that_work(shape, tp)
    )
    raise HelixConfigError(
        f"Helix grid n={n_asked} m={m_asked} cannot split {shape} over tensor-parallel size {tp}: "
        f"{reason}; {way_out}"
    )


def _sizes_that_work(shape: AttentionShape, tp: int) -> str:
    sizes = [t for t in range(1, max(2 * tp, 8) + 1) if legal_grids(shape, t)]
    nearest = sorted(sorted(sizes, key=lambda t: abs(t - tp))[:6])
    return "tensor-parallel sizes that work: " + ", ".join(map(str, nearest))
