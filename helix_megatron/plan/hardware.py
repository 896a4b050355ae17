"""What a cluster can do: rates of a device, time of a collective. Vendors' figures, or measured by a probe.

Note [Time of a collective]
    Between GPUs, in the manner of NCCL's own prediction (its src/graph/tuning.cc), the fastest of
        ring, low latency   6.6 us + steps in the domain x 0.6 us + between nodes x 2.7 us,   1/4 bandwidth
        ring, full          8.4 us + steps in the domain x 3.4 us + between nodes x 14 us,    bandwidth
        tree (all_reduce)   6.8 us + 2 (k-1) 0.6 us + 2 log2(nodes) 5 us,                     1/4 bandwidth
    steps: 2 (p-1) for all_reduce, p-1 otherwise; bandwidth: the slower of the links in the domain and, for
    a group over several nodes, the adapters of its k ranks in a node together (an all_to_all: each rank's
    own). Over several nodes a low-latency step in the domain takes 1.8 times as long. "Nodes" are domains of
    the fast link. A message between stages passes the slow link if any does.

    A probe measures instead. On a host: latency and bandwidth of each collective, group size and number of
    busy ranks. Between GPUs: of each collective, number of domains and ranks in each, for small messages and
    for large ones (the faster line holds). Groups that lie unevenly, or beyond what was measured: NCCL's.

Note [Placement of a group]
    A domain is `domain` neighbours of a node, or as many whole nodes as fit in it. Groups of `size` ranks,
    `stride` apart, fill the devices one after another, so some straddle a domain's edge. Of all groups of
    a size and stride the slowest counts: k is its smallest number of ranks in a domain (the tree's: largest).

        tp = 6, nodes of 8    0 1 2 3 4 5 | 6 7 . 8 9 10 11 | 12 13 14 15 . 16 17 | 18 ... 23
                              (1, 6, 6)     (2, 2, 4)         (2, 2, 4)             (1, 6, 6)

Note [Ranks that share a device]
    On a host `slots` cores serve all ranks. A rank's computing takes busy ranks / slots times as long (at
    least once); collectives are measured while that many ranks are busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import log2

Placement = tuple[int, int, int]
"""Domains that a group touches, ranks in the one with fewest and in the one with most."""


@dataclass(frozen=True)
class Rate:
    """seconds = launches x launch + max(FLOP / flops, bytes / bandwidth), in FLOP/s and bytes/s reached."""

    flops: float
    bandwidth: float
    launch: float = 0.0

    def seconds(self, flops: float, moved: float, launches: float = 1.0) -> float:
        return launches * self.launch + max(flops / self.flops, moved / self.bandwidth)

    def slower(self, factor: float) -> Rate:
        """The rate of a device that takes `factor` times as long."""
        return Rate(self.flops / factor, self.bandwidth / factor, self.launch * factor)


@dataclass(frozen=True)
class Line:
    """seconds of a collective = latency + bytes received / bandwidth."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Algorithm:
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
    """Equal devices in equal nodes. Bytes, bytes/s and seconds."""

    name: str
    memory: float
    """Bytes of a device."""
    rates: Mapping[str, Rate]
    """Kind of an operation (compute.py) to Rate; of one dtype alone as "gemm fp32"."""
    gpus_per_node: int = 8
    nodes: int = 1
    domain: int = 8
    """Devices that the fast link joins: part of a node, a node, or several."""
    fast: float = 0.0
    """Bytes/s per device and direction inside a domain, as reached."""
    slow: float = 0.0
    """The same between domains."""
    reserve: float = 0.0
    """Bytes of a device that are not ours (context, communicators, fragmentation)."""
    layer_overhead: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a layer besides its operations (host: Python, small tensors), by `overhead_key`."""
    step_overhead: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a step or a forward pass outside the layers, by the kind of work."""
    slots: int = 0
    """Devices that really exist when ranks share them; 0: one for each rank."""
    lines: Mapping[str, Line] = field(default_factory=dict)
    """Measured collectives of ranks that share devices, "kind xSIZE @BUSY"."""
    links: Mapping[str, Line] = field(default_factory=dict)
    """Measured collectives of ranks with a device each, "kind DOMAINSxRANKS" (of each domain), of small
    messages "kind DOMAINSxRANKS small"; what is in neither: NCCL's model."""
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

    @property
    def joined(self) -> int:
        """Devices that the fast link really joins: part of a node, or whole nodes."""
        return joined_devices(self.gpus_per_node, self.domain)

    def rate(self, kind: str, dtype: str) -> Rate:
        """The rate of an operation's kind. ValueError where the cluster has none."""
        rate = self.rates.get(f"{kind} {dtype}") or self.rates.get(kind)
        if rate is None and kind in ("norm", "packing") and "pass" in self.rates:
            passes = self.rates["pass"]  # whose launch is of the several that such an operation is made of
            rate = Rate(passes.flops, passes.bandwidth, passes.launch / 4)
        if rate is None:
            raise ValueError(
                f"cluster {self.name} has no rate of {kind!r}, only of {', '.join(sorted(self.rates))}; "
                "measure it with helix plan --probe FILE, or start its file from a preset with base: NAME."
            )
        return rate

    def slowdown(self, busy: int) -> float:
        """How many times longer computing takes while `busy` ranks compute."""
        return max(1.0, busy / self.slots) if self.slots else 1.0

    def collective_seconds(self, kind: str, size: int, stride: int, received: float, busy: int) -> float:
        """Seconds of one collective; arguments as of `algorithm`."""
        return self.algorithm(kind, size, stride, received, busy).seconds(received)

    def algorithm(self, kind: str, size: int, stride: int, received: float, busy: int) -> Algorithm:
        """How one collective goes, in the slowest group of its kind: measured, or NCCL's fastest algorithm.

        Args:
            kind: as CommMeter names it.
            size: ranks of the group.
            stride: distance between neighbours of the group; groups fill the devices one after another.
            received: bytes that each rank receives.
            busy: ranks that are at work at the same time.
        """
        if self.lines:
            line = self.nearest_line(kind, size, busy)
            return _measured_algorithm("measured", line.latency, line.bandwidth)
        if kind == "recv":  # some two neighbours are the farthest apart
            found = frozenset({(1, 2, 2) if self.devices <= self.joined else (2, 1, 1)})
        else:
            found = placements(size, stride, self.devices, self.gpus_per_node, self.domain)
        candidates = (self._measured(kind, *one) or self._nccl(kind, size, *one) for one in found)

        def seconds(algorithm: Algorithm) -> float:
            return algorithm.seconds(received)

        return max((min(several, key=seconds) for several in candidates), key=seconds)

    def nearest_line(self, kind: str, size: int, busy: int) -> Line:
        """The measured line of the nearest group size and number of busy ranks, scaled to the size."""
        keys = [key.split(" ") for key in self.lines]
        known = [(name, int(ranks[1:]), int(at_work[1:])) for name, ranks, at_work in keys]
        kind = kind if any(entry[0] == kind for entry in known) else "all_reduce"
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

    def _measured(self, kind: str, domains: int, fewest: int, most: int) -> list[Algorithm]:
        """What was measured, between two numbers of ranks in proportion; or nothing."""
        found = []
        for name in (kind, f"{kind} small"):
            known = self._lines_of_links.get((name, domains), {})
            low = max((ranks for ranks in known if ranks <= fewest), default=None)
            high = min((ranks for ranks in known if ranks >= most), default=None)
            if fewest != most or low is None or high is None:
                continue
            part = (most - low) / (high - low) if high > low else 0.0
            latency = known[low].latency * (1 - part) + known[high].latency * part
            inverse = (1 - part) / known[low].bandwidth + part / known[high].bandwidth
            found.append(_measured_algorithm(f"measured{name[len(kind) :]}", latency, 1 / inverse))
        return found

    def _nccl(self, kind: str, size: int, nodes: int, fewest: int, most: int) -> list[Algorithm]:
        """NCCL's algorithms in a group over `nodes` domains, `fewest` to `most` ranks in one of them."""
        if kind == "recv":
            latency, bandwidth = (8e-6, self.fast) if nodes == 1 else (14e-6, self.slow)
            return [Algorithm("message", ((1, "latency", latency),), bandwidth)]
        adapters = self.slow * (fewest if kind != "all_to_all" else 1)
        bandwidth = self.fast if nodes == 1 else min(self.fast, adapters)
        if kind == "all_to_all" and nodes > 1:  # what stays in the domain does not pass the adapter
            bandwidth = self.slow * (size - 1) / max(1, size - fewest)
        rounds = 2 if kind == "all_reduce" else 1
        between = rounds * (nodes - 1)
        inside = rounds * (size - 1) - between
        near = 0.6e-6 * (1.8 if nodes > 1 else 1)

        def made(name: str, start: float, inside: float, near: float, between: float, far: float,
                 bandwidth: float) -> Algorithm:  # fmt: skip
            steps = ((inside, "steps in the domain", near), (between, "between nodes", far))
            return Algorithm(name, ((1, "start", start), *steps), bandwidth)

        found = [
            made("ring, low latency", 6.6e-6, inside, near, between, 2.7e-6, bandwidth / 4),
            made("ring", 8.4e-6, inside, 3.4e-6, between, 14e-6, bandwidth),
        ]
        if kind == "all_reduce":
            found.append(made("tree", 6.8e-6, 2 * (most - 1), near, 2 * log2(nodes), 5e-6, bandwidth / 4))
        return found


