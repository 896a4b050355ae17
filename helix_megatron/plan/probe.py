"""Measures this machine: what `helix plan --probe FILE` writes and `--cluster FILE` reads.

    collectives    latency and bandwidth of each kind (probe_collectives.py)
    rates          what a core or a GPU does in a second (probe_rates.py)
    software       on a host: seconds of a layer and of a step beyond these, from models too small to compute
                   much, built with Megatron (trial.py), Megatron's attention and Helix's

Times are lower quartiles: other load can only lengthen them. A host's ranks are started here; GPUs are probed
in the ranks of torchrun, one on each GPU of one or more machines. That part is written for GPUs and has never
run on one; the tests run it in host mode.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import clusters, machine, probe_collectives, probe_rates, timing, trial
from helix_megatron.plan.hardware import Cluster, Line, Rate, joined_devices, overhead_key
from helix_megatron.plan.layout import KINDS, Layout, Problem, Workload


def main(path: str, ranks: int | None) -> int:
    """Measure this machine and write its constants to `path`; returns the exit code.

    Raises:
        ValueError: `path` cannot be written, ranks without GPUs, or GPUs without ranks.
    """
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_writable(path)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if not torch.cuda.is_available():
            raise ValueError(f"there is no GPU; a host is probed without torchrun: helix plan --probe {path}")
        if ranks:
            raise ValueError(f"--ranks {ranks} is for hosts; on GPUs torchrun starts one rank on each.")
        cluster = measure_gpus(gpu_machine())
    elif torch.cuda.is_available():
        raise ValueError(
            "this machine has GPUs: start one process on each, torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m helix_megatron.cli plan --probe {path}"
        )
    else:
        cluster = measure_host(machine.host_cluster(), ranks)
    if first:
        Path(path).write_text(yaml.safe_dump(clusters.to_dict(cluster), sort_keys=False))
        most = max((int(key.rsplit("@", 1)[1]) for key in cluster.lines), default=cluster.devices)
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


# ---- a host ----
def measure_host(base: Cluster, ranks: int | None = None) -> Cluster:
    """`base` with what this host's cores and gloo really do."""
    from helix_megatron.host.launcher import run_ranks

    lines: dict[str, probe_collectives.Point] = {}
    for world in (2, 4, 8, 16, 32):
        if world <= max(2, ranks or 2 * base.slots):
            lines |= run_ranks(in_host_rank, world, probe_collectives.host_lines, timeout_s=300)[0]
    reached = run_ranks(in_host_rank, max(2, base.slots), probe_rates.host_rates, timeout_s=300)[0]
    cluster = replace(
        base,
        rates={**base.rates, **{kind: Rate(*values) for kind, values in reached.items()}},
        lines={key: Line(*point) for key, point in lines.items()},
        layer_overhead={},
        step_overhead={},
        sources=("measured by helix plan --probe",),
    )
    problems = software_problems()
    seconds = run_ranks(in_host_rank, 2, step_seconds, list(problems.values()), timeout_s=300)[0]
    trials = {name: (problems[name], one) for name, one in zip(problems, seconds, strict=True)}
    return with_software(cluster, trials)


def in_host_rank(measure: Callable[..., Any], *args: Any) -> Any:
    """What `measure` gives in a rank of a host that has its core to itself."""
    from helix_megatron.measure.machine import pin_to_core

    pin_to_core(int(os.environ["RANK"]))
    dist.init_process_group("nccl")
    return measure(*args)


def step_seconds(problems: Sequence[Problem]) -> list[float]:
    """Seconds of a step of each."""
    seconds: list[list[float]] = [[] for _ in problems]
    for _ in range(3):  # in turns: other load should not meet one of them only
        for problem, series in zip(problems, seconds, strict=True):
            series += trial.measure(problem, 6, 2, held=False).seconds
    return [probe_rates.lower_quartile(series) for series in seconds]


