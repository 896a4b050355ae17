"""From the raw samples of the ranks to the numbers of a variant. Nothing here measures or predicts.

The slowest rank decides how long an iteration took; communication is the mean over the ranks; memory that of
the fullest rank. One run gives one value of each measure (records.py has its samples), and the runs of a
variant give a mean, a spread and an interval (stats.py).

Where an iteration's time goes, on the host, where a rank's thread waits inside its collectives: of rank r,
with t_r in the iteration and c_r in collectives, and T the slowest rank's t,

    communication   min over ranks of c     what the rank that waits for nobody spends
    idle            (c_r - min c) + (T - t_r)   waiting for others, in a collective or after the end
    compute         t_r - c_r

On GPUs it is taken from the kernels of one profiled iteration (measure/kernels.py), mean over ranks and runs.
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
_NOT_RUN = {"status": "not run", "cause": ""}
Record = dict[str, Any]


def read_rank(path: Path) -> Record:
    """What one rank wrote."""
    return json.loads(path.read_text())


def add_variants(
    results: Record,
    config: CompareConfig,
    found: dict[tuple[str, int], Record],
    references: dict[str, Variant],
) -> None:
    """Add `variants` and `references`: everything that the finished runs (variant, run) → record say."""
    peak = config.peak_tflops or known_peak(results["hardware"]["gpus"])
    results["peak_tflops_per_rank"] = peak
    results["references"] = [
        {"name": v.name, "model": key, "status": (record := found.get((v.name, 1), _NOT_RUN))["status"]}
        | ({"cause": record["cause"]} if record["cause"] else {})
        for key, v in references.items()
    ]
    results["variants"] = []
    for variant in config.variants:
        runs = [found[key] for key in sorted(found) if key[0] == variant.name]
        results["variants"].append(summarise_variant(config, variant, runs, peak))
    check_losses(results["variants"], config.loss_tolerance)


def known_peak(gpus: list[str]) -> float | None:
    """Dense bf16 peak of the machine's GPUs in TFLOP/s, when they are known and all alike."""
    peaks = {next((peak for part, peak in _PEAKS.items() if part in gpu), None) for gpu in gpus}
    return peaks.pop() if len(peaks) == 1 else None


def summarise_variant(
    config: CompareConfig, variant: Variant, runs: list[Record], peak: float | None
) -> Record:
    """One variant: its identity, how its runs ended, and `measured` from those that finished."""
    failed = next((run for run in runs if run["status"] != "ok"), None)
    good = [run for run in runs if run["status"] == "ok"]
    entry = {
        "name": variant.name,
        "attention_impl": variant.attention_impl,
        "family": variant.family,
        "may_fail": variant.may_fail,
        "model": config.model_key(variant),
        "world_size": config.ranks(variant),
        "argv": runs[0]["argv"] if runs else None,
        "status": failed["status"] if failed else "ok" if good else "not run",
        "runs": [{key: run[key] for key in ("run", "status", "seconds", "started", "cause")} for run in runs],
    }
    if failed:
        entry["cause"] = failed["cause"] + (f" (run {failed['run']})" if good else "")
    if good:
        entry["measured"] = summarise_runs(good, config.ranks(variant), config.host, peak)
    return entry


