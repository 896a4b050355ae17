"""The n x m grid of Helix: which grids are legal, and where a rank stands in one.

Pure arithmetic (no torch, no Megatron): see groups.py for the process groups made from a grid.

    T   tensor-parallel size, T = n * m                     tensor_model_parallel_size
    n   head groups (first level)                           head_parallel_size
    m   slices of each head's dimension (second level)      dim_parallel_size; need not divide it
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


def even_slices(shape: AttentionShape, m: int) -> bool:
    """Whether m slices hold equally many rotary pairs and equally many other dimensions."""
    return shape.kv_channels % m == 0 and (shape.rotary_dim // 2) % m == 0


def illegal_reason(shape: AttentionShape, tp: int, n: int, m: int, even: bool = False) -> str | None:
    """Why an n x m grid cannot split `shape` over `tp` ranks; None when it can.

    Args:
        even: only slices of equal size will do (per-slice softmax: they are heads).
    """
    if n < 1 or m < 1:
        return "both sizes must be at least 1"
    if n * m != tp:
        return f"n*m = {n * m}, but the tensor-parallel size is {tp}"
    if shape.num_query_groups % n:
        return f"n = {n} does not divide the {shape.num_query_groups} KV heads"
    pairs = shape.rotary_dim // 2
    if pairs and m > pairs:
        return f"m = {m} is more than the {pairs} rotary pairs of a head; a slice must hold a whole pair"
    if m > shape.kv_channels:
        return f"m = {m} is more than the {shape.kv_channels} dimensions of a head"
    if even and not even_slices(shape, m):
        what = (
            f"the {pairs} rotary pairs"
            if shape.kv_channels % m == 0
            else f"the {shape.kv_channels} dimensions"
        )
        return (
            f"m = {m} does not divide {what} of a head, and slices with a softmax of their own must be equal"
        )
    return None


def legal_grids(shape: AttentionShape, tp: int, even: bool = False) -> list[HelixGrid]:
    """Every legal grid for `tp` ranks, most head groups first; with `even`, those with equal slices."""
    return [
        HelixGrid(n, tp // n)
        for n in range(tp, 0, -1)
        if tp % n == 0 and illegal_reason(shape, tp, n, tp // n, even) is None
    ]


def choose_grid(shape: AttentionShape, tp: int, even: bool = False) -> HelixGrid:
    """The default grid: n = gcd(G, T) and m = T / n, so that heads are sliced as little as possible.

    A smaller n has a multiple of this m: where any grid's slices are equal, those of this one are.

    Raises:
        HelixConfigError: no n x m grid can split this shape over `tp` ranks.
    """
    n = gcd(shape.num_query_groups, tp)
    grids = [grid for grid in legal_grids(shape, tp, even) if grid.head_parallel_size <= n]
    if not grids:
        raise HelixConfigError(
            f"no Helix grid splits {shape} over tensor-parallel size {tp}: "
            f"{illegal_reason(shape, tp, n, tp // n, even)}; {_sizes_that_work(shape, tp, even)}"
        )
    return grids[0]


def check_grid(shape: AttentionShape, tp: int, n: int | None, m: int | None, even: bool = False) -> HelixGrid:
    """The grid the user asked for (either size may be None), or the default one.

    Args:
        even: only slices of equal size will do.

    Raises:
        HelixConfigError: with the numbers, the reason, and the legal grids nearest to the request.
    """
    if n is None and m is None:
        return choose_grid(shape, tp, even)
    for name, size in (("head", n), ("dim", m)):
        if size is not None and size < 1:
            raise HelixConfigError(f"--helix-{name}-parallel-size {size}: it must be at least 1")
    n_asked = n if n is not None else tp // (m or 1)
    m_asked = m if m is not None else tp // (n or 1)
    reason = illegal_reason(shape, tp, n_asked, m_asked, even)
    if reason is None:
        return HelixGrid(n_asked, m_asked)
    grids = sorted(legal_grids(shape, tp, even), key=lambda g: abs(g.head_parallel_size - n_asked))
    way_out = (
        "legal grids: " + ", ".join(f"n={g.head_parallel_size} m={g.dim_parallel_size}" for g in grids)
        if grids
        else _sizes_that_work(shape, tp, even)
    )
    raise HelixConfigError(
        f"Helix grid n={n_asked} m={m_asked} cannot split {shape} over tensor-parallel size {tp}: "
        f"{reason}; {way_out}"
    )


def _sizes_that_work(shape: AttentionShape, tp: int, even: bool) -> str:
    sizes = [t for t in range(1, max(2 * tp, 8) + 1) if legal_grids(shape, t, even)]
    nearest = sorted(sorted(sizes, key=lambda t: abs(t - tp))[:6])
    return "tensor-parallel sizes that work: " + ", ".join(map(str, nearest))
