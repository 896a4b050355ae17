"""`helix plan`: parse, search, print."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixGrid, check_grid, even_slices, legal_grids
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import ELEMENT_BYTES, KINDS, Workload, indivisible_reason

BATCH, LENGTH = 128, 4096  # where neither an option nor a flag says
_SIZES = ("--seq-length", "--micro-batch-size", "--global-batch-size")
_POSITIVE = ("nodes", "gpus", "batch", "length", "memory", "domain", "inter_node", "tp", "pp", "ep", "etp",
             "top", "ranks")  # fmt: skip

_EPILOG = """Examples:
  helix plan --model llama-3.1-70b --cluster dgx-h100 --nodes 2 --workload decode --context 131072 --batch 8
  helix plan --model ./config.json --cluster this --workload train --seq-length 4096 --batch 256
  helix plan --cluster dgx-a100 -- --num-layers 24 --hidden-size 2048 --num-attention-heads 16
"""


def add_plan(subparsers: Any) -> None:
    """`helix plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="which layout to run a model in: predicted times and memory of every one that fits",
        description="Ranks every tp, pp, dp, n x m that fits by predicted time; runs nothing but --probe.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="preset, config.json or its folder, or YAML with Megatron's flags")
    add("--cluster", default="dgx-h100", help="preset, YAML file, or this (default: dgx-h100)")
    add("--nodes", type=int, help="machines (default: the cluster's)")
    add("--gpus", type=int, help="ranks in all, where not all devices are used, or shared")
    add("--workload", choices=KINDS, default="train")
    add("--batch", type=int, help="sequences in a step over all replicas (default: 128)")
    add("--seq-length", "--context", dest="length", type=int, metavar="POSITIONS",
        help="of a sequence (default: 4096)")  # fmt: skip
    add("--dtype", choices=tuple(ELEMENT_BYTES), help="default: bf16, on a host fp32")
    add("--eager", action="store_true", help="decode without CUDA graphs")
    add("--no-distributed-optimizer", action="store_true")
    add("--memory", type=float, metavar="GB", help="of a device")
    add("--domain", type=int, help="devices that the fast link joins")
    add("--inter-node", type=float, metavar="GB/S", help="per device and direction")
    add("--tp", type=int, help="only this tensor-parallel size")
    add("--pp", type=int, help="only this number of pipeline stages")
    add("--ep", type=int, help="only this expert-parallel size")
    add("--etp", type=int, help="only this tensor-parallel size of an expert")
    add("--grid", metavar="NxM", help="only this Helix grid, beside Megatron's attention on as many ranks")
    add("--top", type=int, default=8, help="rows shown (default: 8)")
    add("--explain", action="store_true", help="every formula of the first rows, with numbers")
    add("--json", action="store_true", help="one JSON document instead of tables")
    add("--check", metavar="FILE", help="rates and links from a check.json of helix check on such a GPU")
    add("--probe", metavar="FILE", help="measure this machine (GPUs: in torchrun), write FILE for --cluster")
    add("--ranks", type=int, help="with --probe: the most ranks (default: twice the cores)")
    add("flags", nargs="*", help="after --: the model as Megatron's flags")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """What the options ask for; returns the exit code."""
    check_options(options)
    if options.probe:
        from helix_megatron.plan import probe

        return probe.main(options.probe, options.ranks)
    from helix_megatron.plan import report
    from helix_megatron.plan.megatron_flags import training_command
    from helix_megatron.plan.search import search

    if bool(options.model) == bool(options.flags):
        raise ValueError("give the model either as --model or as Megatron's flags after --")
    cluster = resolve_cluster(options)
    shape, workload, flags = resolve_work(options, cluster)
    grid = resolve_grid(options, shape, cluster)
    tp = grid.size if grid else options.tp
    if (options.ep or options.etp) and not shape.num_moe_experts:
        raise ValueError(f"--ep and --etp lay out experts, and {shape.name} has none; leave them out.")
    plan = search(shape, cluster, workload, tp, options.pp, grid, options.ep, options.etp)
    layout = plan.candidates[0].layout if plan.candidates else None
    command = training_command(shape, flags, layout, workload, cluster) if layout else None
    if options.json:
        print(json.dumps(report.as_json(plan, options.top) | {"run": command}, allow_nan=False))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 170, soft_wrap=True)
        for part in report.as_text(plan, options.top, command, options.explain):
            console.print(part, highlight=False, markup=False)
    return 0 if layout else 1


def check_options(options: argparse.Namespace) -> None:
    """ValueError for an option that is no size."""
    for name in _POSITIVE:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            flag = "seq-length" if name == "length" else name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}; it must be positive{' and finite' * (value > 0)}.")
    for name, unit in (("memory", "GB"), ("inter_node", "GB/s")):
        value = getattr(options, name)
        if value is not None and value >= 1e6:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value:g} {unit}; it is in {unit}, not in bytes."
            )


def resolve_cluster(options: argparse.Namespace) -> Cluster:
    """The cluster with the user's changes. ValueError for sizes that cannot be."""
    from helix_megatron.plan import calibration, clusters, inputs

    cluster = inputs.load_cluster(options.cluster)
    if options.check:
        cluster = calibration.apply_check(cluster, options.check)
    if options.gpus:
        cluster = clusters.resize(cluster, *_devices(options, cluster))
    elif options.nodes:
        cluster = replace(cluster, nodes=options.nodes)
    changes = {
        "memory": options.memory and options.memory * 1e9,
        "domain": options.domain,
        "slow": options.inter_node and options.inter_node * 1e9,
    }
    where = f"--memory {options.memory:g}" if options.memory else options.cluster
    return clusters.check_cluster(replace(cluster, **{k: v for k, v in changes.items() if v}), where)


def _devices(options: argparse.Namespace, cluster: Cluster) -> tuple[int, int]:
    """(devices of a node, nodes) for --gpus. ValueError where they are not that many, or not equally many."""
    gpus, full = options.gpus, cluster.gpus_per_node
    enough = gpus // full if gpus % full == 0 and not cluster.slots else cluster.nodes
    nodes = options.nodes or enough
    if gpus % nodes:
        raise ValueError(f"--gpus {gpus} is not a multiple of {nodes} nodes.")
    if gpus // nodes > full and not cluster.slots:  # ranks may share a host's cores, not a GPU
        least = next(n for n in range(-(-gpus // full), gpus + 1) if gpus % n == 0)
        raise ValueError(
            f"--gpus {gpus} on {nodes} node{'s' * (nodes > 1)} is {gpus // nodes} in each, and a node of "
            f"{cluster.name} has {full}; give --nodes {least} ({gpus // least} in each), or a YAML file "
            f"with {{base: {options.cluster}, gpus_per_node: {gpus // nodes}}}."
        )
    return gpus // nodes, nodes


def resolve_work(
    options: argparse.Namespace, cluster: Cluster
) -> tuple[ModelShape, Workload, dict[str, Any]]:
    """The model, the work, and Megatron's flags that came with the model; options and flags say the work.

    Raises:
        ValueError: a flag and an option that contradict one another, or values that cannot be.
    """
    from helix_megatron.plan import inputs
    from helix_megatron.plan import megatron_flags as mf

    flags, where = inputs.read_model_flags(options.model, options.flags)
    notes = mf.unplanned_flags(flags, where, cluster.fused)  # unknown flags first: one may be a needed one's
    size = {name: mf.parse_int_flag(flags, where, name) for name in _SIZES if name in flags}
    length, batch, micro = options.length or size.get("--seq-length"), options.batch, None
    if options.workload == "train":
        length = mf.merge_option(
            "--seq-length", options.length, "--seq-length", size.get("--seq-length"), where
        )
        batch = mf.merge_option(
            "--batch", batch, "--global-batch-size", size.get("--global-batch-size"), where
        )
        micro = size.get("--micro-batch-size")
    of_flags = mf.parse_dtype_flags(flags, where)
    dtype = mf.merge_option("--dtype", options.dtype, "--bf16 or --fp16", of_flags, where)
    distributed = mf.parse_bool_flag(flags, where, "--use-distributed-optimizer")
    if distributed and options.no_distributed_optimizer:
        raise ValueError(f"--no-distributed-optimizer contradicts --use-distributed-optimizer of {where}.")
    if flags:
        name = Path(options.model).stem if options.model else "model"
        shape = inputs.shape_from_flags(flags, name, where, length or LENGTH)
    else:
        shape = inputs.load_model(options.model)
    learned = shape.position_embedding_type == "learned_absolute"
    length = length or (min(LENGTH, shape.max_position_embeddings) if learned else LENGTH)
    if learned and length > shape.max_position_embeddings:
        raise ValueError(
            f"--seq-length {length}: {shape.name} has {shape.max_position_embeddings} learned positions; "
            "give a shorter one."
        )
    workload = Workload(
        options.workload,
        batch or BATCH,
        length,
        dtype or ("bf16" if cluster.fused else "fp32"),
        distributed_optimizer=(cluster.fused or distributed) and not options.no_distributed_optimizer,
        fused=cluster.fused,
        micro_batch=micro,
        cuda_graph=not options.eager,
    )
    return replace(shape, notes=(*shape.notes, *notes)), workload, flags


def resolve_grid(options: argparse.Namespace, shape: ModelShape, cluster: Cluster) -> HelixGrid | None:
    """The grid of --grid. ValueError where it is none, or none that can be planned here."""
    if options.grid is None:
        return None
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options.grid)
    if sizes is None:
        raise ValueError(f"--grid is {options.grid!r}; it is head groups and slices, as in 8x2.")
    n, m = map(int, sizes.groups())
    tp = n * m
    if options.tp not in (None, tp):
        raise ValueError(f"--grid {options.grid} has {tp} ranks and --tp is {options.tp}; leave --tp out.")
    check_grid(shape.attention, tp, n, m)
    if not even_slices(shape.attention, m):
        even = ", ".join(map(str, legal_grids(shape.attention, tp, even=True))) or f"none of {tp} ranks"
        raise ValueError(
            f"--grid {options.grid} has slices of unequal size, which are not planned; equal: {even}."
        )
    if cluster.devices % tp or indivisible_reason(shape, tp):
        divided = [f"the {cluster.devices} of the cluster", *(w.format(n) for w, n in shape.divided_sizes)]
        raise ValueError(
            f"--grid {options.grid} has {tp} ranks, which must divide {' and '.join(divided)}."
        )
    return HelixGrid(n, m)
