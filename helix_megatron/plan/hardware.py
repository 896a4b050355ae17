"""What a cluster can do: rates of a device, time of a collective. Vendors' figures, or measured by a probe.

Note [Time of a collective]
    Between GPUs, in the manner of NCCL's own prediction (its src/graph/tuning.cc), the fastest of
        ring, low latency   6.6 us + steps in the domain x 0.6 us + between nodes x 2.7 us,   1/4 bandwidth
        ring, full          8.4 us + steps in the domain x 3.4 us + between nodes x 14 us,    bandwidth
        tree (all_reduce)   6.8 us + 2 (k-1) 0.6 us + 2 log2(nodes) 5 us,                     1/4 bandwidth
    steps: 2 (p-1) for all_reduce, p-1 otherwise; bandwidth: the slower of the links in the domain and, for
    a group over several nodes, the adapters of its k ranks in a node together (an all_to_all: each rank's
    own). Over several nodes a low-latency step in the domain takes 1.8 times as long.
    A probe instead measures latency and bandwidth of each collective, group size and number of busy ranks.

Note [Ranks that share a device]
    On a host `slots` cores serve all ranks. A rank's computing takes share = busy ranks / slots times as long
    (at least once); collectives are measured while that many ranks are busy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, log2


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
        lines: measured collectives, "kind xSIZE @BUSY" to Line; empty: NCCL's model.
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
        """How one collective goes: measured, or the fastest of NCCL's ways.

        Args:
            kind: as CommMeter names it.
            size: ranks of the group.
            stride: distance between neighbours of the group.
            received: bytes that each rank receives.
            busy: ranks that are at work at the same time.
        """
        if self.lines:
            line = self.line(kind, size, busy)
            return Way("measured", ((1, "latency", line.latency),), line.bandwidth)
        return min(self._nccl(kind, size, stride), key=lambda way: way.seconds(received))

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

    def _nccl(self, kind: str, size: int, stride: int) -> list[Way]:
        in_domain = min(size, max(1, self.domain // stride))
        nodes = ceil(size / in_domain)
        if kind == "recv":
            near = size * stride <= self.domain
            latency, bandwidth = (8e-6, self.fast) if near else (14e-6, self.slow)
            return [Way("message", ((1, "latency", latency),), bandwidth)]
        adapters = self.slow * (in_domain if kind != "all_to_all" else 1)
        bandwidth = self.fast if nodes == 1 else min(self.fast, adapters)
        if kind == "all_to_all" and nodes > 1:  # what stays in the domain does not pass the adapter
            bandwidth = self.slow * (size - 1) / max(1, size - in_domain)
        steps = 2 * (size - 1) if kind == "all_reduce" else size - 1
        between = 2 * (nodes - 1) if kind == "all_reduce" else nodes - 1
        inside = steps - between
        near_ll = 0.6e-6 * (1.8 if nodes > 1 else 1)
        ways = [
            _way("ring, low latency", 6.6e-6, inside, near_ll, between, 2.7e-6, bandwidth / 4),
            _way("ring", 8.4e-6, inside, 3.4e-6, between, 14e-6, bandwidth),
        ]
        if kind == "all_reduce":
            inside, far = 2 * (in_domain - 1), 2 * log2(nodes)
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