def summarise_runs(runs: list[Record], world: int, host: bool, peak: float | None) -> Record:
    """Everything measured of one variant."""
    ranks = runs[0]["ranks"]
    names = [name for name, work in ranks[0]["workloads"].items() if "cause" not in work]
    every = [rank for run in runs for rank in run["ranks"]]
    found: Record = {
        "layout": ranks[0]["args"],
        "grid": ranks[0]["helix"],
        "workloads": {name: summarise_workload(runs, name, world, host, peak) for name in names},
        "causes": {name: w["cause"] for name, w in ranks[0]["workloads"].items() if "cause" in w},
        "memory_bytes_of_fullest_rank": _most(rank["memory_bytes"] for rank in every),
        "megatron_estimate_bytes": _most(rank["megatron_estimate_bytes"] for rank in every),
    }
    if "train" in names:
        losses = [max((r["workloads"]["train"]["losses"] for r in run["ranks"]), key=len) for run in runs]
        found["losses"] = losses[0]
        found["losses_of_runs_differ_by"] = max(loss_difference(series, losses[0]) for series in losses)
        found["communication_per_layer"] = communication_per_layer(runs)
    if "decode" in names:  # the sequences in the order of the batch, whatever the data-parallel size
        replicas = {r["workloads"]["decode"]["replica"]: r["workloads"]["decode"] for r in ranks}
        found["decoded_tokens"] = [line for k in sorted(replicas) for line in replicas[k]["tokens_chosen"]]
    errors = [rank["error"] for rank in every if "error" in rank]
    if errors:
        largest = max(errors, key=lambda error: error.get("relative", math.inf))
        found["error"] = next((e for e in errors if "cause" in e), largest)
    if any("gpu" in rank for rank in every):
        found["gpu"] = summarise_gpu([rank["gpu"] for rank in every if "gpu" in rank])
    return found


def _most(several: Any) -> dict[str, float]:
    """key → the largest value that any of the dictionaries has."""
    found: dict[str, float] = {}
    for one in several:
        found |= {key: max(value, found.get(key, 0)) for key, value in one.items()}
    return dict(sorted(found.items()))


def _means(several: list[dict[str, float]]) -> dict[str, float]:
    return {key: fmean(one[key] for one in several) for key in several[0]}


def summarise_workload(runs: list[Record], name: str, world: int, host: bool, peak: float | None) -> Record:
    """One workload of one variant: a summary over the runs of every measure, and the samples."""
    per_run = [[rank["workloads"][name] for rank in run["ranks"]] for run in runs]
    every = [rank for ranks in per_run for rank in ranks]
    tokens, flops = every[0]["tokens"], every[0]["flops"]
    samples = [slowest(ranks, "seconds") for ranks in per_run]
    seconds = [fmean(series) for series in samples]
    rates = [flops / second / world / 1e12 for second in seconds]
    found: Record = {
        "tokens_per_iteration": tokens,
        "flops_per_iteration": flops,
        "samples_seconds": samples,
        "iteration_seconds": stats.summarise(seconds),
        "tokens_per_s": stats.summarise([tokens / second for second in seconds]),
        "tflops_per_rank": stats.summarise(rates),
        "mfu": fmean(rates) / peak if peak else None,
        "communication": summarise_collectives(every),
    }
    counted = [ranks for ranks in per_run if all(rank["comm_seconds"] for rank in ranks)]
    if counted:  # the paper's TPOT: synchronisation and communication, per token
        means = [fmean(fmean(rank["comm_seconds"]) for rank in ranks) for ranks in counted]
        found["paper_tpot_ms"] = stats.summarise([1e3 * second / tokens for second in means])
    if host:
        found["split_seconds"] = _means([split_seconds(ranks) for ranks in per_run])
    elif all("split_seconds" in rank for rank in every):
        found["split_seconds"] = _means([rank["split_seconds"] for rank in every])
    for key in ("first_token_seconds", "token_seconds"):
        if key in every[0]:
            found[key] = stats.summarise([fmean(slowest(ranks, key)) for ranks in per_run])
    return found


def slowest(ranks: list[Record], key: str) -> list[float]:
    """Of each iteration the slowest rank's."""
    return [max(column) for column in zip(*(rank[key] for rank in ranks))]


def split_seconds(ranks: list[Record]) -> dict[str, float]:
    """Mean seconds of an iteration in compute, communication and idle: see the head of this file."""
    parts = []
    for iteration in zip(*(zip(rank["seconds"], rank["comm_seconds"]) for rank in ranks)):
        longest, least = max(t for t, _ in iteration), min(c for _, c in iteration)  # (t_r, c_r) of each rank
        idle = fmean(c - least + longest - t for t, c in iteration)
        parts.append({"compute": fmean(t - c for t, c in iteration), "communication": least, "idle": idle})
    return _means(parts)


