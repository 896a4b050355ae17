"""Is the planner right on this host? Predicted and measured step times of every layout of many problems.

    python benchmarks/planner.py             probes, measures, prints the table; goes on where it was stopped
    python benchmarks/planner.py --fresh     from the beginning

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

import yaml

from helix_megatron.grid import HelixGrid, legal_grids
from helix_megatron.plan import clusters, probe
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal
from helix_megatron.plan.timing import predict
from helix_megatron.presets import ModelShape, find

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
    legal = [layout for layout in dict.fromkeys(found) if illegal(shape, layout, work) is None]
    return legal[:LAYOUTS]


def _sliced(grid: HelixGrid, placement: str, size: int) -> Layout:
    return Layout(grid.size, helix=True, grid=grid, comm_type="a2a", placement=placement, kv_cache="sequence",
                  micro_batch=size)  # fmt: skip


def measure(jobs: list[list[Problem]], folder: str, names: list[str]) -> None:
    """A rank: medians of all layouts of each problem; rank 0 writes one file a problem."""
    import torch

    from helix_megatron.compare.measure import pin
    from helix_megatron.plan import trial

    rank = int(os.environ["RANK"])
    pin(rank)
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
    """The paper's shape on 16 H100, predicted: its two configurations, and what Helix grids would do."""
    cluster = replace(clusters.find("dgx-h100"), nodes=2)
    work = Workload("train", 128, 10000, distributed_optimizer=True)
    lines = ["The paper's GPT on 16 H100 (two machines), one training step, PREDICTED:"]
    rows = [("Megatron TP=8 PP=2", Layout(8, 2)), ("Megatron TP=16 = Helix 16x1", Layout(16))]
    rows += [(f"Helix {n}x{16 // n}", _sliced(HelixGrid(n, 16 // n), "heads", 1)) for n in (8, 4)]
    for name, layout in rows:
        problem = Problem(find("paper-gpt"), replace(layout, sequence_parallel=True), work)
        lines.append(f"  {name:28} {predict(problem, cluster).seconds:6.2f} s")
    return [
        *lines,
        "None of it has been measured; what the paper reports: docs/paper.md.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/planner", help="probe and samples, for resuming")
    parser.add_argument("--fresh", action="store_true", help="forget what has been measured")
    options = parser.parse_args()
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
    show(rows)


def run(cluster: clusters.Cluster, folder: Path) -> list[dict]:
    """Measure what has not been measured; one row a problem."""
    from helix_megatron.launch import run_ranks

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
        rows.append({"problem": name, "layouts": [asdict(p.layout) for p in job],
                     "names": [p.layout.describe() for p in job],
                     "measured_seconds": measured, "predicted_seconds": predicted})  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """Table, shares, JSON."""
    print("\n".join(paper()))
    print(
        f"{'problem':38} {'measured best':32} {'ms':>7} {'predicted first':32} {'ms':>7} {'measured':>8} ok"
    )
    hits = close = 0
    for row in rows:
        measured, predicted = row["measured_seconds"], row["predicted_seconds"]
        best = min(range(len(measured)), key=measured.__getitem__)
        order = sorted(range(len(measured)), key=predicted.__getitem__)
        row["hit"] = best in order[:2]
        row["over_best"] = measured[order[0]] / measured[best] - 1
        hits += row["hit"]
        close += row["over_best"] <= 0.10
        print(
            f"{row['problem']:38} {row['names'][best]:32} {measured[best] * 1e3:7.1f} "
            f"{row['names'][order[0]]:32} {predicted[order[0]] * 1e3:7.1f} {measured[order[0]] * 1e3:8.1f} "
            f"{'yes' if row['hit'] else 'NO'} {row['over_best']:+.0%}"
        )
    print(f"measured best is the first or second choice: {hits} of {len(rows)}")
    print(f"first choice within 10 % of the best: {close} of {len(rows)}")
    summary = {"problems": len(rows), "first_or_second": hits, "within_10_percent": close}
    print(json.dumps({"benchmark": "planner", **summary, "rows": rows}))


if __name__ == "__main__":
    main()
