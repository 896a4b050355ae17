"""Process groups of the n x m grid, registered beside Megatron's own.

Modules take a `HelixGroups` as an argument; the registry is for code that Megatron calls without one,
as `ProcessGroupCollection.use_mpu_process_groups` is in Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from helix_megatron.partition.grid import HelixConfigError, HelixGrid


@dataclass(frozen=True)
class HelixGroups:
    """The groups of one rank.

    Args:
        grid: n x m.
        dim_group: the m ranks of equal head_rank i; they exchange inside attention.
        head_group: the n ranks of equal dim_rank j.
        head_rank: i.
        dim_rank: j.
    """

    grid: HelixGrid
    dim_group: dist.ProcessGroup
    head_group: dist.ProcessGroup
    head_rank: int
    dim_rank: int


_registered: HelixGroups | None = None


def initialize_helix_parallel(grid: HelixGrid, tp_group: dist.ProcessGroup) -> HelixGroups:
    """Create the dim and head groups of every tensor-parallel group and register this rank's.

    Collective over the world: call it on every rank, after Megatron's `initialize_model_parallel`.

    Raises:
        HelixConfigError: the grid does not fill the tensor-parallel group, or that group's ranks are not
            consecutive (Megatron's `order` must begin with "tp", as all of its own orders do).
        RuntimeError: groups of another grid are registered.
    """
    from megatron.core.hyper_comm_grid import HyperCommGrid

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
    # The first listed dimension varies fastest: slices are neighbours.
    comm_grid = HyperCommGrid(
        [grid.dim_parallel_size, grid.head_parallel_size, world // tp], ["dim", "head", "replica"]
    )
    dim_group = comm_grid.create_pg("dim", group_desc="HELIX_DIM_GROUP")
    head_group = comm_grid.create_pg("head", group_desc="HELIX_HEAD_GROUP")
    head_rank, dim_rank = grid.coordinate(dist.get_rank(tp_group))
    _registered = HelixGroups(grid, dim_group, head_group, head_rank, dim_rank)
    return _registered


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


def agree(
    settings: Mapping[str, object], store: dist.Store, rank: int, world_size: int, timeout_s: float = 120.0
) -> None:
    """Check that all ranks run with equal settings, through the rendezvous store alone.

    Ranks with different grids would hang in the first collective, or corrupt each other silently; so
    this runs before any process group exists.

    Raises:
        HelixConfigError: another rank's settings differ, naming the rank and what differs.
    """
    key, timeout = "helix/settings", timedelta(seconds=timeout_s)
    ours = {name: str(value) for name, value in settings.items()}
    store.set(f"{key}/{rank}", json.dumps(ours))
    everyone = []
    for other in range(world_size):
        try:
            store.wait([f"{key}/{other}"], timeout)
        except Exception as error:
            raise HelixConfigError(
                f"rank {other} of {world_size} did not report its settings within {timeout_s:g} s; "
                "it never started, or runs a script without Helix"
            ) from error
        everyone.append(json.loads(store.get(f"{key}/{other}")))
    store.set(f"{key}/read/{rank}", "1")
    if rank == 0:  # it serves the store: stay until all have read
        store.wait([f"{key}/read/{other}" for other in range(world_size)], timeout)
    first = everyone[0]
    differ = [
        f"{name} is {theirs.get(name)} on rank {other} and {first.get(name)} on rank 0"
        for other, theirs in enumerate(everyone)
        for name in sorted(set(first) | set(theirs))
        if theirs.get(name) != first.get(name)
    ]
    if differ:
        raise HelixConfigError(
            f"ranks were started with different settings; give all of them the same flags: {differ[0]}"
            + (f" (and {len(differ) - 1} more differences)" if len(differ) > 1 else "")
        )


def seed_of_dim_group(seed: int, head_rank: int) -> int:
    """Seed of the random stream that the m ranks of a dim group share (dropout of shared probabilities).

    Megatron's own streams use seed and seed + 2718 + tensor-parallel rank.
    """
    return seed + 2718 + 65536 + head_rank
