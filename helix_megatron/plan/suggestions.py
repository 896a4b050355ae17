"""What to change: why there is no plan and the nearest values that give one; a batch that suits the cluster.

Every value that is named has been tried: a layout with it is legal and fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from math import ceil

from helix_megatron.plan import clusters
from helix_megatron.plan.layout import Layout, illegal_reason, indivisible_reason
from helix_megatron.plan.search import (
    Plan,
    Request,
    fits,
    only_uneven_slices,
    parallel_sizes,
    search,
    sizes_with_uneven_slices,
)

_TRIES = 24  # counts of devices looked at on either side
_GAIN = 1.1  # what a nearby batch has to bring to be named


def explain_no_plan(plan: Plan) -> str:
    """Why a plan has no candidates, and what would work."""
    text = _explain_too_big(plan) if plan.tried else _explain_no_layout(plan)
    left_out = describe_uneven_sizes(plan)
    return f"{text}. {left_out}" if left_out else text


def describe_uneven_sizes(plan: Plan) -> str:
    """The tensor-parallel sizes that run, but are not modelled; empty where there are none."""
    named = ", ".join(map(str, sizes_with_uneven_slices(plan)))
    how = "legal with Helix by slices of unequal size; helix compare can measure"
    return f"Not modelled: tp = {named}, {how}" if named else ""


def suggest_batch(plan: Plan) -> str:
    """A batch near the given one that more numbers of replicas divide, where it is faster; else empty."""
    given, best = plan.workload.batch, plan.candidates[0]
    replicas = _replicas(plan)

    def divisors(batch: int) -> int:
        return sum(batch % dp == 0 for dp in replicas)

    reach = max(1, given // 8)
    near = [batch for batch in _multiples(given, replicas) if abs(batch - given) <= reach]
    near = [batch for batch in near if divisors(batch) > divisors(given)]
    if not near or given == 1:
        return ""
    batch = max(near, key=lambda batch: (divisors(batch), -abs(batch - given)))
    other = search(
        plan.shape, plan.cluster, replace(plan.workload, batch=batch), plan.tp, plan.pp, plan.grid,
        plan.ep, plan.etp,
    ).candidates  # fmt: skip
    if not other or best.seconds / other[0].seconds < _GAIN * max(1, given / batch):
        return ""
    faster = batch / given * best.seconds / other[0].seconds
    return (
        f"Few numbers of replicas divide a batch of {given}: --batch {batch} is predicted to bring "
        f"{faster:.3g} times as many tokens in a second ({other[0].layout.describe(plan.workload)})."
    )


# ---- no layout is legal ----
def _explain_no_layout(plan: Plan) -> str:
    asked = ", ".join([*_given_sizes(plan).values(), f"--batch {plan.workload.batch}"])
    found = _other_sizes(plan) + _other_batches_or_devices(plan)
    if not found and (plan.tp or plan.pp):
        free, without = plan.changed(tp=None, pp=None), f"without {' and '.join(_given_sizes(plan))}"
        found = [without] if fits(free) else [f"{o} {without}" for o in _other_batches_or_devices(free)]
    listed = f"what works: {'; '.join(found)}" if found else "no nearby --batch or --gpus alone gives one"
    text = f"no layout of {plan.shape.name} uses exactly {plan.cluster.devices} ranks with {asked}"
    return f"{text}: {_reason(plan)}; {listed}"


def _reason(plan: Plan) -> str:
    shape, work, devices, tp, pp = plan.shape, plan.workload, plan.cluster.devices, plan.tp, plan.pp
    if tp and devices % tp:
        return f"{tp} does not divide {devices} ranks"
    if tp and only_uneven_slices(plan, tp):
        return f"heads over {tp} ranks are slices of unequal size"
    if tp and not any(parallel_sizes(plan.changed(pp=1, devices=tp))):
        reason = illegal_reason(shape, Layout(tp), replace(work, kind="decode", batch=1))
        return f"{reason}" if indivisible_reason(shape, tp) else f"{reason}, and no Helix grid splits them"
    if pp and shape.num_layers % pp:
        return f"{pp} pipeline stages do not divide {shape.num_layers} layers"
    if pp and devices % ((tp or 1) * pp):
        return f"{f'{tp} x {pp}' if tp else pp} does not divide {devices} ranks"
    numbers = ", ".join(map(str, sorted(_replicas(plan))[:6]))
    times = f" times micro-batches of {work.micro_batch}" if work.micro_batch else ""
    return f"the batch is no multiple of the replicas that are possible{times} ({numbers})"


def _other_sizes(plan: Plan) -> list[str]:
    """Other values of --tp and --pp, where they were given."""
    devices, layers, found = plan.cluster.devices, plan.shape.num_layers, []
    if plan.tp and not plan.grid:
        divisors = [k for k in range(1, devices + 1) if devices % k == 0]
        found += _option("--tp", _nearest(plan.tp, divisors, lambda k: fits(plan.changed(tp=k))))
    if plan.pp:
        divisors = [k for k in range(1, layers + 1) if layers % k == 0]
        found += _option("--pp", _nearest(plan.pp, divisors, lambda k: fits(plan.changed(pp=k))))
    return found


def _other_batches_or_devices(request: Request) -> list[str]:
    batch = request.workload.batch
    multiples = _multiples(batch, _replicas(request))
    found = _nearest(batch, multiples, lambda k: fits(request.changed(batch=k)))
    return _option("--batch", found) + _other_devices(request)


def _other_devices(request: Request) -> list[str]:
    """Counts of devices nearby, else the next that is a power of two times a node's."""

    def works(count: int) -> bool:
        return fits(request.changed(devices=count))

    cluster, devices = request.cluster, request.cluster.devices
    node = clusters.CLUSTERS.get(cluster.name, cluster).gpus_per_node
    counts = [
        k for k in range(1, 2 * max(devices, node) + 1) if cluster.slots or k <= node or k % node == 0
    ]  # a part of one node or whole nodes
    tried = [k for k in counts if k < devices][-_TRIES:] + [k for k in counts if k > devices][:_TRIES]
    powers = (node << k for k in range(17) if node << k > devices)
    return _option("--gpus", _nearest(devices, tried, works) or _first(powers, works))


