"""Measures GPUs: `helix plan --probe FILE` in the ranks of torchrun, one on each GPU of one or more machines.

    collectives    each kind over every number of domains and ranks in each that divides what is there, all
                   groups at once: a line through two small messages and one through two large ones
    rates          what a GPU does in a second (rates.py)

Software beside them is not measured. Written for GPUs and never run on one; the tests run it in host mode.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helix_megatron.plan import nvml, rates
from helix_megatron.plan.hardware import Cluster, Line, Rate
from helix_megatron.plan.placement import reach

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "recv")
SMALL = (4096, 1 << 20)  # bytes that a rank receives, about
LARGE = (16 << 20, 256 << 20)


def measured() -> Cluster:
    """What the GPUs of all ranks really do; the same on every rank.

    Raises:
        ValueError: not one rank on each GPU, or domains that the ranks do not fill.
    """
    import torch
    import torch.distributed as dist

    base = machine()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        world = dist.get_world_size()
        links = collectives(world, min(world, reach(base.gpus_per_node, base.domain)))
        reached = rates.gpu_rates(rates.GPU)
    finally:
        dist.destroy_process_group()
    return with_links(
        replace(
            base,
            nodes=world // base.gpus_per_node,
            rates={**base.rates, **{kind: Rate(*values) for kind, values in reached.items()}},
        ),
        {key: Line(*pair) for key, pair in links.items()},
    )


def machine() -> Cluster:
    """This machine as NVML tells it, where torchrun has started one rank on each of its GPUs."""
    found = nvml.gpus()
    if not found:
        raise ValueError("NVML tells of no GPU here; see helix doctor.")
    cluster = nvml.of_gpus(found)
    here, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    count = cluster.gpus_per_node
    if here != count or world % count:
        raise ValueError(
            f"torchrun started {here} ranks on a machine of {count} GPUs, {world} in all; the probe needs "
            f"one on each: --nproc-per-node {count}."
        )
    joined = min(world, reach(count, cluster.domain))
    if world % joined or (joined < count and count % joined):
        raise ValueError(
            f"{world} ranks do not fill domains of {joined} GPUs that NVLink joins; probe a whole number of "
            f"domains, or one only: {cluster.sources[-1]}."
        )
    return cluster


def with_links(cluster: Cluster, links: dict[str, Line]) -> Cluster:
    """`cluster` with measured links, `fast` and `slow` too: NCCL's model goes on from there."""
    world, nodes = cluster.devices, cluster.nodes
    joined = min(world, reach(cluster.gpus_per_node, cluster.domain))
    fast, slow = links.get(f"all_gather 1x{joined}"), links.get(f"all_gather {world // joined}x1")
    machines = f"{nodes} machine{'s' * (nodes > 1)}"
    said = [f"measured by helix plan --probe: rates, and links of {world} ranks on {machines}"]
    if slow is None:
        said.append("not measured, links between domains: as the preset of this GPU")
    return replace(
        cluster,
        links=links,
        fast=fast.bandwidth if fast else cluster.fast,
        slow=slow.bandwidth if slow else cluster.slow,
        sources=(*said, cluster.sources[-1]),
    )


def shapes(world: int, joined: int) -> list[tuple[int, int]]:
    """(domains, ranks in each) of the groups that are measured, in domains of `joined` ranks."""
    found = [(d, r) for d in _divisors(world // joined) for r in _divisors(joined)]
    return [shape for shape in found if shape != (1, 1)]


def groups(world: int, joined: int, domains: int, ranks: int) -> list[list[int]]:
    """All groups of `ranks` neighbours in each of `domains` neighbouring domains; every rank is in one."""
    return [
        [domain * joined + first + k for domain in range(start, start + domains) for k in range(ranks)]
        for start in range(0, world // joined, domains)
        for first in range(0, joined, ranks)
    ]


def collectives(world: int, joined: int) -> dict[str, tuple[float, float]]:
    """(latency, bandwidth) of "kind DOMAINSxRANKS", and of small messages; all groups work at once."""
    import torch.distributed as dist

    found = {}
    for domains, ranks in shapes(world, joined):
        made = [(members, dist.new_group(members)) for members in groups(world, joined, domains, ranks)]
        group = next(group for members, group in made if dist.get_rank() in members)
        for kind in KINDS:
            if kind == "recv" and domains * ranks != 2:
                continue
            low, high = (_line(kind, group, sizes) for sizes in (SMALL, LARGE))
            name = f"{kind} {domains}x{ranks}"
            found[f"{name} small"] = low
            found[name] = (max(low[0], high[0]), high[1])  # noise must not make large messages start sooner
        for _, group in made:
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
    return found


def _line(kind: str, group: Any, sizes: Sequence[int]) -> tuple[float, float]:
    """(latency, bandwidth) through messages of two sizes."""
    from helix_megatron.plan.probe import collective_seconds

    less, more = sizes
    half = 2 if kind == "recv" else 1  # of two ranks a receiver gets twice what it is told to
    short, long = (collective_seconds(kind, group, size // half, rates.GPU.calls) for size in (less, more))
    bandwidth = (more - less) / max(long - short, 1e-6)
    return max(short - less / bandwidth, 1e-6), bandwidth


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