def _measured_algorithm(name: str, latency: float, bandwidth: float) -> Algorithm:
    return Algorithm(name, ((1, "latency", latency),), bandwidth)


def joined_devices(node: int, domain: int) -> int:
    """Devices that the fast link really joins: part of a node, or whole nodes."""
    return domain if domain < node else domain // node * node


@cache
def placements(size: int, stride: int, devices: int, node: int, domain: int) -> frozenset[Placement]:
    """How the groups of `size` ranks, `stride` apart, lie over domains, each placement once.

    A group that needs more than the `devices` of all nodes lies at their beginning.
    """
    joined = joined_devices(node, domain)
    if size == 1 or stride >= joined:  # neighbours are never in one domain
        return frozenset({(size, 1, 1)})
    node = max(node, joined)
    last = (size - 1) * stride
    devices = max(devices, last + 1)
    starts = {
        start % node
        for block in range(0, devices, size * stride)
        for start in range(block, min(block + stride, devices - last))
    }
    found = set()
    for start in starts:
        ranks = range(start, start + last + 1, stride)
        counts = Counter((rank // node, rank % node // joined) for rank in ranks).values()
        found.add((len(counts), min(counts), max(counts)))
    return frozenset(found)


def overhead_key(kind: str, sliced: bool, comm_type: str, placement: str, cache: str) -> str:
    """What a layer does, as `layer_overhead` names it: "train megatron", "decode heads sequence", ..."""
    if not sliced:
        return f"{kind} megatron"
    return f"{kind} {comm_type} {placement}" if kind == "train" else f"{kind} {placement} {cache}"
