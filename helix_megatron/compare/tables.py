"""The tables of a comparison: what stands in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from helix_megatron.compare import paper
from helix_megatron.compare.comparisons import MEMORY_PARTS, WORKLOADS, scaling_points
from helix_megatron.compare.findings import format_bound, format_ratio, format_tiny
from helix_megatron.compare.predictions import describe_prediction
from helix_megatron.compare.table import Column, Record, Table, look_up, tabulate

# ---- one row for each variant


def _loss_difference(variant: Record) -> str | None:
    check = variant.get("loss_check")
    far = check and check["max_abs_difference"]
    return None if check is None else "n/a" if far is None else format_tiny(far)


def _above_one(path: str) -> Callable[[Record], Any]:
    """A degree that most comparisons leave at 1."""
    return lambda variant: None if (value := look_up(variant, path)) == 1 else value


def _per_layer(unit: str) -> Callable[[Record], float | None]:
    path = "measured.communication_per_layer"
    return lambda v: sum(kind[unit] for kind in kinds.values()) if (kinds := look_up(v, path)) else None


_LAYOUT, _GRID, _WORK = "measured.layout", "measured.grid", "measured.workloads"
_HELD, _PLANNED = "measured.memory_bytes_of_fullest_rank", "predicted.memory_bytes"
_ERROR, _SPEED = "measured.error.relative", f"{_WORK}.train.tokens_per_s.mean"
_STEP = f"{_WORK}.decode.iteration_seconds.mean"
SPEED = [
    Column("TP", f"{_LAYOUT}.tensor_model_parallel_size"),
    Column("PP", f"{_LAYOUT}.pipeline_model_parallel_size"),
    Column("VP", _above_one(f"{_LAYOUT}.virtual_pipeline_model_parallel_size")),
    Column("DP", f"{_LAYOUT}.data_parallel_size"),
    Column("CP", _above_one(f"{_LAYOUT}.context_parallel_size")),
    Column("n", f"{_GRID}.n"),
    Column("m", f"{_GRID}.m"),
    Column("comm", f"{_GRID}.comm"),
    Column("queries", f"{_GRID}.placement"),
    Column("cache", f"{_GRID}.cache"),
    Column("loss@last", lambda v: (v["measured"].get("losses") or [None])[-1], "{:.5f}"),
    Column("max |Δloss|", _loss_difference),
    Column("error vs fp32", lambda v: None if (e := look_up(v, _ERROR)) is None else format_tiny(e)),
    Column("train tok/s", f"{_WORK}.train.tokens_per_s", "{:.1f}"),
    Column("prefill tok/s", f"{_WORK}.prefill.tokens_per_s", "{:.1f}"),
    Column("TTFT ms", f"{_WORK}.first_token.iteration_seconds", "{:.0f}", 1e3),
    Column("TPOT ms", f"{_WORK}.decode.iteration_seconds", "{:.0f}", 1e3),
    Column("paper's TPOT ms", f"{_WORK}.decode.paper_tpot_ms", "{:.0f}"),
]
DETAILS = [
    Column("ranks", "world_size"),
    Column("train tok/s/rank", lambda v: (s := look_up(v, _SPEED)) and s / v["world_size"], "{:.2f}"),
    Column("decode tok/s", f"{_WORK}.decode.tokens_per_s", "{:.2f}"),
    Column("decode tok/s/user", lambda v: (s := look_up(v, _STEP)) and 1 / s, "{:.2f}"),
    Column("mixed tok/s", f"{_WORK}.mixed.tokens_per_s", "{:.1f}"),
    Column("mixed TTFT ms", f"{_WORK}.mixed.first_token_seconds", "{:.0f}", 1e3),
    Column("mixed TPOT ms", f"{_WORK}.mixed.token_seconds", "{:.0f}", 1e3),
    Column("train iteration s", f"{_WORK}.train.iteration_seconds", "{:.3g}"),
    Column("train TFLOP/s/rank", f"{_WORK}.train.tflops_per_rank", "{:.3g}"),
    Column("MFU", f"{_WORK}.train.mfu", "{:.1f} %", 100),
    Column("comm MB/layer", _per_layer("bytes"), "{:.3f}", 1e-6),
    Column("comm ms/layer", _per_layer("seconds"), "{:.1f}", 1e3),
]
MEMORY = [Column(heading, f"{_HELD}.{key}", "{:.2f}", 1e-6) for key, heading in MEMORY_PARTS.items()]


def tabulate_variants(results: Record, columns: list[Column], title: str) -> Table:
    """One row for each variant: its name, then the columns in which some variant has a value.

    Of a variant that did not finish the second cell says how it ended.
    """
    measured = [variant for variant in results["variants"] if "measured" in variant]
    columns = [c for c in columns if any(c.format_cell(variant) != "-" for variant in measured)]
    rows = []
    for variant in results["variants"]:
        name, status = variant["name"], variant["status"]
        if variant in measured:
            name += "" if status in ("ok", "not run") else f" ({status})"
            rows.append([name, *(column.format_cell(variant) for column in columns)])
        else:
            rows.append([name, status, *["-"] * (len(columns) - 1)])
    return Table(title, ["variant", *(column.heading for column in columns)], rows)


# ---- the other tables


def _each_workload(results: Record) -> Iterator[tuple[Record, Record]]:
    """(variant and workload by name, what was measured of it)."""
    for variant in (v for v in results["variants"] if "measured" in v):
        for name, work in variant["measured"]["workloads"].items():
            yield {"variant": variant["name"], "workload": name.replace("_", " ")}, work


_NAMES = [Column("variant", "variant"), Column("workload", "workload")]


def tabulate_speeds(results: Record) -> Table:
    """Each variant against each of its baselines, one column for each workload."""
    pairs: dict[tuple[str, str], Record] = {}
    for entry in results["comparisons"]:
        key = (entry["variant"], entry["baseline"])
        pair = pairs.setdefault(key, {"variant": key[0], "against": key[1]})
        pair[entry["workload"]] = format_ratio(entry)
    used = [Column(said, name) for name, said in WORKLOADS.items() if any(name in p for p in pairs.values())]
    words = (
        "Above 1 the variant is faster than what it stands against. In brackets the 95 % interval over "
        "paired runs; unclear: it crosses 1, so that these runs show no difference."
    )
    columns = [Column("variant", "variant"), Column("against", "against"), *used]
    return tabulate("Speed ratios", pairs.values(), columns, words=words, style="ratios")


def tabulate_predictions(results: Record) -> Table:
    """Measured and predicted ms of each workload; why there is none for others."""
    records = []
    for variant in (v for v in results["variants"] if "predicted" in v):
        if "cause" in variant["predicted"]:
            records.append({"variant": variant["name"], "ratio": variant["predicted"]["cause"]})
        for name, seconds in variant["predicted"].get("workloads", {}).items():
            measured = variant["measured"]["workloads"][name]["iteration_seconds"]["mean"]
            record = {"variant": variant["name"], "workload": name.replace("_", " "), "measured": measured}
            records.append(record | {"predicted": seconds, "ratio": seconds / measured})
    columns = [*_NAMES, Column("measured ms", "measured", "{:,.4g}", 1e3),
               Column("predicted ms", "predicted", "{:,.4g}", 1e3),
               Column("predicted / measured", "ratio", "{:.2f}")]  # fmt: skip
    title, words = "Beside the planner's predictions", describe_prediction(results)
    return tabulate(title, records, columns, tag="measured and predicted", words=words)


def _estimates(results: Record) -> Table:
    """Weights with optimizer, activations and KV cache: measured, planned, and by Megatron's own formula."""

    def total(place: str, *names: str) -> Callable[[Record], Any]:
        def value(variant: Record) -> float | None:
            sizes = look_up(variant, place) or {}
            return sum(sizes.get(name, 0) for name in names) if names[0] in sizes else None

        return value

    weights, theirs = ("parameters", "gradients", "optimizer"), "measured.megatron_estimate_bytes"
    columns = [
        ("weights, gradients, optimizer", total(_HELD, *weights)),
        ("planner", total(_PLANNED, *weights)),
        ("Megatron estimates (for bf16)", f"{theirs}.weights_and_optimizer"),
        ("activations", total(_HELD, "saved_for_backward")),
        ("planner", total(_PLANNED, "saved_for_backward")),
        ("Megatron estimates", f"{theirs}.activations"),
        ("KV cache", total(_HELD, "kv_cache")),
        ("planner", total(_PLANNED, "kv_cache")),
    ]
    measured = [v for v in results["variants"] if "measured" in v]
    shown = [Column("variant", "name"), *(Column(*column, "{:,.2f}", 1e-6) for column in columns)]
    return tabulate("Memory beside estimates, MB", measured, shown, tag="measured and predicted")