# ---- none fits ----
def _explain_too_big(plan: Plan) -> str:
    assert plan.least is not None
    layout, held = plan.least
    parts = ", ".join(f"{name.replace('_', ' ')} {b / 1e9:.3g}" for name, b in held.bytes().items() if b)
    text = (
        f"none of {plan.tried} layouts fits: the smallest ({layout.describe(plan.workload)}) needs "
        f"{held.total / 1e9:.3g} GB on a rank ({parts}), and {plan.cluster.capacity / 1e9:.3g} GB are there "
        "(predicted)"
    )
    found = _other_sizes(plan)
    if (plan.tp or plan.pp) and not found and fits(plan.changed(tp=None, pp=None)):
        found.append(f"without {' and '.join(_given_sizes(plan))}")
    batch = _first(_halves(plan.workload.batch), lambda k: fits(plan.changed(batch=k)))
    length = _first(_halves(plan.workload.length), lambda k: fits(plan.changed(length=k)))
    found += _option("--batch", batch) + _option("--seq-length", length)
    if not batch and not length:
        text += "; neither a smaller batch nor a shorter sequence fits"
    if not plan.cluster.slots:  # more ranks of a host share its memory
        found += _other_devices(plan)
    memory = ceil((plan.smallest + plan.cluster.memory - plan.cluster.capacity) / 1e9)
    return f"{text}; what works: {'; '.join([*found, f'devices of {memory} GB'])}"


# ---- values to try ----
def _replicas(request: Request) -> set[int]:
    """What a batch must be a multiple of one of: numbers of replicas, times a given micro-batch."""
    return {dp * (request.workload.micro_batch or 1) for *_, dp in parallel_sizes(request)}


def _multiples(batch: int, replicas: set[int]) -> list[int]:
    """The batches next to this one that some number of replicas divides, in order."""
    near = {k for dp in replicas for k in (batch // dp * dp, batch // dp * dp + dp)}
    return sorted(near - {0, batch})


def _halves(value: int) -> list[int]:
    return [value >> k for k in range(1, value.bit_length())]


def _nearest(given: int, values: list[int], works: Callable[[int], bool]) -> list[int]:
    """The nearest of ordered `values` below and above that work; each side may have none."""
    below, above = [k for k in reversed(values) if k < given], [k for k in values if k > given]
    return _first(below, works) + _first(above, works)


def _first(values: Iterable[int], works: Callable[[int], bool]) -> list[int]:
    """The first that works, if any does."""
    return list(islice(filter(works, values), 1))


def _given_sizes(plan: Plan) -> dict[str, str]:
    """The sizes that were asked for: name of the flag to the flag and its value."""
    given = {"--grid": plan.grid} if plan.grid else {"--tp": plan.tp}
    given |= {"--pp": plan.pp, "--ep": plan.ep, "--etp": plan.etp}
    return {name: f"{name} {value}" for name, value in given.items() if value}


def _option(name: str, values: list[int]) -> list[str]:
    return [f"{name} {' or '.join(map(str, values))}"] if values else []
