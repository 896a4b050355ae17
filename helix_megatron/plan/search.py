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
    Experts: ep over the divisors of their number that the ranks of a stage allow, each expert whole (etp = 1)
    or over all tp ranks (Megatron's default), sequence parallelism wherever tp > 1.
    Which comm type and cache is fastest turns on context, batch and links, and is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from helix_megatron.models.shape import ModelShape
from helix_megatron.partition.grid import HelixGrid, legal_grids
from helix_megatron.plan import memory
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem, Workload, illegal_reason, indivisible_reason
from helix_megatron.plan.memory import Memory
from helix_megatron.plan.timing import Prediction, predict

MICRO_BATCHES = (1, 2, 4, 8)
_VARIANTS = {  # comm types and caches that differ
    "train": (("a2a", "sequence"), ("all_reduce", "sequence")),
    "prefill": (("a2a", "sequence"), ("a2a", "dim"), ("all_reduce", "dim")),
    "decode": (("a2a", "sequence"), ("a2a", "dim")),
}


@dataclass
class Request:
    """What is asked: a model, machines, work, and sizes where only one is allowed."""

    shape: ModelShape
    cluster: Cluster
    workload: Workload
    tp: int | None = None
    pp: int | None = None
    grid: HelixGrid | None = None
    """Of `tp` ranks and with equal slices, beside Megatron's own attention; None: the search chooses."""
    ep: int | None = None
    etp: int | None = None

    def changed(self, **changes: int | None) -> Request:
        """With other values of tp, pp, batch, length or devices (of one node), and any grid."""
        work = {name: changes[name] for name in ("batch", "length") if name in changes}
        nodes = {"nodes": 1, "gpus_per_node": changes["devices"]} if "devices" in changes else {}
        return Request(
            self.shape,
            replace(self.cluster, **nodes),  # type: ignore[arg-type]
            replace(self.workload, **work),  # type: ignore[arg-type]
            changes.get("tp", self.tp),
            changes.get("pp", self.pp),
            ep=self.ep,
            etp=self.etp,
        )


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
class Plan(Request):
    """What was asked, and the result of the search."""

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
        """Every tp, pp, dp and grid once, in its fastest variant (micro-batch, placement, ep, ...)."""
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
    ep: int | None = None,
    etp: int | None = None,
) -> Plan:
    """All layouts of `shape` on all devices of `cluster`, fastest first; arguments as of `Request`."""
    plan = Plan(shape, cluster, workload, tp, pp, grid, ep, etp)
    for layout in legal_layouts(plan):
        plan.tried += 1
        plan.sliced += layout.sliced
        for problem in _problems(plan, layout):
            stage, held = memory.fullest_stage(problem)
            if held.total <= cluster.capacity:
                plan.candidates.append(Candidate(problem, predict(problem, cluster), stage, held))
                break
            if plan.least is None or held.total < plan.smallest:
                plan.least = (problem.layout, held)
        else:
            plan.too_big += 1
    # Equals: Megatron's own, fewer stages, smaller tp.
    plan.candidates.sort(key=lambda c: (c.seconds, c.layout.helix, c.layout.pp, c.layout.tp))
    return plan


def fits(request: Request) -> bool:
    """Whether any layout is legal and fits."""
    return any(
        memory.fullest_stage(problem)[1].total <= request.cluster.capacity
        for layout in legal_layouts(request)
        for problem in _problems(request, layout)
    )


def _problems(request: Request, layout: Layout) -> Iterator[Problem]:
    """The layout as it is and, in training, with full recompute."""
    yield Problem(request.shape, layout, request.workload)
    if request.workload.kind == "train":
        yield Problem(request.shape, replace(layout, recompute=True), request.workload)


def legal_layouts(request: Request) -> Iterator[Layout]:
    """Every layout of all devices that is legal and not left out (see the note above)."""
    shape, work = request.shape, request.workload
    measured = bool(request.cluster.layer_overhead)
    attentions: dict[int, list[Layout]] = {}
    for tp, pp, dp in parallel_sizes(request):
        if work.batch % dp:
            continue
        if tp not in attentions:
            attentions[tp] = list(attention_layouts(shape, tp, work, request.grid, measured))
        # Where Megatron advises it: training with tensor parallelism, and experts.
        advised = work.fused if work.kind == "train" and not shape.num_moe_experts else shape.num_moe_experts
        possible = tp > 1 and (work.kind == "decode" or work.length % tp == 0)
        experts = _expert_groups(request, tp, dp)
        for size, attention, (ep, etp) in product(_micro_batches(work, dp), attentions[tp], experts):
            layout = replace(attention, pp=pp, dp=dp, micro_batch=size, ep=ep, etp=etp,
                             sequence_parallel=bool(advised and possible))  # fmt: skip
            if illegal_reason(shape, layout, work) is None:
                yield layout


