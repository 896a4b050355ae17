"""The five points that a comparison begins with. Pure: results in, text out.

    1 same model, exactly      measured   losses, logits, tokens
    2 what it makes possible   measured   Megatron's refusals and copies beside Helix's grids; some not run
    3 what it costs and saves  counted    bytes of a rank
    4 what to expect on GPUs   predicted, and what one H200 has measured
    5 times on this machine    measured   with intervals; none where the interval is wide

Every table fits 80 columns, so that no cell is wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from helix_megatron.compare import expectations
from helix_megatron.compare.comparisons import finished_variants
from helix_megatron.compare.findings import compare_losses, compare_tokens, format_bound, format_tiny
from helix_megatron.compare.table import Column, Record, Table, look_up, tabulate
from helix_megatron.models import presets
from helix_megatron.models.support import find_support

TIMED = {"train": "training step", "first_token": "first token", "decode": "decode step"}
UNMEASURED = "not measured well enough here"
NOT_RUN = (("qwen2-7b", 8), ("llama-3.1-70b", 16))
"""Models of which the table of what is possible says only what arithmetic does."""


@dataclass(frozen=True)
class Point:
    """One of the five: a heading with what its numbers are, sentences, at most one table between them."""

    title: str
    tag: str
    before: list[str] = field(default_factory=list)
    table: Table | None = None
    after: list[str] = field(default_factory=list)


def find_points(results: Record) -> list[Point]:
    """The five, in order."""
    return [
        Point("1. Same model, exactly", "measured", say_equality(results)),
        tabulate_possible(results),
        tabulate_costs(results),
        tabulate_expectations(),
        tabulate_times(results),
    ]


def pair_layouts(results: Record) -> Iterator[tuple[Record | None, Record]]:
    """(Megatron's variant, Helix's) of the same model on as many ranks; None where there is no Megatron's."""
    for variant in (v for v in results["variants"] if v["attention_impl"] == "helix"):
        alike = [v for v in results["variants"] if all(v[k] == variant[k] for k in ("model", "world_size"))]
        yield next((v for v in alike if v["attention_impl"] == "megatron"), None), variant


def name_heads(results: Record, variant: Record) -> str:
    """'SmolLM2-135M 9/3': query and KV heads, and whose they are."""
    config = next(v for v in results["config"]["variants"] if v["name"] == variant["name"])
    flags = results["config"]["model_args"] | config["args"]
    heads = flags.get("--num-attention-heads", "?")
    groups = flags.get("--num-query-groups", 1) if flags.get("--group-query-attention") else heads
    return f"{config['shape'] or ''} {heads}/{groups}".strip()


def name_layout(variant: Record) -> str:
    """'Megatron TP=8', 'Helix 2x4'."""
    layout, grid = look_up(variant, "measured.layout"), look_up(variant, "measured.grid")
    if grid:
        return f"Helix {grid['n']}x{grid['m']}"
    sizes = {"TP": "tensor_model", "PP": "pipeline_model", "DP": "data", "CP": "context"}
    degrees = {name: layout.get(f"{key}_parallel_size", 1) for name, key in sizes.items()}
    return " ".join(["Megatron", *(f"{name}={size}" for name, size in degrees.items() if size > 1)])


# ---- 1


def say_equality(results: Record) -> list[str]:
    """Losses, logits, tokens: a line each, and one more for each that does not agree."""
    done = finished_variants(results)
    said = compare_losses(results)
    errors = {v["name"]: e for v in done if (e := look_up(v, "measured.error.relative")) is not None}
    if errors:
        own = [e for v in done if v["attention_impl"] == "megatron" and (e := errors.get(v["name"]))]
        beside = f" (Megatron's own: {format_tiny(max(own))})" if own else ""
        worst = format_tiny(max(errors.values()))
        said.append(f"Logits: within {worst} of one rank in fp32, relative{beside}.")
    return said + compare_tokens(done)


# ---- 2


def quote_refusal(variant: Record) -> str:
    """What the layout was refused with, without the rank that said it first."""
    return re.sub(r"^rank \d+: ", "", variant.get("cause", "")).strip()


def tabulate_possible(results: Record) -> Point:
    """Every Helix variant that Megatron refuses or copies for, then models that were not run."""
    records, refusals = [], []
    for theirs, own in pair_layouts(results):
        if "measured" not in own:
            continue
        heads, tp = name_heads(results, own), look_up(own, "measured.layout.tensor_model_parallel_size")
        copies = tp // int(heads.rpartition("/")[2]) if heads[-1].isdigit() else 1
        said = "-"
        if theirs is not None and "measured" not in theirs:
            refusals.append(quote_refusal(theirs))
            said = f"refuses ({len(refusals)})"
        elif theirs is not None:
            said = f"{copies} copies of K, V" if copies > 1 else "runs"
        losses = own["measured"].get("losses") or []
        trained = f"{losses[0]:.2f} -> {losses[-1]:.2f}" if losses else "-"
        tokens = own["measured"].get("decoded_tokens") or []
        grid = name_layout(own).removeprefix("Helix ")
        record = {"heads": heads, "tp": tp, "megatron": said, "helix": grid, "loss": trained}
        record |= { "tokens": f"{len(tokens)} x {len(tokens[0])}" if tokens else "-"}
        records.append(record)
    for name, tp in NOT_RUN:
        support = find_support(presets.find(name), tp)
        said = "refuses" if support.refusal else f"{support.kv_copies} copies of K, V"
        heads = f"{name} {support.shape.num_attention_heads}/{support.shape.num_query_groups}"
        record = {"heads": heads, "tp": tp, "megatron": said, "helix": str(support.grid)}
        records.append(record | {"loss": "not run"})
    columns = [Column("query/KV heads of", "heads"), Column("TP", "tp"), Column("Megatron", "megatron"),
               Column("Helix", "helix"), Column("training loss", "loss"),
               Column("tokens decoded", "tokens")]  # fmt: skip
    shown = tabulate("What it makes possible", records, columns)
    after = [f'({number}) "{words}"' for number, words in enumerate(refusals, 1)]
    words = ["Small GPTs with the heads of these models, run here; in quotes what Megatron said."]
    return Point("2. What it makes possible", "measured; not run: arithmetic", words, shown, after)


