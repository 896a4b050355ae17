"""What is written and shown of a comparison: results.json, report.md, report.html, figures, the terminal.

report.html is one file with everything in it, for a screen, a phone and paper; report.md has the same tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from rich import padding, text
from rich.console import Console

from helix_megatron.compare import comparisons, drawing, figures, overview, paper, predictions, tables
from helix_megatron.compare.comparisons import finished_variants
from helix_megatron.compare.findings import describe_findings, format_tiny
from helix_megatron.compare.records import write_atomically
from helix_megatron.compare.table import Table, look_up

HOST_WARNING = (
    "These ranks share a few CPU cores and exchange through their memory. Their times measure collectives of "
    "oversubscribed processes; they predict nothing about GPUs. Bytes, losses and memory do not depend on it."
)
_CLASSES = {  # how a table cell ends → its class in the page
    paper.INCONSISTENT: "bad", paper.CONSISTENT: "good", "faster": "good", "SLOWER": "bad", "slower": "bad",
    "unclear": "even", "within the noise": "even",
}  # fmt: skip


def write_results(results: dict[str, Any], out: Path) -> None:
    """Complete `results` with the comparisons and write results.json: after every run."""
    results["comparisons"] = comparisons.compare(results)
    write_atomically(out / "results.json", json.dumps(results, indent=1))


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and the reports, each complete or as it was."""
    write_results(results, out)
    write_atomically(out / "report.md", render_markdown(results))
    page, pictures = render_page(results)
    write_atomically(out / "report.html", page)
    (out / "figures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (out / "figures" / name).write_bytes(picture)


def show(results: dict[str, Any], out: Path, console: Console) -> None:
    """The five points, or the tables and the findings, in the terminal."""
    if results["config"]["overview"]:
        return show_overview(results, out, console)
    failed = {variant["name"] for variant in results["variants"] if variant["status"] != "ok"}
    title = f"{results['title']} (measured, {results['where']})"
    for columns, caption in ((tables.SPEED, title), (tables.DETAILS, "per rank and per layer")):
        console.print(tables.tabulate_variants(results, columns, caption).to_rich(failed))
    speeds = tables.tabulate_speeds(results)
    if speeds.rows:
        caption = "speed ratio (measured): above 1 the variant is faster; 95 % interval"
        console.print(speeds.to_rich(caption=caption))
    for line in describe_findings(results):
        console.print(f"- {line}", highlight=False, markup=False)
    names = sorted(path.name for path in out.glob("re*.*") if path.is_file())
    console.print(f"Everything is in {out}: {', '.join(names)}, figures/*.png", highlight=False)


def show_overview(results: dict[str, Any], out: Path, console: Console) -> None:
    """The five points, one screen."""
    console.print(f"{results['title']}: {describe_machine(results)}", highlight=False, markup=False)
    for point in overview.find_points(results):
        console.print()
        console.print(f"{point.title} ({point.tag})", style="bold", highlight=False, markup=False)
        for part in (*point.before, point.table, *point.after):
            if part:
                shown = part.to_plain() if isinstance(part, Table) else text.Text(part)
                console.print(padding.Padding(shown, (0, 0, 0, 1), expand=False), highlight=False)
    console.print(f"\nAll tables and figures: {out / 'report.html'}, {out / 'report.md'}", highlight=False)


def exit_code(results: dict[str, Any]) -> int:
    """0; 1 when losses disagree; 3 when a variant did not finish although it may not fail."""
    if any(not v["loss_check"]["agrees"] for v in results["variants"] if "loss_check" in v):
        return 1
    return 3 if any(v["status"] != "ok" and not v["may_fail"] for v in results["variants"]) else 0


def render_markdown(results: dict[str, Any]) -> str:
    """report.md: what ran where, the tables, what they say, how to read them."""
    lines = [f"# {results['title']}", "", *describe_run(results), f"Command: `{results['command']}`", ""]
    if results["config"]["host"]:
        lines += [f"> {HOST_WARNING}", ""]
    for point in overview.find_points(results) if results["config"]["overview"] else []:
        rows = [*point.table.to_markdown(), ""] if point.table else []
        lines += [f"## {point.title} ({point.tag})", "", *(f"- {line}" for line in point.before), ""]
        lines += [*rows, *(f"- {line}" for line in point.after), *([""] if point.after else [])]
    lines += ["## Results (measured)", ""]
    for columns in (tables.SPEED, tables.DETAILS):
        lines += [*tables.tabulate_variants(results, columns, "").to_markdown(), ""]
    lines += ["## What they say", "", *(f"- {line}" for line in describe_findings(results)), ""]
    for table in (tables.tabulate_speeds(results), *tables.tabulate_rest(results)):
        words = [table.words, ""] if table.words else []
        lines += [f"## {table.title} ({table.tag})", "", *words, *table.to_markdown(), ""]
    lines += ["## How to read it", "", *(f"- {line}" for line in describe_method(results))]
    return "\n".join(lines) + "\n"


def render_page(results: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """report.html, and file name → PNG of every figure that has data."""
    drawn, pictures = [], {}
    for plot in figures.PLOTS:
        wide, narrow = (plot.draw(results, narrow) for narrow in (False, True))
        if wide is not None and narrow is not None:
            svgs = (drawing.svg(wide, f"{plot.key}-wide"), drawing.svg(narrow, f"{plot.key}-narrow"))
            drawn.append((plot, *svgs))
            pictures[f"{plot.key}.png"] = drawing.png(wide, f"{plot.tag}; {results['where']}")
    tried = [v for v in results["variants"] if v["status"] != "not run"]
    loader = jinja2.PackageLoader("helix_megatron.compare", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.tests["bad"] = lambda line: line.startswith(("LOSSES DISAGREE", "MIXED RUNS"))
    environment.filters["kind"] = lambda cell: next((_CLASSES[e] for e in _CLASSES if cell.endswith(e)), "")
    page = environment.get_template("report.html.j2").render(
        results=results,
        where=describe_run(results),
        host_warning=HOST_WARNING,
        cards=headline_numbers(results),
        findings=describe_findings(results),
        causes={v["name"]: f"{v['status']}: {v.get('cause', '')}" for v in tried if "measured" not in v},
        failed={v["name"] for v in tried if v["status"] != "ok"},
        tables=[tables.tabulate_variants(results, columns, "") for columns in (tables.SPEED, tables.DETAILS)],
        figures=drawn,
        speeds=tables.tabulate_speeds(results),
        more=tables.tabulate_rest(results),
        method=describe_method(results),
        points=overview.find_points(results) if results["config"]["overview"] else [],
    )
    return page, pictures


def headline_numbers(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The four or five numbers to read first: value, words."""
    done = finished_variants(results)
    found = [(f"{len(done)} of {len(results['variants'])}", "variants finished all their runs")]
    checked = [v["loss_check"] for v in results["variants"] if "loss_check" in v]
    if checked:
        worst = max((check["max_abs_difference"] or 0.0) for check in checked)
        agree = all(check["agrees"] for check in checked)
        found.append((format_tiny(worst) if agree else "LOSSES DISAGREE", "largest difference of losses"))
    errors = [e for v in done if (e := look_up(v, "measured.error.relative")) is not None]
    if errors:
        found.append((format_tiny(max(errors)), "largest relative error against fp32 on one rank"))
    for workload, words in (("train", "training"), ("decode", "decode")):
        speeds = {v["name"]: v["measured"]["workloads"].get(workload) for v in done}
        means = {name: w["tokens_per_s"]["mean"] for name, w in speeds.items() if w}
        if len(means) > 1:
            best = max(means, key=means.__getitem__)
            found.append((f"{drawing.format_number(means[best])} tok/s", f"fastest {words}: {best}"))
    return found


def describe_machine(results: dict[str, Any]) -> str:
    """On how many ranks, cores and versions, in a line."""
    versions, cores = results["versions"], results["hardware"]["cores"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("megatron-core", "torch") if name in versions)
    return f"{results['config']['world_size']} ranks on {cores} cores, {known}"


def describe_run(results: dict[str, Any]) -> list[str]:
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


def describe_runs(config: dict[str, Any]) -> str:
    """What one value of a measure comes from."""
    if config["processes"] == "fresh":
        return f"{config['runs']} independent runs of every variant in fresh processes, interleaved A B A B."
    return (
        f"At most {config['runs']} turns of all variants that have another beside them, interleaved A B A B, "
        "in processes that were started once; they end when every interval is within "
        f"{config['interval']:.0%} of its ratio, or after {config['repeat_seconds']:g} s. Below, a run is a "
        "turn. What two starts of the same program differ by is in no interval."
    )


def describe_method(results: dict[str, Any]) -> list[str]:
    """How the numbers came about, in sentences."""
    config = results["config"]
    counts = ", ".join(
        f"{w['name']} {w['warmup_iterations']} + {w['iterations']}" for w in config["workloads"]
    )
    return [
        f"{describe_runs(config)} Iterations in each (warm-up + measured): {counts}. Batch "
        f"{config['batch_size']}, prompts of {config['prompt_length']} tokens, "
        "which fill the KV cache that decode starts from.",
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
        "Communication: bytes a rank has to receive, without any algorithm's detours, in a group of p: "
        "all_gather (p-1)/p of the output, reduce_scatter (p-1)/p of the input, all_reduce 2(p-1)/p of the "
        "tensor, all_to_all all but its own part, broadcast and recv the tensor. Per layer: a whole training "
        "step (model, data and optimizer) divided by the layers. algbw and busbw as nccl-tests defines them, "
        "over the time that a rank spends in the collective, waiting for the others included.",
        *([predictions.describe_prediction(results)] if "cause" in results.get("prediction", {}) else []),
    ]
