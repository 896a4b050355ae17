"""Every layout that fits, ranked by predicted time.

Note [Exhaustive, and what is pruned]
    tp x pp x dp = all devices; tp over its divisors that the heads (Megatron) or some n x m grid (Helix)
    allow, pp over those of the layers, dp over those of the batch; query placements, comm types, caches;
    micro-batches of 1, 2, 4, 8; in training sequence parallelism where it is possible. Slices of unequal
    size are not modelled, hence not proposed. Left out without a prediction, as something else is no worse:
      a grid with m = 1        is Megatron's own attention
      m larger than needed     equal work and memory, but more bytes, (m-1) G d / T elements of K and V a
                               token, in a larger group: of the legal grids of a tp, the one with largest n
      m > 1 where m = 1 works  likewise, if both run a fused attention core
      what changes nothing     comm types in decode and with a cache "sequence", caches in training
      "dims" where "heads" is  it exchanges queries and outputs besides. Where scores are summed (all_reduce,
      legal                    decode with a cache "dim") it is "heads" that exchanges more, QK norms apart.
                               Not left out where the software of a layer was measured: it differs too
      full recompute           where the layout fits without
    Which comm type and cache is fastest turns on context, batch and links, and is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from helix_megatron.models.presets import ModelShape
from helix_megatron.partition.grid import HelixGrid, legal_grids
from helix_megatron.plan import memory
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal
from helix_megatron.plan.memory import Memory
from helix_megatron.plan.timing import Prediction, predict

MICRO_BATCHES = (1, 2, 4, 8)
_VARIANTS = {  # comm types and caches that differ
    "train": (("a2a", "sequence"), ("all_reduce", "sequence")),
    "prefill": (("a2a", "sequence"), ("a2a", "dim"), ("all_reduce", "dim")),
    "decode": (("a2a", "sequence"), ("a2a", "dim")),
}


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and what is predicted of it."""

    problem: Problem
    prediction: Prediction
    stage: int
    """The pipeline stage that holds most."""
    memory: Memory

    @property
    def layout(self) -> Layout:
        return self.problem.layout

    @property
    def seconds(self) -> float:
        return self.prediction.seconds


@dataclass
class Plan:
    """What was asked, and the result of the search."""

    shape: ModelShape
    cluster: Cluster
    workload: Workload
    tp: int | None = None
    """The only tensor-parallel size that was allowed."""
    pp: int | None = None
    """The only number of pipeline stages that was allowed."""
    grid: HelixGrid | None = None
    """The only grid that was allowed, of `tp` ranks."""
    candidates: list[Candidate] = field(default_factory=list)
    """Fastest first."""
    tried: int = 0
    """Layouts that are legal, in all their variants."""
    sliced: int = 0
    """Of these, with sliced heads."""
    too_big: int = 0
    """Of these, layouts that do not fit."""
    least: tuple[Layout, Memory] | None = None
    """Of the layouts that do not fit, the one that needs least, and what it needs."""

    @property
    def best(self) -> list[Candidate]:
        """Every tp, pp, dp and grid once, in its fastest variant (micro-batch, placement, ...)."""
        kept: dict[tuple[int, int, int, HelixGrid | None], Candidate] = {}
        for candidate in self.candidates:
            layout = candidate.layout
            kept.setdefault((layout.tp, layout.pp, layout.dp, layout.grid), candidate)
        return list(kept.values())

    @property
    def smallest(self) -> float:
        """Bytes that `least` needs on its fullest rank; 0 where all fits."""
        return self.least[1].total if self.least else 0.0


def search(
    shape: ModelShape,
    cluster: Cluster,
    workload: Workload,
    tp: int | None = None,
    pp: int | None = None,
    grid: HelixGrid | None = None,
) -> Plan:
    """All layouts of `shape` on all devices of `cluster`, fastest first.

    Args:
        tp, pp: only these sizes.
        grid: only this one, of tp ranks and with equal slices, beside Megatron's own attention.
    """
    plan = Plan(shape, cluster, workload, tp, pp, grid)
    for layout in layouts(shape, cluster, workload, tp, pp, grid):
        plan.tried += 1
        plan.sliced += layout.sliced
        for problem in _ways(shape, layout, workload):
            stage, held = memory.fullest(problem)
            if held.total <= cluster.capacity:
                plan.candidates.append(Candidate(problem, predict(problem, cluster), stage, held))
                break
            if plan.least is None or held.total < plan.smallest:
                plan.least = (problem.layout, held)
        else:
            plan.too_big += 1
    plan.candidates.sort(key=_order)
    return plan


def fits(
    shape: ModelShape, cluster: Cluster, workload: Workload, tp: int | None = None, pp: int | None = None
) -> bool:
    """Whether any layout is legal and fits; arguments as of `search`."""
    return any(
        memory.fullest(problem)[1].total <= cluster.capacity
        for layout in layouts(shape, cluster, workload, tp, pp)
        for problem in _ways(shape, layout, workload)
    )


def _order(candidate: Candidate) -> tuple[float, bool, int, int]:
    """Fastest first; equals: Megatron's own, fewer stages, smaller tp."""
    layout = candidate.layout
    return (candidate.seconds, layout.helix, layout.pp, layout.tp)


