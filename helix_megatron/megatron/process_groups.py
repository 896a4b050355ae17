"""Makes the process groups of the grid as Megatron makes its own, and registers them beside those.

Modules take a `HelixGroups` as an argument; the registry is for code that Megatron calls without one,
as `ProcessGroupCollection.use_mpu_process_groups` is in Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from helix_megatron.exchange.groups import HelixGroups
from helix_megatron.partition.grid import HelixConfigError, HelixGrid

_registered: HelixGroups | None = None


def initialize_helix_parallel(
    grid: HelixGrid,
    tp_group: dist.ProcessGroup,
    timeout: timedelta | None = None,
    nccl_settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> HelixGroups:
    """Create the dim and head groups of every tensor-parallel group and register this rank's.

    Collective over the world: call it on every rank, after Megatron's `initialize_model_parallel`.

    Args:
        timeout: of their collectives; None for torch's default.
        nccl_settings: NCCL options by the name of a group, as in Megatron's --nccl-communicator-config-path;
            "helix_dim" and "helix_head" are these groups', which otherwise get those of "tp".

    Raises:
        HelixConfigError: the grid does not fill the tensor-parallel group, or that group's ranks are not
            consecutive (Megatron's `order` must begin with "tp", as all of its own orders do).
        RuntimeError: groups of another grid are registered.
    """
    global _registered
    if _registered is not None:
        if _registered.grid != grid:
            raise RuntimeError(
                f"Helix groups of grid {_registered.grid} exist; call destroy_helix_parallel() before "
                f"making those of {grid}"
            )
        return _registered
    tp, world = dist.get_world_size(tp_group), dist.get_world_size()
    if grid.size != tp:
        raise HelixConfigError(
            f"Helix grid {grid} has {grid.size} ranks, but the tensor-parallel group has {tp}"
        )
    ranks = dist.get_process_group_ranks(tp_group)
    if ranks != list(range(ranks[0], ranks[0] + tp)) or ranks[0] % tp:
        raise HelixConfigError(
            f"tensor-parallel ranks {ranks} are not consecutive; Helix needs an order that begins with tp"
        )
    m = grid.dim_parallel_size
    dim_ranks = [list(range(first, first + m)) for first in range(0, world, m)]
    head_ranks = [list(range(first + j, first + tp, m)) for first in range(0, world, tp) for j in range(m)]
    dim_group = _own_group("helix_dim", dim_ranks, timeout, nccl_settings or {})
    head_group = _own_group("helix_head", head_ranks, timeout, nccl_settings or {})
    head_rank, dim_rank = grid.coordinate(dist.get_rank(tp_group))
    _registered = HelixGroups(grid, dim_group, head_group, head_rank, dim_rank)
    return _registered


def _own_group(
    name: str,
    all_ranks: list[list[int]],
    timeout: timedelta | None,
    nccl_settings: Mapping[str, Mapping[str, Any]],
) -> dist.ProcessGroup:
    """Make a group of each list of ranks, as Megatron makes its own; the one that this rank is in.

    Megatron keeps a list of what create_group makes: `--distributed-timeout-seconds-after-init` reaches it.
    """
    from megatron.core import parallel_state

    settings = name if name in nccl_settings else "tp"
    groups = [
        parallel_state.create_group(
            ranks,
            timeout=timeout,
            pg_options=parallel_state.get_nccl_options(settings, nccl_settings),
            group_desc=f"{name.upper()}_GROUP",
        )
        for ranks in all_ranks
    ]
    return next(group for group, ranks in zip(groups, all_ranks, strict=True) if dist.get_rank() in ranks)


def settings_of_groups(
    distributed_timeout_minutes: int = 30,
    nccl_communicator_config_path: str | None = None,
    high_priority_stream_groups: Sequence[str] | None = None,
    **_: Any,
) -> tuple[timedelta, dict[str, dict[str, Any]]]:
    """timeout and nccl_settings of initialize_helix_parallel, from Megatron's initialize_model_parallel."""
    nccl: dict[str, dict[str, Any]] = {}
    if nccl_communicator_config_path is not None:
        nccl = yaml.safe_load(Path(nccl_communicator_config_path).read_text(encoding="utf-8")) or {}
    for name in high_priority_stream_groups or ():
        nccl.setdefault(name, {})["is_high_priority_stream"] = True
    return timedelta(minutes=distributed_timeout_minutes), nccl


def get_helix_groups() -> HelixGroups:
    """This rank's registered groups.

    Raises:
        RuntimeError: `initialize_helix_parallel` has not run.
    """
    if _registered is None:
        raise RuntimeError("Helix process groups are not initialised; call initialize_helix_parallel first")
    return _registered


def destroy_helix_parallel() -> None:
    """Forget the registered groups. Megatron's `destroy_model_parallel` leaves its groups to torch too."""
    global _registered
    _registered = None