# ---- 3


def tabulate_costs(results: Record) -> Point:
    """Bytes of a rank, Megatron's layout above Helix's, then their ratio."""
    records = []
    for theirs, own in pair_layouts(results):
        if theirs is None or "measured" not in theirs or "measured" not in own:
            continue
        sizes = [count_bytes(variant) for variant in (theirs, own)]
        heads = name_heads(results, own).rpartition(" ")[2]
        records += [{"row": f"{heads}: {name_layout(v)}"} | s for v, s in zip((theirs, own), sizes)]
        ratio = {k: f"{sizes[1][k] / sizes[0][k]:.2f}" for k in sizes[0] if sizes[0][k] and k in sizes[1]}
        records.append({"row": "Helix / Megatron"} | ratio)
    columns = [Column("kB of one rank", "row"), *_BYTES]
    shown = tabulate("What it costs and saves", records, columns, tag="counted")
    words = ["Received: in a training step, by layer. State: weights, gradients, optimizer."]
    return Point("3. What it costs and saves", "counted, not timed", words, shown)


_BYTES = [
    Column(heading, key, "{:,.1f}", 1e-3)
    for key, heading in {
        "received": "received", "parameters": "weights", "optimizer": "state",
        "saved_for_backward": "activations", "kv_cache": "KV cache",
    }.items()
]  # fmt: skip


def count_bytes(variant: Record) -> dict[str, float]:
    """Received in a training step for each layer, and held; `optimizer` with weights and gradients."""
    held = dict(variant["measured"]["memory_bytes_of_fullest_rank"])
    kinds = variant["measured"].get("communication_per_layer", {})
    found = {"received": sum(kind["bytes"] for kind in kinds.values())} if kinds else {}
    if "optimizer" in held:
        held["optimizer"] += held["parameters"] + held.get("gradients", 0)
    names = ("parameters", "optimizer", "saved_for_backward", "kv_cache")
    return found | {name: held[name] for name in names if name in held}


# ---- 4


def tabulate_expectations() -> Point:
    """The planner's times of 16 H100, and sentences of what has been measured on an H200."""
    columns = [
        Column("predicted ms", "work"),
        Column("Megatron", lambda r: r["megatron"] or "refuses", "{:,.4g}"),
        Column("Helix", "helix", "{:,.4g}"),
        Column("ratio", "ratio", "{:.2f}"),
        Column("fastest of all", lambda r: f"{r['fastest']:,.4g}: {r['layout']}"),
    ]
    shown = tabulate("What to expect on GPUs", expectations.predict_layouts(), columns, tag="predicted")
    words = [
        f"By `helix plan`, both at TP={expectations.TP}, beside the fastest layout of all (Megatron's unless "
        "it says Helix).",
        "It supposes kernels as good as Megatron's; no time of several GPUs has confirmed it.",
    ]
    title = f"4. What to expect on {expectations.NODES} DGX H100"
    return Point(title, "predicted; H200: measured", words, shown, expectations.read_measured())


# ---- 5


def tabulate_times(results: Record) -> Point:
    """Milliseconds and ratios of times, as far as their intervals are narrow."""
    cores, ranks = results["hardware"]["cores"], results["config"]["world_size"]
    found = {(e["variant"], e["baseline"], e["workload"]): e for e in results["comparisons"]}
    records = []
    for theirs, own in pair_layouts(results):
        heads = name_heads(results, own).rpartition(" ")[2]
        for name, words in TIMED.items() if theirs else ():
            entry = found.get((own["name"], theirs["name"], name))
            if entry is None:
                continue
            work = f"measured.workloads.{name}.iteration_seconds.mean"
            record = {"row": f"{heads}: {words}", "n": entry["n"]}
            if is_measured(entry, results["config"]["interval"]):
                low, high = (1 / bound for bound in reversed(entry["ci95"]))
                ratio = f"{1 / entry['ratio']:.2f} [{format_bound(low)}, {format_bound(high)}]"
                record |= {"megatron": look_up(theirs, work), "helix": look_up(own, work), "ratio": ratio}
            records.append({"ratio": UNMEASURED} | record)
    columns = [Column("ms", "row"), Column("Megatron", "megatron", "{:,.0f}", 1e3),
               Column("Helix", "helix", "{:,.0f}", 1e3), Column("ratio [95 %]", "ratio"),
               Column("turns", "n")]  # fmt: skip
    shown = tabulate("Times on this machine", records, columns)
    said = []
    if results["config"]["host"] and ranks > cores:
        said = [f"{ranks} ranks share {cores} cores: this says nothing about GPUs. Ratio: Helix / Megatron."]
    return Point("5. Times on this machine", "measured", said, shown)


def is_measured(entry: Record, interval: float) -> bool:
    """Whether a ratio's 95 % interval lies within 1 ± `interval` of it."""
    if entry["ci95"] is None:
        return False
    low, high = entry["ci95"]
    return max(high / entry["ratio"], entry["ratio"] / low) <= 1 + interval