def _gpu(results: Record) -> Table:
    """What NVML said, mean rank."""
    keys = ("gpu_busy_percent", "memory_busy_percent", "memory_bandwidth_percent", "watts")
    headings = ("GPU busy %", "memory busy %", "memory bandwidth, % of peak", "watts")
    columns = [Column(heading, f"measured.gpu.{key}", "{:.0f}") for heading, key in zip(headings, keys)]
    columns.append(Column("NVLink GB received", "measured.gpu.nvlink_bytes.received", "{:.1f}", 1e-9))
    watched = [v for v in results["variants"] if "gpu" in v.get("measured", {})]
    return tabulate("GPU, by NVML", watched, [Column("variant", "name"), *columns])


def _scaling(results: Record) -> Table:
    records = []
    for workload in ("train", "prefill", "decode"):
        for family, points in scaling_points(results, workload).items():
            for point in points:
                grid = f"{point['grid']['n']}x{point['grid']['m']}" if point["grid"] else None
                records.append({"variant": family, "workload": workload} | point | {"grid": grid})
    columns = [*_NAMES, Column("ranks", "ranks"), Column("grid", "grid"),
               Column("tokens/s", "tokens_per_s", "{:,.4g}"),
               Column("efficiency", "efficiency", "{:.0f} %", 100)]  # fmt: skip
    return tabulate("Scaling", records, columns)


