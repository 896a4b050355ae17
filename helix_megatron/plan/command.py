"""`helix plan`: parse, search, print."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import ELEMENT_BYTES, KINDS, Workload

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
    parser.add_argument("--model", help="preset, config.json or its folder, or YAML with Megatron's flags")
    parser.add_argument(
        "--cluster", default="dgx-h100", help="preset, YAML file, or this (default: dgx-h100)"
    )
    parser.add_argument("--nodes", type=int, help="machines (default: the cluster's)")
    parser.add_argument("--gpus", type=int, help="ranks in all, where not all devices are used, or shared")
    parser.add_argument("--workload", choices=KINDS, default="train")
    parser.add_argument("--batch", type=int, default=128, help="sequences in a step over all replicas")
    parser.add_argument(
        "--seq-length", "--context", dest="length", type=int, default=4096, metavar="POSITIONS"
    )
    parser.add_argument("--dtype", choices=tuple(ELEMENT_BYTES), help="default: bf16, on a host fp32")
    parser.add_argument("--no-distributed-optimizer", action="store_true")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a device")
    parser.add_argument("--domain", type=int, help="devices that the fast link joins")
    parser.add_argument("--inter-node", type=float, metavar="GB/S", help="per device and direction")
    parser.add_argument("--tp", type=int, help="only this tensor-parallel size")
    parser.add_argument("--pp", type=int, help="only this number of pipeline stages")
    parser.add_argument("--top", type=int, default=8, help="rows shown (default: 8)")
    parser.add_argument(
        "--explain", action="store_true", help="every formula of the first rows, with numbers"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument(
        "--probe", metavar="FILE", help="measure this host's cores and write FILE, for --cluster"
    )
    parser.add_argument("--ranks", type=int, help="with --probe: the most ranks (default: twice the cores)")
    parser.add_argument("flags", nargs="*", help="after --: the model as Megatron's flags")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    if options.probe:
        from helix_megatron.plan import probe

        return probe.main(options.probe, options.ranks)
    from helix_megatron.plan import inputs, report
    from helix_megatron.plan.search import search

    if bool(options.model) == bool(options.flags):
        raise ValueError("give the model either as --model or as Megatron's flags after --")
    if options.flags:
        shape = inputs.model_of_flags(inputs.flags_of_words(options.flags), "model", "the flags after --")
    else:
        shape = inputs.model(options.model)
    cluster = _cluster(options)
    workload = Workload(
        options.workload,
        options.batch,
        options.length,
        options.dtype or ("bf16" if cluster.fused else "fp32"),
        distributed_optimizer=cluster.fused and not options.no_distributed_optimizer,
        fused=cluster.fused,
    )
    plan = search(shape, cluster, workload, options.tp, options.pp)
    if options.json:
        print(json.dumps(report.as_json(plan, shape, cluster, workload, options.top)))
        return 0 if plan.candidates else 1
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 170, soft_wrap=True)
    show = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    show(report.title(shape, cluster, workload))
    if not plan.candidates:
        show(f"No plan: {report.nothing(plan, shape, cluster)}.")
        return 1
    console.print(report.table(plan, workload, options.top))
    console.print(report.memory_table(plan, cluster, options.top))
    left = f", {plan.too_big} do not fit" if plan.too_big else ""
    show(f"{plan.tried} layouts{left}. ms: a whole step ({workload.kind}); update: gradients and optimizer.")
    for line in report.verdict(plan, shape, workload):
        show(line)
    show(f"Flags of 1: {report.flags_line(plan.candidates[0].layout, workload)}")
    if options.explain:
        for candidate in plan.candidates[: min(2, options.top)]:
            for line in report.explain(candidate, cluster):
                show(line)
    return 0


def _cluster(options: argparse.Namespace) -> Cluster:
    """The cluster with the user's changes. ValueError for sizes that cannot be."""
    from helix_megatron.plan import inputs

    for name in ("nodes", "gpus", "memory", "domain", "inter_node", "tp", "pp", "top"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be positive.")
    cluster = inputs.cluster(options.cluster)
    changes: dict[str, Any] = {}
    if options.nodes:
        changes["nodes"] = options.nodes
    if options.gpus:
        nodes = changes.get("nodes", cluster.nodes)
        if options.gpus % cluster.gpus_per_node == 0 and not options.nodes:
            nodes = options.gpus // cluster.gpus_per_node
        if options.gpus % nodes:
            raise ValueError(f"--gpus {options.gpus} is not a multiple of {nodes} nodes.")
        changes |= {"nodes": nodes, "gpus_per_node": options.gpus // nodes}
    if options.memory:
        changes["memory"] = options.memory * 1e9
    if options.domain:
        changes["domain"] = options.domain
    if options.inter_node:
        changes["slow"] = options.inter_node * 1e9
    return replace(cluster, **changes)
