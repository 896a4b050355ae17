"""Which rows and columns of Megatron's standard attention weights each Helix rank holds.

Pure index arithmetic (numpy only). Initialisation, checkpoints, tests and pictures derive from it.

Note [The standard layout, and Helix as a permutation]
    Megatron's `linear_qkv` has, for each KV head g in order, rows
        [ its H/G query heads | k_g | v_g ],  d rows each,
    and `linear_proj` has, for each query head in order, d columns. Tensor parallelism gives rank r
    the r-th contiguous chunk. Helix keeps those modules and only changes WHICH rows and columns a
    rank holds: rank (i, j) holds slice j of the heads of head group i. Put the rows of all ranks one
    after another and you have a permutation of the standard weight.

Note [Slices]                              rotary_dim = 8, d = 12, m = 2, rotate-half pairs (x, x+4)
    queries and keys, slice 0:   0 1 . . | 4 5 . . | 8 9 . .      whole rotary pairs: x and x+4
                      slice 1:   . . 2 3 | . . 6 7 | . . 10 11    then a share of the rest
    values,           slice 0:   0 1 2 3 4 5 . . . . . .          contiguous: linear_proj columns
                      slice 1:   . . . . . . 6 7 8 9 10 11        stay contiguous too
    Inside a slice the pairs keep their arrangement, so Megatron's own RoPE code rotates a slice when it
    is given the slice's columns of the frequency table. Dot products do not care which dimension is where.
    `per-slice` softmax makes every slice a head of its own, so there both are contiguous.

Note [Uneven slices]                              d = rotary_dim = 10, m = 3, rotate-half pairs (x, x+5)
    queries and keys, slice 0:   0 1 . . . | 5 6 . . .        m divides neither d nor the 5 pairs: whole pairs
                      slice 1:   . . 2 3 . | . . 7 8 .        are dealt one by one, each to the slice that has
                      slice 2:   . . . . 4 | . . . . 9        least, and then the rest likewise
    values,           slice 0:   0 1 2 3 . . . . . .          as many as of the keys, contiguous
                      slice 1:   . . . . 4 5 6 7 . .
                      slice 2:   . . . . . . . . 8 9
    "Least" counts by weight: slices of weights 2, 1, 1 get 6, 2, 2 of these. Every slice has one pair at
    least (without RoPE, one dimension). Where m divides the pairs and the rest, slices are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from math import gcd

import numpy as np
from numpy.typing import NDArray

from helix_megatron.partition.grid import AttentionShape, HelixConfigError, HelixGrid, illegal_reason

Indices = NDArray[np.int64]


def _deal(units: int, held: list[int], weights: tuple[float, ...]) -> list[int]:
    """Deal units one by one, each to the holder that then has least for its weight (the first of equals)."""
    held = list(held)
    for _ in range(units):
        least = min(range(len(held)), key=lambda j: (held[j] + 1) / weights[j])
        held[least] += 1
    return held


@cache
def slice_bounds(
    shape: AttentionShape, m: int, weights: tuple[float, ...] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where slices begin and end: slice j has the units bounds[j] ... bounds[j + 1] - 1.

    Args:
        weights: of the slices' sizes, m positive numbers; None for equal ones.
    Returns:
        bounds of the rotary pairs, and of all dimensions (pairs count two), m + 1 numbers each.
    """
    weights = weights if weights is not None else (1.0,) * m
    pairs = shape.rotary_dim // 2
    if m == 1:
        return (0, pairs), (0, shape.kv_channels)
    if pairs:
        dealt = _deal(pairs - m, [1] * m, weights)
        sizes = _deal(shape.kv_channels - shape.rotary_dim, [2 * count for count in dealt], weights)
    else:
        dealt = [0] * m
        sizes = _deal(shape.kv_channels - m, [1] * m, weights)
    return tuple(accumulate(dealt, initial=0)), tuple(accumulate(sizes, initial=0))


