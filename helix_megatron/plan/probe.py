"""Measures a host's constants: what `helix plan --probe FILE` writes and `--cluster FILE` reads.

    collectives    latency and bandwidth of each kind and group size, all ranks of the machine busy
    rates          what a core does, one rank on each (rates.py)
    software       seconds of a layer and of a step beyond these, from models too small to compute much,
                   built with Megatron (trial.py), Megatron's attention and Helix's

Times are lower quartiles: other load can only lengthen them.

GPUs are probed in the ranks of torchrun (probe_gpu.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from helix_megatron.models.presets import ModelShape
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import clusters, inputs, probe_gpu, rates, timing
from helix_megatron.plan.hardware import Cluster, Line, Rate, overhead_key
from helix_megatron.plan.layout import Layout, Problem, Workload

KINDS = probe_gpu.KINDS
SMALL, LARGE = 4096, 4 << 20  # bytes that a rank receives, about


def main(path: str, ranks: int | None) -> int:
    """Measure this machine and write its constants to `path`; returns the exit code.

    Raises:
        ValueError: `path` cannot be written, ranks without GPUs, or GPUs without ranks.
    """
    import torch

    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_writable(path)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if not torch.cuda.is_available():
            raise ValueError(f"there is no GPU; a host is probed without torchrun: helix plan --probe {path}")
        if ranks:
            raise ValueError(f"--ranks {ranks} is for hosts; on GPUs torchrun starts one rank on each.")
        cluster = probe_gpu.measured()
    elif torch.cuda.is_available():
        raise ValueError(
            "this machine has GPUs: start one process on each, torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m helix_megatron.cli plan --probe {path}"
        )
    else:
        cluster = measured(inputs.of_cores(), ranks)
    if first:
        Path(path).write_text(yaml.safe_dump(clusters.to_dict(cluster), sort_keys=False))
        most = _largest(cluster)
        print(f"measured {cluster.name}, collectives of up to {most} ranks; use --cluster {path}")
    return 0


def check_writable(path: str) -> None:
    """ValueError where `path` cannot be written, before minutes of measuring."""
    new = not Path(path).exists()
    try:
        with open(path, "a"):
            pass
        if new:
            Path(path).unlink()
    except OSError as error:
        raise ValueError(
            f"--probe {path} cannot be written ({error.strerror}); give a file in a folder that is there."
        ) from error


def _largest(cluster: Cluster) -> int:
    return max((int(key.rsplit("@", 1)[1]) for key in cluster.lines), default=cluster.devices)


def measured(base: Cluster, ranks: int | None = None) -> Cluster:
    """`base` with what this host's cores and gloo really do."""
    from helix_megatron.host.launcher import run_ranks

    cores = base.slots
    most = ranks or 2 * cores
    worlds = [size for size in (2, 4, 8, 16, 32) if size <= max(2, most)]
    lines: dict[str, Line] = {}
    for world in worlds:
        for key, pair in run_ranks(collectives, world, timeout_s=300)[0].items():
            lines[key] = Line(*pair)
    reached = run_ranks(rates.device_rates, max(2, cores), timeout_s=300)[0]
    cluster = replace(
        base,
        rates={**base.rates, **{kind: Rate(*values) for kind, values in reached.items()}},
        lines=lines,
        layer_overhead={},
        step_overhead={},
        sources=("measured by helix plan --probe",),
    )
    names, problems = zip(*software_problems(), strict=True)
    seconds = run_ranks(_trials, 2, list(problems), timeout_s=300)[0]
    return with_software(cluster, dict(zip(names, zip(problems, seconds, strict=True), strict=True)))


# ---- collectives ----
def collectives() -> dict[str, tuple[float, float]]:
    """(latency, bandwidth) of "kind xSIZE @WORLD"; every group of the size works at the same time."""
    import torch.distributed as dist

    from helix_megatron.compare.measure import pin

    pin(int(os.environ["RANK"]))
    dist.init_process_group("nccl")
    world, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    size = 2
    while size <= world:
        groups = [dist.new_group(range(start, start + size)) for start in range(0, world, size)]
        group = groups[rank // size]
        for kind in KINDS:
            times = [collective_seconds(kind, group, received) for received in (SMALL, LARGE)]
            bandwidth = (LARGE - SMALL) / max(times[1] - times[0], 1e-7)
            found[f"{kind} x{size} @{world}"] = (max(times[0] - SMALL / bandwidth, 1e-6), bandwidth)
        size *= 2
    dist.destroy_process_group()
    return found


def collective_seconds(kind: str, group: Any, received: int, calls: int = rates.HOST.calls) -> float:
    """Seconds of a collective in which each rank receives about `received` bytes; recv: p/(p-1) of it."""
    import torch
    import torch.distributed as dist

    p, rank = group.size(), group.rank()
    share = received // 4 // (2 if kind == "all_reduce" else 1) * p // (p - 1)
    device = torch.cuda.current_device()
    tensor = torch.zeros(max(p, share // p * p), device=device)
    part = torch.zeros(len(tensor) // p, device=device)
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

    return rates.seconds_of(once, 9, calls)


# ---- software ----
def software_problems() -> list[tuple[str, Problem]]:
    """Tiny models of 2 and 6 layers: "KEY LAYERS" and the problem, over two ranks."""
    found = []
    for layers in (2, 6):
        shape = ModelShape("tiny", layers, 64, 4, 2, 16, 64, 256, max_position_embeddings=128)
        for kind, length in (("train", 16), ("prefill", 16), ("decode", 16)):
            work = Workload(kind, 2, length, "fp32", fused=False)
            for layout in _software_layouts(kind):
                key = overhead_key(kind, layout.sliced, layout.comm_type, layout.placement, layout.kv_cache)
                found.append((f"{key} {layers}", Problem(shape, layout, work)))
    return found


def _software_layouts(kind: str) -> list[Layout]:
    size = 1 if kind == "train" else 2
    layouts = [Layout(1, 1, 2, micro_batch=1)]
    for placement in ("heads", "dims"):
        layouts.append(
            Layout(2, helix=True, grid=HelixGrid(1, 2), comm_type="a2a", placement=placement,
                   kv_cache="sequence", micro_batch=size)
        )  # fmt: skip
    return layouts


def _trials(problems: Sequence[Problem]) -> list[float]:
    import torch

    from helix_megatron.compare.measure import pin
    from helix_megatron.plan import trial

    pin(int(os.environ["RANK"]))
    torch.distributed.init_process_group("nccl")
    seconds: list[list[float]] = [[] for _ in problems]
    for _ in range(3):  # in turns: other load should not meet one of them only
        for problem, series in zip(problems, seconds, strict=True):
            series += trial.measure(problem, 6, 2, held=False).seconds
    return [rates.quartile(series) for series in seconds]


def with_software(cluster: Cluster, trials: dict[str, tuple[Problem, float]]) -> Cluster:
    """Seconds of a layer and of a step that the operations and collectives of the trials do not explain."""
    layer: dict[str, float] = {}
    step: dict[str, float] = {}
    for name in sorted({name.rsplit(" ", 1)[0] for name in trials}):
        (few, less), (many, more) = trials[f"{name} 2"], trials[f"{name} 6"]
        rest = [seconds - timing.predict(p, cluster).seconds for p, seconds in ((few, less), (many, more))]
        layer[name] = max(0.0, (rest[1] - rest[0]) / (4 * few.micro_batches))
        if name.endswith("megatron"):
            step[name.split(" ")[0]] = max(0.0, rest[0] - 2 * few.micro_batches * layer[name])
    return replace(cluster, layer_overhead=layer, step_overhead=step)