def summarise_collectives(ranks: list[Record]) -> dict[str, dict[str, float | None]]:
    """kind → calls, bytes and seconds of one iteration (mean rank), algbw, busbw, largest.

    algbw and busbw in bytes/s as nccl-tests defines them; None where no time was taken.
    """
    iterations = sum(rank["comm_iterations"] for rank in ranks)
    table: dict[str, dict[str, float | None]] = {}
    for kind in sorted({kind for rank in ranks for kind in rank["comm"]}):
        tallies = [rank["comm"][kind] for rank in ranks if kind in rank["comm"]]
        total = {unit: sum(tally[unit] for tally in tallies) for unit in tallies[0]}
        algbw = total["payload"] / total["seconds"] if total["seconds"] else None
        operation, _, size = kind.partition(" x")
        table[kind] = {
            **{unit: total[unit] / iterations for unit in ("calls", "bytes", "seconds")},
            "algbw": algbw,
            "busbw": algbw * bus_factor(operation, int(size)) if algbw is not None else None,
            "largest": max(tally["largest"] for tally in tallies),
        }
    return table


def communication_per_layer(runs: list[Record]) -> dict[str, dict[str, float]]:
    """kind → calls, bytes, seconds of one training step: all ranks' sums over all their layers."""
    table: dict[str, dict[str, float]] = {}
    for run in runs:
        layers = sum(rank["layers"] for rank in run["ranks"])
        for train in (rank["workloads"]["train"] for rank in run["ranks"]):
            for kind, tally in train["comm"].items():
                cost = table.setdefault(kind, {"calls": 0.0, "bytes": 0.0, "seconds": 0.0})
                for unit in cost:
                    cost[unit] += tally[unit] / layers / train["comm_iterations"] / len(runs)
    return dict(sorted(table.items()))


def summarise_gpu(ranks: list[Record]) -> Record:
    """What NVML said, mean over ranks and runs; what it did not say is absent."""
    names = ("gpu_busy_percent", "memory_busy_percent", "memory_bandwidth_percent", "watts")
    found: Record = {k: fmean(rank[k] for rank in ranks) for k in names if all(k in rank for rank in ranks)}
    if all("nvlink_bytes" in rank for rank in ranks):
        found["nvlink_bytes"] = _means([rank["nvlink_bytes"] for rank in ranks])
    errors = sorted({f"{what}: {error}" for rank in ranks for what, error in rank.get("errors", {}).items()})
    return found | ({"errors": errors} if errors else {})


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """Largest absolute difference; infinite when a loss is missing or not a number."""
    if not losses or len(losses) != len(reference):
        return math.inf
    differences = [abs(a - b) for a, b in zip(losses, reference)]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences)


def check_losses(variants: list[Record], tolerance: float) -> None:
    """Add `loss_check` to every variant that trained: its difference to the first one of its model."""
    references: dict[str, Record] = {}
    for variant in (v for v in variants if "losses" in v.get("measured", {})):
        reference = references.setdefault(variant["model"], variant)
        difference = loss_difference(variant["measured"]["losses"], reference["measured"]["losses"])
        difference = max(difference, variant["measured"]["losses_of_runs_differ_by"])
        variant["loss_check"] = {
            "reference": reference["name"],
            "max_abs_difference": difference if math.isfinite(difference) else None,
            "agrees": difference <= tolerance,
        }


def describe_end(record: Record) -> str:
    """What is said as soon as a run has ended."""
    label, seconds = f"{record['variant']}, run {record['run']}", f"{record['seconds']:.0f} s"
    if record["status"] != "ok":
        return f"{label}: {record['status'].upper()} after {seconds}: {record['cause']}"
    if "train" not in record["ranks"][0].get("workloads", {}):
        return f"{label}: {seconds}"
    train = [rank["workloads"]["train"] for rank in record["ranks"]]
    speed = train[0]["tokens"] / fmean(slowest(train, "seconds"))
    return f"{label}: {seconds}, {speed:.1f} training tokens/s (measured)"
