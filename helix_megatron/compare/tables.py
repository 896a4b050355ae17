"""The tables of a comparison as text: one row for each variant, the same in terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helix_megatron.compare.comparisons import WORKLOADS
from helix_megatron.compare.findings import bound, tiny, versus

Cell = Callable[[dict[str, Any]], str | None]


def _layout(key: str) -> Cell:
    return lambda v: _text(v["measured"]["layout"].get(f"{key}_parallel_size"))


def _grid(key: str) -> Cell:
    return lambda v: _text((v["measured"]["grid"] or {}).get(key))


def _if_used(key: str) -> Cell:
    """A degree that most comparisons leave at 1; a dash where it is."""

    def cell(variant: dict[str, Any]) -> str | None:
        value = variant["measured"]["layout"].get(key)
        return None if value in (None, 1) else str(value)

    return cell


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _workload(name: str, measure: str, form: str, factor: float = 1.0) -> Cell:
    """mean of a summary over the runs, ± half its 95 % interval when there is one."""

    def cell(variant: dict[str, Any]) -> str | None:
        summary = variant["measured"]["workloads"].get(name, {}).get(measure)
        return None if summary is None else with_interval(summary, form, factor)

    return cell


def with_interval(summary: dict[str, Any], form: str, factor: float = 1.0) -> str:
    """'24.5 ± 0.3': mean and half the width of the 95 % interval, in the format `form`."""
    said = form.format(summary["mean"] * factor)
    if summary["ci95"] is not None:
        said += f" ± {form.format((summary['ci95'][1] - summary['mean']) * abs(factor))}"
    return said


def _memory(key: str) -> Cell:
    def cell(variant: dict[str, Any]) -> str | None:
        held = variant["measured"]["memory_bytes_of_fullest_rank"].get(key)
        return None if held is None else f"{held / 1e6:.2f}"

    return cell


def _per_layer(unit: str, factor: float, form: str) -> Cell:
    def cell(variant: dict[str, Any]) -> str | None:
        kinds = variant["measured"].get("communication_per_layer")
        return None if kinds is None else form.format(sum(kind[unit] for kind in kinds.values()) * factor)

    return cell


def _last_loss(variant: dict[str, Any]) -> str | None:
    losses = variant["measured"].get("losses")
    return f"{losses[-1]:.5f}" if losses else None


def _loss_difference(variant: dict[str, Any]) -> str | None:
    check = variant.get("loss_check")
    far = check and check["max_abs_difference"]
    return None if check is None else "n/a" if far is None else tiny(far)


def _error(variant: dict[str, Any]) -> str | None:
    relative = variant["measured"].get("error", {}).get("relative")
    return None if relative is None else tiny(relative)


def _per_rank(variant: dict[str, Any]) -> str | None:
    found = variant["measured"]["workloads"].get("train")
    return None if found is None else f"{found['tokens_per_s']['mean'] / variant['world_size']:.2f}"


def _per_user(variant: dict[str, Any]) -> str | None:
    found = variant["measured"]["workloads"].get("decode")
    return None if found is None else f"{1 / found['iteration_seconds']['mean']:.2f}"


def _mfu(variant: dict[str, Any]) -> str | None:
    mfu = variant["measured"]["workloads"].get("train", {}).get("mfu")
    return None if mfu is None else f"{100 * mfu:.1f} %"


SPEED: tuple[tuple[str, Cell], ...] = (
    ("TP", _layout("tensor_model")),
    ("PP", _layout("pipeline_model")),
    ("VP", _if_used("virtual_pipeline_model_parallel_size")),
    ("DP", _layout("data")),
    ("CP", _if_used("context_parallel_size")),
    ("n", _grid("n")),
    ("m", _grid("m")),
    ("comm", _grid("comm")),
    ("queries", _grid("placement")),
    ("cache", _grid("cache")),
    ("loss@last", _last_loss),
    ("max |Δloss|", _loss_difference),
    ("error vs fp32", _error),
    ("train tok/s", _workload("train", "tokens_per_s", "{:.1f}")),
    ("prefill tok/s", _workload("prefill", "tokens_per_s", "{:.1f}")),
    ("TTFT ms", _workload("first_token", "iteration_seconds", "{:.0f}", 1e3)),
    ("TPOT ms", _workload("decode", "iteration_seconds", "{:.0f}", 1e3)),
    ("paper's TPOT ms", _workload("decode", "paper_tpot_ms", "{:.0f}")),
)
DETAILS: tuple[tuple[str, Cell], ...] = (
    ("ranks", lambda v: str(v["world_size"])),
    ("train tok/s/rank", _per_rank),
    ("decode tok/s", _workload("decode", "tokens_per_s", "{:.2f}")),
    ("decode tok/s/user", _per_user),
    ("mixed tok/s", _workload("mixed", "tokens_per_s", "{:.1f}")),
    ("mixed TTFT ms", _workload("mixed", "first_token_seconds", "{:.0f}", 1e3)),
    ("mixed TPOT ms", _workload("mixed", "token_seconds", "{:.0f}", 1e3)),
    ("train iteration s", _workload("train", "iteration_seconds", "{:.3g}")),
    ("train TFLOP/s/rank", _workload("train", "tflops_per_rank", "{:.3g}")),
    ("MFU", _mfu),
    ("comm MB/layer", _per_layer("bytes", 1e-6, "{:.3f}")),
    ("comm ms/layer", _per_layer("seconds", 1e3, "{:.1f}")),
)
MEMORY: tuple[tuple[str, Cell], ...] = (
    ("parameters", _memory("parameters")),
    ("gradients", _memory("gradients")),
    ("optimizer", _memory("optimizer")),
    ("activations", _memory("saved_for_backward")),
    ("KV cache", _memory("kv_cache")),
    ("communication buffers", _memory("communication")),
)


def rows(results: dict[str, Any], columns: tuple[tuple[str, Cell], ...]) -> list[list[str]]:
    """One row for each variant: its name, then the columns; a dash where there is no value.

    Of a variant that did not finish the second cell says how it ended.
    """
    found = []
    for variant in results["variants"]:
        if "measured" in variant:
            cells = [cell(variant) or "-" for _, cell in columns]
        else:
            cells = [variant["status"], *["-"] * (len(columns) - 1)]
        ended = "" if variant["status"] in ("ok", "not run") else f" ({variant['status']})"
        found.append([variant["name"] + (ended if "measured" in variant else ""), *cells])
    return found


def used(results: dict[str, Any], columns: tuple[tuple[str, Cell], ...]) -> tuple[tuple[str, Cell], ...]:
    """The columns in which some variant has a value."""
    measured = [variant for variant in results["variants"] if "measured" in variant]
    return tuple(c for c in columns if any(c[1](variant) not in (None, "-") for variant in measured))


def headings(columns: tuple[tuple[str, Cell], ...]) -> list[str]:
    """The headings of `rows`."""
    return ["variant", *(heading for heading, _ in columns)]


def collectives(results: dict[str, Any]) -> list[list[str]]:
    """variant, workload, collective, calls, MB, ms, algbw, busbw (GB/s) of one iteration, mean rank."""
    found = []
    for variant in (v for v in results["variants"] if "measured" in v):
        for name, workload in variant["measured"]["workloads"].items():
            for kind, cost in workload["communication"].items():
                rates = [f"{cost[k] / 1e9:.4f}" if cost[k] is not None else "-" for k in ("algbw", "busbw")]
                row = [f"{cost['calls']:.2f}", f"{cost['bytes'] / 1e6:.4f}", f"{cost['seconds'] * 1e3:.2f}"]
                found.append([variant["name"], name.replace("_", " "), kind, *row, *rates])
    return found


COLLECTIVES = ["variant", "workload", "collective x ranks", "calls", "MB", "ms", "algbw GB/s", "busbw GB/s"]


def speeds(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: each variant against each of its baselines, one column for each workload."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for entry in results["comparisons"]:
        pair = cells.setdefault((entry["variant"], entry["baseline"]), {})
        pair[entry["workload"]] = versus(entry)
    used = [name for name in WORKLOADS if any(name in pair for pair in cells.values())]
    rows = [[*names, *(pair.get(name, "-") for name in used)] for names, pair in cells.items()]
    return ["variant", "against", *(WORKLOADS[name] for name in used)], rows


def comparisons(results: dict[str, Any]) -> list[list[str]]:
    """variant, baseline, workload, ratio, its intervals, p, Cohen's d, verdict."""
    found = []
    for entry in results["comparisons"]:
        found.append(
            [
                entry["variant"],
                entry["baseline"],
                entry["workload"].replace("_", " "),
                f"{entry['ratio']:.3f}",
                _interval(entry["ci95"]),
                _interval(entry["bootstrap_ci95"]),
                "-" if entry["p_value"] is None else f"{entry['p_value']:.2g}",
                "-" if entry["cohens_d"] is None else f"{entry['cohens_d']:.2f}",
                entry["verdict"],
            ]
        )
    return found


