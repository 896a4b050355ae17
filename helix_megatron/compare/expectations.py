"""What to expect on GPUs: the planner's times for two DGX H100, and what one H200 has measured, apart.

The comparison of a host says nothing about the times of GPUs. The same two layouts, Megatron's and Helix's at
one tensor-parallel size, are predicted here for models of their real size, beside the fastest of all layouts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from helix_megatron.plan import inputs
from helix_megatron.plan.layout import Layout, Workload
from helix_megatron.plan.search import search

CLUSTER, NODES, TP = "dgx-h100", 2, 16
WORK = (  # model, workload, what a reader calls it with its context or sequence
    ("llama-3.1-70b", Workload("decode", 8, 131072), "decode, 131,072"),
    ("llama-3.1-8b", Workload("train", 64, 8192), "train, 8,192"),
    ("qwen2-7b", Workload("train", 64, 8192), "train, 8,192"),
)
_MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "h200"


def predict_layouts() -> list[dict[str, Any]]:
    """Of each piece of work: ms of Megatron and Helix at TP (None: refused), and of the fastest layout."""
    cluster, found = replace(inputs.load_cluster(CLUSTER), nodes=NODES), []
    for name, workload, words in WORK:
        shape = inputs.load_model(name)
        at_tp, every = (search(shape, cluster, workload, **only).candidates for only in ({"tp": TP}, {}))
        own, theirs = (next((c for c in at_tp if c.layout.sliced is helix), None) for helix in (True, False))
        found.append(
            {
                "work": f"{name} {words}",
                "megatron": theirs and theirs.seconds * 1e3,
                "helix": own and own.seconds * 1e3,
                "ratio": own.seconds / theirs.seconds if own and theirs else None,
                "fastest": every[0].seconds * 1e3,
                "layout": short_name(every[0].layout),
            }
        )
    return found


def short_name(layout: Layout) -> str:
    """'TP=8 DP=2', 'Helix TP=8 DP=2'."""
    sizes = {"TP": layout.tp, "PP": layout.pp, "DP": layout.dp}
    used = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    return " ".join(["Helix"] * layout.sliced + used)


def read_measured(folder: Path = _MEASURED) -> list[str]:
    """Sentences of what one H200 has measured; where they are, when this is no checkout with its results."""
    try:
        layers = json.loads((folder / "attention_layer_fused_h200.json").read_text())
        decode = json.loads((folder / "kernel_h200.json").read_text())["rows"]
    except OSError:
        return ["Measured on one H200: docs/results.md and benchmarks/results/h200 of the repository."]
    microseconds = {layer["name"]: sum(layer["us"].values()) for layer in layers}
    kernels = microseconds["Helix 8x2 heads"] / microseconds["Megatron TP16"]
    as_shipped = [row for row in decode if row["splits"] is None]
    speeds = [row["fa3_us"] / row["graph_us"] for row in as_shipped if row.get("fa3_us")]
    return [
        "Measured, one H200, Llama-70B's attention layer at TP=16, kernels only: Helix / Megatron "
        f"{kernels:.2f}.",
        f"Measured, one H200, a decode kernel since replaced: {min(speeds):.2f} to {max(speeds):.2f} of the "
        "speed of FlashAttention 3.",
        "Not measured: today's decode kernel, and several GPUs, so no collective between them.",
    ]
