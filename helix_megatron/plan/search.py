"""Every layout that fits, ranked by predicted time.

Note [Exhaustive, and what is pruned]
    tp x pp x dp = all devices; tp over its divisors that the heads (Megatron) or some n x m grid (Helix)
    allow, pp over those of the layers, dp over those of the batch; grids, query placements, comm types,
    caches; micro-batches of 1, 2, 4, 8. Slices of unequal size are not modelled, hence not proposed. Pruned
    without a prediction, as something else is no worse:
      a grid with m = 1        is Megatron's own attention
      m larger than needed     equal work and memory, but more bytes, (m-1) G d / T elements of K and V a
                               token, in a larger group: of the legal grids of a tp, the one with largest n
      m > 1 where m = 1 works  likewise, if both run a fused attention core
      "dims"                   where "heads" is legal: it exchanges queries and outputs besides
      all_reduce               a2a moves less, unless s < 4 d (scores against K and V)
      cache "dim"              its traffic grows with the context; only kept up to 4 d positions
      full recompute           where the layout fits without
      weights that do not fit  by their bytes alone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from helix_megatron.grid import legal_grids
from helix_megatron.plan import memory
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal
from helix_megatron.plan.memory import Memory
from helix_megatron.plan.terms import total
from helix_megatron.plan.timing import Prediction, predict
from helix_megatron.presets import ModelShape

MICRO_BATCHES = (1, 2, 4, 8)


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
    """The result of a search."""

    candidates: list[Candidate] = field(default_factory=list)
    """Fastest first."""
    tried: int = 0
    """Layouts that are legal."""
    too_big: int = 0
    """Of these, layouts that do not fit."""
    smallest: float = 0.0
    """Bytes of the least that a layout which does not fit would need."""


def search(
    shape: ModelShape, cluster: Cluster, workload: Workload, tp: int | None = None, pp: int | None = None
) -> Plan:
    """All layouts of `shape` on all devices of `cluster`, fastest first.

    Args:
        tp, pp: only these sizes.
    """
    plan = Plan()
    for layout in layouts(shape, cluster, workload):
        if (tp and layout.tp != tp) or (pp and layout.pp != pp):
            continue
        problem = Problem(shape, layout, workload)
        plan.tried += 1
        fits = _fit(problem, cluster, plan)
        if fits is None and workload.kind == "train":
            problem = Problem(shape, replace(layout, recompute=True), workload)
            fits = _fit(problem, cluster, plan)
        if fits is None:
            plan.too_big += 1
            continue
        stage, held = fits
        plan.candidates.append(Candidate(problem, predict(problem, cluster), stage, held))
    plan.candidates.sort(key=_order)
    return plan


def _order(candidate: Candidate) -> tuple[float, bool, int, int]:
    """Fastest first; equals: Megatron's own, fewer stages, smaller tp."""
    layout = candidate.layout
    return (candidate.seconds, layout.helix, layout.pp, layout.tp)


def _fit(problem: Problem, cluster: Cluster, plan: Plan) -> tuple[int, Memory] | None:
    """The fullest stage and what it holds; None when that is more than a device has."""
    weights = total(memory.parameters(problem, 0)) * problem.workload.element
    if weights <= cluster.capacity:
        stage, held = memory.fullest(problem)
        if held.total <= cluster.capacity:
            return stage, held
        weights = held.total
    plan.smallest = min(plan.smallest or weights, weights)
    return None


def layouts(shape: ModelShape, cluster: Cluster, workload: Workload) -> Iterator[Layout]:
    """Every layout of all devices that is legal and not pruned (see the note above)."""
    devices = cluster.devices
    for tp in _divisors(devices):
        if shape.ffn_hidden_size % tp:
            continue
        attentions = list(attention_layouts(shape, tp, workload))
        if not attentions:
            continue
        for pp in _divisors(devices // tp):
            dp = devices // tp // pp
            if shape.num_layers % pp or workload.batch % dp:
                continue
            for size in _micro_batches(workload, dp):
                for attention in attentions:
                    layout = replace(
                        attention,
                        pp=pp,
                        dp=dp,
                        micro_batch=size,
                        sequence_parallel=_sequence_parallel(workload, tp),
                    )
                    if illegal(shape, layout, workload) is None:
                        yield layout


def _sequence_parallel(workload: Workload, tp: int) -> bool:
    """Where Megatron advises it: training with tensor parallelism."""
    return workload.kind == "train" and workload.fused and tp > 1 and workload.length % tp == 0


def _micro_batches(workload: Workload, dp: int) -> list[int]:
    replica = workload.batch // dp
    if workload.kind != "train":
        return [replica]
    return [size for size in MICRO_BATCHES if replica % size == 0]


def attention_layouts(shape: ModelShape, tp: int, workload: Workload) -> Iterator[Layout]:
    """Ways to do attention on `tp` ranks: Megatron's own, and Helix with sliced heads."""
    plain = Layout(tp)
    if illegal(shape, plain, replace(workload, batch=1)) is None:
        yield plain
    whole = workload.fused and tp <= shape.num_query_groups and shape.num_query_groups % tp == 0
    sliced = [grid for grid in legal_grids(shape.attention, tp, even=True) if grid.dim_parallel_size > 1]
    for grid in [] if whole else sliced[:1]:  # most head groups first
        n, m = grid.head_parallel_size, grid.dim_parallel_size
        placement = "heads" if shape.num_attention_heads // n % m == 0 else "dims"
        short = workload.length < 4 * shape.kv_channels
        caches = ["sequence", "dim"] if short and workload.kind != "train" else ["sequence"]
        comms = ["a2a", "all_reduce"] if short and workload.kind == "train" else ["a2a"]
        for comm in comms:
            for cache in caches:
                yield Layout(
                    tp, helix=True, grid=grid, comm_type=comm, placement=placement, kv_cache=cache
                )  # fmt: skip


def _divisors(number: int) -> list[int]:
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})
