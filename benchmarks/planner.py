"""Is the planner right on this host? Predicted and measured step times of every layout of many problems.

    python benchmarks/planner.py --fresh --out benchmarks/results/planner_host.json
    python benchmarks/planner.py             goes on where it was stopped
    python benchmarks/planner.py --paper     only the paper's configurations, predicted, for docs/paper.md

A problem is a model, a workload and a number of ranks; its layouts are Megatron's tp x pp x dp and Helix
grids. All layouts of a problem run in the same processes, in turns. A hit: the measured best is the planner's
first or second choice. Prints the paper's configurations as predicted, a table (predicted and measured
apart), and one JSON document last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench
import torch
import yaml

from helix_megatron.compare import paper as paper_numbers
from helix_megatron.models.presets import find
from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixGrid, legal_grids
from helix_megatron.plan import clusters, memory, probe, report
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal_reason
from helix_megatron.plan.search import MICRO_BATCHES
from helix_megatron.plan.timing import predict

PAPER_CLUSTER = replace(clusters.find("dgx-h100"), nodes=2)
LAYOUTS = 7  # of a problem
TURNS = 4


def shapes() -> dict[str, ModelShape]:
    """Small models of different kinds, four layers each."""
    llama = find("llama-3-8b").scaled(1 / 16, num_layers=4)
    qwen = find("qwen2.5-0.5b").scaled(1 / 4, num_layers=4)
    gpt = replace(find("paper-gpt").scaled(1 / 16, num_layers=4), vocab_size=512)
    return {
        "llama": replace(llama, vocab_size=2048),
        "wide": replace(llama, vocab_size=2048, hidden_size=512, ffn_hidden_size=2048, num_query_groups=2),
        "qwen": replace(qwen, vocab_size=2048),
        "gpt": gpt,
    }


def problems() -> list[tuple[str, int, str, Workload]]:
    """(name, ranks, shape, workload) of every problem."""
    found = []
    for ranks, name in itertools.product((2, 4), shapes()):
        for kind, batch, length in (
            ("train", 4, 64), ("train", 8, 128), ("prefill", 4, 128), ("decode", 4, 64), ("decode", 8, 512),
        ):  # fmt: skip
            work = Workload(kind, batch, length, "fp32", fused=False)
            found.append((f"{name} {kind} b={batch} s={length} on {ranks}", ranks, name, work))
    return found


def layouts(shape: ModelShape, ranks: int, work: Workload) -> list[Layout]:
    """Layouts of all ranks: plain ones first, then sliced heads, at most LAYOUTS."""
    found = []
    for tp, pp in ((ranks, 1), (1, 1), (1, ranks), (2, 1), (2, ranks // 2), (1, 2)):
        if tp * pp <= ranks and shape.num_layers % pp == 0 and work.batch % (ranks // tp // pp) == 0:
            dp = ranks // tp // pp
            found.append(Layout(tp, pp, dp, micro_batch=1 if work.kind == "train" else work.batch // dp))
    for grid in legal_grids(shape.attention, ranks, even=True):
        if grid.dim_parallel_size > 1:
            whole = shape.num_attention_heads % ranks == 0
            size = 1 if work.kind == "train" else work.batch
            found.insert(1, _sliced(grid, "heads" if whole else "dims", size))
    legal = [layout for layout in dict.fromkeys(found) if illegal_reason(shape, layout, work) is None]
    return legal[:LAYOUTS]


def _sliced(grid: HelixGrid, placement: str, size: int) -> Layout:
    return Layout(grid.size, helix=True, grid=grid, comm_type="a2a", placement=placement, kv_cache="sequence",
                  micro_batch=size)  # fmt: skip


def measure(jobs: list[list[Problem]], folder: str, names: list[str]) -> None:
    """A rank: medians of all layouts of each problem; rank 0 writes one file a problem."""
    from helix_megatron.measure.machine import pin_to_core
    from helix_megatron.plan import trial

    rank = int(os.environ["RANK"])
    pin_to_core(rank)
    torch.distributed.init_process_group("nccl")
    for name, job in zip(names, jobs, strict=True):
        samples: list[list[float]] = [[] for _ in job]
        for turn in range(2):
            for number in range(len(job)) if turn == 0 else reversed(range(len(job))):
                samples[number] += trial.measure(job[number], TURNS, 1, held=False).seconds
        if rank == 0:
            document = {"names": [p.layout.describe() for p in job], "samples_seconds": samples}
            _file(Path(folder), name).write_text(json.dumps(document))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '_')}.json"


def _samples(folder: Path, name: str, job: list[Problem]) -> list[list[float]] | None:
    """What has been measured of these very layouts; None when nothing has."""
    file = _file(folder, name)
    document = json.loads(file.read_text()) if file.exists() else {"names": None}
    return document["samples_seconds"] if document["names"] == [p.layout.describe() for p in job] else None


def paper() -> list[str]:
    """The paper's two configurations, predicted, beside what it says of them: Markdown, see docs/paper.md.

    128 sequences of 10,000, fp16. Training: the best micro-batch of the planner's that fits. Prefill: 16
    micro-batches of 8 sequences, so that stages overlap. Decode: a token of all 128 after 10,000 each.
    """
    gpt = find("paper-gpt")
    thin = replace(gpt, num_attention_heads=64, num_query_groups=64, kv_channels=64)  # of two slices
    published = paper_numbers.PUBLISHED
    lines = [
        "| | tokens/s: training | prefill | decode | ms of communication in a decode step "
        "| GB a GPU: training | decode |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in published.values():
        lines.append(
            f"| the paper: {row.name} | {row.tps:,.0f} (which kind is not said) | | "
            f"| {row.tpot_ms} (per token) | {row.total_gb:g} (which kind is not said) | |"
        )
    rates = {}
    for name, shape, layout in (
        ("Megatron TP=8 PP=2", gpt, Layout(8, 2)),
        ("Helix, the paper's formula (per-slice), any n x m", thin, Layout(16)),
        ("Helix 8x2, exact", gpt, _sliced(HelixGrid(8, 2), "heads", 1)),
        ("Helix 4x4, exact", gpt, _sliced(HelixGrid(4, 4), "heads", 1)),
    ):
        train, prefill, decode = (_of_paper(shape, layout, kind) for kind in ("train", "prefill", "decode"))
        rates[name] = [tokens / predict(p, PAPER_CLUSTER).seconds for p, tokens in (train, prefill, decode)]
        shown = " | ".join(f"{float(f'{rate:.3g}'):,.0f}" for rate in rates[name])
        held = " | ".join(f"{memory.fullest_stage(p)[1].total / 1e9:.3g}" for p, _ in (train, decode))
        lines.append(f"| predicted: {name} | {shown} | {_communication(decode[0]) * 1e3:.2g} | {held} |")
    base, new = (rates[name] for name in list(rates)[:2])
    train, prefill, decode = (b / a for a, b in zip(base, new, strict=True))
    said = published["proposed"].tps / published["baseline"].tps
    return [
        *lines,
        "",
        f"Throughput of m x n = 16 (per-slice) over that of TP=8 PP=2: {said:.2f} in the paper; predicted "
        f"{train:.2f} in training, {prefill:.2f} in prefill, {decode:.2f} in decode.",
    ]


def _of_paper(shape: ModelShape, layout: Layout, kind: str) -> tuple[Problem, int]:
    """(the fastest problem that fits, its tokens in a step)."""
    work = Workload(
        kind, paper_numbers.BATCH, paper_numbers.LENGTH, "fp16", distributed_optimizer=kind == "train"
    )
    sizes = {"train": MICRO_BATCHES, "prefill": (8,), "decode": (work.batch,)}[kind]
    problems = [
        Problem(shape, replace(layout, micro_batch=size, sequence_parallel=kind == "train"), work)
        for size in sizes
    ]
    fit = [p for p in problems if memory.fullest_stage(p)[1].total <= PAPER_CLUSTER.capacity]
    return min(fit, key=lambda p: predict(p, PAPER_CLUSTER).seconds), report.tokens_of_step(work)


def _communication(problem: Problem) -> float:
    """Seconds of a decode step's collectives on the way of a token through all stages."""
    lines = predict(problem, PAPER_CLUSTER).lines
    collectives = [line for line in lines if line.part != "compute" and line.name != "filling and draining"]
    return problem.layout.pp * sum(line.seconds for line in collectives)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/planner", help="probe and samples, for resuming")
    parser.add_argument("--out", help="also write the JSON document here, and the table as .md beside it")
    parser.add_argument("--fresh", action="store_true", help="forget what has been measured")
    parser.add_argument(
        "--paper", action="store_true", help="print the paper's configurations; measure nothing"
    )
    options = parser.parse_args()
    if options.paper:
        print("\n".join(paper()))
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for file in (*folder.glob("*.json"), *folder.glob("*.yaml")):
            file.unlink()
    constants = folder / "this.yaml"
    if not constants.exists():
        probe.main(str(constants), 4)
    cluster = clusters.from_dict(yaml.safe_load(constants.read_text()), str(constants))
    rows = run(cluster, folder)
    summary = judged(rows)
    text = table(rows, summary, f"Measured on {bench.hardware()}; torch {torch.__version__}")
    document = {"benchmark": "planner", "measured": "measured_seconds; predicted_seconds are computed",
                "hardware": bench.hardware(), "torch": torch.__version__, **summary,
                "constants": clusters.to_dict(cluster), "rows": rows}  # fmt: skip
    if options.out:
        Path(options.out).write_text(json.dumps(document) + "\n", encoding="utf-8")
        Path(options.out).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print("\n".join(paper()), text, json.dumps(document), sep="\n\n")


