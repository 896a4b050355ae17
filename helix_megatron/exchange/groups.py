"""The process groups of one rank of the n x m grid, and the ranks' agreement before they use any.

Modules take a `HelixGroups` as an argument. Who makes them is in megatron/process_groups.py.
"""

from __future__ import annotations

import contextlib
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


def agree(
    settings: Mapping[str, object], store: dist.Store, rank: int, world_size: int, timeout_s: float = 120.0
) -> None:
    """Check that all ranks run with equal settings, through the rendezvous store alone.

    Ranks with different grids would hang in the first collective, or corrupt each other silently; so
    this runs before any process group exists. Rank 0 reads everyone's and tells what it found: as many
    operations of the store as there are ranks, a few times over.

    Raises:
        HelixConfigError: another rank's settings differ, naming the rank and what differs.
    """
    prefix = "helix/settings"
    found, read = f"{prefix}/found", [f"{prefix}/read/{other}" for other in range(1, world_size)]
    store.set(f"{prefix}/{rank}", json.dumps({name: str(value) for name, value in settings.items()}))
    if rank == 0:
        problem = _first_problem(store, prefix, world_size, timeout_s)
        store.set(found, problem)
        if problem:  # this rank serves the store, and will end: first the others read
            with contextlib.suppress(RuntimeError):
                store.wait(read, timedelta(seconds=min(timeout_s, 10.0)))
    else:
        try:  # rank 0 may begin late, and then waits for others
            store.wait([found], timedelta(seconds=2 * timeout_s))
        except RuntimeError as error:
            raise HelixConfigError(_silent(0, world_size, 2 * timeout_s)) from error
        problem = store.get(found).decode()
        if problem:
            store.set(f"{prefix}/read/{rank}", "1")
    if problem:
        raise HelixConfigError(problem)


def _first_problem(store: dist.Store, prefix: str, world_size: int, timeout_s: float) -> str:
    """What is wrong with the ranks' settings, in words; empty when nothing is."""
    keys = [f"{prefix}/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:
        absent = next((rank for rank, key in enumerate(keys) if not store.check([key])), None)
        if absent is not None:
            return _silent(absent, world_size, timeout_s)
    first, *others = (json.loads(store.get(key)) for key in keys)
    differ = [
        f"{name} is {theirs.get(name)} on rank {rank} and {first.get(name)} on rank 0"
        for rank, theirs in enumerate(others, 1)
        for name in sorted(set(first) | set(theirs))
        if theirs.get(name) != first.get(name)
    ]
    if not differ:
        return ""
    return (
        f"ranks were started with different settings; give all of them the same flags: {differ[0]}"
        + (f" (and {len(differ) - 1} more differences)" if len(differ) > 1 else "")
    )


def _silent(rank: int, world_size: int, timeout_s: float) -> str:
    return (
        f"rank {rank} of {world_size} did not report its settings within {timeout_s:g} s; "
        "it never started, or runs a script without Helix"
    )


def seed_of_dim_group(seed: int, head_rank: int) -> int:
    """Seed of the random stream that the m ranks of a dim group share (dropout of shared probabilities).

    Megatron's own streams use seed and seed + 2718 + tensor-parallel rank.
    """
    return seed + 2718 + 65536 + head_rank
