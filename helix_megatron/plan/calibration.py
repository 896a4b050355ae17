"""Rates and links of a cluster from a check.json of `helix check`.

Note [From profiles to rates]
    A profile says how long the kernels of an attention layer took, by class; the planner says the same for
    the same layout (compute.attention_layer). The quotient of the two, over all profiled layouts, is by how
    much the device is slower than the preset at that class of work. One layout is enough to plan others.

    gemm        matrix products                attention   fused or flash attention
    norm        norms                          packing     RoPE, packing

    Where the check had several GPUs, their links are taken as `helix plan --probe` would measure them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any

from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixGrid
from helix_megatron.plan import compute
from helix_megatron.plan.hardware import Cluster, Line, Rate
from helix_megatron.plan.layout import Layout, Problem, Workload

FORMAT = "helix check 1"
KINDS = {
    "gemm": compute.GEMM,
    "attention": compute.FUSED,
    "norm": compute.NORM,
    "packing": compute.PACKING,
}
"""Class of kernels to the kind of operation whose rate it gives."""


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The layer of a row of the section `layers`, as the planner sees it."""
    heads, hidden = row["heads"], row["hidden"]
    shape = ModelShape("measured", 1, hidden, heads, row["kv_heads"], row["dim"], 4 * hidden, 128 * row["tp"])
    layout = Layout(row["tp"], micro_batch=row["batch"])
    if row["grid"] is not None:
        grid = HelixGrid(*row["grid"])
        comm = "a2a" if grid.dim_parallel_size > 1 else "none"
        layout = Layout(row["tp"], helix=True, grid=grid, comm_type=comm, placement=row["placement"],
                        kv_cache="sequence", micro_batch=row["batch"])  # fmt: skip
    return Problem(shape, layout, Workload("train", row["batch"], row["sequence"], row["dtype"]))


def predict_kernels(row: Mapping[str, Any], cluster: Cluster) -> dict[str, float]:
    """Predicted microseconds of the kernels of a row's layer, forward and backward, by class."""
    problem = problem_of(row)
    return {
        name: 1e6 * sum(
            operation.calls * (1 + operation.backward)
            * operation.seconds(cluster.rate(operation.kind, problem.workload.dtype))
            for operation in operations
        )
        for name, operations in compute.attention_layer(problem, row["rope_fusion"]).items()
    }  # fmt: skip


def calibrate(cluster: Cluster, rows: Sequence[Mapping[str, Any]]) -> Cluster:
    """`cluster` with the rates that explain the rows; see Note [From profiles to rates]."""
    rates = dict(cluster.rates)
    for name, kind in KINDS.items():
        slower = [
            log(row["us"][name] / predict_kernels(row, cluster)[name]) for row in rows if row["us"].get(name)
        ]
        if slower:
            rates[kind] = cluster.rate(kind, "bf16").slower(exp(sum(slower) / len(slower)))
    return replace(cluster, rates=rates)


def apply_check(cluster: Cluster, path: str) -> Cluster:
    """`cluster` with what a check measured.

    Raises:
        ValueError: no check.json, or one that measured no kernels, or those of another GPU.
    """
    document = read_check(path)
    gpus = document["hardware"]["gpus"]
    if not gpus:
        raise ValueError(
            f"--check {path} was made on a host ({document['where']}); kernels are timed on a GPU."
        )
    refuse_other_gpu(cluster, gpus[0], path)
    found = document["sections"]
    measured = [row for row in found.get("collectives", {}).get("rows", []) if row["status"] == "measured"]
    rates = {
        row["rate"]: Rate(row["flops"], row["moved"], row["launch"]) for row in measured if "rate" in row
    }
    links = {
        row["case"]: Line(row["latency"], row["bandwidth"]) for row in measured if row.get("entry") == "links"
    }
    rows = [row for row in found.get("layers", {}).get("rows", []) if is_profile(row)]
    if not rows and not rates:
        raise ValueError(
            f"--check {path} has no kernel times: its section layers is missing or failed; make them by "
            "helix check --only layers."
        )
    cluster = replace(cluster, rates={**cluster.rates, **rates}, links={**cluster.links, **links})
    made = f"measured by helix check on {document['where']}, revision {document['revision'][:12]}, {path}"
    measures = {"kernels": rows, "rates": rates, "links": links}
    said = [f"{what} {made}" for what, there in measures.items() if there]
    return replace(calibrate(cluster, rows), sources=(*said, *cluster.sources))


def is_profile(row: Mapping[str, Any]) -> bool:
    """Whether a row is a training layer whose kernels were timed, with a fused or flash core."""
    return (
        row["status"] == "measured"
        and "heads" in row
        and bool(row.get("us"))
        and "unfused" not in row["core"]
    )


def read_check(path: str) -> dict[str, Any]:
    """The document. ValueError where it is none of this format."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--check {path} cannot be read ({error.strerror}); helix check writes one."
        ) from error
    except ValueError as error:
        raise ValueError(f"--check {path} is no JSON; helix check writes check.json.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(
            f"--check {path} is no check.json of this version ({FORMAT}); run helix check again."
        )
    return document


def refuse_other_gpu(cluster: Cluster, gpu: str, path: str) -> None:
    """ValueError where the check's GPU is known, and is that of another preset."""
    from helix_megatron.plan.clusters import CLUSTERS
    from helix_megatron.plan.machine import BOARDS

    preset = BOARDS.get(gpu.removeprefix("NVIDIA "), (None,))[0]
    if preset and cluster.name in CLUSTERS and cluster.name != preset:
        raise ValueError(
            f"--check {path} was made on {gpu}, and the cluster is {cluster.name}; --cluster {preset}."
        )
