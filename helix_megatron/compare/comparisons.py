"""Who is faster than whom, by how much, and whether that is more than noise; and how well variants scale.

Pure: results in, numbers out.

Every Helix variant stands next to every Megatron variant of the same model on as many ranks, and every
Megatron variant next to the first. Run k is paired with run k (stats.py).

A grid of m = 1 is Megatron's own attention: what separates it from Megatron at the same layout is no
difference of the two, so no smaller one is shown as a difference either.
"""

from __future__ import annotations

import math
from typing import Any

from helix_megatron.compare import stats

WORKLOADS = {  # name in `measured` → what a reader calls it
    "train": "training",
    "prefill": "prefill",
    "first_token": "time to first token",
    "decode": "decode",
    "mixed": "mixed prefill and decode",
}
MEMORY_PARTS = {  # name in `memory_bytes_of_fullest_rank` → what a reader calls it
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "saved_for_backward": "activations",
    "kv_cache": "KV cache",
    "communication": "communication buffers",
}


def finished_variants(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The variants whose runs all ended well."""
    return [variant for variant in results["variants"] if variant["status"] == "ok"]


def pair_variants(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(variant, the Megatron variant it is compared with), in the order of the file."""
    done, found = finished_variants(results), []
    for variant in done:
        alike = [v for v in done if all(v[key] == variant[key] for key in ("model", "world_size"))]
        peers = [v for v in alike if v["attention_impl"] == "megatron"]
        found += [(variant, v) for v in peers[: 1 if variant in peers else None] if v is not variant]
    return found


def compare(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each pair and workload: variant, baseline, workload, and `stats.compare` of their speeds.

    ratio > 1: the variant is faster. verdict: "faster", "slower", "no difference shown", "within the noise of
    two equal programs", or "one run shows no difference".
    """
    entries = []
    for variant, baseline in pair_variants(results):
        for name in WORKLOADS:
            own, other = speeds_of_runs(variant, name), speeds_of_runs(baseline, name)
            common = sorted(own.keys() & other.keys())
            if common:
                found = stats.compare([own[run] for run in common], [other[run] for run in common])
                entry = {"variant": variant["name"], "baseline": baseline["name"], "workload": name, **found}
                entries.append(entry | {"same_program": runs_same_program(variant, baseline)})
    noise: dict[str, float] = {}
    for entry in entries:
        if entry["same_program"]:
            noise[entry["workload"]] = max(noise.get(entry["workload"], 0), abs(math.log(entry["ratio"])))
    for entry in entries:
        entry["verdict"] = judge(entry, noise.get(entry["workload"], 0.0))
    return entries


def speeds_of_runs(variant: dict[str, Any], workload: str) -> dict[int, float]:
    """Run → iterations per second of one workload; empty when it was not measured."""
    found = variant["measured"]["workloads"].get(workload)
    runs = [run["run"] for run in variant["runs"] if run["status"] == "ok"]
    if found is None:
        return {}
    tokens = found["tokens_per_iteration"]
    return {run: tokens * len(s) / sum(s) for run, s in zip(runs, found["samples_seconds"])}


def runs_same_program(variant: dict[str, Any], baseline: dict[str, Any]) -> bool:
    """Whether the two run the same computation: a Helix grid of m = 1 and Megatron in the same layout."""
    degrees = [f"{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "data", "context")]
    layouts = [v["measured"]["layout"] for v in (variant, baseline)]
    alike = all(layouts[0].get(d) == layouts[1].get(d) for d in degrees)
    return alike and (variant["measured"]["grid"] or {}).get("m") == 1


def judge(entry: dict[str, Any], noise: float) -> str:
    """What may be said of one comparison; noise: |log ratio| between two equal programs, 0 if not known."""
    if entry["differs"] is None:
        return "one run shows no difference"
    if not entry["differs"]:
        return "no difference shown"
    if not entry["same_program"] and abs(math.log(entry["ratio"])) <= noise:
        return "within the noise of two equal programs"
    return "faster" if entry["ratio"] > 1 else "slower"


def scaling_points(results: dict[str, Any], workload: str) -> dict[str, list[dict[str, Any]]]:
    """family → its sizes that finished, smallest first: ranks, tokens_per_s, efficiency, and the grid.

    Efficiency is relative to the family's own smallest size.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in finished_variants(results):
        if variant["family"] and workload in variant["measured"]["workloads"]:
            measured, ranks = variant["measured"], variant["world_size"]
            speed = measured["workloads"][workload]["tokens_per_s"]["mean"]
            point = {"ranks": ranks, "tokens_per_s": speed, "grid": measured["grid"]}
            found.setdefault(variant["family"], []).append(point)
    for points in found.values():
        points.sort(key=lambda point: point["ranks"])
        base = points[0]["tokens_per_s"] / points[0]["ranks"]
        for point in points:
            point["efficiency"] = point["tokens_per_s"] / point["ranks"] / base
    return found
