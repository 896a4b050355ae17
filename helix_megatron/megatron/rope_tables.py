"""What of Megatron's RoPE tables a rank rotates by: rows of its query positions, columns of its slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helix_megatron.exchange.slices import select_positions
from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.partition.layout import HelixLayout

Tables = tuple[Tensor | None, Tensor | None]
"""Of queries and keys, [s, 1, 1, rotary_dim] each; None: not rotated."""


def check(tables: Tables, rotary_dim: int) -> None:
    """
    Raises:
        HelixConfigError: they rotate another number of dimensions than Helix was configured for.
    """
    for table in tables:
        if table is not None and table.shape[-1] != rotary_dim:
            raise HelixConfigError(
                f"RoPE rotates {table.shape[-1]} dimensions of each head, but Helix was configured for "
                f"{rotary_dim}; set HelixConfig.rotary_percent to the model's rotary_percent (0 without RoPE)"
            )


def of_positions(table: Tensor | None, length: int, layout: HelixLayout, dim_rank: int) -> Tensor | None:
    """Rows for a rank's share of `length` query positions ("dims" placement); None where it has none."""
    parts = layout.position_parts
    if table is None or parts == 1:
        return table

    def cut() -> Tensor:
        return select_positions(table[:length], dim_rank % parts, parts)

    rows = _kept_with(table, (layout, dim_rank, length), cut)
    return rows if len(rows) else None


def of_slice(table: Tensor | None, layout: HelixLayout, dim_rank: int, dims: Tensor) -> Tensor | None:
    """Columns `dims`, the rotary dimensions of a rank's slice."""
    if table is None:
        return None
    return _kept_with(table, (layout, dim_rank), lambda: table.index_select(-1, dims))


def is_capturing(table: Tensor) -> bool:
    """Whether what is cut from a table now is a launch of a CUDA graph."""
    return table.is_cuda and torch.cuda.is_current_stream_capturing()


def _kept_with(table: Tensor, key: Any, make: Callable[[], Tensor]) -> Tensor:
    """What is cut from a table, made once and kept with it.

    Megatron hands the same table to every layer and step (several models may share one), and it is as long as
    the longest sequence. While a CUDA graph is captured nothing is computed yet, and nothing kept.
    """
    if is_capturing(table):
        return make()
    kept = table.__dict__.setdefault("helix_cuts", {})
    key = (key, torch.is_inference_mode_enabled())
    if key not in kept:
        kept[key] = make()
    return kept[key]