def _ways(shape: ModelShape, layout: Layout, workload: Workload) -> Iterator[Problem]:
    """As it is and, in training, with full recompute."""
    yield Problem(shape, layout, workload)
    if workload.kind == "train":
        yield Problem(shape, replace(layout, recompute=True), workload)


def layouts(
    shape: ModelShape,
    cluster: Cluster,
    workload: Workload,
    tp: int | None = None,
    pp: int | None = None,
    grid: HelixGrid | None = None,
) -> Iterator[Layout]:
    """Every layout of all devices that is legal and not left out (see the note above)."""
    attentions: dict[int, list[Layout]] = {}
    for size_tp, size_pp, dp in sizes(shape, cluster.devices, workload, tp, pp):
        if workload.batch % dp:
            continue
        if size_tp not in attentions:
            measured = bool(cluster.layer_overhead)
            attentions[size_tp] = list(attention_layouts(shape, size_tp, workload, grid, measured))
        for size, attention in product(_micro_batches(workload, dp), attentions[size_tp]):
            layout = replace(
                attention,
                pp=size_pp,
                dp=dp,
                micro_batch=size,
                sequence_parallel=_sequence_parallel(workload, size_tp),
            )
            if illegal(shape, layout, workload) is None:
                yield layout


def sizes(
    shape: ModelShape, devices: int, workload: Workload, tp: int | None = None, pp: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) of all `devices` that the model allows, whatever the batch."""
    for size_tp in [k for k in _divisors(devices) if tp in (None, k)]:
        if shape.ffn_hidden_size % size_tp or not any(attention_layouts(shape, size_tp, workload)):
            continue
        for size_pp in [k for k in _divisors(devices // size_tp) if pp in (None, k)]:
            if shape.num_layers % size_pp == 0:
                yield size_tp, size_pp, devices // size_tp // size_pp


def uneven_only(shape: ModelShape, tp: int, workload: Workload) -> bool:
    """Whether `tp` ranks can run this model, but only by slices of unequal size, which are not modelled."""
    if shape.ffn_hidden_size % tp or any(attention_layouts(shape, tp, workload)):
        return False
    return bool(legal_grids(shape.attention, tp))


def sizes_with_uneven_slices(plan: Plan) -> list[int]:
    """The tensor-parallel sizes that would be legal for a plan, but are left out as `uneven_only`."""
    shape, work, devices = plan.shape, plan.workload, plan.cluster.devices
    found = []
    for tp in [k for k in _divisors(devices) if plan.tp in (None, k)]:
        stages = [k for k in _divisors(devices // tp) if plan.pp in (None, k) and shape.num_layers % k == 0]
        if any(work.batch % (devices // tp // k) == 0 for k in stages) and uneven_only(shape, tp, work):
            found.append(tp)
    return found


def _sequence_parallel(workload: Workload, tp: int) -> bool:
    """Where Megatron advises it: training with tensor parallelism."""
    return workload.kind == "train" and workload.fused and tp > 1 and workload.length % tp == 0


def _micro_batches(workload: Workload, dp: int) -> list[int]:
    replica = workload.batch // dp
    if workload.kind != "train":
        return [replica]
    if workload.micro_batch:
        return [workload.micro_batch]
    return [size for size in MICRO_BATCHES if replica % size == 0]


def attention_layouts(
    shape: ModelShape,
    tp: int,
    workload: Workload,
    given: HelixGrid | None = None,
    measured: bool = False,
) -> Iterator[Layout]:
    """Ways to do attention on `tp` ranks: Megatron's own, and Helix with sliced heads or the given grid.

    Args:
        given: in place of the grid with most head groups.
        measured: the software of a layer has its time, which turns on the query placement.
    """
    plain = Layout(tp)
    if illegal(shape, plain, replace(workload, batch=1)) is None:
        yield plain
    whole = workload.fused and tp <= shape.num_query_groups and shape.num_query_groups % tp == 0
    sliced = [grid for grid in legal_grids(shape.attention, tp, even=True) if grid.dim_parallel_size > 1]
    grids = [] if whole else sliced[:1]  # most head groups first
    if given is not None:
        grids = [given] if given.dim_parallel_size > 1 else []
        if not grids:
            yield Layout(tp, helix=True, grid=given)
    for grid in grids:
        for comm, cache in _VARIANTS[workload.kind]:
            for placement in _placements(shape, tp, workload, comm, cache, measured):
                yield Layout(
                    tp, helix=True, grid=grid, comm_type=comm, placement=placement, kv_cache=cache
                )  # fmt: skip


def _placements(
    shape: ModelShape, tp: int, workload: Workload, comm: str, cache: str, measured: bool
) -> list[str]:
    if shape.num_attention_heads % tp:
        return ["dims"]
    summed = comm == "all_reduce" or (cache == "dim" and workload.kind == "decode")
    if measured or (summed and shape.qk_layernorm):
        return ["heads", "dims"]
    return ["dims"] if summed else ["heads"]


def _divisors(number: int) -> list[int]:
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})