@dataclass(frozen=True)
class HelixLayout:
    """Index arithmetic of one attention layer on one grid.

    Args:
        shape: heads and dimensions of the layer.
        grid: n x m.
        query_placement: "dims" (rank (i, j) holds slice j of all H/n query heads of group i) or
            "heads" (it holds H/(n*m) whole query heads; needs m | H/n). K and V are always sliced.
        per_slice: slices are independent heads (the paper's formula), hence contiguous.
        output_gate: every query head has as many gate rows, which multiply its output.
        slice_weights: of the slices' sizes, m positive numbers; None: as equal as can be.
    """

    shape: AttentionShape
    grid: HelixGrid
    query_placement: str = "dims"
    per_slice: bool = False
    output_gate: bool = False
    slice_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.query_placement not in ("dims", "heads"):
            raise HelixConfigError(f"query placement {self.query_placement!r} is neither dims nor heads")
        if self.query_placement == "heads" and self.query_heads % self.grid.dim_parallel_size:
            raise HelixConfigError(
                f"query placement 'heads' needs whole heads on every rank, but m = "
                f"{self.grid.dim_parallel_size} does not divide the {self.query_heads} query heads of a "
                f"head group (grid {self.grid}, {self.shape}); use 'dims'"
            )
        if self.query_placement == "heads" and self.per_slice:
            raise HelixConfigError(
                "query placement 'heads' keeps whole query heads, but per-slice softmax works on slices; "
                "use 'dims'"
            )
        m, weights = self.grid.dim_parallel_size, self.slice_weights
        if weights is not None and len(weights) != m:
            raise HelixConfigError(
                f"{len(weights)} slice weights were given, but grid {self.grid} has {m} slices; give {m}"
            )
        n, tp = self.grid.head_parallel_size, self.grid.size
        reason = illegal_reason(self.shape, tp, n, m, even=self.per_slice)
        if reason is not None:
            raise HelixConfigError(f"Helix grid {self.grid} cannot split {self.shape}: {reason}")

    # ---- sizes ----
    @property
    def query_heads(self) -> int:
        """hq = H / n, query heads of one head group."""
        return self.shape.num_attention_heads // self.grid.head_parallel_size

    @property
    def kv_heads(self) -> int:
        """hk = G / n, KV heads of one head group."""
        return self.shape.num_query_groups // self.grid.head_parallel_size

    @cached_property
    def _bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return slice_bounds(self.shape, self.grid.dim_parallel_size, self.slice_weights)

    def slice_dims(self, dim_rank: int) -> int:
        """d_s of slice j: dimensions of queries, keys and values alike."""
        _, bounds = self._bounds
        return bounds[dim_rank + 1] - bounds[dim_rank]

    def slice_pairs(self, dim_rank: int) -> int:
        """Rotary pairs of query/key slice j."""
        bounds, _ = self._bounds
        return bounds[dim_rank + 1] - bounds[dim_rank]

    @cached_property
    def all_slice_dims(self) -> list[int]:
        """d_s of every slice."""
        return [self.slice_dims(j) for j in range(self.grid.dim_parallel_size)]

    @cached_property
    def is_even(self) -> bool:
        """All slices are equal, of rotary pairs and of other dimensions."""
        slices = range(self.grid.dim_parallel_size)
        return len({(self.slice_dims(j), self.slice_pairs(j)) for j in slices}) == 1

    @property
    def slice_dim(self) -> int:
        """d_s = d / m, where slices are even."""
        assert self.is_even, "slices are uneven; ask slice_dims(j)"
        return self.shape.kv_channels // self.grid.dim_parallel_size

    @property
    def head_parts(self) -> int:
        """a = gcd(hq, m): parts into which the query heads of a group are dealt in the all-to-all."""
        return gcd(self.query_heads, self.grid.dim_parallel_size)

    @property
    def position_parts(self) -> int:
        """c = m / a: parts into which the query positions are dealt when heads alone do not suffice."""
        return self.grid.dim_parallel_size // self.head_parts

    # ---- dimensions of a head ----
    def rotary_dims(self, dim_rank: int) -> Indices:
        """Rotary dimensions (columns of the RoPE table) of query/key slice j: [2 slice_pairs(j)]."""
        m, rot = self.grid.dim_parallel_size, self.shape.rotary_dim
        bounds, _ = self._bounds
        pair = np.arange(bounds[dim_rank], bounds[dim_rank + 1])
        if self.per_slice:  # a head of its own: the same frequencies as a head of dimension d / m
            pair = np.arange(len(pair)) * m
        if self.shape.rotary_interleaved:
            return np.stack([2 * pair, 2 * pair + 1], axis=1).reshape(-1)
        return np.concatenate([pair, pair + rot // 2])

    def key_dims(self, dim_rank: int) -> Indices:
        """Dimensions of a head that query/key slice j holds, in local order: [slice_dims(j)]."""
        if self.per_slice or self.grid.dim_parallel_size == 1:
            return self.value_dims(dim_rank)
        pairs, dims = self._bounds
        start, stop = (dims[j] - 2 * pairs[j] for j in (dim_rank, dim_rank + 1))  # of the rest
        rest = np.arange(self.shape.rotary_dim + start, self.shape.rotary_dim + stop)
        return np.concatenate([self.rotary_dims(dim_rank), rest])

    def value_dims(self, dim_rank: int) -> Indices:
        """Dimensions of a head that value/output slice j holds: contiguous, [slice_dims(j)]."""
        _, bounds = self._bounds
        return np.arange(bounds[dim_rank], bounds[dim_rank + 1])

    # ---- heads ----
    def kv_head_of(self, head_part: int, parts: int) -> list[int]:
        """KV head (inside the head group) of each query head of part `head_part` of `parts`."""
        per_part = self.query_heads // parts
        ratio = self.query_heads // self.kv_heads
        return [(head_part * per_part + q) // ratio for q in range(per_part)]

    @cached_property
    def kv_ranges(self) -> list[tuple[int, int]]:
        """KV heads of the group, first and last + 1, that each rank of a dim group attends with."""
        m = self.grid.dim_parallel_size
        parts = m if self.query_placement == "heads" else self.head_parts
        needed = [self.kv_head_of(t * parts // m, parts) for t in range(m)]
        return [(heads[0], heads[-1] + 1) for heads in needed]

    @cached_property
    def kv_needed(self) -> list[int]:
        """K', KV heads that each rank of a dim group attends with."""
        return [stop - first for first, stop in self.kv_ranges]

    @cached_property
    def kv_blocks(self) -> int | None:
        """x, where the KV heads are x equal blocks and each is needed by m / x neighbours; else None."""
        m, heads = self.grid.dim_parallel_size, self.kv_heads
        x = len(set(self.kv_ranges))
        if heads % x or m % x:
            return None
        size = heads // x
        blocks = [(t * x // m * size, (t * x // m + 1) * size) for t in range(m)]
        return x if self.kv_ranges == blocks else None

    def exchanged_elements(self) -> dict[str, float]:
        """Elements that a rank receives per token, layer and forward pass (a2a); the mean of the ranks."""
        m, d = self.grid.dim_parallel_size, self.shape.kv_channels
        if self.per_slice or m == 1:
            return {}
        others = [d - d_s for d_s in self.all_slice_dims]
        moved = {"K and V": sum(2.0 * k * o for k, o in zip(self.kv_needed, others, strict=True)) / m}
        if self.query_placement == "dims":
            queries = (m - 1) / m * self.query_heads * d / m
            moved |= {"queries": queries, "outputs": queries}
        return moved

    def local_query_heads(self, rank: int) -> Indices:
        """Query heads of which this tensor-parallel rank holds something."""
        i, j = self.grid.coordinate(rank)
        heads = np.arange(i * self.query_heads, (i + 1) * self.query_heads)
        if self.query_placement == "heads":
            return np.split(heads, self.grid.dim_parallel_size)[j]
        return heads

    # ---- weights ----
    def qkv_rows(self, rank: int) -> Indices:
        """Rows of the standard `linear_qkv` weight (and bias) that `rank` holds, in local order.

        Local order: "dims": for each KV head of the group [query slices | k slice | v slice];
        "heads": [whole query heads | k slices of all KV heads | v slices of all KV heads].
        With m = 1, Megatron's order, which is that of "dims". Gates follow the query heads they belong to,
        sliced like the output they multiply.

        Returns: int64, [(hq + 2 hk) d_s], with "heads" [hq d / m + 2 hk d_s], for even slices (H + 2G) d / T;
            with an output gate as many again as there are query rows.
        """
        d = self.shape.kv_channels
        ratio = self.shape.num_attention_heads // self.shape.num_query_groups
        i, j = self.grid.coordinate(rank)
        key_dims, value_dims = self.key_dims(j), self.value_dims(j)
        groups = range(i * self.kv_heads, (i + 1) * self.kv_heads)

        def row(group: int, head: int) -> int:  # first row of a head inside the block of a KV head
            return (group * (values + 1) + head) * d

        gates = ratio if self.output_gate else 0  # of a KV head; then come its key and value
        keys, values = ratio + gates, ratio + gates + 1
        if self.query_placement == "heads" and self.grid.dim_parallel_size > 1:
            heads = self.local_query_heads(rank)
            blocks = [row(int(h) // ratio, int(h) % ratio) + np.arange(d) for h in heads]
            if gates:
                blocks += [row(int(h) // ratio, ratio + int(h) % ratio) + np.arange(d) for h in heads]
            blocks += [row(g, keys) + key_dims for g in groups]
            blocks += [row(g, values) + value_dims for g in groups]
        else:
            blocks = []
            for g in groups:
                blocks += [row(g, h) + key_dims for h in range(ratio)]
                blocks += [row(g, ratio + h) + value_dims for h in range(gates)]
                blocks += [row(g, keys) + key_dims, row(g, values) + value_dims]
        return np.concatenate(blocks)

    def proj_columns(self, rank: int) -> Indices:
        """Columns of the standard `linear_proj` weight that `rank` holds, in local order: [hq d_s] int64.

        With "heads" these are Megatron's own contiguous chunk.
        """
        _, j = self.grid.coordinate(rank)
        dims = np.arange(self.shape.kv_channels) if self.query_placement == "heads" else self.value_dims(j)
        return np.concatenate([int(h) * self.shape.kv_channels + dims for h in self.local_query_heads(rank)])

    def held(self, dim: int, rank: int) -> Indices:
        """Rows of `linear_qkv` (dim 0) or columns of `linear_proj` (dim 1) that `rank` holds."""
        return self.qkv_rows(rank) if dim == 0 else self.proj_columns(rank)

    def qkv_permutation(self) -> Indices:
        """Rows of all ranks one after another: a permutation of the standard `linear_qkv`."""
        return np.concatenate([self.qkv_rows(r) for r in range(self.grid.size)])

    def proj_permutation(self) -> Indices:
        """Columns of all ranks one after another: a permutation of the standard `linear_proj`."""
        return np.concatenate([self.proj_columns(r) for r in range(self.grid.size)])


def contiguous_runs(indices: Indices) -> list[tuple[int, int]]:
    """(start, length) of the maximal runs of consecutive numbers, in order: 4 5 6 0 1 -> (4, 3), (0, 2)."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    bounds = [0, *breaks.tolist(), len(indices)]
    return [(int(indices[a]), b - a) for a, b in pairwise(bounds)]


def position_chunks(length: int, part: int, parts: int) -> list[tuple[int, int]]:
    """Half-open position ranges of one part of a sequence, in increasing order.

    With several parts they are dealt zigzag (chunks p and 2c-1-p of 2c), so that causal attention costs
    every part the same:      c = 2:   | 0 | 1 | 1 | 0 |
    Chunks differ by at most one position when 2c does not divide the length, and may be empty.
    """
    if parts == 1:
        return [(0, length)]
    bounds = [length * k // (2 * parts) for k in range(2 * parts + 1)]
    return [(bounds[k], bounds[k + 1]) for k in (part, 2 * parts - 1 - part)]


def part_length(length: int, part: int, parts: int) -> int:
    """Number of positions in one part."""
    return sum(stop - start for start, stop in position_chunks(length, part, parts))


def global_chunks(length: int, part: int, parts: int, owner: int, owners: int) -> list[tuple[int, int]]:
    """position_chunks of a share of the sequence, as positions in the whole of it.

    `length` positions are the zigzag share of one of several owners (context parallelism); chunks are cut
    where neighbours in the share are none in the sequence.
    """
    shares = position_chunks(length * owners, owner, owners)
    offset, found = 0, []
    for start, stop in shares:
        for first, last in position_chunks(length, part, parts):
            low, high = max(first, offset), min(last, offset + stop - start)
            found.append((start + low - offset, start + max(low, high) - offset))
        offset += stop - start
    order = sorted(chunk for chunk in found if chunk[1] > chunk[0])
    return order or [(0, 0)]
