"""Weights from the ranks of one model to those of another, by the standard rows that each of them holds.

Megatron's `swap_model_weights` (reinforcement learning: from the layout of training to that of inference)
plans what to copy as if rank r held the r-th chunk. A rank of sliced heads holds other rows (columns of
`linear_proj`), scattered over the standard weight. Knowing both layouts is knowing every row's place:

    d = 8, rotate-half RoPE, rows of one key head      0 1 2 3 4 5 6 7
    source: slices, m = 2             rank 0 holds     0 1 4 5            rank 1     2 3 6 7
    destination: vanilla, one rank    rows             0 1 2 3 4 5 6 7
    what it receives, run by run      from rank        0 0 1 1 0 0 1 1
                                      its local rows   0 1 0 1 2 3 2 3

Pure arithmetic; weight_readers.py puts it into Megatron's planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from helix_megatron.partition.layout import HelixLayout, Indices, contiguous_runs


class Transfer(NamedTuple):
    """A run of rows (columns) that one rank of the source has and one of the destination needs.

    Args:
        source: tensor-parallel rank in the source.
        start: first local row there.
        destination_start: first local row here.
        length: number of rows.
    """

    source: int
    start: int
    destination_start: int
    length: int


def transfers(source: Sequence[Indices], destination: Indices) -> list[Transfer]:
    """What a rank receives, in the order of its own rows, in as few runs as there are.

    Args:
        source: the standard rows that each rank of the source holds, in local order; together each row once.
        destination: those that this rank is to hold.
    """
    whole = sum(len(rows) for rows in source)
    place = np.empty(whole, dtype=np.int64)  # of each standard row: rank * whole + local row
    for rank, rows in enumerate(source):
        place[rows] = rank * whole + np.arange(len(rows))
    found, filled = [], 0
    for first, length in contiguous_runs(place[destination]):  # of two ranks' places none are consecutive
        found.append(Transfer(*divmod(first, whole), filled, length))
        filled += length
    return found


@cache
def sizes(layout: HelixLayout, dim: int) -> tuple[int, ...]:
    """How many rows (columns) each rank holds."""
    return tuple(len(layout.held(dim, rank)) for rank in range(layout.grid.size))


def _rows_of_ranks(layout: HelixLayout | None, dim: int, ranks: int, whole: int) -> list[Indices]:
    if layout is None:
        return np.split(np.arange(whole), ranks)
    return [layout.held(dim, rank) for rank in range(ranks)]


@cache
def plan(
    source: HelixLayout | None,
    destination: HelixLayout | None,
    dim: int,
    ranks: tuple[int, int],
    whole: int,
    rank: int,
) -> tuple[Transfer, ...]:
    """What `rank` of the destination receives of a standard `linear_qkv` (dim 0) or `linear_proj` (dim 1).

    Args:
        source, destination: layout of the sliced heads; None where ranks hold contiguous chunks.
        ranks: tensor-parallel sizes of the two.
        whole: rows (columns) of the standard weight.
    """
    rows = [
        _rows_of_ranks(layout, dim, n, whole)
        for layout, n in zip((source, destination), ranks, strict=True)
    ]
    return tuple(transfers(rows[0], rows[1][rank]))
