"""A plan as a table, as JSON, and explained. Every time and byte here is predicted, and says so."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from helix_megatron.models.presets import ModelShape
from helix_megatron.plan import advice, compute, pasted, traffic
from helix_megatron.plan.clusters import to_dict
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Workload
from helix_megatron.plan.search import Candidate, Plan

_PARTS = {  # shown name → parts of the prediction
    "compute": ("compute",),
    "exchange": ("exchange",),
    "all-reduce": ("all-reduce",),
    "pipeline": ("pipeline",),
    "update": ("gradients", "optimizer"),
}
_HELD = ("weights", "gradients", "optimizer", "activations", "kv_cache", "buffers")


def tokens_of_step(workload: Workload) -> int:
    """Tokens that a step brings forward."""
    return workload.batch * (1 if workload.kind == "decode" else workload.length)


def title(shape: ModelShape, cluster: Cluster, workload: Workload) -> str:
    """What was planned, in one line."""
    what = f"{shape.name}: {shape.num_parameters / 1e9:.3g} B parameters"
    where = f"{cluster.devices} ranks of {cluster.name}"
    length = "context" if workload.kind == "decode" else "sequence"
    work = f"{workload.kind}, batch {workload.batch}, {length} {workload.length}, {workload.dtype}"
    return f"{what}; {where}; {work}. All times and sizes are PREDICTED."


def table(plan: Plan, workload: Workload, top: int) -> Table:
    """The best layouts, one row each, in their fastest variant."""
    shown = Table(box=None, pad_edge=False)
    for name in ("", "tp", "pp", "dp", "n", "m", "comm", "queries", "cache", "micro", "ms", "tok/s"):
        shown.add_column(name, justify="right" if name not in ("comm", "queries", "cache") else "left")
    for name in (*_PARTS, "GB/rank"):
        shown.add_column(name, justify="right")
    for number, candidate in enumerate(plan.best[:top], 1):
        shown.add_row(str(number), *_cells(candidate, workload))
    return shown


def _cells(candidate: Candidate, workload: Workload) -> list[str]:
    layout, parts = candidate.layout, candidate.prediction.parts
    grid = [str(layout.n), str(layout.m)] if layout.helix else ["-", "-"]
    how = [layout.comm_type, layout.placement] if layout.sliced else ["-", "-"]
    cache = layout.kv_cache if layout.sliced and workload.kind != "train" else "-"
    micro = f"{layout.micro_batch}{' re' if layout.recompute else ''}"
    times = [sum(parts[part] for part in several) * 1e3 for several in _PARTS.values()]
    return [
        *(str(size) for size in (layout.tp, layout.pp, layout.dp)),
        *grid,
        *how,
        cache,
        micro,
        f"{candidate.seconds * 1e3:.4g}",
        f"{tokens_of_step(workload) / candidate.seconds:,.0f}",
        *(f"{ms:.3g}" for ms in times),
        f"{candidate.memory.total / 1e9:.3g}",
    ]


def memory_table(plan: Plan, cluster: Cluster, top: int) -> Table:
    """Bytes on the fullest rank of the best layouts."""
    shown = Table(box=None, pad_edge=False)
    for name in ("", "GB on the fullest rank, predicted:", *_HELD, "sum", "of"):
        shown.add_column(name.replace("_", " "), justify="right" if name in (*_HELD, "sum", "of") else "left")
    for number, candidate in enumerate(plan.best[:top], 1):
        sizes = candidate.memory.bytes()
        shown.add_row(
            str(number),
            candidate.layout.describe(plan.workload),
            *(f"{sizes[name] / 1e9:.3g}" for name in _HELD),
            f"{candidate.memory.total / 1e9:.3g}",
            f"{cluster.capacity / 1e9:.3g}",
        )
    return shown


def verdict(plan: Plan, shape: ModelShape, workload: Workload) -> list[str]:
    """What to do, in sentences: Helix or not, why the first beats the second, and what would be better."""
    best = plan.candidates[0]
    helix = next((c for c in plan.candidates if c.layout.sliced), None)
    plain = next((c for c in plan.candidates if not c.layout.sliced), None)
    uneven = advice.uneven(plan)
    if helix is None and plan.sliced:
        said = [f"Leave Helix off: none of its {plan.sliced} layouts with sliced heads fits."]
    elif helix is None:
        only = f"with tp = {plan.tp} heads stay" if plan.tp else "every tensor-parallel size here keeps heads"
        said = [f"Leave Helix off: {only} whole." if not uneven else f"Of what is modelled, {only} whole."]
    elif not best.layout.sliced:
        said = [
            f"Leave Helix off: its best layout ({helix.layout.describe(workload)}) is predicted to take "
            f"{helix.seconds / best.seconds:.3g} times as long."
        ]
    elif plain is None:
        said = ["Use Helix: Megatron's own attention has no layout here that is legal and fits."]
    else:
        said = [
            f"Use Helix: Megatron's best layout ({plain.layout.describe(workload)}) is predicted to take "
            f"{plain.seconds / best.seconds:.3g} times as long."
        ]
    if uneven:
        said.append(f"{uneven}.")
    if len(plan.best) > 1:
        said.append(why(best, plan.best[1]))
    batch = advice.better_batch(plan)
    said += [batch] if batch else []
    said += [f"Not planned: {note}." for note in shape.notes]
    return said


def why(first: Candidate, second: Candidate) -> str:
    """Why `first` beats `second`: the parts of the step that differ, largest first."""
    names = {"gradients": "gradient reduction", "all-reduce": "tensor-parallel reductions"}
    gains = {
        part: second.prediction.parts[part] - seconds for part, seconds in first.prediction.parts.items()
    }
    saved = sorted((part for part in gains if gains[part] > 1e-9), key=lambda part: -gains[part])
    lost = sorted((part for part in gains if gains[part] < -1e-9), key=lambda part: gains[part])

    def listed(parts: list[str]) -> str:
        return ", ".join(f"{abs(gains[part]) * 1e3:.3g} ms {names.get(part, part)}" for part in parts[:3])

    text = f"1 before 2 ({second.layout.describe(second.problem.workload)}): "
    if not saved:
        return text + "equal in every part; the simpler one comes first."
    text += f"saves {listed(saved)}"
    if lost:
        text += f", and costs {listed(lost)}"
    return text + f"; {(second.seconds / first.seconds - 1) * 100:.2g} % in all."


# ---- explanation ----
def explain(candidate: Candidate, cluster: Cluster) -> list[str]:
    """Every formula with its numbers: seconds, bytes, memory."""
    problem, prediction = candidate.problem, candidate.prediction
    text = [
        f"{candidate.layout.describe()}, predicted",
        f"  {problem.layers} layers a stage, {problem.micro_batches} micro-batches of "
        f"{candidate.layout.micro_batch} in a replica, {problem.tokens} tokens each",
        f"  step = {' + '.join(f'{part} {s * 1e3:.4g} ms' for part, s in prediction.parts.items() if s)}",
        f"  seconds of the step on stage {prediction.stage}, the slowest; lines of a part add up to it:",
    ]
    text += [
        f"    {line.part:10} {line.seconds * 1e3:10.4g} ms  {line.name}: {line.formula}"
        for line in prediction.lines
    ]
    text.append(f"  bytes on a rank of stage {candidate.stage}, the fullest:")
    for name, terms in vars(candidate.memory).items():
        text += [f"    {name:12} {term.value / 1e6:12,.1f} MB  {term.name}: {term}" for term in terms]
    text.append(f"  of {cluster.capacity / 1e9:.4g} GB; constants from: {'; '.join(cluster.sources)}")
    return text


# ---- JSON ----
def as_json(plan: Plan, shape: ModelShape, cluster: Cluster, workload: Workload, top: int) -> dict[str, Any]:
    """The whole plan in plain types; every figure is predicted."""
    return {
        "kind": "predicted",
        "model": asdict(shape) | {"num_parameters": shape.num_parameters},
        "cluster": to_dict(cluster),
        "workload": asdict(workload),
        "tried": plan.tried,
        "too_big": plan.too_big,
        "verdict": verdict(plan, shape, workload) if plan.candidates else [advice.nothing(plan)],
        "candidates": [_entry(candidate, workload, cluster) for candidate in plan.best[:top]],
    }


def _entry(candidate: Candidate, workload: Workload, cluster: Cluster) -> dict[str, Any]:
    layout = candidate.layout
    received = traffic.received(traffic.collectives(candidate.problem, candidate.prediction.stage))
    return {
        "layout": asdict(layout),
        "n": layout.n,
        "m": layout.m,
        "predicted_seconds": candidate.seconds,
        "predicted_tokens_per_second": tokens_of_step(workload) / candidate.seconds,
        "predicted_parts": candidate.prediction.parts,
        "predicted_lines": [asdict(line) for line in candidate.prediction.lines],
        "predicted_bytes": candidate.memory.bytes(),
        "predicted_received": {name: {"calls": c, "bytes": b} for name, (c, b) in received.items()},
        "predicted_flops_per_second": compute.flops_of_step(candidate.problem)
        / candidate.seconds
        / layout.world,
        "flags": pasted.flags(layout, workload, cluster),
    }
