"""Times collectives: latency and bandwidth of each kind, in the ranks of a host or of GPUs.

    host    groups of 2, 4, 8, ... ranks, all ranks of the machine busy: "kind xSIZE @WORLD"
    GPUs    every number of domains and ranks in each that divides what is there, all groups at once, a line
            through two small messages and one through two large ones: "kind DOMAINSxRANKS[ small]"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from helix_megatron.plan import probe_rates
from helix_megatron.plan.clusters import COLLECTIVES

Point = tuple[float, float]
"""Latency in seconds, bandwidth in bytes/s."""
HOST_SIZES = (4096, 4 << 20)  # bytes that a rank receives, about
SMALL = (4096, 1 << 20)
LARGE = (16 << 20, 256 << 20)


def host_lines() -> dict[str, Point]:
    """Of groups of every size that is a power of two, among all ranks."""
    world, calls = dist.get_world_size(), probe_rates.HOST.calls
    found = {}
    ranks = 2
    while ranks <= world:
        with own_group(group_members(world, world, 1, ranks)) as group:
            for kind in COLLECTIVES:
                times = [collective_seconds(kind, group, size, calls) for size in HOST_SIZES]
                found[f"{kind} x{ranks} @{world}"] = fit_line(HOST_SIZES, times, 1e-7)
        ranks *= 2
    return found


def gpu_links(world: int, joined: int) -> dict[str, Point]:
    """Of groups of every shape over domains of `joined` ranks, for large and for small messages."""
    found = {}
    for domains, ranks in group_shapes(world, joined):
        with own_group(group_members(world, joined, domains, ranks)) as group:
            for kind in COLLECTIVES:
                if kind == "recv" and domains * ranks != 2:
                    continue
                low, high = (link_line(kind, group, sizes) for sizes in (SMALL, LARGE))
                name = f"{kind} {domains}x{ranks}"
                found[f"{name} small"] = low
                found[name] = (max(low[0], high[0]), high[1])  # noise must not make large ones start sooner
    return found


def link_line(kind: str, group: Any, sizes: Sequence[int]) -> Point:
    """The line through messages of two sizes."""
    half = 2 if kind == "recv" else 1  # of two ranks a receiver gets twice what it is told to
    calls = probe_rates.GPU.calls
    return fit_line(sizes, [collective_seconds(kind, group, size // half, calls) for size in sizes], 1e-6)


def fit_line(sizes: Sequence[int], seconds: Sequence[float], least: float) -> Point:
    """The line through two times; the second is taken to be `least` seconds longer at least."""
    bandwidth = (sizes[1] - sizes[0]) / max(seconds[1] - seconds[0], least)
    return max(seconds[0] - sizes[0] / bandwidth, 1e-6), bandwidth


def collective_seconds(kind: str, group: Any, received: int, calls: int) -> float:
    """Seconds of a collective in which each rank receives about `received` bytes; recv: p/(p-1) of it."""
    p, rank = group.size(), group.rank()
    share = received // 4 // (2 if kind == "all_reduce" else 1) * p // (p - 1)
    tensor = torch.zeros(max(p, share // p * p), device=torch.cuda.current_device())
    part = torch.zeros(len(tensor) // p, device=tensor.device)
    ranks = dist.get_process_group_ranks(group)

    def once() -> None:
        if kind == "all_reduce":
            dist.all_reduce(tensor, group=group)
        elif kind == "all_gather":
            dist.all_gather_into_tensor(tensor, part, group=group)
        elif kind == "reduce_scatter":
            dist.reduce_scatter_tensor(part, tensor, group=group)
        elif kind == "all_to_all":
            dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)
        elif rank % 2 == 0:
            dist.send(tensor, ranks[rank + 1], group=group)
        else:
            dist.recv(tensor, ranks[rank - 1], group=group)

    return probe_rates.time_operation(once, 9, calls)


# ---- groups ----
def group_shapes(world: int, joined: int) -> list[tuple[int, int]]:
    """(domains, ranks in each) of the groups that are measured, in domains of `joined` ranks."""
    divisors = [[k for k in range(1, number + 1) if number % k == 0] for number in (world // joined, joined)]
    return [(d, r) for d in divisors[0] for r in divisors[1] if d * r > 1]


def group_members(world: int, joined: int, domains: int, ranks: int) -> list[list[int]]:
    """All groups of `ranks` neighbours in each of `domains` neighbouring domains; every rank is in one."""
    return [
        [domain * joined + first + k for domain in range(start, start + domains) for k in range(ranks)]
        for start in range(0, world // joined, domains)
        for first in range(0, joined, ranks)
    ]


@contextmanager
def own_group(groups: list[list[int]]) -> Iterator[Any]:
    """This rank's of several process groups, which are there while entered."""
    made = [(members, dist.new_group(members)) for members in groups]
    group = next(group for members, group in made if dist.get_rank() in members)
    yield group
    dist.destroy_process_group(group)
