"""A plan as tables, as JSON, and explained. Every time and byte here is predicted, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from helix_megatron.plan import compute, crossover, suggestions, traffic
from helix_megatron.plan.clusters import to_dict
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Workload
from helix_megatron.plan.megatron_flags import format_flags, layout_flags
from helix_megatron.plan.search import Candidate, Plan

_PARTS = {  # shown name → parts of the prediction
    "compute": ("compute",),
    "exchange": ("exchange",),
    "experts": ("experts",),
    "all-reduce": ("all-reduce",),
    "pipeline": ("pipeline",),
    "update": ("gradients", "optimizer"),
}
_HELD = ("weights", "gradients", "optimizer", "activations", "kv_cache", "buffers")


def tokens_of_step(workload: Workload) -> int:
    """Tokens that a step brings forward."""
    return workload.batch * (1 if workload.kind == "decode" else workload.length)


def as_text(plan: Plan, top: int, command: str | None, explained: bool) -> Iterator[str | Table]:
    """What `helix plan` prints: lines and tables."""
    workload = plan.workload
    yield title(plan)
    if not plan.candidates:
        yield f"No plan: {suggestions.explain_no_plan(plan)}."
        return
    yield layout_table(plan, top)
    yield memory_table(plan, top)
    left_out = f", {plan.too_big} do not fit" if plan.too_big else ""
    yield f"{plan.tried} variants tried{left_out}; a row is a layout in its fastest variant."
    yield f"ms: a whole step ({workload.kind}); update: gradients and optimizer."
    yield from verdict(plan)
    flags = layout_flags(plan.candidates[0].problem, plan.cluster)
    yield f"Flags of 1: {format_flags(flags)}"
    if command:
        yield f"Run 1, as it stands: {command}"
    for candidate in plan.best[: min(2, top)] if explained else []:
        yield from explain(candidate, plan.cluster)


def title(plan: Plan) -> str:
    """What was planned, in one line."""
    shape, work = plan.shape, plan.workload
    what = f"{shape.name}: {shape.num_parameters / 1e9:.3g} B parameters"
    if shape.num_moe_experts:
        what += f" ({shape.num_active_parameters / 1e9:.3g} B active)"
    where = f"{plan.cluster.devices} ranks of {plan.cluster.name}"
    length = "context" if work.kind == "decode" else "sequence"
    asked = f"{work.kind}, batch {work.batch}, {length} {work.length}, {work.dtype}"
    return f"{what}; {where}; {asked}. All times and sizes are PREDICTED."


def layout_table(plan: Plan, top: int) -> Table:
    """The best layouts, one row each, in their fastest variant."""
    experts = bool(plan.shape.num_moe_experts)
    shown = {name: parts for name, parts in _PARTS.items() if name != "experts" or experts}
    groups = ["ep", "etp"] if experts else []
    columns = ["tp", "pp", "dp", *groups, "n", "m", "comm", "queries", "cache", "micro", "ms", "tok/s"]
    rows = []
    for candidate in plan.best[:top]:
        layout, parts = candidate.layout, candidate.prediction.parts
        how = [layout.comm_type, layout.placement, layout.kv_cache] if layout.sliced else ["-"] * 3
        rows.append([
            *map(str, (layout.tp, layout.pp, layout.dp, *((layout.ep, layout.etp) if experts else ()))),
            *([str(layout.n), str(layout.m)] if layout.helix else ["-", "-"]),
            *(how if plan.workload.kind != "train" else [*how[:2], "-"]),
            f"{layout.micro_batch}{' re' if layout.recompute else ''}",
            f"{candidate.seconds * 1e3:.4g}",
            f"{tokens_of_step(plan.workload) / candidate.seconds:,.0f}",
            *(f"{sum(parts[part] for part in several) * 1e3:.3g}" for several in shown.values()),
            f"{candidate.memory.total / 1e9:.3g}",
        ])  # fmt: skip
    return _numbered([*columns, *shown, "GB/rank"], rows, ("comm", "queries", "cache"))


def memory_table(plan: Plan, top: int) -> Table:
    """Bytes on the fullest rank of the best layouts."""
    said = "GB on the fullest rank, predicted:"
    rows = []
    for candidate in plan.best[:top]:
        held = candidate.memory.bytes()
        sizes = [*(held[name] for name in _HELD), candidate.memory.total, plan.cluster.capacity]
        rows.append([candidate.layout.describe(plan.workload), *(f"{size / 1e9:.3g}" for size in sizes)])
    return _numbered([said, *(name.replace("_", " ") for name in _HELD), "sum", "of"], rows, ("", said))


def _numbered(columns: list[str], rows: list[list[str]], left: tuple[str, ...]) -> Table:
    """A table of numbered rows; columns that are not in `left` stand to the right."""
    shown = Table(box=None, pad_edge=False)
    for name in ("", *columns):
        shown.add_column(name, justify="left" if name in left else "right")
    for number, row in enumerate(rows, 1):
        shown.add_row(str(number), *row)
    return shown


def verdict(plan: Plan) -> list[str]:
    """What to do, in sentences: Helix or not, why the first beats the second, and what would be better."""
    best, work = plan.candidates[0], plan.workload
    helix = next((c for c in plan.candidates if c.layout.sliced), None)
    plain = next((c for c in plan.candidates if not c.layout.sliced), None)
    uneven = suggestions.describe_uneven_sizes(plan)
    if helix is None and plan.sliced:
        said = [f"Leave Helix off: none of its {plan.sliced} layouts with sliced heads fits."]
    elif helix is None:
        only = f"with tp = {plan.tp} heads stay" if plan.tp else "every tensor-parallel size here keeps heads"
        said = [f"Leave Helix off: {only} whole." if not uneven else f"Of what is modelled, {only} whole."]
    elif not best.layout.sliced:
        said = [f"Leave Helix off: its best layout {_times_as_long(helix, best, work)}"]
    elif plain is None:
        said = ["Use Helix: Megatron's own attention has no layout here that is legal and fits."]
    else:
        said = [f"Use Helix: Megatron's best layout {_times_as_long(plain, best, work)}"]
    if uneven:
        said.append(f"{uneven}.")
    if len(plan.best) > 1:
        said.append(explain_difference(best, plan.best[1]))
    if (crossed := crossover.find_crossover(plan)) is not None:
        said.append(crossover.describe(crossed))
    batch = suggestions.suggest_batch(plan)
    if plan.shape.linear_attention_freq and work.kind != "train":
        said.append("Megatron core 0.19 runs gated delta nets in training alone; this supposes that it can.")
    if plan.shape.num_moe_experts:
        said.append("Experts: every expert is taken to get as many tokens as every other (balanced routing).")
    return [*said, *([batch] if batch else []), *(f"Not planned: {note}." for note in plan.shape.notes)]


def _times_as_long(other: Candidate, best: Candidate, work: Workload) -> str:
    times = f"{other.seconds / best.seconds:.3g} times as long"
    return f"({other.layout.describe(work)}) is predicted to take {times}."


def explain_difference(first: Candidate, second: Candidate) -> str:
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
    costs = f", and costs {listed(lost)}" if lost else ""
    return f"{text}saves {listed(saved)}{costs}; {(second.seconds / first.seconds - 1) * 100:.2g} % in all."


# ---- explanation ----
def explain(candidate: Candidate, cluster: Cluster) -> Iterator[str]:
    """Every formula with its numbers: seconds, bytes, memory."""
    problem, prediction = candidate.problem, candidate.prediction
    yield f"{candidate.layout.describe()}, predicted"
    yield (
        f"  {problem.layers} layers a stage, {problem.micro_batches} micro-batches of "
        f"{candidate.layout.micro_batch} in a replica, {problem.tokens} tokens each"
    )
    yield f"  step = {' + '.join(f'{part} {s * 1e3:.4g} ms' for part, s in prediction.parts.items() if s)}"
    yield f"  seconds of the step on stage {prediction.stage}, the slowest; lines of a part add up to it:"
    for line in prediction.lines:
        yield f"    {line.part:10} {line.seconds * 1e3:10.4g} ms  {line.name}: {line.formula}"
    yield f"  bytes on a rank of stage {candidate.stage}, the fullest:"
    for name, terms in vars(candidate.memory).items():
        for term in terms:
            yield f"    {name:12} {term.value / 1e6:12,.1f} MB  {term.name}: {term}"
    yield f"  of {cluster.capacity / 1e9:.4g} GB; constants from: {'; '.join(cluster.sources)}"


# ---- JSON ----
def as_json(plan: Plan, top: int) -> dict[str, Any]:
    """The whole plan in plain types; every figure is predicted."""
    crossed = crossover.find_crossover(plan)
    return {
        "kind": "predicted",
        "sharded_cache_pays_from_batch": crossed and {
            "tp": crossed.layout.tp, "grid": str(crossed.layout.grid), **asdict(crossed)["batches"]
        },
        "model": asdict(plan.shape) | {"num_parameters": plan.shape.num_parameters},
        "cluster": to_dict(plan.cluster),
        "workload": asdict(plan.workload),
        "tried": plan.tried,
        "too_big": plan.too_big,
        "verdict": verdict(plan) if plan.candidates else [suggestions.explain_no_plan(plan)],
        "candidates": [_entry(candidate, plan.cluster) for candidate in plan.best[:top]],
    }


def _entry(candidate: Candidate, cluster: Cluster) -> dict[str, Any]:
    problem, layout, workload = candidate.problem, candidate.layout, candidate.problem.workload
    received = traffic.received_by_kind(traffic.collectives(problem, candidate.prediction.stage))
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
        "predicted_flops_per_second": compute.flops_of_step(problem) / candidate.seconds / layout.world,
        "flags": layout_flags(problem, cluster),
    }