def software_problems() -> dict[str, Problem]:
    """Tiny models of 2 and 6 layers over two ranks, by "KEY LAYERS"."""
    found = {}
    for layers in (2, 6):
        shape = ModelShape("tiny", layers, 64, 4, 2, 16, 64, 256, max_position_embeddings=128)
        for kind in KINDS:
            work = Workload(kind, 2, 16, "fp32", fused=False)
            sliced = Layout(2, helix=True, grid=HelixGrid(1, 2), comm_type="a2a", kv_cache="sequence",
                            micro_batch=1 if kind == "train" else 2)  # fmt: skip
            for layout in (
                Layout(1, 1, 2), replace(sliced, placement="heads"), replace(sliced, placement="dims"),
            ):  # fmt: skip
                key = overhead_key(kind, layout.sliced, layout.comm_type, layout.placement, layout.kv_cache)
                found[f"{key} {layers}"] = Problem(shape, layout, work)
    return found


def with_software(cluster: Cluster, trials: dict[str, tuple[Problem, float]]) -> Cluster:
    """Seconds of a layer and of a step that the operations and collectives of the trials do not explain."""
    layer: dict[str, float] = {}
    step: dict[str, float] = {}
    for name in sorted({name.rsplit(" ", 1)[0] for name in trials}):
        few = trials[f"{name} 2"][0]
        less, more = (
            seconds - timing.predict(problem, cluster).seconds
            for problem, seconds in (trials[f"{name} 2"], trials[f"{name} 6"])
        )
        layer[name] = max(0.0, (more - less) / (4 * few.micro_batches))
        if name.endswith("megatron"):
            step[name.split(" ")[0]] = max(0.0, less - 2 * few.micro_batches * layer[name])
    return replace(cluster, layer_overhead=layer, step_overhead=step)


# ---- GPUs ----
def gpu_machine() -> Cluster:
    """This machine as NVML tells it, where torchrun has started one rank on each of its GPUs.

    Raises:
        ValueError: not one rank on each GPU, or domains that the ranks do not fill.
    """
    found = machine.read_gpus()
    if not found:
        raise ValueError("NVML tells of no GPU here; see helix doctor.")
    cluster = machine.gpu_cluster(found)
    here, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    count = cluster.gpus_per_node
    if here != count or world % count:
        raise ValueError(
            f"torchrun started {here} ranks on a machine of {count} GPUs, {world} in all; the probe needs "
            f"one on each: --nproc-per-node {count}."
        )
    joined = min(world, joined_devices(count, cluster.domain))
    if world % joined or (joined < count and count % joined):
        raise ValueError(
            f"{world} ranks do not fill domains of {joined} GPUs that NVLink joins; probe a whole number of "
            f"domains, or one only: {cluster.sources[-1]}."
        )
    return cluster


def measure_gpus(base: Cluster, keep: bool = False) -> Cluster:
    """`base` with what the GPUs of all ranks really do; the same on every rank.

    keep: leave the process group for the caller, who destroys it.
    """
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        world = dist.get_world_size()
        links = probe_collectives.gpu_links(world, min(world, base.joined))
        reached = probe_rates.gpu_rates(probe_rates.GPU)
    finally:
        if not keep:
            dist.destroy_process_group()
    rates = {**base.rates, **{kind: Rate(*values) for kind, values in reached.items()}}
    cluster = replace(base, nodes=world // base.gpus_per_node, rates=rates)
    return with_links(cluster, {key: Line(*point) for key, point in links.items()})


def with_links(cluster: Cluster, links: dict[str, Line]) -> Cluster:
    """`cluster` with measured links, `fast` and `slow` too: NCCL's model goes on from there."""
    world, joined = cluster.devices, min(cluster.devices, cluster.joined)
    fast, slow = links.get(f"all_gather 1x{joined}"), links.get(f"all_gather {world // joined}x1")
    machines = f"{cluster.nodes} machine{'s' * (cluster.nodes > 1)}"
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
