"""From the raw samples of the ranks to the numbers of a variant. Nothing here measures or predicts.

The slowest rank decides how long an iteration took; communication is the mean over the ranks; memory that of
the fullest rank. One run gives one value of each measure (records.py has its samples), and the runs of a
variant give a mean, a spread and an interval (stats.py).

Where an iteration's time goes, on the host, where a rank's thread waits inside its collectives: of rank r,
with t_r in the iteration and c_r in collectives, and T the slowest rank's t,

    communication   min over ranks of c     what the rank that waits for nobody spends
    idle            (c_r - min c) + (T - t_r)   waiting for others, in a collective or after the end
    compute         t_r - c_r

On GPUs it is taken from the kernels of one profiled iteration (kernels.py), mean over ranks and runs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from helix_megatron.compare import stats
from helix_megatron.compare.config import CompareConfig
from helix_megatron.compare.variants import Variant
from helix_megatron.measure.comm import bus_factor

# Dense bf16 peak of one GPU in TFLOP/s, by a part of its name, as its maker states it.
_PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312}


def read_rank(path: Path) -> dict[str, Any]:
    """What one rank wrote."""
    return json.loads(path.read_text())


def complete(
    results: dict[str, Any],
    config: CompareConfig,
    found: dict[tuple[str, int], dict[str, Any]],
    reference_runs: dict[str, Variant],
) -> dict[str, Any]:
    """Add `variants` and `references`: everything that the finished runs (variant, run) → record say."""
    peak = config.peak_tflops or known_peak(results["hardware"]["gpus"])
    results["peak_tflops_per_rank"] = peak
    results["references"] = [
        {"name": v.name, "model": key, "status": (record := found.get((v.name, 1), _NOT_RUN))["status"]}
        | ({"cause": record["cause"]} if record["cause"] else {})
        for key, v in reference_runs.items()
    ]
    results["variants"] = []
    for variant in config.variants:
        runs = [found[key] for key in sorted(k for k in found if k[0] == variant.name)]
        results["variants"].append(variant_entry(config, variant, runs, peak))
    check_losses(results["variants"], config.loss_tolerance)
    return results


_NOT_RUN = {"status": "not run", "cause": ""}


def known_peak(gpus: list[str]) -> float | None:
    """Dense bf16 peak of the machine's GPUs in TFLOP/s, when they are known and all alike."""
    peaks = {next((peak for part, peak in _PEAKS.items() if part in gpu), None) for gpu in gpus}
    return peaks.pop() if len(peaks) == 1 else None


