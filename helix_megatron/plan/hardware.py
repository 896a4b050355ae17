"""What a cluster can do: rates of a device, time of a collective. Vendors' figures, or measured by a probe.

Note [Time of a collective]
    Between GPUs, in the manner of NCCL's own prediction (its src/graph/tuning.cc), the fastest of
        ring, low latency   6.6 us + steps in the domain x 0.6 us + between nodes x 2.7 us,   1/4 bandwidth
        ring, full          8.4 us + steps in the domain x 3.4 us + between nodes x 14 us,    bandwidth
        tree (all_reduce)   6.8 us + 2 (k-1) 0.6 us + 2 log2(nodes) 5 us,                     1/4 bandwidth
    steps: 2 (p-1) for all_reduce, p-1 otherwise; bandwidth: the slower of the links in the domain and, for
    a group over several nodes, the adapters of its k ranks in a node together (an all_to_all: each rank's
    own). Over several nodes a low-latency step in the domain takes 1.8 times as long. "Nodes" are domains of
    the fast link. Of all groups of a size and stride the slowest counts: k is its smallest number of ranks in
    a domain (the tree's: the largest). A message between stages passes the slow link if any does.

    A probe measures instead. On a host: latency and bandwidth of each collective, group size and number of
    busy ranks. Between GPUs: of each collective, number of domains and ranks in each, for small messages and
    for large ones (the faster line holds). Groups that lie unevenly, or beyond what was measured: NCCL's.

Note [Ranks that share a device]
    On a host `slots` cores serve all ranks. A rank's computing takes share = busy ranks / slots times as long
    (at least once); collectives are measured while that many ranks are busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import log2

from helix_megatron.plan.placement import placements, reach


@dataclass(frozen=True)
class Rate:
    """seconds = launch + max(FLOP / flops, bytes / bandwidth)."""

    flops: float
    """FLOP/s that are reached."""
    bandwidth: float
    """Bytes/s that are reached."""
    launch: float = 0.0
    """Seconds that a call costs at least."""

    def seconds(self, flops: float, moved: float) -> float:
        return self.launch + max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True)
class Line:
    """seconds of a collective = latency + bytes received / bandwidth."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Way:
    """seconds of a collective = sum of count x seconds over its steps + bytes received / bandwidth."""

    name: str
    steps: tuple[tuple[float, str, float], ...]
    """(count, what, seconds of one)."""
    bandwidth: float

    def seconds(self, received: float) -> float:
        return sum(count * one for count, _, one in self.steps) + received / self.bandwidth

    def formula(self, received: float) -> str:
        """The same with its numbers."""
        steps = [
            f"{one * 1e6:.6g} us {what}" if count == 1 else f"{count:.4g} {what} x {one * 1e6:.6g} us"
            for count, what, one in self.steps
            if count
        ]
        return f"{self.name}: {' + '.join(steps)} + {received:.6g} B / {self.bandwidth:.6g} B/s"


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal nodes.

    Args:
        name: as shown.
        memory: bytes of a device.
        rates: "gemm", "fused attention", "unfused attention", "cached attention", "repeated attention",
            "pass", "update" (compute.py) to Rate; of one dtype as "gemm fp32".
        gpus_per_node: devices of a node.
        nodes: how many.
        domain: devices that the fast link joins, at least a node's.
        fast, slow: bytes/s per device and direction inside the domain and between nodes, as reached.
        reserve: bytes of a device that are not ours (context, communicators, fragmentation).
        layer_overhead: seconds that a layer costs besides its operations, by what it does (host: Python and
            small tensors), see `overhead_key`.
        slots: devices that really exist when ranks share them; 0: one for each rank.
        lines: measured collectives of ranks that share devices, "kind xSIZE @BUSY" to Line.
        links: measured collectives of ranks with a device each, "kind DOMAINSxRANKS" (of each domain) to
            Line, of small messages "kind DOMAINSxRANKS small"; what is in neither: NCCL's model.
        step_overhead: seconds of a step or a forward pass outside the layers.
        sources: where the figures are from.
    """

    name: str
    memory: float
    rates: Mapping[str, Rate]
    gpus_per_node: int = 8
    nodes: int = 1
    domain: int = 8
    fast: float = 0.0
    slow: float = 0.0
    reserve: float = 0.0
    layer_overhead: Mapping[str, float] = field(default_factory=dict)
    step_overhead: Mapping[str, float] = field(default_factory=dict)
    slots: int = 0
    lines: Mapping[str, Line] = field(default_factory=dict)
    links: Mapping[str, Line] = field(default_factory=dict)
    fused: bool = True
    """Whether Megatron runs Transformer Engine's fused layers here."""
    sources: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def capacity(self) -> float:
        """Bytes of a device that a rank may fill."""
        ranks = max(1, self.devices // self.slots) if self.slots else 1
        return (self.memory - self.reserve) / ranks

    def rate(self, kind: str, dtype: str) -> Rate:
        """The rate of an operation's kind. ValueError where the cluster has none."""
        rate = self.rates.get(f"{kind} {dtype}") or self.rates.get(kind)
        if rate is None:
            raise ValueError(
                f"cluster {self.name} has no rate of {kind!r}, only of {', '.join(sorted(self.rates))}; "
                "measure it with helix plan --probe FILE, or start its file from a preset with base: NAME."
            )
        return rate

    def share(self, busy: int) -> float:
        """How many times longer computing takes while `busy` ranks compute."""
        return max(1.0, busy / self.slots) if self.slots else 1.0

    def collective(self, kind: str, size: int, stride: int, received: float, busy: int) -> float:
        """Seconds of one collective; arguments as of `way`."""
        return self.way(kind, size, stride, received, busy).seconds(received)

    def way(self, kind: str, size: int, stride: int, received: float, busy: int) -> Way:
        """How one collective goes, in the slowest group of its kind: measured, or the fastest of NCCL's ways.

        Args:
            kind: as CommMeter names it.
            size: ranks of the group.
            stride: distance between neighbours of the group; groups fill the devices one after another.
            received: bytes that each rank receives.
            busy: ranks that are at work at the same time.
        """
        if self.lines:
            line = self.line(kind, size, busy)
            return Way("measured", ((1, "latency", line.latency),), line.bandwidth)
        if kind == "recv":  # some two neighbours are the farthest apart
            near = self.devices <= reach(self.gpus_per_node, self.domain)
            found = frozenset({(1, 2, 2) if near else (2, 1, 1)})
        else:
            found = placements(size, stride, self.devices, self.gpus_per_node, self.domain)
        ways = (self._measured(kind, *one) or self._nccl(kind, size, *one) for one in found)

        def seconds(way: Way) -> float:
            return way.seconds(received)

        return max((min(several, key=seconds) for several in ways), key=seconds)

    def line(self, kind: str, size: int, busy: int) -> Line:
        """The measured line of the nearest group size and number of busy ranks, scaled to the size."""
        known = [_key(key) for key in self.lines]
        kinds = {entry[0] for entry in known}
        kind = kind if kind in kinds else "all_reduce"
        near = min(
            (entry for entry in known if entry[0] == kind),
            key=lambda entry: (abs(log2(entry[1] / size)), abs(log2(entry[2] / busy))),
        )
        line = self.lines[f"{near[0]} x{near[1]} @{near[2]}"]
        grown = size / near[1]
        return line if grown == 1 else Line(line.latency * grown, line.bandwidth / grown)

    @cached_property
    def _lines_of_links(self) -> dict[tuple[str, int], dict[int, Line]]:
        """`links` by ("kind" or "kind small", domains) and ranks in each."""
        found: dict[tuple[str, int], dict[int, Line]] = {}
        for key, line in self.links.items():
            kind, shape, *small = key.split(" ")
            domains, ranks = map(int, shape.split("x"))
            found.setdefault((" ".join([kind, *small]), domains), {})[ranks] = line
        return found

    def _measured(self, kind: str, domains: int, fewest: int, most: int) -> list[Way]:
        """Ways that were measured, between two measured numbers of ranks in proportion; or none."""
        ways = []
        for name in (kind, f"{kind} small"):
            known = self._lines_of_links.get((name, domains), {})
            low = max((ranks for ranks in known if ranks <= fewest), default=None)
            high = min((ranks for ranks in known if ranks >= most), default=None)
            if fewest != most or low is None or high is None:
                continue
            part = (most - low) / (high - low) if high > low else 0.0
            latency = known[low].latency * (1 - part) + known[high].latency * part
            inverse = (1 - part) / known[low].bandwidth + part / known[high].bandwidth
            ways.append(Way(f"measured{name[len(kind) :]}", ((1, "latency", latency),), 1 / inverse))
        return ways

    def _nccl(self, kind: str, size: int, nodes: int, fewest: int, most: int) -> list[Way]:
        """NCCL's ways in a group over `nodes` domains, with that few and that many ranks in one of them."""
        if kind == "recv":
            latency, bandwidth = (8e-6, self.fast) if nodes == 1 else (14e-6, self.slow)
            return [Way("message", ((1, "latency", latency),), bandwidth)]
        adapters = self.slow * (fewest if kind != "all_to_all" else 1)
        bandwidth = self.fast if nodes == 1 else min(self.fast, adapters)
        if kind == "all_to_all" and nodes > 1:  # what stays in the domain does not pass the adapter
            bandwidth = self.slow * (size - 1) / max(1, size - fewest)
        steps = 2 * (size - 1) if kind == "all_reduce" else size - 1
        between = 2 * (nodes - 1) if kind == "all_reduce" else nodes - 1
        inside = steps - between
        near_ll = 0.6e-6 * (1.8 if nodes > 1 else 1)
        ways = [
            _way("ring, low latency", 6.6e-6, inside, near_ll, between, 2.7e-6, bandwidth / 4),
            _way("ring", 8.4e-6, inside, 3.4e-6, between, 14e-6, bandwidth),
        ]
        if kind == "all_reduce":
            inside, far = 2 * (most - 1), 2 * log2(nodes)
            ways.append(_way("tree", 6.8e-6, inside, near_ll, far, 5e-6, bandwidth / 4))
        return ways


def _way(
    name: str, start: float, inside: float, near: float, between: float, far: float, bandwidth: float
) -> Way:
    steps = (1, "start", start), (inside, "steps in the domain", near), (between, "between nodes", far)
    return Way(name, steps, bandwidth)


def _key(text: str) -> tuple[str, int, int]:
    kind, size, busy = text.split(" ")
    return kind, int(size[1:]), int(busy[1:])


def overhead_key(kind: str, sliced: bool, comm_type: str, placement: str, cache: str) -> str:
    """What a layer does, as `layer_overhead` names it: "train megatron", "decode heads sequence", ..."""
    if not sliced:
        return f"{kind} megatron"
    if kind == "train":
        return f"{kind} {comm_type} {placement}"
    return f"{kind} {placement} {cache}"