def run(cluster: clusters.Cluster, folder: Path) -> list[dict]:
    """Measure what has not been measured; one row a problem."""
    from helix_megatron.host.launcher import run_ranks

    todo: dict[int, list[tuple[str, list[Problem]]]] = {}
    every = []
    for name, ranks, model, work in problems():
        shape = shapes()[model]
        job = [Problem(shape, layout, work) for layout in layouts(shape, ranks, work)]
        every.append((name, job))
        if _samples(folder, name, job) is None:
            todo.setdefault(ranks, []).append((name, job))
    for ranks, jobs in todo.items():
        names = [name for name, _ in jobs]
        run_ranks(measure, ranks, [job for _, job in jobs], str(folder), names, timeout_s=1200)
    rows = []
    for name, job in every:
        samples = _samples(folder, name, job)
        assert samples is not None, name
        measured = [statistics.median(series) for series in samples]
        predicted = [predict(problem, cluster).seconds for problem in job]
        rows.append({"problem": name, "work": job[0].workload.kind,
                     "layouts": [asdict(p.layout) for p in job], "names": [p.layout.describe() for p in job],
                     "measured_seconds": measured, "predicted_seconds": predicted})  # fmt: skip
    return rows


def judged(rows: list[dict]) -> dict[str, Any]:
    """Adds to each row whether the measured best was a first or second choice, and what the first one costs.

    Returns counts over all problems, and quantiles of predicted / measured of each kind of work.
    """
    ratios: dict[str, list[float]] = {}
    for row in rows:
        measured, predicted = row["measured_seconds"], row["predicted_seconds"]
        best = min(range(len(measured)), key=measured.__getitem__)
        order = sorted(range(len(measured)), key=predicted.__getitem__)
        row |= {"best": best, "first": order[0], "hit": best in order[:2]}
        row["over_best"] = measured[order[0]] / measured[best] - 1
        for layout, p, m in zip(row["layouts"], predicted, measured, strict=True):
            work = row["work"] + (", Helix" if layout["helix"] else "")
            ratios.setdefault(work, []).append(p / m)
    return {
        "problems": len(rows),
        "first_or_second": sum(row["hit"] for row in rows),
        "within_10_percent": sum(row["over_best"] <= 0.10 for row in rows),
        "predicted_over_measured": {
            work: {"least": min(r), "median": statistics.median(r), "most": max(r), "layouts": len(r)}
            for work, r in sorted(ratios.items())
        },
    }


