"""report.md: what ran where, the tables, what they say, how to read them."""

from __future__ import annotations

from typing import Any

from helix_megatron.compare import paper, predicted, scaling, tables
from helix_megatron.compare.findings import findings

BYTES_MEAN = (
    "bytes a rank has to receive, without any algorithm's detours, in a group of p: all_gather (p-1)/p of "
    "the output, reduce_scatter (p-1)/p of the input, all_reduce 2(p-1)/p of the tensor, all_to_all all but "
    "its own part, broadcast and recv the tensor"
)
HOST_WARNING = (
    "These ranks share a few CPU cores and exchange through their memory. Their times measure collectives of "
    "oversubscribed processes; they predict nothing about GPUs. Bytes, losses and memory do not depend on it."
)


def where(results: dict[str, Any]) -> list[str]:
    """What ran on what, in sentences."""
    config, hardware = results["config"], results["hardware"]
    gpus = ", ".join(sorted(set(hardware["gpus"]))) or "no GPU"
    memory = hardware["memory_bytes"] / 2**30
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return [
        f"Measured on {results['where']}: {config['world_size']} ranks on {hardware['cores']} cores of "
        f"{hardware['cpu']}, {memory:.0f} GiB, {gpus}.",
        f"{versions}; revision {results['revision']}. Written {results['written']}.",
    ]


def method(results: dict[str, Any]) -> list[str]:
    """How the numbers came about, in sentences."""
    config = results["config"]
    counts = ", ".join(
        f"{w['name']} {w['warmup_iterations']} + {w['iterations']}" for w in config["workloads"]
    )
    return [
        f"{config['runs']} independent runs of every variant in fresh processes, interleaved A B A B. "
        f"Iterations in each (warm-up + measured): {counts}. Batch {config['batch_size']}, prompts of "
        f"{config['prompt_length']} tokens, which fill the KV cache that decode starts from.",
        "A value is the mean over runs of each run's mean iteration, ± half its 95 % t-interval; the slowest "
        "rank decides how long an iteration took. All samples are in results.json.",
        "Comparisons pair run k with run k: speed ratio (above 1: the variant is faster), t-interval and "
        "paired t-test of its logarithm, bootstrap interval from 5 runs on, Cohen's d of the throughputs. "
        "Each comparison stands alone: of twenty equal pairs one looks different by chance.",
        "max |Δloss|: over all steps and runs, to the first finished variant of the same model. Error vs "
        "fp32: logits of the initial weights against the same weights on one rank in fp32, ‖a-b‖/‖b‖.",
        "TTFT: from a batch of prompts to the first token of each. TPOT: the time between two tokens of "
        "decode, as the field defines it. The paper's TPOT: average synchronisation and communication time "
        "per token. With pipeline stages, decode has one batch in flight: their throughput is that of one.",
        "Activations: what autograd keeps of one micro-batch (a pipeline stage keeps that for every one in "
        "flight). Communication buffers: the tensors of the largest collective.",
        f"Communication: {BYTES_MEAN}. Per layer: a whole training step (model, data and optimizer) divided "
        "by the layers. algbw and busbw as nccl-tests defines them, over the time that a rank spends in the "
        "collective, waiting for the others included.",
        *([predicted.said(results)] if "cause" in results.get("prediction", {}) else []),
    ]


def report(results: dict[str, Any]) -> str:
    """The whole file."""
    lines = [f"# {results['title']}", "", *where(results), f"Command: `{results['command']}`", ""]
    if results["config"]["host"]:
        lines += [f"> {HOST_WARNING}", ""]
    lines += ["## Results (measured)", ""]
    for columns in (tables.SPEED, tables.DETAILS):
        kept = tables.used(results, columns)
        lines += [*_table(tables.headings(kept), tables.rows(results, kept)), ""]
    lines += ["## What they say", "", *(f"- {line}" for line in findings(results)), ""]
    lines += ["## Speed ratios (measured)", "", *_table(*tables.speeds(results)), ""]
    lines += [
        "## Comparisons in full (measured)",
        "",
        *_table(tables.COMPARISONS, tables.comparisons(results)),
        "",
    ]
    lines += ["## Spread over the runs (measured)", "", *_table(tables.SPREAD, tables.spread(results)), ""]
    if scaling.rows(results):
        lines += ["## Scaling (measured)", "", *_table(scaling.ROWS, scaling.rows(results)), ""]
    if results["config"]["paper"]:
        lines += ["## The paper's table (published) beside what was measured here", ""]
        lines += [*_table(paper.BESIDE, paper.beside(results)), ""]
        lines += ["## The paper's numbers, checked by arithmetic (nothing measured)", ""]
        checks = [list(check.values()) for check in paper.checks()]
        lines += [*_table(["the paper says", "arithmetic", "verdict"], checks), ""]
    kept = tables.used(results, tables.MEMORY)
    lines += ["## Memory of the fullest rank, MB (measured)", ""]
    lines += [*_table(tables.headings(kept), tables.rows(results, kept)), ""]
    if predicted.rows(results):
        lines += ["## Beside the planner's predictions (measured and predicted)", ""]
        lines += [predicted.said(results), "", *_table(predicted.ROWS, predicted.rows(results)), ""]
    lines += ["## Memory beside the planner's and Megatron's estimates, MB (measured and predicted)", ""]
    lines += [*_table(tables.ESTIMATE, tables.estimate(results)), ""]
    if tables.gpu(results):
        lines += ["## GPU, by NVML (measured)", "", *_table(tables.GPU, tables.gpu(results)), ""]
    lines += ["## Collectives of one iteration, mean rank (measured)", ""]
    lines += [*_table(tables.COLLECTIVES, tables.collectives(results)), ""]
    lines += ["## How to read it", "", *(f"- {line}" for line in method(results))]
    return "\n".join(lines) + "\n"


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in [headings, *rows]]
    lines = [f"| {' | '.join(line)} |" for line in escaped]
    return [lines[0], "|" + " --- |" * len(headings), *lines[1:]]