def _comparisons(results: Record) -> Table:
    def interval(key: str) -> Callable[[Record], str | None]:
        return lambda entry: entry[key] and " to ".join(map(format_bound, entry[key]))

    columns = [Column("variant", "variant"), Column("baseline", "baseline"),
               Column("workload", lambda entry: entry["workload"].replace("_", " ")),
               Column("speed ratio", "ratio", "{:.3f}"), Column("95 % t", interval("ci95")),
               Column("95 % bootstrap", interval("bootstrap_ci95")), Column("p", "p_value", "{:.2g}"),
               Column("d", "cohens_d", "{:.2f}"), Column("verdict", "verdict")]  # fmt: skip
    return tabulate("Comparisons in full", results["comparisons"], columns)


def _collectives(results: Record) -> Table:
    works = _each_workload(results)
    records = [n | {"kind": kind} | cost for n, w in works for kind, cost in w["communication"].items()]
    columns = [*_NAMES, Column("collective x ranks", "kind"), Column("calls", "calls", "{:.2f}"),
               Column("MB", "bytes", "{:.4f}", 1e-6), Column("ms", "seconds", "{:.2f}", 1e3),
               Column("algbw GB/s", "algbw", "{:.4f}", 1e-9),
               Column("busbw GB/s", "busbw", "{:.4f}", 1e-9)]  # fmt: skip
    return tabulate("Collectives of one iteration, mean rank", records, columns)


def _paper(results: Record) -> list[Table]:
    if not results["config"]["paper"]:
        return []
    smaller = " and a far smaller model" if results["config"]["host"] else ""
    beside = Table(
        "The paper's table", paper.BESIDE, paper.tabulate_beside(results), "published, measured",
        "Left what the paper states for 16 H100, right what was measured here, of the model and on the "
        f"machine named above. They are different machines{smaller}: the two sides share the layout and the "
        "definition of the measures, not the scale.",
    )  # fmt: skip
    checks = Table(
        "Can the paper's numbers be true?", ["the paper says", "arithmetic", "verdict"],
        [list(check.values()) for check in paper.checks()], "arithmetic",
        "Nothing here is measured. The model is the paper's: 16 layers, hidden 4096, MLP 16384, batch 128, "
        "sequence 10000, fp16.", "words",
    )  # fmt: skip
    return [beside, checks]


def tabulate_rest(results: Record) -> list[Table]:
    """What stands below the figures, as far as it has rows."""
    memory = tabulate_variants(results, MEMORY, "Memory of the fullest rank, MB")
    found = [*_paper(results), tabulate_predictions(results), _estimates(results), memory,
             _gpu(results), _scaling(results), _comparisons(results),
             _collectives(results)]  # fmt: skip
    return [table for table in found if table.rows]