COMPARISONS = [
    *("variant", "baseline", "workload", "speed ratio"),
    *("95 % t", "95 % bootstrap", "p", "d", "verdict"),
]


def _interval(interval: list[float] | None) -> str:
    return "-" if interval is None else " to ".join(map(bound, interval))


def spread(results: dict[str, Any]) -> list[list[str]]:
    """variant, workload, runs, mean, sd, CV and 95 % interval of the throughput over the runs."""
    found = []
    for variant in (v for v in results["variants"] if "measured" in v):
        for name, workload in variant["measured"]["workloads"].items():
            s = workload["tokens_per_s"]
            sd = ["-", "-", "-"]
            if s["sd"] is not None:
                sd = [f"{s['sd']:.3g}", f"{100 * s['cv']:.1f} %", f"{s['ci95'][0]:.4g} to {s['ci95'][1]:.4g}"]
            found.append([variant["name"], name.replace("_", " "), str(s["n"]), f"{s['mean']:.4g}", *sd])
    return found


SPREAD = ["variant", "workload", "runs", "tok/s", "sd", "CV", "95 % interval"]


def estimate(results: dict[str, Any]) -> list[list[str]]:
    """variant, then of weights with optimizer, of activations and of the KV cache, in MB: measured, the
    planner's prediction, and (not of the cache) Megatron's own estimate."""
    found = []
    for variant in (v for v in results["variants"] if "measured" in v):
        held = variant["measured"]["memory_bytes_of_fullest_rank"]
        theirs = variant["measured"]["megatron_estimate_bytes"]
        planned = variant.get("predicted", {}).get("memory_bytes", {})
        weights = [_sum(sizes, ("parameters", "gradients", "optimizer")) for sizes in (held, planned)]
        kept = [_sum(sizes, ("saved_for_backward",)) for sizes in (held, planned)]
        cache = [_sum(sizes, ("kv_cache",)) for sizes in (held, planned)]
        numbers = (*weights, theirs["weights_and_optimizer"], *kept, theirs["activations"], *cache)
        found.append([variant["name"], *("-" if n is None else f"{n / 1e6:,.2f}" for n in numbers)])
    return found


def _sum(sizes: dict[str, float], names: tuple[str, ...]) -> float | None:
    return sum(sizes.get(name, 0) for name in names) if names[0] in sizes else None


ESTIMATE = [
    *("variant", "weights, gradients, optimizer", "planner", "Megatron estimates (for bf16)"),
    *("activations", "planner", "Megatron estimates", "KV cache", "planner"),
]


def gpu(results: dict[str, Any]) -> list[list[str]]:
    """variant, busy %, memory busy %, memory bandwidth %, watts, NVLink GB received: mean rank."""
    found = []
    for variant in (v for v in results["variants"] if "gpu" in v.get("measured", {})):
        said = variant["measured"]["gpu"]
        keys = ("gpu_busy_percent", "memory_busy_percent", "memory_bandwidth_percent", "watts")
        link = said.get("nvlink_bytes")
        row = [f"{said[key]:.0f}" if key in said else "-" for key in keys]
        found.append([variant["name"], *row, f"{link['received'] / 1e9:.1f}" if link else "-"])
    return found


GPU = [
    *("variant", "GPU busy %", "memory busy %", "memory bandwidth, % of peak", "watts"),
    "NVLink GB received",
]
