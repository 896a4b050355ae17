"""What the planner predicts of a variant, to stand beside what was measured of it. Nothing here measures.

    here            planner (helix_megatron/plan)
    train           "train": a step of the global batch
    first_token     "prefill": a batch of prompts into the KV cache, logits of the last token
    decode          "decode": one token, at the context in the middle of the iterations

`prefill` here is a forward pass with all logits and a loss, `mixed` a sum of others: the planner has neither.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.variants import Variant
from helix_megatron.partition.grid import HelixConfigError, HelixGrid
from helix_megatron.plan import inputs, machine, memory
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem, Workload
from helix_megatron.plan.terms import total
from helix_megatron.plan.timing import predict

_NOT_MODELLED = {
    "--context-parallel-size": "context parallelism",
    "--num-layers-per-virtual-pipeline-stage": "virtual pipeline stages",
    "--num-virtual-stages-per-pipeline-rank": "virtual pipeline stages",
    "--num-experts": "experts",
    "--helix-slice-weights": "slice weights",
}


def find_cluster(config: CompareConfig) -> Cluster:
    """The cluster that `config` names, by default this machine. ValueError for one that is not known."""
    cores = config.host and not config.cluster  # a host's ranks do not use its GPUs
    cluster = machine.host_cluster() if cores else inputs.load_cluster(config.cluster or "this")
    return replace(cluster, nodes=config.nnodes)


def add_predictions(config: CompareConfig, results: dict[str, Any]) -> None:
    """Add `prediction` (of which cluster, or the cause why there is none) and `predicted` to each variant.

    A variant's `predicted` has `workloads` (name → seconds of an iteration), `memory_bytes`, or a `cause`.
    """
    try:
        machine = find_cluster(config)
    except ValueError as error:
        results["prediction"] = {"cause": str(error)}
        return
    results["prediction"] = {"cluster": machine.name, "sources": list(machine.sources)}
    for variant, entry in zip(config.variants, results["variants"], strict=True):
        if "measured" in entry:
            try:
                entry["predicted"] = predict_variant(config, variant, entry["measured"], machine)
            except (HelixConfigError, ValueError) as error:
                entry["predicted"] = {"cause": str(error)}


def predict_variant(
    config: CompareConfig, variant: Variant, measured: dict[str, Any], machine: Cluster
) -> dict[str, Any]:
    """Seconds of each workload that the planner knows, and bytes of the fullest rank in `measured`'s names.

    ValueError for what the planner does not model.
    """
    flags = config.flags(variant)
    for flag, name in _NOT_MODELLED.items():
        one = None if flag == "--num-layers-per-virtual-pipeline-stage" else 1  # of the others 1 is none
        if flags.get(flag) not in (None, False, one):
            raise ValueError(f"the planner does not model {name}.")
    if flags.get("--helix-softmax") == "per-slice":
        raise ValueError("the planner does not model per-slice softmax.")
    shape = inputs.shape_from_flags(flags, variant.name, config.name)
    layout = _find_layout(measured, flags)
    found: dict[str, Any] = {"workloads": {}, "memory_bytes": {}}
    for name, work in _find_workloads(config, measured, flags).items():
        here = layout if name == "train" else replace(layout, micro_batch=max(1, work.batch // layout.dp))
        problem = Problem(shape, here, work)
        found["workloads"][name] = predict(problem, machine).seconds
        found["memory_bytes"] |= _predict_bytes(problem)
    return found


def _find_layout(measured: dict[str, Any], flags: dict[str, Any]) -> Layout:
    sizes, grid = measured["layout"], measured["grid"]
    chosen: dict[str, Any] = {"helix": True, "grid": HelixGrid(grid["n"], grid["m"])} if grid else {}
    if grid and grid["m"] > 1:
        chosen |= {"comm_type": grid["comm"], "placement": grid["placement"]}
        chosen["kv_cache"] = grid.get("cache") or "sequence"
    return Layout(
        sizes["tensor_model_parallel_size"],
        sizes["pipeline_model_parallel_size"],
        sizes["data_parallel_size"],
        micro_batch=sizes["micro_batch_size"],
        sequence_parallel=flags.get("--sequence-parallel") is True,
        recompute=flags.get("--recompute-granularity") == "full",
        **chosen,
    )


def _find_workloads(
    config: CompareConfig, measured: dict[str, Any], flags: dict[str, Any]
) -> dict[str, Workload]:
    """Those that were measured and that the planner knows."""
    sizes, decode = measured["layout"], config.workload("decode")
    common: dict[str, Any] = {
        "dtype": "bf16" if flags.get("--bf16") else "fp16" if flags.get("--fp16") else "fp32",
        "distributed_optimizer": flags.get("--use-distributed-optimizer") is True,
        "fused": flags.get("--transformer-impl", "transformer_engine") != "local",
    }
    steps = decode.warmup_iterations + decode.iterations if decode else 0
    lengths = {
        "train": ("train", sizes["global_batch_size"], sizes["seq_length"]),
        "first_token": ("prefill", config.batch_size, config.prompt_length),
        "decode": ("decode", config.batch_size, config.prompt_length + 1 + steps // 2),
    }
    return {k: Workload(*v, **common) for k, v in lengths.items() if k in measured["workloads"]}


def _predict_bytes(problem: Problem) -> dict[str, float]:
    """Bytes of the fullest rank in `measured`'s names, each part's own; activations of one micro-batch."""
    stages = range(problem.layout.pp)
    held = [memory.stage_memory(problem, stage) for stage in stages]
    if problem.workload.kind == "decode":
        parts = {"kv_cache": [one.kv_cache for one in held]}
    elif problem.workload.kind == "train":
        parts = {
            "parameters": [one.weights for one in held],
            "gradients": [one.gradients for one in held],
            "optimizer": [one.optimizer for one in held],
            "saved_for_backward": [memory.activations(problem, stage) for stage in stages],
        }
    else:
        parts = {}
    return {name: max(map(total, terms)) for name, terms in parts.items()}


def describe_prediction(results: dict[str, Any]) -> str:
    """Of what the predictions are, in one sentence; empty where there are none."""
    prediction = results.get("prediction", {})
    if "cause" in prediction:
        return f"The planner predicts nothing: {prediction['cause']}"
    if not prediction:
        return ""
    sources = "; ".join(prediction["sources"])
    return f"Predicted by `helix plan`'s formulas for the cluster {prediction['cluster']} ({sources})."
