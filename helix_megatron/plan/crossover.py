"""From which batch a sharded KV cache pays: predicted, beside Megatron's attention on the same ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from helix_megatron.partition.grid import HelixConfigError
from helix_megatron.plan import memory
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, Problem
from helix_megatron.plan.search import Plan
from helix_megatron.plan.timing import predict

CONTEXTS = (32768, 65536, 131072, 262144)
BATCHES = tuple(1 << k for k in range(11))


@dataclass(frozen=True)
class Crossover:
    """Of one layout with sliced heads.

    Args:
        layout: whose tp, pp, dp and experts' groups Megatron's attention has as well.
        batches: context to the smallest batch of a replica, of BATCHES, from which on the sharded cache is
            faster, or alone fits; None: from none of those that fit.
        refusal: why Megatron does not run on these ranks; empty where it does.
    """

    layout: Layout
    batches: dict[int, int | None]
    refusal: str = ""


def find_crossover(plan: Plan) -> Crossover | None:
    """Of the fastest layout with sliced heads; None where there is none, or for other work than decoding."""
    best = next((c for c in plan.candidates if c.layout.sliced), None)
    if best is None or plan.workload.kind != "decode":
        return None
    try:
        replace(best.problem, layout=_of_megatron(best.layout))
    except HelixConfigError as error:
        return Crossover(best.layout, {}, str(error).split(": ", 1)[-1])
    batches = {length: _first_batch(best.problem, length, plan.cluster) for length in CONTEXTS}
    return Crossover(best.layout, batches)


def _of_megatron(layout: Layout) -> Layout:
    return replace(layout, helix=False, grid=None, comm_type="none", placement="none", kv_cache="none")


def _first_batch(problem: Problem, length: int, cluster: Cluster) -> int | None:
    """The batch from which on every larger one that fits is faster sharded."""
    found = None
    for batch in reversed(BATCHES):
        layout = replace(problem.layout, micro_batch=batch)
        work = replace(problem.workload, batch=batch * layout.dp, length=length)
        sharded, copied = (Problem(problem.shape, one, work) for one in (layout, _of_megatron(layout)))
        if not _fits(sharded, cluster):
            continue
        if _fits(copied, cluster) and predict(sharded, cluster).seconds >= predict(copied, cluster).seconds:
            break
        found = batch
    return found


def _fits(problem: Problem, cluster: Cluster) -> bool:
    return memory.fullest_stage(problem)[1].total <= cluster.capacity


def describe(crossover: Crossover) -> str:
    """One sentence."""
    where = f"Sharded cache on tp = {crossover.layout.tp} ({crossover.layout.grid})"
    if crossover.refusal:
        return f"{where}: Megatron has no layout to compare with: {crossover.refusal}."
    batches = crossover.batches.items()
    said = [f"{'none' if batch is None else batch} at {length // 1024}k" for length, batch in batches]
    return f"{where} is predicted to pay, or alone to fit, from a replica's batch of {', '.join(said)}."
