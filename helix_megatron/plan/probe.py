"""Measures a host's constants: what `helix plan --probe FILE` writes and `--cluster FILE` reads.

    collectives    latency and bandwidth of each kind and group size, all ranks of the machine busy
    rates          matrix products, attention (unfused, fused, over a cache), copies; one rank a core
    software       seconds of a layer and of a step beyond these, from models too small to compute much,
                   built with Megatron (trial.py), Megatron's attention and Helix's

Times are lower quartiles: other load can only lengthen them.

GPUs are not probed: their presets are the vendors' figures.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from helix_megatron.grid import HelixGrid
from helix_megatron.plan import clusters, inputs, timing
from helix_megatron.plan.hardware import Cluster, Line, Rate, overhead_key
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.presets import ModelShape

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "recv")
SMALL, LARGE = 4096, 1 << 20  # bytes that a rank receives, about


def main(path: str, ranks: int | None) -> int:
    """Measure this machine and write its constants to `path`; returns the exit code."""
    import torch

    if torch.cuda.is_available():
        raise ValueError("GPUs are not probed; use a preset, or a YAML file with base: PRESET.")
    cluster = measured(inputs.of_cores(), ranks)
    Path(path).write_text(yaml.safe_dump(clusters.to_dict(cluster), sort_keys=False))
    print(f"measured {cluster.name}, collectives of up to {_largest(cluster)} ranks; use --cluster {path}")
    return 0


def _largest(cluster: Cluster) -> int:
    return max(int(key.rsplit("@", 1)[1]) for key in cluster.lines)


def measured(base: Cluster, ranks: int | None = None) -> Cluster:
    """`base` with what this host's cores and gloo really do."""
    from helix_megatron.launch import run_ranks

    cores = base.slots
    most = ranks or 2 * cores
    worlds = [size for size in (2, 4, 8, 16, 32) if size <= max(2, most)]
    lines: dict[str, Line] = {}
    for world in worlds:
        for key, pair in run_ranks(collectives, world, timeout_s=300)[0].items():
            lines[key] = Line(*pair)
    rates = run_ranks(device_rates, max(2, cores), timeout_s=300)[0]
    cluster = replace(
        base,
        rates={**base.rates, **{kind: Rate(*values) for kind, values in rates.items()}},
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
            times = [_collective_seconds(kind, group, received) for received in (SMALL, LARGE)]
            bandwidth = (LARGE - SMALL) / max(times[1] - times[0], 1e-7)
            found[f"{kind} x{size} @{world}"] = (max(times[0] - SMALL / bandwidth, 1e-6), bandwidth)
        size *= 2
    dist.destroy_process_group()
    return found


def _collective_seconds(kind: str, group: Any, received: int) -> float:
    """Seconds of a collective in which each rank receives about `received` bytes."""
    import torch
    import torch.distributed as dist

    p, rank = group.size(), group.rank()
    share = received // 4 // (2 if kind == "all_reduce" else 1) * p // (p - 1)
    tensor = torch.zeros(max(p, share // p * p))
    part = torch.zeros(len(tensor) // p)
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

    return _seconds(once, 9)


def _seconds(once: Callable[[], Any], turns: int) -> float:
    """Lower quartile of the seconds of `once`, the slowest rank's each time."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(turns + 2):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(3):
            once()
        elapsed = torch.tensor([(time.perf_counter() - start) / 3], dtype=torch.float64)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        seconds.append(elapsed.item())
    return _quartile(seconds[2:])


def _quartile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


# ---- rates ----
def device_rates() -> dict[str, tuple[float, float, float]]:
    """(FLOP/s, bytes/s, launch seconds) of each kind of operation, one rank on each core, fp32."""
    import torch
    import torch.distributed as dist
    from torch.nn.functional import scaled_dot_product_attention

    from helix_megatron.compare.measure import pin

    pin(int(os.environ["RANK"]))
    dist.init_process_group("nccl")
    torch.set_num_threads(1)

    def seconds(function: Callable[[], Any]) -> float:
        return _seconds(function, 7)

    def gemm(t: int, inner: int, columns: int) -> float:
        a, weight = torch.randn(t, inner), torch.randn(columns, inner)
        return seconds(lambda: a @ weight.t())

    t, width = 256, 512
    launch = gemm(1, 8, 8)
    flops = 2 * t * width * width / max(gemm(t, width, width) - launch, 1e-7)
    bandwidth = 4 * 2048 * 2048 / max(gemm(1, 2048, 2048) - launch, 1e-7)
    found = {"gemm": (flops, bandwidth, launch)}

    def unfused(heads: int, s: int, d: int) -> float:
        q, k, v = (torch.randn(heads, s, d) for _ in range(3))
        mask = torch.triu(torch.ones(s, s, dtype=torch.bool), 1)
        return seconds(lambda: torch.bmm(torch.softmax(torch.bmm(q, k.mT).masked_fill(mask, -1e4), -1), v))

    def fused(heads: int, s: int, d: int) -> float:
        q, k, v = (torch.randn(1, heads, s, d) for _ in range(3))
        return seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))

    heads, s = 8, 256
    least = unfused(1, 2, 8)
    passes = 6 * heads * s * s * 4 / max(unfused(heads, s, 8) - least, 1e-7)
    wide = max(unfused(heads, s, 128) - unfused(heads, s, 8), 1e-7)
    found["unfused attention"] = (4 * 120 * heads * s * s / wide, passes, least)
    least = fused(1, 2, 8)
    found["fused attention"] = (
        4 * 32 * heads * s * s / 2 / max(fused(heads, s, 32) - least, 1e-7),
        1e10,
        least,
    )

    def cached(keys: int) -> float:
        q, k, v = torch.randn(8, 1, 32), torch.randn(8, keys, 32), torch.randn(8, keys, 32)
        return seconds(lambda: torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v))

    least = cached(2)
    found["cached attention"] = (1e12, 2 * 8 * 4096 * 32 * 4 / max(cached(4096) - least, 1e-7), least)
    x = torch.randn(1 << 20)
    found["pass"] = (1e12, 2 * 4 * (1 << 20) / seconds(lambda: x * 1.5), 0.0)
    dist.destroy_process_group()
    return found


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
    return [_quartile(trial.measure(p, 8, 2, held=False).seconds) for p in problems]


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
