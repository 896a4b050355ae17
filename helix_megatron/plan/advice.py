"""What to change: why there is no plan and the nearest values that give one; a batch that suits the cluster.

Every value that is named has been tried: a layout with it is legal and fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from math import ceil

from helix_megatron.plan import clusters
from helix_megatron.plan.hardware import Cluster
from helix_megatron.plan.layout import Layout, illegal
from helix_megatron.plan.search import Plan, fits, search, sizes, sizes_with_uneven_slices, uneven_only

_TRIES = 24  # counts of devices looked at on either side
_GAIN = 1.1  # what a nearby batch has to bring to be named


def nothing(plan: Plan) -> str:
    """Why a plan has no candidates, and what would work."""
    text = _too_big(plan) if plan.tried else _no_layout(plan)
    left_out = uneven(plan)
    return f"{text}. {left_out}" if left_out else text


def uneven(plan: Plan) -> str:
    """The tensor-parallel sizes that run, but are not modelled; empty where there are none."""
    left_out = sizes_with_uneven_slices(plan)
    if not left_out:
        return ""
    named = ", ".join(map(str, left_out))
    return (
        f"Not modelled: tp = {named}, legal with Helix by slices of unequal size; helix compare can measure"
    )


def better_batch(plan: Plan) -> str:
    """A batch near the given one that more numbers of replicas divide, where it is faster; else empty."""
    work, best = plan.workload, plan.candidates[0]
    replicas = _replicas(plan)

    def suits(batch: int) -> int:
        return sum(batch % dp == 0 for dp in replicas)

    reach = max(1, work.batch // 8)
    near = [batch for batch in _multiples(work.batch, replicas) if abs(batch - work.batch) <= reach]
    near = [batch for batch in near if suits(batch) > suits(work.batch)]
    if not near or work.batch == 1:
        return ""
    batch = max(near, key=lambda batch: (suits(batch), -abs(batch - work.batch)))
    again = replace(work, batch=batch)
    other = search(plan.shape, plan.cluster, again, plan.tp, plan.pp, plan.grid).candidates
    if not other or best.seconds / other[0].seconds < _GAIN * max(1, work.batch / batch):
        return ""
    faster = batch / work.batch * best.seconds / other[0].seconds
    return (
        f"Few numbers of replicas divide a batch of {work.batch}: --batch {batch} is predicted to bring "
        f"{faster:.3g} times as many tokens in a second ({other[0].layout.describe(work)})."
    )


# ---- no layout is legal ----
def _no_layout(plan: Plan) -> str:
    asked = ", ".join([*_given(plan).values(), f"--batch {plan.workload.batch}"])
    text = f"no layout of {plan.shape.name} uses exactly {plan.cluster.devices} ranks with {asked}: "
    return f"{text}{_reason(plan)}; {_listed(_ways_to_a_layout(plan))}"


def _reason(plan: Plan) -> str:
    shape, work, devices, tp, pp = plan.shape, plan.workload, plan.cluster.devices, plan.tp, plan.pp
    one = replace(work, batch=1)
    if tp and devices % tp:
        return f"{tp} does not divide {devices} ranks"
    if tp and uneven_only(shape, tp, work):
        return f"heads over {tp} ranks are slices of unequal size"
    if tp and not any(sizes(shape, tp, work, tp, 1)):
        reason = illegal(shape, Layout(tp), one)
        return f"{reason}" + ("" if shape.ffn_hidden_size % tp else ", and no Helix grid splits them")
    if pp and shape.num_layers % pp:
        return f"{pp} pipeline stages do not divide {shape.num_layers} layers"
    if pp and devices % ((tp or 1) * pp):
        product = f"{tp} x {pp}" if tp else f"{pp}"
        return f"{product} does not divide {devices} ranks"
    numbers = ", ".join(map(str, sorted(_replicas(plan))[:6]))
    times = f" times micro-batches of {work.micro_batch}" if work.micro_batch else ""
    return f"the batch is no multiple of the replicas that are possible{times} ({numbers})"


def _ways_to_a_layout(plan: Plan) -> list[str]:
    tp, pp = plan.tp, plan.pp
    ways = _other_sizes(plan) + _batch_or_devices(plan, tp, pp)
    if ways or not (tp or pp):
        return ways
    free = f"without {' and '.join(_given(plan))}"
    if fits(plan.shape, plan.cluster, plan.workload):
        return [free]
    return [f"{way} {free}" for way in _batch_or_devices(plan, None, None)]


def _other_sizes(plan: Plan) -> list[str]:
    """Other values of --tp and --pp, where they were given."""
    shape, cluster, work, tp, pp = plan.shape, plan.cluster, plan.workload, plan.tp, plan.pp
    ways = []
    if tp and not plan.grid:
        ways += _flag("--tp", _around(tp, range(1, cluster.devices + 1), lambda k: (
            cluster.devices % k == 0 and fits(shape, cluster, work, k, pp))))  # fmt: skip
    if pp:
        ways += _flag("--pp", _around(pp, range(1, shape.num_layers + 1), lambda k: (
            shape.num_layers % k == 0 and fits(shape, cluster, work, tp, k))))  # fmt: skip
    return ways


def _batch_or_devices(plan: Plan, tp: int | None, pp: int | None) -> list[str]:
    shape, cluster, work = plan.shape, plan.cluster, plan.workload
    batches = _multiples(work.batch, _replicas(replace(plan, tp=tp, pp=pp)))
    found = _around(
        work.batch, batches, lambda k: fits(shape, cluster, replace(work, batch=k), tp, pp)
    )  # fmt: skip
    ways = _flag("--batch", found)
    return ways + _devices(plan, tp, pp)


def _devices(plan: Plan, tp: int | None, pp: int | None) -> list[str]:
    """Counts of devices nearby, else the next that is a power of two times a node's."""

    def works(count: int) -> bool:
        return fits(plan.shape, replace(plan.cluster, nodes=1, gpus_per_node=count), plan.workload, tp, pp)

    devices = plan.cluster.devices
    node = _of_a_node(plan.cluster)
    powers = (node << k for k in range(17) if node << k > devices)
    near = _around(devices, _counts(plan.cluster), works)
    return _flag("--gpus", near or list(islice(filter(works, powers), 1)))


