"""From raw samples to rows, the check of the losses, the terminal's table and report.md.

Nothing here measures and nothing here predicts: every number is a statistic of the ranks' samples.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from rich.table import Table

from helix_megatron.compare.findings import findings

BYTES_MEAN = (
    "bytes a rank has to receive, without any algorithm's detours, in a group of p: all_gather (p-1)/p of "
    "the output, reduce_scatter (p-1)/p of the input, all_reduce 2(p-1)/p of the tensor, all_to_all all but "
    "its own part, broadcast and recv the tensor"
)
_HOST_WARNING = (
    "These ranks share a few CPU cores and talk through gloo. Their times measure collectives of "
    "oversubscribed processes; they predict nothing about GPUs. Bytes, losses and memory do not depend on it."
)
_COLUMNS = (  # key of the row, heading, format
    ("name", "variant", "{}"),
    ("tp", "TP", "{}"),
    ("pp", "PP", "{}"),
    ("n", "n", "{}"),
    ("m", "m", "{}"),
    ("comm", "comm", "{}"),
    ("placement", "queries", "{}"),
    ("loss_last", "loss@last", "{:.5f}"),
    ("loss_difference", "max |Δloss|", "{:.1e}"),
    ("train_tokens_per_s", "train tok/s", "{:.1f}"),
    ("forward_tokens_per_s", "forward tok/s", "{:.1f}"),
    ("tpot_ms", "TPOT ms", "{:.1f}"),
    ("comm_mb_per_layer", "comm MB/layer", "{:.3f}"),
    ("comm_ms_per_layer", "comm ms/layer", "{:.1f}"),
    ("parameters_mb", "param MB", "{:.2f}"),
    ("saved_for_backward_mb", "act MB", "{:.2f}"),
)


def complete(results: dict[str, Any]) -> None:
    """Add to every variant its `measured` numbers and its `row`, and compare the losses of equal models."""
    config = results["config"]
    references: dict[str, dict[str, Any]] = {}
    for variant in results["variants"]:
        if variant["status"] != "ok":
            variant["row"] = {key: variant[key] for key in ("name", "status", "cause")}
            continue
        variant["measured"] = measured = summarise(variant["ranks"], config["warmup_steps"])
        reference = references.setdefault(variant["model"], variant)
        difference = loss_difference(measured["losses"], reference["measured"]["losses"])
        variant["loss_check"] = {
            "reference": reference["name"],
            "max_abs_difference": difference,
            "agrees": difference <= config["loss_tolerance"],
        }
        variant["row"] = row(variant)


def summarise(ranks: list[dict[str, Any]], warmup_steps: int) -> dict[str, Any]:
    """Medians over iterations: of the slowest rank for times, of the mean rank for communication.

    Communication is that of one training step, divided by the layers that the rank holds. Memory is that of
    the fullest rank.
    """
    tokens = ranks[0]["tokens_per_step"]
    step = _slowest([rank["train_step_seconds"][warmup_steps:] for rank in ranks])
    forward = _slowest([rank["forward_seconds"] for rank in ranks])
    memory = {key: max(rank["memory_bytes"][key] for rank in ranks) for key in ranks[0]["memory_bytes"]}
    measured = {
        "losses": max((rank["losses"] for rank in ranks), key=len),
        "train_step_seconds": step,
        "train_tokens_per_s": tokens / median(step),
        "forward_seconds": forward,
        "forward_tokens_per_s": tokens / median(forward),
        "memory_bytes_of_fullest_rank": memory,
        "communication_per_layer": communication(ranks, warmup_steps),
    }
    decoded = [rank["decode"] for rank in ranks if "decode" in rank]
    causes = [item["cause"] for item in decoded if "cause" in item]
    if causes:
        measured["decode_cause"] = causes[0]
    elif decoded:
        per_token = _slowest([item["token_seconds"] for item in decoded])
        measured["decode_token_seconds"] = per_token
        measured["decode_prompt_seconds"] = max(item["prompt_seconds"] for item in decoded)
        measured["tpot_ms"] = 1e3 * median(per_token)
        measured["decoded_tokens"] = decoded[-1]["tokens"]
    return measured


def _slowest(samples: list[list[float]]) -> list[float]:
    return [max(column) for column in zip(*samples)]


def communication(ranks: list[dict[str, Any]], warmup_steps: int) -> dict[str, dict[str, float]]:
    """{"all_reduce x16": calls, bytes, seconds}: all ranks' sums over all ranks' layers, median of the steps.

    Steps without a count (GPU runs count one warm-up step only) are left out.
    """
    layers = sum(rank["layers"] for rank in ranks)
    steps = range(len(ranks[0]["train_step_comm"]))
    counted = [s for s in steps if ranks[0]["train_step_comm"][s]]
    chosen = [s for s in counted if s >= warmup_steps] or counted
    kinds = sorted({kind for rank in ranks for s in chosen for kind in rank["train_step_comm"][s]})
    table: dict[str, dict[str, float]] = {}
    for kind in kinds:
        table[kind] = {
            unit: median(
                sum(rank["train_step_comm"][s].get(kind, {}).get(unit, 0) for rank in ranks) / layers
                for s in chosen
            )
            for unit in ("calls", "bytes", "seconds")
        }
    return table


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """Largest absolute difference; infinite when a loss is missing or not a number."""
    if not losses or len(losses) != len(reference):
        return math.inf
    differences = [abs(a - b) for a, b in zip(losses, reference)]
    return math.inf if any(math.isnan(d) for d in differences) else max(differences)


def row(variant: dict[str, Any]) -> dict[str, Any]:
    """One line of the table; a value that there is not is absent."""
    args, measured = variant["ranks"][0]["args"], variant["measured"]
    per_layer = measured["communication_per_layer"].values()
    memory = measured["memory_bytes_of_fullest_rank"]
    found = {
        "name": variant["name"],
        "tp": args["tensor_model_parallel_size"],
        "pp": args["pipeline_model_parallel_size"],
        "loss_last": measured["losses"][-1] if measured["losses"] else math.nan,
        "loss_difference": variant["loss_check"]["max_abs_difference"],
        "train_tokens_per_s": measured["train_tokens_per_s"],
        "forward_tokens_per_s": measured["forward_tokens_per_s"],
        "comm_mb_per_layer": sum(kind["bytes"] for kind in per_layer) / 1e6,
        "comm_ms_per_layer": sum(kind["seconds"] for kind in per_layer) * 1e3,
        "parameters_mb": memory["parameters"] / 1e6,
        "saved_for_backward_mb": memory["saved_for_backward"] / 1e6,
    }
    if "tpot_ms" in measured:
        found["tpot_ms"] = measured["tpot_ms"]
    found |= variant["ranks"][0]["helix"] or {}
    return found


def cells(line: dict[str, Any]) -> list[str]:
    """The row as text, in the order of the columns; a dash where there is no value.

    Of a variant that did not finish only the name and, in place of its loss, how it ended.
    """
    if "status" in line:
        shown = {"name": line["name"], "loss_last": line["status"]}
        return [str(shown.get(key, "-")) for key, _, _ in _COLUMNS]
    return [form.format(line[key]) if line.get(key) is not None else "-" for key, _, form in _COLUMNS]


def table(results: dict[str, Any]) -> Table:
    """The terminal's table (measured numbers only); a variant that did not finish shows its cause."""
    shown = Table(title=f"{results['title']} (measured, {results['where']})", show_lines=False)
    for _, heading, _ in _COLUMNS:
        left = heading == "variant"
        shown.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for variant in results["variants"]:
        shown.add_row(*cells(variant["row"]), style=None if variant["status"] == "ok" else "red")
    return shown