def table(rows: list[dict], summary: dict[str, Any], machine: str) -> str:
    """Markdown."""
    lines = [
        f"{machine}. Step times of {sum(len(row['names']) for row in rows)} layouts in {len(rows)} problems.",
        "",
        f"- The measured best is the first or second choice: {summary['first_or_second']} of {len(rows)}.",
        f"- The first choice is within 10 % of the best: {summary['within_10_percent']} of {len(rows)}.",
        "",
        "| work | layouts | predicted / measured: median | least | most |",
        "| --- | --- | --- | --- | --- |",
    ]
    for work, r in summary["predicted_over_measured"].items():
        lines.append(f"| {work} | {r['layouts']} | {r['median']:.2f} | {r['least']:.2f} | {r['most']:.2f} |")
    lines += [
        "",
        "| problem | measured best | ms, measured | predicted first | ms, predicted | ms, measured "
        "| over the best | first or second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        best, first = row["best"], row["first"]
        measured, predicted = row["measured_seconds"], row["predicted_seconds"]
        lines.append(
            f"| {row['problem']} | {row['names'][best]} | {measured[best] * 1e3:.1f} | {row['names'][first]} "
            f"| {predicted[first] * 1e3:.1f} | {measured[first] * 1e3:.1f} | {row['over_best']:.0%} "
            f"| {'yes' if row['hit'] else 'NO'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
