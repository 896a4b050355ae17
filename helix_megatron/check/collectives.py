"""What devices and links do: the rates and collectives of `helix plan --probe`, and a layer with them.

Several GPUs, or the ranks of torchrun: every collective over every shape of group, a line through small and
one through large messages, and the attention layer with its communication. One GPU: its rates alone. A host:
gloo between two ranks, which says nothing about GPUs.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch

from helix_megatron.check.layers import Layout
from helix_megatron.check.rows import Place, Rows

MODEL = "llama-3.1-70b"
HOST_RANKS = 2


def check(rows: Rows, place: Place) -> None:
    """Whatever the machine has."""
    if place.world or place.gpus > 1:
        place.run(rank_measure, place.world or place.gpus, rows.path, place)
        return
    if place.on_host:
        place.run(rank_measure, HOST_RANKS, rows.path, place)
        return
    rows.add("collectives", "skipped", "one GPU: there is nothing to exchange with")
    place.run(rank_rates, 1, rows.path)


def add_rates(rows: Rows, rates: dict[str, tuple[float, float, float]]) -> None:
    """A row for each kind of operation (plan/compute.py)."""
    for kind, (flops, moved, launch) in rates.items():
        detail = f"{flops / 1e12:.3g} TFLOP/s, {moved / 1e9:.4g} GB/s, {launch * 1e6:.3g} us"
        rows.add(f"rate of {kind}", "measured", detail, rate=kind, flops=flops, moved=moved, launch=launch)


def add_lines(rows: Rows, lines: dict[str, Any], field: str) -> None:
    """A row for each collective; `field` is the field of a cluster that it is an entry of."""
    for name, line in lines.items():
        latency, bandwidth = line if isinstance(line, tuple) else (line.latency, line.bandwidth)
        rows.add(name, "measured", "", latency=latency, bandwidth=bandwidth, entry=field)


def rank_rates(path: str) -> None:
    """In the one rank of one GPU."""
    from helix_megatron.plan import probe_rates

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    add_rates(Rows(path), probe_rates.gpu_rates(probe_rates.GPU))
    torch.distributed.destroy_process_group()


def rank_measure(path: str, place: Place) -> None:
    """In every rank; rank 0 writes, in torchrun each its own file."""
    from helix_megatron.plan import probe, probe_collectives

    mine = place.world or os.environ["RANK"] == "0"
    rows = Rows(path if mine else os.devnull)
    if place.on_host:
        torch.distributed.init_process_group("nccl")
        add_lines(rows, probe_collectives.host_lines(), "lines")
    else:
        cluster = probe.measure_gpus(probe.gpu_machine(), keep=True)
        add_rates(rows, {kind: tuple(asdict(rate).values()) for kind, rate in cluster.rates.items()})
        add_lines(rows, dict(cluster.links), "links")
    world = torch.distributed.get_world_size()
    for layout in make_layouts(world):
        measure_with_communication(rows, layout, place)
    torch.distributed.destroy_process_group()


def make_layouts(world: int) -> list[Layout]:
    """A model of 64 query and 8 KV heads on all ranks: Megatron's layer, and Helix's with slices."""
    found = [Layout(MODEL, world)] if 64 % world == 0 else []
    if world % 2 == 0 and 8 % (world // 2) == 0:
        found += [Layout(MODEL, world, (world // 2, 2), placement) for placement in ("heads", "dims")]
    return found


def measure_with_communication(rows: Rows, layout: Layout, place: Place) -> None:
    """One row, of this rank; a failure is one on every rank, as all build the same layer."""
    from helix_megatron.check.layers import measure_layout

    name = f"{layout.name}, with communication"
    try:
        measured = measure_layout(layout, place.on_host)
    except Exception as error:
        rows.add(name, "failed", f"{type(error).__name__}: {str(error)[:300]}")
        return
    rows.add(name, "measured", **{k: v for k, v in measured.items() if k != "us"}, kernels=measured.get("us"))