# ---- none fits ----
def _too_big(plan: Plan) -> str:
    assert plan.least is not None
    layout, held = plan.least
    parts = ", ".join(f"{name.replace('_', ' ')} {b / 1e9:.3g}" for name, b in held.bytes().items() if b)
    text = (
        f"none of {plan.tried} layouts fits: the smallest ({layout.describe(plan.workload)}) needs "
        f"{held.total / 1e9:.3g} GB on a rank ({parts}), and {plan.cluster.capacity / 1e9:.3g} GB are there "
        "(predicted)"
    )
    shape, cluster, work, tp, pp = plan.shape, plan.cluster, plan.workload, plan.tp, plan.pp
    ways = _other_sizes(plan)
    if (tp or pp) and not ways and fits(shape, cluster, work):
        ways.append(f"without {' and '.join(_given(plan))}")
    batch = _halved(work.batch, lambda k: fits(shape, cluster, replace(work, batch=k), tp, pp))
    length = _halved(work.length, lambda k: fits(shape, cluster, replace(work, length=k), tp, pp))
    ways += _flag("--batch", batch) + _flag("--seq-length", length)
    if not batch and not length:
        text += "; neither a smaller batch nor a shorter sequence fits"
    if not cluster.slots:  # more ranks of a host share its memory
        ways += _devices(plan, tp, pp)
    memory = ceil((plan.smallest + cluster.memory - cluster.capacity) / 1e9)
    return f"{text}; {_listed([*ways, f'devices of {memory} GB'])}"


# ---- values to try ----
def _replicas(plan: Plan) -> set[int]:
    """What a batch must be a multiple of one of: numbers of replicas, times a given micro-batch."""
    micro = plan.workload.micro_batch or 1
    return {dp * micro for *_, dp in sizes(plan.shape, plan.cluster.devices, plan.workload, plan.tp, plan.pp)}


def _multiples(batch: int, replicas: set[int]) -> list[int]:
    """The batches next to this one that some number of replicas divides, in order."""
    near = {k for dp in replicas for k in (batch // dp * dp, batch // dp * dp + dp)}
    return sorted(near - {0, batch})


def _counts(cluster: Cluster) -> list[int]:
    """Devices near a cluster's that are a part of one node or whole nodes, in order."""
    node, devices = _of_a_node(cluster), cluster.devices
    counts = range(1, 2 * max(devices, node) + 1)
    allowed = [k for k in counts if cluster.slots or k <= node or k % node == 0]
    below, above = [k for k in allowed if k < devices], [k for k in allowed if k > devices]
    return below[-_TRIES:] + above[:_TRIES]


def _of_a_node(cluster: Cluster) -> int:
    """Devices of a whole node."""
    return clusters.CLUSTERS.get(cluster.name, cluster).gpus_per_node


def _around(given: int, values: Iterable[int], works: Callable[[int], bool]) -> list[int]:
    """The nearest of ordered `values` below and above that work; each side may have none."""
    values = list(values)
    below, above = [k for k in reversed(values) if k < given], [k for k in values if k > given]
    return [k for side in (below, above) for k in islice(filter(works, side), 1)]


def _halved(value: int, works: Callable[[int], bool]) -> list[int]:
    """The largest of value / 2, value / 4, ... that works, if any does."""
    return list(islice((value >> k for k in range(1, value.bit_length()) if works(value >> k)), 1))


def _given(plan: Plan) -> dict[str, str]:
    """The sizes that were asked for: name of the flag to the flag and its value."""
    given = {"--grid": plan.grid} if plan.grid else {"--tp": plan.tp}
    return {name: f"{name} {value}" for name, value in {**given, "--pp": plan.pp}.items() if value}


def _flag(name: str, values: list[int]) -> list[str]:
    return [f"{name} {' or '.join(map(str, values))}"] if values else []


def _listed(ways: list[str]) -> str:
    return f"what works: {'; '.join(ways)}" if ways else "no nearby --batch or --gpus alone gives one"