def one_line(variant: dict[str, Any], label: str) -> str:
    """What is said as soon as a variant is done."""
    if variant["status"] != "ok":
        return f"{label}: {variant['status'].upper()} after {variant['seconds']:.0f} s: {variant['cause']}"
    line = variant["row"]
    return (
        f"{label}: {variant['seconds']:.0f} s, loss {line['loss_last']:.5f}, "
        f"{line['train_tokens_per_s']:.1f} training tokens/s (measured)"
    )


def exit_code(results: dict[str, Any]) -> int:
    """0; 1 when losses disagree; 3 when a variant did not finish although it may not fail."""
    if any(not v["loss_check"]["agrees"] for v in results["variants"] if v["status"] == "ok"):
        return 1
    return 3 if any(v["status"] != "ok" and not v["may_fail"] for v in results["variants"]) else 0


def markdown(results: dict[str, Any]) -> str:
    """report.md: what ran where, the table, the findings, the collectives by kind."""
    config, hardware = results["config"], results["hardware"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    memory = hardware["memory_bytes"] / 2**30
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# {results['title']}",
        "",
        f"Every number here is **measured**, on {results['where']}: {config['world_size']} ranks on "
        f"{hardware['cores']} cores of {hardware['cpu']}, {memory:.0f} GiB, {gpus}.",
        f"Started {results['started']}; {versions}; revision {results['git_revision']}.",
        f"Command: `{results['command']}`",
        "",
    ]
    if config["host"]:
        lines += [f"> {_HOST_WARNING}", ""]
    lines += _markdown_table(
        [heading for _, heading, _ in _COLUMNS], [cells(v["row"]) for v in results["variants"]]
    )
    lines += ["", *(f"- {line}" for line in findings(results)), "", "## How to read it", ""]
    lines += [
        f"- Times: medians over {config['steps']} training steps after {config['warmup_steps']} to warm up, "
        f"{config['forward_iterations']} forward passes, {config['decode_tokens']} tokens of greedy decode "
        f"(batch {config['decode_batch_size']}, prompt {config['prompt_length']}), of the slowest rank. "
        "All samples are in results.json.",
        "- max |Δloss|: over all steps, to the first finished variant of the same model.",
        "- param MB: parameters of the fullest rank. act MB: what autograd keeps of one micro-batch on it "
        "(a pipeline stage keeps that for every micro-batch in flight).",
        "- comm: a whole training step (collectives of model, data and optimizer) divided by the layers; "
        f"{BYTES_MEAN}.",
        "",
        "## Communication per layer and training step, by collective",
        "",
    ]
    by_kind = []
    for variant in results["variants"]:
        if variant["status"] != "ok":
            continue
        for kind, cost in variant["measured"]["communication_per_layer"].items():
            by_kind.append(
                [
                    variant["name"],
                    kind,
                    f"{cost['calls']:.2f}",
                    f"{cost['bytes'] / 1e6:.4f}",
                    f"{cost['seconds'] * 1e3:.2f}",
                ]
            )
    lines += _markdown_table(["variant", "collective x group size", "calls", "MB", "ms"], by_kind)
    return "\n".join(lines) + "\n"


def _markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [headings, *rows]]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return [lines[0], "|" + " --- |" * len(headings), *lines[1:]]