def parallel_sizes(request: Request) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, dp) of all devices that the model allows, whatever the batch."""
    shape, devices = request.shape, request.cluster.devices
    for tp in _allowed(devices, request.tp):
        if indivisible_reason(shape, tp) or not any(attention_layouts(shape, tp, request.workload)):
            continue
        for pp in _allowed(devices // tp, request.pp):
            if shape.num_layers % pp == 0:
                yield tp, pp, devices // tp // pp


def only_uneven_slices(request: Request, tp: int) -> bool:
    """Whether `tp` ranks can run this model, but only by slices of unequal size, which are not modelled."""
    shape = request.shape
    if indivisible_reason(shape, tp) or any(attention_layouts(shape, tp, request.workload)):
        return False
    return bool(legal_grids(shape.attention, tp))


def sizes_with_uneven_slices(request: Request) -> list[int]:
    """The tensor-parallel sizes that would be legal, but are left out as `only_uneven_slices`."""
    devices, batch = request.cluster.devices, request.workload.batch
    found = []
    for tp in _allowed(devices, request.tp):
        stages = [pp for pp in _allowed(devices // tp, request.pp) if request.shape.num_layers % pp == 0]
        if any(batch % (devices // tp // pp) == 0 for pp in stages) and only_uneven_slices(request, tp):
            found.append(tp)
    return found


def _expert_groups(request: Request, tp: int, dp: int) -> list[tuple[int, int]]:
    """(ep, etp) of a stage's tp x dp ranks."""
    experts, ranks = request.shape.num_moe_experts, tp * dp
    if not experts:
        return [(1, 1)]
    tensor = [etp for etp in sorted({1, tp}) if request.etp in (None, etp)] or [request.etp or 1]
    return [
        (ep, etp) for etp in tensor if ranks % etp == 0
        for ep in _allowed(ranks // etp, request.ep) if experts % ep == 0
    ]  # fmt: skip


def _micro_batches(workload: Workload, dp: int) -> list[int]:
    replica = workload.batch // dp
    if workload.kind != "train":
        return [replica]
    if workload.micro_batch:
        return [workload.micro_batch]
    return [size for size in MICRO_BATCHES if replica % size == 0]


def attention_layouts(
    shape: ModelShape, tp: int, workload: Workload, grid: HelixGrid | None = None, measured: bool = False
) -> Iterator[Layout]:
    """Ways to do attention on `tp` ranks: Megatron's own, and Helix with sliced heads or the given grid.

    Args:
        grid: in place of the one with most head groups.
        measured: the software of a layer has its time, which turns on the query placement.
    """
    plain = Layout(tp)
    if illegal_reason(shape, plain, replace(workload, kind="decode", batch=1)) is None:
        yield plain
    whole_heads = workload.fused and tp <= shape.num_query_groups and shape.num_query_groups % tp == 0
    sliced = [one for one in legal_grids(shape.attention, tp, even=True) if one.dim_parallel_size > 1]
    grids = [] if whole_heads else sliced[:1]  # most head groups first
    if grid is not None:
        grids = [grid] if grid.dim_parallel_size > 1 else []
        if not grids:
            yield Layout(tp, helix=True, grid=grid)
    for one, (comm, cache) in product(grids, _VARIANTS[workload.kind]):
        for placement in _placements(shape, tp, workload, comm, cache, measured):
            yield Layout(tp, helix=True, grid=one, comm_type=comm, placement=placement, kv_cache=cache)


def _placements(
    shape: ModelShape, tp: int, workload: Workload, comm: str, cache: str, measured: bool
) -> list[str]:
    if shape.num_attention_heads % tp:
        return ["dims"]
    summed = comm == "all_reduce" or (cache == "dim" and workload.kind == "decode")
    if measured or (summed and shape.qk_layernorm):
        return ["heads", "dims"]
    return ["dims"] if summed else ["heads"]


def _allowed(number: int, only: int | None) -> list[int]:
    """The divisors of a number in order; of these `only` one, where it is given."""
    small = [k for k in range(1, int(number**0.5) + 1) if number % k == 0]
    return [k for k in sorted({*small, *(number // k for k in small)}) if only in (None, k)]