def variant_entry(
    config: CompareConfig, variant: Variant, runs: list[dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    """One variant: its identity, how its runs ended, and `measured` from those that finished."""
    failed = next((run for run in runs if run["status"] != "ok"), None)
    good = [run for run in runs if run["status"] == "ok"]
    status = failed["status"] if failed else "ok" if good else "not run"
    entry = {
        "name": variant.name,
        "attention_impl": variant.attention_impl,
        "family": variant.family,
        "may_fail": variant.may_fail,
        "model": config.model_key(variant),
        "world_size": config.ranks(variant),
        "argv": runs[0]["argv"] if runs else None,
        "status": status,
        "runs": [{key: run[key] for key in ("run", "status", "seconds", "started", "cause")} for run in runs],
    }
    if failed:
        entry["cause"] = failed["cause"] + (f" (run {failed['run']})" if good else "")
    if good:
        entry["measured"] = measured(good, config.ranks(variant), config.host, peak)
    return entry


def measured(runs: list[dict[str, Any]], world: int, host: bool, peak: float | None) -> dict[str, Any]:
    """Everything measured of one variant."""
    ranks = runs[0]["ranks"]
    names = [name for name in ranks[0]["workloads"] if "cause" not in ranks[0]["workloads"][name]]
    every = [rank for run in runs for rank in run["ranks"]]
    keys = sorted({key for rank in every for key in rank["memory_bytes"]})
    estimate = {
        key: max(rank["megatron_estimate_bytes"][key] for rank in every)
        for key in ranks[0]["megatron_estimate_bytes"]
    }
    found: dict[str, Any] = {
        "layout": ranks[0]["args"],
        "grid": ranks[0]["helix"],
        "workloads": {name: workload(runs, name, world, host, peak) for name in names},
        "causes": {name: w["cause"] for name, w in ranks[0]["workloads"].items() if "cause" in w},
        "memory_bytes_of_fullest_rank": {k: max(r["memory_bytes"].get(k, 0) for r in every) for k in keys},
        "megatron_estimate_bytes": estimate,
    }
    if "train" in names:
        losses = [max((r["workloads"]["train"]["losses"] for r in run["ranks"]), key=len) for run in runs]
        found["losses"] = losses[0]
        found["losses_of_runs_differ_by"] = max(loss_difference(series, losses[0]) for series in losses)
        found["communication_per_layer"] = per_layer(runs)
    if "decode" in names:
        found["decoded_tokens"] = decoded_tokens(ranks)
    errors = [rank["error"] for rank in every if "error" in rank]
    if errors:
        found["error"] = next((e for e in errors if "cause" in e), max(errors, key=_relative))
    if any("gpu" in rank for rank in every):
        found["gpu"] = gpu([rank["gpu"] for rank in every if "gpu" in rank])
    return found


def _relative(error: dict[str, Any]) -> float:
    return error.get("relative", math.inf)


def workload(
    runs: list[dict[str, Any]], name: str, world: int, host: bool, peak: float | None
) -> dict[str, Any]:
    """One workload of one variant: a summary over the runs of every measure, and the samples."""
    per_run = [[rank["workloads"][name] for rank in run["ranks"]] for run in runs]
    tokens, flops = per_run[0][0]["tokens"], per_run[0][0]["flops"]
    samples = [[max(column) for column in zip(*(rank["seconds"] for rank in ranks))] for ranks in per_run]
    seconds = [fmean(series) for series in samples]
    rates = [flops / second / world / 1e12 for second in seconds]
    found: dict[str, Any] = {
        "tokens_per_iteration": tokens,
        "flops_per_iteration": flops,
        "samples_seconds": samples,
        "iteration_seconds": stats.summary(seconds),
        "tokens_per_s": stats.summary([tokens / second for second in seconds]),
        "tflops_per_rank": stats.summary(rates),
        "mfu": fmean(rates) / peak if peak else None,
        "communication": collectives(per_run, world),
    }
    counted = [fmean(fmean(rank["comm_seconds"]) for rank in ranks) for ranks in per_run if _counted(ranks)]
    if counted:  # the paper's TPOT: synchronisation and communication, per token
        found["paper_tpot_ms"] = stats.summary([1e3 * second / tokens for second in counted])
    if host:
        splits = [split(ranks) for ranks in per_run]
        found["split_seconds"] = {part: fmean(s[part] for s in splits) for part in splits[0]}
    elif all("split_seconds" in rank for ranks in per_run for rank in ranks):
        profiled = [rank["split_seconds"] for ranks in per_run for rank in ranks]
        found["split_seconds"] = {part: fmean(s[part] for s in profiled) for part in profiled[0]}
    for key in ("first_token_seconds", "token_seconds"):
        if key in per_run[0][0]:
            slowest = [[max(column) for column in zip(*(rank[key] for rank in ranks))] for ranks in per_run]
            found[key] = stats.summary([fmean(series) for series in slowest])
    return found


def _counted(ranks: list[dict[str, Any]]) -> bool:
    return all(rank["comm_seconds"] for rank in ranks)


def split(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of an iteration in compute, communication and idle: see the head of this file."""
    parts = {"compute": 0.0, "communication": 0.0, "idle": 0.0}
    iterations = list(zip(*(zip(rank["seconds"], rank["comm_seconds"]) for rank in ranks)))
    for iteration in iterations:  # [(t_r, c_r) for each rank r]
        whole, least = max(t for t, _ in iteration), min(c for _, c in iteration)
        parts["compute"] += fmean(t - c for t, c in iteration)
        parts["communication"] += least
        parts["idle"] += fmean(c - least + whole - t for t, c in iteration)
    return {part: total / len(iterations) for part, total in parts.items()}


def collectives(per_run: list[list[dict[str, Any]]], world: int) -> dict[str, dict[str, float | None]]:
    """kind → calls, bytes and seconds of one iteration (mean rank), algbw, busbw, largest.

    algbw and busbw in bytes/s as nccl-tests defines them; None where no time was taken.
    """
    sums: dict[str, dict[str, float]] = {}
    iterations = 0
    for rank in (rank for ranks in per_run for rank in ranks):
        iterations += rank["comm_iterations"]
        for kind, tally in rank["comm"].items():
            total = sums.setdefault(kind, dict.fromkeys(tally, 0.0))
            for unit, value in tally.items():
                total[unit] = max(total[unit], value) if unit == "largest" else total[unit] + value
    table: dict[str, dict[str, float | None]] = {}
    for kind, total in sorted(sums.items()):
        operation, _, size = kind.partition(" x")
        algbw = total["payload"] / total["seconds"] if total["seconds"] else None
        table[kind] = {
            **{unit: total[unit] / iterations for unit in ("calls", "bytes", "seconds")},
            "algbw": algbw,
            "busbw": algbw * bus_factor(operation, int(size)) if algbw is not None else None,
            "largest": total["largest"],
        }
    return table


def per_layer(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """kind → calls, bytes, seconds of one training step: all ranks' sums over all their layers."""
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        layers = sum(rank["layers"] for rank in run["ranks"])
        for rank in run["ranks"]:
            train = rank["workloads"]["train"]
            for kind, tally in train["comm"].items():
                cost = table.setdefault(kind, {"calls": 0.0, "bytes": 0.0, "seconds": 0.0})
                for unit in cost:
                    cost[unit] += tally[unit] / layers / train["comm_iterations"] / len(runs)
    return dict(sorted(table.items()))


def decoded_tokens(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of all sequences, in the order of the batch, whatever the data-parallel size."""
    replicas = {rank["workloads"]["decode"]["replica"]: rank["workloads"]["decode"] for rank in ranks}
    return [line for number in sorted(replicas) for line in replicas[number]["tokens_chosen"]]


def gpu(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What NVML said, mean over ranks and runs; what it did not say is absent."""
    names = ("gpu_busy_percent", "memory_busy_percent", "memory_bandwidth_percent", "watts")
    keys = [k for k in names if all(k in r for r in ranks)]
    found: dict[str, Any] = {key: fmean(rank[key] for rank in ranks) for key in keys}
    if all("nvlink_bytes" in rank for rank in ranks):
        links = [rank["nvlink_bytes"] for rank in ranks]
        found["nvlink_bytes"] = {key: fmean(link[key] for link in links) for key in links[0]}
    errors = sorted({f"{what}: {error}" for rank in ranks for what, error in rank.get("errors", {}).items()})
    return found | ({"errors": errors} if errors else {})


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """Largest absolute difference; infinite when a loss is missing or not a number."""
    if not losses or len(losses) != len(reference):
        return math.inf
    differences = [abs(a - b) for a, b in zip(losses, reference)]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences)


def check_losses(variants: list[dict[str, Any]], tolerance: float) -> None:
    """Add `loss_check` to every variant that trained: its difference to the first one of its model."""
    references: dict[str, dict[str, Any]] = {}
    for variant in variants:
        if "losses" not in variant.get("measured", {}):
            continue
        reference = references.setdefault(variant["model"], variant)
        difference = loss_difference(variant["measured"]["losses"], reference["measured"]["losses"])
        difference = max(difference, variant["measured"]["losses_of_runs_differ_by"])
        variant["loss_check"] = {
            "reference": reference["name"],
            "max_abs_difference": difference if math.isfinite(difference) else None,
            "agrees": difference <= tolerance,
        }


def one_line(record: dict[str, Any]) -> str:
    """What is said as soon as a run has ended."""
    label = f"{record['variant']}, run {record['run']}"
    if record["status"] != "ok":
        return f"{label}: {record['status'].upper()} after {record['seconds']:.0f} s: {record['cause']}"
    said = f"{label}: {record['seconds']:.0f} s"
    train = record["ranks"][0].get("workloads", {}).get("train")
    if train:
        every = [rank["workloads"]["train"]["seconds"] for rank in record["ranks"]]
        slowest = [max(column) for column in zip(*every)]
        said += f", {train['tokens'] / fmean(slowest):.1f} training tokens/s (measured)"
    return said
